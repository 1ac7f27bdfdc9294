"""Recipes of convolutional networks: which layers learn when, stops, pictures, and what is trained on."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ffkernels import cli, wrong_label
from ffkernels.recipes import batches, catalogue, picture
from ffkernels.recipes.catalogue import RECIPES, Convolution
from ffkernels.recipes.data import Dataset
from ffkernels.recipes.processes import Processes
from ffkernels.recipes.train import Trainer

from .toy_data import toy_data, write_idx

LAYERS = (Convolution(10), Convolution(10, by_class=True, pool=2), Convolution(20, by_class=True, pool=2))
SMALL = replace(
    RECIPES["cwc-mnist"], convolutions=LAYERS, batch_size=20, classifier_layers=(2,), goodness_layers=(2,), epochs=4
)


def textures(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of ten kinds of tiles of four by four, in noise: what a goodness over all places can tell."""
    tiles = torch.randint(2, (10, 4, 4), generator=torch.Generator().manual_seed(9))
    labels = torch.randint(10, (count,), generator=generator)
    noise = torch.randint(100, (count, 28, 28), generator=generator)
    return (tiles.repeat(1, 7, 7)[labels] * 150 + noise).to(torch.uint8).flatten(1), labels


@pytest.fixture(scope="module")
def data() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    return Dataset(*textures(400, generator), *textures(120, generator), name="toy", source="")


def run(recipe, data, epochs: int | None = None, **options) -> Trainer:
    trainer = Trainer(recipe, data, epochs=epochs, **options)
    while not trainer.finished:
        trainer.run_epoch(lambda describe: False)
    return trainer


def assert_equal(one: Trainer, other: Trainer) -> None:
    assert one.rows[-1]["loss"] == other.rows[-1]["loss"]
    for name, value in other.net.state_dict().items():
        assert torch.equal(one.net.state_dict()[name], value), name
    assert torch.equal(one.classifier.weight, other.classifier.weight)


def test_settled_statistics_are_those_of_images_as_they_are(data) -> None:
    recipe = replace(SMALL, jitter=1, dropout=0.3, settling=3)
    trainer = run(recipe, data, epochs=2)
    assert [p.requires_grad for p in trainer.net.parameters()] == [True] * len(list(trainer.net.parameters()))
    plain = run(replace(recipe, settling=0), data, epochs=2)
    for (name, value), other in zip(trainer.net.named_parameters(), plain.net.parameters(), strict=True):
        assert torch.equal(value, other), name
    first = next(iter(trainer.net))
    maps = [
        torch.relu(torch.conv2d(images.view(-1, 1, 28, 28) / 255, first.weight, first.bias, padding=1))
        for images in trainer.train_images[:60].split(20)
    ]
    mean = torch.stack([p.mean((0, 2, 3)) for p in maps]).mean(0)
    variance = torch.stack([p.var((0, 2, 3)) for p in maps]).mean(0)
    torch.testing.assert_close(first.batch_norm.running_mean, mean)
    torch.testing.assert_close(first.batch_norm.running_var, variance)
    assert first.batch_norm.momentum == 0.1 and not torch.equal(mean, next(iter(plain.net)).batch_norm.running_mean)


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_it_learns_and_goes_on_to_the_same_numbers(compute_dtype, data) -> None:
    recipe = replace(SMALL, jitter=1, flips=True, dropout=0.1)
    trainer = run(recipe, data, compute_dtype=compute_dtype)
    last = trainer.rows[-1]
    # Of ten classes, one in two of which is another one turned.
    assert last["test_error_goodness"] < 0.5 and last["test_error_classifier"] < 0.5
    first = Trainer(recipe, data, compute_dtype=compute_dtype)
    for _ in range(2):
        first.run_epoch(lambda describe: False)
    resumed = Trainer(recipe, data, compute_dtype=compute_dtype)
    resumed.load_state(first.state())
    while not resumed.finished:
        resumed.run_epoch(lambda describe: False)
    assert_equal(resumed, trainer)


def test_averages_are_those_over_steps_and_change_no_step(data) -> None:
    """The numbers of each step are a run's without averages; a test, and the end, go by their averages."""
    recipe, share = replace(SMALL, epochs=2, rotation=10.0, zoom=0.1), 0.9
    plain, average = Trainer(recipe, data), []

    def after_step(describe) -> bool:
        now = [p.detach().double() for p in (*plain.net.parameters(), plain.classifier.weight)]
        average[:] = [share * a + (1 - share) * p for a, p in zip(average, now, strict=True)] if average else now
        return False

    trainer, resumed = (Trainer(replace(recipe, averaging=share), data) for _ in range(2))
    for epoch in range(2):
        plain.run_epoch(after_step)
        trainer.run_epoch(lambda describe: False)
        assert trainer.rows[-1]["loss"] == plain.rows[-1]["loss"]
        if epoch == 0:
            for p, q in zip(trainer.net.parameters(), plain.net.parameters(), strict=True):
                assert torch.equal(p, q)
            resumed.load_state(trainer.state())
    for p, wanted in zip((*trainer.net.parameters(), trainer.classifier.weight), average, strict=True):
        torch.testing.assert_close(p.double(), wanted, rtol=1e-5, atol=1e-7)
    assert trainer.goodness_error() == trainer.rows[-1]["test_error_goodness"]
    assert trainer.classifier_error() == trainer.rows[-1]["test_error_classifier"]
    resumed.run_epoch(lambda describe: False)
    assert_equal(resumed, trainer)


