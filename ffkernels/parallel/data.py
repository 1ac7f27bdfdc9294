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
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import interrupts
from .. import validation as check
from ..compiling import never_compiled
from ..functional import StepResult
from ..functional.plan import others_of
from ..nn import FFNetwork
from ..nn.layer import batch_norms, called_only, overridden
from ..nn.layerwise import Ready, take_step
from ..objectives import GivenLoss, any_objective
from . import processes
from .processes import ProcessLost
from .shards import Place, check_optimizer, place_in, whole_state
from .stepping import Counts, OfGiven, Stepping, learning

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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
                vars(norm)["together"] = partial(processes.sum_of, group=self.process_group)
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
        return Stepping(self._place, Counts(own, counts), self.given_loss, self.shard_optimizer), ready

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
                    check_optimizer(optimizer, learning(layer, others_of(*others)), self._place)
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
