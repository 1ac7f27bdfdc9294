"""Ctrl-C at any line of a step, and no memory at any allocation: everything is old or everything is new."""

from __future__ import annotations

import signal
import sys
import threading
import time

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import ffkernels as ff
from ffkernels import interrupts, ops
from ffkernels.backends import select

from .steps import OPTIMIZERS, Problem, problem, state_of

NATIVE = select.load("native").library.load().library is not None
CASES = [
    (backend, optimizer, strided)
    for backend in (["eager", "native"] if NATIVE else ["eager"])
    for optimizer in ("sgd-momentum", "adam", "rmsprop")
    for strided in (False, True)
]
PEER = ff.PeerNormalisation(strength=0.5)


def fresh(optimizer: str, strided: bool, warm: bool = False) -> tuple[Problem, torch.Tensor]:
    """A layer and its running mean; `warm`: after a first step, which made the optimizer's state."""
    torch.manual_seed(3)
    p = problem(optimizer=optimizer, dtype=torch.float32)
    weight = nn.Parameter(p.weight.detach().t().contiguous().t()) if strided else p.weight
    p = p._replace(weight=weight, optimizer=OPTIMIZERS[optimizer]([weight, p.bias]))
    mean = torch.full((7,), 0.5)
    if warm:
        step(p, mean, "eager")
    return p, mean


def step(p: Problem, mean: torch.Tensor, backend: str, **options) -> ff.StepResult:
    return ff.linear_step_(
        p.x_pos, p.x_neg, p.weight, p.bias, p.optimizer, peer=PEER, peer_mean=mean, backend=backend, **options
    )


