"""The benchmark itself: contenders, counts, statistics, memory, refusal, comparison, README."""

from __future__ import annotations

import copy
import itertools
import json
import math
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench import agree, command, compare, counts, data, epoch, gpu, picture, plan, readme, report, run, timing
from bench.cases import AXES, CASES, NUM_CLASSES, TIERS, Batch, Case, select_cases
from bench.contenders import OURS, Autograd, Backprop, FFKernels
from bench.memory import peak_bytes, resident_rise
from bench.predictors import OurPrediction, PlainPrediction
from bench.proof import exact_of
from bench.timing import HostClock, exponent, interleave, paired_ratio
from bench.worker import Worker
from ffkernels import cli
from ffkernels.backends.select import BACKENDS


def small(case: Case) -> tuple[Case, list[Batch]]:
    """A case with little data and few units, and its batches."""
    case = replace(case, sizes=(30, *(12 for _ in case.sizes[1:])), rows=10)
    generator = torch.Generator().manual_seed(8)

    def rows() -> Tensor:
        x = torch.rand(10, 30, generator=generator).to(case.master_dtype)
        return x * (torch.rand(10, 30, generator=generator) < 0.7) * (0.5 + torch.rand(10, 1, generator=generator))

    sides = 1 if case.task == "predict" else 2
    return case, [tuple(rows().to(case.master_dtype) for _ in range(sides)) for _ in range(case.proof_steps)]


# Who runs a case and how depends on these, not on its sizes.
DISTINCT = {(c.peer_name, c.task, c.dtype, c.optimizer_name, min(len(c.sizes), 4)): c for c in CASES.values()}


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in DISTINCT.values()])
def test_contenders_compute_the_same(case: Case) -> None:
    case, batches = small(case)
    initial = case.initial()
    exact = exact_of(case, initial, batches)
    assert case.low_precision or exact.budget < 1e-3, "a proof that would let anything pass"
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
    assert not exact.check(Autograd(replace(case, peer_name="keras-io"), case.initial())).holds
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


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.task == "train"])
def test_operations_of_a_step_are_those_of_its_products(name: str) -> None:
    case, batches = small(CASES[name])
    contender = Autograd(case, case.initial())
    with FlopCounterMode(display=False) as counter:
        contender.step(*batches[0])
    assert counts.flops(case) == counter.get_total_flops()


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
        x = case.peer.forward(x, weight=weight, bias=bias)
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
            found.append(peak_bytes(lambda: contender.step(*batches), "cpu"))  # noqa: B023
        return found

    ours, backprop = peaks(FFKernels), peaks(Backprop)
    # All that a further layer may leave is its result's goodness and sums of squares, one number a row.
    assert ours[1] - ours[0] <= 4 * 4 * (2 * 200 * 4 + 200)
    assert backprop[1] - backprop[0] >= 4 * 200 * 64 * 4


# Statistics.


def test_paired_ratio_is_the_median_of_ratios_with_an_interval_from_their_order() -> None:
    ours = [1.0, 2.0, 4.0, 1.0, 2.0, 4.0, 1.0, 2.0, 4.0]
    theirs = [ours[i] * ratio for i, ratio in enumerate((3, 1, 2, 9, 8, 5, 4, 7, 6))]
    ratio = paired_ratio(theirs, ours)
    assert (ratio.median, ratio.low, ratio.high) == (5, 2, 8)
    # Of 9 fair coins, 0 or 1 (or 8 or 9) fall on one side with probability 20/512.
    assert ratio.coverage == 1 - 20 / 512


def test_exponent_is_that_of_the_larger_half() -> None:
    sizes = [1, 2, 4, 8, 16, 32]
    assert exponent(sizes, [5, 5, 5, *(3 * n**1.5 for n in (8, 16, 32))]) == pytest.approx(1.5)
    assert exponent(sizes[:2], [1, 2]) is None
    assert exponent(sizes, [0] * 6) is None


