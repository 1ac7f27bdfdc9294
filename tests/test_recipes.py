"""The published recipes, held against what their sources compute, written out by hand; results as data."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ffkernels as ff
from bench.originals import HintonSGD
from ffkernels.recipes import batches, picture
from ffkernels.recipes.catalogue import (
    FFLIB,
    GROUPED_MNIST,
    HINTON_MATLAB,
    HINTON_UNSUPERVISED,
    LOEWEX,
    MOHAMMADPZ,
    MONO_FORWARD,
    RECIPES,
    Recipe,
)
from ffkernels.recipes.metrics import describe
from ffkernels.recipes.processes import Processes
from ffkernels.recipes.run import train
from ffkernels.recipes.totals import Totals
from ffkernels.recipes.train import Trainer

from .toy_data import toy_data

SMALL = {
    "hinton-matlab": replace(HINTON_MATLAB, hidden=(60, 40, 40), batch_size=50),
    "hinton-unsupervised": replace(HINTON_UNSUPERVISED, hidden=(60, 40, 40), batch_size=50),
    "hinton-jitter": replace(RECIPES["hinton-jitter"], hidden=(60, 40, 40, 30), batch_size=50),
    "loewex": replace(LOEWEX, hidden=(60, 40, 40), batch_size=50),
    "mohammadpz": replace(MOHAMMADPZ, hidden=(40, 30), layerwise_steps=40),
    "fflib": replace(FFLIB, hidden=(60, 40), batch_size=50),
    "grouped-mnist": replace(GROUPED_MNIST, hidden=(60, 43), batch_size=50, dropout=0.2, jitter=1),
    "mono-forward": replace(MONO_FORWARD, hidden=(60, 40), batch_size=50),
}


@pytest.fixture(scope="module")
def data():
    return toy_data()


def run(recipe: Recipe, data, epochs: int | None = None, **options: object) -> Trainer:
    trainer = Trainer(recipe, data, epochs=epochs, **options)
    while not trainer.finished:
        trainer.run_epoch(lambda describe: False)
    return trainer


class MatlabLayer:
    """A layer of Hinton's Matlab code, in float64: pos, neutral and neg pass, averages, pull, update."""

    def __init__(self, layer: ff.FFLinear) -> None:
        self.weight, self.bias = layer.weight.detach().double().T.clone(), layer.bias.detach().double().clone()
        self.mean = torch.full_like(self.bias, 0.5)
        self.average = [torch.zeros_like(self.weight), torch.zeros_like(self.bias)]

    def states(self, x: Tensor) -> tuple[Tensor, Tensor]:
        normed = x / (1e-20 + x.square().mean(1, keepdim=True).sqrt())
        return normed, (normed @ self.weight + self.bias).relu()

    def update(self, pos: Tensor, neg: Tensor, gain: float) -> None:
        width, rows = len(self.bias), len(pos)
        (n_pos, y_pos), (n_neg, y_neg) = self.states(pos), self.states(neg)
        d_pos = (1 - torch.sigmoid(y_pos.square().sum(1, keepdim=True) - width)) * y_pos
        self.mean = 0.9 * self.mean + 0.1 * y_pos.mean(0)
        d_pos = d_pos + 0.03 * (self.mean.mean() - self.mean)
        d_neg = -torch.sigmoid(y_neg.square().sum(1, keepdim=True) - width) * y_neg
        gradients = (n_pos.T @ d_pos + n_neg.T @ d_neg) / rows, (d_pos.sum(0) + d_neg.sum(0)) / rows
        self.average = [0.9 * a + 0.1 * g for a, g in zip(self.average, gradients, strict=True)]
        self.bias = self.bias + gain * 0.01 * self.average[1]
        self.weight = self.weight + gain * 0.01 * (self.average[0] - 1e-3 * self.weight)


