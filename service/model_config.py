"""The schema of `model.toml`. All of it is optional; what is missing is inferred from the .onnx file.

Read by `repository.py`. A wrong key, type or value is a `ModelConfigError` that names the key and what to do.
"""

import json
import tomllib
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from service.settings import Packed, Precision
from service.workers.messages import BatchingOptions

_MAX_TOML_BYTES = 1 << 20


class Task(StrEnum):
    """What a model does: it decides which endpoints answer for it, and how."""

    IMAGE_CLASSIFICATION = "image-classification"
    SENTENCE_EMBEDDING = "sentence-embedding"
    TEXT_CLASSIFICATION = "text-classification"
    TOKEN_CLASSIFICATION = "token-classification"
    TENSORS = "tensors"


class Layout(StrEnum):
    """Order of the axes of an image tensor."""

    NCHW = "NCHW"
    NHWC = "NHWC"


class Interpolation(StrEnum):
    """Filter of the image resize."""

    NEAREST = "nearest"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    LANCZOS = "lanczos"


class Pooling(StrEnum):
    """How per-token vectors become one per sentence."""

    MEAN = "mean"
    CLS = "cls"
    NONE = "none"


class ModelConfigError(Exception):
    """A model folder that cannot be used; the message names the file, the key and what to do."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Extent = Annotated[int, Field(ge=1, le=16384)]


class BatchingConfig(_Section):
    """`[batching]`: rows and tokens of one run, how long a run may wait to fill, edges of similar lengths."""

    max_batch: int | None = Field(default=None, ge=1, le=65536)
    max_tokens: int | None = Field(default=None, ge=1, le=1 << 24)
    max_delay_ms: float | None = Field(default=None, ge=0, le=60_000)
    buckets: tuple[Annotated[int, Field(ge=1, le=1 << 24)], ...] | None = Field(
        default=None, min_length=1, max_length=256
    )

    @field_validator("buckets")
    @classmethod
    def _rising(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is not None and list(value) != sorted(set(value)):
            raise ValueError("must rise from one edge to the next; sort them and drop doubles")
        return value


class ImagesConfig(_Section):
    """`[images]`: `size` of the crop and `resize` of the shorter side in pixels, `mean` and `std` in 0-255 units.
    `dct_scaling`: a JPEG may be decoded at a half, a quarter or an eighth of its size where that is large enough."""

    size: Extent | tuple[Extent, Extent] | None = None
    resize: Extent | None = None
    interpolation: Interpolation = Interpolation.BICUBIC
    mean: tuple[float, ...] = Field(default=(0.0,), min_length=1, max_length=4)
    std: tuple[Annotated[float, Field(gt=0)], ...] = Field(default=(255.0,), min_length=1, max_length=4)
    layout: Layout | None = None
    dct_scaling: bool = False


class TokensConfig(_Section):
    """`[tokens]`: `tokenizer` is a file in the model's folder; texts are cut to `max_length` tokens."""

    tokenizer: str = Field(default="tokenizer.json", min_length=1)
    max_length: int | None = Field(default=None, ge=1, le=1 << 20)
    pooling: Pooling = Pooling.MEAN
    normalize: bool = True


class ModelConfig(_Section):
    """`model.toml`."""

    task: Task | None = None
    precision: Precision | None = None
    packed: Packed | None = None
    source: str | None = None
    license: str | None = None
    batching: BatchingConfig = BatchingConfig()
    images: ImagesConfig = ImagesConfig()
    tokens: TokensConfig = TokensConfig()


def batching_options(config: BatchingConfig) -> BatchingOptions:
    """What `[batching]` says, and the defaults for the rest."""
    options = BatchingOptions()
    return replace(
        options,
        max_batch=config.max_batch or options.max_batch,
        max_tokens=config.max_tokens or options.max_tokens,
        max_delay_s=(config.max_delay_ms or 0.0) / 1000,
        buckets=config.buckets or options.buckets,
    )


def read_model_config(path: Path) -> ModelConfig:
    """Read a model.toml; a missing file is all defaults. Raises ModelConfigError."""
    if not path.exists():
        return ModelConfig()
    if not path.is_file():  # to open a pipe would wait for its writer
        raise ModelConfigError(f"{path.name}: not a file; write the model's settings there or remove it")
    try:
        if path.stat().st_size > _MAX_TOML_BYTES:
            raise ModelConfigError(
                f"{path.name}: the file is over {_MAX_TOML_BYTES} bytes; it should hold settings only"
            )
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        # JSON mode is what makes pydantic strict about types yet ready to read lists as tuples and strings as enums.
        return ModelConfig.model_validate_json(json.dumps(data, default=str))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"] if isinstance(part, str) and part.isidentifier())
        if first["type"] == "extra_forbidden":
            raise ModelConfigError(f"{path.name}: unknown key '{key}'; remove it or check its spelling") from None
        message = str(first["msg"]).removeprefix("Value error, ")
        raise ModelConfigError(f"{path.name}: key '{key}': {message}; correct it or remove it") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError, RecursionError) as error:
        raise ModelConfigError(f"{path.name}: cannot be read: {error}; correct the file") from None
