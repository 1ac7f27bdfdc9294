"""Who is measured: the proof that all compute the same, what a step costs at least, its memory."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench import convolutions, counts, data, run
from bench.cases import CASES, NUM_CLASSES, Batch, Case
from bench.contenders import OURS, Autograd, Backprop, FFKernels
from bench.memory import peak_bytes, resident_rise
from bench.predictors import OurPrediction, PlainPrediction
from bench.proof import exact_of
from bench.timing import HostClock
from paper import epoch

from .bench_cases import small

# Who runs a case and how depends on these, not on its sizes.
DISTINCT = {
    (c.original_name, c.network, c.task, c.dtype, c.optimizer_name, min(len(c.sizes), 4), c.one_optimizer, c.bare): c
    for c in CASES.values()
}


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in DISTINCT.values()])
def test_contenders_compute_the_same(case: Case) -> None:
    case, batches = small(case)
    initial = case.initial()
    exact = exact_of(case, initial, batches)
    assert case.low_precision or exact.budget < (1e-3 if case.maps is None else 3e-3), (
        "a proof that would let anything pass"
    )
    checked = []
    for name, make in run.contenders_of(case, compiled=False).items():
        contender = make(case, initial)
        if contender.another:
            contender.step(*batches[0])
            continue
        proof = exact.check(contender)
        assert proof.holds, f"{name}: {proof}"
        checked.append(name)
    assert {OURS, "plain" if case.task == "predict" else "autograd"} <= set(checked)


def test_a_contender_that_computes_something_else_is_caught() -> None:
    case, batches = small(CASES["mohammadpz-float32"])
    exact = exact_of(case, case.initial(), batches)
    assert exact.check(Autograd(case, case.initial())).holds
    assert not exact.check(Autograd(replace(case, original_name="keras-io"), case.initial())).holds
    assert not exact.check(Autograd(case, case.initial(seed=1))).holds


def test_a_peer_that_overflows_is_caught_and_no_yardstick() -> None:
    case = replace(CASES["hinton-float32"], sizes=(784, 300), rows=10, proof_steps=1)
    initial = [(20 * weight, bias) for weight, bias in case.initial()]  # whose goodness is far above e^89
    exact = exact_of(case, initial, [tuple(torch.rand(10, 784) for _ in range(2))])
    assert exact.budget < 1e-3
    assert exact.check(FFKernels(case, initial)).holds
    assert not exact.check(Autograd(case, initial)).holds


def test_a_prediction_of_something_else_is_caught() -> None:
    case, batches = small(CASES["predict-mohammadpz"])
    exact = exact_of(case, case.initial(), batches)
    assert exact.check(OurPrediction(case, case.initial())).holds
    assert not exact.check(PlainPrediction(case, case.initial(seed=1))).holds

    class Constant(PlainPrediction):
        def step(self, *batch: Tensor) -> Tensor:
            return torch.full((len(batch[0]),), NUM_CLASSES)

    assert exact.check(Constant(case, case.initial())).error == math.inf


# What a case costs, counted in another way.


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.task == "train" and not case.maps])
def test_operations_of_a_step_are_those_of_its_products(name: str) -> None:
    case, batches = small(CASES[name])
    contender = Autograd(case, case.initial())
    with FlopCounterMode(display=False) as counter:
        contender.step(*batches[0])
    assert counts.flops(case) == counter.get_total_flops()


@pytest.mark.parametrize("name", ["cwc-mnist-float32", "cwc-cifar10-float32"])
def test_operations_of_convolutions_are_twice_those_forward(name: str) -> None:
    """PyTorch's counter forgets the groups of a weight gradient, whose products are as many."""
    case, batches = small(CASES[name])
    x = batches[0][0].view(-1, *case.maps)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for index, layer in enumerate(case.initial()):
            x = convolutions.activity(x, layer, index)
    assert counts.flops(case) == 2 * counter.get_total_flops()


def test_operations_of_a_prediction_share_the_first_product() -> None:
    case, batches = small(CASES["predict-mohammadpz"])
    with FlopCounterMode(display=False) as counter:
        PlainPrediction(case, case.initial()).step(*batches[0])
    first, second = 2 * 10 * 30 * 12, 2 * 10 * 12 * 12
    assert counter.get_total_flops() == NUM_CLASSES * (first + second)
    assert counts.flops(case) == first + NUM_CLASSES * second


