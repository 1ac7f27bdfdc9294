"""What a random step has to give: each element within its own bound around float64.

`Expected` runs the definition in float64 and carries an error along with every number: what rounding to `u` (half the
distance of the neighbours of 1) may have done to it in the dtype under test, first order, worst case. An element is
right if it lies within that bound, so that a term that cancels away, a row that another row has touched, or an
optimizer's option that was not read shows, however small beside the rest.
"""

from __future__ import annotations

import math
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

import ffkernels as ff
from ffkernels.reference import ACTIVATIONS, softplus

from .surface import COMPUTE, Case, Made, make, read_only, take_step

# The optimizer's rule at so many gradients between the least and the largest that rounding may have made.
PROBES = 17


class Bounded(NamedTuple):
    """Numbers in float64, and how far from each a right result may lie."""

    value: Tensor
    error: Tensor

    def sum(self, dim: int, u: float) -> Bounded:
        terms = self.value.shape[dim] + 2
        return Bounded(self.value.sum(dim), self.error.sum(dim) + terms * u * self.value.abs().sum(dim))


def check_case(case: Case, backend: str) -> None:
    """Runs the steps of a case on `backend`; raises AssertionError with the first element that is not right."""
    made = make(case)
    before = {name: tensor.clone() for name, tensor in _inputs(made).items()}
    for step in range(case.steps):
        expected = Expected(case, made)
        if not expected.in_range():
            return
        result = take_step(case, made, backend)
        expected.check(result, made, step)
    for name, tensor in _inputs(made).items():
        assert torch.equal(tensor, before[name]), f"{name}, which is only read, was written"


def check_forward(case: Case, backend: str) -> None:
    """`linear_forward` of a case's rows, with a weight that may be read-only."""
    made = make(case)
    if case.layouts["rows"] == "read-only":
        made.weight, made.bias = read_only(made.weight.detach()), None if made.bias is None else made.bias.detach()
    options = {key: case.options[key] for key in ("norm", "eps", "eps_mode", "activation")}
    y, sumsq = ff.linear_forward(
        made.x, made.weight, made.bias, compute_dtype=case.compute_dtype, copies=2 if case.copies else 1,
        backend=backend, input_sumsq=made.options.get("input_sumsq"), **options,
    )  # fmt: skip
    forward = Forward(case, made, made.weight.detach().double())
    if not forward.in_range():
        return
    _assert_within("y", y, forward.stored())
    _assert_within("sumsq", sumsq, forward.q)


def _inputs(made: Made) -> dict[str, Tensor]:
    named = {"x_pos": made.x_pos, "x_neg": made.x_neg, "threshold": made.objective.threshold, **made.options}
    return {name: value for name, value in named.items() if isinstance(value, Tensor) and name != "product"}


