"""`python -m bench.loop`: what a training loop takes beside the steps that it is made of.

Three trainers of one recipe and seed go side by side. The first one trains as `train` does, by `run_epoch`, and is
timed: minibatches, labels, negatives, neutral pass, classifier, totals, progress and schedule. The second one goes
ahead and writes down the minibatches, untimed. The third one takes nothing but the network's steps on these, and is
timed. They take turns every few steps; after each turn the third one's weights are held against the second one's, and
go on from these, and at the end the second one's have to be the first one's, bit for bit. Tests between epochs,
checkpoints and files are no part of either time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ffkernels.cli import described, say
from ffkernels.recipes import data as datasets
from ffkernels.recipes.catalogue import RECIPES, Recipe
from ffkernels.recipes.data import Dataset
from ffkernels.recipes.progress import Progress
from ffkernels.recipes.train import Trainer

from .compare import PAUSE_S, CannotCompare, Server, worktree
from .machine import ROOT, describe, in_words
from .memory import keep_freed_memory
from .timing import paired_ratio, rotated

PROGRAM = "python -m bench.loop"
# Those whose network steps on the minibatches as they are, which is what the third trainer repeats.
CASES = ("quick", "hard-negatives")
STEPS, EPOCHS, ROUNDS = 20, 5, 100
# How far weights may be apart that differ by the order of sums, as a share of how far a block brings them.
FAR = 0.01
# What a loop may take over its bare steps.
MOST = 1.15

Taken = tuple[Tensor, Tensor | None, Tensor]
Row = dict[str, Any]


class Block(NamedTuple):
    """Seconds of some steps in the loop, all that it does around them included, and of the bare ones."""

    loop: float
    bare: float
    steps: int


class Beside:
    """The three trainers.

    Args:
        recipe: whose step is `FFNetwork.step` on a minibatch.
        data: of which the test images are not needed, but for one.
        tell: called with each block; the clock stands still meanwhile.
        steps: in a block.
        now: the clock.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: Dataset,
        tell: Callable[[Block], object],
        steps: int = STEPS,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        # A test takes no time on one image.
        data = replace(data, test_images=data.test_images[:1], test_labels=data.test_labels[:1])
        self.loop, self.ahead, self.bare = (Trainer(recipe, data) for _ in range(3))
        # Where the block began, and how far bare steps have been from the others at the end of one.
        self._start, self.far = [p.detach().clone() for p in self.bare.net.parameters()], 0.0
        self.tell, self.steps, self.now = tell, steps, now

    def run_epoch(self) -> None:
        """The next epoch of all three."""
        epoch = len(self.loop.rows) + 1
        for trainer in (self.ahead, self.bare):
            _set_rates(trainer, epoch)
        minibatches = self._written_down(epoch)
        left = self.loop.steps_per_epoch
        self._taken = 0

        def after_step(describe: Callable[[], str]) -> bool:
            nonlocal left
            progress.step(describe)
            self._taken, left = self._taken + 1, left - 1
            # What comes behind the last step belongs to the last block.
            if self._taken == self.steps and left:
                self._end(minibatches)
            return False

        with Progress(left, shows=False) as progress:
            self._since = self.now()
            self.loop.run_epoch(after_step)
            self._end(minibatches)
        # What is written down last is trained on when one more is asked for.
        next(minibatches, None)
        self._hold()

    def _written_down(self, epoch: int) -> Iterator[Taken]:
        for batch in self.ahead.minibatches(epoch):
            x_neg = None if batch.x_neg is None else batch.x_neg.clone()
            yield batch.x_pos.clone(), x_neg, batch.labels.clone()
            self.ahead.step(batch)

    def _end(self, minibatches: Iterator[Taken]) -> None:
        """The end of the loop's block, whose bare steps come now."""
        loop = self.now() - self._since
        batches = list(islice(minibatches, 1))
        self._hold()
        batches += islice(minibatches, self._taken - 1)
        trainer = self.bare
        start = self.now()
        for x_pos, x_neg, labels in batches:
            of_rows: dict[str, Any] = (
                {"label_field": trainer.label_field or None} if x_neg is not None else {"labels": labels}
            )
            trainer.net.step(x_pos, x_neg, trainer.net_optimizer, skip_below=trainer.skip_below, **of_rows)
        self.tell(Block(loop, self.now() - start, self._taken))
        self._taken, self._since = 0, self.now()

    @torch.no_grad()
    def _hold(self) -> None:
        """Between two blocks: how far the bare steps' weights are from the others, from which they go on."""
        nets = [list(trainer.net.parameters()) for trainer in (self.ahead, self.bare)]
        for i, (theirs, mine) in enumerate(zip(*nets, strict=True)):
            if moved := float((theirs - self._start[i]).norm()):
                self.far = max(self.far, float((mine - theirs).norm()) / moved)
            self._start[i].copy_(theirs)
            mine.copy_(theirs)
            for name, value in self.ahead.net_optimizer.state[theirs].items():
                self.bare.net_optimizer.state[mine][name].copy_(value)

    def differing(self) -> list[str]:
        """The parameters in which the loop and the one that writes down are not the same training, bit for bit."""
        loop, ahead = (dict(trainer.net.named_parameters()) for trainer in (self.loop, self.ahead))
        return [name for name, p in loop.items() if not torch.equal(p, ahead[name])]


