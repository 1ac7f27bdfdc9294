"""Peer normalisation: a pull of each unit's mean activity towards its layer's; plain PyTorch on one number a unit.

Nothing here knows a kernel: backends get a strength, a momentum and whether the pull is gated.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from .objectives import short
from .spec import PeerPull

FORMS = ("hinton", "loewex")
# What both codes let the running mean start from.
FIRST_MEAN = 0.5


@dataclass(frozen=True)
class PeerNormalisation:
    """A regulariser that keeps units of a layer about equally active on positive data.

    With `m [out]` the running mean activity `m <- momentum m + (1 - momentum) mean_pos(y)` and `a = mean_j m_j`, both
    forms add `s (m_j - a) / n_pos` to `dLoss/dz_ij` of each positive row, so `s (m_j - a) mean_pos(r_i x_i)` to `dW`:

    * "hinton" (his Matlab code): `s = strength`, straight into the gradient;
    * "loewex" (loeweX/Forward-Forward): the gradient of the loss `strength mean_j (a - m_j)^2`, which flows through the
      batch's share in `m` only: `s = strength 2 (1 - momentum) / out`.

    Neither code stops the pull at a unit that is off, since that is how such a unit comes back: `dy/dz` counts as 1
    (straight through). `gated=True` multiplies by `act'(z_ij)`, as autograd through the activation does. The loss that
    a step reports is the objective's alone. A batch without positive rows changes no mean and pulls nothing.

    Args:
        form: "hinton" or "loewex".
        strength: finite, >= 0.
        momentum: of the running mean, in [0, 1).
        gated: whether the pull stops where the activation is flat.

    Raises:
        ValueError, TypeError: for a value outside these.
    """

    form: str = "hinton"
    strength: float = 0.03
    momentum: float = 0.9
    gated: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.form, str) or self.form not in FORMS:
            raise ValueError(f"form={self.form!r} is not one of {', '.join(map(repr, FORMS))}")
        for name, limit, fits in (
            ("strength", "inf", lambda v: 0 <= v <= sys.float_info.max),
            ("momentum", "1", lambda v: 0 <= v < 1),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not fits(value):
                raise ValueError(f"{name}={short(value)} is not a number in [0, {limit})")
        if not isinstance(self.gated, bool):
            raise TypeError(f"gated={self.gated!r} is not a bool")

    def pull_strength(self, width: int) -> float:
        """`s` for a layer of `width` units."""
        return float(self.strength) * (1 if self.form == "hinton" else 2 * (1 - self.momentum) / width)


def gradient_of(peer: PeerNormalisation | None) -> str | None:
    """What the pull takes part in: "gated", "straight through", or None without peer normalisation."""
    return None if peer is None else "gated" if peer.gated else "straight through"


NO_PULL = PeerPull(None, 0.0, 0.0, False)


def pull(peer: PeerNormalisation | None, mean: Tensor | None, width: int) -> PeerPull:
    """Peer normalisation of a layer of `width` units as the backends take it."""
    return NO_PULL if peer is None else PeerPull(mean, peer.pull_strength(width), float(peer.momentum), peer.gated)


def moved_mean(mean: Tensor, activity: Tensor, count: float | Tensor, momentum: float) -> Tensor:
    """The running mean `[out]` after a batch whose `count` positive rows have summed activities `activity` `[out]`."""
    if not isinstance(count, Tensor):
        return mean.lerp(activity / count, 1 - momentum) if count else mean.clone()
    # A device keeps its count to itself.
    return torch.where(count > 0, mean.lerp(activity / count.clamp(min=1), 1 - momentum), mean)


def pull_of(mean: Tensor, strength: float, count: float | Tensor) -> Tensor:
    """`[out]` what each of `count` positive rows has added to its `dLoss/dz`: `strength (m_j - mean m) / count`."""
    pull = (mean - mean.mean()) * strength
    if not isinstance(count, Tensor):
        return pull / max(count, 1)
    return pull * (count > 0) / count.clamp(min=1)
