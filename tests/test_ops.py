"""The operators as PyTorch sees them: schemas, fakes, and the choice of a backend."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import ffkernels as ff
from ffkernels import ops, optim
from ffkernels import peer as peers
from ffkernels.backends import select
from ffkernels.backends.native import library
from ffkernels.spec import Layer, Outputs, Rows, Slopes

from .steps import OPTIMIZERS, problem

FORWARD, FORWARD_, STEP, UPDATE = (
    getattr(torch.ops.ffkernels, name).default
    for name in ("linear_forward", "linear_forward_", "linear_step_", "linear_update_")
)


def forward_arguments(compute_dtype: torch.dtype, sumsq: bool, keep: bool = True) -> tuple:
    p = problem(dtype=torch.float32)
    known = torch.cat([p.x_pos, p.x_neg]).square().sum(1) if sumsq else None
    layer = Layer(p.weight, p.bias, "l2", 1e-4, "add", "relu", compute_dtype)
    return (*ops.flatten(Rows(p.x_pos, p.x_neg, input_sumsq=known), layer), keep, "eager")


def step_records(
    optimizer: str,
    bias: bool,
    compute_dtype: torch.dtype,
    objective: ff.Objective,
    peer: ff.PeerNormalisation | None = None,
    skip_below: float = 0.0,
    **rows,
) -> tuple:
    """The records of a step, `rows` those fields that are not of the usual problem."""
    p = problem(dtype=torch.float32, bias=bias, optimizer=optimizer)
    total = len(p.x_pos) + len(p.x_neg)
    parameters = p.weight.detach(), None if p.bias is None else p.bias.detach()
    mean = None if peer is None else torch.full((7,), 0.5)
    return (
        Rows(**{"x_pos": p.x_pos, "x_neg": p.x_neg, **rows}),
        Layer(*parameters, "l2", 1e-4, "add", "relu", compute_dtype),
        objective.goal(skip_below),
        peers.pull(peer, mean, 7),
        optim.plan(p.optimizer, p.weight, p.bias).record,
        Outputs(torch.zeros(total, 7, dtype=compute_dtype), torch.zeros(total), torch.zeros(())),
    )


def step_arguments(*args, backend: str = "eager", **options) -> tuple:
    return (*ops.flatten_step(*step_records(*args, **options)), backend)


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("sumsq", "keep"), [(False, True), (True, True), (True, False)])
def test_opcheck_forward(compute_dtype, sumsq, keep):
    # No derivative is registered: the result carries no gradient.
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    with torch.no_grad():
        arguments = forward_arguments(compute_dtype, sumsq, keep)
        torch.library.opcheck(FORWARD, arguments, test_utils=checks)
        results = torch.zeros(12, 7, dtype=compute_dtype) if keep else None, torch.zeros(12)
        torch.library.opcheck(FORWARD_, (*arguments[:-2], *results, None, True, None, "eager"), test_utils=checks)


@pytest.mark.parametrize("rows", [7, 2600])
@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", [None, "eager"])
@pytest.mark.parametrize("frozen", [False, True])
def test_sums_alone_are_those_of_the_activities(rows, compute_dtype, backend, frozen):
    x, weight = torch.rand(rows, 30), torch.randn(50, 30).requires_grad_(not frozen)
    options = {"compute_dtype": compute_dtype, "backend": backend}
    y, alone = ff.linear_forward(x, weight, keep=False, **options)
    assert y.shape == (0, 50)
    assert y.dtype == compute_dtype
    expected = ff.linear_forward(x, weight, **options)[1]
    assert torch.equal(alone, expected)
    if not frozen:
        (ours,), (theirs,) = (torch.autograd.grad(sums.sum(), weight) for sums in (alone, expected))
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("optimizer", ["sgd", "sgd-momentum", "adam", "adamw", "rmsprop"])
@pytest.mark.parametrize("bias", [False, True])
def test_opcheck_step(optimizer, bias):
    torch.library.opcheck(STEP, step_arguments(optimizer, bias, torch.float32, ff.Objective()))


@pytest.mark.parametrize(
    ("compute_dtype", "objective"),
    [
        (torch.bfloat16, ff.Objective(loss="symba")),
        (torch.float32, ff.Objective(threshold=torch.tensor(2.0))),
    ],
)
def test_opcheck_step_variants(compute_dtype, objective):
    torch.library.opcheck(STEP, step_arguments("adam", True, compute_dtype, objective))


@pytest.mark.parametrize("optimizer", ["sgd-momentum", "rmsprop"])
@pytest.mark.parametrize("gated", [False, True])
def test_opcheck_step_with_peer_normalisation(optimizer, gated):
    peer = ff.PeerNormalisation(gated=gated)
    torch.library.opcheck(STEP, step_arguments(optimizer, True, torch.float32, ff.Objective(), peer))


@pytest.mark.parametrize("backend", ["eager", "native"])
@pytest.mark.parametrize("basis", [None, torch.randn(3, 7)])
def test_opcheck_update(basis, backend):
    if backend == "native" and select.load("native").library.load().library is None:
        pytest.skip("the compiled library was not built")
    p = problem(12, 0, dtype=torch.float32, optimizer="adam")
    rows = Rows(p.x_pos, p.x_neg, labels=torch.zeros(12, dtype=torch.int64))
    layer = Layer(p.weight.detach(), p.bias.detach(), "l2", 1e-4, "add", "relu", torch.float32)
    slopes = Slopes(torch.rand(12, 7), torch.randn(12, 3), torch.randn(12, 1), basis)
    update = optim.plan(p.optimizer, p.weight, p.bias).record
    records = (rows, layer, slopes, peers.pull(None, None, 7), (update.rule,), update.weight, update.bias)
    torch.library.opcheck(UPDATE, (*ops.flatten(*records), backend))


@pytest.mark.parametrize("backend", ["eager", "native"])
@pytest.mark.parametrize("optimizer", ["sgd-momentum", "adam"])
def test_a_step_leaves_the_new_weight_rounded(backend, optimizer):
    if backend == "native" and select.load("native").library.load().library is None:
        pytest.skip("the compiled library was not built")
    *records, outputs = step_records(optimizer, True, torch.float32, ff.Objective())
    weight, rounded = records[1].weight, torch.empty(7, 5, dtype=torch.bfloat16)
    before = weight.clone()
    ops.linear_step_(*records, outputs._replace(rounded=rounded), backend)
    assert torch.equal(rounded, weight.to(torch.bfloat16)) and not torch.equal(weight, before)


def test_fakes_have_the_shapes_and_dtypes_of_the_real_thing():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, weight = torch.empty(5, 3), torch.empty(4, 3)
        y, sumsq = ff.linear_forward(x, weight, compute_dtype=torch.bfloat16)
    assert (y.shape, y.dtype, sumsq.shape, sumsq.dtype) == ((5, 4), torch.bfloat16, (5,), torch.float32)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_explain(name):
    p = problem(optimizer=name, dtype=torch.float32)
    text = ff.explain(p.weight, p.optimizer, activation="gelu", compute_dtype=torch.bfloat16)
    backend = "eager" if library.load().library is None else "native"
    assert f"backend: {backend} (first that can run it) for torch.float32 on cpu, products in torch.bfloat16" in text
    assert ("fused" in text) == (name not in ("rmsprop", "adam-amsgrad"))


class Picky:
    """A backend that runs relu only."""

    LOSSES = ("logistic",)

    @staticmethod
    def unsupported(request: select.Request) -> str | None:
        return None if request.activation == "relu" else f"activation {request.activation!r} has no kernel"

    @staticmethod
    def linear_forward_(*arguments):
        *_, y, sumsq = arguments
        y.fill_(7)
        sumsq.zero_()


def test_the_first_backend_that_can_run_a_call_runs_it(monkeypatch):
    monkeypatch.setattr(select, "BACKENDS", {"picky": "picky", **select.BACKENDS})
    load = select.load
    monkeypatch.setattr(select, "load", lambda name: Picky if name == "picky" else load(name))
    p = problem()
    assert (ff.linear_forward(p.x_pos, p.weight)[0] == 7).all()
    assert not (ff.linear_forward(p.x_pos, p.weight, activation="gelu")[0] == 7).any()
    assert not (ff.linear_forward(p.x_pos, p.weight, backend="eager")[0] == 7).any()
    assert "passed over: eager: comes later" in ff.explain(p.weight)
    assert "passed over: picky: activation 'gelu' has no kernel" in ff.explain(p.weight, activation="gelu")
    with pytest.raises(ValueError, match="backend='picky' cannot run this call: activation 'gelu' has no kernel"):
        ff.linear_forward(p.x_pos, p.weight, activation="gelu", backend="picky")
    monkeypatch.setenv("FFKERNELS_BACKEND", "picky")
    assert "forced by FFKERNELS_BACKEND" in ff.explain(p.weight)
    with pytest.raises(ValueError, match="FFKERNELS_BACKEND='picky' cannot run this call"):
        ff.explain(p.weight, activation="gelu")


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_an_unknown_backend_fails_loudly_and_changes_nothing(how, monkeypatch):
    p = problem()
    before = p.weight.detach().clone()
    if how == "environment":
        monkeypatch.setenv("FFKERNELS_BACKEND", "cudnn")
    name = {"argument": "backend", "environment": "FFKERNELS_BACKEND"}[how]
    with pytest.raises(ValueError, match=f"{name}='cudnn' is not a backend of this installation; accepted: .*eager"):
        ff.linear_step_(p.x_pos, p.x_neg, p.weight, p.bias, p.optimizer, backend="cudnn" if how == "argument" else None)
    assert torch.equal(p.weight, before) and not p.optimizer.state


def test_imports_and_works_with_torch_alone():
    """With every other package hidden, the package trains a step."""
    code = """
