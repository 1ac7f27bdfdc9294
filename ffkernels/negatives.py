"""Positive and negative data: label overlay, wrong labels, hybrid images (Hinton 2022, sections 3.2, 3.3).

Everything is drawn on the data's device from an optional `torch.Generator` of that device, without a host
sync. The check that labels lie in 0..num_classes-1 reads values, so it is made for CPU tensors alone, and not
under torch.compile. Where it is not made, no label is used as an index, so a bad one cannot reach other memory;
`overlay_label` marks it with NaN and `wrong_label` with -1 (which `overlay_label` then marks), so that a bad label
shows in the loss.
"""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor

from .objectives import short

_LABEL_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def overlay_label(x: Tensor, labels: Tensor, num_classes: int = 10, value: float = 1.0) -> Tensor:
    """A copy of `x` whose first `num_classes` columns hold the one-hot label times `value`.

    `x` [rows, width] of a floating-point dtype, `labels` [rows] of an integer dtype on its device; returns
    [rows, width], contiguous, in `x`'s dtype. An image's first pixels make room: Hinton 2022, section 3.3.

    Raises TypeError for wrong dtypes; ValueError for shapes or devices that do not fit, `num_classes` below 2
    or above the width, a `value` that is not finite, and (CPU) labels outside 0..num_classes-1.
    """
    _check_overlay(x, labels, num_classes, value)
    return _overlaid(x.clone(memory_format=torch.contiguous_format), labels, num_classes, value)


def overlay_label_(x: Tensor, labels: Tensor, num_classes: int = 10, value: float = 1.0) -> Tensor:
    """`overlay_label` in place; returns `x`."""
    _check_overlay(x, labels, num_classes, value)
    return _overlaid(x, labels, num_classes, value)


def _check_overlay(x: Tensor, labels: Tensor, num_classes: int, value: float) -> None:
    check_rows(x, num_classes)
    _check_labels(labels, num_classes)
    if labels.shape != x.shape[:1]:
        hint = ", one-hot rows? labels.argmax(1) makes labels of them" if labels.ndim == 2 else ""
        raise ValueError(f"labels must be [{x.shape[0]}], one per row of x; got {list(labels.shape)}{hint}")
    if labels.device != x.device:
        raise ValueError(f"labels must be on the device of x, {x.device}; got {labels.device}")
    check_value(value)


def _overlaid(x: Tensor, labels: Tensor, num_classes: int, value: float) -> Tensor:
    x[:, :num_classes] = _label_field(labels, num_classes, value, x.dtype)
    return x


def neutral_label(x: Tensor, num_classes: int = 10, value: float | None = None) -> Tensor:
    """A copy of `x` whose first `num_classes` columns all hold `value`, 1/num_classes by default.

    `x` [rows, width] of a floating-point dtype; returns [rows, width], contiguous, in `x`'s dtype. Features
    for a linear classifier are read under it: Hinton 2022, section 3.3. Raises as `overlay_label` does.
    """
    check_rows(x, num_classes)
    value = 1 / num_classes if value is None else value
    check_value(value)
    out = x.clone(memory_format=torch.contiguous_format)
    out[:, :num_classes] = value
    return out


def wrong_label(labels: Tensor, num_classes: int = 10, generator: torch.Generator | None = None) -> Tensor:
    """For each label one of the K-1 wrong ones, equally likely: (label + u) mod K with u uniform over 1..K-1.

    `labels` of any shape and an integer dtype; returns int64 of that shape, on their device. Raises TypeError
    for wrong dtypes; ValueError for `num_classes` below 2, a generator of another device, and (CPU) labels
    outside 0..num_classes-1.
    """
    _check_labels(labels, num_classes)
    _check_generator(generator, labels.device)
    shift = torch.randint(1, num_classes, labels.shape, generator=generator, device=labels.device)
    labels = labels.long()
    return ((labels + shift) % num_classes).masked_fill_(_out_of_range(labels, num_classes), -1)


def hybrid_images(
    x: Tensor,
    generator: torch.Generator | None = None,
    *,
    height: int | None = None,
    width: int | None = None,
    blurs: int = 10,
) -> Tensor:
    """Negative images without labels: each is `mask * x1 + (1 - mask) * x2`, x2 another image of the batch.

    The masks are `random_masks` (drawn first); the second images are a random cyclic permutation of the batch
    (drawn second), so each image is used twice and never mixed with itself. Hinton 2022, section 3.2.

    `x` [rows, height * width] (height and width default to the square root, or one to the quotient by the
    other) or [rows, height, width], of a floating-point dtype, with at least two rows; returns `x`'s shape
    and dtype. Raises TypeError for wrong dtypes; ValueError for fewer rows, sizes that do not fit, or a
    generator of another device.
    """
    _check_float(x, "x")
    height, width = _image_size(x, height, width)
    rows = x.shape[0]
    if rows < 2:
        raise ValueError(f"x must hold at least 2 rows, to mix each image with another; got {rows}")
    mask = random_masks(rows, height, width, blurs=blurs, generator=generator, device=x.device).view(x.shape)
    order = torch.randperm(rows, generator=generator, device=x.device)
    # each image's partner is the next one in a random round: no fixed points, every round equally likely
    partner = torch.empty_like(order).scatter_(0, order, order.roll(-1))
    return torch.where(mask, x, x[partner])


