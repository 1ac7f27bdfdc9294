"""How the benchmark takes time, compares commits, and tells whether two runs agree."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import agree, command, compare, data, plan, report, run, timing
from bench.cases import CASES, Case
from bench.contenders import OURS, FFKernels
from bench.timing import HostClock, exponent, interleave, paired_ratio
from bench.worker import Worker
from ffkernels import cli
from ffkernels.backends.select import BACKENDS

from .bench_cases import result_of, small


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
    del seen[:6]  # the trial steps, twice
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
