"""What a launch must know of the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .support import interpreted


@lru_cache
def processors(device: torch.device) -> int:
    """Processors of a device; the interpreter's one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@lru_cache
def has_bulk_copies(device: torch.device) -> bool:
    """Whether the device has the tensor memory accelerator."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def descriptor(tensor: Tensor | None, block: list[int]) -> TensorDescriptor | None:
    """`tensor` for the bulk copies of Hopper and newer; None where its layout, or the device, does not allow them."""
    if tensor is None or not tensor.numel() or tensor.stride(1) != 1:
        return None
    if tensor.data_ptr() % 16 or tensor.stride(0) * tensor.element_size() % 16:
        return None
    if not interpreted() and not has_bulk_copies(tensor.device):
        return None
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block)


@contextmanager
def device_of(tensor: Tensor) -> Iterator[None]:
    """Triton launches on the current device, which need not be the tensors' own."""
    if tensor.device.type != "cuda":
        yield
        return
    with torch.cuda.device(tensor.device):
        yield