def written(p: Problem, mean: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in {**state_of(p), "mean": mean}.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def interrupted_at(line: int, call) -> bool:
    """Runs `call` with Ctrl-C at the `line`-th line that Python executes in it; whether there was such a line."""
    seen = 0

    def trace(frame, event, arg):
        nonlocal seen
        if event == "line":
            seen += 1
            if seen - 1 == line:
                signal.raise_signal(signal.SIGINT)
        return trace

    before = sys.gettrace()
    try:
        sys.settrace(trace)
        call()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return seen > line


@pytest.fixture(autouse=True)
def own_handler():
    """What one test leaves behind is not the next one's fault."""
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_ctrl_c_at_every_line_of_holding_and_releasing():
    line, there = 0, True
    while there:
        there = interrupted_at(line, lambda: interrupts.release(interrupts.hold()))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, line
        line += 1
    assert line > 15


@pytest.mark.parametrize(
    ("backend", "optimizer", "strided", "warm"),
    [(*case, warm) for case in CASES for warm in (False, True) if not warm or case[1] == "adam"],
)
def test_ctrl_c_at_every_line_of_a_step(backend, optimizer, strided, warm):
    p, mean = fresh(optimizer, strided, warm)
    old = written(p, mean)
    step(p, mean, backend)
    new = written(p, mean)
    assert not same(old, new)
    line, outcomes = int(warm), set()
    while True:
        p, mean = fresh(optimizer, strided, warm)
        there = interrupted_at(line, lambda p=p, mean=mean: step(p, mean, backend))
        found = written(p, mean)
        assert same(found, old) or same(found, new), line
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        outcomes.add(same(found, new))
        assert torch.is_grad_enabled() or not same(found, new)
        # A `no_grad` that is interrupted on its own first or last line, which is torch's, keeps its mode.
        torch.set_grad_enabled(True)
        line += 3
        if not there:
            break
    assert outcomes == {False, True}


@pytest.mark.parametrize(("backend", "optimizer", "strided"), [case for case in CASES if case[1] == "adam"])
def test_ctrl_c_at_any_time(backend, optimizer, strided):
    """Signals of another thread, at random moments."""
    p, mean = fresh(optimizer, strided)
    old = written(p, mean)
    step(p, mean, backend)
    new, caught = written(p, mean), 0
    main = threading.main_thread().ident
    for wait in torch.rand(60).mul(4e-4).tolist():
        p, mean = fresh(optimizer, strided)
        ready = threading.Event()

        def send(ready=ready, wait=wait):
            ready.wait()
            time.sleep(wait)
            signal.pthread_kill(main, signal.SIGINT)

        sender = threading.Thread(target=send)
        sender.start()
        try:
            ready.set()
            step(p, mean, backend)
            sender.join()
            time.sleep(0.01)
        except KeyboardInterrupt:
            caught += 1
        sender.join()
        found = written(p, mean)
        assert same(found, old) or same(found, new)
    assert caught > 50


def test_a_second_ctrl_c_does_not_wait():
    held = interrupts.hold()
    try:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        interrupts.release(held)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_the_program_runs_once_after_the_step():
    came = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        held = interrupts.hold()
        signal.raise_signal(signal.SIGINT)
        assert came == []
        interrupts.release(held)
        assert came == [signal.SIGINT]
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        assert interrupts.hold() is None
    finally:
        signal.signal(signal.SIGINT, before)


class Failing(TorchDispatchMode):
    """Fails the `at`-th time that an operation of PyTorch runs whose result is new memory."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.seen = at, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "ffkernels":
            # What a backend does is seen as well.
            with self:
                return ops.ON_BACKEND[func._opname](*args)
        makes = func.namespace == "aten" and any(
            r.alias_info is None and "Tensor" in str(r.type) for r in func._schema.returns
        )
        if makes:
            self.seen += 1
            if self.seen - 1 == self.at:
                raise MemoryError("injected")
        return func(*args, **(kwargs or {}))


OUTPUTS = [
    (backend, optimizer, strided, warm, outputs, options)
    for backend, optimizer, strided in CASES
    for warm in (False, True)
    for outputs, options in (("post", {}), ("pre", {"objective": ff.Objective(goodness="norm", threshold=0.5)}))
    if optimizer != "rmsprop"
]


@pytest.mark.parametrize(("backend", "optimizer", "strided", "warm", "outputs", "options"), OUTPUTS)
def test_no_memory_at_each_allocation_in_turn(backend, optimizer, strided, warm, outputs, options):
    """An error leaves everything as it was; without one the step is whole, and so is its result."""
    p, mean = fresh(optimizer, strided, warm)
    old = written(p, mean)
    expected = step(p, mean, backend, outputs=outputs, **options)
    new = written(p, mean)
    at, failed = 0, 0
    while True:
        p, mean = fresh(optimizer, strided, warm)
        mode = Failing(at)
        try:
            with mode:
                result = step(p, mean, backend, outputs=outputs, **options)
        except MemoryError:
            failed += 1
            assert same(written(p, mean), old), at
        else:
            assert same(written(p, mean), new), at
            for name in ("y", "sumsq", "goodness", "loss"):
                a, b = getattr(result, name), getattr(expected, name)
                assert (a is None and b is None) or torch.allclose(a, b, rtol=1e-6, atol=1e-6), name
        if mode.seen <= at:
            break
        at += 1
    assert failed > 2


@pytest.mark.parametrize("backend", ["eager", "native"] if NATIVE else ["eager"])
@pytest.mark.parametrize("kind", ["sides", "mask", "pairs by mask"])
def test_no_memory_for_all_rows_after_the_update(backend, kind, monkeypatch):
    """The forward pass makes do with few rows at a time, and its numbers are those of all at once."""
    # Every backend's step with a forward pass of its own behind it.
    monkeypatch.setattr(select, "HANDS_OUT_ALL", ())
    p = problem(150, 150, 9, 7, optimizer="adam", dtype=torch.float32)
    options: dict = {"backend": backend}
    if "mask" in kind:
        options["is_positive"] = torch.arange(300) % 2 == 0
        options["objective"] = ff.Objective(loss="symba") if "pairs" in kind else ff.Objective()
        p = p._replace(x_pos=torch.cat([p.x_pos, p.x_neg]), x_neg=None)
    found = []
    for limit in (None, 64):
        whole = ops.linear_forward_

        def forward(rows, *others, limit=limit, whole=whole):
            if limit is not None and len(rows.x_pos) + len(rows.x_neg) > limit:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            whole(rows, *others)

        q = p._replace(weight=nn.Parameter(p.weight.detach().clone()), bias=nn.Parameter(p.bias.detach().clone()))
        optimizer = OPTIMIZERS["adam"]([q.weight, q.bias])
        with monkeypatch.context() as patch:
            patch.setattr(ops, "linear_forward_", forward)
            found.append(ff.linear_step_(q.x_pos, q.x_neg, q.weight, q.bias, optimizer, **options))
    for name in ("y", "sumsq", "goodness"):
        torch.testing.assert_close(getattr(found[1], name), getattr(found[0], name), rtol=1e-5, atol=1e-6)