@pytest.mark.parametrize("name", ["fflib-float32", "loewex-float64", "optimizer-sgd", "optimizer-rmsprop", "depth-4"])
def test_bytes_of_a_step_are_those_of_its_tensors(name: str) -> None:
    case, (batch, *_) = small(CASES[name])
    contender = Autograd(case, case.initial())
    contender.step(*batch)
    kept = [p for p in contender.parameters()]
    for optimizer in contender.optimizers:
        kept += [v for state in optimizer.state.values() for v in state.values() if v is not None and v.dim()]
    handed_on, x = 0, torch.cat(batch)
    for weight, bias in contender.layers[:-1]:
        x = case.original.forward(x, weight=weight, bias=bias)
        handed_on += x.nbytes
    assert counts.least_bytes(case) == sum(x.nbytes for x in batch) + 2 * handed_on + 2 * sum(t.nbytes for t in kept)


def test_the_limit_is_the_longer_of_computing_and_moving() -> None:
    assert counts.Limit(flops_per_s=10, bytes_per_s=4, flops=50, bytes=8).seconds == 5
    assert counts.Limit(flops_per_s=10, bytes_per_s=4, flops=50, bytes=80).seconds == 20


def test_peak_memory_is_what_is_there_at_once() -> None:
    def work() -> None:
        a = torch.empty(1000, dtype=torch.float64)
        b = torch.empty(500, dtype=torch.float64)
        del a
        c = torch.empty(700, dtype=torch.float64)
        del b, c

    assert peak_bytes(work, "cpu") == 8 * 1500
    assert peak_bytes(lambda: None, "cpu") == 0


@pytest.mark.skipif(resident_rise(lambda: None) is None, reason="the system does not tell")
def test_resident_memory_sees_what_torch_does_not_allocate() -> None:
    size = 64 << 20

    def work() -> None:
        bytearray(b"x") * size

    assert peak_bytes(work, "cpu") == 0
    assert 0.95 * size < (resident_rise(work) or 0) < 1.2 * size


def test_memory_of_a_step_does_not_grow_with_depth_but_backprops_does() -> None:
    def peaks(make: Callable[..., FFKernels | Backprop]) -> list[int]:
        found = []
        for depth in (4, 8):
            case = replace(CASES["depth-4"], sizes=(64,) * (depth + 1), rows=200)
            contender, batches = make(case, case.initial()), data.Data().batch(case, 0)
            contender.step(*batches)
            for p in contender.parameters():
                p.grad = None
            found.append(peak_bytes(partial(contender.step, *batches), "cpu"))
        return found

    ours, backprop = peaks(FFKernels), peaks(Backprop)
    # All that a further layer may leave is its result's goodness and sums of squares, one number a row.
    assert ours[1] - ours[0] <= 4 * 4 * (2 * 200 * 4 + 200)
    assert backprop[1] - backprop[0] >= 4 * 200 * 64 * 4


# Statistics.


def test_batches_do_not_fit_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(CASES["width-512"], sizes=(16, 16), rows=8)  # 1 KB a batch
    monkeypatch.setattr(data, "cache_bytes", lambda device: 5 * 1024)
    pool = data.Data().pool(case, 3)
    assert len(pool) == 10
    assert len({x.data_ptr() for batch in pool for x in batch}) == 20


def test_an_epoch_trains_the_networks_on_the_same_minibatches(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fflib")
    case, batches = small(CASES["fflib-float32"])

    class Batches(data.Data):
        def batch(self, case: Case, index: int) -> Batch:
            return batches[index % len(batches)]

    taken: dict[object, list[tuple[float, int]]] = {}

    class Clock(HostClock):
        def block(self, step, batches) -> tuple[float, float]:
            found = super().block(step, batches)
            taken.setdefault(step.__self__, []).append((found[0], len(batches)))
            return found

    monkeypatch.setattr(epoch, "HostClock", Clock)
    nets = epoch.networks(case, bfloat16=True)
    other = copy.deepcopy(nets[epoch.ORIGINAL])
    rows = epoch.train(case, nets, Batches(), steps=7, block=3)
    for index in range(7):
        other.run_train_combined(*batches[index % len(batches)])
    weights = [net.layers[1].weight for net in (*nets.values(), other)]
    assert torch.equal(weights[0], weights[3]) and not torch.equal(weights[0], weights[2])
    assert torch.allclose(weights[1], weights[0], rtol=1e-4, atol=1e-6)
    assert torch.allclose(weights[2], weights[0], rtol=0.1, atol=0.02)
    for row in rows:
        blocks = taken[nets[row["contender"]]]
        assert [count for _, count in blocks] == [3, 3, 1]
        assert row["seconds"] == pytest.approx(sum(seconds * count for seconds, count in blocks))
    assert rows[0]["times_as_fast_as_fflib"]["median"] == 1
    images, labels = torch.rand(12, 20), torch.arange(12) % NUM_CLASSES
    assert 0 <= epoch.error(nets[epoch.ORIGINAL], images, labels) <= 1
