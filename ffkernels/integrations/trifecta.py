"""Trifecta's blocks and network (Dooms, Tsang and Oramas, 2023) by their contract: classes in place of the copied ones.

`Block` and `Network` are built, trained (`network(x, labels, iteration)` in train mode), run and read as the original.
With overlapped updates (`olu`) a block's loss reaches the one below: here by one input-gradient convolution and one
pass, without a graph. What a program has changed so that it cannot run here is obeyed: autograd takes the step then,
and one warning says why.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.optim import Adam, Optimizer

from .. import validation as check
from ..functional import chain, in_front
from ..functional.conv import run_conv2d, waits
from ..functional.maps import ConvOptions
from ..objectives import Judged, Objective, move
from . import common

SIZES = {
    # Channels, and whether a pool of two by two comes behind.
    "small": ((128, True), (128, False), (256, True), (256, False), (256, False), (512, True)),
    "large": (
        (64, False), (128, True), (128, False), (128, False), (128, False), (256, True), (256, False), (256, False),
        (256, False), (512, True), (512, False), (512, False),
    ),
}  # fmt: skip


def should_detach(olu: bool, index: int, iteration: int) -> bool:
    """Whether a block has a loss in an iteration: every other one with overlapped updates, else all."""
    return (index % 2 != iteration % 2) if olu else True


class Handed(NamedTuple):
    """What a block hands on, its version and `chain.Passed.sums`, and where a loss is still to come the pass."""

    y: Tensor
    version: int | None
    sums: tuple[Tensor, Tensor]
    passed: chain.Passed | None


class Block(nn.Module):
    """Batch normalisation, a convolution without bias, ReLU and perhaps a pool, `inner`; and an Adam of its own.

    Args:
        in_channels, out_channels: of the convolution, times `scale` (but for an input of 4).
        index: its place from 0.
        prev: the block below, or an embedding, whose parameters its optimizer holds too; or None.
        dims: height and width of its input, which layer normalisation reads.
        lr: of the optimizer.
        alpha: scale of SymBa's loss of pairs; None for the loss by side about `tau`.
        olu: whether updates overlap.
        bn: batch normalisation; or layer normalisation, whose steps are autograd's.
        compute_dtype: as in `ffkernels.conv2d_step_`.
        skip_below: likewise; pairs whose loss is less steep than this are left out.
    """

    _below: Block | None
    _above: Block | None
    _handed: Handed | None
    _learned: list[Tensor]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        index: int,
        prev: nn.Module | None,
        dims: int,
        lr: float,
        scale: int,
        alpha: float | None,
        tau: float,
        olu: bool,
        bn: bool,
        maxpool: bool = False,
        *,
        compute_dtype: torch.dtype | None = None,
        skip_below: float = 0.0,
    ) -> None:
        super().__init__()
        in_channels *= scale if in_channels != 4 else 1
        out_channels *= scale
        self.inner = nn.Sequential(
            nn.BatchNorm2d(in_channels) if bn else nn.LayerNorm([in_channels, dims, dims]),
            nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2) if maxpool else nn.Identity(),
        )
        below = [] if prev is None else list(prev.parameters())
        self.optimizer: Optimizer = Adam([*below, *self.inner.parameters()], lr=lr)
        self.index, self.alpha, self.tau, self.olu = index, alpha, tau, olu
        self.compute_dtype, self.skip_below = compute_dtype, skip_below
        # Neighbours are no parts of it.
        vars(self).update(_below=prev if isinstance(prev, Block) else None, _above=None, _handed=None)
        vars(self)["_learned"] = [] if isinstance(prev, Block) else below
        if isinstance(prev, Block):
            vars(prev)["_above"] = self

    def forward(self, x: Tensor, iteration: int | None) -> tuple[Any, ...]:
        """What the block hands on; `[rows]` goodness; the sides' mean difference; the loss; the means of both.

        Rows `x` `[rows, in, h, w]` are positive in their first half and negative in the other. All but the first are
        None where the block has no loss, and all but the first two outside of train mode.
        """
        if not self.training:
            return self._evaluated(x)
        assert iteration is not None
        has_loss = should_detach(self.olu, self.index, iteration)
        reason = self._reason(x, has_loss)
        if reason is not None:
            common.warn_once(f"block {self.index} of Trifecta runs on its original path: {reason}")
            return self._by_autograd(x, iteration)
        y, judged = self.advance(x, has_loss)
        if judged is None:
            return y, None, None, None, None, None
        goodness = judged.goodness
        assert goodness is not None
        pos, neg = goodness.chunk(2)
        return y, goodness, (pos - neg).mean(0), judged.loss.item(), pos.mean(0), neg.mean(0)

    def can_observe(self, x: Tensor, iteration: int | None) -> bool:
        """Whether `observe` does what a step does but for its `y`."""
        if not self.training or iteration is None or should_detach(self.olu, self.index, iteration):
            return False
        return self._reason(x, False) is None

    def advance(self, x: Tensor, has_loss: bool) -> tuple[Tensor, Judged | None]:
        """What the block hands on of rows as in `forward`, and if it has a loss, a step by this; no value comes back to
        the host but where rows are left out."""
        handed = None if self._below is None else self._below._handed_on(x)
        passed = chain.forward(x, self.weight, None, self._options(), None if handed is None else handed.sums)
        if self._above is not None:
            left = None if has_loss else passed
            vars(self)["_handed"] = Handed(passed.y, _version(passed.y), passed.sums, left)
        if not has_loss:
            return passed.y, None
        below = None if handed is None else handed.passed
        learned: dict[str, Tensor] = {}
        if below is None and x.requires_grad:
            learned = {f"learned.{i}": p for i, p in enumerate(self._learned)}
        self.optimizer.zero_grad()
        links = [passed] if below is None else [below, passed]
        n_pos = (len(x) + 1) // 2
        return passed.y, chain.step_(links, n_pos, self.optimizer, self.objective, learned, self.skip_below)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Moves the running statistics by rows as in `forward`: all that is left of a pass without a loss whose `y`
        nobody reads."""
        handed = None if self._below is None else self._below._handed_on(x)
        norm = cast("nn.BatchNorm2d", self.inner[0])
        in_front.check_fits(norm, x, self.weight, "none")
        in_front.check_enough(norm, x)
        move(norm, in_front.standardising_of(norm, x, self.weight.dtype, None if handed is None else handed.sums))

    @property
    def weight(self) -> Tensor:
        """The convolution's, `[out, in, 3, 3]`."""
        return cast("nn.Conv2d", self.inner[1]).weight

    @property
    def pool(self) -> int | None:
        """The size of its pool."""
        return 2 if isinstance(self.inner[3], nn.MaxPool2d) else None

    @property
    def objective(self) -> Objective:
        """What its loss is."""
        if self.alpha is None:
            return Objective(threshold=float(self.tau))
        return Objective(loss="symba", alpha=float(self.alpha))

    def _options(self) -> ConvOptions:
        norm = cast("nn.BatchNorm2d", self.inner[0])
        return ConvOptions(
            1, 1, "zeros", 1, self.pool, "none", 0.0, "add", "relu", norm, None, self.compute_dtype, None
        )

    def _evaluated(self, x: Tensor) -> tuple[Any, ...]:
        """A forward pass alone."""
        if self._own_reason() is not None or waits(x, x, *self.parameters()):
            return self._by_autograd(x, None)
        y, moments = run_conv2d(x, self.weight, None, None, self._options(), None)
        goodness = moments.second.sum(1) / y.shape[1:].numel()
        return y, goodness, None, None, None, None

    def _handed_on(self, x: Tensor) -> Handed | None:
        """What the last pass has left, if `x` is what it handed on, as it was."""
        handed, vars(self)["_handed"] = self._handed, None
        if handed is None or (handed.y is x and handed.version == _version(x)):
            return handed
        if handed.passed is not None:
            common.warn_once(
                f"block {self.index} of Trifecta did not learn in a step: the next one took other maps than it handed "
                "on, and no gradient goes through what is between them"
            )
        return None

    def _by_autograd(self, x: Tensor, iteration: int | None) -> tuple[Any, ...]:
        """`forward` by plain PyTorch; without an iteration a forward pass alone."""
        out = self.inner(x)
        goodness = out.pow(2).flatten(1).mean(1)
        if iteration is None:
            return out, goodness, None, None, None, None
        if not should_detach(self.olu, self.index, iteration):
            return out, None, None, None, None, None
        pos, neg = goodness.chunk(2)
        if self.alpha is None:
            loss = torch.cat([softplus(self.tau - pos), softplus(neg - self.tau)]).mean()
        else:
            loss = softplus(-self.alpha * (pos - neg)).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return out.detach(), goodness, (pos - neg).mean(0), loss.item(), pos.mean(0), neg.mean(0)

    def _reason(self, x: Tensor, has_loss: bool) -> str | None:
        """Why a step cannot run here, in one clause, or None. Blocks that one loss reaches run in one way."""
        other = (self._below if has_loss else self._above) if self.olu else None
        for block in [self] if other is None else [self, other]:
            reason = block._own_reason()
            if reason is not None:
                return reason if block is self else f"its neighbour {block.index} does, since {reason}"
        if x.requires_grad and self._below is not None:
            return "its input waits for a gradient"
        return None

    def _own_reason(self) -> str | None:
        kinds = ((nn.BatchNorm2d,), (nn.Conv2d,), (nn.ReLU,), (nn.MaxPool2d, nn.Identity))
        if [type(m) in of for m, of in zip(self.inner, kinds, strict=False)] != [True] * 4 or len(self.inner) != 4:
            return "another module stands in inner, or layer normalisation"
        if any(map(common.watched, [self, self.inner, *self.inner])):
            return "hooks watch it"
        dtype = cast("nn.Conv2d", self.inner[1]).weight.dtype
        if dtype not in check.MASTER_DTYPES:
            return f"weight is {dtype}"
        if not isinstance(self.optimizer, Optimizer):
            return f"its optimizer is a {type(self.optimizer).__name__}"
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        for name, p in self.inner.named_parameters():
            if not (p.is_leaf and p.requires_grad):
                return f"{name} is frozen or computed from other parameters"
            if not any(p is other for other in held):
                return f"its optimizer does not hold {name}"
        return common.overridden(self, Block, ("forward",))


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version


