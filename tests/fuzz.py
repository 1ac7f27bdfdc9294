"""More random steps than `tests/test_surface.py` draws: `python -m tests.fuzz --minutes 5`; the first failure is shown.

Each round is seeded by its number, so that a failure comes again; it is shrunk to a small case before it is shown.
"""

from __future__ import annotations

import argparse
import time
import warnings

import hypothesis
import torch

from ffkernels.backends.native import library

from .bounds import check_case, check_forward
from .surface import cases

EXAMPLES = 200


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="how long to go on (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first round (default: %(default)s)")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", "The given NumPy array is not writable")
    # Memory that nobody has written is NaN.
    torch.use_deterministic_algorithms(True, warn_only=True)
    backends = ["eager"] if library.load().library is None else ["eager", "native"]
    end = time.monotonic() + 60 * arguments.minutes
    number = arguments.first
    while time.monotonic() < end:
        for backend in backends:
            fuzz(backend, number)
        number += 1
        print(f"round {number - 1}: {EXAMPLES} cases each on {' and '.join(backends)}, all within bounds", flush=True)


def fuzz(backend: str, number: int) -> None:
    @hypothesis.seed(number)
    @hypothesis.settings(
        max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.given(cases(backend))
    def every_element_is_within_its_bound(case):
        check_case(case, backend)
        check_forward(case, backend)

    every_element_is_within_its_bound()


if __name__ == "__main__":
    main()
