"""mosec: identity, images or texts. ``PEER_KIND=images PEER_MODEL=folder python mosec_server.py --port PORT``; answers
on /inference. Variables, because the command line is mosec's own, and not that of the processes it starts.

Decoding has a stage and a process of its own before the model, as its documentation advises.
"""

import json
import os
from pathlib import Path
from typing import Any

from mosec import Server, Worker
from onnx_models import Images, Texts

KIND, FOLDER = os.environ["PEER_KIND"], Path(os.environ.get("PEER_MODEL", "."))
MAX_BATCH = 16
MAX_WAIT_MS = 5


class IdentityJson(Worker):
    """Answers with what it gets, as JSON."""

    def forward(self, data: Any) -> Any:
        """The same."""
        return data


class IdentityBinary(Worker):
    """Answers with the bytes it gets."""

    def deserialize(self, data: bytes) -> bytes:
        """As they are."""
        return data

    def serialize(self, data: bytes) -> bytes:
        """As they are."""
        return data

    def forward(self, data: bytes) -> bytes:
        """The same."""
        return data


class Decode(Worker):
    """A body to what the model's stage takes."""

    def __init__(self) -> None:
        super().__init__()
        self.model: Any = Images(FOLDER) if KIND == "images" else Texts(FOLDER)

    def deserialize(self, data: bytes) -> Any:
        """A picture, or the sentence in a document."""
        return data if KIND == "images" else json.loads(data)["text"][0]

    def forward(self, data: Any) -> Any:
        """Pixels or token ids."""
        return self.model.read(data)


class Run(Worker):
    """Batches through the model."""

    def __init__(self) -> None:
        super().__init__()
        self.model: Any = Images(FOLDER) if KIND == "images" else Texts(FOLDER)

    def forward(self, data: list[Any]) -> list[Any]:
        """Labels or vectors."""
        return self.model.run(data)  # type: ignore[no-any-return]

    def serialize(self, data: Any) -> bytes:
        """One answer."""
        return json.dumps({"label": data} if KIND == "images" else {"embeddings": [data]}).encode()


if __name__ == "__main__":
    server = Server()
    if KIND == "json":
        server.append_worker(IdentityJson)
    elif KIND == "binary":
        server.append_worker(IdentityBinary)
    else:
        server.append_worker(Decode)
        server.append_worker(Run, max_batch_size=MAX_BATCH, max_wait_time=MAX_WAIT_MS)
    server.run()