class FakeTime:
    """A clock that only moves when something says how long it took."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def now(self) -> float:
        return self.seconds

    perf_counter = now

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds


class FakeSide:
    """Takes steps of a given length on a machine that drifts by a factor of two, with 3% noise of its own."""

    def __init__(self, time: FakeTime, step_s: float, seed: int) -> None:
        self.time, self.step_s, self.generator = time, step_s, torch.Generator().manual_seed(seed)

    def block(self, lead: int, steps: int) -> float:
        before = self.time.now()
        for _ in range(steps):
            noise = 1 + 0.03 * torch.randn((), generator=self.generator).item()
            self.time.sleep(self.step_s * noise * (1.5 + 0.5 * math.sin(self.time.now())))
        return (self.time.now() - before) / steps


@pytest.mark.parametrize(("factor", "verdict"), [(1.1, "slower"), (0.9, "faster"), (1.0, "no difference seen")])
def test_compare_sees_a_planted_difference_of_a_tenth(factor: float, verdict: str, monkeypatch, capsys) -> None:
    time, seeds = FakeTime(), itertools.count()

    class Server(FakeSide):
        def __init__(self, root: Path) -> None:
            super().__init__(time, 0.002 * (factor if root == compare.ROOT else 1.0), seed=next(seeds))

        def __enter__(self) -> Server:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def prepare(self, case: Case) -> str:
            return "native"

    monkeypatch.setattr(compare, "Server", Server)
    monkeypatch.setattr(compare, "worktree", lambda ref, setup: nullcontext(Path("elsewhere")))
    monkeypatch.setattr(compare, "time", time)
    assert cli.main(["bench", "--case", "overhead", "--compare", "main", "--device", "cpu"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("overhead ")
    assert line.endswith(f"]  {verdict}")
    ratio = float(line.partition("[")[0].split()[-1])
    assert ratio == pytest.approx(factor, abs=0.02)


def test_a_sleep_planted_in_a_contender_is_seen() -> None:
    time = FakeTime()
    case, batches = small(CASES["mohammadpz-float32"])
    plain, slowed = (FFKernels(case, case.initial()) for _ in range(2))

    def step(contender: FFKernels, seconds: float) -> Callable[..., object]:
        def take(*batch: Tensor) -> None:
            contender.step(*batch)
            time.sleep(seconds)

        return take

    steps = {"plain": step(plain, 0.010), "slowed": step(slowed, 0.011)}
    times = interleave(steps, batches, 2.0, HostClock(time.now))
    ratio = paired_ratio(times["slowed"].seconds, times["slowed"].beside)
    assert ratio.verdict == "slower"
    assert ratio.median == pytest.approx(1.1)


def test_every_contender_runs_between_two_blocks_of_the_first() -> None:
    time, seen = FakeTime(), []

    def taker(name: str, seconds: float) -> Callable[..., object]:
        def take(x: Tensor) -> None:
            seen.append((name, x.item()))
            time.sleep(seconds)

        return take

    pool = [(torch.tensor(i),) for i in range(1000)]
    steps = {"a": taker("a", 0.010), "b": taker("b", 0.030), "c": taker("c", 0.001)}
    times = interleave(steps, pool, 0.5, HostClock(time.now))
    assert [len(times[name].seconds) for name in "abc"] == [2 * timing.MIN_ROUNDS + 1, *2 * [timing.MIN_ROUNDS]]
    del seen[:3]  # the trial steps
    blocks = [list(of) for _, of in itertools.groupby(seen, key=lambda taken: taken[0])]
    order = "".join(block[0][0] for block in blocks)
    assert order == "abaca" + "caba" + "baca" + "caba" + "baca" + "caba"
    # 30 ms a block, and a step untimed before it.
    assert {(block[0][0], len(block)) for block in blocks} == {("a", 1 + 3), ("b", 1 + 1), ("c", 3 + 30)}
    taken = [index for _, index in seen]
    assert taken == list(range(len(taken))), "batches rotate through the pool"


def test_a_ratio_is_over_what_the_reference_took_around_it() -> None:
    time = FakeTime()
    length = itertools.count(1)  # every step of a slowing machine takes longer than the one before

    def take(x: Tensor) -> None:
        time.sleep(next(length))

    times = interleave({"a": take, "b": take}, [(torch.zeros(()),)], 0.0, HostClock(time.now))
    a, b = times["a"], times["b"]
    assert a.beside == a.seconds
    assert b.beside == [(before + after) / 2 for before, after in itertools.pairwise(a.seconds)] == b.seconds


def test_one_slow_step_is_not_the_time_of_its_block() -> None:
    time, lengths = FakeTime(), iter([1.0, 7.0, 1.0])
    block = HostClock(time.now).block(lambda: time.sleep(next(lengths)), [(), (), ()])
    assert block == (1.0, 1.0)


def test_visits_share_the_rounds_and_the_cases_take_turns(monkeypatch, tmp_path: Path) -> None:
    visited = []

    class Told:
        def __init__(self, case: Case, *others: object) -> None:
            self.case = case

        def visit(self, seconds: float, visits: int) -> list[run.Row]:
            visited.append((self.case.name, seconds, visits))
            return [{"case": self.case.name, "visit": len(visited)}]

    monkeypatch.setattr(command, "Measurement", Told)
    result = {"machine": {}, "rows": []}
    jobs = [plan.Job(CASES[name], False, 8.0) for name in ("overhead", "batch-1")]
    assert command._run(jobs, "full", result, tmp_path / "r.json", math.inf) == []
    assert visited == plan.VISITS * [
        ("overhead", 8 / plan.VISITS, plan.VISITS),
        ("batch-1", 8 / plan.VISITS, plan.VISITS),
    ]
    assert [row["visit"] for row in result["rows"]] == [2 * plan.VISITS - 1, 2 * plan.VISITS]
    assert plan.rounds_of(jobs, "quick") == ([[jobs[0]], [jobs[1]]], 1)

    time, steps = FakeTime(), {"a": lambda x: time.sleep(1.0), "b": lambda x: time.sleep(3.0)}
    several = [interleave(steps, [(torch.zeros(()),)], 0.0, HostClock(time.now), visits=3) for _ in range(3)]
    times = several[0]["b"] + several[1]["b"] + several[2]["b"]
    assert len(times.seconds) == timing.MIN_ROUNDS
    assert paired_ratio(times.seconds, times.beside).median == pytest.approx(3)


def test_batches_do_not_fit_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(CASES["width-512"], sizes=(16, 16), rows=8)  # 1 KB a batch
    monkeypatch.setattr(data, "cache_bytes", lambda device: 5 * 1024)
    pool = data.Data().pool(case, 3)
    assert len(pool) == 10
    assert len({x.data_ptr() for batch in pool for x in batch}) == 20


# The command.


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A command that measures the smallest case in no time."""
    monkeypatch.setattr(timing, "MAX_ROUNDS", 2)
    monkeypatch.setattr(timing, "MAX_BLOCK", 1)
    monkeypatch.setattr(counts, "product_rate", lambda dtype, device: 1e9)
    monkeypatch.setattr(counts, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(data, "MAX_POOL", 2)
    return ["bench", "--case", "overhead", "--quick", "--device", "cpu", "--output", str(tmp_path / "results")]


def test_a_run_leaves_data_a_table_and_a_picture(quick: list[str], tmp_path: Path, capsys) -> None:
    assert cli.main(quick) == 0
    (result,) = report.load_results(tmp_path / "results")
    assert result["machine"]["torch"] == torch.__version__
    assert {"commit", "date", "threads", "cpu"} <= result["machine"].keys()
    ours = result["rows"][0]
    assert (ours["contender"], ours["same_step"], ours["over_ours"]["median"]) == (OURS, True, 1)
    assert ours["of_limit"] * ours["median_ms"] == pytest.approx(1e3 * ours["bytes"] / 1e9, rel=1e-3)
    out = capsys.readouterr().out
    for row in result["rows"]:
        assert row["contender"] in out
    if picture.available():
        (drawn,) = (tmp_path / "results").glob("*.png")
        assert description_of(drawn) == picture.fingerprint(result)


def test_a_picture_of_curves_alone_and_of_a_single_point(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    about = {"cpu": "x", "threads": 1, "torch": "2", "commit": None}
    row = {"contender": OURS, "median_ms": 1.0, "over_ours": {"median": 1.0, "low": 1.0, "high": 1.0}}
    for cases in (["batch-1"], list(AXES["batch"])):
        picture.draw({"machine": about, "rows": [row | {"case": case} for case in cases]}, tmp_path / "p.png")
        assert (tmp_path / "p.png").stat().st_size > 1000
        (tmp_path / "p.png").unlink()


def test_a_case_that_is_not_exact_is_not_reported(quick: list[str], tmp_path: Path, monkeypatch, capsys) -> None:
    honest = FFKernels.step

    def off(self: FFKernels, *batch: Tensor) -> None:
        honest(self, *batch)
        self.net.layers[0].weight.data.mul_(1.01)

    monkeypatch.setattr(FFKernels, "step", off)
    assert cli.main(quick) == command.FAILED
    out, err = capsys.readouterr()
    assert out == ""
    assert "overhead: ffkernels is not exact (off by " in err
    assert not (tmp_path / "results").exists()


def test_bad_input_is_one_sentence(quick: list[str], capsys, monkeypatch) -> None:
    assert cli.main(["bench", "--case", "nothing-*"]) == 2
    assert "no case is named 'nothing-*'; there are: fflib-float32, " in capsys.readouterr().err
    assert cli.main([*quick, "--compare", "no-such-commit"]) == 2
    assert "no-such-commit" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", "--device", "cuda"]) == 2
    assert "--device cuda" in capsys.readouterr().err


def test_without_the_checkout_it_says_so(monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "ffkernels" / "cli.py"))
    assert cli.main(["bench", "--quick"]) == 2
    assert "checkout" in capsys.readouterr().err


def test_tiers_grow_and_patterns_choose() -> None:
    quick, default, every = (select_cases(None, tier) for tier in TIERS)
    assert {c.name for c in quick} < {c.name for c in default} < {c.name for c in every} == set(CASES)
    assert [c.name for c in select_cases(["depth-*"], "quick")] == list(AXES["depth"])
    for axis, cases in AXES.items():
        for name, n in cases.items():
            case = CASES[name]
            assert {"width": case.sizes[1], "batch": case.rows, "depth": len(case.shapes)}[axis] == n


def test_a_worker_takes_steps_on_command(monkeypatch) -> None:
    monkeypatch.setattr(data, "MAX_POOL", 2)
    worker = Worker()
    assert worker.answer({"prepare": "overhead", "device": "cpu", "warm_steps": 1}) in BACKENDS
    assert isinstance(worker.answer({"block": [1, 2]}), float)


def test_a_server_is_this_tree_in_a_process_of_its_own() -> None:
    with compare.Server(compare.ROOT) as server:
        with pytest.raises(compare.CannotCompare, match="KeyError"):
            server.ask(prepare="no such case")
        server.process.kill()
        with pytest.raises(compare.CannotCompare, match="does not run on the tree"):
            server.ask(block=[1, 1])


# Whether two runs agree.


def result_of(*rows: tuple[str, str, float, float], **machine: str) -> report.Result:
    """A result whose rows are (case, contender, milliseconds, over ours)."""
    about = {"device": "cpu", "cpu": "x", "threads": 2, "commit": "c"} | machine
    made = [
        {"case": case, "contender": name, "median_ms": ms, "over_ours": {"median": ratio}}
        for case, name, ms, ratio in rows
    ]
    return {"machine": about, "quick": False, "rows": made}


def test_two_runs_agree_where_no_ratio_over_a_millisecond_moves_by_more_than_5_percent(tmp_path: Path, capsys) -> None:
    first = [("long", OURS, 2.0, 1.0), ("long", "autograd", 4.0, 2.0), ("short", OURS, 0.9, 1.0)]
    for name, again, code in (("same", 2.09, 0), ("above", 2.11, 1), ("below", 1.89, 1)):
        paths = [tmp_path / f"{name}-{i}.json" for i in range(2)]
        report.save(result_of(*first, ("short", "autograd", 9.0, 10.0)), paths[0])
        second = [*first[:1], ("long", "autograd", 40.0, again), first[2], ("short", "autograd", 9.0, 1.0)]
        report.save(result_of(*second), paths[1])
        assert cli.main(["bench", "--agree", *map(str, paths)]) == code
        out = capsys.readouterr().out
        assert f"{1 - code} of 1 ratios agree within 5%." in out
        assert "short" not in out


def test_runs_that_cannot_agree_are_not_held_against_each_other(tmp_path: Path, capsys) -> None:
    row = ("long", OURS, 2.0, 1.0)
    with pytest.raises(ValueError, match="their commits"):
        agree.pairs_of(result_of(row), result_of(row, commit="d"))
    with pytest.raises(ValueError, match="no case over 1 ms"):
        agree.pairs_of(result_of(row), result_of(("other", OURS, 2.0, 1.0)))
    assert cli.main(["bench", "--agree", str(tmp_path / "none.json"), str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err


# The plan, and a GPU's.


def test_on_a_cpu_each_case_runs_once_in_the_order_of_the_list() -> None:
    jobs = plan.plan(select_cases(None, "default"), effort="full", compile_all=False)
    assert [job.case.name for job in jobs] == [case.name for case in select_cases(None, "default")]
    assert all((job.compiled, job.seconds) == (job.case.compiled, job.case.seconds) for job in jobs)


def test_on_cuda_the_most_important_comes_first_and_compiling_after_the_short_cases() -> None:
    jobs = plan.plan([replace(case, device="cuda") for case in CASES.values()], effort="full", compile_all=False)
    assert {job.case.name for job in jobs if not job.compiled} == set(CASES)
    assert {job.case.name for job in jobs if job.compiled} == {case.name for case in CASES.values() if case.compiled}
    kinds = [kind for kind, _ in itertools.groupby((job.case.tier, job.compiled) for job in jobs)]
    assert kinds == [kind for kind in plan.IMPORTANCE if kind != ("all", True)] + [("all", True)]
    assert max(job.seconds for job in jobs) <= plan.CUDA_SECONDS


def test_a_second_result_of_a_case_replaces_the_first(monkeypatch, tmp_path: Path) -> None:
    class Told:
        def __init__(self, case: Case, data: object, compiled: bool, *others: object) -> None:
            self.row = {"case": case.name, "compiled": compiled}

        def visit(self, seconds: float, visits: int) -> list[run.Row]:
            return [self.row]

    monkeypatch.setattr(command, "Measurement", Told)
    cases = [replace(CASES[name], device="cuda") for name in ("overhead", "batch-1")]
    monkeypatch.setattr(command, "contenders_of", lambda case, compiled: {})
    result = {"machine": {}, "rows": []}
    jobs = plan.plan(cases, "full", False)
    assert command._run(jobs, "full", result, tmp_path / "r.json", math.inf) == []
    assert {row["case"]: row["compiled"] for row in result["rows"]} == {"batch-1": False, "overhead": True}
    assert len(report.load(tmp_path / "r.json")["rows"]) == 2


def test_what_does_not_begin_in_time_is_left_out_and_said(quick: list[str], tmp_path: Path, capsys) -> None:
    assert cli.main([*quick, "--within", "-1"]) == 0
    assert "overhead is left out" in "".join(capsys.readouterr())
    assert not (tmp_path / "results").exists()


# Installed beside torch where the suite is complete, and nowhere else.
OPTIONAL = ("hypothesis", "tqdm", "matplotlib", "scipy", "sklearn", "fflib", "bioff", "numcodecs")
ON_A_GPU = """
import sys
sys.modules.update(dict.fromkeys({optional}))
import bench.command, bench.gpu, bench.test_steps, tests.conftest, tests.test_gpu
from ffkernels import cli
sys.exit(cli.main(["bench", "--case", "overhead", "--list", "--device", "cpu"]))
"""


def test_what_make_gpu_runs_needs_nothing_that_is_optional() -> None:
    program = ON_A_GPU.format(optional=OPTIONAL)
    done = subprocess.run([sys.executable, "-c", program], cwd=compare.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "overhead: ffkernels" in done.stdout


def test_the_parts_of_make_gpu_fit_nine_minutes_and_benchmarks_stop_before_they_are_stopped(monkeypatch) -> None:
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/bin/{name}")
    parts = {name: (command, seconds) for name, command, seconds in gpu.parts(Path("out"))}
    assert sum(seconds for _, seconds in parts.values()) <= 9 * 60
    arguments, limit = parts["benchmarks"]
    within = command.parser().parse_args(arguments[arguments.index("bench") + 1 :]).within
    assert within < limit


def test_make_gpu_goes_on_where_a_part_fails_or_takes_too_long(tmp_path: Path, monkeypatch, capsys) -> None:
    def python(code: str) -> list[str]:
        return [sys.executable, "-c", code]

    parts = [("fails", python("raise SystemExit(3)"), 60), ("hangs", python("import time; time.sleep(99)"), 1)]
    parts += [("missing", [str(tmp_path / "no such program")], 60), ("works", python("print('seen')"), 60)]
    monkeypatch.setattr(gpu, "parts", lambda output: parts)
    monkeypatch.setattr(gpu, "machine", lambda device: {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "argv", ["gpu", "--output", str(tmp_path)])
    assert gpu.main() == 1
    found = json.loads((tmp_path / "summary.json").read_text())["parts"]
    assert list(found) == ["fails", "hangs", "missing", "works"]
    assert [found["fails"]["result"], found["works"]["result"]] == [3, 0]
    assert found["hangs"]["result"] == "stopped after 1 s"
    assert found["missing"]["result"].startswith("did not start")
    assert (tmp_path / "works.log").read_text() == "seen\n"


def test_a_case_that_fails_costs_only_itself(quick: list[str], tmp_path: Path, monkeypatch, capsys) -> None:
    class Failing(command.Measurement):
        def visit(self, *arguments: object) -> list[run.Row]:
            if self.case.name == "depth-1":
                raise RuntimeError("out of memory")
            return super().visit(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(command, "Measurement", Failing)
    quick[2:3] = ["depth-1", "overhead"]
    assert cli.main(quick) == command.FAILED
    assert "depth-1 failed: RuntimeError: out of memory" in capsys.readouterr().err
    (result,) = report.load_results(tmp_path / "results")
    assert {row["case"] for row in result["rows"]} == {"overhead"}


# Text and README.


def test_growth_tells_the_exponents() -> None:
    rows = [
        {"case": case, "contender": OURS, "median_ms": 2.0 * n**1.25, "peak_bytes": 7 * n**2}
        for case, n in AXES["depth"].items()
    ]
    last = report.growth(rows).splitlines()[-1].split()
    assert last == ["depth", OURS, "1..16", "depth^1.25", "depth^2.00"]
    assert report.growth(rows[:1]) == ""


def test_the_table_has_the_hosts_time_where_it_is_not_the_whole() -> None:
    row = {"case": "a", "contender": OURS, "median_ms": 1.0, "host_ms": 1.0}
    row["over_ours"] = {"median": 1.0, "low": 1.0, "high": 1.0}
    assert "host" not in report.table([row])
    assert report.table([row, row | {"contender": "autograd", "host_ms": 0.25}]).splitlines()[2].split()[1:5] == [
        "1", "ms", "250", "us",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("units", "words"),
    [([], "no bfloat16 unit, no AMX"), (["AVX512-BF16"], "AVX512-BF16, no AMX"), (["AMX"], "AMX")],
)
def test_the_machine_in_words_names_its_matrix_unit(units: list[str], words: str) -> None:
    about = {"cpu": "x", "bfloat16_units": units, "threads": 2, "torch": "2"}
    assert report.in_words(about) == f"x with {words}, 2 threads, torch 2"


def test_saved_results_are_the_same_when_loaded(tmp_path: Path) -> None:
    result = {"machine": {"cpu": "x"}, "quick": True, "rows": [{"case": "a", "block_ms": [1.0]}, {"case": "b"}]}
    report.save(result, tmp_path / "r.json")
    assert report.load_results(tmp_path) == [result]
    assert len([line for line in (tmp_path / "r.json").read_text().splitlines() if '"case"' in line]) == 2


def test_readme_takes_each_case_from_its_newest_full_run() -> None:
    def result(date: str, quick: bool, *cases: str) -> dict:
        rows = [{"case": case, "contender": OURS, "median_ms": 1.0} for case in cases]
        return {"machine": {"device": "cpu", "date": date}, "quick": quick, "rows": rows}

    results = [result("1", False, "a"), result("2", False, "a", "b"), result("3", True, "a", "c")]
    rows = readme.by_device(results)["cpu"]["rows"]
    assert {row["case"]: row["run"] for row in rows} == {"a": "2", "b": "2", "c": "3"}
    assert len(rows) == 3


def test_readme_mixes_no_two_cpus() -> None:
    def result(cpu: str, *cases: str) -> report.Result:
        return result_of(*((case, OURS, 2.0, 1.0) for case in cases), cpu=cpu, date=cpu)

    rows = readme.by_device([result("old", "a", "b"), result("new", "a")])["cpu"]["rows"]
    assert [(row["case"], row["run"]) for row in rows] == [("a", "new")]


def test_readme_is_made_from_the_results() -> None:
    results = readme.by_device(report.load_results())
    assert readme.parts(readme.README.read_text())[1].strip() == readme.text(results), "run: bench --readme"
    for name, result in results.items():
        drawn = readme.ROOT / readme.PICTURE.format(device=name)
        assert description_of(drawn) == picture.fingerprint(result), "run: bench --readme"


def test_readme_without_markers_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("no markers")
    with pytest.raises(ValueError, match="markers"):
        readme.update(path)
    assert path.read_text() == "no markers"


def description_of(path: Path) -> str:
    """What a PNG file says of itself in its text chunk `Description`."""
    content, at = path.read_bytes(), 8
    while at < len(content):
        (length,), kind = struct.unpack(">I", content[at : at + 4]), content[at + 4 : at + 8]
        body = content[at + 8 : at + 8 + length]
        assert zlib.crc32(kind + body) == struct.unpack(">I", content[at + 8 + length : at + 12 + length])[0]
        if kind == b"tEXt" and body.startswith(b"Description\0"):
            return body.partition(b"\0")[2].decode()
        at += 12 + length
    raise AssertionError(f"{path} has no description: {json.dumps(path.name)}")


def test_an_epoch_trains_the_networks_on_the_same_minibatches() -> None:
    pytest.importorskip("fflib")
    case, batches = small(CASES["fflib-float32"])

    class Batches(data.Data):
        def batch(self, case: Case, index: int) -> Batch:
            return batches[index % len(batches)]

    nets = epoch.networks(case, bfloat16=True)
    twin = copy.deepcopy(nets[epoch.ORIGINAL])
    rows = epoch.train(case, nets, Batches(), steps=7, block=3)
    for index in range(7):
        twin.run_train_combined(*batches[index % len(batches)])
    weights = [net.layers[1].weight for net in (*nets.values(), twin)]
    assert torch.equal(weights[0], weights[3]) and not torch.equal(weights[0], weights[2])
    assert torch.allclose(weights[1], weights[0], rtol=1e-4, atol=1e-6)
    assert torch.allclose(weights[2], weights[0], rtol=0.1, atol=0.02)
    for row in rows:
        assert row["seconds"] == pytest.approx(
            sum(t * n for t, n in zip(row["block_ms"], (3, 3, 1), strict=True)) / 1e3, rel=0.01
        )
    assert rows[0]["times_as_fast_as_fflib"]["median"] == 1
    images, labels = torch.rand(12, 20), torch.arange(12) % NUM_CLASSES
    assert 0 <= epoch.error(nets[epoch.ORIGINAL], images, labels) <= 1
