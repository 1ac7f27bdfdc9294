import copy
import errno
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ffkernels as ff
from ffkernels.recipes import checkpoint, picture
from ffkernels.recipes.batches import hard_label
from ffkernels.recipes.catalogue import HARD_NEGATIVES, LOEWEX, RECIPES, Recipe, Rule
from ffkernels.recipes.lock import LOCK, locked
from ffkernels.recipes.run import CHECKPOINT, METRICS, resume, train
from ffkernels.recipes.train import Trainer

from .toy_data import toy_data

SMALL_ONE = replace(HARD_NEGATIVES, hidden=(40, 30), batch_size=50)
SMALL_LOEWEX = replace(LOEWEX, hidden=(60, 40, 40), batch_size=50, goodness_every=2)
RECIPES_IN_SMALL = [pytest.param(SMALL_ONE, id="hard-negatives"), pytest.param(SMALL_LOEWEX, id="loewex")]


@pytest.fixture(scope="module")
def data():
    return toy_data()


def numbers(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if "seconds" not in key} for row in rows]


def tensors(value: object, path: str = "") -> dict[str, Tensor]:
    """All tensors in nested dicts and lists, by their path."""
    if isinstance(value, Tensor):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return {name: tensor for key, item in items for name, tensor in tensors(item, f"{path}/{key}").items()}


def assert_same_run(one: Trainer, other: Trainer) -> None:
    assert numbers(one.rows) == numbers(other.rows)
    mine, theirs = tensors(one.state()), tensors(other.state())
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name


def stop_after(trainer: Trainer, steps: int):
    """Answers True once the trainer has made so many steps."""
    made = []
    step = trainer.net.step
    trainer.net.step = lambda *arguments, **options: made.append(1) or step(*arguments, **options)
    return lambda: len(made) >= steps


@pytest.mark.parametrize(
    ("recipe", "by_classifier", "by_goodness"),
    [
        pytest.param(SMALL_ONE, 0.1, 0.1, id="hard-negatives"),
        # Goodness is the slower reader of the two, and three layers need more steps.
        pytest.param(replace(LOEWEX, hidden=(200, 100, 100), batch_size=20), 0.1, 0.6, id="loewex"),
    ],
)
def test_it_learns(recipe: Recipe, by_classifier: float, by_goodness: float, data, tmp_path) -> None:
    trainer = Trainer(recipe, data, epochs=16)
    assert trainer.classifier_error() > 0.8
    assert train(trainer, tmp_path)
    last = trainer.rows[-1]
    assert last["test_error_classifier"] < by_classifier
    assert last["test_error_goodness"] < by_goodness
    for positive, negative in zip(last["goodness_pos"], last["goodness_neg"], strict=True):
        assert positive > negative


@pytest.mark.parametrize("recipe", RECIPES_IN_SMALL)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("stop", [5, 12, 19, 24, 36])  # inside each epoch of 12 steps, and at the ends of two
def test_a_stopped_run_goes_on_to_the_same_numbers(recipe: Recipe, dtype, stop: int, data, tmp_path) -> None:
    def fresh() -> Trainer:
        return Trainer(recipe, data, epochs=3, seed=5, compute_dtype=dtype)

    whole = fresh()
    assert train(whole, tmp_path / "whole")
    stopped = fresh()
    assert train(stopped, tmp_path / "parts", stop_after(stopped, stop)) == (stop == 36)
    assert len(stopped.rows) == stop // 12

    resumed = fresh()
    assert resume(resumed, tmp_path / "parts") == (stop >= 12)
    assert train(resumed, tmp_path / "parts")
    assert_same_run(whole, resumed)
    texts = [(tmp_path / run / METRICS).read_text() for run in ("whole", "parts")]
    written = [[json.loads(line) for line in text.splitlines()] for text in texts]
    assert numbers(written[0]) == numbers(written[1]) == numbers(whole.rows)
    assert [row["epoch"] for row in written[1]] == [1, 2, 3]


def test_seeds_differ_and_repeat(data, tmp_path) -> None:
    runs = [Trainer(SMALL_ONE, data, epochs=1, seed=seed) for seed in (1, 1, 2)]
    for run in runs:
        train(run, tmp_path)
    assert_same_run(runs[0], runs[1])
    assert runs[0].rows[0]["loss"] != runs[2].rows[0]["loss"]


