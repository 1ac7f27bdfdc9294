"""A network's forward pass by what is kept of its layers: what changes between two passes, the next one heeds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import ffkernels as ff
from ffkernels.nn import kept

from .test_kept_networks import NATIVE, Steps, set_data, weight

pytestmark = pytest.mark.skipif(not NATIVE, reason="the compiled library is not here")


class Doubling(ff.FFLinear):
    def activity(self, x, input_sumsq=None, **options):
        y, sumsq = super().activity(x, input_sumsq, **options)
        return 2 * y, 4 * sumsq


def doubling(s: Steps) -> None:
    s.layer().__class__ = Doubling


# Each change between two forward passes, and whether the one after it goes by what is kept.
PASSES: dict[str, tuple[Callable[[Steps], object], bool]] = {
    "nothing": (lambda s: None, True),
    "rows": (lambda s: setattr(s, "x", (s.x[0][:2] * 2,)), True),
    "data": (set_data(weight, lambda w: w * 2), True),
    "data in place": (lambda s: s.layer().weight.data.mul_(2), True),
    "bias": (set_data(lambda s: s.layer().bias, lambda b: b + 1), True),
    "a weight": (lambda s: setattr(s.layer(), "weight", nn.Parameter(torch.ones(6, 6))), True),
    "no bias": (lambda s: setattr(s.layer(), "bias", None), True),
    "eps": (lambda s: setattr(s.layer(), "eps", 1.0), True),
    "norm": (lambda s: setattr(s.layer(), "norm", "rms"), True),
    "activation": (lambda s: setattr(s.layer(), "activation", "gelu"), True),
    "backend": (lambda s: setattr(s.layer(), "backend", "eager"), True),
    "a step": (lambda s: s.step(), True),
    "a hook": (lambda s: s.layer().register_forward_hook(lambda layer, x, y: y * 2), False),
    "pruned": (lambda s: prune.l1_unstructured(s.layer(), "weight", 20), False),
    "a method": (
        lambda s: setattr(s.layer(), "activity", lambda x, sumsq=None, **o: (x * 2, (x * 2).square().sum(1))),
        False,
    ),
    "a subclass": (doubling, False),
}


@pytest.mark.parametrize("product", [False, True])
@pytest.mark.parametrize("name", PASSES)
def test_features_heed_what_changes_between_two_passes(name: str, product: bool, monkeypatch) -> None:
    change, is_kept = PASSES[name]
    s = Steps(norm="l2")
    s.step()

    def features() -> torch.Tensor:
        options = {"product": s.net.shared_product(s.x[0], 2)} if product else {}
        return s.net.features(s.x[0], num_classes=2, **options)

    before = features()
    assert torch.equal(features(), before)
    change(s)
    seen, by_plans = [], kept.forward
    monkeypatch.setattr(kept, "forward", lambda *args: seen.append(by_plans(*args)) or seen[-1])
    ours = features()
    assert (seen[0] is not None) == is_kept
    monkeypatch.setattr(kept, "forward", lambda *args: None)
    assert torch.equal(ours, features())
    assert (name in ("nothing", "rows")) or not torch.equal(ours, before)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda s: setattr(s.layer(), "eps", -1.0), ValueError),
        (lambda s: setattr(s.layer(), "activation", "tanh"), ValueError),
        (lambda s: setattr(s.layer(), "weight", nn.Parameter(torch.ones(6, 5))), ValueError),
        (lambda s: setattr(s, "x", (s.x[0].double(),)), TypeError),
    ],
)
def test_features_refuse_what_they_would_have_refused_at_first(change, error) -> None:
    s = Steps()
    s.net.features(s.x[0], num_classes=2)
    change(s)
    with pytest.raises(error):
        s.net.features(s.x[0], num_classes=2)
