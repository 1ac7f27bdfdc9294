"""`linear_step_` against the training steps people write, by autograd in float64, and against fflib."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import ffkernels as ff
from bench.originals import ORIGINALS, HintonSGD, Original, stable_softplus

STEPS = 5
EXACT = 1e-10
# in, out, positive rows, negative rows
SHAPES = [(13, 7, 6, 6), (8, 16, 9, 4), (20, 11, 3, 10), (5, 3, 1, 1), (3, 1, 4, 4)]
CASES = [
    pytest.param(original, shape, id=f"{original.name}-{'-'.join(map(str, shape))}")
    for original in ORIGINALS.values()
    for shape in SHAPES
    if original.sides == 2 and (shape[2] == shape[3] or not original.equal_rows)
]


def rows_of(generator: torch.Generator, rows: int, width: int) -> Tensor:
    """Sparse and not negative, like pixels or activities, with rows of different lengths."""
    x = torch.rand(rows, width, generator=generator, dtype=torch.float64)
    keep = torch.rand(rows, width, generator=generator, dtype=torch.float64) < 0.7
    keep[:, 0] = True
    return x * keep * (0.5 + torch.rand(rows, 1, generator=generator, dtype=torch.float64))


def near_threshold(original: Original, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Scales the layer until the mean row sits on the threshold, where every row still learns."""
    q = original.forward(x, weight, bias).square().sum(1).mean()
    width = weight.shape[0]
    threshold = original.objective.get("threshold", float(width))
    target = {"sum": threshold, "mean": threshold * width, "norm": threshold**2}
    scale = (target[original.objective.get("goodness", "mean")] / q.clamp(min=1e-3)).sqrt()
    for parameter in (weight, bias):
        if parameter is not None:
            parameter.mul_(scale)


def layer_for(original: Original, x: Tensor, out: int, bias: bool, generator: torch.Generator) -> nn.Linear:
    layer = nn.Linear(x.shape[1], out, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(out, x.shape[1], generator=generator, dtype=torch.float64))
        layer.weight[0].abs_()  # at least one unit is active
        if bias:
            layer.bias.copy_(0.1 * torch.rand(out, generator=generator, dtype=torch.float64))
        near_threshold(original, x, layer.weight, layer.bias)
    return layer


def clone(layer: nn.Linear) -> nn.Linear:
    out, width = layer.weight.shape
    copy = nn.Linear(width, out, bias=layer.bias is not None, dtype=layer.weight.dtype)
    copy.load_state_dict(layer.state_dict())
    return copy


def assert_close(ours: Tensor, theirs: Tensor, what: str, tolerance: float = EXACT) -> None:
    assert ours.shape == theirs.shape, what
    difference = (ours - theirs).abs().max()
    assert difference <= tolerance * theirs.abs().max(), f"{what} differs by {difference:.3g}"


def assert_same_state(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer, what: str) -> None:
    state, wanted = ours.state_dict()["state"], theirs.state_dict()["state"]
    assert state.keys() == wanted.keys(), what
    for index, entries in wanted.items():
        assert state[index].keys() == entries.keys(), what
        for key, value in entries.items():
            assert_close(state[index][key], value, f"{what}, state {key} of parameter {index}")


def step_of(
    original: Original, x_pos: Tensor, x_neg: Tensor, weight: Tensor, bias: Tensor | None, optimizer: Optimizer
) -> tuple[Tensor, Tensor]:
    """One layer step by autograd, with a stable log(1 + e^t); returns the activities of both sides, as handed on."""
    loss, y_pos, y_neg = original.losses(x_pos, x_neg, weight, bias, softplus=stable_softplus)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if original.outputs == "post":
        with torch.no_grad():
            return original.forward(x_pos, weight, bias), original.forward(x_neg, weight, bias)
    return y_pos.detach(), y_neg.detach()