def test_a_run_does_not_touch_the_global_generator(data) -> None:
    before = torch.get_rng_state()
    Trainer(SMALL_ONE, data, epochs=1).run_epoch(lambda describe: False)
    assert torch.equal(before, torch.get_rng_state())


def test_every_epoch_has_an_order_and_negatives_of_its_own(data) -> None:
    still = Rule("sgd", lr=0.0)
    trainer = Trainer(replace(SMALL_LOEWEX, layers=still, batch_size=600), data, epochs=2)
    seen: list[tuple[Tensor, Tensor]] = []
    step = trainer.net.step
    trainer.net.step = lambda *sides, **options: seen.append(sides[:2]) or step(*sides, **options)
    for _ in range(2):
        trainer.run_epoch(lambda describe: False)
    (pos, neg), (other_pos, other_neg) = seen
    assert not torch.equal(pos, other_pos)
    # Every image once, in both: sorting by one number made of each image brings the same ones together.
    mix = torch.rand(384, dtype=torch.float64)
    order, other_order = ((x[:, 400:].double() @ mix).argsort() for x in (pos, other_pos))
    assert torch.equal(pos[order], other_pos[other_order])
    same = (neg[order] == other_neg[other_order]).all(1).float().mean()
    assert 0.05 < same < 0.2  # one wrong label of nine


def test_metrics_are_those_of_the_network(data) -> None:
    """With a learning rate of 0 the averages over an epoch must be what the unchanged network gives on all the data."""
    still = Rule("sgd", lr=0.0)
    recipe = replace(SMALL_LOEWEX, layers=still, classifier=still, batch_size=70)
    trainer = Trainer(recipe, data, epochs=1)
    row = trainer.run_epoch(lambda describe: False)
    assert row is not None
    x = ff.overlay_label(data.train_images.float() / 255, data.train_labels)
    goodness = trainer.net.goodness(x).mean(0)
    torch.testing.assert_close(torch.tensor(row["goodness_pos"]), goodness)
    assert row["train_error_classifier"] == pytest.approx((data.train_labels != 0).float().mean().item())
    assert row["test_error_classifier"] == (data.test_labels != 0).sum().item() / 200

    test = data.test_images.float() / 255
    candidates = [trainer.net.goodness(ff.overlay_label(test, torch.full((200,), k)))[:, 1:].sum(1) for k in range(10)]
    wrong = torch.stack(candidates).argmax(0) != data.test_labels
    assert row["test_error_goodness"] == wrong.sum().item() / 200


def test_goodness_is_tested_every_few_epochs_and_at_the_end(data, tmp_path) -> None:
    trainer = Trainer(SMALL_LOEWEX, data, epochs=3)
    train(trainer, tmp_path)
    assert [row["test_error_goodness"] is None for row in trainer.rows] == [True, False, False]


def test_learning_rates_are_constant_then_fall_to_0(tmp_path) -> None:
    trainer = Trainer(SMALL_ONE, toy_data(20, 10), epochs=8)
    rates = []

    def after_step(describe) -> bool:
        optimizers = (trainer.net_optimizer, trainer.classifier_optimizer)
        rates.append([optimizer.param_groups[0]["lr"] for optimizer in optimizers])
        return False

    while not trainer.finished:
        trainer.run_epoch(after_step)
    factors = [1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert rates == [[SMALL_ONE.layers.lr * factor, SMALL_ONE.classifier.lr * factor] for factor in factors]
    assert [row["lr"] for row in trainer.rows] == [lr for lr, _ in rates]


def test_first_step_is_the_recipes(data) -> None:
    """One loewex step written out with autograd: threshold at the width, rms norm, SGD on all layers at once."""
    recipe = replace(SMALL_LOEWEX, batch_size=600, peer=None)
    trainer = Trainer(recipe, data, epochs=1, seed=3)
    for layer in trainer.net:
        width = layer.out_features
        assert layer.bias.eq(0).all()
        assert layer.weight.std().item() == pytest.approx(1 / math.sqrt(width), rel=0.1)
    weights = [layer.weight.detach().clone().requires_grad_() for layer in trainer.net]
    seen: list[Tensor] = []
    step = trainer.net.step_and_features
    trainer.net.step_and_features = lambda *a, **options: seen.extend(a[:2]) or step(*a, **options)
    trainer.run_epoch(lambda describe: False)
    pos, neg = seen
    assert torch.equal(pos[:, 10:], neg[:, 10:])
    assert (pos[:, :10].sum(1) == 1).all()
    assert (neg[:, :10].sum(1) == 1).all()
    assert (pos[:, :10].argmax(1) != neg[:, :10].argmax(1)).all()
    h, sign = torch.cat([pos, neg]), torch.cat([-torch.ones(600), torch.ones(600)])
    for layer, weight in zip(trainer.net, weights, strict=True):
        h = h / (h.square().mean(1, keepdim=True).sqrt() + 1e-8)
        h = (h @ weight.T).relu()
        loss = torch.nn.functional.softplus(sign * (h.square().sum(1) - len(weight))).mean()
        (gradient,) = torch.autograd.grad(loss, weight)
        expected = weight - 1e-3 * (gradient + 3e-4 * weight)
        torch.testing.assert_close(layer.weight, expected)
        h = h.detach()


def test_hard_labels_follow_the_classifier_and_are_never_right() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).repeat(40_000, 1)
    labels = torch.full((40_000,), 1)
    drawn = hard_label(logits, labels, generator)
    share = drawn.bincount(minlength=4) / 40_000
    odds = torch.tensor([2.0, -math.inf, 0.0, -1.0]).softmax(0)
    assert share[1] == 0
    torch.testing.assert_close(share, odds, rtol=0, atol=0.01)


