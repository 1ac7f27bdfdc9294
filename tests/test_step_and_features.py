"""`step_and_features`, under every option, is `features` and then `step`."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

import ffkernels as ff

from .steps import error

K = 4
ROWS = 6


def network(outputs: str = "pre", dtype: torch.dtype = torch.float32, **options: object) -> ff.FFNetwork:
    torch.manual_seed(2)
    return ff.FFNetwork([ff.FFLinear(a, b, outputs=outputs, dtype=dtype, **options) for a, b in pairwise([12, 9, 7])])


def copies(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    x, labels = torch.rand(ROWS, 12, dtype=dtype), torch.arange(ROWS) % K
    return ff.overlay_label(x, labels, K), ff.overlay_label(x, ff.wrong_label(labels, K), K)


def on_its_own_rows(x: torch.Tensor) -> dict[str, dict[str, object]]:
    """Each option of a step, beyond what a layer has."""
    generator = torch.Generator().manual_seed(0)
    per_row = torch.rand(2 * ROWS, dtype=x.dtype, generator=generator)
    return {
        "nothing": {},
        "sum_of_means": {"objective": ff.Objective(reduction="sum_of_means")},
        "sum_of_means, other threshold": {"objective": ff.Objective(threshold=(3.0, 1.0), reduction="sum_of_means")},
        "other threshold": {"objective": ff.Objective(threshold=(0.1, 0.4), temperature=0.5)},
        "minimised sum": {"objective": ff.Objective(goodness="sum", maximize=False)},
        "norm goodness": {"objective": ff.Objective(goodness="norm", threshold=0.5)},
        "symba": {"objective": ff.Objective(loss="symba")},
        "swish": {"objective": ff.Objective(loss="swish", alpha=1.0)},
        "threshold tensor": {"objective": ff.Objective(threshold=torch.tensor(1.5))},
        "threshold per row": {"objective": ff.Objective(threshold=per_row)},
        "sample_weight": {"sample_weight": per_row},
        "skip_below": {"objective": ff.Objective(goodness="sum", threshold=1.0), "skip_below": 0.3},
        "norm": {"norm": "rms"},
        "no norm": {"norm": "none"},
        "eps": {"eps": 0.5},
        "eps_mode": {"eps": 0.5, "eps_mode": "clamp"},
        "activation": {"activation": "identity"},
        "gelu": {"activation": "gelu"},
        "backend": {"backend": "eager"},
        "compute_dtype": {"compute_dtype": torch.bfloat16} if x.dtype == torch.float32 else {},
        "label_field": {"label_field": K},
        "label_field unknown": {"label_field": None},
        "keep": {"keep": True},
        "keep and objective": {"keep": True, "objective": ff.Objective(threshold=1.0)},
    }


LAYERS = {
    "pre": {},
    "post": {"outputs": "post"},
    "symba layers": {"objective": ff.Objective(loss="symba")},
    "sum_of_means layers": {"objective": ff.Objective(reduction="sum_of_means")},
    "peers": {"peer": ff.PeerNormalisation()},
    "bfloat16": {"compute_dtype": torch.bfloat16},
    "gelu layers": {"activation": "gelu"},
}


def both(net: ff.FFNetwork, other: ff.FFNetwork, x: tuple[torch.Tensor, torch.Tensor], options: dict, kind=SGD) -> None:
    optimizers = [kind([p for p in n.parameters() if p.requires_grad], lr=0.1) for n in (net, other)]
    results, features = net.step_and_features(*x, optimizers[0], K, **options)
    expected = other.features(x[0], num_classes=K)
    theirs = other.step(*x, optimizers[1], **{"label_field": K, **options})
    double = x[0].dtype == torch.float64
    low = torch.bfloat16 in (options.get("compute_dtype"), net.layers[0].compute_dtype)
    tolerance = 2e-2 if low else 1e-12 if double else 1e-5
    assert error(features, expected) <= tolerance
    for ours, theirs_ in zip(results, theirs, strict=True):
        for name in ("loss", "goodness", "sumsq", "y", "goodness_pos"):
            assert error(getattr(ours, name), getattr(theirs_, name)) <= tolerance, name
        assert ours.n_pos == theirs_.n_pos
    for name, value in other.state_dict().items():
        assert error(net.state_dict()[name], value) <= tolerance, name


CASES = [
    (option, layers, dtype)
    for option in on_its_own_rows(torch.zeros(1))
    for layers in LAYERS
    for dtype in (torch.float32, torch.float64)
    # bfloat16 products have float32 masters; pairs take a weight each, not rows.
    if not (layers == "bfloat16" and dtype == torch.float64)
    and not (layers == "symba layers" and option == "sample_weight")
]


@pytest.mark.parametrize(("option", "layers", "dtype"), CASES)
def test_it_is_features_and_then_step(option, layers, dtype):
    x = copies(dtype)
    net = network(dtype=dtype, **LAYERS[layers])
    both(net, copy.deepcopy(net), x, on_its_own_rows(x[0])[option])


def test_a_product_that_is_there_already():
    net, x = network(), copies()
    both(net, copy.deepcopy(net), x, {"product": net.shared_product(x[0], K), "backend": "eager"})


@pytest.mark.parametrize("how", ["hook", "frozen", "half frozen", "gradient hook", "reference optimizer"])
def test_it_is_so_for_layers_that_are_watched_or_frozen(how):
    nets, x = [network(), network()], copies()
    for net in nets:
        if how == "hook":
            net.layers[0].register_forward_hook(lambda m, args, y: y * 0.5)
        elif how == "frozen":
            net.layers[0].requires_grad_(False)
        elif how == "half frozen":
            net.layers[1].bias.requires_grad_(False)
        elif how == "gradient hook":
            net.layers[1].weight.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
    both(*nets, x, {}, Adam if how != "reference optimizer" else torch.optim.RMSprop)


def test_rows_that_are_no_copies_meet_the_errors_of_a_step():
    net, (x_pos, x_neg) = network(), copies()
    before = copy.deepcopy(net.state_dict())
    optimizer = SGD(net.parameters(), lr=0.1)
    for wrong in ((x_pos, x_neg[1:], K), (x_pos[1:], x_neg, K), (x_pos, x_neg, 13), (x_pos, x_neg, 1)):
        with pytest.raises(ValueError, match=r"x_neg has shape|num_classes"):
            net.step_and_features(*wrong[:2], optimizer, wrong[2])
    with pytest.raises(TypeError, match=r"x must be|x_neg is"):
        net.step_and_features([1.0], x_neg, optimizer, K)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    results, features = net.step_and_features(x_pos, x_neg, optimizer, 0)
    assert error(features, _features_without_label(before, x_pos)) < 1e-6 and len(results) == 2


def _features_without_label(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    net = network()
    net.load_state_dict(state)
    return nn.functional.normalize(net(x), dim=1) / (1 + 1e-4 / net(x).norm(dim=1, keepdim=True))
