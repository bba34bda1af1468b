"""A model version as the routes see it: its state, its task, its codecs, its metrics and statistics.

Made by `catalog.py` when it is to be loaded, filled in when the worker reports the model ready. Event loop only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from service.codecs.images import ImageSpec, image_size, make_image_spec
from service.codecs.tokens import TokenCodec, not_tokens
from service.errors import InvalidRequest, NotServed, Unavailable
from service.metrics import ModelMetrics
from service.model_config import Pooling, Task
from service.repository import ModelFolder
from service.settings import Settings
from service.workers.messages import BatchingOptions, LoadModel, ModelKey, ModelReady, TensorInfo


class ModelState(StrEnum):
    """The states of the Open Inference Protocol's repository index."""

    LOADING = "LOADING"
    READY = "READY"
    UNAVAILABLE = "UNAVAILABLE"


@dataclass(slots=True)
class ServedModel:
    """One version of one model. `reason` says why it is not READY; the server is not ready before an `expected` model
    is."""

    key: ModelKey
    folder: ModelFolder
    options: BatchingOptions
    metrics: ModelMetrics
    expected: bool = True
    state: ModelState = ModelState.LOADING
    reason: str = ""
    ready: ModelReady | None = None
    task: Task = Task.TENSORS
    images: ImageSpec | None = None
    tokens: TokenCodec | None = None
    not_tokens: str = ""
    _main: TensorInfo | None = None
    _unused: Callable[[], None] | None = None

    def use(self) -> None:
        """A request begins; `end_use` has to follow."""
        self.metrics.inflight += 1

    def end_use(self) -> None:
        """A request has ended."""
        self.metrics.inflight -= 1
        if self._unused is not None and not self.metrics.inflight:
            unused, self._unused = self._unused, None
            unused()

    def when_unused(self, call: Callable[[], None]) -> None:
        """Call when no request uses the model, which new ones do not any more."""
        if self.metrics.inflight:
            self._unused = call
        else:
            call()

    def load_command(self, settings: Settings) -> LoadModel:
        """What the worker is told to load."""
        config = self.folder.config
        return LoadModel(
            key=self.key,
            path=str(dict(self.folder.versions)[self.key.version]),
            device=settings.device,
            precision=(config.precision or settings.precision).value,
            threads=settings.threads,
            batching=self.options,
            image_size=image_size(config.images),
            packed=(config.packed or settings.packed).value,
        )

    def accept(self, ready: ModelReady) -> None:
        """The worker has it: find its task and its codecs, so that it can be served. Raises ValueError if model.toml
        and model disagree."""
        config = self.folder.config
        if len(ready.inputs) == 1:
            only = ready.inputs[0]
            self.images = make_image_spec(only.name, only.dtype, only.shape, config.images)
        if self.images is None:
            self.not_tokens = not_tokens(ready.inputs)
            if not self.not_tokens and (self._means_tokens() or looks_like_tokens(ready.inputs)):
                self.tokens = TokenCodec(ready.inputs, config.tokens, self.folder.tokenizer)
            elif self._means_tokens():
                raise ValueError(
                    f"{self._means_tokens()} says that this is a model for tokens, but {self.not_tokens}; "
                    "correct the model, or remove that and send its tensors to /v2"
                )
        self.task = config.task or self._infer_task(ready)
        if self.task is Task.IMAGE_CLASSIFICATION and self.images is None:
            raise ValueError(
                "model.toml: key 'task' says images, but no input of the model fits an image; correct the task"
            )
        self.ready = ready
        self._main = self._find_main(ready)
        self._check_labels()

    def _means_tokens(self) -> str:
        """What in the folder says that the model takes tokens; empty if nothing does."""
        if self.folder.config.task in _TOKEN_TASKS:
            return "model.toml: key 'task'"
        return self.folder.tokenizer.name if self.folder.tokenizer is not None else ""

    def _infer_task(self, ready: ModelReady) -> Task:
        ranks = {len(spec.shape) for spec in ready.outputs}
        if self.images is not None:
            return Task.IMAGE_CLASSIFICATION if 2 in ranks else Task.TENSORS
        if self.tokens is None:
            return Task.TENSORS
        logits = bool(self.folder.labels) or any(spec.name == "logits" for spec in ready.outputs)
        if 3 in ranks and not logits:
            return Task.SENTENCE_EMBEDDING
        if 3 in ranks:
            return Task.TOKEN_CLASSIFICATION
        if 2 in ranks:
            return Task.TEXT_CLASSIFICATION if logits else Task.SENTENCE_EMBEDDING
        return Task.TENSORS

    def _check_labels(self) -> None:
        labels = self.folder.labels
        if not labels or self.task in (Task.TENSORS, Task.SENTENCE_EMBEDDING) or self.ready is None:
            return
        counts = {spec.shape[1 if len(spec.shape) == 4 else -1] for spec in self.ready.outputs if len(spec.shape) >= 2}
        if all(isinstance(count, int) for count in counts) and len(labels) not in counts:
            raise ValueError(f"labels.txt has {len(labels)} lines, but no output has as many classes; correct the file")

    def check_ready(self) -> None:
        """Raises Unavailable unless requests may begin."""
        if self.ready is None or self.state is not ModelState.READY:
            loading = self.state is ModelState.LOADING
            what = self.reason or ("it is loading" if loading else "it is not loaded")
            text = f"model '{self.key.name}' version {self.key.version} is not ready: {what}"
            raise Unavailable(text) if loading else NotServed(text)

    @property
    def specs(self) -> ModelReady:
        """What the worker said of the model; a request that has begun may ask, whatever becomes of the model. Raises
        Unavailable for a model that never was ready."""
        if self.ready is None:
            raise Unavailable(f"model '{self.key.name}' version {self.key.version} is not ready")
        return self.ready

    def main_output(self) -> TensorInfo:
        """The output that the task is about: per-token vectors for pooling, else (batch, n). Raises InvalidRequest."""
        if self._main is None:
            raise InvalidRequest(
                f"model '{self.key.name}' has no output that fits its task '{self.task}'; use /v2 for its tensors"
            )
        return self._main

    def _find_main(self, ready: ModelReady) -> TensorInfo | None:
        ranks = {Task.TOKEN_CLASSIFICATION: (3,), Task.IMAGE_CLASSIFICATION: (2, 4), Task.TEXT_CLASSIFICATION: (2,)}
        wanted = ranks.get(self.task, (3, 2))
        if self.task is Task.SENTENCE_EMBEDDING and self.folder.config.tokens.pooling is Pooling.NONE:
            wanted = (2,)
        return next((spec for rank in wanted for spec in ready.outputs if len(spec.shape) == rank), None)


_TOKEN_TASKS = (Task.SENTENCE_EMBEDDING, Task.TEXT_CLASSIFICATION, Task.TOKEN_CLASSIFICATION)


def looks_like_tokens(inputs: tuple[TensorInfo, ...]) -> bool:
    """Whether every input is an integer (batch, sequence) tensor."""
    return all(len(spec.shape) == 2 and spec.dtype.kind in "iu" for spec in inputs)
