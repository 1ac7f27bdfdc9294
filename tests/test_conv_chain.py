"""A loss that reaches several convolutions, without a graph, against autograd."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ffkernels as ff
from ffkernels.functional import chain
from ffkernels.functional.maps import ConvOptions

from .conv_cases import definition
from .steps import error

OBJECTIVE = ff.Objective(threshold=0.5)


def layers() -> list[ff.FFConv2d]:
    torch.manual_seed(0)
    options = {"objective": OBJECTIVE, "dtype": torch.float64}
    found = [
        ff.FFConv2d(2, 4, 3, padding=1, batch_norm="before", pool=nn.AvgPool2d(2), **options),
        ff.FFConv2d(4, 6, 3, padding=1, groups=2, batch_norm="before", activation="gelu", **options),
        ff.FFConv2d(6, 5, (3, 2), stride=2, pool=2, **options),
    ]
    for layer in found[:2]:
        nn.init.normal_(layer.input_norm.weight), nn.init.normal_(layer.input_norm.bias)
    return found


def passed(of: list[ff.FFConv2d], x: Tensor) -> list[chain.Passed]:
    links = []
    for layer in of:
        links.append(chain.forward(x, layer.weight, layer.bias, ConvOptions(**layer._options())))
        x = links[-1].y
    return links


@pytest.mark.parametrize("running", [False, True])
def test_three_layers_and_what_their_input_is_made_of(running):
    ours, x = layers(), torch.randn(6, 2, 12, 12, dtype=torch.float64)
    scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
    for layer in ours:
        layer.train(not running)
    theirs, other = deepcopy((ours, scale))
    mine = torch.optim.SGD([scale, *(p for layer in ours for p in layer.parameters())], lr=0.1, momentum=0.9)
    plain = torch.optim.SGD([other, *(p for layer in theirs for p in layer.parameters())], lr=0.1, momentum=0.9)
    for _ in range(3):
        judged = chain.step_(passed(ours, x * scale), 3, mine, OBJECTIVE, {"scale": scale})
        y = x * other
        for layer in theirs:
            y = definition(layer, y)
        goodness = y.square().mean((1, 2, 3))
        loss = (F.softplus(0.5 - goodness[:3]).sum() + F.softplus(goodness[3:] - 0.5).sum()) / 6
        plain.zero_grad()
        loss.backward()
        plain.step()
        assert error(judged.loss, loss) <= 1e-10 and error(judged.goodness, goodness) <= 1e-10
    assert error(scale, other) <= 1e-10
    for layer, reference in zip(ours, theirs, strict=True):
        for name, value in reference.state_dict().items():
            assert error(layer.state_dict()[name], value, 1.0) <= 1e-10, name


@pytest.mark.parametrize("left", [2, 0])
def test_rows_left_out_are_in_no_gradient(left):
    """Their slopes are zero, and what reaches them by the statistics of a batch is dropped."""
    ours, x = layers()[:2], torch.randn(8, 2, 12, 12, dtype=torch.float64)
    scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
    theirs, other = deepcopy((ours, scale))
    given = x * other
    below = definition(theirs[0], given)
    goodness = definition(theirs[1], below).square().mean((1, 2, 3))
    difference = goodness[:4] - goodness[4:]
    of_pairs = torch.sigmoid(-4 * difference).detach()
    skip_below = of_pairs.sort().values[1:3].mean().item() if left else 1.0
    kept = of_pairs >= skip_below
    assert kept.sum() == left
    mine = torch.optim.SGD([scale, *(p for layer in ours for p in layer.parameters())], lr=0.1)
    chain.step_(passed(ours, x * scale), 4, mine, ff.Objective(loss="symba"), {"scale": scale}, skip_below)
    of_rows = kept.repeat(2)[:, None, None, None]
    for maps in (given, below):
        maps.register_hook(lambda gradient: gradient * of_rows)
    (F.softplus(-4 * difference) * kept).sum().div(4).backward()
    torch.optim.SGD([other, *(p for layer in theirs for p in layer.parameters())], lr=0.1).step()
    assert error(scale, other) <= 1e-10
    for layer, reference in zip(ours, theirs, strict=True):
        for name, value in reference.named_parameters():
            assert error(layer.get_parameter(name), value, 1.0) <= 1e-10, name


STEMS = {
    "channels-last": (
        lambda p: F.conv2d(IMAGES.contiguous(memory_format=torch.channels_last), p["stem"]),
        (2, 3, 3, 3),
    ),
    "expanded": (lambda p: IMAGES[:, :2] + p["stem"].sum(), (64,)),
    "one for two": (lambda p: p["stem"] + p["other"], (4, 2, 8, 8)),
}
IMAGES = torch.rand(4, 3, 8, 8)


@pytest.mark.parametrize("rule", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("stem", STEMS)
def test_gradients_of_what_the_input_is_made_of_in_any_layout(stem, rule):
    """Rules walk memory in order and write over a gradient: autograd's may be laid out otherwise, or be one for two."""
    make, shape = STEMS[stem]
    torch.manual_seed(0)
    layer = ff.FFConv2d(2, 4, 3, padding=1, objective=OBJECTIVE)
    given = {name: torch.randn(shape) for name in ("stem", "other")}
    if stem == "one for two":
        # Which the unfused rules take, as it is.
        given = {name: value.contiguous(memory_format=torch.channels_last) for name, value in given.items()}
    given = {name: nn.Parameter(value) for name, value in given.items()}
    theirs, others = deepcopy((layer, given))
    options = {"lr": 0.1, "weight_decay": 0.1}
    if rule is torch.optim.Adam:
        options["eps"] = 1e-2
    x = make(given)
    learned = {name: p for name, p in given.items() if name == "stem" or stem == "one for two"}
    chain.step_(passed([layer], x), 2, rule([*learned.values(), *layer.parameters()], **options), OBJECTIVE, learned)
    goodness = definition(theirs, make(others)).square().mean((1, 2, 3))
    ((F.softplus(0.5 - goodness[:2]).sum() + F.softplus(goodness[2:] - 0.5).sum()) / 4).backward()
    rule([*others.values(), *theirs.parameters()], **options).step()
    for name, parameter in learned.items():
        assert error(parameter, others[name], 1.0) <= 1e-5, name
    assert error(layer.weight, theirs.weight, 1.0) <= 1e-5