def _set_rates(trainer: Trainer, epoch: int) -> None:
    for rule, optimizer in trainer.rules:
        for group in optimizer.param_groups:
            group["lr"] = rule.lr * trainer.lr_factor(epoch)


def measure(recipe: Recipe, data: Dataset, epochs: int, say: Callable[[str], object], steps: int = STEPS) -> Row:
    """Some epochs as data: the blocks of each.

    Raises:
        ValueError: where the bare steps have not come to the loop's weights, so that their times say nothing.
    """
    blocks: list[list[Block]] = []
    beside = Beside(recipe, data, lambda block: blocks[-1].append(block), steps)
    for epoch in range(min(epochs, recipe.epochs)):
        blocks.append([])
        beside.run_epoch()
        say(f"{recipe.name}, epoch {epoch + 1}: {_ratio_of(blocks[-1]):.3f}")
    others = beside.differing()
    if others or not beside.far <= FAR:
        what = ", ".join(others) or f"{beside.far:.1%} apart"
        raise ValueError(f"{recipe.name}: bare steps do not come to the loop's weights ({what})")
    return {"recipe": recipe.name, "epochs": blocks, "apart": beside.far}


def _ratio_of(blocks: Sequence[Block]) -> float:
    return sum(block.loop for block in blocks) / sum(block.bare for block in blocks)


def lines_of(row: Row) -> list[str]:
    """A row in words: the ratio of whole epochs, that of blocks, and milliseconds a step."""
    epochs = [[Block(*block) for block in epoch] for epoch in row["epochs"]]
    every = [block for epoch in epochs for block in epoch]
    whole = paired_ratio(*([sum(getattr(b, of) for b in epoch) for epoch in epochs] for of in ("loop", "bare")))
    of_blocks = paired_ratio([block.loop for block in every], [block.bare for block in every])
    bare, own = (statistics.median(ms) for ms in zip(*(_ms(block) for block in every), strict=True))
    held = "at most" if whole.median <= MOST else "MORE THAN"
    return [
        f"{row['recipe']}: loop over bare steps",
        f"  epochs    {whole}, {held} {MOST}",
        f"  blocks    {of_blocks}",
        f"  a step    {bare:.2f} ms, and {own:.2f} ms of the loop's own",
    ]


def _ms(block: Block) -> tuple[float, float]:
    return 1e3 * block.bare / block.steps, 1e3 * (block.loop - block.bare) / block.steps


class LoopServer(Server):
    """The loop of the tree under `root`, block by block."""

    module = "bench.loop"
    arguments = ("--serve",)

    def __enter__(self) -> LoopServer:
        super().__enter__()
        return self

    def begin(self, recipe: str) -> None:
        """Makes the trainers."""
        self.ask(recipe=recipe)

    def next(self) -> Block:
        """The next block."""
        return Block(*self.ask(next=True))


