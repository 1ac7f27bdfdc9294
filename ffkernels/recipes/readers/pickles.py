"""The pickles that CIFAR's batches are, read without running anything that they name."""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from typing import Any

import torch
from torch import Tensor


class _StandIn:
    """Takes the place of what a pickle calls, and only keeps what it is given.

    As a class it is no target of BUILD, which without `__setstate__` would set attributes of it.
    """

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class Array(_StandIn):
    """A numpy array of bytes: numpy is not needed, and no code of it runs."""

    def tensor(self) -> Tensor:
        """uint8, of the array's shape; ValueError where the array is of another type or its bytes do not fill it."""
        _, shape, dtype, by_columns, content = self.state
        kind = dtype.arguments[0]
        if kind not in (b"u1", "u1") or not isinstance(content, bytes):
            raise ValueError(f"an array of {kind!r}, not of bytes")
        if math.prod(shape) != len(content) or not content:
            raise ValueError(f"an array of shape {list(shape)}, but of {len(content)} bytes")
        flat = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        if by_columns:
            return flat.view(*reversed(shape)).permute(*reversed(range(len(shape)))).contiguous()
        return flat.view(*shape)


_ALLOWED: dict[tuple[str, str], type] = {
    ("numpy", "ndarray"): Array,
    ("numpy", "dtype"): _StandIn,
    ("numpy.core.multiarray", "_reconstruct"): Array,
    ("numpy._core.multiarray", "_reconstruct"): Array,  # written by numpy 2
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no file of CIFAR does")
        return _ALLOWED[module, name]


def load(content: bytes) -> Any:
    """What a pickle holds: str (bytes where Python 2 wrote it), int, list, tuple, dict, None, bool, float, `Array`.

    Raises whatever pickle does for one that is damaged, and UnpicklingError for one that names anything else.
    """
    for opcode, argument, _ in pickletools.genops(content):
        # pickle takes memory for every place up to the highest that is written to
        if "PUT" in opcode.name and int(argument or 0) > len(content):
            raise pickle.UnpicklingError(f"place {argument} in {len(content)} bytes")
    return _Unpickler(io.BytesIO(content), encoding="bytes").load()
