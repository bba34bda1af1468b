"""Servers as processes: ours and the peers', started for one measurement and ended with it; their memory and files."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
_READY_S = 300  # with cold caches
_PORTS = range(20_000, 32_000)


class Server:
    """A server on a port of this machine; `log` has what it printed."""

    def __init__(
        self, command: Sequence[str], port: int, ready: str, log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.port = port
        self.log = log
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                list(command),
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._ready = f"http://127.0.0.1:{port}{ready}"

    @property
    def pid(self) -> int:
        """Of its first process."""
        return self._process.pid

    def wait_ready(self) -> float:
        """Until it answers with 200; the seconds that took. Raises RuntimeError where it ends before."""
        began = time.monotonic()
        while not self.is_ready():
            if self._process.poll() is not None or time.monotonic() - began > _READY_S:
                raise RuntimeError(f"the server is not ready: {self.log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.01)
        return time.monotonic() - began

    def is_ready(self) -> bool:
        """Whether it answers with 200 now."""
        try:
            with urllib.request.urlopen(self._ready, timeout=5) as answer:
                return bool(answer.status == 200)
        except urllib.error.HTTPError as error:
            return error.code == 405  # a route that takes other methods is there
        except OSError:
            return False

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the samples of `/metrics` with these labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        total = 0.0
        for line in text.splitlines():
            head, _, value = line.rpartition(" ")
            if head.split("{")[0] == name and all(f'{key}="{wanted}"' in head for key, wanted in labels.items()):
                total += float(value)
        return total

    def document(self, path: str) -> Any:
        """What it answers to GET, as JSON."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as answer:
            return json.load(answer)

    def processes(self) -> list[int]:
        """It and all processes under it."""
        parents: dict[int, int] = {}
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                with contextlib.suppress(OSError):
                    parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        found = [self.pid]
        for pid in found:
            found += [child for child, parent in parents.items() if parent == pid]
        return found

    def engine_process(self) -> int:
        """The process id of the engine's own process."""
        for pid in self.processes():
            if b"service.workers.child" in (Path("/proc") / str(pid) / "cmdline").read_bytes():
                return pid
        raise RuntimeError("the engine has no process of its own")

    def memory_mb(self) -> float:
        """Resident memory of all its processes that was allocated, in megabytes; what they share is counted once. Pages
        of mapped files are left out: how many of them are ours depends on who else maps the same libraries."""
        return self._resident_mb("Pss_Anon:", "Pss_Shmem:")

    def rss_mb(self) -> float:
        """Resident memory of all its processes, in megabytes, as `ps` has it."""
        return self._resident_mb("Rss:")

    def _resident_mb(self, *kinds: str) -> float:
        total = 0
        for pid in self.processes():
            with contextlib.suppress(OSError):
                for line in (Path("/proc") / str(pid) / "smaps_rollup").read_text().splitlines():
                    if line.startswith(kinds):
                        total += int(line.split()[1]) * 1024
        return total / 1e6

    def cpu_seconds(self) -> float:
        """CPU time of all threads of all its processes so far."""
        nanoseconds = 0
        for pid in self.processes():
            for task in Path(f"/proc/{pid}/task").glob("*/schedstat"):
                with contextlib.suppress(OSError):
                    nanoseconds += int(task.read_text().split()[0])
        return nanoseconds / 1e9

    def open_files(self) -> int:
        """Descriptors of all its processes."""
        return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in self.processes())

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to its first process."""
        self._process.send_signal(number)

    def wait(self, seconds: float) -> int:
        """Its exit status. Raises subprocess.TimeoutExpired."""
        return self._process.wait(seconds)

    def stop(self) -> None:
        """End it and all its processes."""
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(40)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()


def free_port() -> int:
    """A port that is free, and stays so while a server takes seconds to start: it is none of those, from 32,768 on,
    that the system gives to whoever asks for any, connections included. Raises OSError where none is found."""
    for port in random.SystemRandom().sample(_PORTS, 100):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise OSError(f"no port from {_PORTS.start} to {_PORTS.stop} is free")


@contextlib.contextmanager
def running(server: Server) -> Iterator[Server]:
    """A server that is ready, and is ended."""
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def tilewave(models: Path, folder: Path, *arguments: str, module: str = "service") -> Iterator[Server]:
    """Our server with a model repository; its log is in `folder`."""
    port = free_port()
    command = [sys.executable, "-m", module, "--models", str(models), "--port", str(port), *arguments]
    with running(Server(command, port, "/v2/health/ready", folder / f"tilewave-{port}.log")) as server:
        yield server
