"""Trainings that are killed and interrupted at places drawn at random, and must end at the numbers of one left alone.

`python -m tests.campaign --rounds N` makes N kills. After each the checkpoint must load, and nothing may stand in the
way of `--resume`; where a run ends, its rows, its weights, its row of results and its folder's files must be those of
an uninterrupted one. Places are counted in calls made by the code that trains and saves, so that they fall into every
part of it, or in seconds, so that they fall into compiled code.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import FrameType

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: forked processes and the ones they are held against compute alike

import torch
import torch._dynamo  # which the first optimizer imports: here once, not in each fork

from ffkernels import cli
from ffkernels.recipes import catalogue, checkpoint, lock, metrics, picture, train
from ffkernels.recipes import run as run_of_a_folder
from ffkernels.recipes.run import CHECKPOINT, METRICS
from paper import command, results

from .forks import in_a_process
from .toy_data import toy_data, write_idx

EPOCHS, IMAGES, TEST_IMAGES = 3, 300, 60
WATCHED = tuple(
    str(Path(module.__file__))
    for module in (cli, checkpoint, command, lock, metrics, picture, results, run_of_a_folder, train)
    if module.__file__
)
KINDS = ("kill", "once", "twice")


class Place:
    """Where a process is hit: at so many calls of the watched files, or after so many seconds."""

    def __init__(self, kind: str, calls: int | None, seconds: float, between: int) -> None:
        self.kind, self.calls, self.seconds, self.between = kind, calls, seconds, between
        self.counted = 0

    def arm(self) -> None:
        if self.calls is None:
            threading.Thread(target=self._after_seconds, daemon=True).start()
        else:
            sys.setprofile(self._count)

    def _signals(self) -> list[int]:
        return {"kill": [signal.SIGKILL], "once": [signal.SIGINT], "twice": [signal.SIGINT] * 2}[self.kind]

    def _after_seconds(self) -> None:
        for number in self._signals():
            time.sleep(self.seconds)
            os.kill(os.getpid(), number)

    def _count(self, frame: FrameType, event: str, argument: object) -> None:
        if frame.f_code.co_filename not in WATCHED:
            return
        self.counted += 1
        for i, number in enumerate(self._signals()):
            if self.counted == (self.calls or 0) + i * self.between:
                os.kill(os.getpid(), number)

    def __str__(self) -> str:
        at = f"{self.seconds:.3f} s" if self.calls is None else f"call {self.calls} (+{self.between})"
        return f"{self.kind} at {at}"


class Campaign:
    """Runs in one folder, and what an undisturbed one came to."""

    def __init__(self, folder: Path, draw: random.Random, options: list[str]) -> None:
        self.folder, self.draw = folder, draw
        self.said = folder / "said"
        data = write_idx(folder / "toy", toy_data(IMAGES, TEST_IMAGES))
        self.options = ["--data", str(data), "--device", "cpu", "--epochs", str(EPOCHS), *options]
        calls = folder / "calls"

        def counted() -> int:
            place = Place("once", 10**9, 0, 0)
            place.arm()
            code = self.command("whole")
            sys.setprofile(None)
            calls.write_text(str(place.counted))
            return code

        start = time.monotonic()
        assert in_a_process(counted, self.said) == 0, self.said.read_text()
        self.seconds, self.calls = time.monotonic() - start, int(calls.read_text())
        self.expected = self.outcome("whole")

    def command(self, name: str, *more: str) -> int:
        results, output = str(self.folder / name / "results"), str(self.folder / name / "run")
        return cli.main(["reproduce", "hard-negatives", *self.options, "--results", results, "--output", output, *more])

    def outcome(
        self, name: str
    ) -> tuple[list[dict[str, object]], dict[str, object], dict[str, torch.Tensor], list[str]]:
        """Rows of metrics, the row of results, the checkpoint's tensors, and the names of all files."""

        def lasting(row: dict[str, object]) -> dict[str, object]:
            return {key: value for key, value in row.items() if "seconds" not in key and key not in ("date", "commit")}

        run = self.folder / name / "run"
        rows = [lasting(json.loads(line)) for line in (run / METRICS).read_text().splitlines()]
        (result,) = (self.folder / name / "results").glob("*.json")
        state = torch.load(run / CHECKPOINT, weights_only=True)["state"]
        files = sorted(str(path.relative_to(self.folder / name)) for path in (self.folder / name).rglob("*"))
        return rows, lasting(json.loads(result.read_text())), tensors(state), files

    def place(self) -> Place:
        kind = self.draw.choice(KINDS)
        calls = None if self.draw.random() < 0.3 else self.draw.randint(1, self.calls)
        seconds = self.draw.uniform(0, self.seconds / (2 if kind == "twice" else 1))
        return Place(kind, calls, seconds, self.draw.choice((1, 2, 5, 20, 100, 400)))

    def hit(self, name: str, place: Place) -> int:
        def armed() -> int:
            place.arm()
            return self.command(name, "--resume")

        before = self.leftovers(name)
        code = in_a_process(armed, self.said)
        text = self.said.read_text(errors="replace")
        assert code in (0, cli.INTERRUPTED, -signal.SIGKILL), f"{place}: exit code {code}\n{text}"
        assert "Traceback" not in text, f"{place}:\n{text}"
        run = self.folder / name / "run"
        if (run / CHECKPOINT).exists():
            saved = torch.load(run / CHECKPOINT, weights_only=True)
            checkpoint.load(run / CHECKPOINT, saved["settings"])
        if code != -signal.SIGKILL:
            left = self.leftovers(name) - before
            assert not left, f"{place}: left {left}\n{text}"
        return code

    def leftovers(self, name: str) -> set[str]:
        return {path.name for path in (self.folder / name).rglob("*") if path.suffix in (".tmp", ".lock")}

    def finish(self, name: str) -> None:
        code = in_a_process(lambda: self.command(name, "--resume"), self.said)
        assert code == 0, self.said.read_text()
        rows, result, state, files = self.outcome(name)
        assert rows == self.expected[0]
        assert result == self.expected[1]
        assert state.keys() == self.expected[2].keys()
        for key, tensor in state.items():
            assert torch.equal(tensor, self.expected[2][key]), key
        assert [file for file in files if not file.startswith("results/") or file.endswith(".json")] == self.expected[3]


