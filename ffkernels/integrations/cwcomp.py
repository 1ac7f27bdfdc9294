"""CwComp's convolutional layer (Papachristodoulou et al., 2024) by its contract: a class in place of the copied one.

`Conv_Layer(dims, ...)` is built, trained (`forward_forward`), run (`ff_infer`, `forward`) and read as the original; its
step is one `ffkernels.conv2d_step_`. What a program has changed so that it cannot run here is obeyed: the step is then
taken by autograd, and one warning says why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from .. import functional
from .. import validation as check
from ..objectives import AnyObjective, GivenLoss, Objective
from . import common

LOSSES = ("CwC", "CwC_CE", "PvN", "CWG")
SHARE = 0.28  # of the cross-entropy in "CWG"


class Conv_Layer(nn.Conv2d):
    """A convolution, ReLU, perhaps a pool of two by two, and batch normalisation, of whose output goodness is.

    Class `k` has the `k`-th run of consecutive channels; its goodness is the mean of their squares. `opt` is the
    layer's own Adam. Attributes that may be replaced: `opt`, `dropout`, `loss_criterion`, `ClassGroups`, `num_classes`.

    Args:
        in_dims: `[channels, height, width]` of its input; `next_dims` are those of its output.
        in_channels, out_channels, kernel_size, stride, padding, groups: as in `nn.Conv2d`, of integers.
        num_classes: into how many groups the output channels are divided; of equal size.
        maxpool: whether there is a pool.
        droprate: of the input in train mode; with one above 0 steps are autograd's.
        loss_criterion: "CwC_CE", the cross-entropy of the goodnesses; "CwC", the original's own; "PvN", positive
            against negative; "CWG", 0.28 of the first and 0.72 of "PvN".
        ClassGroups: labels are divided by it, or None.
        compute_dtype, backend: as in `ffkernels.conv2d_step_`.

    Raises:
        ValueError: for another loss, and for channels that the classes do not divide.
    """

    def __init__(
        self,
        in_dims: Sequence[int],
        in_channels: int = 1,
        out_channels: int = 8,
        num_classes: int = 10,
        kernel_size: int = 7,
        stride: int = 1,
        padding: int = 1,
        maxpool: bool = True,
        groups: int = 1,
        droprate: float = 0,
        loss_criterion: str = "CwC_CE",
        ClassGroups: int | None = None,
        *,
        compute_dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        check.one_of("loss_criterion", loss_criterion, LOSSES)
        if out_channels % num_classes:
            raise ValueError(
                f"num_classes={num_classes} does not divide out_channels={out_channels}; accepted: a multiple of it"
            )
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, groups=groups)
        self.dims, self.outc, self.kernel_size = in_dims, out_channels, kernel_size  # type: ignore[assignment]
        self.outsize = (in_dims[1] - kernel_size + 2 * padding) // stride + 1
        self.ismaxpool, self.ClassGroups, self.loss = maxpool, ClassGroups, 10000
        if maxpool:
            self.maxpool = nn.MaxPool2d(kernel_size=2, stride=2)
            self.outsize //= 2
        self.wsz = self.outsize
        self.N_neurons_out = self.outc * self.outsize**2
        self.next_dims = [self.outc, self.outsize, self.outsize]
        self.conv_bn = nn.BatchNorm2d(self.outc, eps=1e-4)
        self.dropout = nn.Dropout(p=droprate)
        self.lr, self.threshold = 0.01, 2.0
        self.opt: Optimizer = Adam(self.parameters(), lr=self.lr)
        self.loss_criterion, self.num_classes = loss_criterion, num_classes
        self.ep_losses: list[Tensor] = []
        self.gf: Tensor | None = None
        self.compute_dtype, self.backend = compute_dtype, backend
        print(self.dims, self.N_neurons_out)

    def setdropout(self, drop_rate: float) -> None:
        """Another share of the input to leave out."""
        self.dropout = nn.Dropout(p=drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """What the layer hands on, `[rows, outc, outsize, outsize]`, differentiable; in train mode by the statistics of
        these rows, which move the running ones."""
        return self._behind(self.dropout(x))

    def ff_infer(self, x: Tensor) -> Tensor:
        """The same without dropout and without a graph; it moves the running statistics in train mode too."""
        with torch.no_grad():
            return self._behind(x)

    def _behind(self, x: Tensor) -> Tensor:
        x = F.relu(self._conv_forward(x, self.weight, self.bias), inplace=True)
        y: Tensor = self.conv_bn(self.maxpool(x) if self.ismaxpool else x)
        return y

    def goodness_factorCW(self, y: Tensor, gt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[rows, 1]` goodness of the label `gt`, that of the others in the mean, and `[rows, classes]` all of them."""
        groups = y.tensor_split(self.num_classes, 1)
        return _sides(torch.stack([group.square().mean((1, 2, 3)) for group in groups], 1), gt)

    def epoch_loss(self) -> float:
        """The mean of the losses since it was last asked for."""
        mean = torch.tensor(self.ep_losses).mean().item()
        self.ep_losses = []
        return mean

    def forward_forward(self, x_pos: Tensor, gt: Tensor, show: bool) -> Tensor:
        """One step of `opt` on rows `x_pos` under labels `gt`; what the layer hands on from before it, detached.

        `loss` and `gf`, the goodness of the classes, are those of the step.
        """
        labels = gt if self.ClassGroups is None else gt // self.ClassGroups
        labels = labels.to(self.weight.device)
        reason = self._reason(x_pos)
        if reason is None:
            geometry: dict[str, Any] = {"stride": self.stride, "padding": self.padding, "groups": self.groups}
            result = functional.conv2d_step_(
                x_pos, None, self.weight, self.bias, self.opt, labels=labels, objective=self._objective(), **geometry,
                pool=2 if self.ismaxpool else None, batch_norm=self.conv_bn, compute_dtype=self.compute_dtype,
                backend=self.backend,
            )  # fmt: skip
            assert result.y is not None
            y, loss, self.gf = common.in_dtype_of(self.weight, result.y), result.loss, result.goodness
        else:
            common.warn_once(f"a layer of CwComp ({self.extra_repr()}) runs on its original path: {reason}")
            y = self(x_pos)
            self.gf = self.goodness_factorCW(y, labels)[2]
            loss = _loss_of(self.gf, labels, self._objective())
            self.opt.zero_grad()
            loss.backward()
            self.opt.step()
        self.loss = loss.detach()  # type: ignore[assignment]
        self.ep_losses.append(loss.detach())
        if show:
            own, others, _ = _sides(self.gf.detach(), labels)
            print("------------------------------")
            print(f"g_pos_CW: {own.mean().item()}, g_neg_CW:{others.mean().item()}")
            print(f"Loss: {self.loss}")
        return y.detach()

    def _objective(self) -> AnyObjective:
        if self.loss_criterion == "CWG":
            return GivenLoss(_both, classes=self.num_classes)
        losses: dict[str, Any] = {"CwC": "cwc", "CwC_CE": "cross_entropy", "PvN": "pvn"}
        return Objective(loss=losses[self.loss_criterion], classes=self.num_classes)

    def _reason(self, x: Tensor) -> str | None:
        """Why a step cannot run here, in one clause, or None."""
        children = [self, self.conv_bn, self.dropout, *([self.maxpool] if self.ismaxpool else [])]
        if any(map(common.watched, children)):
            return "hooks watch it"
        if common.any_waits(x):
            return "x_pos waits for a gradient"
        if type(self.dropout) is not nn.Dropout or (self.ismaxpool and type(self.maxpool) is not nn.MaxPool2d):
            return "another module stands for its dropout or its pool"
        if self.dropout.p > 0 and self.dropout.training:
            return f"it drops {self.dropout.p} of its input"
        if type(self.conv_bn) is not nn.BatchNorm2d:
            return f"its batch normalisation is a {type(self.conv_bn).__name__}"
        if self.weight.dtype not in check.MASTER_DTYPES:
            return f"weight is {self.weight.dtype}"
        return common.overridden(self, Conv_Layer, ("forward", "goodness_factorCW")) or self._reason_of_optimizer()

    def _reason_of_optimizer(self) -> str | None:
        if not isinstance(self.opt, Optimizer):
            return f"its optimizer is a {type(self.opt).__name__}"
        held = [p for group in self.opt.param_groups for p in group["params"]]
        for name, p in self.named_parameters():
            if not (p.is_leaf and p.requires_grad):
                return f"{name} is frozen or computed from other parameters"
            if not any(p is other for other in held):
                return f"its optimizer does not hold {name}"
        return None


def _sides(goodness: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    own = goodness.gather(1, labels[:, None])
    others = (goodness.sum(1, keepdim=True) - own) / max(goodness.shape[1] - 1, 1)
    return own, others, goodness


def _both(goodness: Tensor, labels: Tensor) -> Tensor:
    pvn = functional.goodness_loss(goodness, None, Objective(loss="pvn", classes=goodness.shape[1]), labels=labels)
    return SHARE * F.cross_entropy(goodness, labels) + (1 - SHARE) * pvn


def _loss_of(goodness: Tensor, labels: Tensor, objective: AnyObjective) -> Tensor:
    if isinstance(objective, GivenLoss):
        function: Callable[..., Tensor] = objective.function
        return function(goodness, labels)
    assert isinstance(objective, Objective)
    return functional.goodness_loss(goodness, None, objective, labels=labels)
