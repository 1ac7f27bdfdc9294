"""`python -m ffkernels bench`: this package against what people use today, and against this machine's limit."""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch._dynamo

from ffkernels.cli import described, say
from ffkernels.recipes.progress import Progress

from . import agree, compare, machine, picture, report
from .cases import Case, select_cases
from .contenders import PACKAGES, installed
from .data import Data
from .memory import keep_freed_memory
from .plan import SHARES, Job, plan, rounds_of
from .run import Measurement, NotExact, contenders_of

PROGRAM = "python -m ffkernels bench"
FAILED, USER_ERROR = 1, 2
QUICK_WARM = 5  # steps before a case is timed
BUSY = 0.5  # load from which on times are not to be trusted
# The contenders of several cases share code: nobody may fall back to what is not compiled because others were.
COMPILED_TOGETHER = {
    "recompile_limit": 200, "accumulated_recompile_limit": 1000, "fail_on_recompile_limit_hit": True,
}  # fmt: skip
NO_BFLOAT16 = (
    "The bfloat16 and float16 cases are left out: this CPU has neither AMX nor AVX512-BF16, so they would say nothing "
    "about one that has (--force runs them all the same)."
)


def main(arguments: Sequence[str], make_readme: Callable[[], Sequence[Path]]) -> int:
    """Runs the command; 0, 1 where a case is not exact or two runs do not agree, 2 for what the user can mend.

    Args:
        make_readme: what `--readme` does; the files that it has written.
    """
    options = parser().parse_args(arguments)
    try:
        if options.readme:
            for path in make_readme():
                print(f"Written: {path}")
            return 0
        if options.agree:
            pairs = agree.pairs_of(*map(report.load, options.agree))
            print(agree.table(pairs))
            return 0 if all(pair.agrees for pair in pairs) else FAILED
        cases = _cases(options)
        if options.compare:
            return _compare(options, cases)
        return _measure(options, cases)
    except (ValueError, FileNotFoundError, compare.CannotCompare) as error:
        say(f"{PROGRAM}: {error}")
        return USER_ERROR


def parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        usage="%(prog)s [OPTIONS]",
        **described(
            """
            python -m ffkernels bench --quick             # a few cases: a minute
            python -m ffkernels bench                     # ten minutes
            python -m ffkernels bench --case 'width-*' loewex-float32
            python -m ffkernels bench --list              # the cases, and who runs each
            python -m ffkernels bench --compare main      # this checkout against another commit
            """,
            """
            This package against what people use today, and against this machine's limit: a
            table, and data and a picture in bench/results. bench/README.md says how to read it.
            """,
        ),
    )
    parser.add_argument("--case", nargs="+", metavar="NAME", help="only these; a name may be a pattern: 'width-*'")
    tier = parser.add_mutually_exclusive_group()
    tier.add_argument("--quick", action="store_true", help="a few cases, nothing compiled, wide intervals: a minute")
    tier.add_argument(
        "--thorough", action="store_true", help="four times as long, for intervals half as wide: half an hour"
    )
    tier.add_argument("--all", action="store_true", help="every case, also the largest")
    parser.add_argument("--list", action="store_true", help="name the cases and who runs them, and measure nothing")
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        metavar="DEVICE",
        help="cpu or cuda; auto: cuda, else cpu (%(default)s)",
    )
    parser.add_argument("--warm", type=int, metavar="N", help="steps before timing: trained nets leave out more rows")
    parser.add_argument(
        "--within", type=float, default=float("inf"), metavar="SECONDS", help="begin no case after that"
    )
    parser.add_argument("--force", action="store_true", help="low-precision cases even without a unit for them")
    parser.add_argument("--output", type=Path, default=report.RESULTS, metavar="DIR", help="for the results as JSON")
    parser.add_argument("--compare", metavar="REF", help="measure this checkout against another commit")
    parser.add_argument("--setup", metavar="COMMAND", help="with --compare: run in REF's tree first, to build it")
    parser.add_argument(
        "--agree", nargs=2, type=Path, metavar="JSON", help="whether two results of one commit lie within 5%%"
    )
    parser.add_argument(
        "--readme",
        action="store_true",
        help="make the tables and pictures of README and docs from the results",
    )
    return parser


