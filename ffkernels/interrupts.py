"""Ctrl-C waits until a step is whole: weights, bias, optimizer state and running mean are all old or all new."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
from collections.abc import Callable
from signal import SIGINT
from types import FrameType

Handler = Callable[[int, FrameType | None], object]


class Held:
    """The handler of SIGINT for as long as a step writes; the program's own one runs at its end.

    A second Ctrl-C does not wait: whatever an optimizer's hooks do can be ended.
    """

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.frames: list[FrameType | None] = []
        self.is_over = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.frames.append(frame)
        # Who saved this handler during the step may have put it back afterwards.
        if self.is_over or len(self.frames) > 1:
            self.handler(number, frame)


def hold() -> Held | None:
    """Has SIGINT wait for `release`; None where no Python code would run for it in this thread."""
    handler = _signal.getsignal(SIGINT)
    if not callable(handler):
        return None
    held = Held(handler)
    try:
        # `signal.signal` makes enumeration members, which takes ten times as long.
        _signal.signal(SIGINT, held)
    except ValueError:  # another thread than the main one, which alone runs handlers
        return None
    return held


def release(held: Held | None) -> None:
    """Gives SIGINT back, and lets the program's handler run if there was one."""
    if held is None:
        return
    try:
        if _signal.getsignal(SIGINT) is held:
            _signal.signal(SIGINT, held.handler)
    finally:
        # Not before: a Ctrl-C between the two would leave by way of the handler and keep SIGINT held.
        held.is_over = True
    if len(held.frames) == 1:
        held.handler(SIGINT, held.frames[0])
