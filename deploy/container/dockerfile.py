"""A Dockerfile as stages of instructions, and which files its context has: as much of both formats as this project
uses. Anything else is an error, so that nothing is passed over. Called by walk.py and by tests.
"""

import json
import os
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

_FLAG = re.compile(r"--([a-z-]+)=(\S+)\s+")
_KNOWN = frozenset({"RUN", "COPY", "ENV", "WORKDIR", "USER", "EXPOSE", "VOLUME", "HEALTHCHECK", "ENTRYPOINT"})


class DockerfileError(Exception):
    """Something that is not understood here."""


@dataclass(frozen=True)
class Instruction:
    """`flags` are (name, value) in order; `text` is what follows them."""

    name: str
    flags: tuple[tuple[str, str], ...]
    text: str

    def flag(self, name: str) -> str:
        """The value of a flag; empty without it."""
        return next((value for key, value in self.flags if key == name), "")

    def words(self) -> list[str]:
        """The text as a command line, or as the JSON list that it is."""
        return list(json.loads(self.text)) if self.text.startswith("[") else shlex.split(self.text)

    def caches(self) -> list[str]:
        """Folders of `--mount=type=cache`. Raises DockerfileError for other mounts."""
        found = []
        for name, value in self.flags:
            if name == "mount":
                options = dict(option.split("=", 1) for option in value.split(","))
                if options.pop("type", "") != "cache" or set(options) != {"target"}:
                    raise DockerfileError(f"a mount other than of a cache: {value}")
                found.append(options["target"])
        return found


@dataclass(frozen=True)
class Stage:
    """`base` is another stage or an image."""

    name: str
    base: str
    instructions: list[Instruction] = field(default_factory=list)


def parse(text: str) -> dict[str, Stage]:
    """Stages by name, in order. Raises DockerfileError."""
    stages: dict[str, Stage] = {}
    for line in _lines(text):
        name, _, rest = line.partition(" ")
        if name == "FROM":
            found = re.fullmatch(r"(\S+) AS (\S+)", rest.strip())
            if found is None:
                raise DockerfileError(f"a stage without a name: {line}")
            stages[found[2]] = Stage(found[2], found[1])
            continue
        if name not in _KNOWN or not stages:
            raise DockerfileError(f"an instruction that is not understood here: {line}")
        flags, rest = [], rest.strip()
        while match := _FLAG.match(rest):
            flags.append((match[1], match[2]))
            rest = rest[match.end() :]
        stages[next(reversed(stages))].instructions.append(Instruction(name, tuple(flags), rest))
    return stages


def _lines(text: str) -> Iterable[str]:
    """Instructions, each in one line, without comments."""
    bare = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    return [line.strip() for line in bare.replace("\\\n", "").splitlines() if line.strip()]


def needed(stages: dict[str, Stage], target: str) -> list[Stage]:
    """The stages that `target` is made of, each after those that it needs."""
    found: dict[str, Stage] = {}

    def visit(name: str) -> None:
        if name in found or name not in stages:
            return
        stage = stages[name]
        for other in (stage.base, *(one.flag("from") for one in stage.instructions)):
            visit(other)
        found[name] = stage

    visit(target)
    return list(found.values())


def inherited(stages: dict[str, Stage], target: str) -> list[Instruction]:
    """The instructions of a stage after those of the stages that it begins from."""
    stage = stages[target]
    before = inherited(stages, stage.base) if stage.base in stages else []
    return before + stage.instructions


def environment(instructions: Iterable[Instruction]) -> dict[str, str]:
    """The variables that are set by instructions; `$PATH` stands for the PATH so far."""
    found = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
    for one in instructions:
        if one.name == "ENV":
            for word in shlex.split(one.text):
                name, value = word.split("=", 1)
                found[name] = value.replace("$PATH", found["PATH"])
    return found


def context(root: Path, ignore: str) -> list[Path]:
    """The files that a `.dockerignore` leaves, relative to `root`. The last pattern that fits a file, or a folder of
    it, decides."""
    patterns = [line.strip() for line in ignore.splitlines() if line.strip() and not line.startswith("#")]

    def taken(path: Path) -> bool:
        keep = True
        for pattern in patterns:
            bare = pattern.removeprefix("!")
            if any(_fits(part, bare) for part in (path, *path.parents)):
                keep = pattern.startswith("!")
        return keep

    kept = tuple(pattern.removeprefix("!") for pattern in patterns if pattern.startswith("!"))
    found = []
    for folder, folders, files in os.walk(root):
        here = Path(folder).relative_to(root)
        folders[:] = [
            name for name in folders if taken(here / name) or any(_leads_to(here / name, one) for one in kept)
        ]
        found += [here / name for name in files if taken(here / name)]
    return sorted(found)


def _leads_to(folder: Path, pattern: str) -> bool:
    return pattern.startswith((f"{folder}/", "**/"))


def _fits(path: Path, pattern: str) -> bool:
    """As Go's filepath.Match, with `**/` for any folders."""
    if pattern.startswith("**/"):
        return _fits(Path(path.name), pattern.removeprefix("**/"))
    parts = pattern.split("/")
    return len(parts) == len(path.parts) and all(map(fnmatchcase, path.parts, parts))
