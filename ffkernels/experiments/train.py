"""The training loop: layers by Forward-Forward on labelled images, a linear classifier alongside.

The images stay on the device as uint8; minibatches, labels and negatives are made there, and nothing in a step waits
for the device. All that an epoch draws comes from a generator seeded by (seed, epoch), so a run that goes on from a
checkpoint gives the numbers of one that was never stopped.
"""

from __future__ import annotations

import json
import math
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from .. import FFLinear, FFNetwork, StepResult, overlay_label, wrong_label
from . import checkpoint
from .data import Dataset
from .presets import Preset, Rule
from .progress import Progress

Row = dict[str, Any]

EVALUATION_ROWS = 1000
CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.jsonl"


class Trainer:
    """A network, its classifier and their optimizers under training; `rows` holds the metrics of the epochs done.

    Args:
        preset: the recipe.
        data: the images, moved to `device`.
        seed: 0 to 2^32 - 1; with the preset and the data it decides every number drawn.
        epochs: instead of the preset's; the learning rate's fall is laid over them.
        device: where everything lives.
        compute_dtype: of the layers' products, as in `linear_step_`.

    Raises:
        ValueError: for a seed or epochs outside their range.
    """

    def __init__(
        self,
        preset: Preset,
        data: Dataset,
        *,
        seed: int = 0,
        epochs: int | None = None,
        device: torch.device | str = "cpu",
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed={seed} is not in 0..{2**32 - 1}")
        self.epochs = preset.epochs if epochs is None else epochs
        if self.epochs < 1:
            raise ValueError(f"epochs={epochs} is not at least 1")
        self.preset, self.data, self.seed = preset, data, seed
        self.device, self.compute_dtype = torch.device(device), compute_dtype
        self.train_images, self.train_labels = data.train_images.to(device), data.train_labels.to(device)
        self.test_images, self.test_labels = data.test_images.to(device), data.test_labels.to(device)
        # Drawn on the CPU, so that a run starts from the same weights on every device.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.net = _network(preset, data.train_images.shape[1], compute_dtype).to(device)
            features = self.net.features(_as_input(self.train_images[:1]), num_classes=data.num_classes)
            self.classifier = nn.Linear(features.shape[1], data.num_classes, bias=False).to(device)
        nn.init.zeros_(self.classifier.weight)
        self.net_optimizer = _optimizer(preset.layers, self.net)
        self.classifier_optimizer = _optimizer(preset.classifier, self.classifier)
        self.rows: list[Row] = []

    @property
    def finished(self) -> bool:
        return len(self.rows) == self.epochs

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.train_labels) / self.preset.batch_size)

    def settings(self) -> dict[str, Any]:
        """All that decides the numbers of this run, as plain values."""
        recipe = {name: value for name, value in asdict(self.preset).items() if name != "source"}
        return {
            **recipe,
            "epochs": self.epochs,
            "seed": self.seed,
            "data": f"{self.data.name} ({_fingerprint(self.data)})",
            "device": self.device.type,
            "compute_dtype": str(self.compute_dtype),
        }

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        return {"rows": self.rows, **parts}

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from `state`, which a run with the same settings has saved."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.rows = list(state["rows"])

    def _parts(self) -> dict[str, nn.Module | Optimizer]:
        names = ("net", "classifier", "net_optimizer", "classifier_optimizer")
        return {name: getattr(self, name) for name in names}

    def run_epoch(self, after_step: Callable[[Callable[[], str]], bool]) -> Row | None:
        """Trains one epoch, tests, and adds the epoch's row of metrics to `rows`.

        Args:
            after_step: called after every step with a function that describes the epoch so far; returns whether to
                give the epoch up, which is not done once all its steps are.

        Returns:
            The row; None where the epoch was given up.

        Raises:
            FloatingPointError: where the training has diverged.
        """
        start = time.monotonic()
        epoch = len(self.rows) + 1
        factor = self.lr_factor(epoch)
        self._set_lr(factor)
        totals = self._train(epoch, after_step)
        if totals is None:
            return None
        averages = totals.averages()
        trained = time.monotonic()
        if not all(map(math.isfinite, averages["loss"])):
            raise FloatingPointError(f"epoch {epoch}: the training has diverged, its losses are {averages['loss']}")
        by_goodness = epoch % self.preset.goodness_every == 0 or epoch == self.epochs
        row = {
            "epoch": epoch,
            "lr": self.preset.layers.lr * factor,
            **averages,
            "test_error_classifier": self.classifier_error(),
            "test_error_goodness": self.goodness_error() if by_goodness else None,
            "train_seconds": round(trained - start, 3),
            "seconds": round(time.monotonic() - start, 3),
        }
        self.rows.append(row)
        return row

    def lr_factor(self, epoch: int) -> float:
        """What the learning rates are multiplied by in an epoch (from 1): 1 for the first half, then linear to 0."""
        return min(1.0, 2 * (self.epochs + 1 - epoch) / self.epochs)

    def _set_lr(self, factor: float) -> None:
        rules = ((self.preset.layers, self.net_optimizer), (self.preset.classifier, self.classifier_optimizer))
        for rule, optimizer in rules:
            for group in optimizer.param_groups:
                group["lr"] = rule.lr * factor

    def _train(self, epoch: int, after_step: Callable[[Callable[[], str]], bool]) -> Totals | None:
        preset, classes = self.preset, self.data.num_classes
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(f"{self.seed} {epoch}".encode()))
        order = torch.randperm(len(self.train_labels), generator=generator, device=self.device)
        totals = Totals(len(self.net), self.device)
        for rows in order.split(preset.batch_size):
            x, labels = _as_input(self.train_images[rows]), self.train_labels[rows]
            logits = self._step_classifier(x, labels)
            if preset.negatives == "classifier":
                wrong = hard_label(logits, labels, generator)
            else:
                wrong = wrong_label(labels, classes, generator)
            x_pos, x_neg = overlay_label(x, labels, classes), overlay_label(x, wrong, classes)
            results = self.net.step(x_pos, x_neg, self.net_optimizer)
            totals.add(results, logits.argmax(1) != labels)
            if after_step(totals.describe) and totals.rows < len(order):
                return None
        return totals

    def _step_classifier(self, x: Tensor, labels: Tensor) -> Tensor:
        """Trains the classifier on a minibatch; returns its logits from before."""
        logits = self.classifier(self.net.features(x, num_classes=self.data.num_classes))
        self.classifier_optimizer.zero_grad()
        F.cross_entropy(logits, labels).backward()
        self.classifier_optimizer.step()
        return logits.detach()

    @torch.no_grad()
    def classifier_error(self) -> float:
        """Share of the test images that the classifier gets wrong."""
        classes = self.data.num_classes
        return self._test_error(lambda x: self.classifier(self.net.features(x, num_classes=classes)).argmax(1))

    def goodness_error(self) -> float:
        """Share of the test images for which a wrong label has the highest goodness."""
        return self._test_error(lambda x: self.net.predict(x, self.data.num_classes, self.preset.goodness_layers))

    def _test_error(self, predict: Callable[[Tensor], Tensor]) -> float:
        wrong = torch.zeros((), dtype=torch.int64, device=self.device)
        for images, labels in self._test_batches():
            wrong += (predict(_as_input(images)) != labels).sum()
        return int(wrong) / len(self.test_labels)

    def _test_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(self.test_images.split(EVALUATION_ROWS), self.test_labels.split(EVALUATION_ROWS), strict=True)

    @torch.no_grad()
    def test_goodness(self) -> tuple[Tensor, Tensor]:
        """Goodness `[N, layers]` of the test images, under their right label and under a uniformly drawn wrong one."""
        classes = self.data.num_classes
        generator = torch.Generator(self.device).manual_seed(self.seed)
        right, wrong = [], []
        for images, labels in self._test_batches():
            x = _as_input(images)
            right.append(self.net.goodness(overlay_label(x, labels, classes)))
            wrong.append(self.net.goodness(overlay_label(x, wrong_label(labels, classes, generator), classes)))
        return torch.cat(right).cpu(), torch.cat(wrong).cpu()