class Forward:
    """Activities of a case's rows under `weight`, with their bounds."""

    def __init__(self, case: Case, made: Made, weight: Tensor) -> None:
        self.case = case
        u, u_c = case.u, case.u_operand
        options = made.options | case.options
        self.x = x = made.x.double()
        bias = 0.0 if made.bias is None else made.bias.detach().double()
        width = x.shape[1]
        square = x.square().sum(1)
        length_error = (width + 8) * u
        norm, eps, mode = options["norm"], options["eps"], options["eps_mode"]
        scaled = square / width if norm == "rms" else square
        if norm == "none":
            r = torch.ones_like(square)
            length_error = 0.0
        elif mode == "add":
            r = 1 / (scaled.sqrt() + eps)
        elif mode == "clamp":
            r = 1 / scaled.sqrt().clamp(min=eps)
        else:
            r = (scaled + eps).rsqrt()
        self.r = r = r.masked_fill(square == 0, 1.0 if norm == "none" else 0.0)
        self.r_error = length_error
        # [rows, out]: sums of products, and of their absolute values
        sums, sizes = x @ weight.T, x.abs() @ weight.abs().T
        r = r[:, None]
        error = sizes * ((width + 4) * u + 2.1 * u_c) * r + (sums * r).abs() * length_error
        self.z = z = sums * r + bias
        error = error + case.least_operand * (weight.abs().sum(1) + r * x.abs().sum(1, keepdim=True))
        self.z_error = error = error + 4 * u * ((sums * r).abs() + abs(bias)) + _tiny(case)
        steep = {"gelu": 1.13, "silu": 1.1}.get(options["activation"], 1.0)
        y = ACTIVATIONS[options["activation"]](z)
        curved = options["activation"] in ("gelu", "silu")
        # GELU and SiLU of large negative numbers cancel: float32's erf leaves units of the size of z.
        self.y = Bounded(y, steep * error + 8 * u * (z.abs() if curved else y.abs()))
        out = y.shape[1]
        q = self.y.value.square().sum(1)
        slack = (2 * y.abs() * self.y.error + self.y.error.square()).sum(1)
        self.q = Bounded(q, slack + (out + 4) * u * q)

    def in_range(self) -> bool:
        """Whether nothing overflows in the dtypes under test, where infinity would be right."""
        y, q = (float(t.max()) if t.numel() else 0.0 for t in (self.y.value.abs(), self.q.value))
        return y < torch.finfo(COMPUTE[self.case.compute]).max / 2 and q < torch.finfo(self.case.dtype).max / 1e3

    def stored(self) -> Bounded:
        """The activities as they are handed on, rounded to the compute dtype."""
        unit = self.case.u_operand
        least = torch.finfo(COMPUTE[self.case.compute]).smallest_normal if unit else 0.0
        return Bounded(self.y.value, self.y.error * (1 + unit) + unit * self.y.value.abs() + least)


def _tiny(case: Case) -> float:
    """What is flushed to zero: below the smallest normal number."""
    return torch.finfo(case.dtype).smallest_normal


