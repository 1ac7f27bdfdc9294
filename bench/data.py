"""The batches of a case: labelled images, or noise where only the shape matters."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ffkernels as ff

from .cases import NUM_CLASSES, Batch, Case

PIXELS = 784
SYNTHETIC_IMAGES = 60_000
# Where the machine does not tell the size of its last cache.
ASSUMED_CACHE = 64 << 20
MAX_POOL = 1000
# `--compare` runs this file beside an older commit's package too.
RECIPES = "recipes" if find_spec("ffkernels.recipes") else "experiments"


class Data:
    """Labelled images (those given, else MNIST where it is found, else synthetic ones), loaded once a case asks."""

    def __init__(self, images: Any = None) -> None:
        self.given, self.source = images, "noise"

    def _load(self) -> None:
        if self.source != "noise":
            return
        try:
            found = self.given or import_module(f"ffkernels.{RECIPES}.data").load("mnist")
        except FileNotFoundError:
            self.source = "synthetic: smooth random class shapes, 19% of the pixels lit"
            self.images, self.labels = synthetic_images(SYNTHETIC_IMAGES)
        else:
            self.source = found.name.upper()
            self.images, self.labels = found.train_images.float() / 255, found.train_labels
        self.order = (-1, self.labels)

    def batch(self, case: Case, index: int) -> Batch:
        """The `index`-th batch of an endless run: `(x_pos, x_neg)`, each `[case.rows, in]`, or `(x,)` to label; where
        labels stand apart, `(x, labels)`; so it is with "colours", which are noise.

        Images come in shuffled epochs; negative rows are the same images under a wrong label, drawn anew in each
        batch. Noise is what a layer sees inside a network: nothing in common, half of it zeros. On the case's device.
        """
        rows = self._rows(case, index)
        return tuple(x.to(case.device, case.master_dtype if x.is_floating_point() else x.dtype) for x in rows)

    def _rows(self, case: Case, index: int) -> Batch:
        if case.label == "none":
            on_device = torch.Generator(case.device).manual_seed(index)
            shape = (case.rows, case.sizes[0])
            return tuple(torch.randn(shape, generator=on_device, device=case.device).clamp_(min=0) for _ in range(2))
        generator = torch.Generator().manual_seed(index)
        if case.label == "colours":
            x = torch.randn(case.rows, case.sizes[0], generator=generator)
            return x, torch.randint(NUM_CLASSES, (case.rows,), generator=generator)
        self._load()
        epoch, position = divmod(index, len(self.images) // case.rows)
        if self.order[0] != epoch:
            shuffle = torch.Generator().manual_seed(epoch)
            self.order = (epoch, torch.randperm(len(self.images), generator=shuffle))
        rows = self.order[1][position * case.rows : (position + 1) * case.rows]
        images, labels = self.images[rows], self.labels[rows]
        if case.task == "predict":
            return (F.pad(images, (NUM_CLASSES, 0)) if case.label == "concatenated" else images,)
        if case.label == "apart":
            return images, labels
        wrong = ff.wrong_label(labels, NUM_CLASSES, generator)
        return _labelled(images, labels, case.label), _labelled(images, wrong, case.label)

    def proof(self, case: Case) -> list[Batch]:
        """The first batches, of the steps by which contenders prove what they compute."""
        batches = [self.batch(case, index) for index in range(case.proof_steps)]
        return [tuple(of[: case.proof_rows] for of in batch) for batch in batches]

    def pool(self, case: Case, first: int, visits: int = 1) -> list[Batch]:
        """Batches from the `first`-th on, together twice as large as the last cache: by the time one comes round
        again, it is out of it. Of the smallest batches, which take no time to read, there are fewer; so there are of
        those for one of several `visits`, between which other cases fill the cache.
        """
        pool = [self.batch(case, first)]
        one = sum(x.nbytes for x in pool[0])
        count = min(MAX_POOL, -(-2 * cache_bytes(case.device) // (visits * one)))
        return pool + [self.batch(case, first + i) for i in range(1, count)]


def _labelled(images: Tensor, labels: Tensor, how: str) -> Tensor:
    if how == "concatenated":
        return torch.cat([images, F.one_hot(labels, NUM_CLASSES).to(images.dtype)], dim=1)
    return ff.overlay_label(images, labels, NUM_CLASSES)


def cache_bytes(device: str) -> int:
    """The size of the last cache before memory: of a GPU its L2, of a CPU the largest that the system names."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties().L2_cache_size)
    names = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    sizes = [int(text[:-1]) << {"K": 10, "M": 20}[text[-1]] for text in (name.read_text().strip() for name in names)]
    return max(sizes, default=ASSUMED_CACHE)


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
