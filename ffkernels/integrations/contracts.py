"""Code that is copied rather than installed, by its contract: classes to put in the place of the copied ones.

| copied from | its class | here |
|---|---|---|
| mohammadpz and mpezeshki/pytorch_forward_forward, pytorch/examples | `Layer` | `GreedyLayer` |
| FFPytorch | `FFLayer` | `InnerLoopLayer` |
| loeweX/Forward-Forward | `FF_model` | `OneLoopNetwork` |
| nebuly's forward_forward | `FFLayer` over `LinearReLU` | `SignedLayer` |

What a program has changed so that it cannot run here (a hook, an overridden method, a frozen parameter, another
activation) is obeyed: the step is then taken by autograd, as in the original, and one warning says why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from .. import functional
from ..normalisation import row_scale
from ..objectives import Objective
from ..peer import FIRST_MEAN, PeerNormalisation
from . import common

_MODULE_OF = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "gelu": nn.GELU, "silu": nn.SiLU, "identity": nn.Identity}


def _softplus(t: Tensor) -> Tensor:
    return torch.logaddexp(t, torch.zeros_like(t))


class _CopiedLayer(common.Accelerated, nn.Linear):
    """What the greedy and the inner-loop layer share: `y = act(x / (norm(x) + 1e-4) W^T + b)`, and steps on a batch."""

    METHOD: str  # the one that computes `y`, which a program may override
    opt: Optimizer
    threshold: float

    def _activities(self, x: Tensor) -> Tensor:
        # Only autograd passes a gradient on to the layer below.
        if common.differentiates(x) or not self._runs_here(self._reason()):
            z = torch.mm(x / (x.norm(2, 1, keepdim=True) + 1e-4), self.weight.t())
            act: Callable[[Tensor], Tensor] = getattr(self, self.PARTS[0])
            return act(z if self.bias is None else z + self.bias.unsqueeze(0))
        y, _ = functional.linear_forward(x, self.weight, self.bias, **self._options())
        return common.in_dtype_of(self.weight, y)

    def _learn(
        self, ours: type, x_pos: Tensor, x_neg: Tensor, count: int, log_interval: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """`count` steps on this batch, then the activities of both sides; without a graph unless by autograd."""
        reason = (
            self._reason()
            or common.overridden(self, ours, (self.METHOD,))
            or common.reason_against_step(self, self.opt)
            or ("x_pos or x_neg waits for a gradient" if common.any_waits(x_pos, x_neg) else None)
        )

        def log(step: int, loss: Tensor) -> None:
            if log_interval is not None and step % log_interval == 0:
                print("Loss: ", loss.item())

        forward = getattr(self, self.METHOD)
        if self._runs_here(reason):
            options = {**self._options(), "objective": Objective(threshold=self.threshold)}
            common.steps_on_batch(x_pos, x_neg, self, self.opt, range(count), options, log)
            with torch.no_grad():
                return forward(x_pos), forward(x_neg)
        for step in range(count):
            g_pos, g_neg = (forward(x).pow(2).mean(1) for x in (x_pos, x_neg))
            loss = _softplus(torch.cat([self.threshold - g_pos, g_neg - self.threshold])).mean()
            self.opt.zero_grad()
            # Rows that wait for a gradient may hang on a graph that every step goes through.
            loss.backward(retain_graph=common.any_waits(x_pos, x_neg))
            self.opt.step()
            log(step, loss)
        return forward(x_pos), forward(x_neg)


class GreedyLayer(_CopiedLayer):
    """`train(x_pos, x_neg) -> (h_pos, h_neg)`: steps of Adam on a fixed batch, then activities for the next layer.

    `y = relu(x / (norm(x) + 1e-4) W^T + b)`; the loss is the mean over all rows of `log(1 + e^(+-(mean y^2 - 2)))`.
    `relu`, `opt`, `threshold`, `num_epochs` and `log_interval` are attributes that may be replaced.

    Args:
        in_features, out_features, bias, device, dtype: as in `nn.Linear`, in the originals' order.
        lr: of the layer's own Adam, `opt`.
        threshold: of the goodness.
        num_epochs: steps of a call of `train`.
        log_interval: prints the loss of each step whose number is a multiple of it, as pytorch/examples does; or None.
        compute_dtype, backend: as in `ffkernels.linear_step_`.
    """

    LIBRARY = "pytorch_forward_forward"
    PARTS = ("relu", "threshold")
    METHOD = "forward"
    # Layers that the original has pickled lack it.
    log_interval: int | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        lr: float = 0.03,
        threshold: float = 2.0,
        num_epochs: int = 1000,
        log_interval: int | None = None,
        compute_dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        if log_interval is not None and (not isinstance(log_interval, int) or log_interval < 1):
            raise ValueError(f"log_interval={log_interval!r} is not an integer >= 1, or None")
        nn.Linear.__init__(self, in_features, out_features, bias, device, dtype)
        self.relu: Callable[[Tensor], Tensor] = nn.ReLU()
        self.opt = Adam(self.parameters(), lr=lr)
        self.threshold, self.num_epochs, self.log_interval = threshold, num_epochs, log_interval
        self.compute_dtype, self.backend = compute_dtype, backend

    def forward(self, x: Tensor) -> Tensor:
        """Activities `[rows, out]`; under autograd with a gradient to weight and bias, and to `x` if it wants one."""
        return self._activities(x)

    def train(self, x_pos: Any = True, x_neg: Any = None) -> Any:
        """`num_epochs` steps on rows `[rows, in]`, then the activities of both; given one bool, `nn.Module.train`.

        Returns:
            `(h_pos, h_neg)`, by the updated weights and detached.
        """
        if isinstance(x_pos, bool) and x_neg is None:
            return super().train(x_pos)
        h_pos, h_neg = self._learn(GreedyLayer, x_pos, x_neg, self.num_epochs, self.log_interval)
        return h_pos.detach(), h_neg.detach()


class InnerLoopLayer(_CopiedLayer):
    """`layer(x_pos, x_neg)` takes steps in training mode and gives both activities, `layer(x)` does in evaluation mode.

    `y = act(x / (norm(x) + 1e-4) W^T + b)` and the loss of `GreedyLayer`. `activation`, `opt`, `threshold` and
    `layer_iters` are attributes that may be replaced.

    Args:
        in_features, out_features: as in `nn.Linear`.
        activation: a module, its class, a function, or a name of `linear_step_`'s. FFPytorch's networks have
            `nn.GELU()`; the default of its layer, a class, cannot run there.
        optimizer: one that has or will be given the layer's parameters; None for Adam at 0.03.
        threshold: of the goodness.
        layer_iters: steps of a call in training mode.
        bias, device, dtype: as in `nn.Linear`.
        compute_dtype, backend: as in `ffkernels.linear_step_`.
    """

    LIBRARY = "FFPytorch"
    PARTS = ("activation", "threshold")
    METHOD = "forward_pass"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        activation: Any = nn.GELU,
        optimizer: Optimizer | None = None,
        threshold: float = 2.0,
        layer_iters: int = 10,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        compute_dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        activation = _MODULE_OF.get(activation, activation) if isinstance(activation, str) else activation
        activation = activation() if isinstance(activation, type) else activation
        if not callable(activation):
            raise TypeError(
                f"activation={activation!r} is not a module or function, nor one of {', '.join(map(repr, _MODULE_OF))}"
            )
        if isinstance(optimizer, type) or not (optimizer is None or callable(getattr(optimizer, "step", None))):
            raise TypeError(f"optimizer={optimizer!r} is not an optimizer; accepted: a torch.optim object, or None")
        nn.Linear.__init__(self, in_features, out_features, bias, device, dtype)
        self.activation = activation
        self.opt = Adam(self.parameters(), lr=0.03) if optimizer is None else optimizer
        self.threshold, self.layer_iters = threshold, layer_iters
        self.compute_dtype, self.backend = compute_dtype, backend

    def forward_pass(self, x: Tensor) -> Tensor:
        """Activities `[rows, out]`; under autograd with a gradient to weight and bias, and to `x` if it wants one."""
        return self._activities(x)

    def forward(self, *input: Tensor) -> Any:
        """`(h_pos, h_neg)` of two batches of rows, after the steps on them; `h` of one.

        After steps they are detached, unless the rows themselves wait for a gradient.
        """
        if len(input) != (2 if self.training else 1):
            raise TypeError(
                f"input is {len(input)} tensors; accepted: (x_pos, x_neg) in training mode, x in evaluation"
            )
        if not self.training:
            return self.forward_pass(*input)
        h = self._learn(InnerLoopLayer, input[0], input[1], self.layer_iters)
        return h if common.any_waits(*input) else tuple(each.detach() for each in h)


class WholeGradientReLU(torch.autograd.Function):
    """ReLU whose backward passes on the gradient of units that are off too, which peer normalisation pulls at."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class OneLoopNetwork(nn.Module):
    """All layers and a linear classifier in one loop, with peer normalisation and one optimizer.

    Rows are divided by their root mean square, the goodness is the sum of squares with the layer's width for threshold,
    the loss the mean over both sides' rows; layers hand on their activities before the update. The classifier sees the
    normalised activities of all layers but the first, under the neutral label.

    `model`, `linear_classifier`, `act_fn`, `ff_loss` and `classification_loss` are what they are in the original, and
    so are the names in `state_dict`; it has the running means besides, as buffers. States without them load too.

    Args:
        widths: of the input and of each layer: `[784, 1000, 1000, 1000]`.
        num_classes: of the classifier.
        peer: None for no peer normalisation.
        compute_dtype, backend: as in `ffkernels.linear_step_`.
        device, dtype: as in `nn.Linear`.
    """

    LIBRARY = "loeweX/Forward-Forward"

    def __init__(
        self,
        widths: Sequence[int],
        num_classes: int = 10,
        peer: PeerNormalisation | None = PeerNormalisation("loewex"),  # noqa: B008 (frozen)
        *,
        compute_dtype: torch.dtype | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.peer, self.compute_dtype, self.backend = peer, compute_dtype, backend
        self.opt: Any = None
        self.act_fn: Any = WholeGradientReLU
        self.model = nn.ModuleList(nn.Linear(a, b, **where) for a, b in pairwise(widths))
        self.ff_loss: nn.Module = nn.BCEWithLogitsLoss()
        for i, layer in enumerate(self.layers):
            self.register_buffer(f"running_mean_{i}", torch.full_like(layer.bias.detach(), FIRST_MEAN))
        self.linear_classifier = nn.Sequential(
            nn.Linear(sum(widths[2:] or widths[1:]), num_classes, bias=False, **where)
        )
        self.classification_loss: nn.Module = nn.CrossEntropyLoss()
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=1 / math.sqrt(layer.out_features))
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(cast("nn.Linear", self.linear_classifier[0]).weight)
        self.register_load_state_dict_pre_hook(_with_running_means)

    @classmethod
    def from_opt(cls, opt: Any, **options: Any) -> OneLoopNetwork:
        """The network of the original's configuration, which it keeps as `opt`.

        Read now: `opt.model.hidden_dim`, `opt.model.num_layers`, `opt.device`; at each step:
        `opt.model.peer_normalization`, `opt.model.momentum`. `options` are further ones of the class.
        """
        network = cls([784, *[opt.model.hidden_dim] * opt.model.num_layers], device=opt.device, **options)
        network.opt = opt
        return network

    @property
    def layers(self) -> list[nn.Linear]:
        """The linear layers of `model`."""
        return cast("list[nn.Linear]", list(self.model))

    @property
    def running_means(self) -> list[Tensor]:
        """The running mean activities `[out]` of each layer."""
        return [cast("Tensor", getattr(self, f"running_mean_{i}")) for i in range(len(self.model))]

    def forward(self, inputs: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The original's forward pass, written with autograd: `train_step` is what is fast.

        Returns:
            What `train_step` returns; "Loss" and its parts have a gradient.
        """
        z = self._normalise(torch.cat([inputs["pos_images"], inputs["neg_images"]]).flatten(1))
        n_pos, peer = len(inputs["pos_images"]), self._peer()
        is_positive = torch.arange(len(z), device=z.device) < n_pos
        found = {"Loss": z.new_zeros(1), "Peer Normalization": z.new_zeros(1)}
        for i, (layer, mean) in enumerate(zip(self.layers, self.running_means, strict=True)):
            z = F.relu(layer(z)) if peer is not None and peer.gated else self.act_fn.apply(layer(z))
            if peer is not None:
                moved = mean * peer.momentum + z[:n_pos].mean(0) * (1 - peer.momentum)
                self._log_peer(found, moved, peer)
                mean.copy_(moved.detach())
            logits = z.square().sum(1) - z.shape[1]
            found[f"loss_layer_{i}"] = self.ff_loss(logits, is_positive.to(z.dtype))
            found[f"ff_accuracy_layer_{i}"] = ((logits > 0) == is_positive).float().mean()
            found["Loss"] = found["Loss"] + found[f"loss_layer_{i}"]
            z = self._normalise(z.detach())
        return self.forward_downstream_classification_model(inputs, labels, found)

    def forward_downstream_classification_model(
        self,
        inputs: Mapping[str, Tensor],
        labels: Mapping[str, Tensor],
        scalar_outputs: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The classifier's part, after that of the layers where it is given: what validation calls.

        Returns:
            `scalar_outputs` with "classification_loss" added to its "Loss", and besides it, with
            "classification_accuracy".
        """
        found = {} if scalar_outputs is None else scalar_outputs
        output = self.linear_classifier(self._features(inputs["neutral_sample"].flatten(1)))
        classes = labels["class_labels"]
        loss = self.classification_loss(output, classes)
        found["Loss"] = found.get("Loss", torch.zeros_like(loss).view(1)) + loss
        found["classification_loss"] = loss
        found["classification_accuracy"] = (output.argmax(1) == classes).float().mean()
        return found

    def train_step(
        self, inputs: Mapping[str, Tensor], labels: Mapping[str, Tensor], optimizer: Optimizer
    ) -> dict[str, Tensor]:
        """What a loop does with a batch: forward, `zero_grad`, `backward` of the summed loss, `step`.

        Args:
            inputs: "pos_images", "neg_images" and "neutral_sample", each `[rows, ...]`.
            labels: "class_labels" `[rows]`.
            optimizer: holds all parameters, the classifier's perhaps in a group of its own.

        Returns:
            What the original logs, in its order and without a gradient: "Loss" and "Peer Normalization" `[1]`, and
            0-dim "loss_layer_0", "ff_accuracy_layer_0", ..., "classification_loss", "classification_accuracy".
        """
        if reason := self._reason(optimizer):
            common.warn_once(f"a network of {self.LIBRARY} runs on its original path: {reason}")
            optimizer.zero_grad()
            found = self(inputs, labels)
            found["Loss"].backward()
            optimizer.step()
            return {name: value.detach() for name, value in found.items()}
        classified = self.forward_downstream_classification_model(inputs, labels)
        found = self._step(inputs["pos_images"].flatten(1), inputs["neg_images"].flatten(1), optimizer)
        # What has its update already has no gradient left, so this moves the classifier alone.
        optimizer.zero_grad()
        classified["classification_loss"].backward()
        optimizer.step()
        found["Loss"] = found["Loss"] + classified.pop("Loss").detach()
        return found | {name: value.detach() for name, value in classified.items()}

    def _step(self, x_pos: Tensor, x_neg: Tensor, optimizer: Optimizer) -> dict[str, Tensor]:
        """A fused step of every layer, and what the original logs of it."""
        found = {name: self.running_means[0].new_zeros(1) for name in ("Loss", "Peer Normalization")}
        peer, sumsq, last = self._peer(), None, len(self.model) - 1
        for i, (layer, mean) in enumerate(zip(self.layers, self.running_means, strict=True)):
            result = functional.linear_step_(
                x_pos, x_neg, layer.weight, layer.bias, optimizer,
                objective=Objective(goodness="sum", threshold=float(layer.out_features)),
                outputs="none" if i == last else "pre", input_sumsq=sumsq,
                peer=peer, peer_mean=None if peer is None else mean, **self._options(),
            )  # fmt: skip
            if peer is not None:
                self._log_peer(found, mean, peer)
            right = torch.cat([result.goodness_pos > layer.out_features, result.goodness_neg <= layer.out_features])
            found |= {f"loss_layer_{i}": result.loss, f"ff_accuracy_layer_{i}": right.float().mean()}
            found["Loss"] = found["Loss"] + result.loss
            if result.pos is not None and result.neg is not None:
                x_pos, x_neg, sumsq = result.pos, result.neg, result.sumsq
        return found

    @torch.no_grad()
    def _features(self, x: Tensor) -> Tensor:
        """Normalised activities of all layers but the first, or of the only one, side by side."""
        features, sumsq, fused = [], None, self._reason() is None
        for layer in self.layers:
            if fused:
                x, sumsq = functional.linear_forward(x, layer.weight, layer.bias, input_sumsq=sumsq, **self._options())
                scale = row_scale(sumsq, layer.out_features, "rms", 1e-8, "add")
                features.append(x.to(scale.dtype) * scale.unsqueeze(1))
            else:
                x = self.act_fn.apply(layer(self._normalise(x)))
                features.append(self._normalise(x))
        return torch.cat(features[min(1, len(features) - 1) :], 1)

    def _options(self) -> dict[str, Any]:
        own = {"compute_dtype": self.compute_dtype, "backend": self.backend}
        return {"norm": "rms", "eps": 1e-8, "activation": "relu", **own}

    @staticmethod
    def _normalise(z: Tensor) -> Tensor:
        return z / (z.square().mean(1, keepdim=True).sqrt() + 1e-8)

    @staticmethod
    def _log_peer(found: dict[str, Tensor], mean: Tensor, peer: PeerNormalisation) -> None:
        of_layer = (mean - mean.mean()).square().mean()
        found["Peer Normalization"] = found["Peer Normalization"] + of_layer
        found["Loss"] = found["Loss"] + peer.strength * of_layer

    def _peer(self) -> PeerNormalisation | None:
        """Peer normalisation as it is now: what the configuration says goes."""
        if self.opt is None:
            return self.peer
        strength, momentum = self.opt.model.peer_normalization, self.opt.model.momentum
        if strength <= 0:
            return None
        return replace(self.peer or PeerNormalisation("loewex"), strength=strength, momentum=momentum)

    def _reason(self, optimizer: Optimizer | None = None) -> str | None:
        """Why its forward pass, or a step where an optimizer is given, cannot run here, or None."""
        for i, layer in enumerate(self.layers):
            why = common.reason_against(layer, F.relu, 0.0) or common.overridden(layer, nn.Linear, ("forward",))
            if why is None and common.watched(layer):
                why = "hooks watch it"
            if why is None and optimizer is not None:
                why = common.reason_against_step(layer, optimizer)
            if why is not None:
                return f"model[{i}]: {why}"
        if self.act_fn is not WholeGradientReLU:
            return f"act_fn is {self.act_fn!r}"
        if optimizer is None:
            return None
        loss = self.ff_loss
        plain = type(loss) is nn.BCEWithLogitsLoss and loss.reduction == "mean" and not common.watched(loss)
        if not plain or loss.weight is not None or loss.pos_weight is not None:
            return f"ff_loss is {loss!r}, or is watched"
        if common.watched(self):
            return "hooks watch it"
        if replaced := common.overridden(self, OneLoopNetwork, ("forward",)):
            return replaced
        trained = [p for p in self.linear_classifier.parameters() if p.requires_grad]
        return None if trained else "linear_classifier is frozen"


def _with_running_means(module: OneLoopNetwork, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Reads the names of this class's first version, and leaves means that a state lacks as the original does."""
    renamed = {"linear_classifier.weight": "linear_classifier.0.weight"}
    for i, mean in enumerate(module.running_means):
        renamed |= {f"layers.{i}.{name}": f"model.{i}.{name}" for name in ("weight", "bias")}
        renamed[f"layers.{i}.peer_mean"] = f"running_mean_{i}"
        state.setdefault(f"{prefix}running_mean_{i}", mean)
    for before, now in renamed.items():
        if f"{prefix}{before}" in state:
            state[f"{prefix}{now}"] = state.pop(f"{prefix}{before}")


class SignedLayer(nn.Module):
    """`ff_train(input, signs, theta)`: one step on rows of both sides in any order.

    The loss is the mean over positive rows of `log(1 + e^(theta - mean y^2))` plus the mean over negative ones of
    `log(1 + e^(mean y^2 - theta))`, the original's `alternative_loss_fn`. `layer` and `optimizer` are attributes.

    Args:
        layer: a module of a linear layer and an activation, one after the other, as nebuly's `LinearReLU`:
            `y = relu(W x + b)`. Any other runs by autograd.
        optimizer_name: of a class in `torch.optim`, which is made with `optimizer_kwargs`.
        loss_fn_name: "alternative_loss_fn"; the original's two others are not here.
        compute_dtype, backend: as in `ffkernels.linear_step_`.
    """

    LIBRARY = "nebuly's forward_forward"
    requires_training = True

    def __init__(
        self,
        layer: nn.Module,
        optimizer_name: str,
        optimizer_kwargs: Mapping[str, Any],
        loss_fn_name: str = "loss_fn",
        *,
        compute_dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(layer, nn.Module):
            raise TypeError(f"layer={layer!r} is not a module; accepted: LinearReLU(in_features, out_features)")
        made_by = getattr(torch.optim, str(optimizer_name), None)
        if made_by is None:
            raise ValueError(f"optimizer_name={optimizer_name!r} is not in torch.optim; accepted: 'Adam', 'SGD', ...")
        if loss_fn_name != "alternative_loss_fn":
            raise ValueError(f"loss_fn_name={loss_fn_name!r} is not here; accepted: 'alternative_loss_fn'")
        self.layer = layer
        self.optimizer: Optimizer = made_by(layer.parameters(), **optimizer_kwargs)
        self.compute_dtype, self.backend = compute_dtype, backend
        self._probed: tuple[type | None, bool] = (None, False)

    def forward(self, x: Tensor) -> Tensor:
        """Activities `[rows, out]`; under autograd with a gradient to weight and bias, and to `x` if it wants one."""
        linear, activation = self._parts()
        if common.differentiates(x) or not self._runs_here(self._reason()):
            return cast("Tensor", self.layer(x))
        options = self._options(activation)
        return common.in_dtype_of(linear.weight, functional.linear_forward(x, linear.weight, linear.bias, **options)[0])

    def ff_train(self, input_tensor: Tensor, signs: Tensor, theta: float) -> tuple[Tensor, list[float]]:
        """One step on rows `[rows, in]` with `signs` `[rows]` of 1 (positive) or -1.

        Returns:
            The activities `[rows, out]` before the update, and the mean of goodness minus theta over the positive and
            over the negative rows.
        """
        if not bool((signs.abs() == 1).all()):
            raise ValueError("signs holds values other than 1 and -1; accepted: 1 for positive rows, -1 for negative")
        x, is_positive = input_tensor.detach(), signs == 1
        if self._runs_here(self._reason(theta) or self._reason_against_step()):
            linear, activation = self._parts()
            self.optimizer.zero_grad()
            result = functional.linear_step_(
                x, None, linear.weight, linear.bias, self.optimizer, is_positive=is_positive, outputs="pre",
                objective=Objective(threshold=theta, reduction="sum_of_means"), **self._options(activation),
            )  # fmt: skip
            y, above = common.in_dtype_of(linear.weight, cast("Tensor", result.y)), result.goodness - theta
        else:
            y = self(x)
            above = y.square().mean(1) - theta
            loss = _softplus(-above[is_positive]).mean() + _softplus(above[~is_positive]).mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return y.detach(), [above[side].mean().item() for side in (is_positive, ~is_positive)]

    @torch.no_grad()
    def positive_eval(self, input_tensor: Tensor, theta: float) -> tuple[Tensor, Tensor]:
        """Activities `[rows, out]`, and goodness minus theta `[rows]`."""
        y = self(input_tensor)
        return y, y.square().mean(1) - theta

    def _parts(self) -> tuple[nn.Linear, Any]:
        """The linear layer and the activation; of another module, what stands there."""
        linear, activation = [*self.layer.children(), None, None][:2]
        return cast("nn.Linear", linear), activation

    def _options(self, activation: Any) -> dict[str, Any]:
        own = {"compute_dtype": self.compute_dtype, "backend": self.backend}
        return {"norm": "none", "activation": common.activation_name(activation), **own}

    def _reason(self, theta: float = 0.0) -> str | None:
        linear, activation = self._parts()
        if len(list(self.layer.children())) != 2 or type(linear) is not nn.Linear:
            return f"layer is a {type(self.layer).__name__}, not a linear layer and an activation"
        if common.watched(self.layer) or common.watched(linear):
            return "hooks watch its layer"
        replaced = common.overridden(linear, nn.Linear, ("forward",)) or (
            f"{type(self.layer).__name__}.forward is overridden" if "forward" in vars(self.layer) else None
        )
        reason = replaced or common.reason_against(linear, activation, theta)
        if reason is None and not self._is_plain(linear, activation):
            return f"{type(self.layer).__name__}'s forward is not its activation of its linear layer"
        return reason

    @torch.no_grad()
    def _is_plain(self, linear: nn.Linear, activation: Any) -> bool:
        """Whether `layer` computes what its two parts do one after the other, tried once on two rows."""
        if self._probed[0] is not type(self.layer):
            rows = torch.linspace(-1, 1, 2 * linear.in_features).to(linear.weight).view(2, -1)
            plain = torch.equal(self.layer(rows), activation(linear(rows)))
            self._probed = (type(self.layer), plain)
        return self._probed[1]

    def _reason_against_step(self) -> str | None:
        if common.watched(self):
            return "hooks watch it"
        replaced = common.overridden(self, SignedLayer, ("forward",))
        return replaced or common.reason_against_step(self._parts()[0], self.optimizer)

    def _runs_here(self, reason: str | None) -> bool:
        if reason is not None:
            common.warn_once(f"a layer of {self.LIBRARY} runs on its original path: {reason}")
        return reason is None