class Totals:
    """Sums over an epoch, on the device: per layer the loss and the goodness of both sides, and the wrong guesses."""

    def __init__(self, layers: int, device: torch.device) -> None:
        self._layers = torch.zeros(layers, 3, device=device)
        self._wrong = torch.zeros((), device=device)
        self.rows = 0

    def add(self, results: list[StepResult], wrong: Tensor) -> None:
        """Adds a minibatch: the layers' step results, and `[rows]` which guesses were wrong."""
        rows = len(wrong)
        terms = [(r.loss, r.goodness_pos.mean(), r.goodness_neg.mean()) for r in results]
        self._layers += rows * torch.stack([term for layer in terms for term in layer]).view(-1, 3)
        self._wrong += wrong.sum()
        self.rows += rows

    def averages(self) -> Row:
        """Per row, as numbers; waits for the device."""
        loss, goodness_pos, goodness_neg = (self._layers / self.rows).T.tolist()
        return {
            "loss": loss,
            "goodness_pos": goodness_pos,
            "goodness_neg": goodness_neg,
            "train_error_classifier": self._wrong.item() / self.rows,
        }

    def describe(self) -> str:
        return describe(self.averages())


def describe(row: Row) -> str:
    """One line on an epoch's training: error of the classifier, goodness of both sides, layer by layer."""
    sides = ("/".join(f"{g:.3g}" for g in row[side]) for side in ("goodness_pos", "goodness_neg"))
    return "train error {:.2%}, goodness pos {} neg {}".format(row["train_error_classifier"], *sides)


