"""The model repository on disk: which folders are models, their versions, settings, labels and tokenizer.

Reads files only; loads nothing. Called by `catalog.py`. A folder that cannot be used becomes a `ModelFolder` with
`problem` set and never disturbs the others.
"""

import hashlib
import logging
import re
from dataclasses import dataclass
from pathlib import Path

from service.errors import InvalidRequest
from service.model_config import ModelConfig, ModelConfigError, read_model_config
from service.workers.messages import ModelKey
from service.workers.wire import printable

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")
_NAME_RULE = "a model name has letters, digits, '.', '_' and '-', and starts with a letter or a digit"
_MAX_LABELS_BYTES = 16 << 20

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model on disk. `versions` are (number, .onnx file), lowest first; `broken` are the version
    folders that hold no model, and why; `problem` says why nothing of it can be loaded. `tokenizer_mark` is that of
    the tokenizer's file (`file_mark`)."""

    name: str
    path: Path
    config: ModelConfig
    versions: tuple[tuple[int, Path], ...]
    labels: tuple[str, ...]
    tokenizer: Path | None
    problem: str = ""
    broken: tuple[tuple[int, str], ...] = ()
    tokenizer_mark: str = ""


@dataclass(frozen=True, slots=True)
class Contents:
    """What a folder has to offer: the versions that may be loaded, those that hold no model and why, and why nothing of
    it can be loaded. Equal as long as the files are the same ones."""

    keys: tuple[ModelKey, ...]
    broken: tuple[tuple[int, str], ...]
    problem: str


def check_name(name: str) -> str:
    """The name itself if it is one that a model folder may have. Raises InvalidRequest (it may hold '../')."""
    if not _NAME.fullmatch(name):
        raise InvalidRequest(_NAME_RULE)
    return name