def test_layers_learn_in_epochs_of_their_own(data) -> None:
    windows = ((0, 1), (1, 3), (0, 2))
    recipe = replace(
        SMALL,
        convolutions=tuple(replace(of, learns=w) for of, w in zip(LAYERS, windows, strict=True)),
        epochs=4,
        settling=0,
    )
    trainer = Trainer(recipe, data)
    for epoch in range(4):
        before = [{name: p.clone() for name, p in layer.state_dict().items()} for layer in trainer.net]
        trainer.run_epoch(lambda describe: False)
        for layer, (first, after), old in zip(trainer.net, windows, before, strict=True):
            learnt = first <= epoch < after
            for name, p in layer.named_parameters():
                assert torch.equal(p, old[name]) != learnt, (epoch, name)
            # The statistics follow the layers below, whether or not this one learns.
            assert not torch.equal(layer.batch_norm.running_mean, old["batch_norm.running_mean"])
    resumed = Trainer(recipe, data)
    first = Trainer(recipe, data)
    for _ in range(2):
        first.run_epoch(lambda describe: False)
    resumed.load_state(first.state())
    while not resumed.finished:
        resumed.run_epoch(lambda describe: False)
    assert_equal(resumed, trainer)


def test_what_is_tested_goes_by_running_statistics(data) -> None:
    trainer = run(SMALL, data, 2)
    assert trainer.net.training
    trainer.net.eval()
    x = (data.test_images / 255).view(-1, 1, 28, 28)
    predicted = trainer.net.goodness(x)[:, 2].argmax(1)
    wrong = (predicted != data.test_labels).float().mean().item()
    assert trainer.rows[-1]["test_error_goodness"] == pytest.approx(wrong)
    features = trainer.net.features(x, (2,))
    wrong = (trainer.classifier(features).argmax(1) != data.test_labels).float().mean().item()
    assert trainer.rows[-1]["test_error_classifier"] == pytest.approx(wrong)