def options_for(original: Original, out: int, n_pos: int, n_neg: int) -> dict[str, Any]:
    return {
        "objective": original.objective_for(out),
        "sample_weight": original.weights_for(n_pos, n_neg, torch.float64),
        "outputs": original.outputs,
        **original.layer,
    }


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(("original", "shape"), CASES)
def test_step_is_the_originals_step(original: Original, shape: tuple[int, int, int, int], bias: bool) -> None:
    width, out, n_pos, n_neg = shape
    generator = torch.Generator().manual_seed(sum(shape) + bias)
    batches = [(rows_of(generator, n_pos, width), rows_of(generator, n_neg, width) * 0.8) for _ in range(STEPS)]
    theirs = layer_for(original, torch.cat(batches[0]), out, bias, generator)
    ours = clone(theirs)
    start = theirs.weight.detach().clone()
    their_optimizer, our_optimizer = original.optimizer(theirs.parameters()), original.optimizer(ours.parameters())
    options = options_for(original, out, n_pos, n_neg)
    for step, (x_pos, x_neg) in enumerate(batches):
        with torch.no_grad():
            loss = original.losses(x_pos, x_neg, theirs.weight, theirs.bias, softplus=stable_softplus)[0]
        y_pos, y_neg = step_of(original, x_pos, x_neg, theirs.weight, theirs.bias, their_optimizer)
        result = ff.linear_step_(x_pos, x_neg, ours.weight, ours.bias, our_optimizer, **options)
        assert_close(result.loss, loss * 1.0, f"step {step}: loss")
        assert_close(ours.weight, theirs.weight, f"step {step}: weight")
        if bias:
            assert_close(ours.bias, theirs.bias, f"step {step}: bias")
        assert_same_state(our_optimizer, their_optimizer, f"step {step}")
        assert result.pos is not None and result.neg is not None
        assert y_pos is not None and y_neg is not None
        assert_close(result.pos, y_pos, f"step {step}: positive activities")
        assert_close(result.neg, y_neg, f"step {step}: negative activities")
    assert (theirs.weight - start).abs().max() > 1e-7 * start.abs().max(), "nothing was learnt"


def test_rows_in_any_order_as_nebuly_takes_them() -> None:
    original, (n_pos, n_neg) = ORIGINALS["nebuly"], (7, 4)
    generator = torch.Generator().manual_seed(3)
    x = rows_of(generator, n_pos + n_neg, 12)
    order = torch.randperm(n_pos + n_neg, generator=generator)
    theirs = layer_for(original, x, 9, True, generator)
    ours = clone(theirs)
    their_optimizer, our_optimizer = original.optimizer(theirs.parameters()), original.optimizer(ours.parameters())
    options = options_for(original, 9, n_pos, n_neg)
    for step in range(STEPS):
        y_pos, y_neg = step_of(original, x[:n_pos], x[n_pos:], theirs.weight, theirs.bias, their_optimizer)
        assert y_pos is not None and y_neg is not None
        result = ff.linear_step_(
            x[order], None, ours.weight, ours.bias, our_optimizer, is_positive=order < n_pos, **options
        )
        assert_close(ours.weight, theirs.weight, f"step {step}: weight")
        assert result.y is not None
        assert_close(result.y, torch.cat([y_pos, y_neg])[order], f"step {step}: activities")


def test_one_optimizer_for_all_layers_as_loewex_has_it() -> None:
    original = ORIGINALS["loewex"]
    generator = torch.Generator().manual_seed(4)
    x_pos, x_neg = rows_of(generator, 8, 12), rows_of(generator, 8, 12)
    net = ff.FFNetwork(
        ff.FFLinear(i, o, objective=original.objective_for(o), outputs="pre", dtype=torch.float64, **original.layer)
        for i, o in ((12, 10), (10, 6))
    )
    theirs = [clone(layer) for layer in net]
    our_optimizer = original.optimizer(net.parameters())
    their_optimizer = original.optimizer([p for layer in theirs for p in layer.parameters()])
    for step in range(STEPS):
        net.step(x_pos, x_neg, our_optimizer)
        total, h_pos, h_neg = torch.zeros((), dtype=torch.float64), x_pos, x_neg
        for layer in theirs:
            loss, h_pos, h_neg = original.losses(h_pos.detach(), h_neg.detach(), layer.weight, layer.bias)
            total = total + loss
        their_optimizer.zero_grad()
        total.backward()
        their_optimizer.step()
        for i, (mine, layer) in enumerate(zip(net, theirs, strict=True)):
            assert_close(mine.weight, layer.weight, f"step {step}: weight of layer {i}")
            assert_close(mine.bias, layer.bias, f"step {step}: bias of layer {i}")
        assert_same_state(our_optimizer, their_optimizer, f"step {step}")


