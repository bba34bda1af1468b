"""Every error the engine raises on purpose. A message names the thing (file, node, tensor, setting) and the remedy."""


class EngineError(Exception):
    """Base of all errors raised on purpose by the engine."""


class ModelError(EngineError):
    """The model file is not valid: unreadable, truncated, cyclic, inconsistent, or outside the limits."""


class UnsupportedOp(ModelError):
    """The model needs an operator, an attribute or a type that the engine cannot run."""


class ShapeError(EngineError):
    """A tensor handed in does not fit the model: name, dtype, rank, size or value out of range."""


class DeviceError(EngineError):
    """The device asked for is absent, unsupported or has failed."""


class DeviceLost(DeviceError):
    """The device has failed for good as far as this process goes (a sticky CUDA error): only a new process can use
    it."""


class OutOfMemory(EngineError):
    """The device has too little memory for the model or the shapes asked for."""