def test_hard_labels_stand_extreme_logits() -> None:
    logits = torch.tensor([[1e4, 0.0, -1e4], [-1e4, 1e4, -1e4], [0.0, 0.0, 1e30]])
    assert hard_label(logits, torch.tensor([0, 1, 1])).tolist()[0::2] == [1, 2]
    labels = torch.tensor([0, 1, 1]).repeat(500)
    assert (hard_label(logits.repeat(500, 1), labels) != labels).all()


def test_divergence_is_an_error_and_keeps_what_was_there(data, tmp_path) -> None:
    trainer = Trainer(SMALL_ONE, data, epochs=2)
    train(trainer, tmp_path, stop_after(trainer, 12))
    kept = (tmp_path / CHECKPOINT).read_bytes()
    with torch.no_grad():
        next(iter(trainer.net)).weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="epoch 2: the training has diverged"):
        train(trainer, tmp_path)
    assert (tmp_path / CHECKPOINT).read_bytes() == kept


@pytest.mark.parametrize(
    ("option", "value"), [("seed", -1), ("seed", 2**32), ("epochs", 0), ("epochs", 10**400), ("skip_below", math.nan)]
)
def test_numbers_out_of_range(option: str, value: int, data) -> None:
    with pytest.raises(ValueError, match=f"{option}={value} is not"):
        Trainer(SMALL_ONE, data, **{option: value})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 2}, "seed 1, now 2"),
        ({"epochs": 3}, "epochs 2, now 3"),
        ({"compute_dtype": torch.bfloat16}, "compute_dtype 'None', now 'torch.bfloat16'"),
        ({"recipe": replace(SMALL_ONE, alpha=5.0)}, "alpha 6.0, now 5.0"),
        ({"data": toy_data(seed=1)}, "data 'toy"),
        ({"recipe": replace(SMALL_ONE, layers=Rule("adam", lr=1e-3))}, "layers"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_settings_are_refused_and_named(change: dict, named: str, data, tmp_path) -> None:
    settings = {"recipe": SMALL_ONE, "data": data, "seed": 1, "epochs": 2}
    trainer = Trainer(**settings)
    train(trainer, tmp_path, stop_after(trainer, 12))
    kept = (tmp_path / CHECKPOINT).read_bytes()
    other = Trainer(**{**settings, **change})
    weight = next(iter(other.net)).weight.detach().clone()
    with pytest.raises(ValueError, match=named) as error:
        resume(other, tmp_path)
    assert str(tmp_path / CHECKPOINT) in str(error.value)
    assert str(error.value).count("now") == 1
    assert torch.equal(next(iter(other.net)).weight, weight)
    assert (tmp_path / CHECKPOINT).read_bytes() == kept


@pytest.mark.parametrize("damage", ["short", "empty", "one bit", "text", "other file"])
def test_damaged_checkpoints_are_refused(damage: str, data, tmp_path) -> None:
    trainer = Trainer(SMALL_ONE, data, epochs=2)
    train(trainer, tmp_path, stop_after(trainer, 12))
    path = tmp_path / CHECKPOINT
    content = bytearray(path.read_bytes())
    if damage == "other file":
        torch.save({"weights": torch.zeros(3)}, path)
    else:
        content[len(content) // 2] ^= 1
        damaged = {"short": content[:-100], "empty": b"", "one bit": content, "text": b"hello"}[damage]
        path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"checkpoint\.pt: damaged"):
        resume(Trainer(SMALL_ONE, data, epochs=2), tmp_path)


def test_every_flipped_bit_is_harmless_or_named(data, tmp_path) -> None:
    """A bit in places all over the file: it reads as it was (padding, a date), or the file is named."""
    small = replace(SMALL_ONE, hidden=(4, 3))
    trainer = Trainer(small, data, epochs=1)
    train(trainer, tmp_path)
    path = tmp_path / CHECKPOINT
    content = path.read_bytes()
    refused = harmless = 0
    for place in range(0, len(content), 211):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        resumed = Trainer(small, data, epochs=1)
        try:
            resume(resumed, tmp_path)
        except ValueError as error:
            refused += str(error).startswith(f"{path}: damaged")
        else:
            assert_same_run(trainer, resumed)
            harmless += 1
    assert refused + harmless == len(range(0, len(content), 211)) and refused > 100


def changed(*path, **to):
    """A function that puts `to` in place of what stands at `path` in nested dicts and lists; removes it without."""

    def change(state):
        for key in path[:-1]:
            state = state[key]
        if to:
            state[path[-1]] = to["to"]
        else:
            del state[path[-1]]

    return change


ROWS = [
    changed("rows", to=None),
    changed("rows", to={}),
    changed("rows", 1),
    changed("rows", 0, to=[]),
    changed("rows", 0, "epoch", to=2),
    changed("rows", 0, "epoch", to=True),
    changed("rows", 0, "lr", to="1"),
    changed("rows", 0, "kept"),
    changed("rows", 0, "loss", to=[1.0]),
    changed("rows", 0, "loss", to=[1.0, "2"]),
    changed("rows", 1, "goodness_pos", to=3.0),
    changed("rows", 1, "test_error_classifier", to=None),
    changed("rows", 1, "train_error_classifier", to=1.5),
    changed("rows", 1, "test_error_goodness", to="none"),
    changed("rows", 1, "test_error_goodness", to=math.nan),
    changed("rows", 0, "seconds", to=-1.0),
    changed("rows", 0, "train_seconds", to=10**400),
    lambda state: state["rows"].extend(copy.deepcopy(state["rows"])),
]
PARTS = [
    *[changed(part) for part in ("rows", "net", "net_optimizer", "classifier", "classifier_optimizer")],
    changed("more", to=1),
    changed("net", to=[]),
    changed("net", "layers.0.weight"),
    changed("net", "more", to=torch.zeros(1)),
    changed("net", "layers.0.weight", to=torch.zeros(40, 3)),
    changed("net", "layers.0.weight", to=torch.zeros(40, 784, dtype=torch.float64)),
    changed("net", "layers.1.bias", to=[0.0] * 30),
    changed("net", "layers.1.bias", to=torch.zeros(30).to_sparse()),
    changed("net", "layers.1.bias", to=torch.zeros(30, device="meta")),
    changed("classifier", "weight", to=torch.zeros(10, 70).t()),
    changed("net_optimizer", to=3),
    changed("net_optimizer", "state"),
    changed("net_optimizer", "state", to=[]),
    changed("net_optimizer", "state", 3),
    changed("net_optimizer", "state", 9, to={}),
    changed("net_optimizer", "state", 0, "exp_avg"),
    changed("net_optimizer", "state", 0, "exp_avg", to=None),
    changed("net_optimizer", "state", 0, "exp_avg_sq", to=torch.zeros(784, 40)),
    changed("net_optimizer", "state", 0, "step", to=24),
    changed("net_optimizer", "state", 0, "step", to=torch.tensor(23.0)),
    changed("net_optimizer", "param_groups"),
    changed("net_optimizer", "param_groups", to=[]),
    changed("net_optimizer", "param_groups", 0, to=None),
    changed("net_optimizer", "param_groups", 0, "params"),
    changed("net_optimizer", "param_groups", 0, "params", to=[0, 1, 2, 2]),
    changed("net_optimizer", "param_groups", 0, "betas", to=(0.5, 0.999)),
    changed("classifier_optimizer", "param_groups", 0, "betas", to=(torch.zeros(2), 0.999)),
    changed("classifier_optimizer", "state", 0, "step"),
]


@pytest.fixture(scope="module")
def saved(data, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("saved")
    trainer = Trainer(SMALL_ONE, data, epochs=3)
    assert not train(trainer, output, stop_after(trainer, 24))
    return output / CHECKPOINT


@pytest.mark.parametrize("change", [*ROWS, *PARTS])
def test_checkpoints_of_wrong_structure_are_named_and_change_nothing(change, saved, data, tmp_path) -> None:
    content = torch.load(saved, weights_only=True)
    assert len(content["state"]["rows"]) == 2
    change(content["state"])
    path = tmp_path / CHECKPOINT
    torch.save(content, path)
    trainer = Trainer(SMALL_ONE, data, epochs=3)
    before = copy.deepcopy(trainer.state())
    with pytest.raises(ValueError, match=r"checkpoint\.pt: damaged, or no checkpoint of a training run \(") as caught:
        resume(trainer, tmp_path)
    assert len(str(caught.value)) < 700 and "\n" not in str(caught.value)
    assert trainer.rows == [] and trainer.net_optimizer.state_dict()["state"] == {}
    mine, theirs = tensors(trainer.state()), tensors(before)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("whole", "found"),
    [
        (3, "damaged"),
        ({"format": 2}, "damaged"),
        ({"format": 2, "settings": 3, "state": {}}, "damaged"),
        ({"format": 2, "settings": {}, "state": {}}, "a run with other settings"),
        ({"format": 1, "settings": {}, "state": {}}, "format 1, but this version reads format 2"),
        ({"format": torch.zeros(2), "settings": {}, "state": {}}, "format tensor"),
        ({"format": "x" * 1000, "settings": {}, "state": {}}, "format 'xxx"),
    ],
)
def test_files_of_wrong_structure_are_named(whole, found: str, data, tmp_path) -> None:
    torch.save(whole, tmp_path / CHECKPOINT)
    with pytest.raises(ValueError, match=rf"checkpoint\.pt: {found}") as caught:
        resume(Trainer(SMALL_ONE, data, epochs=3), tmp_path)
    assert "\n" not in str(caught.value)
    content = {"format": 2, "settings": Trainer(SMALL_ONE, data, epochs=3).settings(), "state": [1]}
    torch.save(content, tmp_path / CHECKPOINT)
    with pytest.raises(ValueError, match="damaged"):
        resume(Trainer(SMALL_ONE, data, epochs=3), tmp_path)


def test_the_data_may_be_renamed_but_not_changed(data, tmp_path) -> None:
    trainer = Trainer(SMALL_ONE, data, epochs=2)
    train(trainer, tmp_path, stop_after(trainer, 12))
    for name in ("new", "new (copy) (2)", ""):
        assert resume(Trainer(SMALL_ONE, replace(data, name=name), epochs=2), tmp_path)
    turned = data.train_images.view(-1, 28, 28).transpose(1, 2).flatten(1)
    back = data.test_images.flip(0), data.test_labels.flip(0)
    for other in (replace(data, train_images=turned), replace(data, test_images=back[0], test_labels=back[1])):
        with pytest.raises(ValueError, match=r"other settings: data 'toy \(600 images .*', now 'toy \(600 images"):
            resume(Trainer(SMALL_ONE, other, epochs=2), tmp_path)


def test_a_new_run_removes_the_old_checkpoint(data, tmp_path) -> None:
    train(Trainer(SMALL_ONE, data, epochs=1), tmp_path)
    trainer = Trainer(SMALL_ONE, data, epochs=1)
    train(trainer, tmp_path, stop_after(trainer, 3))
    assert not resume(Trainer(SMALL_ONE, data, epochs=1), tmp_path)
    assert (tmp_path / METRICS).read_text() == ""


def test_a_write_that_fails_leaves_the_old_file(tmp_path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(file) -> None:
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoint.write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    checkpoint.write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device"), ValueError()])
def test_whatever_stops_a_write_leaves_the_old_file_alone(error, tmp_path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(file) -> None:
        file.write(b"half")
        raise error

    with pytest.raises(type(error)) as caught:
        checkpoint.write_atomically(path, fail)
    if isinstance(error, OSError):
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_two_writers_of_a_file_do_not_meet_and_a_link_stays_one(tmp_path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_bytes(b"old")
    link.symlink_to(real)

    def write(file) -> None:
        file.write(b"first")
        checkpoint.write_atomically(link, lambda other: other.write(b"second"))
        assert real.read_bytes() == b"second"

    checkpoint.write_atomically(link, write)
    assert link.is_symlink() and real.read_bytes() == b"first"
    (tmp_path / "real.tmp").write_bytes(b"")
    (tmp_path / "real.0a.tmp").write_bytes(b"")
    checkpoint.remove_leftovers([real])
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["link", "real"]


def test_what_cannot_be_written_is_known_before(data, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Trainer, "run_epoch", None)
    (tmp_path / "file").write_text("")
    (tmp_path / "run" / METRICS).mkdir(parents=True)
    (tmp_path / "other" / CHECKPOINT).mkdir(parents=True)
    for output, named in (
        (tmp_path / "file", "file"),
        (tmp_path / "file" / "below", "file"),
        (tmp_path / "run", METRICS),
        (tmp_path / "other", CHECKPOINT),
        (tmp_path / ("x" * 300), "xxx"),
    ):
        with pytest.raises(OSError, match=named):
            train(Trainer(SMALL_ONE, data, epochs=1), output)
    assert not [path for path in tmp_path.rglob("*.tmp")]


def test_a_folder_is_one_trainings_until_it_ends(tmp_path) -> None:
    with locked(tmp_path):
        assert (tmp_path / LOCK).read_text() == f"{os.getpid()}\n"
        held = pytest.raises(BlockingIOError, match=rf"training \(process {os.getpid()}\) is at work")
        with held as caught, locked(tmp_path):
            pass
        assert caught.value.filename == str(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / LOCK).write_text("4711\n")  # left by a kill
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), locked(tmp_path):
            raise ZeroDivisionError
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("option", "value"), [("seed", 1.5), ("seed", True), ("epochs", 2.0), ("skip_below", "0")])
def test_what_is_no_number(option: str, value: object, data) -> None:
    with pytest.raises(TypeError, match=f"{option}={value!r} is not a"):
        Trainer(SMALL_ONE, data, **{option: value})


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_make_networks(name: str, data) -> None:
    trainer = Trainer(RECIPES[name], toy_data(20, 10), epochs=1)
    units = [of.channels for of in RECIPES[name].convolutions] + list(RECIPES[name].hidden)
    assert [len(layer.weight) for layer in trainer.net] == units
    row = trainer.run_epoch(lambda describe: False)
    assert row is not None
    assert all(map(math.isfinite, row["loss"]))


def test_runs_without_optional_packages() -> None:
    code = """
import sys
for name in ("numpy", "tqdm", "matplotlib"):
    sys.modules[name] = None
from ffkernels import cli
from ffkernels.recipes import catalogue, data, picture, progress, train
with progress.Progress(2) as shown:
    shown.step(lambda: "")
    shown.line("a line")
print(picture.available())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    assert done.stderr.endswith("a line\n")  # torch has a word to say on NumPy before


@pytest.mark.parametrize("recipe", RECIPES_IN_SMALL)
def test_picture(recipe: Recipe, data, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    trainer = Trainer(recipe, data, epochs=2)
    train(trainer, tmp_path)
    picture.draw(trainer, tmp_path / "picture.png")
    image = torch.from_numpy(imread(tmp_path / "picture.png"))[..., :3]
    assert image.shape[0] > 600
    assert image.shape[1] > 1000
    # Curves below the title on the left, features on the right: neither is blank.
    for part in (image[60:, : image.shape[1] // 2], image[60:, image.shape[1] // 2 :]):
        assert 0.02 < (part.amin(2) < 0.95).float().mean() < 0.9


def test_mosaic_shows_the_largest_units_first_without_label_pixels() -> None:
    weight = torch.zeros(3, 16)
    weight[:, :2] = 9.0  # label pixels
    weight[0, 5], weight[1, 6], weight[2, 7] = 1.0, -4.0, 2.0
    image = picture.mosaic(weight, 2, (1, 4, 4))
    assert image.shape == (5 * picture.TILES, 5 * picture.TILES)
    tiles = [image[:4, 5 * i : 5 * i + 4].flatten() for i in range(4)]
    for tile, (place, value) in zip(tiles, ((6, -1.0), (7, 1.0), (5, 1.0)), strict=False):
        expected = torch.zeros(16)
        expected[place] = value
        assert tile[:2].isnan().all()
        assert torch.equal(tile[2:], expected[2:])
    assert tiles[3].isnan().all()