def random_masks(
    count: int,
    height: int,
    width: int,
    *,
    blurs: int = 10,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Random blobs: bool [count, height, width], True on about half of the area.

    Random bits, blurred `blurs` times with [1/4, 1/2, 1/4] along both directions (the edge repeated outside
    the image, so that edges are as often True as the middle), then True above 0.5: Hinton 2022, section 3.2,
    which leaves the number of passes open. n passes blur by a standard deviation of sqrt(n / 2) pixels.

    `device` defaults to the generator's, else the CPU. Raises TypeError or ValueError for sizes that are no
    positive integers (`count` and `blurs` may be 0), and for a generator of another device.
    """
    _check_int(count, "count", 0)
    _check_int(height, "height", 1)
    _check_int(width, "width", 1)
    _check_int(blurs, "blurs", 0)
    if device is None:
        device = "cpu" if generator is None else generator.device
    device = torch.device(device)
    _check_generator(generator, device)
    size = (count, height, width)
    bits = torch.randint(0, 2, size, generator=generator, device=device, dtype=torch.float32)
    # all passes along one direction are one small matrix; kept out of autocast, so that a seed names one mask
    with torch.autocast(device.type, enabled=False):
        blurred: Tensor = _blur_matrix(height, blurs, device) @ bits @ _blur_matrix(width, blurs, device).T
    return blurred > 0.5


def _blur_matrix(size: int, blurs: int, device: torch.device) -> Tensor:
    """[size, size]: `blurs` passes of [1/4, 1/2, 1/4], the edge repeated outside the image; float32."""
    eye = torch.eye(size, dtype=torch.float32, device=device)
    at = torch.arange(size, device=device)
    once = 0.5 * eye + 0.25 * eye[(at - 1).clamp(min=0)] + 0.25 * eye[(at + 1).clamp(max=size - 1)]
    power: Tensor = torch.linalg.matrix_power(once, blurs)
    return power


def _label_field(labels: Tensor, num_classes: int, value: float, dtype: torch.dtype) -> Tensor:
    """[rows, num_classes]: `value` at the label, 0 elsewhere; NaN all along a row of a label out of range."""
    columns = torch.arange(num_classes, device=labels.device)
    labels = labels.long()[:, None]
    field = torch.zeros(labels.shape[0], num_classes, dtype=dtype, device=labels.device)
    field.masked_fill_(labels == columns, value)
    return field.masked_fill_(_out_of_range(labels, num_classes), math.nan)


def _out_of_range(labels: Tensor, num_classes: int) -> Tensor:
    return (labels < 0) | (labels >= num_classes)


def _image_size(x: Tensor, height: int | None, width: int | None) -> tuple[int, int]:
    for name, size in (("height", height), ("width", width)):
        if size is not None:
            _check_int(size, name, 1)
    if x.ndim == 3:
        found = (x.shape[1], x.shape[2])
        if (height or found[0], width or found[1]) != found:
            raise ValueError(f"height and width must be those of x, {found}; got {height} and {width}")
        return found
    if x.ndim != 2:
        raise ValueError(f"x must be [rows, height * width] or [rows, height, width]; got {list(x.shape)}")
    pixels = x.shape[1]
    if height is None:
        height, width = (pixels // width, width) if width else (math.isqrt(pixels), math.isqrt(pixels))
    elif width is None:
        width = pixels // height
    if pixels == 0 or height * width != pixels:
        raise ValueError(f"height * width must be the {pixels} columns of x; got {height} * {width}")
    return height, width


def check_rows(x: Tensor, num_classes: int) -> None:
    """Raises TypeError or ValueError unless `x` is `[rows, width]`, floating point, and has a label field."""
    _check_float(x, "x")
    if x.ndim != 2:
        hint = "; flatten each row first: x.flatten(1)" if x.ndim > 2 else ""
        raise ValueError(f"x must be [rows, width]; got {list(x.shape)}{hint}")
    _check_int(num_classes, "num_classes", 2)
    if num_classes > x.shape[1]:
        raise ValueError(f"num_classes must be at most the width of x, {x.shape[1]}; got {num_classes}")


def _check_labels(labels: Tensor, num_classes: int) -> None:
    _check_int(num_classes, "num_classes", 2)
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor; got {type(labels).__name__}")
    _check_dense(labels, "labels")
    if labels.dtype not in _LABEL_DTYPES:
        raise TypeError(f"labels must be of an integer dtype, as labels.long() is; got {labels.dtype}")
    if labels.device.type == "cpu" and labels.numel() and not torch.compiler.is_compiling():
        low, high = (int(bound) for bound in labels.aminmax())
        if low < 0 or high >= num_classes:
            raise ValueError(f"labels must lie in 0..{num_classes - 1}; got {low}..{high}")


def _check_float(x: Tensor, name: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(x).__name__}")
    _check_dense(x, name)
    if not x.is_floating_point():
        hint = f"; {name} / 255 makes it of pixels" if x.dtype == torch.uint8 else ""
        raise TypeError(f"{name} must be of a floating-point dtype; got {x.dtype}{hint}")


def _check_dense(tensor: Tensor, name: str) -> None:
    if tensor.layout != torch.strided or tensor.is_nested:
        raise TypeError(f"{name} must be dense; got a {'nested' if tensor.is_nested else tensor.layout} tensor")


def _check_int(number: int, name: str, least: int) -> None:
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"{name} must be an int; got {type(number).__name__}")
    if number < least:
        raise ValueError(f"{name} must be at least {least}; got {number}")


def check_value(value: float) -> None:
    """Raises TypeError or ValueError unless `value`, which is to mark a label, is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"value must be a number; got {type(value).__name__}")
    if not abs(value) <= sys.float_info.max:
        raise ValueError(f"value must be finite; got {short(value)}")


def _check_generator(generator: torch.Generator | None, device: torch.device) -> None:
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator; got {type(generator).__name__}")
    mine, theirs = generator.device, device
    if mine.type != theirs.type or (None not in (mine.index, theirs.index) and mine.index != theirs.index):
        raise ValueError(f"generator must be of the data's device, {theirs}; got one of {mine}")
