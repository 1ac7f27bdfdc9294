"""This checkout against another commit: both in processes of their own that take turns, step for step."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from .cases import Case
from .machine import ROOT, git
from .timing import MAX_ROUNDS, MIN_ROUNDS, Ratio, block_of, paired_ratio, rotated

# An idle process spins for a while after its last parallel work; so long the other one waits.
PAUSE_S = 0.02
PAIRS = 3


class CannotCompare(RuntimeError):
    """What keeps the other commit from being measured; its text is all that a user needs to see."""


class Side(Protocol):
    """One of the two, ready for a case."""

    def block(self, lead: int, steps: int) -> float:
        """Takes `lead` steps untimed and `steps` timed ones on the next batches; seconds per step."""


@dataclass(frozen=True)
class Line:
    """One case: medians in seconds, and the median of paired ratios."""

    case: str
    here_s: float
    there_s: float
    ratio: Ratio


def paired_times(
    here: Side, there: Side, seconds: float, now: Callable[[], float], pause: Callable[[], object]
) -> tuple[list[float], list[float]]:
    """Seconds per step of both in each round; they take turns until `seconds` are over, and who is first rotates."""
    sides = {"here": here, "there": there}
    lead, block = block_of(min(side.block(1, 1) for side in sides.values()))
    times: dict[str, list[float]] = {name: [] for name in sides}
    end = now() + seconds
    for turn in range(MAX_ROUNDS):
        if turn >= MIN_ROUNDS and now() > end:
            break
        for name in rotated(sides, turn):
            pause()
            times[name].append(sides[name].block(lead, block))
    return times["here"], times["there"]


def compare(
    ref: str, cases: Sequence[Case], setup: str | None, share: float, say: Callable[[str], object]
) -> list[Line]:
    """Measures every case with this checkout and with the commit `ref`; `setup` is a command that builds its tree.

    Every case is measured by several pairs of processes, since one may be slower than the next for as long as it lives
    (where its memory happens to lie): what only one pair shows widens the interval.

    Raises:
        CannotCompare: where there is no such commit, its tree can run none of the cases, or this side is not exact.
    """
    here_s: dict[str, list[float]] = {case.name: [] for case in cases}
    there_s: dict[str, list[float]] = {case.name: [] for case in cases}
    with worktree(ref, setup) as tree:
        for pair in range(PAIRS):
            with Server(ROOT) as here, Server(tree) as there:
                for case in cases:
                    if case.name not in here_s:
                        continue
                    say(f"{case.name}, processes {pair + 1} of {PAIRS} ...")
                    ours = here.prepare(case)
                    try:
                        theirs = there.prepare(case)
                    except CannotCompare as error:
                        say(f"{case.name} is left out: {ref} does not run it ({error})")
                        del here_s[case.name]
                        continue
                    if ours != theirs:
                        say(f"{case.name}: this checkout runs on {ours}, {ref} on {theirs}")
                    seconds = case.seconds * share / PAIRS
                    times = paired_times(here, there, seconds, time.perf_counter, lambda: time.sleep(PAUSE_S))
                    here_s[case.name] += times[0]
                    there_s[case.name] += times[1]
    if not here_s:
        raise CannotCompare(f"{ref} runs none of the cases")
    return [
        Line(name, statistics.median(ours), statistics.median(there_s[name]), paired_ratio(ours, there_s[name]))
        for name, ours in here_s.items()
    ]


@contextmanager
def worktree(ref: str, setup: str | None) -> Iterator[Path]:
    """The tree of a commit in a temporary folder, with this checkout's benchmark in it."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        _git("worktree", "add", "--detach", str(tree), ref)
        try:
            shutil.rmtree(tree / "bench", ignore_errors=True)
            shutil.copytree(ROOT / "bench", tree / "bench", ignore=shutil.ignore_patterns("__pycache__", "results"))
            if setup is not None and subprocess.run(setup, shell=True, cwd=tree, stdout=sys.stderr).returncode:
                raise CannotCompare(f"--setup {setup!r} failed in the tree of {ref}")
            yield tree
        finally:
            _git("worktree", "remove", "--force", str(tree))


def _git(*arguments: str) -> None:
    try:
        git(*arguments)
    except FileNotFoundError as error:
        raise CannotCompare("git is not installed") from error
    except subprocess.CalledProcessError as error:
        raise CannotCompare(f"git {' '.join(arguments)}: {error.stderr.strip()}") from error


class Server:
    """`worker.py` in the tree under `root`, which takes steps on command."""

    module: ClassVar[str] = "bench.worker"
    arguments: ClassVar[tuple[str, ...]] = ()

    def __init__(self, root: Path) -> None:
        self.root = root

    def __enter__(self) -> Server:
        environment = {**os.environ, "PYTHONPATH": str(self.root)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", self.module, *self.arguments],
            cwd=self.root,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.communicate()

    def ask(self, **question: Any) -> Any:
        """Sends a question and waits for its answer."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
            answer = json.loads(self.process.stdout.readline() or "null")
        except BrokenPipeError:
            answer = None
        if answer is None:
            raise CannotCompare(f"the benchmark does not run on the tree in {self.root}; see what it said above")
        if "error" in answer:
            raise CannotCompare(answer["error"])
        return answer["answer"]

    def prepare(self, case: Case) -> str:
        """Makes and proves this package's contender; the backend that it runs on."""
        return str(self.ask(prepare=case.name, device=case.device, warm_steps=case.warm_steps))

    def block(self, lead: int, steps: int) -> float:
        """See `Side`."""
        return float(self.ask(block=[lead, steps]))
