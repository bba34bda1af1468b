"""All settings of the service, from the command line (`--max-body-bytes`) or the environment
(`TILEWAVE_MAX_BODY_BYTES`).

One class for both; the command line wins. `read_settings` turns every wrong value into one line that names the setting
and the remedy. Called by `__main__` and by tests.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from enum import StrEnum
from pathlib import Path
from typing import Any, get_args

from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, CliApp, CliSettingsSource, SettingsConfigDict

PREFIX = "TILEWAVE_"
_OF_THE_ENGINE = frozenset({"TILEWAVE_CACHE_DIR", "TILEWAVE_CPU_ISA", "TILEWAVE_PRINT_AFTER"})


class Precision(StrEnum):
    """Arithmetic of the engine."""

    AUTO = "auto"
    FP32 = "fp32"
    TF32 = "tf32"
    BF16 = "bf16"
    FP16 = "fp16"


class Packed(StrEnum):
    """Whether the engine leaves out the padding of masked sequences."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


class EngineProcess(StrEnum):
    """Where the engine runs."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


class Authentication(StrEnum):
    """When requests need an API key."""

    AUTO = "auto"
    REQUIRED = "required"
    OFF = "off"


class LogFormat(StrEnum):
    """How log lines look."""

    CONSOLE = "console"
    JSON = "json"


class LogLevel(StrEnum):
    """What is logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class SettingsError(Exception):
    """A setting has a value that cannot be used; the message is one line."""


class Settings(BaseSettings):
    """Settings of one server process. Sizes are bytes, times seconds unless the name says otherwise."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        frozen=True,
        cli_kebab_case=True,
        cli_prog_name="python -m service",
        cli_implicit_flags=True,
        cli_avoid_json=True,
    )

    host: str = Field(default="127.0.0.1", min_length=1, description="address to listen on")
    port: int = Field(default=8000, ge=0, le=65535, description="TCP port to listen on; 0 picks a free one")
    api_keys: Path | None = Field(default=None, description="file of API keys, each with its rights")
    authentication: Authentication = Field(
        default=Authentication.AUTO,
        description="required, off, or auto: by keys where there are some, and required beyond loopback addresses",
    )
    models: Path = Field(default=Path("models"), description="folder of the model repository")
    poll_models: float = Field(
        default=0.0, ge=0, description="how often to look for changes in the repository, seconds; 0: not at all"
    )
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N")
    precision: Precision = Field(default=Precision.AUTO, description="arithmetic where model.toml says nothing")
    packed: Packed = Field(
        default=Packed.AUTO, description="leave out the padding of masked sequences, where model.toml says nothing"
    )
    threads: int | None = Field(default=None, ge=1, le=1024, description="engine threads; all cores when not set")
    engine_process: EngineProcess = Field(
        default=EngineProcess.AUTO,
        description="engine in a process of its own: always, never, or auto: where it runs on a GPU",
    )
    frontends: int = Field(
        default=0, ge=0, le=256, description="HTTP processes before one engine process; 0: one, as engine-process says"
    )
    transfer_bytes: int = Field(
        default=1 << 30,
        ge=1 << 20,
        le=1 << 40,
        description="shared memory for tensors to the engine's process, and as much back",
    )
    light_run_us: int = Field(
        default=200, ge=0, description="batches that take less, in microseconds, run on the HTTP thread; 0: none"
    )
    preprocess_threads: int = Field(
        default=2, ge=1, le=256, description="threads that decode images, tokenize long texts, read long bodies"
    )

    request_timeout: float = Field(default=30.0, gt=0, description="deadline of a request that names none, seconds")
    header_timeout: float = Field(default=10.0, gt=0, description="time for a request's header to arrive, seconds")
    body_timeout: float = Field(default=30.0, gt=0, description="time for a request body to arrive, seconds")
    keep_alive_timeout: int = Field(
        default=75, ge=1, description="time that an idle connection is kept; load balancers keep theirs for 60 seconds"
    )
    drain_timeout: int = Field(
        default=20, ge=0, description="time for accepted requests to finish after SIGTERM, seconds"
    )

    max_header_bytes: int = Field(default=64 << 10, ge=256, description="largest request line and header together")
    max_body_bytes: int = Field(default=64 << 20, ge=1, description="largest request body, after decompression too")
    max_image_bytes: int = Field(default=32 << 20, ge=1, description="largest image file")
    max_image_pixels: int = Field(default=50_000_000, ge=1, description="largest image, width times height")
    max_images: int = Field(default=64, ge=1, description="images in one request")
    max_text_bytes: int = Field(default=1 << 20, ge=1, description="text in one request, UTF-8 bytes")
    max_inputs: int = Field(default=2048, ge=1, description="texts or token lists in one request")
    max_tensor_elements: int = Field(default=1 << 24, ge=1, description="elements of one tensor of /v2")
    max_connections: int = Field(default=4096, ge=1, description="open connections; more are refused with 503")
    max_preprocess: int = Field(default=256, ge=1, description="images and texts that may wait to be decoded")

    shared_memory_prefixes: str = Field(
        default="",
        pattern=r"^(/[A-Za-z0-9][A-Za-z0-9._+-]*(,/[A-Za-z0-9][A-Za-z0-9._+-]*)*)?$",
        description="beginnings of names of shared memory that clients may register, like /app_,/web_; none: off",
    )

    log_level: LogLevel = Field(default=LogLevel.INFO, description="debug, info, warning or error")
    log_format: LogFormat = Field(default=LogFormat.CONSOLE, description="console or json")
    traces_endpoint: str = Field(
        default="", description="where traces go, an OTLP address like http://host:4318/v1/traces; none when empty"
    )
    access_log: bool = Field(default=False, description="log every request")

    @field_validator("port", mode="before")
    @classmethod
    def _not_a_service_link(cls, value: Any) -> Any:
        if isinstance(value, str) and value.startswith("tcp://"):
            raise ValueError(
                "Kubernetes set this for a Service named 'tilewave'; "
                "set enableServiceLinks: false in the pod, or give --port"
            )
        return value

    @field_validator("frontends")
    @classmethod
    def _has_an_engine_process(cls, value: int, info: ValidationInfo) -> int:
        if value and info.data.get("engine_process") is EngineProcess.NEVER:
            raise ValueError(
                "front ends share an engine in a process of its own, and --engine-process is never; leave one out"
            )
        return value

    @field_validator("models")
    @classmethod
    def _is_a_folder(cls, value: Path) -> Path:
        if not value.is_dir():
            raise ValueError(f"'{value}' is not a folder; name the folder that holds a folder per model")
        return value


def unknown_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Names in the environment that look like settings and are none (a typing error would else go unseen), each with
    the setting closest to it, or an empty string."""
    known = {PREFIX + name.upper() for name in Settings.model_fields} | _OF_THE_ENGINE
    unknown = sorted(name for name in environment if name.upper().startswith(PREFIX) and name.upper() not in known)
    # Compared without the prefix, which alone would make short names similar.
    bare = [name.removeprefix(PREFIX) for name in sorted(known)]
    closest = {name: get_close_matches(name.upper().removeprefix(PREFIX), bare, n=1) for name in unknown}
    return {name: PREFIX + found[0] if found else "" for name, found in closest.items()}


