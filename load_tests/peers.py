"""The peers' environments and servers. Each environment is made once, beside this file, with pinned packages."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from ctypes.util import find_library
from pathlib import Path

from load_tests.servers import Server, free_port

_ENVIRONMENTS = Path(__file__).parent / ".peers"
_SERVERS = Path(__file__).parent / "peer_servers"
_RUNTIME = ("numpy==2.4.6", "onnxruntime==1.32.0", "pillow==13.0.0", "tokenizers==0.23.3")
PACKAGES = {
    "echo": ("fastapi==0.165.0", "uvicorn[standard]==0.54.0"),
    "litserve": ("litserve==0.2.19", *_RUNTIME),
    "mosec": ("mosec==0.9.8", *_RUNTIME),
    "schemathesis": ("schemathesis==4.32.5",),
    # Its last wheel with the tool in it that old systems run, and what the tool is linked with.
    "perf-analyzer": ("tritonclient==2.48.0", "nvidia-cuda-runtime-cu12==12.9.79"),
}


def environment(name: str) -> Path:
    """The `bin` folder of a peer's environment, which is made where there is none. Raises CalledProcessError."""
    folder = _ENVIRONMENTS / name
    done = folder / ".done"
    wanted = "\n".join(PACKAGES[name])
    if not done.exists() or done.read_text() != wanted:
        print(f"making an environment for {name}: {', '.join(PACKAGES[name])}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([str(folder / "bin" / "pip"), "install", "--quiet", *PACKAGES[name]], check=True)
        done.write_text(wanted)
    return folder / "bin"


def perf_analyzer() -> tuple[Path, dict[str, str]]:
    """The public tool, and the environment variables it needs. Its third library is Debian's libb64-0d, taken from a
    package where the system has none. Raises CalledProcessError."""
    tool = environment("perf-analyzer") / "perf_analyzer"
    (cuda,) = tool.parent.parent.glob("lib/python*/site-packages/nvidia/cuda_runtime/lib")
    libraries = _ENVIRONMENTS / "libb64"
    if find_library("b64") is None and not libraries.exists():
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(["apt-get", "download", "libb64-0d"], cwd=folder, check=True, capture_output=True)
            (package,) = Path(folder).glob("*.deb")
            subprocess.run(["dpkg", "-x", str(package), str(libraries)], check=True)
    paths = [str(cuda), *(str(file.parent) for file in libraries.rglob("libb64.so.0d"))]
    return tool, {"LD_LIBRARY_PATH": os.pathsep.join(paths)}


def echo(logs: Path) -> Server:
    """The bare route."""
    port = free_port()
    command = [str(environment("echo") / "python"), str(_SERVERS / "echo.py"), str(port)]
    return Server(command, port, "/echo", logs / "echo.log")


def litserve(kind: str, logs: Path, model: Path | None = None) -> Server:
    """LitServe with `identity`, `images` or `texts`."""
    port = free_port()
    command = [str(environment("litserve") / "python"), str(_SERVERS / "litserve_server.py"), kind, str(port)]
    return Server([*command, *([str(model)] if model else [])], port, "/health", logs / f"litserve-{kind}.log")


def mosec(kind: str, logs: Path, model: Path | None = None) -> Server:
    """mosec with `json`, `binary`, `images` or `texts`."""
    port = free_port()
    command = [str(environment("mosec") / "python"), str(_SERVERS / "mosec_server.py"), "--port", str(port)]
    command += ["--timeout", "60000"]  # ms; its default of 3 s is less than what a batch waits on a slow machine
    variables = {"PEER_KIND": kind, "PEER_MODEL": str(model or ".")}
    return Server(command, port, "/", logs / f"mosec-{kind}.log", variables)