def test_hinton_sgd_is_his_update() -> None:
    weight, bias = nn.Parameter(torch.tensor([[2.0]]).double()), nn.Parameter(torch.tensor([3.0]).double())
    optimizer = HintonSGD([weight, bias], lr=0.1, momentum=0.75, weight_decay=0.5)
    for gradient in (4.0, -8.0):
        weight.grad, bias.grad = torch.full_like(weight, gradient), torch.full_like(bias, gradient)
        optimizer.step()
    # Averages: 4/4 = 1, then .75 - 2 = -1.25. Weight: 2 - .1 (1 + 1) = 1.8; 1.8 - .1 (-1.25 + .9) = 1.835.
    assert weight.item() == pytest.approx(1.835, rel=1e-14)
    assert bias.item() == pytest.approx(3 - 0.1 + 0.125, rel=1e-14)


def fflib_net(sizes: tuple[int, ...], dtype: torch.dtype, maximize: bool) -> Any:
    layers = pytest.importorskip("fflib.nn.ff_linear", reason="fflib is not installed")
    nets = pytest.importorskip("fflib.nn.ff_net")
    made = [
        layers.FFLinear(i, o, loss_threshold=20.0, lr=0.02, maximize=maximize, dtype=dtype)
        for i, o in itertools.pairwise(sizes)
    ]
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in made:
            # Goodness near the threshold of 20 for rows of length 1.
            weight = torch.randn(layer.weight.shape, generator=generator, dtype=torch.float64)
            layer.weight.copy_(weight * 6)
            layer.bias.copy_(torch.randn(layer.bias.shape, generator=generator, dtype=torch.float64))
    return nets.FFNet(made, "cpu")


def net_like(theirs: Any, maximize: bool) -> tuple[ff.FFNetwork, list[torch.optim.Optimizer]]:
    original = ORIGINALS["fflib" if maximize else "fflib-minimize"]
    net = ff.FFNetwork(
        ff.FFLinear(
            layer.in_features,
            layer.out_features,
            objective=original.objective_for(layer.out_features),
            dtype=layer.weight.dtype,
            **original.layer,
        )
        for layer in theirs.layers
    )
    for mine, layer in zip(net, theirs.layers, strict=True):
        mine.load_state_dict(layer.state_dict())
    return net, [original.optimizer(layer.parameters()) for layer in net]


@pytest.mark.parametrize("maximize", [True, False])
def test_network_step_is_fflibs_own(maximize: bool) -> None:
    generator = torch.Generator().manual_seed(6)
    theirs = fflib_net((14, 10, 8), torch.float64, maximize)
    ours, optimizers = net_like(theirs, maximize)
    for step in range(STEPS):
        x_pos, x_neg = rows_of(generator, 6, 14), rows_of(generator, 6, 14)
        theirs.run_train_combined(x_pos, x_neg)
        ours.step(x_pos, x_neg, optimizers)
        for i, (mine, layer) in enumerate(zip(ours, theirs.layers, strict=True)):
            assert_close(mine.weight, layer.weight, f"step {step}: weight of layer {i}")
            assert_close(mine.bias, layer.bias, f"step {step}: bias of layer {i}")
            assert_same_state(optimizers[i], layer.opt, f"step {step}, layer {i}")


@pytest.mark.parametrize("maximize", [True, False])
def test_float32_network_step_is_as_exact_as_fflibs_own(maximize: bool) -> None:
    generator = torch.Generator().manual_seed(7)
    exact, theirs = (fflib_net((33, 25, 18), dtype, maximize) for dtype in (torch.float64, torch.float32))
    ours, optimizers = net_like(theirs, maximize)
    for _ in range(STEPS):
        x_pos, x_neg = rows_of(generator, 16, 33), rows_of(generator, 16, 33)
        exact.run_train_combined(x_pos, x_neg)
        theirs.run_train_combined(x_pos.float(), x_neg.float())
        ours.step(x_pos.float(), x_neg.float(), optimizers)
    for mine, layer, truth in zip(ours, theirs.layers, exact.layers, strict=True):
        for name in ("weight", "bias"):
            wanted = getattr(truth, name).detach()
            our_error, their_error = (
                ((getattr(found, name).detach().double() - wanted).norm() / wanted.norm()).item()
                for found in (mine, layer)
            )
            assert our_error <= 2 * their_error + torch.finfo(torch.float32).eps, name