def serve() -> int:
    """One side of `--compare`: answers questions from stdin, one JSON object a line."""
    answers, sys.stdout = sys.stdout, sys.stderr  # nothing else may come between the answers

    def answer(value: object) -> None:
        print(json.dumps({"answer": value}), file=answers, flush=True)

    def tell(block: Block) -> None:
        answer(block)
        sys.stdin.readline()

    recipe = RECIPES[json.loads(sys.stdin.readline())["recipe"]]
    beside = Beside(recipe, datasets.load("mnist"), tell)
    answer(None)
    sys.stdin.readline()
    while not beside.loop.finished:
        beside.run_epoch()
    return 0


def compare(ref: str, names: Sequence[str], setup: str | None, rounds: int) -> list[str]:
    """The loop's own time in this checkout and at a commit, in turns, in words."""
    lines = []
    with worktree(ref, setup) as tree:
        for name in names:
            blocks: dict[str, list[Block]] = {"here": [], "there": []}
            with LoopServer(ROOT) as here, LoopServer(tree) as there:
                sides = {"here": here, "there": there}
                for side in sides.values():
                    side.begin(name)
                for turn in range(rounds):
                    for side_name in rotated(sides, turn):
                        time.sleep(PAUSE_S)
                        blocks[side_name].append(sides[side_name].next())
            lines += compared(name, ref, blocks["here"], blocks["there"])
    return lines


def compared(name: str, ref: str, here: Sequence[Block], there: Sequence[Block]) -> list[str]:
    """What blocks taken in turns say."""
    lines = [name]
    for where, blocks in (("here", here), (ref, there)):
        bare, own = (statistics.median(ms) for ms in zip(*map(_ms, blocks), strict=True))
        over = paired_ratio([block.loop for block in blocks], [block.bare for block in blocks])
        lines.append(f"  {where:<10} a step {bare:.2f} ms, of the loop's own {own:.2f} ms; loop over bare steps {over}")
    own_share = paired_ratio([_ms(block)[1] for block in here], [_ms(block)[1] for block in there])
    whole = paired_ratio([block.loop for block in here], [block.loop for block in there])
    return [*lines, f"  here over {ref}: the loop's own {own_share}, all of it {whole}"]


def parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        usage="%(prog)s [OPTIONS]",
        **described(
            """
            python -m bench.loop                          # three minutes
            python -m bench.loop --recipe quick --epochs 2 --output loop.json
            python -m bench.loop --compare main           # this checkout against another commit
            """,
            """
            The time of a training loop over that of its bare steps on minibatches made
            beforehand, in turns: what batches, labels, negatives, neutral pass, classifier and
            totals add. Tests between epochs and checkpoints are in neither.
            """,
        ),
    )
    parser.add_argument("--recipe", nargs="+", choices=CASES, default=list(CASES), help="which (both)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, metavar="N", help="of each (%(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="all blocks as JSON")
    parser.add_argument("--compare", metavar="REF", help="the loop's own time against another commit's")
    parser.add_argument("--setup", metavar="COMMAND", help="with --compare: run in REF's tree first, to build it")
    parser.add_argument(
        "--rounds", type=int, default=ROUNDS, metavar="N", help="with --compare: blocks of each side (%(default)s)"
    )
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 2 for what the user can mend."""
    options = parser().parse_args(arguments)
    kept = keep_freed_memory()
    if options.serve:
        return serve()
    about = describe("cpu") | {"freed_memory_kept": kept}
    try:
        if options.compare:
            print("\n".join(compare(options.compare, options.recipe, options.setup, options.rounds)))
        else:
            mnist = datasets.load("mnist")
            rows = [measure(RECIPES[name], mnist, options.epochs, say) for name in options.recipe]
            if options.output is not None:
                found = {"machine": about, "data": mnist.name, "steps": STEPS, "rows": rows}
                options.output.write_text(json.dumps(found, indent=1) + "\n")
            for row in rows:
                print("\n".join(lines_of(row)))
    except (ValueError, FileNotFoundError, CannotCompare) as error:
        say(f"{PROGRAM}: {error}")
        return 2
    print(f"{in_words(about)}, load before {about['load_before']:.1f}.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
