"""Whether this tree's steps end in the same bits as another commit's: `python -m tests.same_bits c6c2bef --steps 2000`.

Random steps of the whole surface run on both, each in a process of its own, and every number that they leave behind is
compared. The other commit is checked out beside this one, and its library built. A compiler chooses anew, with any
change of the code around it, which products it rounds before they are added to: where both libraries are built with
`CXXFLAGS=-ffp-contract=off`, it has no choice.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable
from itertools import count
from pathlib import Path

import hypothesis
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.same_bits", description=__doc__)
    parser.add_argument("commit", nargs="?", help="the commit to compare with")
    parser.add_argument("--steps", type=int, default=2000, help="random cases on each backend (default: %(default)s)")
    parser.add_argument("--print", action="store_true", help="print this tree's digests and compare nothing")
    arguments = parser.parse_args()
    if arguments.print:
        print_digests(arguments.steps)
        return 0
    if arguments.commit is None:
        parser.error("a commit, or --print")
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder, "other")
        subprocess.run(["git", "-C", HERE, "worktree", "add", "--detach", other, arguments.commit], check=True)
        try:
            subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=other, check=True)
            old, new = (
                digests(Path(folder, name), tree, arguments.steps) for name, tree in (("a", other), ("b", HERE))
            )
        finally:
            subprocess.run(["git", "-C", HERE, "worktree", "remove", "--force", other], check=True)
    # Hypothesis draws numbers that it finds in the sources, too: such a case is another one there.
    same = [(a, b) for a, b in zip(old, new, strict=True) if a.split()[:3] == b.split()[:3]]
    different = [(a, b) for a, b in same if a != b]
    for a, b in different[:10]:
        print(f"- {a}\n+ {b}")
    print(
        f"{len(same)} of {len(new)} cases are the same ones, {len(different)} with other bits than {arguments.commit}"
    )
    return 1 if different else 0


def digests(folder: Path, tree: Path, steps: int) -> list[str]:
    """What a tree's package makes of the cases of this tree's tests."""
    folder.mkdir()
    (folder / "ffkernels").symlink_to(tree / "ffkernels")
    (folder / "tests").symlink_to(HERE / "tests")
    command = [sys.executable, "-m", "tests.same_bits", "--print", "--steps", str(steps)]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.splitlines()


def print_digests(steps: int) -> None:
    """A line for each case: its number, and a digest of all that its steps have left behind."""
    warnings.simplefilter("ignore")
    torch.use_deterministic_algorithms(True, warn_only=True)
    for backend in ("eager", "native"):
        print_cases(backend, steps)


def print_cases(backend: str, steps: int) -> None:
    from .surface import cases

    numbers = count()

    @hypothesis.seed(0)
    @hypothesis.settings(
        max_examples=steps, deadline=None, database=None, phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(cases(backend))
    def run(case):
        words = hashlib.sha256(repr(case).encode()).hexdigest()[:8]
        print(backend, next(numbers), words, case.compute, digest_of(case, backend), flush=True)

    run()


def digest_of(case, backend: str) -> str:
    """Digests of a case's results, parameters, optimizer state and running mean after its steps; or its error."""
    from .surface import make, take_step

    made = make(case)
    left: list[Tensor | None] = []
    try:
        for _ in range(case.steps):
            result = take_step(case, made, backend)
            left += [result.y, result.sumsq, result.goodness, result.loss]
    except (ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}".replace("\n", " ")
    parameters = [made.weight] if made.bias is None else [made.weight, made.bias]
    state = [value for p in parameters for value in made.optimizer.state.get(p, {}).values()]
    return " ".join(map(_digest, _groups(left, [*parameters, *state, made.peer_mean])))


def _groups(*lists: Iterable[Tensor | None]) -> list[list[Tensor]]:
    return [[t.detach() for t in tensors if isinstance(t, Tensor)] for tensors in lists]


def _digest(tensors: list[Tensor]) -> str:
    made = hashlib.sha256()
    for t in tensors:
        made.update(f"{t.dtype}{tuple(t.shape)}".encode())
        made.update(torch.empty(t.numel(), dtype=t.dtype).copy_(t.reshape(-1)).view(torch.uint8).numpy().tobytes())
    return made.hexdigest()[:16]


if __name__ == "__main__":
    sys.exit(main())
