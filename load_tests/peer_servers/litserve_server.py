"""LitServe: identity, images or texts. ``python litserve_server.py KIND PORT [MODEL_FOLDER]``; answers on /predict.

It reads JSON and forms: a picture comes as base64 in JSON, which is how its users send bytes.
"""

import base64
import sys
from pathlib import Path
from typing import Any

import litserve
from onnx_models import Images, Texts

MAX_BATCH = 16
BATCH_TIMEOUT_S = 0.005


class Identity(litserve.LitAPI):
    """Answers with what it gets."""

    def setup(self, device: str) -> None:
        """Nothing to load."""

    def decode_request(self, request: dict[str, Any]) -> dict[str, Any]:
        """The document."""
        return request

    def predict(self, x: dict[str, Any]) -> dict[str, Any]:
        """The same."""
        return x

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        """The document."""
        return output


class ImagesApi(litserve.LitAPI):
    """Base64 of JPEG files to labels."""

    def setup(self, device: str) -> None:
        """Load the model."""
        self.model = Images(Path(sys.argv[3]))

    def decode_request(self, request: dict[str, str]) -> Any:
        """Pixels."""
        return self.model.read(base64.b64decode(request["image"]))

    def batch(self, inputs: list[Any]) -> list[Any]:
        """As they are."""
        return inputs

    def predict(self, x: list[Any]) -> list[str]:
        """Labels."""
        return self.model.run(x)

    def unbatch(self, output: list[str]) -> list[str]:
        """As they are."""
        return output

    def encode_response(self, output: str) -> dict[str, str]:
        """One label."""
        return {"label": output}


class TextsApi(litserve.LitAPI):
    """One sentence a request to its vector."""

    def setup(self, device: str) -> None:
        """Load the model."""
        self.model = Texts(Path(sys.argv[3]))

    def decode_request(self, request: dict[str, list[str]]) -> list[int]:
        """Token ids."""
        return self.model.read(request["text"][0])

    def batch(self, inputs: list[Any]) -> list[Any]:
        """As they are."""
        return inputs

    def predict(self, x: list[list[int]]) -> list[list[float]]:
        """Vectors."""
        return self.model.run(x)

    def unbatch(self, output: list[list[float]]) -> list[list[float]]:
        """As they are."""
        return output

    def encode_response(self, output: list[float]) -> dict[str, list[list[float]]]:
        """One vector."""
        return {"embeddings": [output]}


if __name__ == "__main__":
    kind, port = sys.argv[1], int(sys.argv[2])
    if kind == "identity":
        api: litserve.LitAPI = Identity()
    else:
        made = ImagesApi if kind == "images" else TextsApi
        api = made(max_batch_size=MAX_BATCH, batch_timeout=BATCH_TIMEOUT_S)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=port, num_api_servers=1, log_level="warning", generate_client_file=False)
