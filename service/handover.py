"""What a front end tells one that is started beside it: the models that it serves, for where the repository's files
are not those any more that were loaded.

The engine has such a model still; what the HTTP side needs of it comes from here instead of the disk. Used by
`frontend.py`, which asks for it, and `catalog.py`, which serves it.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.model import ModelState, ServedModel
from service.model_config import ModelConfig
from service.repository import ModelFolder, file_mark
from service.workers.messages import ModelKey

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HandedOver:
    """A version of a model and its folder as another front end has them; `reason` says why it is not served."""

    key: ModelKey
    folder: ModelFolder
    reason: str


def describe(model: ServedModel) -> dict[str, Any]:
    """As JSON: everything but the tokenizer, of which its place is said, and which file it was."""
    key, folder = model.key, model.folder
    return {
        "key": [key.name, key.version, key.generation],
        "reason": "" if model.state is ModelState.READY else model.reason,
        "path": str(folder.path),
        "versions": [[version, str(file)] for version, file in folder.versions],
        "config": folder.config.model_dump_json(exclude_unset=True),
        "labels": folder.labels,
        "tokenizer": str(folder.tokenizer) if folder.tokenizer is not None else None,
        "tokenizer_mark": folder.tokenizer_mark,
    }


def hand_over(documents: Iterable[dict[str, Any]]) -> list[HandedOver]:
    """From JSON; without models of which the tokenizer is another file by now. Reads the disk."""
    found: list[HandedOver] = []
    spoiled: set[str] = set()
    for document in documents:
        key = ModelKey(*document["key"])
        tokenizer = Path(document["tokenizer"]) if document["tokenizer"] else None
        folder = ModelFolder(
            name=key.name,
            path=Path(document["path"]),
            config=ModelConfig.model_validate_json(document["config"]),
            versions=tuple((version, Path(file)) for version, file in document["versions"]),
            labels=tuple(document["labels"]),
            tokenizer=tokenizer,
            tokenizer_mark=document["tokenizer_mark"],
        )
        found.append(HandedOver(key, folder, document["reason"]))
        if file_mark(tokenizer) != folder.tokenizer_mark:
            spoiled.add(key.name)
    for name in sorted(spoiled):
        log.error("model %s is served with a tokenizer that is gone; this front end loads what there is now", name)
    return [version for version in found if version.key.name not in spoiled]
