"""Code that is copied rather than installed, by its contract: classes to put in the place of the copied ones.

| copied from | its class | here |
|---|---|---|
| mohammadpz and mpezeshki/pytorch_forward_forward, pytorch/examples | `Layer` | `GreedyLayer` |
| FFPytorch | `FFLayer` | `InnerLoopLayer` |
| loeweX/Forward-Forward | `FF_model` | `OneLoopNetwork` |
| nebuly's forward_forward | `FFNormalization` and `FFLayer` over `LinearReLU` | `SignedLayer` |
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from ..functional import StepResult
from ..nn import FFLinear, FFNetwork
from ..objective import Objective
from ..peer import PeerNormalisation
from . import common


class GreedyLayer(FFLinear):
    """`train(x_pos, x_neg) -> (h_pos, h_neg)`: steps of Adam on a fixed batch, then activities for the next layer.

    `y = act(x / (norm(x) + 1e-4) W^T + b)`; the loss is the mean over all rows of `log(1 + e^(+-(mean y^2 - 2)))`.

    Args:
        in_features, out_features, bias, device, dtype: as in `nn.Linear`, in the originals' order.
        lr: of the layer's own Adam, `opt`, which a program may replace.
        threshold: of the goodness; like `num_epochs`, an attribute that may be changed.
        num_epochs: steps of a call of `train`.
        activation, compute_dtype, backend: as in `ffkernels.linear_step_`.
    """

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
        activation: str = "relu",
        compute_dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            in_features, out_features, bias, activation=activation, compute_dtype=compute_dtype, backend=backend,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.threshold, self.num_epochs = threshold, num_epochs
        self.opt: Optimizer = Adam(self.parameters(), lr=lr)

    def train(self, x_pos: Any = True, x_neg: Any = None) -> Any:
        """`num_epochs` steps on rows `[rows, in]`, then the activities of both; given one bool, `nn.Module.train`.

        Returns:
            `(h_pos, h_neg)`, by the updated weights and detached.
        """
        if isinstance(x_pos, bool) and x_neg is None:
            return super().train(x_pos)
        options = {**self._options(), "objective": Objective(threshold=self.threshold)}
        common.steps_on_batch(x_pos, x_neg, self, self.opt, range(self.num_epochs), options)
        with torch.no_grad():
            return self.activity(x_pos)[0], self.activity(x_neg)[0]


class InnerLoopLayer(GreedyLayer):
    """`layer(x_pos, x_neg)` is `GreedyLayer.train` in training mode, `layer(x)` the activities in evaluation mode.

    With GELU and ten steps a batch, as FFPytorch's network has it; its layers one after the other take ten steps each.
    """

    def __init__(self, *args: Any, num_epochs: int = 10, activation: str = "gelu", **options: Any) -> None:
        super().__init__(*args, num_epochs=num_epochs, activation=activation, **options)

    def forward(self, *input: Tensor) -> Any:
        """`(h_pos, h_neg)` of two batches of rows, after the steps on them; `h` of one."""
        if len(input) != (2 if self.training else 1):
            raise TypeError(
                f"input is {len(input)} tensors; accepted: (x_pos, x_neg) in training mode, x in evaluation"
            )
        return self.train(*input) if self.training else super().forward(*input)


class OneLoopNetwork(FFNetwork):
    """All layers and a linear classifier in one loop, with peer normalisation and one optimizer.

    Rows are divided by their root mean square, the goodness is the sum of squares with the layer's width for threshold,
    the loss the mean over both sides' rows; layers hand on their activities before the update. The classifier sees the
    normalised activities of all layers but the first, under the neutral label.

    Args:
        widths: of the input and of each layer: `[784, 1000, 1000, 1000]`.
        num_classes: of the classifier, and columns of the label field.
        peer: None for no peer normalisation.
        compute_dtype, backend, device, dtype: as in `ffkernels.FFLinear`.
    """

    def __init__(
        self,
        widths: Sequence[int],
        num_classes: int = 10,
        peer: PeerNormalisation | None = PeerNormalisation("loewex"),  # noqa: B008 (frozen)
        **options: Any,
    ) -> None:
        super().__init__(
            FFLinear(
                a, b, norm="rms", eps=1e-8, outputs="pre", peer=peer,
                objective=Objective(goodness="sum", threshold=float(b)), **options,
            )
            for a, b in pairwise(widths)
        )  # fmt: skip
        where = {key: options.get(key) for key in ("device", "dtype")}
        self.num_classes = num_classes
        self.linear_classifier = nn.Linear(sum(widths[2:] or widths[1:]), num_classes, bias=False, **where)
        nn.init.zeros_(self.linear_classifier.weight)
        for layer in self:
            nn.init.normal_(layer.weight, std=1 / math.sqrt(layer.out_features))
            nn.init.zeros_(layer.bias)

    def train_step(
        self, inputs: Mapping[str, Tensor], labels: Mapping[str, Tensor], optimizer: Optimizer
    ) -> dict[str, Tensor]:
        """What a loop does with a batch: forward, `zero_grad`, `backward` of the summed loss, `step`.

        Args:
            inputs: "pos_images", "neg_images" and "neutral_sample", each `[rows, ...]`.
            labels: "class_labels" `[rows]`.
            optimizer: holds all parameters, the classifier's perhaps in a group of its own.

        Returns:
            What the original logs, as 0-dim tensors: "Loss", "Peer Normalization", "loss_layer_0", ...,
            "ff_accuracy_layer_0", ..., "classification_loss", "classification_accuracy".
        """
        x_pos, x_neg, neutral = (inputs[key].flatten(1) for key in ("pos_images", "neg_images", "neutral_sample"))
        logits = self.linear_classifier(self.features(neutral, num_classes=self.num_classes))
        classes = labels["class_labels"]
        classification_loss = F.cross_entropy(logits, classes)
        results = self.step(x_pos, x_neg, optimizer)
        # What has its update already has no gradient left, so this moves the classifier alone.
        optimizer.zero_grad()
        classification_loss.backward()
        optimizer.step()
        with torch.no_grad():
            return self._log(results, classification_loss, (logits.argmax(1) == classes).float().mean())

    def _log(self, results: list[StepResult], loss: Tensor, accuracy: Tensor) -> dict[str, Tensor]:
        found = {"classification_loss": loss.detach(), "classification_accuracy": accuracy}
        total, spread = found["classification_loss"], torch.zeros_like(loss)
        for i, (layer, result) in enumerate(zip(self, results, strict=True)):
            right = torch.cat([result.goodness_pos > layer.out_features, result.goodness_neg <= layer.out_features])
            found |= {f"loss_layer_{i}": result.loss, f"ff_accuracy_layer_{i}": right.float().mean()}
            total = total + result.loss
            if layer.peer is not None and layer.peer_mean is not None:
                of_layer = (layer.peer_mean - layer.peer_mean.mean()).square().mean()
                spread, total = spread + of_layer, total + layer.peer.strength * of_layer
        return {"Loss": total, "Peer Normalization": spread, **found}


class SignedLayer(FFLinear):
    """`ff_train(input, signs, theta)`: one step on rows of both sides in any order.

    `y = relu(x / (norm(x) + 1e-8) W^T + b)`; the loss is the mean over positive rows of `log(1 + e^(theta - mean y^2))`
    plus the mean over negative ones of `log(1 + e^(mean y^2 - theta))` (the original's `alternative_loss_fn`).

    Args:
        in_features, out_features: as in `nn.Linear`.
        optimizer_name: of a class in `torch.optim`, which is made with `optimizer_kwargs` and kept as `optimizer`.
        options: further ones of `ffkernels.FFLinear`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        optimizer_name: str = "Adam",
        optimizer_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(in_features, out_features, eps=1e-8, outputs="pre", **options)
        made_by = getattr(torch.optim, optimizer_name, None)
        if made_by is None:
            raise ValueError(f"optimizer_name={optimizer_name!r} is not in torch.optim; accepted: 'Adam', 'SGD', ...")
        self.optimizer: Optimizer = made_by(
            self.parameters(), **({"lr": 0.03} if optimizer_kwargs is None else optimizer_kwargs)
        )

    def ff_train(self, input_tensor: Tensor, signs: Tensor, theta: float) -> tuple[Tensor, list[Tensor]]:
        """One step on rows `[rows, in]` with `signs` `[rows]` of 1 (positive) or -1.

        Returns:
            The activities `[rows, out]` before the update, and the mean of goodness minus theta over the positive and
            over the negative rows, as 0-dim tensors.
        """
        if not bool((signs.abs() == 1).all()):
            raise ValueError("signs holds values other than 1 and -1; accepted: 1 for positive rows, -1 for negative")
        is_positive = signs == 1
        objective = Objective(threshold=theta, reduction="sum_of_means")
        result = self.step(input_tensor, None, self.optimizer, objective=objective, is_positive=is_positive)
        assert result.y is not None
        above = result.goodness - theta
        means = [(above * side).sum() / side.sum() for side in (is_positive, ~is_positive)]
        return result.y, means

    @torch.no_grad()
    def positive_eval(self, input_tensor: Tensor, theta: float) -> tuple[Tensor, Tensor]:
        """Activities `[rows, out]`, and goodness minus theta `[rows]`."""
        y, sumsq = self.activity(input_tensor)
        return y, sumsq / self.out_features - theta