def tensors(value: object, path: str = "") -> dict[str, torch.Tensor]:
    """All tensors in nested dicts, by their path."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    items = value.items() if isinstance(value, dict) else ()
    return {name: tensor for key, item in items for name, tensor in tensors(item, f"{path}/{key}").items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200, help="kills (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the places (%(default)s)")
    parser.add_argument("--picture", action="store_true", help="draw the pictures too, where matplotlib is installed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    catalogue.RECIPES["hard-negatives"] = replace(catalogue.HARD_NEGATIVES, hidden=(40, 30), batch_size=50)
    counts: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        draw = random.Random(arguments.seed)
        campaign = Campaign(Path(folder), draw, [] if arguments.picture else ["--no-picture"])
        runs = 0
        for round_ in range(arguments.rounds):
            place, name = campaign.place(), f"run{runs}"
            code = campaign.hit(name, place)
            end = {0: "came too late", cli.INTERRUPTED: "interrupted"}.get(code, "killed")
            counts[f"{place.kind}: {end}"] = counts.get(f"{place.kind}: {end}", 0) + 1
            print(f"{round_ + 1}: {name}, {place}: {end}", flush=True)
            # Every few hits the run goes on to its end; others are hit again where they have come to.
            if draw.random() < 0.3 or round_ == arguments.rounds - 1:
                campaign.finish(name)
                runs += 1
    print(f"{arguments.rounds} hits, {runs} runs, all as the undisturbed one:")
    print("\n".join(f"  {what}: {count}" for what, count in sorted(counts.items())))


if __name__ == "__main__":
    main()
