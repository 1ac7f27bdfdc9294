"""What a training loop takes beside its bare steps: blocks, the proof that both are the same training, the words."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench import loop
from bench.loop import Beside, Block
from ffkernels.recipes.catalogue import RECIPES

from .toy_data import toy_data


class Clock:
    """One second each time that it is looked at."""

    def __init__(self) -> None:
        self.looks = 0

    def __call__(self) -> float:
        self.looks += 1
        return float(self.looks)


@pytest.mark.parametrize("name", ["quick", "hard-negatives"])
def test_the_three_go_side_by_side(name: str) -> None:
    recipe = replace(RECIPES[name], hidden=(40, 30), batch_size=128, epochs=2)
    blocks: list[Block] = []
    beside = Beside(recipe, toy_data(600), blocks.append, steps=2, now=Clock())
    for _ in range(2):
        beside.run_epoch()
    assert [block.steps for block in blocks] == [2, 2, 1] * 2
    assert all(block.loop == block.bare == 1 for block in blocks)
    assert not beside.differing()
    assert beside.far <= (0 if name == "quick" else 1e-3)


def test_bare_steps_that_are_not_the_loops_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(RECIPES["quick"], hidden=(40, 30), batch_size=128, epochs=1)
    written_down = Beside._written_down

    def wrong(self: Beside, epoch: int):
        for x_pos, x_neg, labels in written_down(self, epoch):
            yield x_pos, x_neg, labels.roll(1)

    monkeypatch.setattr(Beside, "_written_down", wrong)
    with pytest.raises(ValueError, match="bare steps"):
        loop.measure(recipe, toy_data(600), 1, lambda text: None)


def test_a_measurement_in_words() -> None:
    row = {"recipe": "quick", "epochs": [[(2.2, 2.0, 10), (1.1, 1.0, 5)], [(2.6, 2.0, 10), (1.3, 1.0, 5)]]}
    text = "\n".join(loop.lines_of(row))
    assert "epochs    1.20 [1.10, 1.30], MORE THAN 1.15" in text
    assert "a step    200.00 ms, and 40.00 ms of the loop's own" in text
    there = [Block(2.8, 2.0, 10)] * 6
    text = "\n".join(loop.compared("quick", "main", [Block(2.4, 2.0, 10)] * 6, there))
    assert "here over main: the loop's own 0.50 [0.50, 0.50], all of it 0.86 [0.86, 0.86]" in text
