"""Results as data and the tables made of them: runs for the record, ablations, backpropagation beside them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from ffkernels import cli
from ffkernels.recipes.catalogue import PROJECTED
from ffkernels.recipes.run import train
from ffkernels.recipes.train import Trainer
from paper import ablation, backprop, classes, curves, race, results, search, variations
from paper import page as made_page

from .test_recipes import SMALL, run
from .toy_data import toy_data, write_idx


@pytest.fixture(scope="module")
def data():
    return toy_data()


def test_a_row_of_results_and_the_table_made_of_it(data, tmp_path: Path) -> None:
    for seed, dtype in ((0, None), (1, None), (0, torch.bfloat16)):
        trainer = Trainer(SMALL["loewex"], data, epochs=1, seed=seed, compute_dtype=dtype)
        assert train(trainer, tmp_path / "run")
        (tmp_path / "run" / "checkpoint.pt").unlink()
        row = results.row_of(trainer)
        assert row["error_classifier"] == trainer.rows[-1]["test_error_classifier"]
        assert row["train_seconds"] == round(trainer.rows[0]["train_seconds"], 1)
        path = results.write(tmp_path / "rows", row)
        assert json.loads(path.read_text()) == row
    assert path.name == "loewex-toy-1ep-bfloat16-seed0.json"
    rows = results.load(tmp_path / "rows")
    assert len(rows) == 3
    float32 = [row for row in rows if row["compute_dtype"] == "float32"]
    errors = sorted(row["error_classifier"] for row in float32)
    text = results.table(rows)
    lines = text.splitlines()
    assert len(lines) == 4
    line = next(line for line in lines if "| float32 |" in line)
    assert f"| {sum(errors) / 2:.2%} [{errors[0]:.2%}, {errors[1]:.2%}] |" in line
    assert "| loewex on toy | 1 |" in line and "| 2 |" in line
    machines = [{"device": "A", "threads": 2}, {"device": "B", "threads": 1}, {"device": "A", "threads": 2}]
    runs = [{**row, **where, "train_seconds": s} for row, where, s in zip(rows, machines, (1200, 9, 1400), strict=True)]
    assert results.seconds(runs) == "1,300 (A, 2 threads); 9 (B, 1 thread)"

    written = tmp_path / "results.md"
    written.write_text(f"before\n{results.BEGIN}\nold\n{results.END}\nafter\n")
    results.update_page(written, tmp_path / "rows")
    assert written.read_text() == f"before\n{results.BEGIN}\n\n{text}\n\n{results.END}\nafter\n"
    results.update_page(written, tmp_path / "none")
    assert results.NONE_YET in written.read_text()
    written.write_text("no markers")
    with pytest.raises(ValueError, match="markers"):
        results.update_page(written, tmp_path / "rows")
    (tmp_path / "rows" / "bad.json").write_text("[]")
    with pytest.raises(ValueError, match=r"bad\.json: no row of results"):
        results.load(tmp_path / "rows")


ROW = {
    "recipe": "quick", "data": "toy", "seed": 0, "epochs": 1, "compute_dtype": "float32", "skip_below": 0.0,
    "error_classifier": 0.5, "error_goodness": None, "train_seconds": 1.5, "seconds": 2, "kept": [1.0, 0.5],
    "device": "A", "threads": 1,
}  # fmt: skip
MALFORMED = [
    *[(name, None) for name in ROW if name != "error_goodness"],
    ("recipe", 3), ("recipe", ["quick"]), ("data", {}), ("device", 1.5),
    ("seed", -1), ("seed", 0.5), ("epochs", 0), ("epochs", True), ("epochs", "6"), ("threads", 0), ("threads", 10**400),
    ("skip_below", -0.1), ("skip_below", "0"), ("error_classifier", 1.5), ("error_classifier", "1%"),
    ("error_goodness", math.nan), ("error_goodness", [0.1]), ("train_seconds", math.inf), ("train_seconds", 10**400),
    ("seconds", "2"), ("kept", 1.0), ("kept", ["1"]), ("kept", [2.0]), ("kept", [math.nan]), ("kept", {"0": 1.0}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [pair for pair in MALFORMED if pair[0] != "error_classifier" or pair[1]])
def test_malformed_rows_are_named(name: str, value: object, tmp_path: Path) -> None:
    (tmp_path / "good.json").write_text(json.dumps(ROW))
    assert results.load(tmp_path) == [ROW]
    (tmp_path / "row.json").write_text(json.dumps({**ROW, name: value}))
    with pytest.raises(ValueError, match=rf"row\.json: no row of results \({name} .* is not ") as caught:
        results.load(tmp_path)
    assert len(str(caught.value)) < 300
    (tmp_path / "row.json").write_text(json.dumps({key: item for key, item in ROW.items() if key != name}))
    with pytest.raises(ValueError, match=rf"row\.json: no row of results \('{name}' is missing\)"):
        results.load(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b"3", b'"row"', b"{", b"\xff\xfe", b"[" * 100_000, b"9" * 5000]
)
def test_files_that_are_no_rows_are_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "row.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"row\.json: no row of results"):
        results.load(tmp_path)


def test_rows_of_an_ablation_must_have_the_same_layers() -> None:
    with pytest.raises(ValueError, match="rows of float32, 0: their `kept`"):
        ablation.table([ROW, {**ROW, "seed": 1, "kept": [1.0]}])


def test_names_do_not_break_the_table_nor_the_page(tmp_path: Path) -> None:
    text = results.table([{**ROW, "data": "a|b\n\udce9", "device": "x | y"}])
    assert text.splitlines()[2] == (
        "| quick on a\\|b \\udce9 | 1 | float32 | 50.00% |  |  | 1 | 2 (x \\| y, 1 thread) |"
    )
    page = tmp_path / "page.md"
    content = f"é\r\n{results.BEGIN}{results.END}\r\nend".encode()
    page.write_bytes(content)
    made_page.update(page, results.BEGIN, results.END, text)
    made = content.replace(results.BEGIN.encode(), f"{results.BEGIN}\n\n{text}\n\n".encode())
    assert page.read_bytes() == made
    page.write_bytes(b"\xe9")
    with pytest.raises(ValueError, match=r"page\.md: not in UTF-8"):
        made_page.update(page, results.BEGIN, results.END, text)
    assert page.read_bytes() == b"\xe9"


def test_the_ablation_sees_what_it_cannot_write_before_it_trains(data, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Trainer, "run_epoch", None)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file"):
        ablation.run(data, tmp_path / "file", print, replace(ablation.ABLATION, hidden=(20, 20)))


def test_the_ablation_runs_what_is_missing(data, tmp_path, monkeypatch) -> None:
    small = replace(ablation.ABLATION, hidden=(20, 20), epochs=1, goodness_every=1, goodness_layers=None)
    monkeypatch.setattr(ablation, "SEEDS", (0, 1))
    monkeypatch.setattr(ablation, "SKIP_BELOW", (0.0, 3e-2))
    assert ablation.table([]) == ablation.NONE_YET
    said: list[str] = []
    written = ablation.run(data, tmp_path, said.append, small)
    assert len(set(written)) == len(said) == 8
    written[3].unlink()
    assert ablation.run(data, tmp_path, said.append, small) == [written[3]]
    rows = results.load(tmp_path)
    lines = ablation.table(rows).splitlines()
    assert [line.split(" | ")[:2] for line in lines[2:6]] == [
        ["| float32", "0 (exact)"], ["| float32", "0.03"], ["| bfloat16", "0 (exact)"], ["| bfloat16", "0.03"]
    ]  # fmt: skip
    errors = [r["error_classifier"] for r in rows if r["compute_dtype"] == "float32" and r["skip_below"]]
    assert f"| {sum(errors) / 2:.2%} [{min(errors):.2%}, {max(errors):.2%}] |" in lines[3]


def test_steps_against_backprop_are_rows_and_a_table(data, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda f, **options: f)
    small = {name: replace(SMALL[name], goodness_every=1) for name in ("loewex", "hinton-matlab")}
    monkeypatch.setattr(backprop.catalogue, "RECIPES", small)
    monkeypatch.setattr(backprop, "POOL", 3)
    stages = [backprop.Stage(name, 2, "third step") for name in small]
    steps = backprop.measure(data, lambda text: None, 0.01, stages)
    assert [(row["recipe"], row["compute_dtype"]) for row in steps] == list(product(small, ("float32", "bfloat16")))
    assert all(row["ms"] > 0 and row["over_plain"][1] <= row["over_plain"][0] <= row["over_plain"][2] for row in steps)
    path = tmp_path / "rows.json"
    assert backprop.table(path) == backprop.NOT_YET
    monkeypatch.setattr(backprop, "measure", lambda *_: steps)
    backprop.save(data, lambda text: None, path)
    assert "{:.2f} [{:.2f}, {:.2f}]".format(*steps[0]["over_compiled"]) in backprop.table(path)


def test_a_race_is_curves_a_table_and_a_picture(data, tmp_path, monkeypatch) -> None:
    """Of 151 images in batches of 50 the last has one; a test costs a day, which is not counted."""
    monkeypatch.setattr(torch, "compile", lambda f, **options: f)
    of = race.Race("race", ("projected",), (0.5, 0.2), (0.01, 1.0), (1e-3, 3e-3))
    clock = [0.0]

    def tick() -> float:
        clock[0] += 1.0
        return clock[0]

    monkeypatch.setattr(curves.time, "perf_counter", tick)
    goodness_error = Trainer.goodness_error

    def slow(self: Trainer) -> float:
        clock[0] += 86_400.0
        return goodness_error(self)

    monkeypatch.setattr(Trainer, "goodness_error", slow)
    recipe = replace(PROJECTED, hidden=(40, 30), batch_size=50, epochs=3)
    rows = race.measure(of, data, lambda text: None, [recipe], (0, 1))
    assert len(rows) == 2 * (1 + 2 * 2 + 1)
    steps = 3 * -(-len(data.train_labels) // 50)
    for row in rows:
        assert len(row["errors"]) == len(row["seconds"]) == 3 * race.LOOKS
        # Each look reads the clock once before it, and the clock starts anew behind it and with an epoch.
        assert row["seconds"] == [float(look) for look in range(1, 3 * race.LOOKS + 1)]
        assert row["errors"][-1] < 0.5
    assert steps >= 3 * race.LOOKS
    alone = Trainer(recipe, data, seed=1)
    while not alone.finished:
        alone.run_epoch(lambda describe: False)
    of_second = next(row for row in rows if row["learner"] == "projected" and row["seed"] == 1)
    assert of_second["errors"][-1] == alone.rows[-1]["test_error_goodness"]
    path = tmp_path / "race.json"
    assert race.table(of, path) == race.not_yet(of)
    monkeypatch.setattr(race, "measure", lambda *_: rows)
    race.save(of, data, lambda text: None, path)
    race.draw(of, path, tmp_path / "race.png")
    assert (tmp_path / "race.png").stat().st_size > 1000
    assert [line.split(" | ")[0] for line in race.table(of, path).splitlines()[2:5]] == [
        "| Forward-Forward, projected", f"| {race.name_of(race.best(of, rows)[0])}",
        f"| {race.name_of({**race.best(of, rows)[0], 'learner': 'compiled backprop'})}",
    ]  # fmt: skip


def test_the_best_rate_is_the_one_that_is_there_first() -> None:
    def rows(rate: float, *runs: list[float]) -> list[dict[str, Any]]:
        shared = {"learner": "backprop", "lr": rate, "label_smoothing": 0.0, "seconds": [1.0, 2.0, 3.0]}
        return [{**shared, "errors": errors, "seed": seed} for seed, errors in enumerate(runs)]

    never, late, early = [0.03, 0.02, 0.016], [0.03, 0.02, 0.015], [0.03, 0.014, 0.016]
    found = [*rows(1.0, late, late, late), *rows(2.0, early, early, never), *rows(3.0, early, never, never)]
    assert {row["lr"] for row in race.best(race.LINEAR, found)} == {2.0}
    assert race.reached(rows(1.0, never)[0], 0.015) == math.inf
    assert race.reached(rows(1.0, early)[0], 0.015) == 2.0


def test_backprop_trains_on_what_a_recipe_of_classes_does(data, tmp_path, monkeypatch) -> None:
    small = {"projected": replace(PROJECTED, hidden=(40, 30), batch_size=50, epochs=3)}
    monkeypatch.setattr(classes, "RECIPES", small)
    path, rows = tmp_path / "classes.json", tmp_path / "rows"
    assert classes.table(path) == classes.NOT_YET
    classes.save(data, lambda text: None, path, ["projected"])
    measured = json.loads(path.read_text())["rows"]
    assert [(row["recipe"], row["lr"]) for row in measured] == [("projected", rate) for rate in classes.RATES]
    assert all(len(row["errors"]) == 3 and row["seconds"] == sorted(row["seconds"]) for row in measured)
    assert min(row["errors"][-1] for row in measured) < 0.5
    rows.mkdir()
    ours = {**ROW, "recipe": "projected", "compute_dtype": "bfloat16", "error_goodness": 1.0}
    (rows / "row.json").write_text(json.dumps(ours))
    lines = classes.table(path, rows).splitlines()
    assert lines[2] == "| projected | 100.00% | 2 (A, 1 thread) |  |"
    first = measured[0]
    assert lines[3] == (
        f"| backprop of its network, rate 0.0003 | {first['errors'][-1]:.2%} | {first['seconds'][-1]:.0f} | "
        f"{first['seconds'][0]:.0f} s |"
    )
    (rows / "row.json").write_text(json.dumps({**ours, "error_goodness": 0.0}))
    assert all(
        line.endswith("| never |") == (0 not in row["errors"])
        for line, row in zip(classes.table(path, rows).splitlines()[3:6], measured, strict=True)
    )


def test_variations_are_trained_on_images_that_are_left(data, tmp_path, monkeypatch) -> None:
    recipe = replace(PROJECTED, hidden=(40, 30), batch_size=50, epochs=2)
    monkeypatch.setattr(variations, "VARIATIONS", {"projected": {}, "no norm": {"norm": "none"}})
    monkeypatch.setattr(variations, "SEEDS", (0, 1))
    path, said = tmp_path / "variations.json", []
    assert variations.table(path) == variations.NOT_YET
    split = variations.held_back(data, 30)
    assert torch.equal(split.test_images, data.train_images[-30:]) and len(split.train_images) + 30 == len(
        data.train_images
    )
    monkeypatch.setattr(variations, "held_back", lambda data: split)
    variations.save(data, said.append, path, recipe)
    rows = json.loads(path.read_text())["rows"]
    assert [(row["what"], row["seed"]) for row in rows] == [(w, s) for s in (0, 1) for w in ("projected", "no norm")]
    expected = run(replace(recipe, norm="none"), split, seed=1, compute_dtype=torch.bfloat16)
    assert rows[3]["error"] == expected.rows[-1]["test_error_goodness"]
    errors = [row["error"] for row in rows]
    above = [100 * (errors[1] - errors[0]), 100 * (errors[3] - errors[2])]
    assert variations.table(path).splitlines()[3] == (
        f"| no norm | {results.errors([errors[1], errors[3]])} | "
        f"{sum(above) / 2:+.2f} [{min(above):+.2f}, {max(above):+.2f}] | 2 |"
    )
    # One that was broken off goes on, and what is there is not trained anew.
    found = json.loads(path.read_text())
    path.write_text(json.dumps({**found, "rows": rows[:3]}))
    said.clear()
    variations.save(data, said.append, path, recipe)
    again = json.loads(path.read_text())["rows"]
    assert len(said) == 1 and [row["error"] for row in again] == errors


def test_variations_are_of_what_a_recipe_has() -> None:
    for changes in variations.VARIATIONS.values():
        assert all(getattr(PROJECTED, name) != value for name, value in changes.items())


CANDIDATES = (
    {"kind": "heads", "hidden": (30, 20), "rate": 3e-3, "fall": "cosine", "batch_size": 50, "dropout": 0.0, "jitter": 0,
     "norm": "l2", "label_smoothing": 0.0},
    {"kind": "class groups", "hidden": (40, 30), "rate": 1e-3, "fall": "cosine", "batch_size": 50, "dropout": 0.1,
     "jitter": 1, "norm": "none", "label_smoothing": 0.1, "goodness": "sum", "temperature": 1.0},
    {"kind": "swish", "hidden": (40, 30), "rate": 1e-3, "fall": "cosine", "batch_size": 50, "dropout": 0.0, "jitter": 0,
     "norm": "rms", "goodness": "mean", "negatives_temperature": 2.0},
)  # fmt: skip


def test_a_search_keeps_the_better_half_and_tests_the_winner_alone(data, tmp_path, monkeypatch) -> None:
    for name in ("QUICK", "HARD_NEGATIVES"):
        monkeypatch.setattr(search, name, replace(getattr(search, name), hidden=(40, 30), batch_size=50))
    split = variations.held_back(data, 100)
    monkeypatch.setattr(search, "held_back", lambda data: split)
    monkeypatch.setattr(search, "EPOCHS", 3)
    looked = []
    test_error = Trainer.test_error
    monkeypatch.setattr(
        Trainer,
        "test_error",
        lambda self, predict: (
            looked.append(torch.equal(self.test_images, data.test_images)) or test_error(self, predict)
        ),
    )
    path, said = tmp_path / "search.json", []
    options = {"candidates": CANDIDATES, "rungs": ((1, 3), (2, 2)), "epochs": 3, "seeds": (0, 1)}
    assert search.table(path) == search.NOT_YET
    search.save(data, said.append, path, **options)
    found = json.loads(path.read_text())
    rows = [row for row in found["rows"] if row["seed"] == 0]
    done = sorted(len(row["errors"]) for row in rows)
    # quick is trained to the end whatever it came to.
    assert len(rows) == 5 and done.count(1) <= 2 and done.count(3) >= 2
    first = sorted(rows, key=lambda row: row["errors"][0])
    assert len(first[0]["errors"]) > 1
    of_quick = [row for row in found["rows"] if row["choice"] == {"recipe": "quick"}]
    expected = run(replace(search.QUICK, epochs=3), split, seed=1)
    assert of_quick[1]["errors"] == [row["test_error_goodness"] for row in expected.rows]
    # The test images were looked at once, at the end.
    assert looked.count(True) == 1 and looked.index(True) > 10
    by_mean = {
        json.dumps(choice): sum(row["errors"][-1] for row in found["rows"] if row["choice"] == choice)
        for choice in found["finalists"]
    }
    assert by_mean[json.dumps(found["test"]["choice"])] == min(by_mean.values())
    text = search.table(path)
    assert f"{found['test']['error']:.2%} of the test images" in text
    assert text.splitlines()[2].startswith(
        f"| {search.in_words(min(found['finalists'], key=lambda c: by_mean[json.dumps(c)]))} |"
    )
    # What is there is not trained anew; what is not there yet is, to the same numbers.
    said.clear()
    search.save(data, said.append, path, **options)
    assert not said
    path.write_text(json.dumps({**found, "rows": found["rows"][:2]}))
    search.save(data, said.append, path, **options)
    assert [row["errors"] for row in json.loads(path.read_text())["rows"]] == [row["errors"] for row in found["rows"]]


def test_candidates_are_drawn_by_a_seed_and_are_recipes() -> None:
    assert search.drawn(40, 1)[:9] == search.drawn(9, 1) != search.drawn(9, 2)
    for choice in search.drawn():
        recipe = search.recipe_of(choice)
        assert recipe.layers.lr == choice["rate"] and recipe.hidden == tuple(choice["hidden"])
        assert recipe.of_classes == (recipe.classifier is None) == (recipe.negatives == "none")
        assert search.in_words(choice)
    assert search.recipe_of({"recipe": "quick"}) == search.QUICK


def test_reproduce_on_the_command_line(tmp_path, monkeypatch, capsys) -> None:
    folder = write_idx(tmp_path / "toy", toy_data(200, 50))
    monkeypatch.chdir(tmp_path)
    options = ["--data", str(folder), "--device", "cpu", "--epochs", "1", "--no-picture", "--skip-below", "0.001"]
    assert cli.main(["reproduce", "quick", "--seed", "4", *options]) == 0
    out = capsys.readouterr().out
    path = Path("results/quick-toy-1ep-float32-skip0.001-seed4.json")
    assert f"result:     {path}" in out
    row = json.loads(path.read_text())
    assert (row["seed"], row["skip_below"], row["epochs"], row["recipe"]) == (4, 0.001, 1, "quick")
    assert Path("runs/quick-toy-1ep-float32-skip0.001-seed4/metrics.jsonl").exists()
    results.PAGE.parent.mkdir()
    results.PAGE.write_text(f"{results.BEGIN}\n{results.END}\n")
    assert cli.main(["reproduce", "--readme"]) == 0
    assert "| quick on toy | 1 | float32, rows below 0.001 left out |" in results.PAGE.read_text()
    for wrong in (["reproduce"], ["reproduce", "quick", "--readme"]):
        assert cli.main(wrong) == 2
        assert "RECIPE or --readme" in capsys.readouterr().err
    assert cli.main(["reproduce", "quick", *options[:-1], "2"]) == 2
    assert "skip_below=2.0 is not in 0..1" in capsys.readouterr().err


def test_the_page_is_what_the_command_makes() -> None:
    root = Path(__file__).parent.parent
    text = (root / results.PAGE).read_text()
    made = text.partition(results.BEGIN)[2].partition(results.END)[0].strip()
    assert made == results.table(results.load(root / results.FOLDER))
