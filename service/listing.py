"""Which models there are and in what state: what routes and other front ends ask. `Catalog` is this and changes it.
Event loop only.
"""

from collections import defaultdict
from collections.abc import Iterable

from service.errors import NotFound, NotServed
from service.model import ModelState, ServedModel
from service.repository import Repository
from service.workers.messages import ModelKey


class Listing:
    """The models of one server process: what is shown of them, and what requests get."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._models: dict[str, dict[int, ServedModel]] = {}
        self._broken: dict[str, str] = {}

    def all_models(self) -> list[ServedModel]:
        """Every version of every model that could be read, by name and version."""
        return [self._models[name][version] for name in sorted(self._models) for version in sorted(self._models[name])]

    def broken(self) -> dict[str, str]:
        """Names of folders that cannot be read, and why."""
        return dict(self._broken)

    def unknown(self) -> list[str]:
        """Names of folders in the repository that nobody had loaded. Reads the disk."""
        try:
            names = self._repository.names()
        except OSError as error:
            raise NotServed(f"the repository's folder cannot be read: {error.strerror}; bring it back") from None
        return [name for name in names if name not in self._models and name not in self._broken]

    def versions(self, name: str) -> list[ServedModel]:
        """The versions of one model, lowest first. Raises NotFound, or NotServed for a broken folder."""
        if name in self._broken:
            raise NotServed(f"model '{name}' is unavailable: {self._broken[name]}")
        self.check_known(name)
        return [self._models[name][version] for version in sorted(self._models[name])]

    def find(self, name: str, version: str | None = None) -> ServedModel:
        """A version of a model: the one asked for, else the highest that is ready, or will be. Raises NotFound,
        NotServed."""
        if version is None and name not in self._broken:
            there = self._models.get(name, {})
            ready = [number for number, model in there.items() if model.state is ModelState.READY]
            if ready:
                return there[max(ready)]
        versions = self.versions(name)
        if version is None:
            usable = [model for model in versions if model.state is not ModelState.UNAVAILABLE]
            return (usable or versions)[-1]
        for model in versions:
            if str(model.key.version) == version:
                return model
        raise NotFound(f"model '{name}' has no version '{version[:32]}'")

    def check_known(self, name: str) -> None:
        """Raises NotFound where a model is neither there nor broken."""
        if name not in self._models and name not in self._broken:
            raise NotFound(f"there is no model '{name[:128]}'; GET /v1/models lists them")

    def served(self) -> list[ModelKey]:
        """Every version that is ready."""
        return [model.key for model in self.all_models() if model.state is ModelState.READY]

    def changed(self, served: Iterable[ModelKey]) -> list[str]:
        """Names of models whose folders do not have exactly these versions of them. Reads the disk."""
        keys: defaultdict[str, set[ModelKey]] = defaultdict(set)
        for key in served:
            keys[key.name].add(key)
        folders = {name: self._repository.find(name) for name in keys}
        return [
            name
            for name, folder in folders.items()
            if folder is None or {*self._repository.contents(folder).keys} != keys[name]
        ]