def test_hintons_steps_are_his(data, monkeypatch) -> None:
    """Three minibatches in each of two epochs: shared products, hard negatives, head, pull, decay and cool-down."""
    recipe = replace(SMALL["hinton-matlab"], batch_size=200)
    trainer = Trainer(recipe, data, epochs=2, seed=3)
    mine = [MatlabLayer(layer) for layer in trainer.net]
    head = torch.zeros(80, 10, dtype=torch.float64)
    head_average = torch.zeros_like(head)
    step, seen = trainer.net.step, []
    drawn = batches.hard_label
    logits_seen = []
    monkeypatch.setattr(
        "ffkernels.recipes.train.hard_label", lambda z, *rest: logits_seen.append(z.clone()) or drawn(z, *rest)
    )

    def follow(x_pos, x_neg, *rest, **options):
        seen.append(1)
        gain = 1.0 if len(seen) <= 3 else 0.5  # (1 + 2 (2 - e)) / 2, at most 1
        nonlocal head, head_average
        assert torch.equal(x_pos[:, 10:], x_neg[:, 10:])
        assert (x_pos[:, :10].argmax(1) != x_neg[:, :10].argmax(1)).all()
        y = x_pos.double().clone()
        y[:, :10] = 0.1
        features = []
        for layer in mine:
            _, y = layer.states(y)
            features.append(y / (1e-20 + y.square().mean(1, keepdim=True).sqrt()))
        features = torch.cat(features[1:], 1)
        logits = features @ head
        torch.testing.assert_close(logits_seen[-1].double(), logits, rtol=1e-3, atol=1e-4)
        error = x_pos[:, :10].double() - logits.softmax(1)
        head_average = 0.9 * head_average + 0.1 * features.T @ error / len(error)
        head = head + gain * 0.1 * (head_average - 0.003 * head)
        pos, neg = x_pos.double(), x_neg.double()
        for layer in mine:
            above = layer.states(pos)[1], layer.states(neg)[1]
            layer.update(pos, neg, gain)
            pos, neg = above
        return step(x_pos, x_neg, *rest, **options)

    trainer.net.step = follow
    for _ in range(2):
        trainer.run_epoch(lambda describe: False)
    assert len(seen) == 6
    for layer, his in zip(trainer.net, mine, strict=True):
        torch.testing.assert_close(layer.weight.double().T, his.weight, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(layer.bias.double(), his.bias, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(layer.peer_mean.double(), his.mean, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(trainer.classifier.weight.double().T, head, rtol=1e-3, atol=1e-6)


def test_averaged_decoupled_sgd_is_hintons(data) -> None:
    trainer = Trainer(SMALL["hinton-matlab"], data, epochs=1)
    trainer._set_lr(0.7)
    parameters = [nn.Parameter(p.detach().double()) for p in trainer.net.parameters()]
    trainer.net.double()
    theirs = HintonSGD(parameters, lr=0.007)
    for state in trainer.net_optimizer.state.values():
        state["momentum_buffer"] = state["momentum_buffer"].double()
    for _ in range(4):
        for mine, other in zip(trainer.net.parameters(), parameters, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        trainer.net_optimizer.step()
        theirs.step()
    for mine, other in zip(trainer.net.parameters(), parameters, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("name", SMALL)
def test_recipes_learn_and_stop_and_go_on(name: str, data, tmp_path) -> None:
    recipe = SMALL[name]
    recipe, epochs = (recipe, 1) if name == "mohammadpz" else (replace(recipe, batch_size=20), 4)
    trainer = run(recipe, data, epochs, skip_below=1e-6)
    last = trainer.rows[-1]
    by_classifier, by_goodness = last["test_error_classifier"], last["test_error_goodness"]
    assert (by_classifier is None) == (recipe.classifier is None)
    assert (by_goodness is None) == (name == "hinton-unsupervised")
    # A goodness of nothing costs mohammadpz (softplus(2) + softplus(-2)) / 2 = 1.13.
    for loss, first in zip(last["loss"], [0.9, 0.9] if epochs == 1 else trainer.rows[0]["loss"], strict=True):
        assert loss < first
    assert all(0 < share <= 1 for share in last["kept"])
    assert "rows kept" in describe(last)
    again = Trainer(recipe, data, epochs=epochs, skip_below=1e-6)
    if epochs > 1:
        for _ in range(2):
            again.run_epoch(lambda describe: False)
        resumed = Trainer(recipe, data, epochs=epochs, skip_below=1e-6)
        resumed.load_state(again.state())
        again = resumed
    while not again.finished:
        again.run_epoch(lambda describe: False)
    for mine, other in zip(again.net.state_dict().values(), trainer.net.state_dict().values(), strict=True):
        assert torch.equal(mine, other)


def test_the_classifiers_gradient_is_that_of_cross_entropy(data) -> None:
    trainer = Trainer(SMALL["loewex"], data, epochs=1)
    features, labels = torch.randn(30, 80), torch.randint(10, (30,))
    nn.init.normal_(trainer.classifier.weight)
    weight = trainer.classifier.weight.detach().clone().requires_grad_()
    nn.functional.cross_entropy(features @ weight.T, labels).backward()
    logits = trainer._logits(features)
    trainer._step_classifier(features, labels, logits, len(labels))
    torch.testing.assert_close(trainer.classifier.weight.grad, weight.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits, (features @ weight.T).detach())


def test_unsupervised_rows_carry_no_label_and_the_read_out_costs_no_pass(data, monkeypatch) -> None:
    trainer = Trainer(SMALL["hinton-unsupervised"], data, epochs=1)
    trainer._set_lr(1.0)
    monkeypatch.setattr(ff.FFNetwork, "_pass", None)
    row = trainer._train(1, lambda describe: False).averages()
    assert math.isfinite(row["train_error_classifier"])


@pytest.mark.parametrize("skip", [0.0, 0.2])
def test_rows_kept_are_counted(skip: float, data) -> None:
    still = replace(SMALL["loewex"], layers=replace(LOEWEX.layers, lr=0.0), batch_size=600)
    trainer = Trainer(still, data, epochs=1, skip_below=skip)
    seen = []
    step = trainer.net.step_and_features
    trainer.net.step_and_features = lambda *a, **o: seen.append(step(*a, **o)) or seen[-1]
    row = trainer.run_epoch(lambda describe: False)
    for layer, result, share in zip(trainer.net, seen[0][0], row["kept"], strict=True):
        logit = torch.cat([layer.out_features - result.goodness_pos, result.goodness_neg - layer.out_features])
        slope = torch.sigmoid(logit)
        wanted = (slope >= skip) if skip else slope != 0
        assert share == pytest.approx(wanted.float().mean().item())
    if skip:
        assert min(row["kept"]) < 1


def test_shifts_are_uniform_and_bring_in_zeros() -> None:
    image = torch.zeros(28, 28, dtype=torch.uint8)
    image[13, 7], image[0, 0], image[27, 27] = 200, 50, 60
    moved = batches.shifted(image.flatten().repeat(5000, 1), 2, torch.Generator().manual_seed(0)).view(-1, 28, 28)
    places = (moved == 200).nonzero()[:, 1:]
    assert len(places) == 5000
    down, right = (places - torch.tensor([13, 7])).T
    counts = ((down + 2) * 5 + right + 2).bincount(minlength=25)
    assert counts.min() > 120 and counts.max() < 280 and len(counts) == 25
    assert torch.equal((moved == 50).flatten(1).any(1), (down >= 0) & (right >= 0))
    assert torch.equal((moved == 60).flatten(1).any(1), (down <= 0) & (right <= 0))
    assert torch.equal(batches.shifted(image.flatten()[None], 0), image.flatten()[None])


@pytest.mark.parametrize("name", ["hard-negatives", *SMALL])
def test_minibatches_are_those_that_an_epoch_trains_on(name: str, data) -> None:
    """One `step` after the other ends where `run_epoch` does; looking at them alone changes nothing."""
    recipe = SMALL.get(name) or replace(RECIPES[name], hidden=(60, 40), batch_size=50)
    recipe = replace(recipe, layerwise_steps=min(recipe.layerwise_steps, 3))
    trainer, other = (Trainer(recipe, data, epochs=2, seed=7) for _ in range(2))
    looked = [list(trainer.minibatches(epoch)) for epoch in (1, 1, 2)]
    for one, again, later in zip(*looked, strict=True):
        assert torch.equal(one.x_pos, again.x_pos)
        assert one.x_neg is again.x_neg is None if recipe.of_classes else torch.equal(one.x_neg, again.x_neg)
        assert not torch.equal(one.x_pos, later.x_pos)
    for batch in trainer.minibatches(1):
        results, logits = trainer.step(batch)
        assert len(results) == len(trainer.net) and (logits is None) == (recipe.classifier is None)
    other.run_epoch(lambda describe: False)
    for mine, theirs in zip(trainer.net.parameters(), other.net.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    if trainer.classifier is not None:
        assert torch.equal(trainer.classifier.weight, other.classifier.weight)


@pytest.mark.parametrize("name", SMALL)
def test_minibatches_hold_every_image_once_under_its_label_and_another(name: str, data) -> None:
    recipe = replace(SMALL[name], jitter=0, dropout=0.0)
    trainer = Trainer(recipe, data, seed=2)
    found = list(trainer.minibatches(3))
    assert [len(batch.labels) for batch in found] == ([600] if name == "mohammadpz" else [50] * 12)
    x_pos, labels = (torch.cat([getattr(b, part) for b in found]) for part in ("x_pos", "labels"))
    pixels = (data.train_images / 255 - recipe.pixel_mean) / recipe.pixel_std
    if recipe.label == "columns":
        pixels = torch.cat([torch.zeros(600, 10), pixels], 1)
    wanted = pixels if recipe.label == "none" else ff.overlay_label(pixels, data.train_labels, 10, recipe.label_value)
    # Each row's digest finds it among the images, whatever the order.
    weights = torch.rand(wanted.shape[1], dtype=torch.float64)
    mine, theirs = (x.double() @ weights for x in (x_pos, wanted))
    torch.testing.assert_close(mine.sort().values, theirs.sort().values, rtol=1e-6, atol=0)
    torch.testing.assert_close(x_pos[mine.argsort()], wanted[theirs.argsort()], rtol=1e-6, atol=1e-6)
    assert torch.equal(labels[mine.argsort()], data.train_labels[theirs.argsort()])
    assert not torch.equal(labels, data.train_labels)
    if recipe.label == "none":
        assert all((batch.x_neg is None) == recipe.of_classes for batch in found)
        return
    x_neg = torch.cat([batch.x_neg for batch in found])
    assert torch.equal(x_neg[:, 10:], x_pos[:, 10:])
    shown = (x_neg[:, :10] == recipe.label_value).float()
    assert torch.equal(shown.sum(1), torch.ones(600))
    right = shown.argmax(1) == labels
    assert right.float().mean() == pytest.approx(0.1, abs=0.05) if recipe.negatives == "shuffled" else not right.any()


def test_inputs_are_dropped_anew_and_the_rest_is_scaled() -> None:
    x = torch.rand(50, 784) + 1
    generator = torch.Generator().manual_seed(0)
    first, second = (batches.dropped(x, 0.2, generator) for _ in range(2))
    kept = first != 0
    assert kept.float().mean() == pytest.approx(0.8, abs=0.01)
    torch.testing.assert_close(first[kept], x[kept] / 0.8)
    assert ((second != 0) == kept).float().mean() == pytest.approx(0.68, abs=0.01)


@pytest.mark.parametrize("skip", [0.0, 0.3])
@pytest.mark.parametrize("name", ["grouped-mnist", "mono-forward"])
def test_metrics_of_classes_are_those_of_the_softmax(name: str, skip: float, data) -> None:
    """One step of the whole set: each layer's loss, goodness of the own class and of the others, rows kept."""
    recipe = replace(SMALL[name], batch_size=600, dropout=0.0, jitter=0)
    trainer = Trainer(recipe, data, epochs=1, skip_below=skip)
    (batch,) = trainer.minibatches(1)
    # A layer hands on what it had before its update.
    of_layers, own = trainer.net.goodness(batch.x_pos).detach(), nn.functional.one_hot(batch.labels, 10).bool()
    row = trainer.run_epoch(lambda describe: False)
    for i in range(2):
        goodness = of_layers[:, i]
        others = goodness[~own]
        assert row["goodness_pos"][i] == pytest.approx(goodness[own].mean().item(), rel=1e-4, abs=1e-6)
        assert row["goodness_neg"][i] == pytest.approx(others.mean().item(), rel=1e-4, abs=1e-6)
        loss = nn.functional.cross_entropy(goodness, batch.labels)
        assert row["loss"][i] == pytest.approx(loss.item(), rel=1e-4)
        kept = ((goodness.softmax(1) - own.float()).abs() >= max(skip, 1e-30)).any(1)
        assert row["kept"][i] == pytest.approx(kept.float().mean().item(), abs=2e-3)


@pytest.mark.parametrize("name", ["grouped-mnist", "mono-forward"])
def test_classes_are_predicted_and_shown_by_their_goodness(name: str, data) -> None:
    trainer = run(replace(SMALL[name], batch_size=20, dropout=0.0, jitter=0), data, 4)
    x, labels = data.test_images / 255, data.test_labels
    goodness = trainer.net.goodness(x)
    wrong = (goodness.sum(1).argmax(1) != labels).float().mean().item()
    assert trainer.rows[-1]["test_error_goodness"] == pytest.approx(wrong) and wrong < 0.1
    own, others = trainer.test_goodness()
    right = goodness.argmax(2) == labels[:, None]
    assert torch.equal(own > others, right)
    torch.testing.assert_close(torch.maximum(own, others), goodness.detach().amax(2))


@pytest.mark.parametrize(("epoch", "error"), [(0, ValueError), (1.0, TypeError), (True, TypeError)])
def test_minibatches_of_no_epoch(epoch, error, data) -> None:
    with pytest.raises(error, match=f"epoch={epoch} is not"):
        next(Trainer(SMALL["loewex"], data).minibatches(epoch))


def test_inputs_are_standardised_and_padded() -> None:
    images = torch.tensor([[0, 51, 255]], dtype=torch.uint8)
    torch.testing.assert_close(batches.as_input(images, 0.1, 0.5, 2), torch.tensor([[0, 0, -0.2, 0.2, 1.8]]))
    assert MOHAMMADPZ.label_value == pytest.approx(2.8215, abs=1e-4)


def test_sides_are_one_piece_of_memory() -> None:
    x, labels, wrong = torch.rand(4, 12), torch.tensor([0, 1, 2, 0]), torch.tensor([1, 2, 0, 2])
    x_pos, x_neg = batches.labelled_sides(x, labels, wrong, 3, 2.0)
    assert torch.equal(x_pos, ff.overlay_label(x, labels, 3, 2.0))
    assert torch.equal(x_neg, ff.overlay_label(x, wrong, 3, 2.0))
    assert x_pos.data_ptr() + 4 * 12 * 4 == x_neg.data_ptr()


@pytest.mark.parametrize("name", ["hinton-matlab", "hinton-jitter"])
def test_minibatches_are_made_without_waiting_for_the_device(name: str) -> None:
    """Meta tensors hold no values: whatever would bring one to the host raises."""
    recipe = SMALL[name]
    images = torch.zeros(6, 784, dtype=torch.uint8, device="meta")
    labels = torch.zeros(6, dtype=torch.int64, device="meta")
    x = batches.as_input(batches.shifted(images, recipe.jitter) if recipe.jitter else images)
    wrong = batches.hard_label(torch.zeros(6, 10, device="meta"), labels)
    assert batches.labelled_sides(x, labels, wrong, 10)[1].shape == x.shape


@pytest.mark.parametrize("name", SMALL)
def test_pictures_of_every_kind_of_recipe(name: str, data, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    trainer = run(SMALL[name], data, 1)
    picture.draw(trainer, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 20_000


def test_hard_negatives_are_drawn_at_a_temperature(data, monkeypatch) -> None:
    drawn, seen = batches.hard_label, []
    monkeypatch.setattr("ffkernels.recipes.train.hard_label", lambda z, *rest: seen.append(z) or drawn(z, *rest))
    trainer = Trainer(replace(SMALL["hinton-matlab"], negatives_temperature=4.0), data)
    trainer.run_epoch(lambda describe: False)
    batch = next(trainer.minibatches(2))
    torch.testing.assert_close(seen[-1], batch.logits / 4)
    assert trainer.settings()["negatives_temperature"] == 4.0
    assert "negatives_temperature" not in Trainer(SMALL["hinton-matlab"], data).settings()
    assert seen[-1].abs().max() > 0.01


def test_labels_met_go_on_to_the_same_numbers_and_are_kept_by_one_process(data) -> None:
    recipe = replace(SMALL["hinton-matlab"], negatives="met")
    trainer = run(recipe, data, 3)
    first, resumed = (Trainer(recipe, data, epochs=3) for _ in range(2))
    first.run_epoch(lambda describe: False)
    resumed.load_state(first.state())
    # An image has met a label in each epoch, some of them one twice.
    assert (resumed.labels_met.lacked.isfinite().sum(1) == 1).all()
    while not resumed.finished:
        resumed.run_epoch(lambda describe: False)
    assert resumed.rows[-1]["loss"] == trainer.rows[-1]["loss"]
    met = trainer.labels_met.lacked.isfinite().sum(1)
    assert torch.equal(resumed.labels_met.lacked, trainer.labels_met.lacked) and met.min() == 1 and met.max() == 3
    two = Processes()
    two.size = 2
    with pytest.raises(ValueError, match="2 processes; hinton-matlab trains on one"):
        Trainer(recipe, data, processes=two)


def test_a_product_that_neutral_pass_and_step_share_changes_rounding_alone(data, monkeypatch) -> None:
    recipe = replace(SMALL["hinton-matlab"], batch_size=200)
    shares = run(recipe, data, 1)
    assert next(shares.minibatches(2)).shared is not None
    assert next(Trainer(recipe, data, compute_dtype=torch.bfloat16).minibatches(1)).shared is None
    monkeypatch.setattr(Trainer, "_features_and_shared", lambda self, x: (self._features(x), None))
    for mine, other in zip(shares.net.parameters(), run(recipe, data, 1).net.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_a_product_of_weights_that_are_gone_is_not_read(data) -> None:
    one, other = (Trainer(replace(SMALL["hinton-matlab"], batch_size=200), data) for _ in range(2))
    first, second = islice(one.minibatches(1), 2)
    for batch in (first, second):
        one.step(batch)
        other.step(replace(batch, shared=None if batch is second else batch.shared))
    for mine, of_other in zip(one.net.parameters(), other.net.parameters(), strict=True):
        assert torch.equal(mine, of_other)


def test_every_recipe_says_where_it_is_from() -> None:
    for name, recipe in RECIPES.items():
        assert recipe.name == name and recipe.source
    assert set(SMALL) <= set(RECIPES) and "hinton-supervised" in RECIPES


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("count", [1, 2, 51, 101])
def test_any_number_of_images_is_trained_on(name: str, count: int, tmp_path: Path) -> None:
    """Batches of 50: one alone, fewer than a batch, a last batch of one; 1,001 test images leave one of them, too."""
    recipe = replace(SMALL[name], layerwise_steps=min(SMALL[name].layerwise_steps, 3))
    hybrids = recipe.negatives == "hybrid"
    data = toy_data(count, 1001)
    if hybrids and count == 1:
        with pytest.raises(ValueError, match="1 training and 1001 test images; hinton-unsupervised needs at least 2"):
            Trainer(recipe, data)
        return
    trainer = Trainer(recipe, data, epochs=1)
    seen = []
    add = Totals.add
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Totals, "add", lambda self, r, *rest: seen.append(len(r[0].goodness_pos)) or add(self, r, *rest))
        assert train(trainer, tmp_path)
    whole = {1: [1], 2: [2], 51: [51] if hybrids else [50, 1], 101: [50, 51] if hybrids else [50, 50, 1]}[count]
    assert seen == ([count] if name == "mohammadpz" else whole)
    assert len(seen) == trainer.steps_per_epoch
    row = trainer.rows[0]
    assert all(map(math.isfinite, row["loss"]))
    if trainer.classifier is not None:
        images, labels = data.test_images, data.test_labels
        logits = trainer.classifier(trainer._features(trainer._as_input(images)))
        assert row["test_error_classifier"] == (logits.argmax(1) != labels).sum().item() / 1001
    assert [side.shape for side in trainer.test_goodness()] == [(1001, len(trainer.net))] * 2


def test_one_test_image_has_no_hybrid_and_so_no_picture() -> None:
    pytest.importorskip("matplotlib")
    assert "no picture" in str(picture.unavailable(Trainer(SMALL["hinton-unsupervised"], toy_data(20, 1))))
    assert picture.unavailable(Trainer(SMALL["hinton-unsupervised"], toy_data(20, 2))) is None
    trainer = run(SMALL["loewex"], toy_data(20, 1), 1)
    assert picture.unavailable(trainer) is None
    assert trainer.test_goodness()[0].shape == (1, 3)


@pytest.mark.parametrize("name", SMALL)
def test_one_class_is_enough(name: str) -> None:
    data = toy_data(30, 20)
    data = replace(data, train_labels=torch.full((30,), 3), test_labels=torch.full((20,), 3))
    recipe = replace(SMALL[name], layerwise_steps=min(SMALL[name].layerwise_steps, 3))
    row = run(recipe, data, 1).rows[0]
    assert all(map(math.isfinite, row["loss"]))
    if row["test_error_classifier"] is not None:
        assert row["test_error_classifier"] == 0


def test_empty_data_are_refused() -> None:
    for data in (toy_data(0, 5), toy_data(5, 0)):
        with pytest.raises(ValueError, match=r"\d training and \d test images; loewex needs at least 1 and 1"):
            Trainer(SMALL["loewex"], data)
