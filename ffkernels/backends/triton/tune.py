"""Times configurations on scratch tensors and writes the best of each shape as a file that `configs.py` finds."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.testing import do_bench

from ...objectives import DEFAULT_OBJECTIVE
from ...spec import Geometry, Layer, MapRows, MapSlopes, Numbers, Rows, Slot, Update
from . import configs, conv, launch, operands
from .configs import Config
from .device import has_bulk_copies
from .records import Pull, Written

# Rows, in, out: small batches of wide layers, and batches that fill a GPU.
SHAPES = [(200, 1000, 1000), (256, 2000, 2000), (8192, 2048, 2048), (100_000, 784, 500)]
# Kernels of 3 x 3 on so many maps, with their channels in, channels out and sides: a first layer, and ones behind it.
MAPS = [(100, 1, 32, 28), (128, 32, 64, 16), (512, 128, 256, 16)]


def _forward(m: int, n: int, k: int, warps: int, stages: int, tma: int = 0, persistent: int = 0) -> Config:
    tile = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP": 8, "num_warps": warps, "num_stages": stages}
    return tile | {"TMA": tma, "PERSISTENT": persistent}


def _update(o: int, i: int, k: int, warps: int, stages: int, parts: int, tma: int = 0) -> Config:
    tile = {"BLOCK_OUT": o, "BLOCK_IN": i, "BLOCK_K": k, "GROUP": 8, "num_warps": warps, "num_stages": stages}
    return tile | {"PARTS": parts, "TMA": tma}


def _conv_forward(m: int, n: int, k: int, warps: int, stages: int) -> Config:
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP": 8, "num_warps": warps, "num_stages": stages}


def _conv_update(o: int, i: int, k: int, warps: int, stages: int) -> Config:
    return {"BLOCK_OUT": o, "BLOCK_IN": i, "BLOCK_K": k, "GROUP": 8, "num_warps": warps, "num_stages": stages}


# Small and large tiles; the keys are those of the kernels.
CANDIDATES = {
    "forward": [
        _forward(32, 32, 64, 4, 3), _forward(64, 32, 64, 4, 3), _forward(64, 64, 64, 4, 3), _forward(64, 128, 64, 4, 3),
        _forward(128, 64, 32, 4, 3), _forward(128, 128, 32, 8, 3), _forward(128, 128, 64, 8, 3),
        _forward(128, 256, 64, 8, 3), _forward(64, 64, 32, 4, 2), _forward(128, 128, 64, 8, 4, tma=1),
        _forward(128, 256, 64, 8, 4, tma=1), _forward(128, 256, 64, 8, 3, tma=1, persistent=1),
    ],
    "update": [
        _update(32, 64, 32, 4, 2, 1), _update(64, 64, 32, 4, 3, 2), _update(64, 64, 64, 4, 3, 2),
        _update(64, 128, 32, 4, 3, 2), _update(64, 128, 64, 4, 3, 2), _update(128, 128, 32, 8, 3, 2),
        _update(128, 128, 64, 8, 3, 2), _update(128, 128, 64, 8, 2, 4), _update(128, 128, 64, 8, 3, 2, tma=1),
        _update(128, 128, 64, 8, 4, 2, tma=1), _update(128, 256, 64, 8, 3, 8, tma=1),
    ],
    "conv_forward": [
        _conv_forward(64, 32, 32, 4, 3), _conv_forward(128, 32, 32, 4, 3), _conv_forward(64, 64, 32, 4, 3),
        _conv_forward(128, 64, 32, 4, 3), _conv_forward(64, 128, 32, 4, 3), _conv_forward(128, 128, 32, 8, 3),
        _conv_forward(128, 128, 64, 8, 3),
    ],
    "conv_update": [
        _conv_update(32, 64, 32, 4, 3), _conv_update(32, 128, 32, 4, 2), _conv_update(64, 64, 32, 4, 2),
        _conv_update(64, 128, 32, 4, 3), _conv_update(64, 128, 32, 8, 3), _conv_update(128, 128, 32, 8, 3),
    ],
}  # fmt: skip
SOURCES = (
    "common", "forward", "coefficient", "rules", "peers", "slopes", "update", "finish",
    "windows", "conv_forward", "pools", "conv_slopes", "conv_update",
)  # fmt: skip


def tune(folder: Path, seconds: float, say: Callable[[str], None], device: torch.device) -> Path:
    """Tunes for a device, for `seconds` at most; shapes that time leaves out keep what they had.

    Returns:
        The file that was written.
    """
    name, _ = configs.device_names(device.index)
    found: dict[str, Any] = json.loads(json.dumps(configs.for_device(device.index)))
    for kernel in configs.KERNELS:
        for kind in configs.kinds_of(kernel):
            found.setdefault(kernel, configs.of_kernel(kernel, device.index)).setdefault(kind, [])
    deadline = time.monotonic() + seconds
    for kernel, kind, shape in _work():
        best = _best(kernel, kind, shape, device, deadline, say)
        if best is None:
            continue
        named = config_shape(kernel, shape)
        entries = [entry for entry in found[kernel][kind] if tuple(entry["shape"]) != named]
        found[kernel][kind] = [*entries, {"shape": list(named), "config": best[0], "ms": round(best[1], 4)}]
        say(f"{kernel} {kind} {shape}: {best[1]:.3f} ms, {best[0]}")
    about = {
        "made_for": name,
        "tuned": True,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "kernels": kernel_hash(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{configs.file_stem(name)}.json"
    kernels = {kernel: found[kernel] for kernel in configs.KERNELS}
    path.write_text(json.dumps({**about, **kernels}, indent=1) + "\n")
    configs.for_device.cache_clear()
    return path


def kernel_hash() -> str:
    """Identifies the kernels that were timed."""
    digest = hashlib.sha256()
    for source in SOURCES:
        digest.update(Path(__file__).with_name(f"{source}.py").read_bytes())
    return digest.hexdigest()[:16]


def _work() -> Iterator[tuple[str, str, tuple[int, ...]]]:
    for kind in ("half", "mixed", "float32"):
        for number in range(len(SHAPES)):
            for kernel in configs.KERNELS:
                shapes = SHAPES if kernel in configs.LINEAR_KERNELS else MAPS
                if kind in configs.kinds_of(kernel) and number < len(shapes):
                    yield kernel, kind, shapes[number]


def config_shape(kernel: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """As a file names it: of maps the places, the columns and the channels of their product."""
    if kernel in configs.LINEAR_KERNELS:
        return shape
    rows, ins, outs, side = shape
    return rows * side * side, 9 * ins, outs


def _best(
    kernel: str,
    kind: str,
    shape: tuple[int, ...],
    device: torch.device,
    deadline: float,
    say: Callable[[str], None],
) -> tuple[Config, float] | None:
    """The fastest candidate and its milliseconds; None where time does not last for all, or none runs."""
    run = _scratch(kernel, kind, shape, device)
    best: tuple[Config, float] | None = None
    for config in CANDIDATES[kernel]:
        if time.monotonic() > deadline:
            say(f"{kernel} {kind} {shape}: no time left")
            return None
        if config.get("TMA") and not has_bulk_copies(device):
            continue
        configs.FORCED[kernel] = config
        try:
            milliseconds = float(do_bench(run, warmup=5, rep=30))
        except triton.runtime.errors.OutOfResources:
            continue
        except Exception as error:  # one candidate that a compiler cannot take must not cost the others
            say(f"{kernel} {kind} {shape}: {config} fails with {type(error).__name__}: {error}")
            continue
        finally:
            configs.FORCED.clear()
        if best is None or milliseconds < best[1]:
            best = config, milliseconds
    return best


def _scratch(kernel: str, kind: str, shape: tuple[int, ...], device: torch.device) -> Callable[[], object]:
    """A launch on tensors of its own: the forward from rows, or Adam on a weight; or what a convolution has."""
    compute = torch.float32 if kind == "float32" else torch.bfloat16
    if kernel in configs.CONV_KERNELS:
        return _scratch_maps(kernel, compute, shape, device)
    rows, in_features, out_features = shape
    raw = compute if kind == "half" else torch.float32
    x = torch.randn(rows, in_features, device=device).to(raw)
    weight = torch.randn(out_features, in_features, device=device) / in_features**0.5
    bias = torch.zeros(out_features, device=device)
    layer = Layer(weight, bias, "l2", 1e-4, "add", "relu", compute)
    batch = operands.joint(Rows(x[: rows // 2], x[rows // 2 :]))
    y = torch.empty(rows, out_features, device=device, dtype=compute)
    scale = torch.empty(rows, device=device)
    if kernel == "forward":
        operand = weight.to(raw)
        return lambda: launch.forward(batch, layer._replace(weight=operand), y, row_scale=scale)
    partials, _ = launch.forward(batch, layer, y, row_scale=scale)
    goal = DEFAULT_OBJECTIVE.goal()
    states = [[torch.zeros_like(p), torch.zeros_like(p), torch.zeros(())] for p in (weight, bias)]
    # A rate of zero, and decoupled decay: the weight stays as it is however often the step is timed.
    numbers = Numbers(decay=0.01, decoupled=1.0, beta1=0.9, beta2=0.999, eps=1e-8)
    update = Update("adam", Slot(states[0], numbers), Slot(states[1], numbers))
    parameters = launch.Parameters("adam", *operands.parameters(layer, update))
    written = Written(torch.empty(rows, device=device), torch.empty((), device=device))
    activities = launch.Activities(y, scale, partials)
    return lambda: launch.update(batch, layer, activities, goal, Pull(), parameters, written)


def _scratch_maps(
    kernel: str, compute: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> Callable[[], object]:
    """The forward with maximum pooling and moments, or the gradients by slopes of both orders."""
    rows, ins, outs, side = shape
    x = torch.randn(rows, ins, side, side, device=device).to(compute).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(outs, ins, 3, 3, device=device) / (9 * ins) ** 0.5
    layer = Layer(weight, torch.zeros(outs, device=device), "none", 0.0, "add", "relu", compute)
    batch, geometry = MapRows(x, None), Geometry(padding=(1, 1), pool="max", pool_size=(2, 2), pool_stride=(2, 2))
    pivot = torch.zeros(outs, device=device)
    if kernel == "conv_forward":
        return lambda: conv.forward(batch, layer, geometry, pivot)
    maps = conv.conv2d_forward(batch, layer, geometry, True, pivot)
    first, second = torch.randn(2, rows, outs, device=device)
    slopes = MapSlopes(first, second)
    return lambda: conv.conv2d_gradients_(batch, layer, geometry, maps, slopes)