def _cases(options: argparse.Namespace) -> list[Case]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.device not in ("auto", device) and options.device == "cuda":
        raise ValueError("--device cuda: torch finds none on this machine")
    device = device if options.device == "auto" else options.device
    tier = "all" if options.all or device == "cuda" else "quick" if options.quick else "default"
    cases = select_cases(options.case, tier, device)
    if device == "cpu" and not (options.force or machine.bfloat16_units()):
        kept = [case for case in cases if case.low_precision is None]
        if len(kept) < len(cases):
            say(NO_BFLOAT16)
        cases = kept
    warm = options.warm if options.warm is not None else QUICK_WARM if options.quick else None
    if warm is not None:
        cases = [replace(case, warm_steps=warm) for case in cases]
    return cases


def _effort(options: argparse.Namespace) -> str:
    return "quick" if options.quick else "thorough" if options.thorough else "full"


def _measure(options: argparse.Namespace, cases: list[Case]) -> int:
    jobs = plan(cases, _effort(options), options.all)
    for package in PACKAGES:
        if any(case.package == package for case in cases) and installed(package) is None:
            say(f"{package} is left out: it is not installed with all that it needs (pip install {package}).")
    if options.list:
        for job in jobs:
            print(f"{job.case.name}: {'; '.join(contenders_of(job.case, job.compiled))}")
        return 0
    if not cases:
        return 0
    about = machine.describe(cases[0].device) | {"freed_memory_kept": keep_freed_memory()}
    if about["load_before"] is not None and about["load_before"] > BUSY:
        say(f"This machine is busy (load {about['load_before']:.1f}): measure alone.")
    if machine.waiting(about):
        say(f"Small operations wait longer{machine.waiting(about)}: others have more of them. Leave it out.")
    path = options.output / f"{time.strftime('%Y%m%d-%H%M%S')}.json"
    result: report.Result = {"machine": about, "data": "noise", "quick": options.quick, "rows": []}
    problems = _run(jobs, _effort(options), result, path, options.within)
    rows = result["rows"]
    if rows:
        print(report.table(rows))
        print("\n".join(["", report.growth(rows)]) if report.growth(rows) else "")
        print(f"{machine.in_words(about)}, {result['data']}.")
        print(f"Written: {path}")
        if picture.available():
            drawn = path.with_suffix(".png")
            picture.draw(result, drawn)
            print(f"Written: {drawn}")
        else:
            say(picture.MISSING)
    for sentence in problems:
        say(f"{PROGRAM}: {sentence}")
    return FAILED if problems else 0


def _run(jobs: Sequence[Job], effort: str, result: report.Result, path: Path, within: float) -> list[str]:
    """Fills the rows of a result, and saves it after each visit, so that what is measured stays; what went wrong."""
    data, end, problems = Data(), time.monotonic() + within, []
    groups, visits = rounds_of(jobs, effort)
    steps = sum(len(contenders_of(job.case, job.compiled)) + visits for job in jobs)
    with Progress(steps) as progress, torch._dynamo.config.patch(COMPILED_TOGETHER):

        def begun(job: Job) -> Measurement | None:
            if time.monotonic() > end:
                with_compile = " with torch.compile" if job.compiled else ""
                progress.line(f"{job.case.name}{with_compile} is left out: the time is over")
                return None
            progress.line(f"{job.case.name} ...")
            return Measurement(job.case, data, job.compiled, lambda text: progress.step(lambda: text))

        def visited(job: Job, measurement: Measurement) -> Measurement:
            rows = measurement.visit(job.seconds / visits, visits)
            result["rows"] = [row for row in result["rows"] if row["case"] != job.case.name] + rows
            result["data"] = data.source
            report.save(result, path)
            progress.step(lambda: f"{job.case.name}: timed")
            return measurement

        def tried(job: Job, work: Callable[[], Measurement | None]) -> Measurement | None:
            try:
                return work()
            except NotExact as error:
                problems.append(str(error))
            except Exception as error:  # the other cases can do without this one
                traceback.print_exc()
                problems.append(f"{job.case.name} failed: {type(error).__name__}: {error}")
            return None

        for group in groups:
            torch.compiler.reset()  # what other cases have compiled counts towards the limits
            ready = [(job, tried(job, partial(begun, job))) for job in group]
            for _ in range(visits):
                ready = [(job, tried(job, partial(visited, job, of))) for job, of in ready if of is not None]
    return problems


def _compare(options: argparse.Namespace, cases: list[Case]) -> int:
    cells = [("case", "this checkout", options.compare, "here over there", "this checkout is")]
    for line in compare.compare(options.compare, cases, options.setup, SHARES[_effort(options)], say):
        here, there = (report.duration(value) for value in (line.here_s, line.there_s))
        cells.append((line.case, here, there, str(line.ratio), line.ratio.verdict))
    print(report.aligned(cells, right=(1, 2)))
    return 0