def _add_argument(parser: argparse.ArgumentParser, *flags: str, **options: Any) -> argparse.Action:
    """What `--help` says of one setting: the values as they are typed. pydantic's own has the names of enum members and
    `None`, which nobody can type."""
    field = Settings.model_fields.get(flags[0].removeprefix("--").replace("-", "_"))
    if field is None:  # --help itself
        return parser.add_argument(*flags, **options)
    kinds = [kind for kind in get_args(field.annotation) or (field.annotation,) if kind is not type(None)]
    if "metavar" in options:
        is_enum = issubclass(kinds[0], StrEnum)
        options["metavar"] = f"{{{','.join(kinds[0])}}}" if is_enum else kinds[0].__name__.lower()
    default = "" if field.default is None else f" (default: {field.default})"
    options["help"] = f"{field.description}{default}".replace("%", "%%")
    return parser.add_argument(*flags, **options)


def read_settings(arguments: Sequence[str]) -> Settings:
    """Settings from the command line, then the environment, then the defaults. Raises SettingsError."""
    try:
        source: CliSettingsSource[Any] = CliSettingsSource(Settings, add_argument_method=_add_argument)
        return CliApp.run(Settings, cli_args=list(arguments), cli_settings_source=source)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else "settings"
        message = str(first["msg"]).removeprefix("Value error, ")
        flag, variable = "--" + name.replace("_", "-"), PREFIX + name.upper()
        place = variable if variable in os.environ and flag not in " ".join(arguments) else flag
        value = f" (got {first['input']!r})" if isinstance(first.get("input"), str) else ""
        about = Settings.model_fields[name].description if name in Settings.model_fields else ""
        raise SettingsError(f"{place}: {message}{value}; expected: {about}") from None
