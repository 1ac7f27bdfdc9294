"""What the benchmark of several processes makes of times and traces, and a block of each kind on a small network."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from bench import parallel


def test_unions_and_what_two_have_in_common():
    one = parallel.union([(5, 6), (0, 2), (1, 3), (3, 4)])
    assert one == [(0, 4), (5, 6)]
    assert parallel.length(one) == 5
    assert parallel.common(one, [(3, 5.5), (5.75, 9)]) == [(3, 4), (5, 5.5), (5.75, 6)]


def test_what_is_hidden_of_sums_in_flight():
    assert parallel.hidden([(0, 10), (5, 20)], [(0, 2), (1, 6), (18, 30)]) == pytest.approx(8 / 20)
    assert parallel.hidden([(0, 10)], []) == 0
    assert parallel.hidden([(0, 1)], [(-1, 3)]) == 1


def event(name: str, start: float, end: float, thread: int = 1, is_async: bool = False) -> SimpleNamespace:
    return SimpleNamespace(
        name=name, thread=thread, is_async=is_async, time_range=SimpleNamespace(start=start, end=end)
    )


def test_a_trace_says_when_sums_were_in_flight_and_when_the_process_computed():
    """Of each step's sums the first one, of counts, is none of a layer's."""
    events = []
    for step in range(parallel.TRACED_STEPS):
        at = 100 * step
        events += [
            event("gloo:all_reduce", at, at + 1, 7, True),
            event("ffkernels::linear_step_", at + 2, at + 12),
            event("c10d::allreduce_", at + 12, at + 13),
            event("gloo:all_reduce", at + 13, at + 33, 8, True),
            event("aten::add", at + 23, at + 28),
            event("aten::add", at + 13, at + 33, 9),
        ]
    in_flight, computing = parallel.traced(SimpleNamespace(events=lambda: events), 1)
    assert in_flight == [(13, 33), (113, 133), (213, 233)]
    assert parallel.hidden(in_flight, computing) == 5 / 20


def test_a_run_leaves_its_rounds_and_the_two_figures(tmp_path, capsys):
    small = ["--width", "24", "--layers", "4", "--batch", "6", "--steps", "3", "--rounds", "1"]
    output, trace = tmp_path / "found.json", tmp_path / "trace.json"
    assert parallel.main([*small, "--output", str(output), "--trace", str(trace)]) == 0
    found = json.loads(output.read_text())
    assert found["size"] == {"width": 24, "layers": 4, "batch": 6, "steps": 3, "rounds": 1}
    assert len(found["processes"]) == parallel.PROCESSES
    for (seen,) in found["processes"]:
        assert list(seen) == ["alone", "pipeline", "rows", "rows, sharded"]
        pipeline = seen["pipeline"]
        assert pipeline["below"] + pipeline["above"] <= pipeline["clock"]
        assert all(0 <= seen[name]["hidden"] <= 1 for name in ("rows", "rows, sharded"))
    first, last = (seen for (seen,) in found["processes"])
    assert first["pipeline"]["below"] == 0 < last["pipeline"]["below"]
    gain = first["alone"]["clock"] / first["pipeline"]["clock"]
    said = capsys.readouterr().out
    assert f"pipeline over one process             {gain:.3f} [" in said
    assert "rows: share of sums hidden" in said
    names = {entry.get("name") for entry in json.loads(trace.read_text())["traceEvents"]}
    assert {"gloo:all_reduce", "ffkernels::linear_step_"} <= names


@pytest.mark.parametrize("wrong", [["--steps", "0"], ["--layers", "1"]])
def test_what_cannot_be_measured_is_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        parallel.main(wrong)
    assert f"{' '.join(wrong)}: " in capsys.readouterr().err
