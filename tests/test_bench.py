"""The benchmark's command: plan, refusal, results as data, table, pictures and pages."""

from __future__ import annotations

import itertools
import json
import math
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import command, compare, counts, data, gpu, machine, picture, plan, report, run, timing
from bench.cases import AXES, CASES, TIERS, Case, select_cases
from bench.contenders import OURS, FFKernels
from ffkernels import cli
from paper import page, readme

from .bench_cases import result_of


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
    for words in (["bench", "--quick"], ["paper", "tables"], ["reproduce", "quick"]):
        assert cli.main(words) == 2
        assert f"{words[0]} is not part of the installed package: run this in a checkout" in capsys.readouterr().err
    assert cli.main(["--help"]) == 0
    assert not any(name in capsys.readouterr().out for name in cli.OF_CHECKOUT)


def test_tiers_grow_and_patterns_choose() -> None:
    quick, default, every = (select_cases(None, tier) for tier in TIERS)
    assert {c.name for c in quick} < {c.name for c in default} < {c.name for c in every} == set(CASES)
    assert [c.name for c in select_cases(["depth-*"], "quick")] == list(AXES["depth"])
    for axis, cases in AXES.items():
        for name, n in cases.items():
            case = CASES[name]
            assert {"width": case.sizes[1], "batch": case.rows, "depth": len(case.shapes)}[axis] == n


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
from paper import page, readme
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
    monkeypatch.setattr(gpu, "describe", lambda device: {})
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
            return super().visit(*arguments)

    monkeypatch.setattr(command, "Measurement", Failing)
    quick[2:3] = ["depth-1", "overhead"]
    assert cli.main(quick) == command.FAILED
    assert "depth-1 failed: RuntimeError: out of memory" in capsys.readouterr().err
    (result,) = report.load_results(tmp_path / "results")
    assert {row["case"] for row in result["rows"]} == {"overhead"}


def test_every_visit_starts_from_the_same_weights(monkeypatch) -> None:
    monkeypatch.setattr(data, "MAX_POOL", 2)
    monkeypatch.setattr(run, "limit_of", lambda case: counts.Limit(1.0, 1.0, 1, 1))
    measurement = run.Measurement(replace(CASES["overhead"], optimizer_name="adam"), data.Data(), compiled=False)
    ours = measurement.contenders[OURS]
    assert isinstance(ours, FFKernels)
    seen: list[list[Tensor]] = []

    def take_steps(steps, pool, *others) -> dict[str, timing.Times]:
        seen.append([value.detach().clone() for value in ours.state()])
        for step in steps.values():
            step(*pool[0])
        seen.append([value.detach().clone() for value in ours.state()])
        return {name: timing.Times([1.0], [1.0], [1.0]) for name in steps}

    monkeypatch.setattr(run, "interleave", take_steps)
    for _ in range(2):
        measurement.visit(1.0, 2)
    before, after, again, _ = seen
    assert len(before) == 8  # weight and bias, and three of Adam's for each
    assert all(map(torch.equal, before, again))
    assert not any(map(torch.equal, before, after))


# Text and pages.


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
    assert machine.in_words(about) == f"x with {words}, 2 threads, torch 2"


def test_the_machine_in_words_says_how_threads_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in machine.WAITING:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert machine.waiting(machine.describe("cpu")) == ""
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    about = machine.describe("cpu")
    assert about["openmp"].items() >= {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}.items()
    assert ", OMP_WAIT_POLICY=PASSIVE, torch" in machine.in_words(about)


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


def test_readme_shows_each_kind_of_cpu_by_the_newest_full_run_of_it() -> None:
    def result(date: str, cpu: str, *units: str, quick: bool = False, **about: str) -> report.Result:
        made = result_of(("a", OURS, float(date), 1.0), cpu=cpu, date=date, torch="2", **about)
        made["machine"]["bfloat16_units"] = list(units)
        return made | {"quick": quick}

    results = readme.by_device(
        [
            result("1", "old", "AMX"),
            result("2", "new", "AMX", "AVX512-BF16", backend_forced="native"),
            result("3", "plain", "AVX512-BF16"),
            result("4", "plain"),
            result("5", "new", "AMX", "AVX512-BF16", quick=True),
        ]
    )
    assert {name: [row["run"] for row in of["rows"]] for name, of in results.items()} == {
        "cpu": ["4"],
        "cpu-amx": ["2"],
        "cpu-avx512-bf16": ["3"],
    }
    text = readme.text(results)
    assert text.count("\n| a | ") == 3 and text.count(readme.INTRODUCTION) == text.count(readme.LEGEND) == 1
    of_plain, of_amx = text.split("![Benchmarks, cpu](benchmarks-cpu.png)")
    assert "**plain with no bfloat16 unit, no AMX, 2 threads, torch 2**, 4:" in of_plain and "| 4 ms |" in of_plain
    said = "**new with AMX and AVX512-BF16, 2 threads, torch 2**, 2, with `FFKERNELS_BACKEND=native`:"
    assert said in of_amx and "| 2 ms |" in of_amx and "![Benchmarks, cpu-amx](benchmarks-cpu-amx.png)" in of_amx


def test_a_run_records_the_backend_that_was_forced(monkeypatch) -> None:
    assert machine.describe("cpu")["backend_forced"] is None
    monkeypatch.setenv("FFKERNELS_BACKEND", "native")
    assert machine.describe("cpu")["backend_forced"] == "native"


def test_readme_has_a_few_cases_of_the_cpu_measured_last() -> None:
    old = result_of(("fflib-float32", OURS, 1.0, 1.0), ("fflib-float32", "autograd", 5.0, 5.0), cpu="old", date="1")
    new = result_of(
        ("loewex-float32", OURS, 1.0, 1.0), ("loewex-float32", "autograd", 3.0, 3.0), ("width-512", OURS, 1.0, 1.0),
        cpu="new", date="2026-01-02T03", torch="2",
    )  # fmt: skip
    for row in (*old["rows"], *new["rows"]):
        row["over_ours"] |= {"low": 1.0, "high": 9.0, "coverage": 0.95}
    gpu = old["machine"] | {"device": "some GPU", "date": "2027"}
    lines = readme.short(readme.by_device([old, new, {**old, "machine": gpu}])).splitlines()
    assert lines[0] == "| a step of | plain PyTorch |"
    assert lines[2].startswith("| loeweX, 784-1000-1000-1000 | 3.00 [1.00, 9.00] |") and lines[3] == ""
    assert lines[4].startswith("new ") and lines[4].endswith(", 2026-01-02.")
    assert len(lines) == 5
    assert readme.short({}) == "Nothing is measured yet."


def test_the_pages_are_made_from_the_results() -> None:
    results = readme.by_device(report.load_results())
    for path, text in ((readme.README, readme.short(results)), (readme.PAGE, readme.text(results))):
        assert page.parts(path, readme.BEGIN, readme.END)[1].strip() == text, "run: bench --readme"
    for name, result in results.items():
        drawn = readme.PAGE.parent / readme.PICTURE.format(device=name)
        assert description_of(drawn) == picture.fingerprint(result), "run: bench --readme"


def test_a_page_without_markers_leaves_both_alone(tmp_path: Path) -> None:
    with_markers, without = tmp_path / "a.md", tmp_path / "b.md"
    marked = f"{readme.BEGIN}\n{readme.END}\n"
    with_markers.write_text(marked)
    without.write_text("no markers")
    for paths in ((with_markers, without), (without, with_markers)):
        with pytest.raises(ValueError, match="markers"):
            readme.update(*paths)
    assert (with_markers.read_text(), without.read_text()) == (marked, "no markers")


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
