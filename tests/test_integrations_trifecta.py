"""Trifecta's blocks and network by their contract: both parities against autograd, what programs change and save."""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam

from ffkernels.integrations import trifecta
from ffkernels.integrations.trifecta import Block, Network

from .steps import error

pytestmark = pytest.mark.usefixtures("fresh_warnings")
SMALL = ((8, True), (8, False), (12, True), (12, False), (12, False), (16, True))


def config(**changes: Any) -> SimpleNamespace:
    given = {"lr": 1e-3, "scale": 1, "alpha": 4.0, "bn": True, "olu": True, "tau": 2.0, "learned": True}
    return SimpleNamespace(**given | {"model": "small", "dataset": "mnist"} | changes)


@pytest.fixture(autouse=True)
def _narrow(monkeypatch) -> None:
    monkeypatch.setitem(trifecta.SIZES, "small", SMALL)


class Theirs:
    """The definition by autograd: a loss reaches back to the last block that has one, or to the embedding."""

    def __init__(self, net: Network, of: SimpleNamespace, eps: float) -> None:
        self.net, self.of = copy.deepcopy(net), of
        owned = [list(block.inner.parameters()) for block in self.net.layers]
        below = [list(self.net.embedding.parameters()) if of.learned else [], *owned]
        self.optimizers = [Adam(a + b, lr=of.lr, eps=eps) for a, b in zip(below, owned, strict=False)]

    def step(self, x: Tensor, labels: Tensor, iteration: int) -> list[Tensor | None]:
        x = torch.cat([x, self.net.embedding(labels).view(-1, 1, *x.shape[2:])], 1)
        losses: list[Tensor | None] = []
        for i, (block, optimizer) in enumerate(zip(self.net.layers, self.optimizers, strict=True)):
            norm, convolution, _, pool = block.inner
            x = pool(F.relu(F.conv2d(norm(x), convolution.weight, padding=1)))
            if self.of.olu and (i + iteration) % 2 == 0:
                losses.append(None)
                continue
            pos, neg = x.square().mean((1, 2, 3)).chunk(2)
            if self.of.alpha is None:
                loss = (F.softplus(self.of.tau - pos).sum() + F.softplus(neg - self.of.tau).sum()) / len(x)
            else:
                loss = F.softplus(-self.of.alpha * (pos - neg)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            x = x.detach()
            losses.append(loss.detach())
        return losses


def made(dtype: torch.dtype = torch.float64, eps: float = 1e-4, **changes: Any) -> tuple[Network, Theirs]:
    torch.manual_seed(0)
    of = config(**changes)
    net = Network(of, 10, 12).to(dtype)
    for block in net.layers:
        for group in block.optimizer.param_groups:
            # Where gradients cancel to rounding, Adam divides it by itself.
            group["eps"] = eps
    return net, Theirs(net, of, eps)


def batch(dtype: torch.dtype, rows: int = 8) -> tuple[Tensor, Tensor]:
    images, labels = torch.randn(rows, 1, 12, 12, dtype=dtype), torch.randint(10, (rows,))
    return torch.cat([images, images]), torch.cat([labels, (labels + torch.randint(1, 10, (rows,))) % 10])


def assert_same(net: Network, theirs: Theirs, tolerance: float) -> None:
    for name, value in theirs.net.state_dict().items():
        assert error(net.state_dict()[name], value, 1.0) <= tolerance, name


@pytest.mark.parametrize(
    "changes",
    [{}, {"olu": False}, {"alpha": None}, {"learned": False}],
    ids=["overlapped", "by layer", "by side", "fixed labels"],
)
def test_both_parities_are_those_of_autograd(changes):
    ours, theirs = made(**changes)
    for iteration in range(6):
        x, labels = batch(torch.float64)
        before = copy.deepcopy(ours.embedding.weight)
        delta, losses, pos, neg = ours(x, labels, iteration)
        for mine, other in zip(losses, theirs.step(x, labels, iteration), strict=True):
            assert (mine is None) == (other is None)
            assert mine is None or abs(mine - float(other)) <= 1e-10
        for d, p, n in zip(delta, pos, neg, strict=True):
            assert d is None or error(d, p - n, 1.0) <= 1e-10
        learns = bool(changes.get("learned", True)) and (changes.get("olu") is False or iteration % 2 == 1)
        assert torch.equal(before, ours.embedding.weight) != learns
        assert_same(ours, theirs, 1e-9)


def test_fifty_steps_in_float32():
    """Of three runs the middle one: in one of twelve a ReLU or a pool that rounding has turned over leaves up to 1e-3,
    of ours as of PyTorch's."""
    errors: dict[str, list[tuple[float, float]]] = {}
    for seed in range(3):
        (ours, theirs), (_, exact) = made(torch.float32, eps=1e-2), made(eps=1e-2)
        exact.net.load_state_dict(ours.state_dict())
        torch.manual_seed(seed)
        for iteration in range(50):
            x, labels = batch(torch.float32)
            ours(x, labels, iteration)
            theirs.step(x, labels, iteration)
            exact.step(x.double(), labels, iteration)
        for name, value in exact.net.state_dict().items():
            pair = (error(net.state_dict()[name], value, 1.0) for net in (ours, theirs.net))
            errors.setdefault(name, []).append(tuple(pair))
    for name, of_runs in errors.items():
        mine, of_torch = (sorted(values)[1] for values in zip(*of_runs, strict=True))
        assert mine <= 2 * of_torch + 1e-7, name


def test_statistics_of_many_numbers_keep_their_digits():
    torch.manual_seed(0)
    block = Block(3, 8, 1, None, 32, lr=1e-3, scale=1, alpha=4.0, tau=2.0, olu=True, bn=True)
    x = (torch.randn(64, 3, 32, 32) + torch.tensor([0.0, 1.0, 10.0])[:, None, None]).contiguous(
        memory_format=torch.channels_last
    )
    block(x, 0)
    norm = block.inner[0]
    wide = x.double()
    assert error(norm.running_mean / 0.1, wide.mean((0, 2, 3))) <= 1e-6
    assert error((norm.running_var - 0.9) / 0.1, wide.var((0, 2, 3))) <= 1e-5


@pytest.mark.parametrize("change", [lambda y: y, lambda y: y * 2, lambda y: y.mul_(2), lambda y: y + 4])
def test_statistics_are_of_the_maps_that_come(change):
    """Sums that a block below has of what it handed on are taken for nothing else, nor where they would cancel."""
    ours, _ = made(torch.float32)
    below, block = ours.layers[:2]
    x = torch.cat([torch.randn(8, 1, 12, 12), torch.ones(8, 1, 12, 12)], 1)
    y, _ = below.advance(x, False)
    y = change(y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        block.advance(y, False)
    wide, norm = y.double(), block.inner[0]
    assert error(norm.running_mean / norm.momentum, wide.mean((0, 2, 3))) <= 1e-6
    assert error(norm.running_var - (1 - norm.momentum), norm.momentum * wide.var((0, 2, 3))) <= 1e-5


@pytest.mark.parametrize("is_watched", [False, True])
def test_an_output_that_nobody_reads_is_not_made(is_watched, monkeypatch):
    """Of the last block without a loss the running statistics move, as in a pass, and a hook still sees that."""
    ours, theirs = made()
    seen: list[Any] = []
    if is_watched:
        ours.layers[-1].register_forward_hook(lambda *of: seen.append(of))
    passes: list[Any] = []
    forward = trifecta.chain.forward
    monkeypatch.setattr(trifecta.chain, "forward", lambda *of: passes.append(of) or forward(*of))
    x, labels = batch(torch.float64)
    for iteration in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if is_watched else "error")
            ours(x, labels, iteration)
        theirs.step(x, labels, iteration)
    last = len(ours.layers) - 1
    assert len(seen) == 2 * is_watched and len(passes) == (11 if not is_watched else 2 * last - 1)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        mine, reference = (getattr(net.layers[last].inner[0], name) for net in (ours, theirs.net))
        assert error(mine, reference) <= 1e-10, name


@pytest.mark.parametrize("change", [lambda y: y * 2, lambda y: y.mul_(2)])
def test_what_comes_between_two_blocks_is_named(change):
    """No gradient goes through it: the upper one learns of what came, the lower one not, and a warning says so."""
    ours, _ = made()
    below, block = ours.layers[:2]
    y, _ = below.advance(torch.randn(8, 2, 12, 12, dtype=torch.float64), False)
    before = copy.deepcopy(below.state_dict())
    with pytest.warns(UserWarning, match="block 0 of Trifecta did not learn in a step"):
        block.advance(change(y), True)
    assert all(torch.equal(value, before[name]) for name, value in below.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("iteration", [0, 1])
def test_precision_is_that_of_torch(iteration, dtype):
    """By the mean square of eight draws: a normalisation's weight has few numbers, whose error is chance in one."""
    lr = 1.0  # of SGD: what is left of the weights is their gradient
    squares: dict[str, Tensor] = {}
    for seed in range(8):
        exact, theirs = made()
        mine, torchs = (copy.deepcopy(net).float() for net in (exact, theirs.net))
        torch.manual_seed(100 + seed)
        x, labels = batch(torch.float64, 64)
        for net in (exact, mine, torchs):
            for block in net.layers:
                block.optimizer = SGD([p for g in block.optimizer.param_groups for p in g["params"]], lr=lr)
        before = {name: value.double().clone() for name, value in exact.state_dict().items()}
        exact(x, labels, iteration)
        for block in mine.layers:
            block.compute_dtype = dtype if dtype != torch.float32 else None
        mine(x.float(), labels, iteration)
        reference = Theirs(torchs, config(), 1e-4)
        reference.optimizers = [SGD(o.param_groups[0]["params"], lr=lr) for o in reference.optimizers]
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            reference.step(x.float(), labels, iteration)
        for name, parameter in exact.named_parameters():
            moved = parameter.detach() - before[name]
            if moved.norm() > 1e-6:
                found = (net.get_parameter(name).detach().double() - before[name] for net in (mine, reference.net))
                pair = torch.tensor([error(of, moved) ** 2 for of in found])
                squares[name] = squares.get(name, torch.zeros(2)) + pair / 8
    assert len(squares) > 6
    for name, of_both in squares.items():
        found, other = of_both.sqrt().tolist()
        assert found <= 2 * other + 1e-6, name


def test_prediction_goes_by_running_statistics():
    ours, theirs = made()
    for iteration in range(2):
        x, labels = batch(torch.float64)
        ours(x, labels, iteration)
        theirs.step(x, labels, iteration)
    ours.eval(), theirs.net.eval()
    goodness = ours(x, labels, None)
    assert goodness.shape == (6, 16)
    y = torch.cat([x, theirs.net.embedding(labels).view(-1, 1, 12, 12)], 1)
    for row, block in zip(goodness, theirs.net.layers, strict=True):
        y = block.inner(y)
        assert error(row, y.square().mean((1, 2, 3))) <= 1e-8


def test_pairs_that_are_told_apart_may_be_left_out():
    ours, _ = made(olu=False)
    for block in ours.layers:
        block.skip_below = 1.0
    before = copy.deepcopy(dict(ours.named_parameters()))
    ours(*batch(torch.float64), 0)
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("changes", ["layer norm", "hook", "frozen"])
def test_what_a_program_has_changed_is_obeyed(changes):
    ours, theirs = made(bn=changes != "layer norm")
    calls: list[int] = []
    if changes == "hook":
        ours.layers[2].inner[1].register_forward_hook(lambda *_: calls.append(1))
    if changes == "frozen":
        for net in (ours, theirs.net):
            net.layers[3].inner[1].weight.requires_grad_(False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for iteration in range(4):
            x, labels = batch(torch.float64)
            ours(x, labels, iteration)
            theirs.step(x, labels, iteration)
    assert any("runs on its original path" in str(warning.message) for warning in caught)
    assert_same(ours, theirs, 1e-9)
    assert len(calls) == (4 if changes == "hook" else 0)


def test_a_block_alone_and_another_optimizer():
    torch.manual_seed(0)
    options = {"lr": 1e-3, "scale": 1, "alpha": 4.0, "tau": 2.0, "olu": True, "bn": True}
    block = Block(3, 8, 1, None, 8, **options).double()
    block.optimizer = SGD(block.parameters(), lr=0.1, momentum=0.9)
    theirs = copy.deepcopy(block)
    x = torch.randn(8, 3, 8, 8, dtype=torch.float64)
    y, goodness, *_ = block(x, 0)
    expected = theirs._by_autograd(x, 0)
    assert not y.requires_grad and error(y, expected[0]) <= 1e-12 and error(goodness, expected[1]) <= 1e-12
    for mine, other in zip(block.parameters(), theirs.parameters(), strict=True):
        assert error(mine, other) <= 1e-10
    names = ["0.weight", "0.bias", "0.running_mean", "0.running_var", "0.num_batches_tracked", "1.weight"]
    assert list(block.state_dict()) == [f"inner.{name}" for name in names]
    held = [p for group in Block(3, 8, 2, block, 8, **options).optimizer.param_groups for p in group["params"]]
    assert len(held) == 6 and held[0] is block.inner[0].weight


def test_the_published_sizes(monkeypatch):
    monkeypatch.undo()
    net = Network(config(dataset="cifar10", model="large"), 10, 32)
    assert [block.inner[1].weight.shape[0] for block in net.layers] == [64, 128, 128, 128, 128] + 4 * [256] + 3 * [512]
    small = Network(config(), 10, 28)
    assert [tuple(b.inner[1].weight.shape[:2]) for b in small.layers] == [
        (128, 2), (128, 128), (256, 128), (256, 256), (256, 256), (512, 256),
    ]  # fmt: skip
    assert [type(b.inner[3]) is nn.MaxPool2d for b in small.layers] == [True, False, True, False, False, True]
    with pytest.raises(ValueError, match=r"config\.model='tiny'"):
        Network(config(model="tiny"), 10, 28)
