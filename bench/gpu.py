"""`make gpu`: everything that wants a GPU, in one command of about nine minutes, with what it finds in one folder.

Tests, compute-sanitizer where there is one, tuning, benchmarks and a profile run each in a process of its own with a
time limit of its own; one that fails costs only itself. Needs torch, triton, numpy, pytest and pytest-benchmark, and
installs nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from ffkernels.cli import described

from .machine import ROOT, describe

PROFILE = """
import sys, torch, ffkernels as ff
layer = ff.FFLinear(2000, 2000).cuda()
optimizer = torch.optim.Adam(layer.parameters(), lr=1e-4, capturable=True)
x = [torch.rand(128, 2000, device="cuda") for _ in range(2)]
for _ in range(5):
    layer.step(*x, optimizer, compute_dtype=torch.bfloat16)
with torch.profiler.profile() as profile:
    for _ in range(20):
        layer.step(*x, optimizer, compute_dtype=torch.bfloat16)
    torch.cuda.synchronize()
print(profile.key_averages().table(sort_by="cuda_time_total", row_limit=15))
"""


def parts(output: Path) -> list[tuple[str, list[str], int]]:
    """Name, command and seconds of each part, in the order of what matters most."""
    python, sanitizer = sys.executable, shutil.which("compute-sanitizer")
    quick = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_gpu.py"]
    benchmark = [python, "-m", "ffkernels", "bench", "--device", "cuda"]
    found = [
        ("tests", quick, 200),
        ("tuning", [python, "-m", "ffkernels", "tune", "--seconds", "100"], 120),
        ("benchmarks", [*benchmark, "--within", "100", "--output", str(output)], 150),
        ("profile", [python, "-c", PROFILE], 30),
    ]
    if sanitizer is not None:
        small = [*quick, "-k", "optimizers or rest or ties"]
        found.insert(1, ("sanitizer", [sanitizer, "--error-exitcode", "1", *small], 40))
    return found


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        usage="%(prog)s [OPTIONS]",
        **described(
            """
            make gpu                                      # the same
            python -m bench.gpu --output path/to/folder
            """,
            """
            Everything that wants a GPU, in about nine minutes: tests, compute-sanitizer where
            there is one, tuning, benchmarks and a profile, each with a time limit of its own.
            Needs torch, triton, numpy, pytest and pytest-benchmark, and installs nothing.
            """,
        ),
    )
    folder = ROOT / "bench" / "results" / "gpu"
    parser.add_argument(
        "--output", type=Path, default=folder, metavar="DIR", help="for what it finds (bench/results/gpu)"
    )
    return parser


def main() -> int:
    output = parser().parse_args().output
    if not torch.cuda.is_available():
        print("make gpu needs a CUDA or ROCm device; torch finds none", file=sys.stderr)
        return 2
    output.mkdir(parents=True, exist_ok=True)
    ran: dict[str, dict[str, int | str | float]] = {}
    summary = {"machine": describe("cuda"), "parts": ran}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    failed = False
    for name, command, seconds in parts(output):
        start = time.monotonic()
        with (output / f"{name}.log").open("w") as log:
            try:
                code: int | str = subprocess.run(
                    command,
                    cwd=ROOT,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    timeout=seconds,
                ).returncode
            except subprocess.TimeoutExpired:
                code = f"stopped after {seconds} s"
            except OSError as error:
                code = f"did not start: {error}"
        failed |= code != 0
        ran[name] = {"result": code, "seconds": round(time.monotonic() - start, 1)}
        print(f"{name}: {'passed' if code == 0 else f'result {code}'} ({ran[name]['seconds']} s)", flush=True)
        (output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
