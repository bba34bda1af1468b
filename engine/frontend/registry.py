"""Which function reads which ONNX operator. Modules in `operators/` register theirs with `@operator`; `translate` looks
them up by domain, name and opset version."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from engine.ir.graph import Value

if TYPE_CHECKING:
    from engine.frontend.onnx_node import OnnxNode

Results: TypeAlias = "Value | Sequence[Value | None]"
F = TypeVar("F", bound=Callable[..., Any])

MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Operator:
    """A registered function: from opset `since` on, taking between `least` and `most` inputs (None: any number)."""

    function: Callable[..., Any]
    since: int
    required: tuple[bool, ...]
    variadic: bool

    def __call__(self, node: OnnxNode, inputs: Sequence[Value | None]) -> Results:
        results: Results = self.function(node, *inputs)
        return results


_OPERATORS: dict[tuple[str, str], list[Operator]] = {}


def operator(*names: str, since: int = 1, domain: str = "") -> Callable[[F], F]:
    """Register the decorated function for `names` from opset `since` of `domain` on.

    The function takes the node and then one `Value` per ONNX input; inputs with a default, or annotated as
    `Value | None`, are optional.
    """

    def register(function: F) -> F:
        parameters = list(inspect.signature(function).parameters.values())[1:]
        entry = Operator(
            function,
            since,
            tuple(_is_required(p) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD),
            any(p.kind is p.VAR_POSITIONAL for p in parameters),
        )
        for name in names:
            versions = _OPERATORS.setdefault((domain, name), [])
            versions.append(entry)
            versions.sort(key=lambda candidate: -candidate.since)
        return function

    return register


def _is_required(parameter: inspect.Parameter) -> bool:
    # Annotations are text: they are not evaluated.
    return parameter.default is parameter.empty and "None" not in str(parameter.annotation)


def find(domain: str, name: str, version: int) -> Operator | None:
    """The function for operator `name` at opset `version`, None where there is none."""
    for candidate in _OPERATORS.get((domain, name), ()):
        if candidate.since <= version:
            return candidate
    return None


def registered() -> frozenset[tuple[str, str]]:
    """(domain, name) of every operator that has a function."""
    return frozenset(_OPERATORS)
