"""Numbers that are none: NaN and infinity in what a model answers. JSON has neither.

Tensors as they are (`/v2`, `?raw=true`) have `null` there, and `/v2` counts them; a label or an embedding made of them
would be worthless, so that is refused. Called by the routes and by `outputs.py`.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.errors import EngineFailed


def count_non_finite(values: NDArray[Any]) -> int:
    """How many elements are NaN or infinity."""
    return values.size - int(np.count_nonzero(np.isfinite(values))) if values.dtype.kind == "f" else 0


def require_finite(values: NDArray[np.float32], model: str, output: str) -> NDArray[np.float32]:
    """`values`, made from an output of a model, whose first axis is that of the rows. Raises EngineFailed."""
    if not np.isfinite(values).all():
        row = int(np.argwhere(~np.isfinite(values))[0][0])
        raise EngineFailed(
            f"model '{model}' answered with NaN or infinity in output '{output}' for row {row}, which makes no result; "
            "?raw=true or /v2 show its tensors"
        )
    return values
