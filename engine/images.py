"""Pictures on their way to a model, on the CPU: what a service that decodes them needs beside `engine.load`."""

from __future__ import annotations

from engine.targets.cpu.image import Box, Filter, resize

__all__ = ["Box", "Filter", "resize"]