class Expected:
    """What a step has to give, from the parameters and the state as they are before it."""

    def __init__(self, case: Case, made: Made) -> None:
        self.case = case
        n = len(made.x)
        is_positive = made.options.get("is_positive")
        self.side = torch.arange(n) < case.n_pos if is_positive is None else is_positive
        self.forward = forward = Forward(case, made, made.weight.detach().double())
        objective, u = made.objective, case.u
        width = case.out_features
        q = forward.q
        if objective.goodness == "mean":
            self.goodness = Bounded(q.value / width, q.error / width + u * q.value / width)
        elif objective.goodness == "sum":
            self.goodness = q
        else:
            root = q.value.sqrt()
            slack = torch.minimum(q.error.sqrt(), q.error / root)
            self.goodness = Bounded(root, torch.where(root > 0, slack, q.error.sqrt()) + 2 * u * root)
        slope, self.loss = self._objective(objective, made)
        self.coefficient = self._coefficient(objective, slope)
        self._gradients(made)
        self._update(made)

    def in_range(self) -> bool:
        """Whether nothing overflows, an optimizer's squares of gradients included."""
        least = torch.finfo(self.case.dtype).max ** 0.5 / 1e3
        gradients = self.weight_gradient.value, self.bias_gradient.value
        return self.forward.in_range() and all(bool((g.abs() < least).all()) for g in gradients)

    def _objective(self, objective: ff.Objective, made: Made) -> tuple[Bounded, Bounded]:
        """dLoss/dgoodness `[rows]`, and the loss."""
        u, g, side = self.case.u, self.goodness, self.side
        flip = 1.0 if objective.maximize else -1.0
        weights = made.options.get("sample_weight")
        n_pos, n_neg = int(side.sum()), int((~side).sum())
        skip = self.case.options["skip_below"]
        if objective.paired:
            places = side.nonzero()[:, 0], (~side).nonzero()[:, 0]
            pos, neg = (Bounded(g.value[at], g.error[at]) for at in places)
            scale = torch.full_like(pos.value, -objective.alpha * flip)
            logit = scale * (pos.value - neg.value)
            size = scale.abs() * (pos.value + neg.value)
            error = scale.abs() * (pos.error + neg.error) + 3 * u * size
            weight = torch.full_like(logit, 1 / max(len(logit), 1))
        else:
            theta = self._thresholds(objective)
            scale = torch.where(side, -flip, flip).double() / objective.temperature
            logit = scale * (g.value - theta)
            error = scale.abs() * (g.error + 3 * u * (g.value + theta.abs())) + 2 * u * logit.abs()
            if objective.reduction == "mean":
                weight = torch.full_like(logit, 1 / max(n_pos + n_neg, 1))
            else:
                weight = 1 / torch.where(side, max(n_pos, 1), max(n_neg, 1)).double()
        if weights is not None:
            weight = weight * weights.double()
        near = torch.exp(-(logit.abs() - error).clamp(min=0))
        if objective.loss == "swish":
            s = torch.sigmoid(logit)
            value, steep = logit * s, s * (1 + logit * (1 - s))
            steep_error = (0.5 * torch.ones_like(near)).minimum((logit.abs() + error + 3) * near) * error
            loss_error = 1.1 * error + 8 * u * (value.abs() + near)
            steep_error = steep_error + 8 * u * (s + (logit * s * (1 - s)).abs())
        else:
            value, steep = softplus(logit), torch.sigmoid(logit)
            steep_error = near.clamp(max=0.25) * error + 8 * u * steep
            loss_error = torch.sigmoid(logit + error) * error + 8 * u * value
        steep_error = steep_error + _tiny(self.case)
        if skip:
            sure = steep.abs() < skip * (1 - 4 * u) - steep_error
            unsure = ((steep.abs() - skip).abs() <= steep_error + 4 * u * skip) & ~sure
            steep_error = torch.where(unsure, steep.abs() + steep_error, steep_error)
            steep, steep_error = steep.masked_fill(sure, 0), steep_error.masked_fill(sure, 0)
        loss = Bounded(weight * value, weight * loss_error + 3 * u * (weight * value).abs()).sum(0, u)
        slope, slope_error = weight * scale * steep, (weight * scale).abs() * (steep_error + 6 * u * steep.abs())
        if objective.paired:
            signed, both = torch.zeros_like(g.value), torch.zeros_like(g.value)
            for at, sign in zip(places, (1, -1), strict=True):
                signed[at], both[at] = sign * slope, slope_error
            slope, slope_error = signed, both
        return Bounded(slope, slope_error), loss

    def _thresholds(self, objective: ff.Objective) -> Tensor:
        if isinstance(objective.threshold, Tensor):
            return objective.threshold.double().expand(self.side.shape)
        pos, neg = objective.thresholds()
        return torch.where(self.side, *(torch.tensor(v, dtype=torch.float64) for v in (pos, neg)))

    def _coefficient(self, objective: ff.Objective, slope: Bounded) -> Bounded:
        """`c = 2 dLoss/dq` `[rows]`."""
        u = self.case.u
        if objective.goodness != "norm":
            factor = 2 / self.case.out_features if objective.goodness == "mean" else 2.0
            return Bounded(slope.value * factor, slope.error * factor + 3 * u * (slope.value * factor).abs())
        g = self.goodness
        least = g.value - g.error
        value = torch.where(g.value > 0, slope.value / g.value, 0.0)
        error = (slope.error + slope.value.abs() * g.error / g.value) / least + 3 * u * value.abs()
        # A goodness that may be nothing but rounding divides by anything; a row of zeros has none.
        doubtful = torch.where(g.value + g.error > 1e3 * _tiny(self.case), math.inf, 0.0)
        return Bounded(value, torch.where(least > 0, error, doubtful))

    def _gradients(self, made: Made) -> None:
        case, forward, c = self.case, self.forward, self.coefficient
        u, activation = case.u, case.options["activation"]
        z = forward.z.clone().requires_grad_()
        y = ACTIVATIONS[activation](z)
        (steep,) = torch.autograd.grad(y.sum(), z) if len(z) else (torch.zeros_like(z),)
        y, z = y.detach(), z.detach()
        gated = y * steep
        gated_error = 2 * forward.y.error + 16 * u * gated.abs()
        # [rows, out]: c y act'(z), what a row gives to the bias's gradient
        value = c.value[:, None] * gated
        error = (
            c.value.abs()[:, None] * gated_error
            + _product(c.error[:, None], gated.abs() + gated_error)
            + 4 * u * value.abs()
            + _tiny(case)
        )
        self.mean = None
        if made.peer_mean is not None:
            pull, pull_error = self._pull(made, steep, z)
            value, error = value + pull, error + pull_error + u * pull.abs()
        r, x = forward.r[:, None], forward.x
        dz, dz_error = value * r, _product(error, r) + (value * r).abs() * (forward.r_error + 2 * u)
        if case.compute == "float16":
            # dz is brought near one before it is rounded; small inputs are not.
            dz_error = dz_error + 2**-24 * (dz.abs().amax() if dz.numel() else 0.0)
        sizes = dz.abs().T @ x.abs()
        doubt = _matmul(dz_error.T, x.abs())
        least = case.least_operand * torch.maximum(dz.abs(), value.abs()).sum(0)[:, None]
        self.weight_gradient = Bounded(dz.T @ x, doubt + least + sizes * ((len(x) + 6) * u + 2.2 * case.u_operand))
        self.bias_gradient = Bounded(value, error).sum(0, u)

    def _pull(self, made: Made, steep: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """What peer normalisation adds to `dz / r` `[rows, out]`; sets `mean`."""
        peer, u = made.options["peer"], self.case.u
        assert made.peer_mean is not None
        before = made.peer_mean.double()
        rows = int(self.side.sum())
        if rows == 0:
            self.mean = Bounded(before, torch.zeros_like(before))
            return torch.zeros_like(z), torch.zeros_like(z)
        active = Bounded(self.forward.y.value[self.side], self.forward.y.error[self.side]).sum(0, u)
        m = peer.momentum
        moved = m * before + (1 - m) * active.value / rows
        error = (1 - m) * active.error / rows + 6 * u * (m * before.abs() + (1 - m) * active.value.abs() / rows)
        self.mean = Bounded(moved, error)
        away = moved - moved.mean()
        away_error = error + error.mean() + (len(moved) + 3) * u * moved.abs().mean() + 2 * u * moved.abs()
        factor = peer.strength / rows
        if peer.form == "loewex":
            factor *= 2 * (1 - m) / len(moved)
        mask = self.side.double()[:, None]
        gate = steep if peer.gated else torch.ones_like(z)
        gate_error = torch.zeros_like(z)
        if peer.gated:
            # Where rounding decides the sign of z, it decides the slope.
            gate_error = torch.where(z.abs() <= self.forward.z_error, 1.2, 16 * u + 1.2 * self.forward.z_error)
        value = factor * away * gate * mask
        return value, (factor * away_error * gate.abs() + factor * away.abs() * gate_error) * mask + 8 * u * value.abs()

    def _update(self, made: Made) -> None:
        """Parameters and state after the optimizer's own step, in float64, over all gradients within their bounds."""
        gradients = [self.weight_gradient] if made.bias is None else [self.weight_gradient, self.bias_gradient]
        parameters = [made.weight] if made.bias is None else [made.weight, made.bias]
        probes = [
            _stepped(made.optimizer, parameters, [g.value + share * g.error for g in gradients])
            for share in torch.linspace(-1, 1, PROBES).tolist()
        ]
        centre = probes[PROBES // 2]
        before = _tensors(made.optimizer, parameters)
        decay = max(made.optimizer.param_groups[0].get("weight_decay", 0.0), 0.0)
        self.after = {}
        for (name, i), value in centre.items():
            gradient, old = gradients[i], before.get((name, i), torch.zeros_like(value))
            error = torch.stack([(probe[name, i] - value).abs() for probe in probes]).amax(0)
            size = value.abs() + old.abs()
            if name != "step":
                pushed = gradient.value.abs() + decay * before["parameter", i].abs()
                if name == "parameter":
                    size = size + (value - old).abs()
                else:
                    size = size + pushed + pushed.square()
                # The probes are points: between two of them a step divided by a small root may go a little further.
                error = (1.5 * error).masked_fill(gradient.error.isinf(), math.inf)
            self.after[name, i] = Bounded(value, error + 16 * self.case.u * size + _tiny(self.case))

    def check(self, result: ff.StepResult, made: Made, step: int) -> None:
        where = f"step {step}: "
        _assert_within(where + "goodness", result.goodness, self.goodness)
        _assert_within(where + "loss", result.loss, self.loss)
        parameters = [made.weight] if made.bias is None else [made.weight, made.bias]
        for key, value in _tensors(made.optimizer, parameters).items():
            _assert_within(f"{where}{key[0]} of parameter {key[1]}", value, self.after[key])
        if self.mean is not None:
            _assert_within(where + "peer_mean", made.peer_mean, self.mean)
        outputs = self.case.options["outputs"]
        handed_on = Forward(self.case, made, made.weight.detach().double()) if outputs == "post" else self.forward
        if not handed_on.in_range():
            return
        if outputs == "pre" or self.case.u_operand == 0:
            _assert_within(where + "sumsq", result.sumsq, handed_on.q)
        else:
            # A fused step may hand on what the rounded weight gives.
            _assert_within(where + "sumsq", result.sumsq, Bounded(handed_on.q.value, 2 * handed_on.q.error))
        if outputs != "none":
            assert result.y is not None
            assert result.y.dtype == COMPUTE[self.case.compute]
            _assert_within(where + "y", result.y, handed_on.stored())


def _stepped(optimizer: Optimizer, parameters: list[Tensor], gradients: list[Tensor]) -> dict[tuple[str, int], Tensor]:
    """The caller's optimizer in float64, one step on: every tensor by name and parameter."""
    copies = [torch.nn.Parameter(p.detach().to(torch.float64, copy=True).contiguous()) for p in parameters]
    own = type(optimizer)(copies, lr=0.1)
    own.load_state_dict(deepcopy(optimizer.state_dict()))
    for group in own.param_groups:
        group["lr"] = float(group["lr"])
        group["foreach"] = group["fused"] = False
    for copy, gradient in zip(copies, gradients, strict=True):
        copy.grad = gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    own.step()
    return _tensors(own, copies)


def _tensors(optimizer: Optimizer, parameters: list[Tensor]) -> dict[tuple[str, int], Tensor]:
    found = {("parameter", i): p.detach() for i, p in enumerate(parameters)}
    for i, p in enumerate(parameters):
        found |= {(key, i): value for key, value in optimizer.state.get(p, {}).items() if isinstance(value, Tensor)}
    return {key: value.double() for key, value in found.items()}


def _product(a: Tensor, b: Tensor) -> Tensor:
    """`a b` of bounds: nothing times infinity is nothing."""
    return torch.where((a == 0) | (b == 0), 0.0, a * b)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of bounds, infinity wherever an infinite bound meets something."""
    endless = a.isinf()
    total = a.masked_fill(endless, 0) @ b
    return total.masked_fill(endless.double() @ (b != 0).double() > 0, math.inf) if endless.any() else total


def _assert_within(name: str, actual: Tensor | None, expected: Bounded) -> None:
    assert actual is not None
    assert actual.shape == expected.value.shape, f"{name} has shape {tuple(actual.shape)}"
    off = (actual.detach().double() - expected.value).abs()
    # A number comes in steps of the smallest one: none is nearer to the right one than half of that.
    kind = torch.finfo(actual.dtype)
    wrong = ~(off <= expected.error + kind.smallest_normal * kind.eps / 2) & ~expected.error.isinf()
    if wrong.any():
        at = tuple(int(i) for i in wrong.nonzero()[0])
        raise AssertionError(
            f"{name}{list(at)} is {float(actual[at])!r}; right: {float(expected.value[at])!r} within "
            f"{float(expected.error[at]):.3g} ({int(wrong.sum())} of {wrong.numel()} elements are wrong)"
        )
