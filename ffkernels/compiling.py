"""What torch.compile needs to be told."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., object])


def once_per_trace(function: Function) -> Function:
    """Has torch.compile call a function when it traces a call, with constants, and keep the answer.

    That is `torch.compiler.assume_constant_result`, which would import the whole compiler at once for one mark.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def never_compiled(reason: str) -> Callable[[Function], Function]:
    """Has torch.compile leave a function and what it calls to the interpreter, for this reason.

    `torch.compiler.disable` by itself would import the whole compiler when the package is.
    """

    def mark(function: Function) -> Function:
        @wraps(function)
        def apart(*args: Any, **options: Any) -> object:
            return torch.compiler.disable(function)(*args, **options)

        apart._torchdynamo_disable = True  # type: ignore[attr-defined]
        apart._torchdynamo_disable_msg = reason  # type: ignore[attr-defined]
        return cast("Function", apart)

    return mark
