"""`python -m bench`: this package against what people use today, on this machine."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

from .cases import CASES, Data
from .report import has_bfloat16_unit, machine, run_case, table

RESULTS = Path(__file__).parent / "results"
NO_BFLOAT16 = (
    "The bfloat16 cases are left out: this CPU has neither AMX nor AVX512-BF16, so they would say nothing "
    "about one that has (--force runs them all the same)."
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--case", nargs="+", choices=CASES, metavar="NAME", help=f"of {', '.join(CASES)}")
    parser.add_argument("--quick", action="store_true", help="fewer blocks, wider intervals")
    parser.add_argument("--warm", type=int, metavar="N", help="steps before timing: trained nets leave out more rows")
    parser.add_argument("--force", action="store_true", help="bfloat16 cases even without a bfloat16 unit")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="for the results as JSON")
    options = parser.parse_args(arguments)

    cases = [CASES[name] for name in options.case or CASES]
    if not (options.force or has_bfloat16_unit()) and any(case.bfloat16 for case in cases):
        print(NO_BFLOAT16, file=sys.stderr)
        cases = [case for case in cases if not case.bfloat16]
    if not cases:
        return 0
    data, about = Data(), machine()
    if about["load_before"] is not None and about["load_before"] > 0.5:
        print(f"This machine is busy (load {about['load_before']:.1f}): measure alone.", file=sys.stderr)
    rows = []
    for case in cases:
        print(f"{case.name} ...", file=sys.stderr)
        case = case.quick() if options.quick else case
        rows += run_case(case if options.warm is None else replace(case, warm_steps=options.warm), data)
    print(table(rows))

    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"{time.strftime('%Y%m%d-%H%M%S')}.json"
    results = {"machine": about, "data": data.source, "quick": options.quick, "rows": rows}
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{about['cpu']}, {about['threads']} threads, torch {about['torch']}, data: {data.source}.")
    print(f"Written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