class Repository:
    """The folder that holds a folder per model."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def scan(self) -> list[ModelFolder]:
        """Every model folder, by name. Folders that hold nothing of a model are passed over."""
        found = []
        for path in self._folders():
            if _NAME.fullmatch(path.name):
                found.append(self._read(path))
            else:
                log.warning("folder %r is passed over: %s", path.name, _NAME_RULE)
        return found

    def names(self) -> list[str]:
        """The names of the model folders."""
        return [path.name for path in self._folders() if _NAME.fullmatch(path.name)]

    def find(self, name: str) -> ModelFolder | None:
        """The folder of a model; None where there is none."""
        path = self.root / check_name(name)
        return self._read(path) if path.is_dir() and _looks_like_a_model(path) else None

    def contents(self, folder: ModelFolder) -> Contents:
        """What is in a folder now. A key's generation stays while the files of the version, and those of its model
        beside it, are the same ones."""
        try:
            keys = tuple(
                ModelKey(folder.name, version, _generation(folder.path, file)) for version, file in folder.versions
            )
        except OSError as error:  # somebody is at it
            return Contents((), (), f"the folder cannot be read: {error.strerror}")
        return Contents(keys, folder.broken, folder.problem)

    def _folders(self) -> list[Path]:
        candidates = (path for path in sorted(self.root.iterdir()) if not path.name.startswith((".", "_")))
        return [path for path in candidates if path.is_dir() and _looks_like_a_model(path)]

    def _read(self, path: Path) -> ModelFolder:
        config = ModelConfig()
        versions: tuple[tuple[int, Path], ...] = ()
        broken: tuple[tuple[int, str], ...] = ()
        labels: tuple[str, ...] = ()
        tokenizer: Path | None = None
        problem = ""
        try:
            config = read_model_config(path / "model.toml")
            versions, broken = _find_versions(path)
            labels = _read_labels(path / "labels.txt")
            tokenizer = _find_tokenizer(path, config)
        except ModelConfigError as error:
            problem = str(error)
        except OSError as error:
            problem = f"the folder cannot be read: {error}"
        mark = file_mark(tokenizer)
        return ModelFolder(path.name, path, config, versions, labels, tokenizer, printable(problem), broken, mark)


def file_mark(path: Path | None) -> str:
    """Which file this is: another text when it was written anew or replaced; empty where there is none."""
    if path is None or not path.is_file():
        return ""
    status = path.stat()
    return repr((path.name, status.st_size, status.st_mtime_ns, status.st_ino))


def _generation(folder: Path, file: Path) -> int:
    digest = hashlib.blake2b(digest_size=6)
    for place in sorted({folder, file.parent}):
        for path in sorted(place.iterdir()):
            digest.update(file_mark(path).encode())
    return int.from_bytes(digest.digest(), "big")


def _looks_like_a_model(path: Path) -> bool:
    try:
        if (path / "model.toml").exists() or any(path.glob("*.onnx")):
            return True
        return any(_VERSION.fullmatch(child.name) and child.is_dir() for child in path.iterdir())
    except OSError:
        return True  # reading it will say what is wrong


def _find_versions(path: Path) -> tuple[tuple[tuple[int, Path], ...], tuple[tuple[int, str], ...]]:
    """The versions that hold a model and those that do not. Raises ModelConfigError where none does."""
    folders = [child for child in path.iterdir() if child.is_dir() and _VERSION.fullmatch(child.name)]
    if not folders:
        return ((1, _only_onnx(path)),), ()
    versions: list[tuple[int, Path]] = []
    broken: list[tuple[int, str]] = []
    for folder in folders:
        try:
            versions.append((int(folder.name), _only_onnx(folder)))
        except ModelConfigError as error:
            broken.append((int(folder.name), str(error)))
    if not versions:
        raise ModelConfigError(max(broken)[1])
    return tuple(sorted(versions)), tuple(sorted(broken))


def _only_onnx(folder: Path) -> Path:
    """model.onnx, or the one .onnx file there is."""
    named = folder / "model.onnx"
    files = [named] if named.exists() else sorted(folder.glob("*.onnx"))
    if len(files) == 1:
        return _with_plain_name(files[0])
    where = "the model folder" if not _VERSION.fullmatch(folder.name) else f"version folder '{folder.name}'"
    if files:
        raise ModelConfigError(f"{where} has several .onnx files; name one of them model.onnx")
    raise ModelConfigError(f"{where} has no model.onnx; build or copy the model there")


def _with_plain_name(file: Path) -> Path:
    """The file itself. Raises ModelConfigError where no JSON can carry its path, as those of other encodings."""
    if printable(str(file)) != str(file):
        raise ModelConfigError(f"the name of {printable(str(file))} is not UTF-8; rename it, a file to model.onnx")
    return file


def _read_labels(path: Path) -> tuple[str, ...]:
    if not path.exists():
        return ()
    if not path.resolve().is_relative_to(path.parent.resolve()):
        raise ModelConfigError(f"{path.name}: it leaves the model's folder; copy the file there")
    if not path.is_file():  # to open a pipe would wait for its writer
        raise ModelConfigError(f"{path.name}: not a file; write one label a line")
    if path.stat().st_size > _MAX_LABELS_BYTES:
        raise ModelConfigError(
            f"{path.name}: the file is over {_MAX_LABELS_BYTES} bytes; it should have a label a line"
        )
    try:
        return tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    except UnicodeDecodeError as error:
        raise ModelConfigError(f"{path.name}: not UTF-8 text ({error.reason}); write one label a line") from None


def _find_tokenizer(path: Path, config: ModelConfig) -> Path | None:
    name = config.tokens.tokenizer
    file = path / name
    if not file.resolve().is_relative_to(path.resolve()):
        raise ModelConfigError(
            f"model.toml: key 'tokens.tokenizer': '{name}' leaves the model's folder; name a file in it"
        )
    if file.is_file():
        return file
    if "tokenizer" in config.tokens.model_fields_set:
        raise ModelConfigError(f"model.toml: key 'tokens.tokenizer': there is no file '{name}' in the model's folder")
    return None
