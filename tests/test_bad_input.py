"""Every bad input is named, with what came and what is accepted, and changes nothing."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from torch import nn
from torch.optim import SGD

import ffkernels as ff
from ffkernels.recipes import RECIPES, Trainer

from .steps import problem, state_of

INF = float("inf")


PEER = ff.PeerNormalisation()


def ones(n: int) -> torch.Tensor:
    return torch.ones(n, dtype=torch.float64)


def with_threshold(value):
    return lambda p: {"objective": ff.Objective(threshold=value)}


BAD_STEPS = {
    # name: (what is wrong, the error, words of its message)
    "x_pos not a tensor": (lambda p: {"x_pos": [[1.0]]}, TypeError, "x_pos is a list"),
    "x_pos integer": (lambda p: {"x_pos": p.x_pos.long()}, TypeError, "x_pos is torch.int64; accepted: torch.float64"),
    "x_pos other dtype": (lambda p: {"x_pos": p.x_pos.float()}, TypeError, "x_pos is torch.float32"),
    "x_pos image": (lambda p: {"x_pos": p.x_pos.view(6, 1, 5)}, ValueError, r"x_pos has shape \(6, 1, 5\).*flatten"),
    "x_pos too narrow": (lambda p: {"x_pos": p.x_pos[:, 1:]}, ValueError, "x_pos has 4 columns but weight is"),
    "x_pos sparse": (lambda p: {"x_pos": p.x_pos.to_sparse()}, TypeError, "x_pos has layout"),
    "x_pos elsewhere": (lambda p: {"x_pos": p.x_pos.to("meta")}, ValueError, "x_pos is on meta but weight is on cpu"),
    "x_neg too wide": (lambda p: {"x_neg": torch.ones(6, 6).double()}, ValueError, "x_neg has 6 columns"),
    "x_neg missing": (lambda p: {"x_neg": None}, ValueError, "neither x_neg nor is_positive came"),
    "both x_neg and mask": (
        lambda p: {"is_positive": torch.ones(12, dtype=torch.bool)}, ValueError, "both x_neg and is_positive came"
    ),
    "mask of numbers": (
        lambda p: {"x_neg": None, "is_positive": torch.ones(6)}, TypeError, "is_positive is torch.float32"
    ),
    "mask of other length": (
        lambda p: {"x_neg": None, "is_positive": torch.ones(5, dtype=torch.bool)}, ValueError, r"shape \(5,\)"
    ),
    "mask that cannot be paired": (
        lambda p: {
            "x_neg": None,
            "is_positive": torch.tensor([True, True, True, True, False, False]),
            "objective": ff.Objective(loss="symba"),
        },
        ValueError,
        "4 positive and 2 negative",
    ),
    "weight half": (lambda p: {"weight": nn.Parameter(p.weight.half())}, TypeError, "weight is torch.float16.*compute"),
    "weight vector": (lambda p: {"weight": p.weight[0]}, ValueError, "weight has shape"),
    "weight not trainable": (lambda p: {"weight": p.weight.detach()}, ValueError, "weight has requires_grad=False"),
    "weight not a leaf": (lambda p: {"weight": p.weight * 1}, ValueError, "is_leaf=False"),
    "weight without columns": (
        lambda p: {"weight": nn.Parameter(torch.ones(3, 0).double()), "x_pos": p.x_pos[:, :0]}, ValueError, "at least 1"
    ),
    "weight expanded": (
        lambda p: {"weight": nn.Parameter(torch.ones(1, 5).double().expand(7, 5))}, ValueError, "not expanded"
    ),
    "bias too long": (lambda p: {"bias": nn.Parameter(torch.ones(8).double())}, ValueError, r"bias has shape \(8,\)"),
    "bias other dtype": (lambda p: {"bias": nn.Parameter(torch.ones(7))}, TypeError, "bias is torch.float32"),
    "optimizer of other parameters": (
        lambda p: {"optimizer": SGD([nn.Parameter(torch.ones(2))], lr=0.1)},
        ValueError,
        r"optimizer \(SGD of 1 parameters\) does not hold weight \(7, 5\)",
    ),
    "optimizer without the bias": (
        lambda p: {"optimizer": SGD([p.weight], lr=0.1)}, ValueError, "does not hold bias"
    ),
    "optimizer not one": (lambda p: {"optimizer": 0.1}, TypeError, "optimizer is a float"),
    "objective a name": (lambda p: {"objective": "logistic"}, TypeError, "objective='logistic'"),
    "threshold of other rows": (with_threshold(torch.ones(3)), ValueError, r"threshold has shape \(3,\).*12 rows"),
    "unequal pairs": (
        lambda p: {"objective": ff.Objective(loss="symba"), "x_neg": p.x_neg[1:]}, ValueError, "6 positive and 5 neg"
    ),
    "norm": (lambda p: {"norm": "l1"}, ValueError, "norm='l1' is not one of 'l2', 'rms', 'none'"),
    "eps negative": (lambda p: {"eps": -1e-4}, ValueError, "eps=-0.0001"),
    "eps nan": (lambda p: {"eps": math.nan}, ValueError, "eps=nan"),
    "eps a string": (lambda p: {"eps": "1e-4"}, TypeError, "eps='1e-4'"),
    "eps_mode": (lambda p: {"eps_mode": "outside"}, ValueError, "eps_mode='outside'"),
    "activation": (lambda p: {"activation": "tanh"}, ValueError, "activation='tanh' is not one of 'relu'"),
    "outputs": (lambda p: {"outputs": "all"}, ValueError, "outputs='all'"),
    "compute_dtype of float64": (lambda p: {"compute_dtype": torch.bfloat16}, TypeError, "compute_dtype=torch.bf"),
    "compute_dtype integer": (lambda p: {"compute_dtype": torch.int8}, TypeError, "compute_dtype=torch.int8"),
    "sample_weight too short": (lambda p: {"sample_weight": torch.ones(6).double()}, ValueError, r"accepted: \(12,\)"),
    "sample_weight other dtype": (lambda p: {"sample_weight": torch.ones(12)}, TypeError, "sample_weight is"),
    "input_sumsq too short": (lambda p: {"input_sumsq": torch.ones(6).double()}, ValueError, "input_sumsq has shape"),
    "peer a name": (lambda p: {"peer": "hinton", "peer_mean": ones(7)}, TypeError, "peer='hinton' is not an"),
    "peer without its mean": (lambda p: {"peer": PEER}, ValueError, "peer came without peer_mean; accepted: both"),
    "mean without peer": (lambda p: {"peer_mean": ones(7)}, ValueError, "peer_mean came without peer"),
    "mean of other width": (lambda p: {"peer": PEER, "peer_mean": ones(5)}, ValueError, r"peer_mean has shape \(5,\)"),
    "mean other dtype": (
        lambda p: {"peer": PEER, "peer_mean": ones(7).float()}, TypeError, "peer_mean is torch.float32; accepted"
    ),
    "mean with a gradient": (
        lambda p: {"peer": PEER, "peer_mean": ones(7).requires_grad_()}, ValueError, r"accepted: peer_mean.detach\(\)"
    ),
    "mean expanded": (
        lambda p: {"peer": PEER, "peer_mean": ones(1).expand(7)}, ValueError, "peer_mean has strides.*not expanded"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_STEPS)
def test_bad_step(name):
    change, kind, words = BAD_STEPS[name]
    p = problem(optimizer="adam")
    ff.linear_step_(p.x_pos, p.x_neg, p.weight, p.bias, p.optimizer)
    before = {key: value.clone() for key, value in state_of(p).items()}
    arguments = {
        "x_pos": p.x_pos,
        "x_neg": p.x_neg,
        "weight": p.weight,
        "bias": p.bias,
        "optimizer": p.optimizer,
    }
    with pytest.raises(kind, match=words):
        ff.linear_step_(**{**arguments, **change(p)})
    assert all(torch.equal(value, before[key]) for key, value in state_of(p).items())
    assert p.weight.grad is None


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"goodness": "max"}, ValueError, "goodness='max' is not one of 'mean', 'sum', 'norm'"),
        ({"loss": "hinge"}, ValueError, "loss='hinge'"),
        ({"reduction": "sum"}, ValueError, "reduction='sum'"),
        ({"maximize": 1}, TypeError, "maximize=1"),
        ({"threshold": math.nan}, ValueError, "threshold=nan is not finite"),
        ({"threshold": (1.0, INF)}, ValueError, "is not finite"),
        ({"threshold": torch.tensor([1.0, math.nan])}, ValueError, "threshold holds NaN or infinity"),
        ({"threshold": torch.tensor(2)}, TypeError, "threshold is a torch.int64 tensor"),
        ({"threshold": torch.ones(2, 2)}, TypeError, r"shape \(2, 2\)"),
        ({"threshold": "2"}, TypeError, "threshold='2'"),
        ({"threshold": (1.0, 2.0, 3.0)}, TypeError, "threshold="),
        ({"temperature": 0}, ValueError, "temperature=0 is not a positive"),
        ({"temperature": INF}, ValueError, "temperature=inf"),
        (
            {"temperature": 2.0, "loss": "swish"},
            ValueError,
            "temperature=2.0 has no meaning for loss='swish'",
        ),
        ({"alpha": -1.0}, ValueError, "alpha=-1.0"),
    ],
)
def test_bad_objective(options, kind, words):
    with pytest.raises(kind, match=words):
        ff.Objective(**options)


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"form": "mean"}, ValueError, "form='mean' is not one of 'hinton', 'loewex'"),
        ({"strength": -1.0}, ValueError, "strength=-1.0"),
        ({"strength": INF}, ValueError, "strength=inf"),
        ({"momentum": 1}, ValueError, r"momentum=1 is not a number in \[0, 1\)"),
        ({"gated": 1}, TypeError, "gated=1"),
    ],
)
def test_bad_peer_normalisation(options, kind, words):
    with pytest.raises(kind, match=words):
        ff.PeerNormalisation(**options)


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda: ff.FFLinear(3, 4, peer="hinton"), TypeError, "peer='hinton'"),
        (lambda: ff.FFLinear(3, 4, norm="max"), ValueError, "norm='max'"),
        (lambda: ff.FFLinear(3, 4, objective=2.0), TypeError, "objective=2.0"),
        (lambda: ff.FFLinear(3, 4, outputs="later"), ValueError, "outputs='later'"),
        (lambda: ff.FFLinear(3, 4, backend="x"), ValueError, "backend='x' is not one of 'triton', 'native', 'eager'"),
        (lambda: ff.FFLinear(3, 4, backend=1), ValueError, "backend=1 is not one of"),
        (lambda: ff.FFLinear(3, 4, compute_dtype="bfloat16"), TypeError, "compute_dtype=.*bfloat16"),
        (lambda: ff.FFLinear(3, 4, compute_dtype=torch.int8), TypeError, "compute_dtype=torch.int8"),
        (
            lambda: ff.FFLinear(3, 4, compute_dtype=torch.float16, dtype=torch.float64),
            TypeError,
            "compute_dtype=torch.float16 does not go with a torch.float64 weight",
        ),
        (lambda: ff.FFLinear(3, 4, dtype=torch.float16), TypeError, "weight is torch.float16; accepted: torch.float32"),
        (lambda: ff.FFLinear(0, 4), ValueError, r"weight has shape \(4, 0\)"),
        (lambda: ff.FFNetwork([]), ValueError, "layers is empty"),
        (lambda: ff.FFNetwork([nn.Linear(3, 4)]), TypeError, r"layers\[0\] is a Linear"),
        (
            lambda: ff.FFNetwork([ff.FFLinear(3, 4), ff.FFLinear(5, 2)]),
            ValueError,
            "in_features=5; accepted: 4",
        ),
    ],
)
def test_bad_modules(make, kind, words):
    with pytest.raises(kind, match=words):
        make()


IMAGES = torch.zeros(4, 1, 2, 3)
LABELS = torch.zeros(4, dtype=torch.int64)
ONE_HOT = torch.zeros(4, 3, dtype=torch.int64)
OF_CLASSES = ff.Objective(loss="cross_entropy", classes=3)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda net, x: net.step(IMAGES, IMAGES, None), r"flatten each row first: x_pos.flatten\(1\)"),
        (lambda net, x: net.predict(IMAGES, 3), r"flatten each row first: x.flatten\(1\)"),
        (lambda net, x: net.step(x.byte(), x.byte(), None), "torch.float64, as x_pos / 255 makes of pixels"),
        (lambda net, x: ff.overlay_label(x.byte(), LABELS, 3), "torch.uint8; x / 255 makes it of pixels"),
        (
            lambda net, x: net.step(x.numpy(), x, None),
            "ndarray; accepted: a torch.Tensor, as torch.from_numpy makes one",
        ),
        (lambda net, x: ff.overlay_label(x, ONE_HOT, 3), r"one-hot rows\? labels.argmax\(1\)"),
        (lambda net, x: net.step(x, None, None, objective=OF_CLASSES, labels=ONE_HOT), r"as labels.argmax\(1\) makes"),
        (
            lambda net, x: net.step(x, None, None, labels=LABELS),
            r"such as Objective\(loss='cross_entropy', classes=10\)",
        ),
        (
            lambda net, x: net.step(x, None, None),
            "^neither x_neg nor is_positive came.*an objective of classes, and lab",
        ),
        (lambda net, x: net.step(x[:, :3], x[:, :3], None), r"3 columns but weight is \(5, 6\); accepted: 6 columns"),
        (lambda net, x: net.step(x, x, None, skip_below=2), "^skip_below=2 is not in 0..1"),
        (
            lambda net, x: net.step(x, x, SGD(net.layers[0].parameters(), 0.1)),
            r"^layers\[1\]: optimizer \(SGD of 2 par",
        ),
        (
            lambda net, x: net.step(x, 1 - x, None, label_field=3),
            "^x_neg differs from x_pos .*accepted: images that are the",
        ),
        (lambda net, x: ff.explain(net.layers[0]), "FFLinear; accepted: a torch.Tensor, such as its weight"),
        (lambda net, x: ff.FFNetwork(net.layers[0]), "layers is a FFLinear; accepted: a list of layers"),
        (
            lambda net, x: ff.FFNetwork([ff.FFConv2d(1, 2, 1)]).predict(IMAGES),
            "accepted: objectives of classes, or a cl",
        ),
        (lambda net, x: ff.FFConv2d(1, 2, 1).step(x, x, None), r"as x_pos.view\(-1, 1, height, width\) makes of flat"),
        (lambda net, x: ff.FFLinear(3, 4, objective="swish"), r"such as ffkernels.Objective\(loss='swish'\)"),
        (lambda net, x: ff.FFLinear(3, 4, objective=ff.Objective), "Objective'> is not an ffkernels.Objective"),
        (lambda net, x: ff.Objective(loss="ce"), r"'swish' \(with classes=: 'cross_entropy', 'pvn', 'cwc'\)"),
        (lambda net, x: ff.Objective(goodness="activity"), r"'norm' \(with classes=: 'mean', 'sum', 'activity'\)"),
        (lambda net, x: Trainer("quick", None), r"recipe='quick' is no Recipe; accepted: RECIPES\[name\]"),
        (lambda net, x: Trainer(RECIPES["quick"], "mnist"), "data is a str; accepted: a Dataset, as ffkernels.recipes"),
    ],
)
def test_what_to_do_instead_is_said(call, words):
    """A beginner's errors; what is wrong with a network's call is not laid on one of its layers."""
    net = ff.FFNetwork([ff.FFLinear(6, 5, dtype=torch.float64), ff.FFLinear(5, 3, dtype=torch.float64)])
    x = torch.rand(4, 6, dtype=torch.float64)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises((ValueError, TypeError), match=words):
        call(net, x)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda net, x: net.step(x, x, [None]), "optimizers has 1 entries; accepted: one optimizer for all, or 2"),
        (lambda net, x: net.train_layerwise(x, x, None, 0), "steps=0 is not an integer >= 1"),
        (lambda net, x: net.predict(x, 12), "num_classes"),
        (lambda net, x: net.predict(x, 3, layers=[2]), r"layers=\[2\]; accepted: indices of 2 layers"),
        (lambda net, x: net.features(x, layers=[], num_classes=3), r"layers=\[\]"),
        (lambda net, x: net.predict(x, 3, label_value=math.nan), "value"),
    ],
)
def test_bad_network_calls(call, words):
    net = ff.FFNetwork([ff.FFLinear(11, 4), ff.FFLinear(4, 2)])
    before = pickle.dumps(net.state_dict())
    with pytest.raises(ValueError, match=words):
        call(net, torch.rand(5, 11))
    assert pickle.dumps(net.state_dict()) == before


@pytest.mark.parametrize("read", [lambda n, x: n.predict(x), lambda n, x: n.features(x), lambda n, x: n.goodness(x)])
@pytest.mark.parametrize("x", [[[0.5] * 11], None, torch.ones(2, 11, dtype=torch.int64)])
def test_rows_that_are_no_tensor_of_numbers_are_named(read, x):
    net = ff.FFNetwork([ff.FFLinear(11, 4), ff.FFLinear(4, 2)])
    with pytest.raises(TypeError, match=r"x must be|x is a|x is torch.int64"):
        read(net, x)


def test_a_layer_that_hands_nothing_on_cannot_have_one_above():
    net = ff.FFNetwork([ff.FFLinear(11, 4, outputs="none"), ff.FFLinear(4, 2)])
    with pytest.raises(ValueError, match=r"layers\[0\].outputs='none'"):
        net.step(torch.rand(5, 11), torch.rand(5, 11), None)
