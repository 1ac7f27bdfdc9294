"""Files and folders as readers need them: packed or not, never more read than was announced."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO

CHUNK = 1 << 20  # bytes
_SHOWN = 8  # names in an error


@contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, int | None]]:
    """The content of a file that may be packed, and its size where that is known without reading it.

    Raises ValueError for a packed file that is damaged where it is read.
    """
    with path.open("rb") as file:
        # told by content, not name: browsers unpack a .gz without renaming it
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if not packed:
            yield file, os.fstat(file.fileno()).st_size
            return
        try:
            with gzip.GzipFile(fileobj=file) as content:
                yield content, None  # type: ignore[misc]
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: damaged gzip file ({error})") from error


def read_up_to(file: IO[bytes], count: int) -> bytearray:
    """`count` bytes, or as many as there are; memory is taken as they come."""
    content = bytearray()
    while len(content) < count and (chunk := file.read(min(CHUNK, count - len(content)))):
        content += chunk
    return content


def what_is_in(folder: Path) -> str:
    return holds(sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir()))


def holds(names: list[str]) -> str:
    """The first of these names, as a clause of an error."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"it holds {', '.join(names[:_SHOWN])}{more}" if names else "it is empty"


def unreadable(source: object, error: Exception) -> ValueError:
    """What a library raised on a damaged file, which may be of any type, or a check of this package on what it gave."""
    text = str(error) if type(error) is ValueError else f"cannot be read ({type(error).__name__}: {error})"
    return ValueError(f"{source}: {text}")
