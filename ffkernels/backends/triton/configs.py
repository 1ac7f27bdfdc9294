"""Tile sizes, warps and stages as data: one JSON file per device, looked up by the nearest shape.

A file lists, for each kernel and kind of operands, configurations with the shape (rows, in, out) that they are meant
for; of a convolution that is (places, taps * in, out) of a group. Files are looked for by device name, then by
architecture; a device that has neither runs on the file of the nearest architecture, and says so once in the log.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from .support import interpreted

FOLDER = Path(__file__).parent / "configs"
# A folder that is searched before the package's own.
VARIABLE = "FFKERNELS_CONFIGS"
# "float32": products in float32; "half": both operands come in 16 bits; "mixed": one is rounded on the way in.
KINDS = ("float32", "mixed", "half")
LINEAR_KERNELS, CONV_KERNELS = ("forward", "update"), ("conv_forward", "conv_update")
KERNELS = LINEAR_KERNELS + CONV_KERNELS

Config = dict[str, int]

# What a configuration need not mention. TMA: tiles come by bulk copies (sm_90 and newer) where layouts allow them.
# PERSISTENT: so many programs for each processor take tiles in turn, instead of one program for each tile.
DEFAULTS: dict[str, Config] = {
    "forward": {"TMA": 0, "PERSISTENT": 0}, "update": {"TMA": 0}, "conv_forward": {}, "conv_update": {},
}  # fmt: skip

# The interpreter works through programs one by one in NumPy: small tiles make every loop and edge run.
INTERPRETED: dict[str, Config] = {
    "forward": {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "GROUP": 2},
    "update": {"BLOCK_OUT": 16, "BLOCK_IN": 16, "BLOCK_K": 16, "GROUP": 2, "PARTS": 2},
    "conv_forward": {"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_K": 16, "GROUP": 2},
    "conv_update": {"BLOCK_OUT": 16, "BLOCK_IN": 16, "BLOCK_K": 32, "GROUP": 2},
}

# What the tuner, or a test, has every call run on.
FORCED: dict[str, Config] = {}

_log = logging.getLogger(__name__)


def kinds_of(kernel: str) -> tuple[str, ...]:
    """Of KINDS those that a kernel's operands come in: a convolution's are both in the compute dtype."""
    return KINDS if kernel in LINEAR_KERNELS else ("float32", "half")


def choose(kernel: str, kind: str, shape: tuple[int, int, int], device: torch.device) -> Config:
    """The configuration for a kernel and its operands at a shape (rows, in, out) on this device."""
    if kernel in FORCED:
        config = FORCED[kernel]
    elif interpreted():
        config = INTERPRETED[kernel]
    else:
        config = nearest(of_kernel(kernel, device.index)[kind], shape)
    return {**DEFAULTS[kernel], **config}


def of_kernel(kernel: str, index: int | None) -> dict[str, Any]:
    """A kernel's configurations on a device; of the nearest architecture where its file was made without them."""
    found = for_device(index)
    if kernel in found:
        return found[kernel]
    shipped = find(nearest_architecture(device_names(index)[1]))
    assert shipped is not None
    return shipped[kernel]


def of_conv(kernel: str, kind: str, shape: tuple[int, int, int], ins: int, device: torch.device) -> Config:
    """The configuration for a convolution's kernel at a shape (places, taps * in, out) of a group of `ins` inputs."""
    return fitted(kernel, choose(kernel, kind, shape, device), shape, ins)


def fitted(kernel: str, config: Config, shape: tuple[int, int, int], ins: int) -> Config:
    """A convolution's configuration with tiles no larger than a group, and blocks of single taps where these are wide:
    channels are fewer than a linear layer's units."""
    _, columns, outs = shape
    fitting = dict(config)
    if kernel == "conv_update":
        sides = [("BLOCK_OUT", outs), ("BLOCK_IN", columns)]
    else:
        sides = [("BLOCK_N", outs), ("BLOCK_K", columns)]
        taps = [block for block in (128, 64, 32) if block <= config["BLOCK_K"] and ins % block == 0]
        fitting["BLOCK_K"] = max(taps, default=config["BLOCK_K"])
    for block, size in sides:
        fitting[block] = min(fitting[block], max(16, 1 << (size - 1).bit_length()))
    if fitting.get("num_warps", 0) > 4 and fitting[sides[0][0]] < config[sides[0][0]]:
        fitting["num_warps"] = 4
    return fitting


def beside_slopes(config: Config) -> Config:
    """A configuration of the update with room for tiles of slopes, in registers and shared memory."""
    most = {"BLOCK_OUT": 64, "BLOCK_K": 32, "num_stages": 2}
    return {key: min(value, most.get(key, value)) for key, value in config.items()}


def beside_class_sums(config: Config) -> Config:
    """A configuration of the forward with registers for sums over class groups."""
    return {**config, "BLOCK_N": min(config["BLOCK_N"], 128)}


def nearest(entries: list[dict[str, Any]], shape: tuple[int, int, int]) -> Config:
    """The configuration of the entry whose shape is nearest in log space; the first of those that are equally near."""

    def distance(entry: dict[str, Any]) -> float:
        return sum(math.log(max(a, 1) / b) ** 2 for a, b in zip(shape, entry["shape"], strict=True))

    return min(entries, key=distance)["config"]


@lru_cache
def for_device(index: int | None) -> dict[str, Any]:
    """The file of a CUDA or ROCm device; the log says once where none was made for it."""
    name, architecture = device_names(index)
    for stem in (file_stem(name), architecture):
        found = find(stem)
        if found is not None:
            return found
    fallback = nearest_architecture(architecture)
    _log.info(
        "no configurations for %s (%s): those of %s are used; `python -m ffkernels tune` makes some",
        name, architecture, fallback,
    )  # fmt: skip
    found = find(fallback)
    assert found is not None
    return found


def device_names(index: int | None) -> tuple[str, str]:
    """A device's name and its architecture, as "sm_90" or "gfx942"."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device() if index is None else index)
    if torch.version.hip is not None:
        return properties.name, properties.gcnArchName.partition(":")[0]
    return properties.name, f"sm_{properties.major}{properties.minor}"


def nearest_architecture(architecture: str) -> str:
    """The newest architecture with a file that is not newer than this one; the most modest one where all are."""
    family = re.match("[a-z_]+", architecture)
    prefix = "gfx" if family is not None and family[0] == "gfx" else "sm_"
    known = sorted((path.stem for path in FOLDER.glob(f"{prefix}*.json")), key=_generation)
    older = [name for name in known if _generation(name) <= _generation(architecture)]
    return (older or known)[-1 if older else 0]


def find(stem: str) -> dict[str, Any] | None:
    """The file of this name, from the folder in FFKERNELS_CONFIGS or the package; None where there is none."""
    folders = [FOLDER] if not os.environ.get(VARIABLE) else [Path(os.environ[VARIABLE]), FOLDER]
    for folder in folders:
        path = folder / f"{stem}.json"
        if path.is_file():
            return json.loads(path.read_text())
    return None


def file_stem(device_name: str) -> str:
    """A device's name as a file's name."""
    return re.sub(r"[^A-Za-z0-9]+", "_", device_name).strip("_")


def _generation(architecture: str) -> int:
    digits = re.search("[0-9a-f]+$", architecture)
    return int(digits[0], 16) if digits is not None else 0
