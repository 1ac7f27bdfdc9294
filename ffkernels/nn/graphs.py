"""`FFNetwork.step` as one CUDA graph: captured for a batch shape, then replayed without the host launching anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import optim
from .. import validation as check
from ..functional import StepResult
from ..objectives import ProjectionHead, any_objective
from .layer import FFLinear, called_only
from .network import FFNetwork

Optimizers = Optimizer | Sequence[Optimizer | None] | None


class GraphedStep:
    """Replays `net.step(x_pos, x_neg, optimizers, **options)`; the same numbers as without the graph.

    The first call runs as it is, which lets the optimizers make their state and the kernels compile; the second one is
    captured. What a scheduler changes between calls is read from device tensors while the graph is replayed: the
    learning rate where it is a tensor, a tensor threshold, `sample_weight`, Adam's step count. Anything else that
    changes (a learning rate that is a number, another objective, state loaded into an optimizer) is noticed, and costs
    a new capture.

    Args:
        net: layers on one CUDA or ROCm device.
        optimizers: as in `FFNetwork.step`; SGD, Adam or AdamW, and Adam with `capturable=True`.
        x_pos, x_neg: a batch of the shape and dtype to capture; x_neg is None with `is_positive`.
        options: further arguments of `FFNetwork.step`; tensors among them are read again at every replay.

    Raises:
        TypeError, ValueError: for what a graph cannot replay.
    """

    def __init__(
        self, net: FFNetwork, optimizers: Optimizers, x_pos: Tensor, x_neg: Tensor | None, **options: Any
    ) -> None:
        if not isinstance(net, FFNetwork):
            raise TypeError(f"net is a {type(net).__name__}; accepted: an FFNetwork")
        self._per_layer = net._optimizers(optimizers)
        for i, optimizer in enumerate(self._per_layer):
            check.optimizer_object(optimizer, f"optimizers[{i}]")
        check.matrix("x_pos", x_pos)
        if x_neg is not None:
            check.matrix("x_neg", x_neg)
        if "objective" in options:
            options["objective"] = any_objective(options["objective"])
        self.net = net
        self.options = options
        self._check(x_pos)
        self._static = [None if x is None else torch.empty_like(x) for x in (x_pos, x_neg)]
        self._ran = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._captured: Any = None
        self._results: list[StepResult] = []

    def __call__(self, x_pos: Tensor, x_neg: Tensor | None) -> list[StepResult]:
        """One step on a batch of the captured shape. The results are overwritten by the next call.

        Raises:
            ValueError: for another shape, dtype or device than those of the example.
        """
        for name, static, x in zip(("x_pos", "x_neg"), self._static, (x_pos, x_neg), strict=True):
            _copy(name, static, x)
        if not self._ran:
            self._ran = True
            return self._step()
        known = self._fingerprint()
        if self._graph is None or known != self._captured:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._results = self._step()
            self._captured = known
        self._graph.replay()
        torch.autograd.graph.increment_version(self._written())
        return self._results

    def _step(self) -> list[StepResult]:
        x_pos, x_neg = self._static
        assert x_pos is not None
        return self.net.step(x_pos, x_neg, self._per_layer, **self.options)

    def _check(self, x_pos: Tensor) -> None:
        for name, device in (("x_pos", x_pos.device), ("net", next(self.net.parameters()).device)):
            if not _has_graphs(device):
                raise ValueError(f"{name} is on {device}; accepted: a CUDA or ROCm device, which alone has graphs")
        for i, (layer, optimizer) in enumerate(zip(self.net, self._per_layer, strict=True)):
            if not isinstance(layer, FFLinear):
                raise ValueError(
                    f"layers[{i}] is a {type(layer).__name__}, whose step the host leads; accepted: an FFLinear"
                )
            if called_only(layer):
                raise ValueError(
                    f"layers[{i}] is watched by hooks or overridden, which a replay does not call; "
                    "accepted: a plain FFLinear"
                )
            parameters = list(layer.parameters())
            rule, reason = optim.fused_rule(optimizer, *parameters)
            if rule == "grad":
                raise ValueError(
                    f"optimizers[{i}] cannot be replayed ({reason}); accepted: torch.optim.SGD, Adam, AdamW"
                )
            assert optimizer is not None
            if rule == "adam" and not all(g.get("capturable") or g.get("fused") for g in optimizer.param_groups):
                raise ValueError(
                    f"optimizers[{i}] has capturable=False; accepted: capturable=True, for the step count to be on the "
                    "device, where a replay can advance it"
                )
            if layer.batch_norm is not None and layer.batch_norm.momentum is None:
                raise ValueError(f"layers[{i}].batch_norm has momentum=None, which the host counts; accepted: a number")
            objective = self.options.get("objective", layer.objective)
            if isinstance(objective.threshold, Tensor) and objective.threshold.device.type == "cpu":
                raise ValueError(f"layers[{i}] has a threshold on cpu; accepted: a number, or a tensor on the device")
            if objective.paired and self.options.get("is_positive") is not None:
                raise ValueError(
                    f"layers[{i}] has loss={objective.loss!r} with is_positive, whose pairs the host sorts out; "
                    "accepted: x_pos and x_neg"
                )

    def _written(self) -> list[Tensor]:
        """Parameters, buffers and optimizer state, which a replay writes without the host's doing."""
        return [tensor for _, tensor in self._tensors()]

    def _tensors(self) -> list[tuple[Optimizer, Tensor]]:
        found = []
        for layer, optimizer in zip(self.net, self._per_layer, strict=True):
            assert optimizer is not None
            for parameter in (*layer.parameters(), *layer.buffers()):
                state = optimizer.state.get(parameter, {}).values()
                found += [(optimizer, t) for t in (parameter, *state) if isinstance(t, Tensor)]
        return found

    def _fingerprint(self) -> list[Any]:
        """Everything that a capture makes permanent: numbers by value, tensors by where they are."""
        groups = [
            {key: _key(value) for key, value in group.items() if key != "params"}
            for optimizer in {id(o): o for o in self._per_layer}.values()
            if optimizer is not None
            for group in optimizer.param_groups
        ]
        layers = [
            (layer.objective, layer.outputs, layer.peer, layer._options(), *_of_modules(layer))
            for layer in self.net
            if isinstance(layer, FFLinear)
        ]
        return [groups, layers, [_key(tensor) for _, tensor in self._tensors()]]


def _of_modules(layer: FFLinear) -> tuple[Any, ...]:
    """What a layer's head and batch normalisation make permanent."""
    head, norm = layer.objective, layer.batch_norm
    of_head = (
        (head.objective, head.weight.requires_grad)
        if isinstance(head, ProjectionHead) and head.weight is not None
        else ()
    )
    return of_head, () if norm is None else (norm.training, norm.momentum, norm.eps)


def _has_graphs(device: torch.device) -> bool:
    return device.type == "cuda"


def _key(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return float(value) if value.device.type == "cpu" and value.numel() == 1 else (value.data_ptr(), value.shape)


def _copy(name: str, static: Tensor | None, x: Tensor | None) -> None:
    if static is None or x is None:
        if static is not x:
            raise ValueError(f"{name} is {'missing' if x is None else 'there'}; accepted: as in the example")
        return
    check.tensor(name, x)
    if (x.shape, x.dtype, x.device) != (static.shape, static.dtype, static.device):
        raise ValueError(
            f"{name} is {x.dtype} {tuple(x.shape)} on {x.device}; accepted: {static.dtype} {tuple(static.shape)} on "
            f"{static.device}, as captured"
        )
    static.copy_(x)
