"""Data parallel: each process steps on its own rows, and all of them make the step that one would on the joint batch.

A loss is a sum over rows, each over a divisor that counts the rows of all processes. A process weighs its rows by the
share that its own divisor has in the joint one, so that gradients and losses of all processes add up to the joint
batch's. Layer by layer these sums are under way while the next layer runs, and then every process applies the same rule
of the same optimizer to the same gradient; or, with sharded optimizer state, to its own rows of it (`shards.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import functional, interrupts, optim, peer
from .. import validation as check
from ..backends.eager import rules
from ..backends.eager.layer import ACTIVATIONS
from ..compiling import never_compiled
from ..functional import StepResult
from ..functional.plan import others_of
from ..nn import FFConv2d, FFLinear, FFNetwork
from ..nn.layer import batch_norms, called_only, overridden
from ..nn.layerwise import Ready, take_step
from ..normalisation import row_scale, row_sumsq
from ..objectives import AnyObjective, GivenLoss, any_objective
from ..peer import PeerNormalisation
from . import processes
from .doubles import Double, of_no_rows, part_of
from .processes import ProcessLost, Reduction
from .shards import Place, Shards, check_optimizer, place_in, whole_state

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Layer = FFLinear | FFConv2d
OfGiven = Literal["mean", "sum"]


class DataParallel:
    """A network that several processes train together, each on its own rows of every minibatch.

    After a step weights and optimizer state are those of one process on the joint batch, up to the order in which
    numbers are summed, and bitwise the same on all processes. Gradients are reduced layer by layer: under the layers'
    `outputs="pre"` while the next layer runs; "post" waits for them, since it hands on what the updated weights make.
    Optimizers are the caller's own, one on each process, made and used alike.

    Rows may differ in number, and a process may have none. Batch normalisation goes by the statistics of a process's
    own rows, as under DistributedDataParallel, and its running statistics become the mean over processes, weighted by
    rows; or by those of all rows, with `sync_batch_norm`.

    Args:
        net: the same network on each process; it takes over the parameters and buffers of the first one.
        process_group: of `torch.distributed`; None: the default one.
        given_loss: what a `GivenLoss` or a function is of the rows it reads: their "mean", each process's then counting
            by its rows, or their "sum". Nothing else can be put together from losses of parts (a loss that compares
            rows, or divides by what it finds among them). None: such an objective is refused.
        sync_batch_norm: whether batch normalisation in train mode goes by the rows of all processes, as SyncBatchNorm
            does, for a few sums of one number a unit, which are waited for.
        shard_optimizer: whether a process runs the rule on its own rows of each parameter alone (output units,
            channels) and has their state alone, as ZeRO's first stage does; the weights stay whole on all. The
            optimizer is one that steps on each number by itself. Its `state_dict` then holds the state of these rows;
            `whole_optimizer_state_dict` puts it together.

    Raises:
        TypeError, ValueError: for a network that is wrapped or sharded, for layers that a step would call (hooks,
            overridden methods), for one that is frozen in part, and for a given loss of which nothing is said.
    """

    def __init__(
        self,
        net: FFNetwork,
        process_group: ProcessGroup | None = None,
        *,
        given_loss: OfGiven | None = None,
        sync_batch_norm: bool = False,
        shard_optimizer: bool = False,
    ) -> None:
        self.net = processes.checked_network(net)
        self._given_group = processes.checked_group(process_group)
        if given_loss is not None:
            check.one_of("given_loss", given_loss, get_args(OfGiven))
        check.boolean("sync_batch_norm", sync_batch_norm)
        check.boolean("shard_optimizer", shard_optimizer)
        self.given_loss, self.sync_batch_norm, self.shard_optimizer = given_loss, sync_batch_norm, shard_optimizer
        self._failed = False
        self._check_layers({})
        processes.check_same_network(net, self.process_group, [int(shard_optimizer)])
        processes.take_over((*net.parameters(), *net.buffers()), self.process_group)
        self._scatters = shard_optimizer and place_in(self.process_group, next(net.parameters())).scatters

    @property
    def process_group(self) -> Any:
        """The group of the processes. The default one is not held: it ends with `destroy_process_group()`."""
        return dist.group.WORLD if self._given_group is None else self._given_group

    @property
    def rank(self) -> int:
        """This process's place in the group, from 0."""
        return dist.get_rank(self.process_group)

    @property
    def size(self) -> int:
        """How many processes there are."""
        return dist.get_world_size(self.process_group)

    @property
    def _place(self) -> Place:
        return Place(self.process_group, self.rank, self.size, self._scatters)

    @torch.no_grad()
    def whole_optimizer_state_dict(self, optimizer: Optimizer, to: int | None = None) -> dict[str, Any]:
        """The `state_dict` of an optimizer whose state is sharded, put together on the CPU; all processes call it.

        It is what the optimizer would have without `shard_optimizer`. An optimizer that loads it goes on alone, under
        any number of processes, sharded or not: a sharded step takes its own rows of what it finds whole.

        Args:
            optimizer: one that `step` was given.
            to: the rank of the process that gets it, the others' is empty; None: all get it.
        """
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer is a {type(optimizer).__name__}; accepted: a torch.optim.Optimizer")
        if to is not None and (isinstance(to, bool) or not isinstance(to, int) or not 0 <= to < self.size):
            raise ValueError(f"to={to!r}; accepted: a rank from 0 to {self.size - 1}, or None")
        sharded = list(self.net.parameters()) if self.shard_optimizer else []
        return whole_state(optimizer, sharded, self._place, to)

    @never_compiled("a step of several processes waits for the others in its midst")
    @torch.no_grad()
    def step(
        self,
        x_pos: Tensor,
        x_neg: Tensor | None,
        optimizers: Optimizer | Sequence[Optimizer | None] | None,
        *,
        label_field: int | None = None,
        product: Tensor | None = None,
        keep: bool = False,
        **options: Any,
    ) -> list[StepResult]:
        """`FFNetwork.step` on the joint batch, of which these are the rows of this process; all call it alike.

        What a process refuses, all refuse before anything is written; on a device the others find out by the group's
        timeout. A failure later on (of memory, or of a given loss) leaves each layer all old or all new, and is the
        end: the processes are no longer at the same step.

        Returns:
            One result per layer: activities, sums and goodness of this process's rows, and the loss of all.

        Raises:
            ProcessLost: where another process does not answer, or a step has failed before.
        """
        shared = {"label_field": label_field, "product": product}
        with self._whole():
            return self._step(
                x_pos, x_neg, *self._ready(x_pos, x_neg, optimizers, options, keep, shared), options, keep
            )

    def _step(
        self,
        x_pos: Tensor,
        x_neg: Tensor | None,
        stepping: Stepping,
        ready: Ready,
        options: dict[str, Any],
        keep: bool,
    ) -> list[StepResult]:
        with self._alike(stepping):
            x_pos, x_neg = self.net._into(0, x_pos), None if x_neg is None else self.net._into(0, x_neg)
            results = self.net._climb(x_pos, x_neg, ready, options, keep=keep, take=stepping)
            losses = stepping.finish()
        return [replace(result, loss=loss) for result, loss in zip(results, losses, strict=True)]

    @torch.no_grad()
    def step_and_features(
        self,
        x_pos: Tensor,
        x_neg: Tensor,
        optimizers: Optimizer | Sequence[Optimizer | None] | None,
        num_classes: int = 10,
        **options: Any,
    ) -> tuple[list[StepResult], Tensor]:
        """`step`, and what `net.features(x_pos)` was before it."""
        with self._whole():
            # What is refused is so on all processes, before one of them begins.
            shared = {"label_field": None, "product": None}
            ready = self._ready(x_pos, x_neg, optimizers, options, False, shared)
            features = self.net.features(x_pos, num_classes=num_classes)
            return self._step(x_pos, x_neg, *ready, options, False), features

    @never_compiled("a step of several processes waits for the others in its midst")
    @torch.no_grad()
    def train_layerwise(
        self,
        x_pos: Tensor,
        x_neg: Tensor | None,
        optimizers: Optimizer | Sequence[Optimizer | None] | None,
        steps: int,
        **options: Any,
    ) -> list[Tensor]:
        """`FFNetwork.train_layerwise` on the joint batch, of which these are the rows of this process."""
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps={steps!r} is not an integer >= 1")
        with self._whole():
            stepping, ready = self._ready(x_pos, x_neg, optimizers, options, False, None)
            stepping.at_once = True
            with self._alike(stepping):
                return self.net._layer_by_layer(x_pos, x_neg, ready.optimizers, steps, options, stepping)

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Ctrl-C waits within, where synchronised batch normalisation goes by the rows of all processes."""
        if self._failed:
            raise ProcessLost(
                "a step has failed in its midst, since when the processes are no longer at the same step; accepted: to "
                "start again from a checkpoint"
            )
        held = interrupts.hold()
        norms = [norm for layer in self.net for norm in batch_norms(layer)] if self.sync_batch_norm else []
        try:
            for norm in norms:
                vars(norm)["together"] = self._sum
            yield
        finally:
            for norm in norms:
                vars(norm).pop("together", None)
            interrupts.release(held)

    @contextmanager
    def _alike(self, stepping: Stepping) -> Iterator[None]:
        """After a failure within this process has the layers that the others have too."""
        self._failed = True
        try:
            yield
        except ProcessLost:
            raise
        except Exception:
            # What is under way reaches all. Sharded rows would have to be sent once more, which the others do not
            # expect yet: these layers stay as they are on all.
            if not self.shard_optimizer:
                stepping.finish()
            raise
        self._failed = False

    def _sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, at once."""
        total = values.clone()
        with processes.others_answer():
            dist.all_reduce(total, group=self.process_group)
        return total

    def _ready(
        self,
        x_pos: Tensor,
        x_neg: Tensor | None,
        optimizers: Optimizer | Sequence[Optimizer | None] | None,
        options: dict[str, Any],
        keep: bool,
        shared: dict[str, Any] | None,
    ) -> tuple[Stepping, Ready]:
        """What a step needs of this process and of the others; raises on all where one cannot take it.

        shared: arguments of the first layer alone; None: of steps layer by layer.
        """
        refused: Exception | None = None
        counts = next(self.net.parameters()).new_zeros(3, dtype=torch.int64)
        ready = None
        try:
            ready = self._checked(x_pos, x_neg, optimizers, options, keep, shared)
            is_positive = options.get("is_positive")
            if is_positive is not None:
                counts[0], counts[1] = is_positive.sum(), (~is_positive).sum()
            else:
                counts[0], counts[1] = len(x_pos), 0 if x_neg is None else len(x_neg)
        except Exception as error:
            refused = error
            counts[2] = 1
        own = counts.clone()
        with processes.others_answer():
            dist.all_reduce(counts, group=self.process_group)
        if refused is not None:
            raise refused
        if counts.device.type == "cpu" and counts[2]:
            raise ValueError("another process refused what its step was given, and says why; nothing was changed")
        assert ready is not None
        return Stepping(self, Counts(own, counts)), ready

    def _checked(
        self,
        x_pos: Tensor,
        x_neg: Tensor | None,
        optimizers: Optimizer | Sequence[Optimizer | None] | None,
        options: dict[str, Any],
        keep: bool,
        shared: dict[str, Any] | None,
    ) -> Ready:
        if torch.is_inference_mode_enabled():
            raise ValueError("DataParallel was called in inference mode; accepted: a step outside of it")
        net = self.net
        self._check_layers(options)
        # A whole parameter and the state of some of its rows do not fit each other: these are checked by themselves.
        of_layers = None if self.shard_optimizer else optimizers
        if shared is None:
            ready = net._ready_layerwise(x_pos, x_neg, of_layers, options)
        else:
            ready = net._ready(x_pos, x_neg, of_layers, options, keep=keep, **shared)
        check.tensor("x_pos", x_pos)
        if x_neg is not None:
            check.tensor("x_neg", x_neg)
        x_pos, x_neg = net._into(0, x_pos), None if x_neg is None else net._into(0, x_neg)
        of_first = {"outputs": ready.outputs[0], "only_checks": True, **ready.shared, **options}
        take_step(next(iter(net)), x_pos, x_neg, ready.optimizers[0], **of_first)
        if not self.shard_optimizer:
            return ready
        ready = ready._replace(optimizers=net._optimizers(optimizers))
        for i, (layer, optimizer) in enumerate(zip(net, ready.optimizers, strict=True)):
            if optimizer is not None and layer.weight.requires_grad:
                of_step = {**layer._step_options(), **options}
                others = any_objective(of_step["objective"]), of_step.get("batch_norm"), of_step.get("input_norm")
                try:
                    check_optimizer(optimizer, _learning(layer, others_of(*others)), self._place)
                except (TypeError, ValueError) as error:
                    raise type(error)(f"net.layers[{i}]: {error}") from None
        return ready

    def _check_layers(self, options: dict[str, Any]) -> None:
        """Raises for layers whose step is no sum over rows that could be put together."""
        for i, layer in enumerate(self.net):
            if called_only(layer) or overridden(layer, "step"):
                raise ValueError(
                    f"net.layers[{i}] is watched by hooks or overridden, so that only a call of it knows its step; "
                    "accepted: plain layers, or one process"
                )
            learns = {p.requires_grad for p in layer.parameters()}
            if len(learns) > 1:
                raise ValueError(
                    f"net.layers[{i}] is frozen in part; accepted: layers whose parameters all learn, or none"
                )
            for name, module in layer.named_children():
                if isinstance(module, nn.SyncBatchNorm):
                    raise TypeError(
                        f"net.layers[{i}].{name} is a SyncBatchNorm; accepted: a BatchNorm, and sync_batch_norm=True"
                    )
            if isinstance(any_objective(options.get("objective", layer.objective)), GivenLoss) and not self.given_loss:
                raise ValueError(
                    f"net.layers[{i}].objective is a loss of your own, of which DataParallel cannot know how it is put "
                    "together from those of each process's rows; accepted: given_loss='mean' for a mean over rows, "
                    "'sum' for a sum"
                )


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

    `at_once`: whether each waits for its sums; else they are under way until `finish`.
    """

    def __init__(self, parallel: DataParallel, counts: Counts) -> None:
        self.parallel, self.counts = parallel, counts
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
            share = self.counts.share(slice(0, 2), weight.dtype) if self.parallel.given_loss == "mean" else None
            options["objective"] = part_of(objective, share) if rows else of_no_rows(objective)
        learns = any(p.requires_grad for p in layer.parameters())
        norms = [options.get(name) for name in ("batch_norm", "input_norm", "product_norm")]
        others = (options["objective"], *norms)
        double = Double(layer, *others)
        of_peer, peer_mean = options.get("peer"), options.get("peer_mean")
        is_sharded = self.parallel.shard_optimizer and learns and optimizer is not None
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
            shards = Shards(_learning(layer, others_of(*others)), gradients, self.parallel._place)
            gradients = {}
        small = [gradient for name, gradient in gradients.items() if name != "weight"]
        small += [found for _, found in moved] + ([] if pulled is None else [pulled.activity, pulled.scaled_input])
        large = [gradients["weight"]] if gradients else []
        reduction = Reduction(large, [result.loss, *small], self.parallel.process_group)
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
        mean, pull = self._mean_and_pull(pulled._replace(activity=self.parallel._sum(pulled.activity)))
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


def _learning(layer: Layer, others: dict[str, Tensor]) -> dict[str, Tensor]:
    """What learns in a layer, by the names of `linear_step_` and `conv2d_step_`, in `optim.plan`'s order."""
    return {"weight": layer.weight, **({} if layer.bias is None else {"bias": layer.bias}), **others}


def _forward(layer: FFLinear, x_pos: Tensor, x_neg: Tensor | None, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Activities of the joint batch with the layer's present weights, and their sums of squares."""
    own = {key: options[key] for key in ("norm", "eps", "eps_mode", "activation", "compute_dtype", "backend")}
    x = x_pos if x_neg is None else torch.cat([x_pos, x_neg])
    weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
    return functional.linear_forward(x, weight, bias, input_sumsq=options.get("input_sumsq"), **own)
