"""Editing a graph with its links kept up to date: what a pass that changes many nodes uses, so that it stays linear.

`Graph.replace` and `Graph.redirect` walk the whole graph on every call. An `Editor` keeps producers and readers in
dictionaries instead, takes edits in any order, and restores topological order once, in `finish`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from engine.ir.graph import Graph, Node, Value, make_node
from engine.ir.ops import Op

_ORIGIN_LIMIT = 160  # characters: names of long fused chains are cut, they are for people


class Editor:
    """The graph as nodes with links. Values and nodes are compared by identity."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._nodes: dict[Node, None] = dict.fromkeys(graph.nodes)
        self._producers = graph.producers()
        self._users: dict[Value, dict[Node, None]] = {}
        self._outputs = set(graph.outputs)
        self._edited = False
        for node in graph.nodes:
            for value in node.inputs:
                self._users.setdefault(value, {})[node] = None

    def nodes(self) -> list[Node]:
        """The nodes present now: those of the graph in their order, then the ones added since."""
        return list(self._nodes)

    def alive(self, node: Node) -> bool:
        return node in self._nodes

    def producer(self, value: Value) -> Node | None:
        return self._producers.get(value)

    def users(self, value: Value) -> list[Node]:
        """The nodes that read `value`, once each. Graph outputs do not count: see `is_output`."""
        return list(self._users.get(value, ()))

    def is_output(self, value: Value) -> bool:
        return value in self._outputs

    def only_user(self, value: Value) -> Node | None:
        """The node that reads `value`, if it is one alone and the value is no output of the graph."""
        users = self._users.get(value, ())
        return next(iter(users)) if len(users) == 1 and value not in self._outputs else None

    def single_use(self, value: Value) -> bool:
        return self.only_user(value) is not None

    def add(self, op: Op, inputs: Sequence[Value], name: str, origin: str) -> Node:
        """A new node with fresh outputs."""
        node = make_node(op, inputs, name, origin)
        self._link(node)
        return node

    def update(
        self,
        node: Node,
        op: Op | None = None,
        inputs: Sequence[Value] | None = None,
        outputs: Sequence[Value] | None = None,
        origin: str | None = None,
    ) -> None:
        """Change a node in place. Outputs given may be values that another, already removed, node used to compute."""
        self._unlink(node)
        node.op = op if op is not None else node.op
        node.inputs = tuple(inputs) if inputs is not None else node.inputs
        node.outputs = tuple(outputs) if outputs is not None else node.outputs
        node.origin = origin if origin is not None else node.origin
        self._link(node)

    def remove(self, node: Node) -> None:
        self._unlink(node)
        del self._nodes[node]

    def redirect(self, old: Value, new: Value) -> None:
        """Make every reader of `old` (nodes and graph outputs) read `new` instead."""
        self._edited = True
        for node in self.users(old):
            self.update(node, inputs=[new if value is old else value for value in node.inputs])
        if old in self._outputs:
            self.graph.outputs = [new if value is old else value for value in self.graph.outputs]
            self._outputs.discard(old)
            self._outputs.add(new)

    def prune(self, values: Iterable[Value]) -> None:
        """Remove the producers of `values` that nobody reads any more, and theirs in turn."""
        stack = list(values)
        while stack:
            node = self._producers.get(stack.pop())
            if node is not None and not any(self._users.get(v) or v in self._outputs for v in node.outputs):
                self.remove(node)
                stack.extend(node.inputs)

    def depends(self, values: Iterable[Value], on: Node, limit: int = 400) -> bool:
        """Whether one of `values` is computed from an output of `on`. Gives up, saying yes, after `limit` nodes."""
        seen: set[Node] = set()
        stack = [node for value in values if (node := self._producers.get(value)) is not None]
        while stack:
            node = stack.pop()
            if node is on or len(seen) > limit:
                return True
            if node not in seen:
                seen.add(node)
                stack.extend(before for value in node.inputs if (before := self._producers.get(value)) is not None)
        return False

    def finish(self) -> bool:
        """Write the nodes back: dead ones dropped, topological order restored. True where anything was changed."""
        if self._edited:
            self.graph.nodes = list(self._nodes)
            self.graph.sort()
            self.graph.remove_dead()
        return self._edited

    def _link(self, node: Node) -> None:
        self._edited = True
        self._nodes[node] = None
        for value in node.outputs:
            self._producers[value] = node
        for value in node.inputs:
            self._users.setdefault(value, {})[node] = None

    def _unlink(self, node: Node) -> None:
        self._edited = True
        for value in node.outputs:
            if self._producers.get(value) is node:
                del self._producers[value]
        for value in node.inputs:
            self._users[value].pop(node, None)


def joined_origin(*nodes: Node) -> str:
    """The origin of a node made from several: their names, once each."""
    parts = dict.fromkeys(part for node in nodes for part in node.origin.split(" + ") if part)
    text = " + ".join(parts)
    return text if len(text) <= _ORIGIN_LIMIT else text[: _ORIGIN_LIMIT - 1] + "…"
