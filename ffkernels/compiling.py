"""What torch.compile needs to be told."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable[..., object])


def once_per_trace(function: Function) -> Function:
    """Has torch.compile call a function when it traces a call, with constants, and keep the answer.

    That is `torch.compiler.assume_constant_result`, which would import the whole compiler at once for one mark.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def never_compiled(reason: str) -> Callable[[Function], Function]:
    """Has torch.compile leave a function and what it calls to the interpreter, for this reason.

    That is `torch.compiler.disable`, which would import the whole compiler at once for one mark.
    """

    def mark(function: Function) -> Function:
        function._torchdynamo_disable = True  # type: ignore[attr-defined]
        function._torchdynamo_disable_msg = reason  # type: ignore[attr-defined]
        return function

    return mark
