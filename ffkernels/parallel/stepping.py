"""The steps of a network's layers that several processes take together, and the sums of them that are under way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import functional, optim, peer
from ..backends.eager import rules
from ..backends.eager.layer import ACTIVATIONS
from ..functional import StepResult
from ..functional.plan import others_of
from ..nn import FFConv2d, FFLinear
from ..normalisation import row_scale, row_sumsq
from ..objectives import AnyObjective, GivenLoss, any_objective
from ..peer import PeerNormalisation
from .doubles import Double, of_no_rows, part_of
from .processes import Reduction, sum_of
from .shards import Place, Shards

Layer = FFLinear | FFConv2d
OfGiven = Literal["mean", "sum"]


class Counts(NamedTuple):
    """`[positive, negative, refused]` of this process, and of all."""

    own: Tensor
    joint: Tensor

    def share(self, side: slice, dtype: torch.dtype) -> Tensor:
        """0-dim: how much of the joint batch's rows of these sides this process has."""
        own, joint = (counts[side].sum().to(dtype) for counts in self)
        return own / joint.clamp(min=1)

    def weights(self, objective: AnyObjective, rows: int, options: dict[str, Any], like: Tensor) -> Tensor | None:
        """What the rows' (or pairs') losses are multiplied by, so that a process's own divisor becomes the joint one.

        A given loss takes no weights: None.
        """
        pos, neg, both = slice(0, 1), slice(1, 2), slice(0, 2)
        is_positive, given = options.get("is_positive"), options.get("sample_weight")
        if isinstance(objective, GivenLoss):
            return None
        if objective.paired:
            weights = self.share(pos, like.dtype).expand(rows // 2)
        elif objective.classes is not None or objective.reduction == "mean":
            weights = self.share(both, like.dtype).expand(rows)
        else:
            of_pos, of_neg = (self.share(side, like.dtype) for side in (pos, neg))
            if is_positive is None:
                is_positive = torch.arange(rows, device=like.device) < options["n_pos"]
            weights = torch.where(is_positive, of_pos, of_neg)
        return weights.contiguous() if given is None else weights * given


class Pulled(NamedTuple):
    """Peer normalisation of a step: sums `[out]` of the activities of positive rows, and `[in]` of their input.

    `mean`: the new running one where it is there already, its pull in the gradient.
    """

    of: PeerNormalisation
    running: Tensor
    activity: Tensor
    scaled_input: Tensor
    mean: Tensor | None = None


class Job(NamedTuple):
    """A layer's step whose sums are under way.

    Attributes:
        update: None where nothing learns, or where the rule runs on `shards`.
        gradients: by the names of what learns; the weight's is summed in place, the others follow the loss.
        moved: running statistics that the step moves, and this process's weighted part of what they become.
        shards: what learns, where a process updates its own rows alone.
    """

    layer: Layer
    optimizer: Optimizer | None
    update: optim.Plan | None
    gradients: dict[str, Tensor]
    moved: list[tuple[Tensor, Tensor]]
    counted: list[Tensor]
    pulled: Pulled | None
    reduction: Reduction
    shards: Shards | None


class Stepping:
    """The steps of a network's layers on one minibatch: `nn.layerwise.Take`.

    Args:
        place: this process's among the others.
        counts: the rows of the minibatch.
        of_given: what a given loss is of its rows.
        sharded: whether a process updates its own rows of the parameters alone.

    `at_once`: whether each waits for its sums; else they are under way until `finish`.
    """

    def __init__(self, place: Place, counts: Counts, of_given: OfGiven | None, sharded: bool) -> None:
        self.place, self.counts, self.of_given, self.sharded = place, counts, of_given, sharded
        self.jobs: list[Job] = []
        self.gathering: list[Shards] = []
        self.losses: list[Tensor] = []
        self.at_once = False

    def finish(self) -> list[Tensor]:
        """Waits for what is under way and updates the layers; the losses of all layers since the last `finish`."""
        self._wait()
        losses, self.losses = self.losses, []
        return losses

    def __call__(
        self, layer: Layer, x_pos: Tensor, x_neg: Tensor | None, optimizer: Optimizer | None, **options: Any
    ) -> StepResult:
        options = {**layer._step_options(), **options}
        objective = options["objective"] = any_objective(options["objective"])
        rows, weight, outputs = len(x_pos) + (0 if x_neg is None else len(x_neg)), layer.weight, options["outputs"]
        of_rows = {**options, "n_pos": len(x_pos)}
        options["sample_weight"] = self.counts.weights(objective, rows, of_rows, weight)
        if isinstance(objective, GivenLoss):
            share = self.counts.share(slice(0, 2), weight.dtype) if self.of_given == "mean" else None
            options["objective"] = part_of(objective, share) if rows else of_no_rows(objective)
        learns = any(p.requires_grad for p in layer.parameters())
        norms = [options.get(name) for name in ("batch_norm", "input_norm", "product_norm")]
        others = (options["objective"], *norms)
        double = Double(layer, *others)
        of_peer, peer_mean = options.get("peer"), options.get("peer_mean")
        is_sharded = self.sharded and learns and optimizer is not None
        update = None
        if learns:
            if of_peer is not None:
                options |= {"peer": None, "peer_mean": None}
            if of_peer is not None or outputs == "post":
                options["outputs"] = "pre" if of_peer is not None else "none"
            options |= {name: getattr(double, name) for name in double.modules if name in options}
            if not is_sharded:
                update = optim.plan(optimizer, weight, layer.bias, others_of(*others))
            step = functional.conv2d_step_ if isinstance(layer, FFConv2d) else functional.linear_step_
            result = step(x_pos, x_neg, double.weight, double.bias, None, **options)
        else:
            with double.moves_instead():
                result = layer._hand_on(x_pos, x_neg, None, **options)
        gradients = double.gradients() if learns else {}
        pulled = None
        if learns and of_peer is not None and peer_mean is not None:
            assert isinstance(layer, FFLinear)
            pulled = self._pulled(layer, x_pos, x_neg, result, of_peer, peer_mean, gradients, options)
        share = self.counts.share(slice(0, 2), weight.dtype)
        moved = [(into, found * share) for into, found in double.moved()]
        shards = None
        if is_sharded:
            shards = Shards(learning(layer, others_of(*others)), gradients, self.place)
            gradients = {}
        small = [gradient for name, gradient in gradients.items() if name != "weight"]
        small += [found for _, found in moved] + ([] if pulled is None else [pulled.activity, pulled.scaled_input])
        large = [gradients["weight"]] if gradients else []
        reduction = Reduction(large, [result.loss, *small], self.place.group)
        counted = double.counted()
        self.jobs.append(Job(layer, optimizer, update, gradients, moved, counted, pulled, reduction, shards))
        if learns and outputs == "post":
            self._wait()
            assert isinstance(layer, FFLinear)
            y, sumsq = _forward(layer, x_pos, x_neg, options)
            return replace(result, y=y, sumsq=sumsq, loss=self.losses[-1])
        if self.at_once:
            self._wait()
            return replace(result, loss=self.losses[-1])
        return replace(result, y=None) if outputs == "none" else result

    def _wait(self) -> None:
        while self.jobs:
            self.losses.append(self._apply(self.jobs.pop(0)))
        while self.gathering:
            self.gathering.pop(0).finish()

    def _pulled(
        self,
        layer: FFLinear,
        x_pos: Tensor,
        x_neg: Tensor | None,
        result: StepResult,
        of_peer: PeerNormalisation,
        running: Tensor,
        gradients: dict[str, Tensor],
        options: dict[str, Any],
    ) -> Pulled:
        """What peer normalisation sums over positive rows.

        Gated, its pull is found at once, since a product hangs on it: `dW += diag(p) act'(z)^T (r x)`.
        """
        dtype = layer.weight.dtype
        x = x_pos if x_neg is None else torch.cat([x_pos, x_neg])
        known = options.get("input_sumsq")
        assert result.y is not None
        y = result.sides(result.y)[0].to(dtype)
        x = result.sides(x)[0].to(dtype)
        if options["norm"] != "none":
            sumsq = row_sumsq(x, dtype) if known is None else result.sides(known)[0]
            x = x * row_scale(sumsq, x.shape[1], options["norm"], options["eps"], options["eps_mode"]).unsqueeze(1)
        pulled = Pulled(of_peer, running, y.sum(0), x.sum(0))
        if not of_peer.gated:
            return pulled
        mean, pull = self._mean_and_pull(pulled._replace(activity=sum_of(pulled.activity, self.place.group)))
        name = options["activation"]
        if ACTIVATIONS[name].keeps_z:
            own = {key: options[key] for key in ("eps", "eps_mode", "compute_dtype", "backend")}
            bias = None if layer.bias is None else layer.bias.detach()
            sides = result.sides(x_pos if x_neg is None else torch.cat([x_pos, x_neg]))
            z, _ = functional.linear_forward(
                sides[0], layer.weight.detach(), bias, norm=options["norm"], activation="identity", **own
            )
            z = z.to(dtype)
        else:
            z = y
        gate = ACTIVATIONS[name].slope(y, z)
        gradients["weight"].add_(pull.unsqueeze(1) * (gate.t() @ x))
        if "bias" in gradients:
            gradients["bias"].add_(pull * gate.sum(0))
        return pulled._replace(mean=mean)

    def _mean_and_pull(self, pulled: Pulled) -> tuple[Tensor, Tensor]:
        """The new running mean, and the pull on each unit, from the sums over all processes."""
        count = self.counts.joint[0].to(pulled.activity.dtype)
        mean = peer.moved_mean(pulled.running, pulled.activity, count, float(pulled.of.momentum))
        return mean, peer.pull_of(mean, pulled.of.pull_strength(len(mean)), count)

    def _apply(self, job: Job) -> Tensor:
        """Waits for the sums of a layer, updates it, and returns its loss on all rows."""
        loss, *small = job.reduction.wait()
        gradients = dict(job.gradients)
        rows = slice(None)
        for name in [name for name in gradients if name != "weight"]:
            gradients[name] = small.pop(0)
        if job.shards is not None:
            gradients, rows = job.shards.gradients(), job.shards.rows["weight"]
        moved = [(into, small.pop(0)) for into, _ in job.moved]
        mean = None
        if job.pulled is not None:
            pulled = job.pulled._replace(activity=small[0], scaled_input=small[1])
            mean = pulled.mean
            if mean is None:
                mean, pull = self._mean_and_pull(pulled)
                gradients["weight"].addr_(pull[rows], pulled.scaled_input)
                if "bias" in gradients:
                    gradients["bias"].add_(pull[rows] * self.counts.joint[0].to(pull.dtype))
        if job.update is not None:
            for gradient, part in zip(gradients.values(), job.update.parts, strict=True):
                rules.step(job.update.rule, part.parameter, gradient, part.slot)
            torch.autograd.graph.increment_version(job.update.written())
            job.update.finish(job.optimizer)
        # Of no rows at all there are no statistics.
        any_rows = self.counts.joint[:2].sum() > 0
        beside = [(into, torch.where(any_rows, found, into)) for into, found in moved]
        beside += [(count, count + any_rows.to(count.dtype)) for count in job.counted]
        if mean is not None and job.pulled is not None:
            beside.append((job.pulled.running, mean))
        if job.shards is not None and job.optimizer is not None:
            job.shards.update(job.optimizer, gradients, beside)
            self.gathering.append(job.shards)
            return loss
        for into, found in beside:
            into.copy_(found)
        return loss


def learning(layer: Layer, others: dict[str, Tensor]) -> dict[str, Tensor]:
    """What learns in a layer, by the names of `linear_step_` and `conv2d_step_`, in `optim.plan`'s order."""
    return {"weight": layer.weight, **({} if layer.bias is None else {"bias": layer.bias}), **others}


def _forward(layer: FFLinear, x_pos: Tensor, x_neg: Tensor | None, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Activities of the joint batch with the layer's present weights, and their sums of squares."""
    own = {key: options[key] for key in ("norm", "eps", "eps_mode", "activation", "compute_dtype", "backend")}
    x = x_pos if x_neg is None else torch.cat([x_pos, x_neg])
    weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
    return functional.linear_forward(x, weight, bias, input_sumsq=options.get("input_sumsq"), **own)
