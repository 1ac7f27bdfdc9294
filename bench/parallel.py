"""`python -m bench.parallel`: what several processes gain on this machine, by gloo and one thread each.

A round takes the same steps by one process, by a pipeline of two, and by two that divide the rows, with optimizer state
whole and sharded; ratios are paired within rounds. How much of the sums is hidden is read from a trace of PyTorch's
profiler: of the time in which a layer's sums are in flight, the share in which the process computes. It wants two cores
that nothing else uses.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import ffkernels as ff
from ffkernels.cli import described

from .machine import describe, in_words
from .memory import keep_freed_memory

Interval = tuple[float, float]
PROCESSES = 2
# What the first process must gain by a pipeline, and how much of the sums must be hidden.
PIPELINE_GAIN, HIDDEN = 1.6, 0.7
TRACED_STEPS = 3


class Size(NamedTuple):
    """A network of equal layers, how many rows each side has, and how many steps a block takes."""

    width: int = 2000
    layers: int = 4
    batch: int = 256
    steps: int = 16
    rounds: int = 5


class Seen(NamedTuple):
    """A block of steps on one process, in seconds a step.

    Attributes:
        clock: until all processes are done.
        cpu: of this process's threads, those of gloo included.
        below, above: a pipeline's waits for the process below and for the one above.
    """

    clock: float
    cpu: float
    below: float = 0.0
    above: float = 0.0


class TimedPipeline(ff.parallel.Pipeline):
    """A pipeline that adds up how long this process waits for the others."""

    below = above = 0.0

    def _received(self, tensor: Tensor) -> Tensor:
        start = time.perf_counter()
        found = super()._received(tensor)
        self.below += time.perf_counter() - start
        return found

    def _taken(self) -> None:
        start = time.perf_counter()
        super()._taken()
        self.above += time.perf_counter() - start


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same times, each once, in order."""
    found: list[Interval] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def length(intervals: Sequence[Interval]) -> float:
    return sum(end - start for start, end in intervals)


def common(one: Sequence[Interval], other: Sequence[Interval]) -> list[Interval]:
    """The times that lie in both of two unions."""
    pairs = ((max(a, c), min(b, d)) for a, b in one for c, d in other)
    return [(start, end) for start, end in pairs if start < end]


def hidden(in_flight: Iterable[Interval], computing: Iterable[Interval]) -> float:
    """Of the time in which anything is in flight, the share in which something computes."""
    flying = union(in_flight)
    return length(common(flying, union(computing))) / length(flying)


def traced(profiled: Any, per_step: int) -> tuple[list[Interval], list[Interval]]:
    """When the sums of a trace were in flight, and when the process computed, in microseconds.

    per_step: how many other sums, of a few numbers that a step waits for, come before those of its layers.
    """
    events = list(profiled.events())
    steps = [event for event in events if event.name == "ffkernels::linear_step_"]
    ours = steps[0].thread
    spans = [(event.time_range.start, event.time_range.end) for event in events if event.name.startswith("gloo:")]
    spans.sort()
    each = len(spans) // TRACED_STEPS
    of_layers = [span for i, span in enumerate(spans) if i % each >= per_step]
    computing = [
        (event.time_range.start, event.time_range.end)
        for event in events
        if event.thread == ours and not event.is_async and event.name.startswith(("aten::", "ffkernels::"))
    ]
    return of_layers, computing


class Bench:
    """The blocks of one process."""

    def __init__(self, size: Size, rank: int) -> None:
        self.size, self.rank = size, rank
        generator = torch.Generator().manual_seed(0)
        self.pos, self.neg = (torch.rand(size.batch, size.width, generator=generator) for _ in range(2))
        self.own_pos, self.own_neg = (x.tensor_split(PROCESSES)[rank] for x in (self.pos, self.neg))
        net = self.network()
        self.alone = net, torch.optim.Adam(net.parameters(), lr=1e-4)
        self.pipeline = TimedPipeline(self.network())
        self.of_pipeline = torch.optim.Adam(self.pipeline.parameters(), lr=1e-4)
        self.divided = {}
        for name, shards in (("rows", False), ("rows, sharded", True)):
            net = self.network()
            parallel = ff.parallel.DataParallel(net, shard_optimizer=shards)
            self.divided[name] = parallel, torch.optim.Adam(net.parameters(), lr=1e-4)

    def network(self) -> ff.FFNetwork:
        torch.manual_seed(0)
        return ff.FFNetwork(
            ff.FFLinear(self.size.width, self.size.width, outputs="pre") for _ in range(self.size.layers)
        )

    def block(self, work: Callable[[], object]) -> Seen:
        """So many calls of `work` on this process, while the others do theirs."""
        work()
        self.pipeline.finish()
        dist.barrier()
        self.pipeline.below = self.pipeline.above = 0.0
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(self.size.steps):
            work()
        self.pipeline.finish()
        own = time.process_time() - cpu
        dist.barrier()
        clock = time.perf_counter() - start
        seconds = (clock, own, self.pipeline.below, self.pipeline.above)
        return Seen(*[value / self.size.steps for value in seconds])

    def step_alone(self) -> None:
        net, optimizer = self.alone
        if self.rank == 0:
            net.step(self.pos, self.neg, optimizer)

    def step_of_stage(self) -> None:
        self.pipeline.step(self.pos, self.neg, self.of_pipeline)

    def step_divided(self, name: str) -> None:
        parallel, optimizer = self.divided[name]
        parallel.step(self.own_pos, self.own_neg, optimizer)

    def hidden(self, name: str, trace: str | None) -> float:
        """The share of the sums of some steps that is hidden."""
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            for _ in range(TRACED_STEPS):
                self.step_divided(name)
        if trace is not None:
            profiled.export_chrome_trace(trace)
        return hidden(*traced(profiled, 1))

    def round(self, trace: str | None) -> dict[str, Any]:
        seen: dict[str, Any] = {
            "alone": self.block(self.step_alone)._asdict(),
            "pipeline": self.block(self.step_of_stage)._asdict(),
        }
        for name in self.divided:
            seen[name] = self.block(partial(self.step_divided, name))._asdict()
            seen[name]["hidden"] = self.hidden(name, trace if name == "rows" and self.rank == 0 else None)
        return seen