def describe_test(row: Row) -> str:
    """The test errors of an epoch."""
    text = f"test error {row['test_error_classifier']:.2%} by classifier"
    by_goodness = row["test_error_goodness"]
    return text if by_goodness is None else f"{text}, {by_goodness:.2%} by goodness"


def summary(trainer: Trainer) -> str:
    """What a finished run has come to."""
    seconds = sum(row["seconds"] for row in trainer.rows)
    widths = "-".join(str(width) for width in (trainer.train_images.shape[1], *trainer.preset.hidden))
    dtype = str(trainer.compute_dtype or torch.float32).removeprefix("torch.")
    return (
        f"{trainer.preset.name} ({widths}) on {trainer.data.name}: {describe_test(trainer.rows[-1])}; "
        f"{len(trainer.rows)} epochs in {seconds:.0f} s on {trainer.device.type}, {dtype} products"
    )


def train(trainer: Trainer, output: Path, should_stop: Callable[[], bool] = lambda: False) -> bool:
    """Trains the epochs that are still to do; after each writes metrics and checkpoint into the folder `output`.

    Args:
        trainer: fresh, or brought to where a checkpoint was.
        output: is made where it does not exist.
        should_stop: asked after every step; True ends the run, whose checkpoint then is of the last whole epoch.

    Returns:
        Whether the run is finished.
    """
    output.mkdir(parents=True, exist_ok=True)
    settings = trainer.settings()
    if not trainer.rows:
        # A later --resume must not find the run that this one replaces.
        (output / CHECKPOINT).unlink(missing_ok=True)
    write_metrics(output, trainer.rows)
    done = len(trainer.rows) * trainer.steps_per_epoch
    with Progress(trainer.epochs * trainer.steps_per_epoch, done) as progress:

        def after_step(describe: Callable[[], str]) -> bool:
            progress.step(describe)
            return should_stop()

        while not trainer.finished:
            row = trainer.run_epoch(after_step)
            if row is None:
                return False
            checkpoint.save(output / CHECKPOINT, settings, trainer.state())
            write_metrics(output, trainer.rows)
            numbers = f"epoch {row['epoch']}/{trainer.epochs}: {describe_test(row)}; {describe(row)}"
            progress.line(f"{numbers} ({row['seconds']:.1f} s)")
            if should_stop():
                break
    return trainer.finished


def resume(trainer: Trainer, output: Path) -> bool:
    """Brings a fresh trainer to where the checkpoint in `output` was; False where there is none.

    Raises:
        ValueError: for a checkpoint that is damaged or of other settings.
    """
    path = output / CHECKPOINT
    if not path.exists():
        return False
    trainer.load_state(checkpoint.load(path, trainer.settings()))
    return True


def write_metrics(output: Path, rows: list[Row]) -> None:
    """One JSON object a line, one line an epoch: errors as fractions, goodness and loss per layer."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    checkpoint.write_atomically(output / METRICS, lambda file: file.write(lines.encode()))


def hard_label(logits: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """For each row a wrong label drawn from softmax(logits) with the right one left out; `[rows]`.

    The largest of `logit + Gumbel noise` is such a draw, whatever the logits' range.
    """
    noise = torch.empty_like(logits).exponential_(generator=generator).log_().neg_()
    return (logits + noise).scatter_(1, labels[:, None], -math.inf).argmax(1)


def _as_input(images: Tensor) -> Tensor:
    return images.float() / 255


def _network(preset: Preset, pixels: int, compute_dtype: torch.dtype | None) -> FFNetwork:
    layers = []
    for fan_in, width in zip((pixels, *preset.hidden), preset.hidden, strict=False):
        layer = FFLinear(
            fan_in,
            width,
            objective=preset.objective(width),
            norm=preset.norm,
            eps=preset.eps,
            eps_mode=preset.eps_mode,
            activation=preset.activation,
            outputs=preset.outputs,
            compute_dtype=compute_dtype,
        )
        if preset.init == "fan_out":
            nn.init.normal_(layer.weight, std=1 / math.sqrt(width))
            nn.init.zeros_(layer.bias)
        layers.append(layer)
    return FFNetwork(layers)


def _optimizer(rule: Rule, module: nn.Module) -> Optimizer:
    if rule.optimizer == "adam":
        return Adam(module.parameters(), lr=rule.lr, weight_decay=rule.weight_decay)
    return SGD(module.parameters(), lr=rule.lr, momentum=rule.momentum, weight_decay=rule.weight_decay)


def _fingerprint(data: Dataset) -> str:
    """Differs for other images or labels, and for the same in another order."""
    sums = []
    for images, labels in ((data.train_images, data.train_labels), (data.test_images, data.test_labels)):
        place = torch.arange(1, len(labels) + 1)
        sums.append(f"{len(labels)} images {int((place * (11 * images.sum(1) + labels)).sum()):x}")
    return ", ".join(sums)
