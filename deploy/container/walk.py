"""Builds what the Dockerfile builds, in a folder: Debian by debootstrap for its base image, every instruction in a
change of root, with the same paths and users. Then runs the image as docker-compose.yml does: its user, its entry
point, a read-only root, a health check, SIGTERM.

Needs root, debootstrap and the package registries of Debian and Python. Nothing outside the folder is written; mounts
are made in a mount namespace of each command's own and end with it.
"""

import os
import shlex
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from deploy.container.dockerfile import Instruction, Stage, context, environment, inherited, needed, parse

_DEBIAN = {"debian:bookworm-slim": "bookworm"}
# The slim images of Debian leave these out.
_NOT_IN_SLIM = ("usr/share/doc", "usr/share/man", "usr/share/info", "usr/share/locale", "var/cache/apt",
                "var/lib/apt/lists", "var/log")  # fmt: skip
# How this machine reaches the registries; bound over the root's own files while a command of the build runs.
_CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
_REGISTRY_FILES = {
    **{name: name for name in ("/etc/resolv.conf", "/etc/pip.conf", "/etc/apt/sources.list.d", "/etc/apt/apt.conf.d")},
    _CERTIFICATES: "/run/certificates",
}
# Both default models answer: asked in the image itself.
_QUESTIONS = """
import io, urllib.request
from PIL import Image
picture = io.BytesIO()
Image.new("RGB", (320, 240), "red").save(picture, "PNG")
for path, kind, body in (
    ("efficientnet-lite0/images", "image/png", picture.getvalue()),
    ("all-minilm-l6-v2/tokens", "application/json", b'{"text": "A man is eating food."}'),
):
    request = urllib.request.Request(f"http://127.0.0.1:8000/v1/models/{path}", body, {"Content-Type": kind})
    print(path, urllib.request.urlopen(request).read()[:150].decode())
"""
# The compiler of the image for GPUs works, which needs no GPU.
_COMPILE = """
from itertools import islice
from engine.targets.cuda import covering
from engine.targets.cuda.architecture import ARCHITECTURES
from engine.targets.cuda.compiler import Compiler
for name, architecture in ARCHITECTURES.items():
    for _, launch in islice(covering.launches(architecture), 1):
        code = Compiler(name, cache=None, workers=1).cubin(launch.kernel.source)
        print(name, launch.kernel.family, len(code), "bytes of machine code")
"""
_LOAD = "5s"
_READY_S = 120
_STOP_S = 30


Command = Callable[[list[str]], list[str]]
"""Makes the command line that runs something in the image."""


class WalkError(Exception):
    """Something did not go as the Dockerfile says."""


@dataclass(frozen=True)
class Report:
    """What an image is: bytes of its folders and of its Python packages, and how it ran."""

    target: str
    total: int
    folders: list[tuple[str, int]]
    packages: list[tuple[str, int]]
    ready_seconds: float | None


