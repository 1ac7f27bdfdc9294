"""Several processes on gloo: data parallel against one process on the joint batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

import ffkernels as ff
from tests.parallel_cases import OBJECTIVES, Case, not_piped, piped, trained_alone, trained_by_parts, trained_together
from tests.processes import Processes

RELATIVE = {torch.float64: 1e-10, torch.float32: 1e-5}


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    started = Processes(3)
    yield started
    started.stop()


def trained_by_all(processes: Processes, case: Case, splits: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
    """What all processes end up with, bit for bit."""
    found = processes.run(trained_together, case, splits, each=[(rank,) for rank in range(len(splits))])
    (first, first_losses), *others = found
    for other, other_losses in others:
        assert torch.equal(first_losses, other_losses)
        for name, tensor in first.items():
            assert torch.equal(tensor, other[name]), name
    return first, first_losses


def check_as_one(processes: Processes, case: Case, splits: Sequence[int]) -> None:
    """All processes end up with what one has on the joint batch."""
    found, found_losses = trained_by_all(processes, case, splits)
    expected, losses = trained_alone(case, splits)
    bound = RELATIVE[case.dtype]
    torch.testing.assert_close(found_losses, losses, rtol=10 * bound, atol=bound)
    check_close(found, expected, bound)


def check_close(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        error = (found[name] - tensor).double().norm() / tensor.double().norm().clamp(min=1e-30)
        assert error <= bound, f"{name}: {error}"


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_processes_are_one_on_the_joint_batch(processes, objective):
    check_as_one(processes, Case(objective), (5, 8))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "rmsprop"])
@pytest.mark.parametrize("outputs", ["pre", "post"])
def test_optimizers_and_hand_overs(processes, optimizer, outputs):
    check_as_one(processes, Case("logistic", outputs, optimizer), (6, 6))


@pytest.mark.parametrize("objective", ["logistic", "sum_of_means", "symba", "cross_entropy", "projection"])
def test_weights_of_rows(processes, objective):
    check_as_one(processes, Case(objective, weighted=True), (7, 4))


@pytest.mark.parametrize("objective", ["logistic", "sum_of_means", "symba", "given mean"])
def test_rows_in_any_order(processes, objective):
    check_as_one(processes, Case(objective, sides="mixed", weighted=objective == "logistic"), (7, 4))


@pytest.mark.parametrize("objective", ["logistic", "sum_of_means", "swish", "cwc", "projection", "given mean"])
def test_three_processes_one_of_them_without_rows(processes, objective):
    check_as_one(processes, Case(objective), (4, 0, 7))


@pytest.mark.parametrize("outputs", ["pre", "post"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_peers_are_those_of_all_processes(processes, outputs, gated, activation):
    peer = ff.PeerNormalisation(strength=0.5, gated=gated)
    check_as_one(processes, Case(outputs=outputs, options=(("peer", peer), ("activation", activation))), (5, 3, 0))


@pytest.mark.parametrize("outputs", ["pre", "post"])
@pytest.mark.parametrize("objective", ["logistic", "cross_entropy"])
def test_fifty_steps_in_float32(processes, objective, outputs):
    check_as_one(processes, Case(objective, outputs, "sgd", torch.float32, steps=50), (9, 7))


@pytest.mark.parametrize("objective", ["logistic", "symba", "cross_entropy", "projection", "given mean"])
def test_convolutions(processes, objective):
    check_as_one(processes, Case(objective, kind="convolution"), (3, 5))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("linear", (("batch_norm", "behind"),)),
        ("convolution", (("batch_norm", "behind"),)),
        ("convolution", (("batch_norm", "before"),)),
    ],
)
@pytest.mark.parametrize("objective", ["logistic", "cross_entropy"])
def test_batch_normalisation_goes_by_each_process_s_own_rows(processes, kind, options, objective):
    splits = (4, 2, 6)
    case = Case(objective, kind=kind, options=options)
    found, _ = trained_by_all(processes, case, splits)
    assert any("running_mean" in name and tensor.any() for name, tensor in found.items())
    check_close(found, trained_by_parts(case, splits), 1e-10)


def test_batch_normalisation_and_a_process_without_rows(processes):
    case = Case("cross_entropy", options=(("batch_norm", "behind"),))
    found, _ = trained_by_all(processes, case, (4, 0, 6))
    assert all(tensor.isfinite().all() for tensor in found.values())
    assert found["layers.0.batch_norm.num_batches_tracked"] == case.steps


def check_pipeline(processes: Processes, case: Case, size: int) -> None:
    """Each process ends up with the very bits of one."""
    found = processes.run(piped, case, (0,) * size, each=[(rank,) for rank in range(size)])
    expected = not_piped(case)
    for of_rank in found:
        assert of_rank["net"].keys() == expected["net"].keys()
        for name, tensor in expected["net"].items():
            assert torch.equal(of_rank["net"][name], tensor), name
        for name in expected.keys() - {"net"}:
            assert torch.equal(of_rank[name], expected[name]), name
    assert [name for of_rank in found for name in of_rank["own"]] == list(expected["net"])


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("outputs", ["pre", "post"])
def test_a_pipeline_has_the_bits_of_one_process(processes, size, outputs):
    check_pipeline(processes, Case(outputs=outputs, dtype=torch.float32, steps=200), size)


@pytest.mark.parametrize("objective", ["symba", "cross_entropy", "projection", "given mean"])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_pipelines_of_every_kind(processes, objective, kind):
    check_pipeline(processes, Case(objective, kind=kind, weighted=objective == "symba"), 2)


@pytest.mark.parametrize("sides", ["apart", "mixed"])
def test_a_pipeline_hands_on_what_is_known_of_rows(processes, sides):
    check_pipeline(processes, Case(sides=sides, weighted=True), 3)


def test_a_pipeline_of_batch_normalisation_and_of_rounded_products(processes):
    check_pipeline(processes, Case("cross_entropy", kind="convolution", options=(("batch_norm", "behind"),)), 2)
    rounded = (("compute_dtype", torch.bfloat16),)
    check_pipeline(processes, Case(dtype=torch.float32, options=rounded, steps=20), 3)