def test_a_weight_of_two_layers_is_refused():
    first, second = (ff.FFConv2d(4, 4, 3, padding=1, objective=OBJECTIVE) for _ in range(2))
    second.weight = first.weight
    before = first.weight.detach().clone()
    links = passed([first, second], torch.rand(4, 4, 6, 6))
    optimizer = torch.optim.Adam([*first.parameters(), second.bias])
    with pytest.raises(ValueError, match=r"0\.weight shares memory with weight"):
        chain.step_(links, 2, optimizer, OBJECTIVE)
    assert torch.equal(first.weight, before)


def test_no_rows_without_running_statistics_change_nothing():
    ours = layers()[:2]
    for layer in ours:
        layer.input_norm = nn.BatchNorm2d(layer.in_channels, track_running_stats=False, dtype=torch.float64)
    before = deepcopy([layer.state_dict() for layer in ours])
    parameters = [p for layer in ours for p in layer.parameters()]
    chain.step_(passed(ours, torch.rand(0, 2, 12, 12, dtype=torch.float64)), 0, torch.optim.SGD(parameters), OBJECTIVE)
    for layer, state in zip(ours, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())


def test_one_number_has_no_variance():
    with pytest.raises(ValueError, match="no variance for input_norm"):
        passed([ff.FFConv2d(2, 4, 1, batch_norm="before")], torch.rand(1, 2, 1, 1))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"norm": "l2"}, "norm or product_norm came to a chain"),
        ({"product_norm": nn.BatchNorm2d(4)}, "norm or product_norm came to a chain"),
        ({"padding_mode": "reflect"}, "padding_mode='reflect' came to a chain"),
        ({"input_norm": nn.GroupNorm(1, 2, affine=False)}, "input_norm is a GroupNorm"),
        ({"input_norm": nn.BatchNorm2d(2, affine=False)}, "input_norm is a BatchNorm2d"),
    ],
)
def test_what_a_chain_does_without_is_named(options, match):
    layer = ff.FFConv2d(2, 4, 3)
    with pytest.raises(ValueError, match=match):
        chain.forward(torch.rand(2, 2, 6, 6), layer.weight, None, ConvOptions(**{**layer._options(), **options}))


def test_nothing_is_written_before_a_refusal():
    ours = layers()
    links = passed(ours, torch.randn(4, 2, 12, 12, dtype=torch.float64))
    before = deepcopy([layer.state_dict() for layer in ours])
    with pytest.raises(ValueError, match=r"does not hold 0\.weight"):
        chain.step_(links, 2, torch.optim.SGD([*ours[1].parameters(), *ours[2].parameters()], lr=0.1), OBJECTIVE)
    for layer, state in zip(ours, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