import sys
for name in ("triton", "numpy", "matplotlib", "tqdm", "numcodecs", "hypothesis", "pytest"):
    sys.modules[name] = None
import torch
import ffkernels as ff
import ffkernels.cli, ffkernels.recipes.train
assert "torch._dynamo" not in sys.modules, "the compiler is imported by those who use it"
net = ff.FFNetwork([ff.FFLinear(12, 8), ff.FFLinear(8, 4)])
x = torch.rand(6, 12)
optimizer = torch.optim.Adam(net.parameters())
losses = [sum(float(r.loss) for r in net.step(x, x.flip(1), optimizer)) for _ in range(50)]
assert losses[-1] < losses[0], losses
print("trained")
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "trained", done.stderr


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("optimizer", ["sgd", "sgd-momentum", "adam", "adamw", "adam-on-device", "rmsprop"])
@pytest.mark.parametrize("is_positive", [False, True])
@pytest.mark.parametrize("peer", [None, ff.PeerNormalisation(), ff.PeerNormalisation(gated=True)])
def test_a_step_on_a_device_never_waits_for_it(compute_dtype, optimizer, is_positive, peer):
    """Meta tensors hold no values: whatever would bring one back to the host raises."""
    from ffkernels.backends import eager

    on_device = optimizer == "adam-on-device"
    mask = {"x_neg": torch.empty(0, 5), "is_positive": torch.ones(6, dtype=torch.bool)} if is_positive else {}
    records = step_records("adam" if on_device else optimizer, True, compute_dtype, ff.Objective(), peer, **mask)

    def to_meta(value):
        if isinstance(value, list):
            return [to_meta(v) for v in value]
        if isinstance(value, tuple):
            return type(value)(*map(to_meta, value)) if value else value
        # Adam keeps its step count on the host unless it is capturable or fused.
        is_step_count = isinstance(value, torch.Tensor) and value.dim() == 0
        return value.to("meta") if isinstance(value, torch.Tensor) and (on_device or not is_step_count) else value

    rows, layer, goal, pull, update, outputs = map(to_meta, records)
    total = 6 if is_positive else 12
    outputs = Outputs(outputs.y[:total], outputs.sumsq[:total], outputs.loss_out.to("meta"))
    with torch.no_grad():
        eager.linear_step_(rows, layer, goal, pull, update, outputs)
        eager.linear_forward_(rows, layer, outputs.y, outputs.sumsq)
    with pytest.raises(RuntimeError):
        outputs.loss_out.item()


