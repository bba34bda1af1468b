"""``python -m engine inspect``: what a model becomes: inputs, outputs, the steps of its plan, memory."""

from __future__ import annotations

import argparse

import engine
from engine.cli.common import open_model, quantity, shape_text, sizes, step_text, table
from engine.ir.ops import Opaque
from engine.ir.printer import op_text
from engine.plan.plan import Plan

NAME = "inspect"
HELP = "show the inputs, the outputs, and the plan a model is compiled to"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def main(arguments: argparse.Namespace) -> int:
    with open_model(arguments) as model:
        chosen = sizes(arguments, model, packed=True)
        plan = model.plan(chosen)
        for title, specs in (("input", model.inputs), ("output", model.outputs)):
            for spec in specs:
                print(f"{title:6}  {spec.name}: {spec.dtype}{shape_text(spec.shape)}")
        print(f"packed  {_packed(model)}")
        print(f"sizes   {', '.join(f'{name}={size}' for name, size in chosen.items()) or 'all fixed'}\n")
        rows = [["", "step", "operator", "output", "FLOPs", "bytes", "FLOP/byte"]]
        for index, step in enumerate(plan.steps):
            intensity = step.cost.flops / step.cost.bytes if step.cost.bytes else 0.0
            rows.append(
                [
                    str(index),
                    step_text(step.name, 40),
                    op_text(step.op, [f"%{i}" for i in range(len(step.inputs))])[:90],
                    shape_text(step.outputs[0].shape),
                    quantity(step.cost.flops, ""),
                    quantity(step.cost.bytes, "B"),
                    f"{intensity:.1f}",
                ]
            )
        print(table(rows, frozenset({0, 4, 5, 6})))
        _summary(model, plan)
    return 0


def _packed(model: engine.Model) -> str:
    """Whether the model runs on packed tokens, and why not."""
    if model.packed_size is None:
        return f"no: {model.why_padded}"
    where = f"yes, where {model.packed_mask!r} is ones and then zeros in every row"
    return f"{where} (--size {model.packed_size}=N shows the plan for N tokens)"


def _summary(model: engine.Model, plan: Plan) -> None:
    opaque = sum(isinstance(step.op, Opaque) for step in plan.steps)
    largest = max((b.nbytes for b in plan.buffers if b.kind.value == "arena"), default=0)
    print(f"\n{len(plan.steps)} steps, {opaque} opaque")
    print(f"{quantity(sum(step.cost.flops for step in plan.steps), 'FLOP')}, "
          f"{quantity(sum(step.cost.bytes for step in plan.steps), 'B')} touched")  # fmt: skip
    print(f"arena {quantity(plan.arena_bytes, 'B')} for buffers of {quantity(plan.unshared_bytes, 'B')} in all; "
          f"largest buffer {quantity(largest, 'B')}")  # fmt: skip
    print(f"loaded in {model.load_seconds:.2f} s")