def test_minibatches_are_those_that_an_epoch_trains_on(data) -> None:
    one, other = (Trainer(SMALL, data, seed=3) for _ in range(2))
    for batch in one.minibatches(1):
        assert batch.x_pos.is_contiguous(memory_format=torch.channels_last) and batch.x_pos.shape[1:] == (1, 28, 28)
        one.step(batch)
    other.run_epoch(lambda describe: False)
    for mine, theirs in zip(one.net.parameters(), other.net.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_colours(tmp_path: Path) -> None:
    grey = toy_data(60, 40)
    grid = [
        images.view(-1, 1, 28, 28).repeat(1, 3, 1, 1).flatten(1) for images in (grey.train_images, grey.test_images)
    ]
    coloured = Dataset(grid[0], grey.train_labels, grid[1], grey.test_labels, name="toy", source="", shape=(3, 28, 28))
    trainer = run(replace(SMALL, hidden=(30,), classifier_layers=(3,), goodness_layers=(3,)), coloured, 1)
    assert [tuple(layer.weight.shape[:2]) for layer in trainer.net] == [(10, 3), (10, 1), (20, 1), (30, 980)]
    pytest.importorskip("matplotlib")
    picture.draw(trainer, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 20_000


def test_on_the_command_line(tmp_path: Path, monkeypatch, capsys, data) -> None:
    monkeypatch.chdir(tmp_path)
    write_idx(Path("textures"), data)
    monkeypatch.setitem(catalogue.RECIPES, "cwc-mnist", replace(SMALL, name="cwc-mnist", epochs=2))
    arguments = ["train", "--preset", "cwc-mnist", "--data", "textures", "--device", "cpu", "--output", "out"]
    assert cli.main([*arguments, "--no-picture"]) == 0
    out, err = capsys.readouterr()
    assert "cwc-mnist (1-10-10-20) on " in out and "backend: " in err and "epoch 2/2: test error " in err
    assert cli.main([*arguments, "--no-picture", "--resume"]) == 0


def test_deeper_forwards_small_network(data) -> None:
    published = RECIPES["deeper-forward"]
    assert [(of.channels, of.kernel, of.pool) for of in published.convolutions] == [
        (100, 5, 2), (200, 5, 2), (400, 3, 1), (400, 3, 1),
    ]  # fmt: skip
    layers = tuple(replace(of, channels=of.channels // 10) for of in published.convolutions)
    trainer = Trainer(replace(published, convolutions=layers, batch_size=20), data, epochs=4)
    modules = [type(m).__name__ for between in trainer.net.between for m in between]
    assert modules == ["GroupNorm", "GroupNorm", "AvgPool2d", "GroupNorm", "AvgPool2d", "GroupNorm"]
    assert all(layer.bias is None and layer.dropout == 0.2 for layer in trainer.net)
    assert trainer.net.layers[2].weight.std().item() == pytest.approx((2 / (9 * 40)) ** 0.5, rel=0.05)
    rates = []
    while not trainer.finished:
        trainer.run_epoch(lambda describe: False)
        rates.append(trainer.rows[-1]["lr"])
    expected = [0.003 + 0.027 * (1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in range(4)]
    assert rates == pytest.approx(expected)
    assert trainer.rows[-1]["test_error_goodness"] < 0.5


TRIFECTA = replace(
    RECIPES["trifecta-mnist"],
    convolutions=(Convolution(8, pool=2), Convolution(8), Convolution(12, pool=2)),
    layers=replace(RECIPES["trifecta-mnist"].layers, lr=0.02),
    goodness_layers=(1, 2),
    test_shift=0,
    batch_size=20,
    epochs=6,
    jitter=0,
    rotation=0.0,
    zoom=0.0,
    settling=0,
    averaging=0.9,
)


def test_trifectas_blocks_learn_in_turns_and_go_on_to_the_same_numbers(data) -> None:
    trainer = Trainer(TRIFECTA, data, skip_below=0.01)
    images, labels = trainer._as_input(trainer.train_images[:6]), trainer.train_labels[:6]
    before = [p.clone() for p in trainer.net.parameters()]
    results = trainer.net.step(images, labels, (labels + 1) % 10, 0)
    # Of the embedding and three blocks an even step changes the first two blocks; the last one's pass is left out.
    changed = [not torch.equal(p, old) for p, old in zip(trainer.net.parameters(), before, strict=True)]
    assert changed == [False] + 6 * [True] + 3 * [False]
    assert [result is None for result in results] == [True, False, True]
    trainer = run(TRIFECTA, data, skip_below=0.01)
    last = trainer.rows[-1]
    assert last["test_error_goodness"] < 0.5 and min(last["kept"]) < 1
    assert [int(state["step"]) for o in trainer.net_optimizers for state in o.state.values()] == [60] * (4 + 6 + 6)
    resumed, first = (Trainer(TRIFECTA, data, skip_below=0.01) for _ in range(2))
    for _ in range(3):
        first.run_epoch(lambda describe: False)
    resumed.load_state(first.state())
    while not resumed.finished:
        resumed.run_epoch(lambda describe: False)
    assert resumed.rows[-1]["loss"] == last["loss"]
    for name, value in trainer.net.state_dict().items():
        assert torch.equal(resumed.net.state_dict()[name], value), name


def test_trifectas_settled_statistics_are_of_right_and_wrong_labels(data) -> None:
    recipe = replace(TRIFECTA, jitter=1)
    trainer = run(replace(recipe, settling=3), data, 2)
    net, plain = trainer.net, run(recipe, data, 2).net
    for p, other in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, other)
    generator = torch.Generator().manual_seed(trainer.seed)
    norms = [block.inner[0] for block in net]
    settled = [torch.stack([norm.running_mean, norm.running_var]) for norm in norms]
    found: list[list[torch.Tensor]] = [[] for _ in net]
    with torch.no_grad():
        for rows in torch.arange(60).split(20):
            images, labels = trainer.train_images[rows], trainer.train_labels[rows]
            sides = torch.cat([labels, wrong_label(labels, 10, generator)])
            y = torch.cat([trainer._as_input(images).repeat(2, 1, 1, 1), net.embedding(sides).view(-1, 1, 28, 28)], 1)
            for block, of_block in zip(net, found, strict=True):
                of_block.append(torch.stack([y.mean((0, 2, 3)), y.var((0, 2, 3))]))
                y = block.inner(y)
    for norm, value, of_block in zip(norms, settled, found, strict=True):
        torch.testing.assert_close(value, torch.stack(of_block).mean(0))
        assert norm.momentum == 0.1


def test_trifectas_prediction_is_the_label_of_most_goodness(data) -> None:
    trainer = run(TRIFECTA, data, 1)
    net, x = trainer.net.eval(), trainer._as_input(trainer.test_images[:7])
    of_labels = []
    for label in range(10):
        y = torch.cat([x, net.embedding.weight[label].view(1, 1, 28, 28).expand(7, 1, 28, 28)], 1)
        goodness = []
        for block in net:
            y = block.inner(y)
            goodness.append(y.square().mean((1, 2, 3)))
        of_labels.append(torch.stack(goodness, 1))
        torch.testing.assert_close(net.goodness(x, torch.full((7,), label)), of_labels[-1])
    goodness = torch.stack(of_labels)
    shares = goodness / goodness.sum(0)
    torch.testing.assert_close(net.scores(x, 10), shares.sum(2).t())
    torch.testing.assert_close(net.scores(x, 10, (2,)), shares[:, :, 2].t())
    assert torch.equal(net.predict(x, 10), shares.sum(2).argmax(0))


def test_half_of_the_negatives_are_labels_that_an_image_took_best(data) -> None:
    trainer = Trainer(TRIFECTA, data)
    met, steps = trainer.labels_met, []
    trainer._set_lr(1.0)
    for epoch in (1, 2):
        for batch in trainer.minibatches(epoch):
            known = met.lacked[batch.images].clone()
            best = known.argmin(1)
            has_met = known.min(1).values.isfinite()
            steps.append([int((batch.wrong == best)[has_met].sum()), int(has_met.sum())])
            assert torch.equal(trainer.train_labels[batch.images], batch.labels) and (batch.wrong != batch.labels).all()
            results = [result for result in trainer.step(batch)[0] if result is not None]
            known[torch.arange(20), batch.wrong] = results[-1].goodness_pos - results[-1].goodness_neg
            torch.testing.assert_close(met.lacked[batch.images], known)
    first, second = torch.tensor(steps).view(2, -1, 2).sum(1).tolist()
    rows = len(trainer.train_labels)
    # In the second epoch each image has met one label, which half of them have again, and a few by the draw.
    assert first == [0, 0] and second[1] == rows and 0.35 * rows < second[0] < 0.8 * rows


def test_views_move_an_image_and_leave_a_blank(data) -> None:
    trainer = run(replace(TRIFECTA, test_shift=1, goodness_layers=None), data, 1)
    x = trainer._as_input(trainer.test_images)
    blank = float(trainer._as_input(torch.zeros(1, 784, dtype=torch.uint8))[0, 0, 0, 0])
    same, up, down, left, right = batches.views(x, 1, blank)
    assert same is x and len(batches.views(x, 0, blank)) == 1
    for view, axis, by in ((up, 2, -1), (down, 2, 1), (left, 3, -1), (right, 3, 1)):
        rolled = x.roll(by, axis)
        rolled.select(axis, 0 if by > 0 else 27).fill_(blank)
        torch.testing.assert_close(view, rolled)
    net = trainer.net.eval()
    scores = sum(net.scores(view, 10) for view in (same, up, down, left, right))
    wrong = (scores.argmax(1) != trainer.test_labels).float().mean().item()
    trainer.net.train()
    assert trainer.goodness_error() == pytest.approx(wrong)


def test_trifecta_on_the_command_line(tmp_path: Path, monkeypatch, capsys, data) -> None:
    monkeypatch.chdir(tmp_path)
    write_idx(Path("textures"), data)
    monkeypatch.setitem(catalogue.RECIPES, "trifecta-mnist", replace(TRIFECTA, epochs=2))
    arguments = ["train", "--preset", "trifecta-mnist", "--data", "textures", "--device", "cpu", "--output", "out"]
    assert cli.main(arguments) == 0
    assert "trifecta-mnist (2-8-8-12) on " in capsys.readouterr().out
    assert cli.main([*arguments, "--resume"]) == 0


def test_trifecta_trains_on_one_process(data) -> None:
    class Two(Processes):
        size = 2

        def __init__(self) -> None:
            self.rank = 0

    with pytest.raises(ValueError, match="2 processes; trifecta-mnist trains on one"):
        Trainer(TRIFECTA, data, processes=Two())


def test_half_the_images_are_turned() -> None:
    images = torch.arange(6, dtype=torch.uint8).repeat(400, 1)
    turned = batches.flipped(images, torch.Generator().manual_seed(1), (1, 2, 3))
    back = torch.tensor([2, 1, 0, 5, 4, 3], dtype=torch.uint8)
    is_turned = (turned == back).all(1)
    assert ((turned == images).all(1) | is_turned).all()
    assert 150 < int(is_turned.sum()) < 250


@pytest.mark.parametrize("name", ["cwc-mnist", "cwc-fashion", "cwc-cifar10"])
def test_windows_are_those_of_the_network(name: str) -> None:
    recipe = RECIPES[name]
    assert [of.channels for of in recipe.convolutions] == [20, 80, 240, 480]
    assert recipe.convolutions[-1].learns in (None, (0, recipe.epochs))