class Walk:
    """One walk, with its folder."""

    def __init__(self, project: Path, folder: Path) -> None:
        self._project = project
        self._folder = folder
        self._stages = parse((project / "Dockerfile").read_text())

    def build(self, target: str) -> Path:
        """Build an image; its root. Stages that are there already are taken as they are."""
        for stage in needed(self._stages, target):
            root = self._root(stage.name)
            if root.exists():
                continue
            unfinished = root.with_suffix(".unfinished")
            if unfinished.exists():
                shutil.rmtree(unfinished)
            self._begin(stage, unfinished)
            self._stage(stage, unfinished)
            unfinished.rename(root)
        return self._root(target)

    def _root(self, name: str) -> Path:
        return self._folder / "stages" / name

    def _begin(self, stage: Stage, root: Path) -> None:
        """The file system that a stage begins with."""
        print(f"\nFROM {stage.base} AS {stage.name}")
        root.parent.mkdir(parents=True, exist_ok=True)
        source = self._root(stage.base)
        if stage.base not in self._stages:
            source = self._folder / "bases" / stage.base.replace(":", "-")
            if not source.exists():
                self._debian(stage.base, source)
        _run(["cp", "-a", "--reflink=auto", str(source), str(root)])

    def _debian(self, image: str, root: Path) -> None:
        unfinished = root.with_suffix(".unfinished")
        if unfinished.exists():
            shutil.rmtree(unfinished)
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        _run(["debootstrap", "--variant=minbase", _DEBIAN[image], str(unfinished)])
        (unfinished / "etc/apt/sources.list").unlink()  # a command of the build has this machine's sources
        for name in _NOT_IN_SLIM:
            for path in sorted((unfinished / name).glob("*")):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        unfinished.rename(root)

    def _stage(self, stage: Stage, root: Path) -> None:
        before = inherited(self._stages, stage.base) if stage.base in self._stages else []
        directory = next((one.text for one in reversed(before) if one.name == "WORKDIR"), "/")
        for number, one in enumerate(stage.instructions):
            print(f"{one.name} {one.text[:150]}", flush=True)
            if one.name == "WORKDIR":
                directory = one.text
                _inside(root, directory).mkdir(parents=True, exist_ok=True)
            elif one.name == "COPY":
                self._copy(one, root, directory)
            elif one.name == "RUN":
                self._run(one, root, directory, environment((*before, *stage.instructions[:number])))

    def _copy(self, one: Instruction, root: Path, directory: str) -> None:
        *sources, to = one.words()
        if one.flag("from"):
            for source in sources:
                _run(["cp", "-a", "-T", str(_inside(self._root(one.flag("from")), source)), str(_inside(root, to))])
            return
        if (sources, to) != (["."], "."):
            raise WalkError(f"COPY of other than the whole context: {one.text}")
        for path in context(self._project, (self._project / ".dockerignore").read_text()):
            place = _inside(root, directory) / path
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(self._project / path, place)

    def _run(self, one: Instruction, root: Path, directory: str, variables: dict[str, str]) -> None:
        """A command of the build, as root, with its caches and the way to the registries."""
        mounts, made = [], []
        for cache in one.caches():
            kept = self._folder / "caches" / cache.strip("/").replace("/", "-")
            kept.mkdir(parents=True, exist_ok=True)
            _inside(root, cache).mkdir(parents=True, exist_ok=True)
            mounts.append((str(kept), cache))
        for name, where in _REGISTRY_FILES.items():
            place = _inside(root, where)
            if Path(name).exists():
                if not place.exists():
                    place.parent.mkdir(parents=True, exist_ok=True)
                    place.mkdir() if Path(name).is_dir() else place.touch()
                    made.append(place)
                mounts.append((name, where))
        variables |= {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
        variables.pop("PIP_FIND_LINKS", None)  # a folder of this machine
        variables |= {"HOME": "/root", "DEBIAN_FRONTEND": "noninteractive"}
        if os.path.exists(_CERTIFICATES):
            variables["PIP_CERT"] = "/run/certificates"
        _run(_in_root(root, mounts, directory, variables, ["sh", "-c", one.text]))
        for place in made:
            if place.is_dir() and not any(place.iterdir()):
                place.rmdir()
            elif place.is_file() and not place.stat().st_size:
                place.unlink()

    # ---- the image

    def measure(self, target: str, ready_seconds: float | None) -> Report:
        """Bytes of what an image holds, as `du` counts them without blocks: hard links once."""
        root = self._root(target)
        folders = [(str(path.relative_to(root)), _bytes(path)) for path in root.iterdir() if not path.is_symlink()]
        parts = [path for path in (root / "opt/tilewave/lib").glob("python3*/site-packages/*") if path.is_dir()]
        packages = [(path.name, _bytes(path)) for path in parts if not path.name.endswith(".dist-info")]
        return Report(target, _bytes(root), _largest(folders), _largest(packages), ready_seconds)

    def serve(self, target: str) -> float:
        """Run an image as docker-compose.yml does, until it is healthy, and end it; the seconds that took.

        Raises WalkError unless it is healthy, its root is read-only, its user has no rights, and SIGTERM ends it well.
        """
        root, one = self._root(target), {one.name: one for one in inherited(self._stages, target)}
        user = one["USER"].text
        volumes = one["VOLUME"].words()
        scratch = self._folder / "volume"
        if scratch.exists():
            shutil.rmtree(scratch)
        mounts = []
        for volume in volumes:  # a new volume begins as what the image has there, owner and mode included
            kept = scratch / volume.strip("/").replace("/", "-")
            kept.parent.mkdir(parents=True, exist_ok=True)
            _run(["cp", "-a", str(_inside(root, volume)), str(kept)])
            mounts.append((str(kept), volume))
        variables = environment(inherited(self._stages, target)) | {"TILEWAVE_AUTHENTICATION": "off"}
        directory = one["WORKDIR"].text

        def command(words: list[str]) -> list[str]:
            return _in_root(root, mounts, directory, variables, words, user=user)

        self._check_rights(command)
        _, _, health = one["HEALTHCHECK"].text.partition("CMD ")
        started = time.monotonic()
        service = subprocess.Popen(command(one["ENTRYPOINT"].words()), process_group=0)
        enter = ["nsenter", "--target", str(service.pid), "--mount", "--net", "--root", "--wd"]
        check = enter + _as_user(root, user, directory, variables, Instruction("CMD", (), health.strip()).words())
        try:
            while subprocess.run(check, capture_output=True, check=False).returncode:
                if service.poll() is not None or time.monotonic() > started + _READY_S:
                    raise WalkError("the health check never succeeded")
                time.sleep(0.2)
            seconds = time.monotonic() - started
            _run(enter + _as_user(root, user, directory, variables, ["python", "-c", _QUESTIONS]))
            if target == "service-cuda":
                _run(enter + _as_user(root, user, directory, variables, ["python", "-c", _COMPILE]))
            self._load(service.pid)
            service.send_signal(signal.SIGTERM)
            status = service.wait(_STOP_S)
        finally:
            if service.poll() is None:
                service.kill()
        if status:
            raise WalkError(f"SIGTERM ended it with status {status}")
        return seconds

    def _load(self, pid: int) -> None:
        """The load test of docker-compose.yml, a few seconds of it, in the network of the service."""
        one = {one.name: one for one in inherited(self._stages, "load")}
        root, compose = self.build("load"), yaml.safe_load((self._project / "docker-compose.yml").read_text())
        words = [str(word).replace("//tilewave:", "//127.0.0.1:") for word in compose["services"]["load"]["command"]]
        words[words.index("-t") + 1] = _LOAD
        variables = environment(inherited(self._stages, "load"))
        command = [*one["ENTRYPOINT"].words(), *words, "--only-summary"]
        _run(_in_root(root, [], one["WORKDIR"].text, variables, command, user=one["USER"].text, network=pid))

    def _check_rights(self, command: Command) -> None:
        """Who it is, and what it may write."""
        writable, fixed = ("/tmp", "/var/cache/tilewave"), ("/models", "/opt/tilewave", "/", "/etc")
        for path in (*writable, *fixed):
            allowed = path in writable
            done = subprocess.run(command(["touch", f"{path}/probe"]), capture_output=True, check=False)
            if (done.returncode == 0) is not allowed:
                raise WalkError(f"{path} can {'not ' if allowed else ''}be written to: {done.stderr.decode()}")
        identity = subprocess.run(command(["id", "-u"]), capture_output=True, text=True, check=True).stdout.strip()
        rights = subprocess.run(
            command(["grep", "CapEff", "/proc/self/status"]), capture_output=True, text=True, check=True
        ).stdout.split()[1]
        if identity == "0" or int(rights, 16):
            raise WalkError(f"it runs as {identity} with capabilities {rights}")
        print(f"runs as {identity} without capabilities; root read-only, /tmp and /var/cache/tilewave writable")


def _in_root(
    root: Path,
    mounts: list[tuple[str, str]],
    directory: str,
    variables: dict[str, str],
    words: list[str],
    *,
    user: str = "",
    network: int = 0,
) -> list[str]:
    """The command line that runs `words` with `root` as its root, in a mount namespace of its own. With a user: as in a
    container, with a root that is read-only but for /tmp and `mounts`, and a network of its own, or that of the process
    `network`."""
    here = shlex.quote(str(root))
    steps = ["set -e", "mount --make-rprivate /", f"mount --bind {here} {here}"]
    if user:
        steps += [f"mount -o remount,ro,bind {here}", *([] if network else ["ip link set lo up"])]
        steps.append(f"mount -t tmpfs -o mode=1777,nosuid,nodev,noexec tmpfs {here}/tmp")
    steps += [f"mount --bind {shlex.quote(source)} {here}{shlex.quote(place)}" for source, place in mounts]
    steps += [f"mount -t proc proc {here}/proc", f"mount --rbind /dev {here}/dev"]
    steps.append(f"exec chroot {here} " + shlex.join(_as_user(root, user, directory, variables, words)))
    enter = ["nsenter", "--target", str(network), "--net"] if network else []
    return [*enter, "unshare", "--mount", *(["--net"] if user and not network else []), "sh", "-c", "\n".join(steps)]


def _as_user(root: Path, user: str, directory: str, variables: dict[str, str], words: list[str]) -> list[str]:
    """`words` as a user of the image (root without one), with nothing but the image's variables; run in its root."""
    rights = []
    if user:
        entries = (line.split(":") for line in (root / "etc/passwd").read_text().splitlines())
        (ids,) = (entry[2:4] for entry in entries if entry[0] == user)
        rights = ["setpriv", f"--reuid={ids[0]}", f"--regid={ids[1]}", "--clear-groups", "--no-new-privs"]
        rights += ["--inh-caps=-all", "--bounding-set=-all"]
    inside = f"cd {shlex.quote(directory)} && exec {shlex.join(words)}"
    set_ = [f"{name}={value}" for name, value in variables.items()]
    return [*rights, "/usr/bin/env", "-i", *set_, "/bin/sh", "-c", inside]


def _run(command: list[str]) -> None:
    """Raises WalkError where it fails."""
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise WalkError(f"status {done.returncode} of {shlex.join(command)[:2000]}")


def _inside(root: Path, path: str) -> Path:
    return root / path.lstrip("/")


def _bytes(path: Path) -> int:
    """Of the files under a path; hard links once."""
    seen: dict[tuple[int, int], int] = {}
    for file in [path, *path.rglob("*")] if path.is_dir() else [path]:
        about = file.lstat()
        if stat.S_ISREG(about.st_mode):
            seen[about.st_dev, about.st_ino] = about.st_size
    return sum(seen.values())


def _largest(sizes: list[tuple[str, int]]) -> list[tuple[str, int]]:
    return sorted((one for one in sizes if one[1] > 1e5), key=lambda one: -one[1])
