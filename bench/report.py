"""Runs cases and turns what comes out into rows of data and a table."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

import torch

from .cases import Batch, Case, Data
from .contenders import Contender, Exact, FFKernels, contenders_of
from .timing import interleave, paired_ratio

OURS = "ffkernels"
Row = dict[str, Any]


def has_bfloat16_unit() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware."""
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)


def run_case(case: Case, data: Data) -> list[Row]:
    """Proves, warms and times every contender; one row of data for each, ours first.

    Raises:
        RuntimeError: where this package itself does not compute the peer's step.
    """
    index = count()

    def batches(number: int) -> list[Batch]:
        return [data.batch(case, next(index)) for _ in range(number)]

    initial = case.initial()
    exact = Exact(case, initial, batches(case.proof_steps))
    contenders: dict[str, Contender] = {}
    rows: dict[str, Row] = {}
    for name, make in contenders_of(case).items():
        row = rows[name] = {"case": case.name, "contender": name}
        try:
            contender = make(case, initial)
            proof = exact.check(contender) if contender.parameters() else None
        except Exception as error:  # one that cannot run here is a result too
            row["failed"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            continue
        if proof is not None:
            row |= {"same_step": proof.holds, **asdict(proof)}
        contenders[name] = contender
    if not rows[OURS].get("same_step"):
        raise RuntimeError(f"{case.name}: {OURS} does not compute the peer's step, nothing is timed: {rows[OURS]}")

    for _ in range(case.warm_steps):
        batch = batches(1)[0]
        for contender in contenders.values():
            contender.step(*batch)
    seconds = interleave(contenders, lambda: batches(case.lead + case.block), case.rounds, case.lead)
    for name, times in seconds.items():
        rows[name] |= {
            "median_ms": statistics.median(times) * 1e3,
            "block_ms": [t * 1e3 for t in times],
            "over_ours": asdict(paired_ratio(times, seconds[OURS])),
        }
    rows[OURS]["steps_before_timing"] = case.proof_steps + case.warm_steps
    rows[OURS]["rows_at_rest"] = rows_at_rest(case, contenders[OURS], batches(1)[0])
    return list(rows.values())


def rows_at_rest(case: Case, contender: Contender, batch: Batch) -> list[float]:
    """Per layer, the share of rows whose loss has no slope left in float32: the update leaves them out."""
    assert isinstance(contender, FFKernels)
    sign = torch.tensor([-1.0, 1.0]).repeat_interleave(case.rows).unsqueeze(1)
    threshold = torch.tensor([case.peer.objective_for(width).thresholds()[0] for width in case.sizes[1:]])
    slope = torch.sigmoid(sign * (contender.net.goodness(torch.cat(batch)) - threshold))
    return (slope == 0).float().mean(0).tolist()


def machine() -> Row:
    """What a time depends on: processor, threads, versions, commit, how busy the machine is; and the date."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "bfloat16_unit": has_bfloat16_unit(),
        "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "allocator": {k: v for k, v in os.environ.items() if k.startswith("MALLOC_") or k == "LD_PRELOAD"},
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain")),
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    parts = [line.partition(":") for line in lines]
    fields = {key.strip(): value.strip() for key, _, value in parts}
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    return f"{fields['model name']} (family {fields.get('cpu family')}, model {fields.get('model')})"


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def table(rows: Iterable[Row]) -> str:
    """The rows in Markdown."""
    lines = ["| case | contender | ms per step | time over ours | same step |", "|---|---|---:|---:|---|"]
    for row in rows:
        start = f"| {row['case']} | {row['contender']} "
        if "failed" in row:
            lines.append(f"{start}| | | did not run: {row['failed'].replace('|', '/')} |")
            continue
        ratio = row["over_ours"]
        over = f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"
        over = "" if row["contender"] == OURS else over
        lines.append(f"{start}| {row['median_ms']:.2f} | {over} | {_proof(row)} |")
    return "\n".join(lines)


def _proof(row: Row) -> str:
    if "same_step" not in row:
        return "products and state only"
    verdict = "yes" if row["same_step"] else "**no**"
    return f"{verdict}: off by {row['error']:.1e}, allowed {row['budget']:.1e}"
