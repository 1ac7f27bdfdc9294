"""`python -m bench.skipping`: Trifecta's step when most pairs are told apart, by what others take.

Trifecta's small network on MNIST is trained here with `skip_below`, a step of 1,024 rows for 512 images, one parity
after the other. Then steps of both parities are timed in turns, each contender's from the same weights and averages:
this package with and without pairs that are told apart; the program's own `Network` where `FFKERNELS_PEERS` names a
folder; and backpropagation of the same images, two steps, whose time does not hang on what it has learned. Everybody
goes on learning while the clock runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ffkernels as ff
from ffkernels.cli import described, say
from ffkernels.integrations import trifecta
from ffkernels.recipes import data as datasets
from ffkernels.recipes.data import Dataset
from ffkernels.recipes.progress import Progress

from .blocks import ALPHA, SKIP_BELOW, BackpropBlocks, program_of, settings
from .cases import CASES, NUM_CLASSES, Case
from .contenders import OURS
from .machine import describe, in_words
from .memory import keep_freed_memory
from .timing import paired_ratio, rotated

PROGRAM = "python -m bench.skipping"
ROUNDS = 7
WITH, BACKPROP = f"{OURS}, skip_below={SKIP_BELOW}", "backprop"

# Images `[rows, 1, 28, 28]`, their labels, and wrong ones, `[rows]`.
Batch = tuple[Tensor, Tensor, Tensor]


def batches(case: Case, data: Dataset) -> Iterator[Batch]:
    """Shuffled images without end; wrong labels are drawn anew each time."""
    assert case.maps is not None
    generator = torch.Generator().manual_seed(0)
    while True:
        for rows in torch.randperm(len(data.train_labels), generator=generator).split(case.rows):
            if len(rows) == case.rows:
                labels = data.train_labels[rows]
                images = data.train_images[rows].view(-1, *case.maps).to(case.master_dtype) / 255
                yield images, labels, ff.wrong_label(labels, NUM_CLASSES, generator)


def step(net: Any, batch: Batch, parities: Sequence[int] = (0, 1)) -> None:
    """A step of the blocks of each parity."""
    images, labels, wrong = batch
    for parity in parities:
        net(torch.cat([images, images]), torch.cat([labels, wrong]), parity)


def train(case: Case, batches: Iterator[Batch], steps: int, shows: bool = True) -> Any:
    """Trifecta's network after some steps that leave pairs out."""
    net = _network(case, trifecta.Network, compute_dtype=case.low_precision, skip_below=SKIP_BELOW)
    with Progress(steps, shows=shows) as progress:
        for index in range(steps):
            step(net, next(batches), (index % 2,))
            progress.step(lambda: "")
    return net


def _network(case: Case, make: Callable[..., Any], **options: Any) -> Any:
    assert case.maps is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make(settings(case), NUM_CLASSES, case.maps[1], **options)


def contenders(case: Case, trained: Any) -> dict[str, Callable[[Batch], object]]:
    """Who takes a step, from the weights and averages of `trained`."""
    options = {"compute_dtype": case.low_precision}
    nets = {WITH: trained, OURS: _network(case, trifecta.Network, **options)}
    program = program_of("trifecta")
    if program is not None:
        nets["its own program, float32"] = _network(case, program.Network)
    for net in nets.values():
        if net is not trained:
            net.load_state_dict(trained.state_dict())
            for block, of in zip(net.layers, trained.layers, strict=True):
                # It would take the other's averages as its own.
                block.optimizer.load_state_dict(deepcopy(of.optimizer.state_dict()))
    backprop = BackpropBlocks(case, case.initial(), autocast=case.low_precision is not None)
    takes: dict[str, Callable[[Batch], object]] = {name: partial(step, net) for name, net in nets.items()}
    return takes | {BACKPROP: lambda batch: backprop.step(*batch[:2])}


@torch.no_grad()
def not_apart(net: Any, batch: Batch) -> list[float]:
    """The share of pairs whose loss is still steep, by block, from running statistics."""
    images, labels, wrong = batch
    net.eval()
    pos, neg = (net(images, of, None) for of in (labels, wrong))
    net.train()
    return [float(share) for share in (torch.sigmoid(-ALPHA * (pos - neg)) >= SKIP_BELOW).double().mean(1)]


def measure(case: Case, data: Dataset, steps: int, rounds: int, shows: bool = True) -> dict[str, Any]:
    """Seconds of each contender in each round, and the shares of pairs not yet told apart before and after."""
    taken = batches(case, data)
    trained = train(case, taken, steps, shows)
    held = next(taken)
    shares = [not_apart(trained, held)]
    takes = contenders(case, trained)
    seconds: dict[str, list[float]] = {name: [] for name in takes}
    for turn in range(-1, rounds):
        batch = next(taken)
        for name in rotated(takes, max(turn, 0)):
            start = time.perf_counter()
            takes[name](batch)
            # What comes first is compiled, or finds memory.
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    shares.append(not_apart(trained, held))
    return {"case": case.name, "data": data.name, "steps": steps, "not_apart": shares, "seconds": seconds}


def lines_of(found: dict[str, Any]) -> list[str]:
    """What was found, in words."""
    before, after = (" ".join(f"{share:.0%}" for share in shares) for shares in found["not_apart"])
    seconds = found["seconds"]
    lines = [
        f"{found['case']} after {found['steps']} steps; pairs not told apart, by block: {before}; at the end {after}",
        f"  {WITH}: {statistics.median(seconds[WITH]):.2f} s",
    ]
    over = {name: paired_ratio(times, seconds[WITH]) for name, times in seconds.items() if name != WITH}
    return [*lines, *(f"  {name} over it: {ratio}" for name, ratio in over.items())]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 2 where there are no images."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        usage="%(prog)s [OPTIONS]",
        **described(
            """
            python -m bench.skipping                        # an epoch, then times: a quarter of an hour
            FFKERNELS_PEERS=folder python -m bench.skipping --dtype bfloat16 --output skipping.json
            """,
            """
            Trifecta's step with pairs left out that are told apart, after some epochs of MNIST,
            against all pairs, its own program, and backpropagation of half as many rows.
            """,
        ),
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of products (%(default)s)")
    parser.add_argument("--epochs", type=float, default=1.0, metavar="N", help="trained before (%(default)s)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help="times of each (%(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="all times as JSON")
    options = parser.parse_args(arguments)
    about = describe("cpu") | {"freed_memory_kept": keep_freed_memory()}
    case = CASES[f"trifecta-{options.dtype}"]
    try:
        data = datasets.load("mnist")
    except FileNotFoundError as error:
        say(f"{PROGRAM}: {error}")
        return 2
    found = measure(case, data, round(options.epochs * len(data.train_labels)) // case.rows, options.rounds)
    if options.output is not None:
        options.output.write_text(json.dumps({"machine": about, **found}, indent=1) + "\n")
    print("\n".join(lines_of(found)))
    print(f"{in_words(about)}, load before {about['load_before']:.1f}.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