@pytest.mark.parametrize("backend", ["eager", "native"])
def test_who_watches_operators_sees_them_and_the_numbers_stay(backend):
    """A profiler and a dispatch mode are shown the operators, which otherwise are passed by."""
    from torch.utils._python_dispatch import TorchDispatchMode

    if backend == "native" and select.load("native").library.load().library is None:
        pytest.skip("the compiled library was not built")

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    losses, names = [], []
    for watched in (None, torch.profiler.profile(), Names()):
        torch.manual_seed(0)
        layer = ff.FFLinear(5, 4, backend=backend)
        optimizer, x_pos, x_neg = torch.optim.Adam(layer.parameters()), torch.rand(6, 5), torch.rand(6, 5)
        for at in range(3):
            if at == 2 and watched is not None:
                with watched:
                    result = layer.step(x_pos, x_neg, optimizer)
            else:
                result = layer.step(x_pos, x_neg, optimizer)
        losses.append((result.loss, result.y, layer.weight.detach()))
        if isinstance(watched, torch.profiler.profile):
            assert "ffkernels::linear_step_" in {event.name for event in watched.events()}
    assert "ffkernels.linear_step_.default" in names
    for plain, *others in zip(*losses, strict=True):
        assert all(torch.equal(plain, other) for other in others)
