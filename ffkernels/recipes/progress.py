"""What a run shows while it works: a line per epoch, and a bar where tqdm is installed and stderr is a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None

SECONDS_BETWEEN_LOOKS = 0.5


class Progress:
    """Counts steps from `done` to `total`; writes to stderr, or with `shows=False` nowhere."""

    def __init__(self, total: int, done: int = 0, *, shows: bool = True) -> None:
        self._bar: Any = None
        self._shows = shows
        if tqdm is not None and shows:
            # disable=None: no bar where stderr is not a terminal; it is None itself where it was closed from the start
            disable = True if sys.stderr is None else None
            self._bar = tqdm(total=total, initial=done, disable=disable, unit="step", dynamic_ncols=True)
        self._steps = 0
        self._looked = time.monotonic()

    def step(self, describe: Callable[[], str]) -> None:
        """One step is done. `describe` may wait for the device, so it is called only every now and then."""
        self._steps += 1
        now = time.monotonic()
        if self._bar is None or self._bar.disable or now - self._looked < SECONDS_BETWEEN_LOOKS:
            return
        self._show(describe())

    def _show(self, text: str) -> None:
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(self._steps)
        self._steps = 0
        self._looked = time.monotonic()

    def line(self, text: str) -> None:
        """A line that stays."""
        if sys.stderr is None or not self._shows:
            return
        if self._bar is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self._bar.update(self._steps)
            self._steps = 0
            self._bar.write(text, file=sys.stderr)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()