def worker(rank: int, size: Size, store: str, answers: Any, trace: str | None) -> None:
    """One process: all its rounds; the first one hands in those of all."""
    torch.set_num_threads(1)
    keep_freed_memory()
    dist.init_process_group("gloo", store=dist.FileStore(store, PROCESSES), rank=rank, world_size=PROCESSES)
    with torch.no_grad():
        bench = Bench(size, rank)
        rounds = [bench.round(trace if i == size.rounds - 1 else None) for i in range(size.rounds)]
    found: list[Any] = [None] * PROCESSES
    dist.all_gather_object(found, rounds)
    if rank == 0:
        answers.put({"size": size._asdict(), "machine": describe("cpu"), "processes": found})
    dist.destroy_process_group()


def measure(size: Size, trace: str | None = None) -> dict[str, Any]:
    """The rounds of all processes, as data: `processes[rank][round][kind]`."""
    answers = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (size, str(Path(folder) / "store"), answers, trace), PROCESSES)
    return dict(answers.get())


def middle(values: Iterable[float]) -> str:
    """Their median, and between which they lie."""
    values = sorted(values)
    return f"{statistics.median(values):.3f} [{values[0]:.3f}, {values[-1]:.3f}]"


def report(found: dict[str, Any]) -> str:
    """The two figures, and what they hang on; medians over rounds, and between which they lie."""
    first, last = found["processes"]
    gain = [r["alone"]["clock"] / r["pipeline"]["clock"] for r in first]
    size = Size(**found["size"])
    lines = [
        f"{size.layers} layers of {size.width}, {size.batch} rows a side, {size.steps} steps a block, "
        f"{size.rounds} rounds; {in_words(found['machine'])}, load {found['machine']['load_before']:.1f}",
        "",
        "seconds a step",
        f"  one process, by the clock           {middle(r['alone']['clock'] for r in first)}",
        f"    of its core                       {middle(r['alone']['cpu'] for r in first)}",
        f"  a pipeline of two                   {middle(r['pipeline']['clock'] for r in first)}",
    ]
    for rank, rounds in enumerate((first, last)):
        of_pipeline = [r["pipeline"] for r in rounds]
        lines += [
            f"    process {rank}: of its core          {middle(p['cpu'] for p in of_pipeline)}",
            f"    process {rank}: waits for below      {middle(p['below'] for p in of_pipeline)}",
            f"    process {rank}: waits for above      {middle(p['above'] for p in of_pipeline)}",
        ]
    for name in ("rows", "rows, sharded"):
        lines.append(f"  {name + ' divided by two':<36}{middle(r[name]['clock'] for r in first)}")
    lines += ["", f"pipeline over one process             {middle(gain)}, {_held(gain, PIPELINE_GAIN)}"]
    for name in ("rows", "rows, sharded"):
        shares = [r[name]["hidden"] for rounds in (first, last) for r in rounds]
        wanted = f", {_held(shares, HIDDEN)}" if name == "rows" else ""
        lines.append(f"{name + ': share of sums hidden':<38}{middle(shares)}{wanted}")
    return "\n".join(lines)


def _held(values: Sequence[float], least: float) -> str:
    return f"{'at least' if statistics.median(values) >= least else 'LESS THAN'} {least}"


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.parallel",
        usage="%(prog)s [OPTIONS]",
        **described(
            """
            python -m bench.parallel                      # two minutes
            python -m bench.parallel --width 1000 --rounds 3 --output rounds.json
            """,
            """
            What two processes gain on this machine, by gloo and one thread each: as a pipeline,
            and with divided rows, optimizer state whole and sharded, against one process. Ratios
            are paired within rounds. The share of the sums that is hidden behind computing is
            read from a trace of PyTorch's profiler. It wants two cores that nothing else uses.
            """,
        ),
    )
    meanings = {
        "width": "units of each layer",
        "layers": "how many, at least two",
        "batch": "rows of each side in a step",
        "steps": "in a round",
        "rounds": "whose ratios are paired",
    }
    for name, default in Size()._asdict().items():
        help = f"{meanings[name]} ({default})"
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=help)
    parser.add_argument("--output", type=Path, metavar="FILE", help="all rounds as JSON")
    parser.add_argument("--trace", metavar="FILE", help="a trace of the first process, for chrome://tracing")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser()
    given = vars(options.parse_args(arguments))
    output, trace = given.pop("output"), given.pop("trace")
    wrong = [name for name, value in given.items() if value < 1]
    if wrong:
        options.error(f"--{wrong[0]} {given[wrong[0]]}: not a number >= 1")
    if given["layers"] < PROCESSES:
        options.error(f"--layers {given['layers']}: fewer than the {PROCESSES} processes of a pipeline")
    found = measure(Size(**given), trace)
    if output is not None:
        output.write_text(json.dumps(found, indent=1))
    print(report(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
