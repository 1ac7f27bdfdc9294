"""Trainings by several processes of which one is killed, `kill -9`, at a moment drawn at random.

`python -m tests.campaign_of_processes --rounds N` makes N kills. After each the other processes must end within the
timeout with a line that says why, the checkpoint must load with no epoch lost, and two or three processes go on from
it; where a run ends, it must have learnt what an uninterrupted one of one process has.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import socket
import tempfile
import time
from dataclasses import replace
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: forked processes and the ones they are held against compute alike

import torch
import torch._dynamo  # which the first optimizer imports: here once, not in each fork

from ffkernels import cli
from ffkernels.recipes import catalogue, checkpoint
from ffkernels.recipes.run import CHECKPOINT

from .forks import start
from .toy_data import toy_data, write_idx

EPOCHS, IMAGES, TEST_IMAGES = 12, 600, 60
# How long the processes wait for each other; for one that never comes, twice as long. What they need besides.
TIMEOUT, SLACK = 10, 30
LOST = "another process died, or did not answer within the timeout"


class Campaign:
    """Runs in one folder, and the weights that an undisturbed one came to."""

    def __init__(self, folder: Path, draw: random.Random) -> None:
        self.folder, self.draw = folder, draw
        data = write_idx(folder / "toy", toy_data(IMAGES, TEST_IMAGES))
        self.options = ["--data", str(data), "--device", "cpu", "--epochs", str(EPOCHS), "--no-picture"]
        assert self.ended("whole", 1, None) == [0], self.said(0)
        self.expected = self.state("whole")
        began = time.monotonic()
        assert self.ended("warm", 2, None) == [0, 0], self.said(0)
        self.seconds = time.monotonic() - began

    def command(self, name: str) -> int:
        output = ["--output", str(self.folder / name), "--resume", "--process-timeout", str(TIMEOUT)]
        return cli.main(["train", "--preset", "hard-negatives", *self.options, *output])

    def said(self, rank: int) -> str:
        return (self.folder / f"said{rank}").read_text(errors="replace")

    def ended(self, name: str, size: int, kill: tuple[int, float] | None) -> list[int]:
        """Exit codes of so many processes, of which one is killed after so many seconds."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]

        def run(rank: int) -> int:
            if size > 1:
                variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
                os.environ.update({key: str(value) for key, value in variables.items()} | {"MASTER_ADDR": "127.0.0.1"})
            return self.command(name)

        running = {rank: start(lambda rank=rank: run(rank), self.folder / f"said{rank}") for rank in range(size)}
        codes: dict[int, int] = {}
        latest = time.monotonic() + 600
        try:
            if kill is not None:
                victim, seconds = kill
                time.sleep(seconds)
                os.kill(running[victim], signal.SIGKILL)
                latest = time.monotonic() + 2 * TIMEOUT + SLACK
            while running:
                for rank, process in list(running.items()):
                    done, status = os.waitpid(process, os.WNOHANG)
                    if done:
                        codes[rank] = os.waitstatus_to_exitcode(status)
                        del running[rank]
                assert time.monotonic() < latest, f"{kill}: processes {list(running)} of {size} hang"
                time.sleep(0.02)
        finally:
            for process in running.values():
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
        return [codes[rank] for rank in range(size)]

    def state(self, name: str) -> dict[str, torch.Tensor]:
        return dict(torch.load(self.folder / name / CHECKPOINT, weights_only=True)["state"]["net"])

    def epochs(self, name: str) -> int:
        """How many are in the checkpoint, which is whole; 0 where there is none yet."""
        path = self.folder / name / CHECKPOINT
        if not path.exists():
            return 0
        settings = torch.load(path, weights_only=True)["settings"]
        return len(checkpoint.load(path, settings)["rows"])

    def hit(self, name: str) -> tuple[bool, str]:
        """Whether a kill came in time, and what it came to."""
        size, before = self.draw.choice((2, 3)), self.epochs(name)
        victim, seconds = self.draw.randrange(size), self.draw.uniform(0, self.seconds)
        codes = self.ended(name, size, (victim, seconds))
        after, place = self.epochs(name), f"process {victim} of {size} at {seconds:.3f} s"
        texts = [self.said(rank) for rank in range(size)]
        assert after >= before, f"{place}: {before} epochs were done, {after} are left"
        for rank, text in enumerate(texts):
            assert "Traceback" not in text, f"{place}, of process {rank}:\n{text}"
        if codes[victim] == 0:
            assert codes == [0] * size, f"{place}: {codes}"
            return False, f"{place}: came too late"
        assert codes[victim] == -signal.SIGKILL, f"{place}: {codes}\n{texts[victim]}"
        for rank, (code, text) in enumerate(zip(codes, texts, strict=True)):
            # One that had nothing left to do with it may have ended well.
            if rank != victim and code != 0:
                assert code == cli.USER_ERROR and LOST in text, f"{place}, of process {rank}: {code}\n{text}"
        return True, f"{place}: killed, {after} of {EPOCHS} epochs are done"

    def finish(self, name: str) -> None:
        size = self.draw.choice((2, 3))
        assert self.ended(name, size, None) == [0] * size, self.said(0)
        found = self.state(name)
        assert found.keys() == self.expected.keys()
        for key, tensor in self.expected.items():
            # The order of sums alone makes 3e-3 of it in so many steps.
            assert (found[key] - tensor).norm() <= 1e-2 * tensor.norm(), key


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="kills (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (%(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    catalogue.RECIPES["hard-negatives"] = replace(catalogue.HARD_NEGATIVES, hidden=(40, 30), batch_size=50)
    with tempfile.TemporaryDirectory() as folder:
        draw = random.Random(arguments.seed)
        campaign, runs, kills = Campaign(Path(folder), draw), 0, 0
        while kills < arguments.rounds:
            name = f"run{runs}"
            in_time, text = campaign.hit(name)
            kills += in_time
            print(f"{kills}: {name}, {text}", flush=True)
            if not in_time or draw.random() < 0.2 or kills == arguments.rounds:
                campaign.finish(name)
                runs += 1
    print(f"{arguments.rounds} kills, {runs} runs, all learnt what one process does")


if __name__ == "__main__":
    main()
