"""Steps that leave pairs out beside others: everybody starts from the same weights, and learns on the same rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench import skipping
from bench.blocks import VARIABLE
from bench.cases import CASES
from ffkernels.recipes.data import Dataset

CASE = replace(CASES["trifecta-float32"], rows=4)


@pytest.fixture(scope="module")
def data() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (20, 28, 28), generator=generator, dtype=torch.uint8)
    labels = torch.randint(10, (20,), generator=generator)
    return Dataset(images, labels, images[:1], labels[:1], "mnist", "drawn")


def test_everybody_starts_from_the_trained_weights(data, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    # Leaving nothing out is the other's step.
    monkeypatch.setattr(skipping, "SKIP_BELOW", 0.0)
    taken = skipping.batches(CASE, data)
    trained = skipping.train(CASE, taken, 2, shows=False)
    before = {name: p.clone() for name, p in trained.state_dict().items()}
    batch = next(taken)
    takes = skipping.contenders(CASE, trained)
    assert list(takes) == [skipping.WITH, skipping.OURS, skipping.BACKPROP]
    for name in (skipping.OURS, skipping.WITH):
        takes[name](batch)
    ours = takes[skipping.OURS].args[0]
    for name, p in ours.state_dict().items():
        assert not torch.equal(p, before[name]), name
        assert torch.equal(p, trained.state_dict()[name]), name


def test_times_and_shares(data):
    found = skipping.measure(CASE, data, steps=2, rounds=2, shows=False)
    assert all(len(times) == 2 and min(times) > 0 for times in found["seconds"].values())
    assert [len(shares) for shares in found["not_apart"]] == [6, 6]
    assert all(0 <= share <= 1 for shares in found["not_apart"] for share in shares)


def test_words():
    seconds = {skipping.WITH: [2.0, 2.0], skipping.OURS: [4.0, 4.0], skipping.BACKPROP: [3.0, 3.0]}
    lines = skipping.lines_of(
        {"case": "trifecta-float32", "steps": 117, "not_apart": [[0.5, 0.25], [0.4, 0.2]], "seconds": seconds}
    )
    assert lines[0] == "trifecta-float32 after 117 steps; pairs not told apart, by block: 50% 25%; at the end 40% 20%"
    assert lines[1:3] == ["  ffkernels, skip_below=0.02: 2.00 s", "  ffkernels over it: 2.00 [2.00, 2.00]"]
    assert lines[3] == "  backprop over it: 1.50 [1.50, 1.50]"
