"""The one list of what is measured, shared by the command, by pytest-benchmark and by the tests."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ffkernels as ff
from ffkernels.experiments.data import load

from .peers import PEERS, Peer

NUM_CLASSES = 10
PIXELS = 784
SYNTHETIC_IMAGES = 60_000
Layers = list[tuple[Tensor, Tensor]]
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """A network, its data and the peer whose training step it takes.

    `bfloat16` means bfloat16 operands in the products, float32 weights and data. All data come as float32.
    """

    name: str
    peer_name: str
    sizes: tuple[int, ...]
    rows: int  # of each side
    bfloat16: bool = False
    package: str | None = None  # the peer as a package, a contender besides the autograd writing of its step
    one_optimizer: bool = False  # for all layers, as against one for each
    label: str = "overlaid"  # on the first pixels, or "concatenated"
    proof_steps: int = 3  # after which the weights of all contenders must agree
    warm_steps: int = 20  # taken by every contender before its steps are timed
    block: int = 10  # steps timed in a row
    lead: int = 1  # untimed steps before each block
    rounds: int = 15  # blocks of each contender

    @property
    def peer(self) -> Peer:
        """The peer whose step this is."""
        return PEERS[self.peer_name]

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of every layer."""
        return list(zip(self.sizes[:-1], self.sizes[1:], strict=True))

    def initial(self, seed: int = 0) -> Layers:
        """Weights and biases of every layer, float32, as the peer initialises them."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers = [nn.Linear(inputs, outputs) for inputs, outputs in self.shapes]
            for layer in layers:
                if self.peer.init is not None:
                    self.peer.init(layer.weight)
                    nn.init.zeros_(layer.bias)
        return [(layer.weight.detach(), layer.bias.detach()) for layer in layers]

    def quick(self) -> Case:
        """The same with fewer and shorter blocks."""
        return replace(self, rounds=6 if self.block > 1 else 4, block=min(self.block, 5))


def _both_dtypes(case: Case) -> list[Case]:
    bfloat16 = replace(case, name=f"{case.name}-bfloat16", bfloat16=True)
    return [replace(case, name=f"{case.name}-float32"), bfloat16]


_ALL = [
    *_both_dtypes(
        Case("fflib", "fflib", (794, 2000, 2000), 128, package="fflib", label="concatenated", block=5)
    ),
    *_both_dtypes(Case("loewex", "loewex", (784, 1000, 1000, 1000), 100, one_optimizer=True, warm_steps=100)),
    *_both_dtypes(
        Case(
            "mohammadpz", "mohammadpz", (784, 500), 50_000,
            proof_steps=2, warm_steps=0, block=1, lead=0, rounds=7,
        )
    ),
]  # fmt: skip
CASES = {case.name: case for case in _ALL}


class Data:
    """Labelled images and the positive and negative batches made from them."""

    def __init__(self) -> None:
        try:
            mnist = load("mnist")
        except FileNotFoundError:
            self.source = "synthetic: smooth random class shapes, 19% of the pixels lit"
            self.images, self.labels = synthetic_images(SYNTHETIC_IMAGES)
        else:
            self.source = "MNIST"
            self.images, self.labels = mnist.train_images.float() / 255, mnist.train_labels

    def batch(self, case: Case, index: int) -> Batch:
        """The `index`-th batch of an endless run over shuffled epochs: both sides, each `[case.rows, in]`.

        Negative rows are the same images under a wrong label, drawn anew in each batch.
        """
        epoch, position = divmod(index, len(self.images) // case.rows)
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(epoch))
        rows = order[position * case.rows : (position + 1) * case.rows]
        images, labels = self.images[rows], self.labels[rows]
        wrong = ff.wrong_label(labels, NUM_CLASSES, torch.Generator().manual_seed(index))
        return _labelled(images, labels, case.label), _labelled(images, wrong, case.label)


def _labelled(images: Tensor, labels: Tensor, how: str) -> Tensor:
    if how == "concatenated":
        return torch.cat([images, F.one_hot(labels, NUM_CLASSES).to(images.dtype)], dim=1)
    return ff.overlay_label(images, labels, NUM_CLASSES)


def synthetic_images(count: int, lit: float = 0.19) -> tuple[Tensor, Tensor]:
    """`[count, 784]` images in 0..1 with a share `lit` of pixels not zero (as in MNIST); labels `[count]`."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(NUM_CLASSES, (count,), generator=generator)
    side = round(PIXELS**0.5)

    def smooth(images: int) -> Tensor:
        noise = torch.randn(images, 1, side, side, generator=generator)
        return F.avg_pool2d(noise, 5, stride=1, padding=2).flatten(1)

    field = 2 * smooth(NUM_CLASSES)[labels] + smooth(count)
    dark = field.kthvalue(round((1 - lit) * PIXELS), dim=1, keepdim=True).values
    return (4 * (field - dark)).clamp(0, 1), labels
