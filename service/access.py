"""Who may do what: API keys with separate rights, read from a file, asked for by every request.

`read_access` is called when the app is made; the middleware asks `Access.check` before all else sees a request. Off on
loopback addresses unless there are keys, required on all others unless switched off by name. Keys are kept as their
SHA-256: what is compared takes no time that would tell anything about a key.
"""

import hashlib
import ipaddress
import logging
import re
import stat
from collections.abc import Iterable, Mapping
from enum import StrEnum
from pathlib import Path

from service.errors import Forbidden, Unauthorized
from service.settings import Authentication, Settings, SettingsError

log = logging.getLogger(__name__)

_KEY = re.compile(r"[\x21-\x7e]{16,256}")
_MAX_FILE_BYTES = 1 << 20
_REMEDY = "a line has rights, separated by commas, and after a space the key: inference,metrics 0123456789abcdef"


class Right(StrEnum):
    """What a key may allow. `INFERENCE` includes looking at models."""

    INFERENCE = "inference"
    ADMINISTRATION = "administration"
    METRICS = "metrics"


_OPEN = re.compile(r"/|/page/[^/]+|/docs|/openapi\.json|/v2|/v2/health/(live|ready)")
_OF_ADMINISTRATORS = ("/v2/repository/", "/v2/systemsharedmemory/")


def right_for(path: str) -> Right | None:
    """The right that a path needs; None where it needs none. What nobody has thought of needs one."""
    if _OPEN.fullmatch(path):
        return None
    if path == "/metrics":
        return Right.METRICS
    return Right.ADMINISTRATION if path.startswith(_OF_ADMINISTRATORS) else Right.INFERENCE


class Access:
    """The keys of one file, or nothing to ask for."""

    def __init__(self, file: Path | None) -> None:
        """Raises SettingsError for a file that cannot be used."""
        self._file = file
        self._rights: Mapping[bytes, frozenset[Right]] = _read(file) if file is not None else {}
        self.asks = file is not None
        """Whether there is anything to ask for."""

    @classmethod
    def awaiting(cls, file: Path | None) -> "Access":
        """With the keys that another process has, whatever is in the file now; none is known before `take`."""
        access = cls(None)
        access._file, access.asks = file, file is not None
        return access

    def take(self, given: Mapping[str, Iterable[str]]) -> None:
        """The keys of another process."""
        self._rights = {bytes.fromhex(digest): frozenset(map(Right, rights)) for digest, rights in given.items()}

    def give(self) -> dict[str, list[str]]:
        """The keys for another process, as JSON: by their SHA-256 the rights."""
        return {digest.hex(): sorted(rights) for digest, rights in self._rights.items()}

    def check(self, path: str, authorization: str) -> None:
        """Raises Unauthorized or Forbidden unless a request to `path` with this header may go on."""
        if self._file is None:
            return
        needed = right_for(path)
        if needed is None:
            return
        scheme, _, key = authorization.partition(" ")
        rights = self._rights.get(_digest(key.strip())) if scheme.lower() == "bearer" else None
        if rights is None:
            what = "this API key is not known" if authorization else "this needs an API key"
            raise Unauthorized(f"{what}; send 'Authorization: Bearer' and one that has the right '{needed}'")
        if needed not in rights:
            raise Forbidden(f"this API key has not the right '{needed}'")

    def reload(self) -> None:
        """Read the file again; one that cannot be used changes nothing. A pipe, from which a start may read, is not
        read a second time: that would wait for its writer."""
        if self._file is None:
            return
        if self._file.exists() and not self._file.is_file():
            log.error("the API keys stay as they were: %s is not a regular file any more", self._file)
            return
        try:
            self._rights = _read(self._file)
        except SettingsError as error:
            log.error("the API keys stay as they were: %s", error)


def read_access(settings: Settings) -> Access:
    """What the settings ask for. Raises SettingsError where keys are needed and there are none."""
    if settings.authentication is Authentication.OFF:
        return Access(None)
    if settings.api_keys is None and not (
        settings.authentication is Authentication.AUTO and _is_loopback(settings.host)
    ):
        where = "is required" if settings.authentication is Authentication.REQUIRED else f"on {settings.host}"
        raise SettingsError(
            f"--api-keys: authentication {where}, but there are no keys; expected: a file of API keys, "
            "or --authentication off to let everybody in who can reach the address"
        )
    return Access(settings.api_keys)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _read(file: Path) -> dict[bytes, frozenset[Right]]:
    try:
        status = file.stat()
        if status.st_size > _MAX_FILE_BYTES:
            raise SettingsError(f"--api-keys: {file} is over {_MAX_FILE_BYTES} bytes; {_REMEDY}")
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"--api-keys: {file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"--api-keys: {file} is no text; {_REMEDY}") from None
    if status.st_mode & stat.S_IROTH:
        log.warning("everybody on this machine can read the API keys in %s; chmod 600 it", file)
    keys: dict[bytes, frozenset[Right]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        parts = line.split()
        if len(parts) != 2 or not set(parts[0].split(",")) <= set(Right):
            raise SettingsError(f"--api-keys: line {number} of {file} is not understood; {_REMEDY}")
        if not _KEY.fullmatch(parts[1]):
            raise SettingsError(f"--api-keys: the key in line {number} of {file} needs 16 to 256 printable characters")
        if _digest(parts[1]) in keys:
            raise SettingsError(f"--api-keys: the key in line {number} of {file} is there twice")
        keys[_digest(parts[1])] = frozenset(map(Right, parts[0].split(",")))
    if not keys:
        raise SettingsError(f"--api-keys: {file} holds no key; {_REMEDY}")
    return keys


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
