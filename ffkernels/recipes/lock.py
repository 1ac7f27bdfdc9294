"""One process at a time in a folder: a lock that the system frees however its holder ends."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform == "win32":
    import msvcrt

    def _take(file: int) -> None:
        # Far behind the text, since a locked byte cannot be read.
        os.lseek(file, 1 << 30, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        os.lseek(file, 0, os.SEEK_SET)
else:
    import fcntl

    def _take(file: int) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


LOCK = "training.lock"
TAKEN = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the lock of an existing folder while entered. On a file system without locks it holds nothing.

    Raises:
        BlockingIOError: where another process holds it.
    """
    path = folder / LOCK
    file = _open_and_take(path)
    try:
        with suppress(OSError):
            os.truncate(file, 0)
            os.write(file, f"{os.getpid()}\n".encode())
        yield
    finally:
        # Where an open file cannot be removed it stays, free to take.
        with suppress(OSError):
            path.unlink()
        os.close(file)


def _open_and_take(path: Path) -> int:
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _take(file)
        except OSError as error:
            if error.errno in TAKEN:
                holder = os.read(file, 20).decode(errors="replace").strip()
                os.close(file)
                by = f" (process {holder})" if holder.isdecimal() else ""
                raise BlockingIOError(
                    errno.EWOULDBLOCK, f"another training{by} is at work in this folder", str(path.parent)
                ) from None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), os.stat(path)):
                return file
        # The holder before has just removed the file that was locked here.
        os.close(file)