class Network(nn.Module):
    """Blocks on images with one channel more, a learned map for each label.

    Args:
        config: with the original's attributes `lr`, `scale`, `alpha`, `bn`, `olu`, `tau`, `model` ("small" or "large"),
            `dataset` and `learned`.
        num_classes, dims: how many labels; height and width of an image.
        compute_dtype, skip_below: those of the blocks.
    """

    def __init__(
        self,
        config: Any,
        num_classes: int,
        dims: int,
        *,
        compute_dtype: torch.dtype | None = None,
        skip_below: float = 0.0,
    ) -> None:
        check.one_of("config.model", config.model, tuple(SIZES))
        super().__init__()
        self.embedding = nn.Embedding(num_classes, dims * dims)
        channels = 2 if config.dataset in ("mnist", "f_mnist") else 4
        below: nn.Module | None = self.embedding if config.learned else None
        blocks, size = [], dims
        for index, (width, pool) in enumerate(SIZES[config.model]):
            below = Block(
                channels, width, index, below, size, config.lr, config.scale, config.alpha, config.tau, config.olu,
                config.bn, pool, compute_dtype=compute_dtype, skip_below=skip_below,
            )  # fmt: skip
            blocks.append(below)
            channels, size = width, size // 2 if pool else size
        self.layers = nn.ModuleList(blocks)
        self.num_classes, self.dims = num_classes, dims

    def forward(self, x: Tensor, y: Tensor, iteration: int | None) -> Any:
        """A step of the blocks on images `[rows, channels, dims, dims]` under labels `[rows]`.

        Returns:
            In train mode differences, losses, and means of positive and negative goodness, of each block or None;
            else the goodness `[blocks, rows]`.
        """
        maps = self.embedding(y).view(-1, 1, self.dims, self.dims)
        x = torch.cat([x, maps], dim=1)
        metrics: list[tuple[Any, ...]] = []
        for layer in cast("list[Block]", self.layers):
            if layer is self.layers[-1] and layer.can_observe(x, iteration):
                layer.observe(x)
                metrics.append((None,) * 5)
                continue
            x, *rest = layer(x, iteration)
            metrics.append(tuple(rest))
        goodness, delta, loss, pos, neg = zip(*metrics, strict=True)
        return (delta, loss, pos, neg) if self.training else torch.stack(goodness)
