"""A run's state on disk: written whole or not at all, and read back only by a run with the same settings."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

FORMAT = 1


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Calls `write` on a temporary file beside `path` that then takes its place; a crash leaves the old file whole."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save(path: Path, settings: dict[str, Any], state: dict[str, Any]) -> None:
    """Writes `state` (tensors and plain values) with the settings it belongs to."""
    content = {"format": FORMAT, "settings": settings, "state": state}
    write_atomically(path, lambda file: torch.save(content, file))


def load(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The state saved at `path`, on the CPU.

    Raises:
        ValueError: for a damaged file, another format, and other settings, each of which is named.
        OSError: where the file cannot be read.
    """
    try:
        # torch.load does not look at the checksums that torch.save has written.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"bad checksum of {damaged}")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["format"] != FORMAT:
            raise ValueError(f"{path}: format {content['format']}, but this version reads format {FORMAT}")
        saved, state = content["settings"], content["state"]
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError) as error:
        found = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path}: damaged, or no checkpoint of a training run ({found})") from error
    differences = [
        f"{name} {saved.get(name)!r}, now {settings.get(name)!r}"
        for name in dict.fromkeys([*settings, *saved])
        if saved.get(name) != settings.get(name)
    ]
    if differences:
        raise ValueError(f"{path}: a run with other settings: {'; '.join(differences)}")
    return state
