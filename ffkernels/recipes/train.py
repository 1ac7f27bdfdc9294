"""A network under training: layers by Forward-Forward on labelled images, a linear classifier alongside.

The images stay on the device as uint8; minibatches, labels and negatives are made there (`batches.py`), and nothing in
a step waits for the device. Where negatives do not wait for it, the classifier's pass under the neutral label is one
with the step.
All that an epoch draws comes from a generator seeded by (seed, epoch), so a run that goes on from a checkpoint gives
the numbers of one that was never stopped.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .. import FFNetwork, StepResult, hybrid_images, wrong_label
from .. import validation as check
from ..objectives import short
from ..parallel import DataParallel
from . import checkpoint
from .batches import Minibatch, Shared, as_input, dropped, flipped, hard_label, labelled_sides, shifted, turned
from .build import network_of, optimizer_of
from .catalogue import Recipe
from .data import Dataset, fingerprint
from .labels_met import LabelsMet
from .metrics import Row, check_rows
from .overlapped import OverlappedNetwork
from .processes import ALONE, Processes
from .readers.dataset import check_range
from .totals import Totals

EVALUATION_ROWS = 1000
MOST_EPOCHS = 2**31 - 1


class Trainer:
    """A network, its classifier and their optimizers under training; `rows` holds the metrics of the epochs done.

    Args:
        recipe: the recipe.
        data: the images, moved to `device`.
        seed: 0 to 2^32 - 1; with the recipe and the data it decides every number drawn.
        epochs: 1 to 2^31 - 1, instead of the recipe's; the learning rate's fall is laid over them.
        device: where everything lives.
        compute_dtype: of the layers' products, as in `linear_step_`.
        skip_below: as in `linear_step_`.
        processes: that train it together. All draw the same numbers and each steps on its own rows, so that how many
            they are changes no more than the order of sums.

    Raises:
        TypeError: for another recipe or data, and for a seed, epochs or `skip_below` that is no number.
        ValueError: for one outside its range, for data too few for the recipe, and for colours where it mixes images.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: Dataset,
        *,
        seed: int = 0,
        epochs: int | None = None,
        device: torch.device | str = "cpu",
        compute_dtype: torch.dtype | None = None,
        skip_below: float = 0.0,
        processes: Processes = ALONE,
    ) -> None:
        if not isinstance(recipe, Recipe):
            raise TypeError(f"recipe={short(recipe)} is no Recipe; accepted: RECIPES[name] of ffkernels.recipes")
        if not isinstance(data, Dataset):
            raise TypeError(f"data is a {type(data).__name__}; accepted: a Dataset, as ffkernels.recipes.load makes it")
        _whole_number("seed", seed)
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed={seed} is not in 0..{2**32 - 1}")
        self.epochs = recipe.epochs if epochs is None else epochs
        _whole_number("epochs", self.epochs)
        if self.epochs < 1:
            raise ValueError(f"epochs={epochs} is not at least 1")
        if self.epochs > MOST_EPOCHS:
            raise ValueError(f"epochs={epochs} is not at most {MOST_EPOCHS}")
        check.fraction("skip_below", skip_below)
        self.fewest_rows = 2 if recipe.negatives == "hybrid" else 1
        if len(data.train_labels[: recipe.train_images]) < self.fewest_rows or not len(data.test_labels):
            raise ValueError(
                f"{data.source}: {len(data.train_labels)} training and {len(data.test_labels)} test images; "
                f"{recipe.name} needs at least {self.fewest_rows} and 1"
            )
        # Looked at once, and not with each minibatch.
        for labels in (data.train_labels, data.test_labels):
            check_range(labels, "labels", data.num_classes, data.source)
        if recipe.negatives == "hybrid" and data.shape[0] != 1:
            raise ValueError(f"{data.source}: images of {data.shape[0]} channels; {recipe.name} mixes grey ones alone")
        self.recipe, self.data, self.seed, self.skip_below = recipe, data, seed, skip_below
        self.device, self.compute_dtype, self.processes = torch.device(device), compute_dtype, processes
        used = slice(None, recipe.train_images)
        self.train_images, self.train_labels = data.train_images[used].to(device), data.train_labels[used].to(device)
        self.test_images, self.test_labels = data.test_images.to(device), data.test_labels.to(device)
        # Drawn on the CPU, so that a run starts from the same weights on every device.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            net = network_of(recipe, data, compute_dtype).to(device)
        # What both have in common: layers with an objective, and a state.
        self.net = cast("FFNetwork", net)
        self.overlapped = net if isinstance(net, OverlappedNetwork) else None
        self.trained: FFNetwork | DataParallel = self.net
        if processes.size > 1:
            if self.overlapped is not None or recipe.negatives == "met":
                raise ValueError(f"{processes.size} processes; {recipe.name} trains on one")
            self.trained = DataParallel(self.net, processes.group, sync_batch_norm=True)
        self._classes = torch.arange(data.num_classes, device=device)
        self.label_field = 0 if recipe.label == "none" else data.num_classes
        self.net_optimizers = (
            [optimizer_of(recipe.layers, self.net)] if self.overlapped is None else self.overlapped.optimizers
        )
        self.net_optimizer = self.net_optimizers[0]
        self.rules = [(recipe.layers, optimizer) for optimizer in self.net_optimizers]
        self.classifier: nn.Linear | None = None
        if recipe.classifier is not None:
            features = self._features(self._as_input(self.train_images[:1]))
            self.classifier = nn.Linear(features.shape[1], data.num_classes, bias=False, device="meta")
            self.classifier.to_empty(device=device)
            nn.init.zeros_(self.classifier.weight)
            # On a GPU nobody has measured it.
            fused = self.device.type == "cpu"
            self.classifier_optimizer = optimizer_of(recipe.classifier, self.classifier, fused)
            self.rules.append((recipe.classifier, self.classifier_optimizer))
        self._learners = nn.ModuleList([self.net] if self.classifier is None else [self.net, self.classifier])
        self.averages: AveragedModel | None = None
        if recipe.averaging:
            self.averages = AveragedModel(self._learners, multi_avg_fn=get_ema_multi_avg_fn(recipe.averaging))
        self.labels_met: LabelsMet | None = None
        if recipe.negatives == "met":
            self.labels_met = LabelsMet(len(self.train_labels), data.num_classes, self.device)
        self.rows: list[Row] = []

    @property
    def finished(self) -> bool:
        return len(self.rows) == self.epochs

    @property
    def steps_per_epoch(self) -> int:
        return len(self._split(len(self.train_labels), self.recipe.batch_size))

    def _split(self, rows: int, batch: int) -> list[int]:
        """Rows in each batch; a last one too small to make negatives from goes with the one before."""
        whole, rest = divmod(rows, batch)
        sizes = [batch] * whole + [rest] * (rest > 0)
        if len(sizes) > 1 and sizes[-1] < self.fewest_rows:
            sizes[-2:] = [sum(sizes[-2:])]
        return sizes

    def settings(self) -> dict[str, Any]:
        """All that decides the numbers of this run, as plain values."""
        words = ("source", "assumed", "published", "published_on")
        recipe = {name: value for name, value in asdict(self.recipe).items() if name not in words}
        # A checkpoint from before there were others lacks them.
        for name, usual in (("negatives_temperature", 1), ("test_shift", 0)):
            if recipe[name] == usual:
                del recipe[name]
        return {
            **recipe,
            "epochs": self.epochs,
            "seed": self.seed,
            "data": f"{self.data.name} ({fingerprint(self.data)})",
            "device": self.device.type,
            "compute_dtype": str(self.compute_dtype),
            "skip_below": self.skip_below,
        }

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        return {"rows": self.rows, **parts}

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from `state`, which a run with the same settings has saved.

        Raises:
            ValueError: where that is not so; nothing is changed then.
        """
        parts = self._parts()
        wanted = ["rows", *parts]
        if not isinstance(state, dict) or set(state) != set(wanted):
            found = list(state) if isinstance(state, dict) else type(state).__name__
            raise ValueError(f"state: {found}, not a dict of {wanted}")
        check_rows(state["rows"], self.epochs, len(self.net), self.classifier is not None)
        done = len(state["rows"])
        steps_of = self._steps_of_layers(done)
        checked: dict[str, dict[str, Any]] = {
            name: checkpoint.module_state(name, state[name], part)
            if isinstance(part, nn.Module)
            else checkpoint.optimizer_state(
                name, state[name], part, steps_of.get(name) or [done * self.steps_per_epoch]
            )
            for name, part in parts.items()
        }
        for name, part in parts.items():
            part.load_state_dict(checked[name])
        self.rows = list(state["rows"])

    def _steps_of_layers(self, epochs: int) -> dict[str, list[int]]:
        """How many steps each optimizer of the network has taken with each parameter after so many epochs."""
        if self.overlapped is not None:
            taken = epochs * self.steps_per_epoch
            return {
                name: [(taken + index % 2) // 2] * sum(len(group["params"]) for group in optimizer.param_groups)
                for index, (name, optimizer) in enumerate(self._optimizers().items())
            }
        each = self.steps_per_epoch * max(1, self.recipe.layerwise_steps)
        steps = []
        for i, layer in enumerate(self.net):
            learnt = sum(self._learns(i, epoch) for epoch in range(1, epochs + 1))
            steps += [learnt * each] * len(list(layer.parameters()))
        return {"net_optimizer": steps}

    def _optimizers(self) -> dict[str, Optimizer]:
        """Those of the network by their names in a checkpoint."""
        return {f"net_optimizer{f'_{i}' if i else ''}": optimizer for i, optimizer in enumerate(self.net_optimizers)}

    def _parts(self) -> dict[str, nn.Module | Optimizer]:
        parts: dict[str, nn.Module | Optimizer] = {"net": self.net, **self._optimizers()}
        if self.classifier is not None:
            parts |= {"classifier": self.classifier, "classifier_optimizer": self.classifier_optimizer}
        if self.averages is not None:
            parts["averages"] = self.averages
        if self.labels_met is not None:
            parts["labels_met"] = self.labels_met
        return parts

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
        self._set_learning(epoch)
        totals = self._train(epoch, after_step)
        if totals is None:
            return None
        averages = totals.averages(self.processes)
        if not all(map(math.isfinite, averages["loss"])):
            raise FloatingPointError(f"epoch {epoch}: the training has diverged, its losses are {averages['loss']}")
        with self._averaged(for_good=epoch == self.epochs):
            if self.recipe.settling:
                self._settle()
            trained = time.monotonic()
            labelled = self.label_field or self.recipe.of_classes
            by_goodness = labelled and (epoch % self.recipe.goodness_every == 0 or epoch == self.epochs)
            row = {
                "epoch": epoch,
                "lr": self.recipe.layers.lr * factor,
                **averages,
                "test_error_classifier": None if self.classifier is None else self.classifier_error(),
                "test_error_goodness": self.goodness_error() if by_goodness else None,
                "train_seconds": round(trained - start, 3),
                "seconds": round(time.monotonic() - start, 3),
            }
        self.rows.append(row)
        return row

    def lr_factor(self, epoch: int) -> float:
        """What the learning rates are multiplied by in an epoch (from 1)."""
        cooldown, least = self.recipe.cooldown, self.recipe.cosine
        if least is not None:
            return least + (1 - least) * (1 + math.cos(math.pi * (epoch - 1) / self.epochs)) / 2
        return 1.0 if cooldown is None else min(1.0, (cooldown + 2 * (self.epochs - epoch)) / self.epochs)

    def _set_lr(self, factor: float) -> None:
        for rule, optimizer in self.rules:
            for group in optimizer.param_groups:
                group["lr"] = rule.lr * factor

    def _set_learning(self, epoch: int) -> None:
        """Which layers learn in an epoch (from 1)."""
        for i, layer in enumerate(self.net):
            if i < len(self.recipe.convolutions) and self.recipe.convolutions[i].learns is not None:
                layer.requires_grad_(self._learns(i, epoch))

    def _learns(self, index: int, epoch: int) -> bool:
        window = self.recipe.convolutions[index].learns if index < len(self.recipe.convolutions) else None
        return window is None or window[0] < epoch <= window[1]

    def _train(self, epoch: int, after_step: Callable[[Callable[[], str]], bool]) -> Totals | None:
        totals = Totals(self.net, self.skip_below)
        for batch in self.minibatches(epoch):
            results, logits = self.step(batch)
            if self.averages is not None:
                self.averages.update_parameters(self._learners)
            totals.add(results, batch, None if logits is None else logits.argmax(1) != batch.labels)
            if after_step(totals.describe) and totals.rows < len(self.train_labels):
                return None
        return totals

    @contextmanager
    def _averaged(self, for_good: bool) -> Iterator[None]:
        """Puts the averages of what is trained in its place, for this while or for good."""
        if self.averages is None:
            yield
            return
        kept = [p.detach().clone() for p in self._learners.parameters()]
        _copy(self.averages.module.parameters(), self._learners)
        done = False
        try:
            yield
            done = True
        finally:
            if not (for_good and done):
                _copy(kept, self._learners)

    @torch.no_grad()
    def _settle(self) -> None:
        """Takes the running statistics anew, as the mean of those of some minibatches of images as they are."""
        norms = [module for module in self.net.modules() if isinstance(module, nn.BatchNorm2d)]
        momenta = [norm.momentum for norm in norms]
        generator = torch.Generator(self.device).manual_seed(self.seed)
        learning = [p for p in self.net.parameters() if p.requires_grad]
        self.net.requires_grad_(False)
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None
            size = self.recipe.batch_size
            batches = zip(self.train_images.split(size), self.train_labels.split(size), strict=True)
            for images, labels in islice(batches, self.recipe.settling):
                x = self._as_input(images)
                if self.overlapped is None:
                    self.net.step(x, None, None, labels=labels)
                else:
                    self.overlapped.observe(x, labels, self._wrong_label(labels, generator))
        finally:
            for parameter in learning:
                parameter.requires_grad_(True)
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum

    def minibatches(self, epoch: int) -> Iterator[Minibatch]:
        """The minibatches of an epoch (from 1), as `run_epoch` trains on them.

        Order, shifts and negatives are decided by seed and epoch. Nothing is trained here; negatives that the
        classifier draws are those of the network as it is when a minibatch is asked for: `step` on one before the next.

        Raises:
            TypeError, ValueError: with the first minibatch, for an epoch that is no whole number from 1.
        """
        _whole_number("epoch", epoch)
        if epoch < 1:
            raise ValueError(f"epoch={epoch} is not at least 1")
        recipe, classes = self.recipe, self.data.num_classes
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(f"{self.seed} {epoch}".encode()))
        order = torch.randperm(len(self.train_labels), generator=generator, device=self.device)
        first, sizes = (epoch - 1) * self.steps_per_epoch, self._split(len(order), recipe.batch_size)
        of_all = self.train_labels.index_select(0, order)
        minibatches = zip(order.split(sizes), of_all.split(sizes), strict=True)
        for index, (rows, labels) in enumerate(minibatches, first):
            # Row by row in whole, which indexing is eight times slower at.
            images = self.train_images.index_select(0, rows)
            if recipe.rotation or recipe.zoom:
                images = turned(images, recipe.rotation, recipe.zoom, generator, self.data.shape)
            if recipe.jitter:
                images = shifted(images, recipe.jitter, generator, self.data.shape)
            if recipe.flips:
                images = flipped(images, generator, self.data.shape)
            x = self._as_input(images)
            if recipe.dropout:
                x = dropped(x, recipe.dropout, generator)
            own = self.processes.own(len(labels))
            if recipe.of_classes:
                yield Minibatch(len(labels), x[own], None, labels[own])
                continue
            if recipe.negatives == "hybrid":
                yield Minibatch(len(labels), x[own], self._hybrid_images(x, generator)[own], labels[own])
                continue
            features = logits = shared = None
            x, of_own = x[own], labels[own]
            if recipe.negatives in ("classifier", "met"):
                features, shared = self._features_and_shared(x)
                logits = self._logits(features)
                cooled = logits if recipe.negatives_temperature == 1 else logits / recipe.negatives_temperature
                wrong = hard_label(cooled, of_own, generator, len(labels), own)
                if self.labels_met is not None:
                    wrong = self.labels_met.hardest(rows, wrong, generator)
            else:
                wrong = self._wrong_label(labels, generator)[own]
            of_rows: dict[str, Any] = {"wrong": wrong, "index": index, "images": rows[own]}
            if self.overlapped is not None:
                yield Minibatch(len(labels), x, x, of_own, features, logits, **of_rows)
                continue
            sides = labelled_sides(x, of_own, wrong, classes, recipe.label_value)
            yield Minibatch(len(labels), *sides, of_own, features, logits, shared, **of_rows)

    def step(self, batch: Minibatch) -> tuple[Sequence[StepResult | None], Tensor | None]:
        """Trains layers and classifier on a minibatch, at the learning rates of the last `run_epoch` or the first.

        Returns:
            What the layers' steps give, None for one without a loss; the classifier's logits `[rows, classes]` from
            before its own step, None without a classifier.
        """
        x_pos, x_neg, features = batch.x_pos, batch.x_neg, batch.features
        if features is not None and batch.logits is not None:
            self._step_classifier(features, batch.labels, batch.logits, batch.rows)
        if self.overlapped is not None:
            assert batch.wrong is not None
            of_blocks = self.overlapped.step(x_pos, batch.labels, batch.wrong, batch.index, self.skip_below)
            self._meet(batch, of_blocks)
            return of_blocks, batch.logits
        options: dict[str, Any] = {"skip_below": self.skip_below}
        if self.recipe.of_classes:
            options["labels"] = batch.labels
        if self.classifier is None:
            return self._step(x_pos, x_neg, options), None
        if batch.logits is not None:
            # Of a minibatch that others came after, the product is of weights that are gone.
            if batch.shared is not None and batch.shared.version == next(iter(self.net)).weight._version:
                options["product"] = batch.shared.product
            results = self._step(x_pos, x_neg, options)
            self._meet(batch, results)
            return results, batch.logits
        if self.label_field:
            assert x_neg is not None
            results, features = self.trained.step_and_features(
                x_pos, x_neg, self.net_optimizer, self.label_field, **options
            )
        else:
            results = self.trained.step(x_pos, x_neg, self.net_optimizer, keep=True, **options)
            features = self.net.features_of(results, self.recipe.classifier_layers)
        logits = self._logits(features)
        self._step_classifier(features, batch.labels, logits, batch.rows)
        return results, logits

    def _meet(self, batch: Minibatch, results: Sequence[StepResult | None]) -> None:
        if self.labels_met is not None:
            assert batch.images is not None and batch.wrong is not None
            last = [result for result in results if result is not None][-1]
            self.labels_met.add(batch.images, batch.wrong, last.goodness_pos, last.goodness_neg)

    def _features_and_shared(self, x: Tensor) -> tuple[Tensor, Shared | None]:
        """The classifier's features, and what their pass has in common with the step, where that is shared.

        It is where one process multiplies float32 numbers on a CPU: elsewhere nobody has measured whether that pays,
        and rounded operands are not parted at the label's end.
        """
        weight, recipe = next(iter(self.net)).weight, self.recipe
        is_float32 = self.compute_dtype in (None, weight.dtype) and not check.autocast_is_on(self.device)
        is_alone = self.device.type == "cpu" and self.processes.size == 1
        if self.overlapped is not None or recipe.layerwise_steps or not is_float32 or not is_alone:
            return self._features(x), None
        features, product = self.net.features_and_product(x, recipe.classifier_layers, self.label_field)
        return features, None if product is None else Shared(product, weight._version)

    def _hybrid_images(self, x: Tensor, generator: torch.Generator) -> Tensor:
        _, height, width = self.data.shape
        return hybrid_images(x, generator, height=height, width=width)

    def _wrong_label(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        if self.recipe.negatives == "shuffled":
            return labels[torch.randperm(len(labels), generator=generator, device=self.device)]
        return wrong_label(labels, self.data.num_classes, generator)

    def _step(self, x_pos: Tensor, x_neg: Tensor | None, options: dict[str, Any]) -> list[StepResult]:
        if not self.recipe.layerwise_steps:
            return self.trained.step(x_pos, x_neg, self.net_optimizer, label_field=self.label_field or None, **options)
        self.trained.train_layerwise(x_pos, x_neg, self.net_optimizer, self.recipe.layerwise_steps, **options)
        # Without an optimizer a step changes nothing and says where the layers have come to.
        results = self.trained.step(x_pos, x_neg, None, **options)
        self.net.zero_grad()
        return results

    @torch.no_grad()
    def _logits(self, features: Tensor) -> Tensor:
        assert self.classifier is not None
        logits: Tensor = self.classifier(features)
        return logits

    @torch.no_grad()
    def _step_classifier(self, features: Tensor, labels: Tensor, logits: Tensor, rows: int) -> None:
        """Trains the classifier, which has these logits: `dW = (softmax - one_hot)^T features / rows`."""
        assert self.classifier is not None
        error = logits.softmax(1).sub_((labels[:, None] == self._classes).to(logits.dtype))
        gradient = (error.t() @ features).div_(rows)
        self.classifier.weight.grad = self.processes.sum(gradient)
        self.classifier_optimizer.step()

    def _as_input(self, images: Tensor) -> Tensor:
        columns = self.data.num_classes if self.recipe.label == "columns" else 0
        x = as_input(images, self.recipe.pixel_mean, self.recipe.pixel_std, columns)
        if not self.recipe.convolutions:
            return x
        return x.view(-1, *self.data.shape).contiguous(memory_format=torch.channels_last)

    def _features(self, x: Tensor) -> Tensor:
        if self.overlapped is not None:
            return x.flatten(1)
        return self.net.features(x, self.recipe.classifier_layers, num_classes=self.label_field)

    @torch.no_grad()
    def classifier_error(self) -> float:
        """Share of the test images that the classifier gets wrong."""
        classifier = self.classifier
        assert classifier is not None
        return self.test_error(lambda x: classifier(self._features(x)).argmax(1))

    def goodness_error(self) -> float:
        """Share of the test images for which a wrong label has the highest goodness."""
        classes, layers = self.data.num_classes, self.recipe.goodness_layers
        if self.overlapped is not None:
            overlapped = self.overlapped
            shift, blank = self.recipe.test_shift, -self.recipe.pixel_mean / self.recipe.pixel_std
            return self.test_error(lambda x: overlapped.predict(x, classes, layers, shift, blank))
        return self.test_error(lambda x: self.net.predict(x, classes, layers, self.recipe.label_value))

    def test_error(self, predict: Callable[[Tensor], Tensor]) -> float:
        """Share of the test images of which `predict`, called on rows as the network takes them, gives no label."""
        wrong = torch.zeros((), dtype=torch.int64, device=self.device)
        with self._evaluating():
            for i, (images, labels) in enumerate(self._test_batches()):
                if i % self.processes.size == self.processes.rank:
                    wrong += (predict(self._as_input(images)) != labels).sum()
        wrong = self.processes.sum(wrong)
        return int(wrong) / len(self.test_labels)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        was_training = self.net.training
        self.net.eval()
        try:
            yield
        finally:
            self.net.train(was_training)

    def _test_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        sizes = self._split(len(self.test_labels), EVALUATION_ROWS)
        yield from zip(self.test_images.split(sizes), self.test_labels.split(sizes), strict=True)

    @torch.no_grad()
    def test_goodness(self) -> tuple[Tensor, Tensor]:
        """Goodness `[N, layers]` of the test images as positive rows, and as negative ones (uniformly drawn labels).

        Of classes, that of the right one and the highest of the others.
        """
        with self._evaluating():
            return self._test_goodness()

    def _test_goodness(self) -> tuple[Tensor, Tensor]:
        classes = self.data.num_classes
        generator = torch.Generator(self.device).manual_seed(self.seed)
        goodness: tuple[list[Tensor], list[Tensor]] = ([], [])
        for images, labels in self._test_batches():
            x = self._as_input(images)
            if self.recipe.of_classes:
                of_all = self.net.goodness(x)
                right = (labels[:, None] == torch.arange(classes, device=x.device))[:, None]
                goodness[0].append(of_all.masked_fill(~right, 0).sum(2))
                goodness[1].append(of_all.masked_fill(right, -math.inf).amax(2))
                continue
            if self.recipe.negatives == "hybrid":
                sides = x, self._hybrid_images(x, generator)
            else:
                wrong = wrong_label(labels, classes, generator)
                if self.overlapped is not None:
                    for of_side, side in zip((labels, wrong), goodness, strict=True):
                        side.append(self.overlapped.goodness(x, of_side))
                    continue
                sides = labelled_sides(x, labels, wrong, classes, self.recipe.label_value)
            for rows, side in zip(sides, goodness, strict=True):
                side.append(self.net.goodness(rows))
        return torch.cat(goodness[0]).cpu(), torch.cat(goodness[1]).cpu()


@torch.no_grad()
def _copy(values: Iterable[Tensor], into: nn.Module) -> None:
    for p, value in zip(into.parameters(), values, strict=True):
        p.copy_(value)


def _whole_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} is not a whole number")
