"""Which symbols of a model are one and the same size. Called by `engine.frontend.read` between two translations.

Exporters often leave axes without a name, or give every input a name of its own. Where the model adds or joins two
tensors, their symbols must be equal; the classes found that way get one name each, and the batch axis is called so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from engine.frontend.translate import generated_symbol
from engine.ir.dim import is_symbol
from engine.ir.graph import Value

BATCH = "batch"


def unify(inputs: Sequence[Value], equal: Iterable[tuple[str, str]], renames: Mapping[str, str]) -> dict[str, str]:
    """New renames: from the names in the file to one name per class. `inputs` and `equal` already use `renames`."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            name = parent[name]
        return name

    for a, b in equal:
        parent[root(a)] = root(b)
    generated = {generated_symbol(value.name, axis) for value in inputs for axis in range(value.rank)}
    order = [str(dim) for value in inputs for dim in value.shape if is_symbol(dim)]
    leading = {str(value.shape[0]) for value in inputs if value.rank and is_symbol(value.shape[0])}
    classes: dict[str, list[str]] = {}
    for name in dict.fromkeys(order):
        classes.setdefault(root(name), []).append(name)
    result: dict[str, str] = {}
    batch_taken = BATCH in order
    for members in classes.values():
        named = [name for name in members if name not in generated]
        chosen = named[0] if named else members[0]
        if not named and not batch_taken and leading & set(members):
            chosen, batch_taken = BATCH, True
        result.update((name, chosen) for name in members if name != chosen)
    return {name: result.get(new, new) for name, new in renames.items()} | {
        name: new for name, new in result.items() if name not in renames
    }
