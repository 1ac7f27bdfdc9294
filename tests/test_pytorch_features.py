"""What programs do with PyTorch: compile, autocast, schedule, parametrise, copy, save, load data in workers."""

from __future__ import annotations

import copy
import io
import os
import shutil
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, lr_scheduler
from torch.utils.data import DataLoader, Dataset

import ffkernels as ff
from ffkernels import reference
from ffkernels.backends import select
from ffkernels.optim import SGDW

from .steps import error, problem

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": lambda p, lr: SGD(p, lr=lr, momentum=0.9),
    "adam": lambda p, lr: Adam(p, lr=lr),
    "adamw": lambda p, lr: AdamW(p, lr=lr),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bfloat16": {"compute_dtype": torch.bfloat16},
    "eager": {"backend": "eager"},
    "peer": {"peer": ff.PeerNormalisation()},
    "symba": {"objective": ff.Objective(loss="symba")},
    "threshold tensor": {"objective": ff.Objective(threshold=torch.tensor(2.0))},
}
COMPILERS = ["aot_eager"]
if shutil.which("g++") or shutil.which("clang++"):
    COMPILERS.append("inductor")


def network(optimizer: str = "sgd", lr: Any = 0.05, **options: Any) -> tuple[ff.FFNetwork, Optimizer]:
    torch.manual_seed(0)
    net = ff.FFNetwork([ff.FFLinear(20, 16, **options), ff.FFLinear(16, 12, **options)])
    return net, OPTIMIZERS[optimizer](net.parameters(), lr)


def assert_same(a: nn.Module, b: nn.Module, tolerance: float = 0.0) -> None:
    expected = b.state_dict()
    for name, value in a.state_dict().items():
        assert error(value, expected[name]) <= tolerance, name


def body(net: ff.FFNetwork, optimizer: Optimizer, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """What stands in a training loop."""
    x_pos, x_neg = ff.overlay_label(x, labels), ff.overlay_label(x, ff.wrong_label(labels))
    results = net.step(x_pos, x_neg, optimizer)
    return torch.stack([result.loss for result in results]), results[0].goodness_pos


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("compiler", "optimizer", "options"),
    [("aot_eager", name, "plain") for name in OPTIMIZERS]
    + [("aot_eager", "adam", name) for name in OPTIONS if name != "plain"]
    + [(name, "adam", "plain") for name in COMPILERS[1:]],
)
def test_a_training_loops_body_compiles_whole(compiler, optimizer, options, fresh_compiler):
    """One graph, one compilation, for a learning rate (a tensor) that a scheduler changes; the same numbers."""
    nets = [network(optimizer, torch.tensor(0.05), **OPTIONS[options]) for _ in range(2)]
    schedules = [lr_scheduler.ExponentialLR(o, 0.8) for _, o in nets]
    compiled = torch.compile(body, fullgraph=True, backend=compiler)
    # Optimizers make their state at the first step; compiled later, it is there and stays.
    bodies = [(body, body)] + [(compiled, body)] * 4
    for i, pair in enumerate(bodies):
        x, labels = torch.rand(10, 20), torch.arange(10) % 7
        losses = []
        for run, (net, o), schedule in zip(pair, nets, schedules, strict=True):
            torch.manual_seed(i)
            with torch._dynamo.config.patch(error_on_recompile=i > 1):
                losses.append(run(net, o, x, labels)[0])
            schedule.step()
        assert torch.equal(*losses)
    assert_same(nets[0][0], nets[1][0])
    assert float(nets[0][1].param_groups[0]["lr"]) == pytest.approx(0.05 * 0.8**5)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_step_compiles_from_its_first_call_on(optimizer, fresh_compiler):
    """Without optimizer state yet: it is made in the graph, and the second call compiles once more."""
    compiled = torch.compile(ff.linear_step_, fullgraph=True, backend="aot_eager")
    made = problem(dtype=torch.float32)
    layers = [nn.Linear(5, 7) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    optimizers = [OPTIMIZERS[optimizer](layer.parameters(), 0.05) for layer in layers]
    schedules = [lr_scheduler.ExponentialLR(o, 1.0) for o in optimizers]
    objective = ff.Objective()
    for i in range(5):
        with torch._dynamo.config.patch(error_on_recompile=i > 1), warnings.catch_warnings():
            warnings.filterwarnings("error", "Detected call of `lr_scheduler.step")
            for step, layer, o, schedule in zip(
                (compiled, ff.linear_step_), layers, optimizers, schedules, strict=True
            ):
                step(made.x_pos, made.x_neg, layer.weight, layer.bias, o, objective=objective)
                schedule.step()
    assert_same(*layers)
    mine, theirs = (o.state_dict()["state"] for o in optimizers)
    assert mine.keys() == theirs.keys() and all(mine[i].keys() == theirs[i].keys() for i in theirs)


CHANGING: dict[str, tuple[Callable[[Any], Optimizer], Callable[[Optimizer], Any]]] = {
    # Numbers, not tensors, that take 20 values each.
    "adam, OneCycleLR": (lambda p: Adam(p, lr=0.01), lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=25)),
    "adamw, ExponentialLR": (lambda p: AdamW(p, lr=0.05), lambda o: lr_scheduler.ExponentialLR(o, 0.9)),
    "sgd, OneCycleLR": (
        lambda p: SGD(p, lr=0.01, momentum=0.9), lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=25)
    ),
    "sgd without momentum, LambdaLR": (
        lambda p: SGD(p, lr=0.1), lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step))
    ),
    "sgdw, CosineAnnealingLR": (
        lambda p: SGDW(p, lr=0.1, decoupled=0.1, momentum=0.5), lambda o: lr_scheduler.CosineAnnealingLR(o, 30)
    ),
    "sgdw with a tensor lr, OneCycleLR": (
        lambda p: SGDW(p, lr=torch.tensor(0.1), decoupled=0.1, momentum=0.5),
        lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=25),
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("case", "compiler"),
    [(case, "aot_eager") for case in CHANGING]
    # Half a minute of C++ for several graphs: in `make nightly`.
    + [("adam, OneCycleLR", name) for name in COMPILERS[1:] if os.environ.get("FFKERNELS_COMPILERS") == "all"],
)
def test_numbers_of_a_schedule_are_no_constants_of_compiled_code(case, compiler, fresh_compiler):
    """Twenty values of learning rate, betas, momentum: compiled anew a handful of times, and the same numbers."""
    make, schedule = CHANGING[case]
    nets = [ff.FFNetwork([ff.FFLinear(20, 16)]) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers = [make(net.parameters()) for net in nets]
    schedules = [schedule(o) for o in optimizers]
    graphs: list[Any] = []
    compiled = torch.compile(body, fullgraph=True, backend=counting(compiler, graphs))
    for i in range(20):
        x, labels = torch.rand(10, 20), torch.arange(10) % 7
        losses = []
        for run, net, o, s in zip((compiled, body), nets, optimizers, schedules, strict=True):
            torch.manual_seed(i)
            with torch._dynamo.config.patch(error_on_recompile=i > 4):
                losses.append(run(net, o, x, labels)[0])
            s.step()
        assert torch.equal(*losses)
    assert_same(*nets)
    assert 1 <= len(graphs) <= 4


def counting(compiler: str, graphs: list[Any]) -> Callable[..., Any]:
    """A compiler that notes what it compiles."""

    def compile_and_note(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend(compiler)(graph, inputs)

    return compile_and_note


@pytest.mark.parametrize("how", ["module hook", "rmsprop"])
def test_what_is_called_is_called_from_compiled_code_too(how, fresh_compiler):
    """Where it cannot be part of a graph, it breaks it, as it does in plain PyTorch."""
    nets = [network()[0] for _ in range(2)]
    for net in nets:
        if how == "module hook":
            net.layers[0].register_forward_hook(lambda m, args, y: y * 0.5)
    kind = torch.optim.RMSprop if how == "rmsprop" else SGD
    optimizers = [kind(net.parameters(), lr=0.05) for net in nets]
    compiled = torch.compile(lambda *x: nets[0].step(*x, optimizers[0])[1].loss, backend="aot_eager")
    for _ in range(3):
        x = torch.rand(2, 8, 20)
        assert error(compiled(x[0], x[1]), nets[1].step(x[0], x[1], optimizers[1])[1].loss) < 1e-6
    assert_same(*nets, 1e-6)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_gradient_hooks_keep_a_step_out_of_compiled_code(fullgraph, fresh_compiler):
    """torch.compile would not see them: an error, until the step is kept out by name."""
    (net, o), (other, other_o) = network(), network()
    for n in (net, other):
        n.layers[1].weight.register_hook(lambda g: g * 0.5)
    x = torch.rand(2, 8, 20)
    before = copy.deepcopy(net.state_dict())
    compiled = torch.compile(lambda *x: net.step(*x, o)[1].loss, backend="aot_eager", fullgraph=fullgraph)
    with pytest.raises(Exception, match=r"has gradient hooks, which compiled code does not call"):
        compiled(x[0], x[1])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    if not fullgraph:
        step = torch.compiler.disable(net.step)
        assert torch.compile(lambda *x: step(*x, o)[1].loss, backend="aot_eager")(x[0], x[1]) == (
            other.step(x[0], x[1], other_o)[1].loss
        )
        assert_same(net, other)


def test_compiled_code_meets_the_same_errors(fresh_compiler):
    layer = nn.Linear(5, 7)
    optimizer = SGD(layer.parameters(), lr=0.1)
    compiled = torch.compile(lambda x: ff.linear_step_(x, x, layer.weight, layer.bias, optimizer), backend="aot_eager")
    with pytest.raises(Exception, match="x_pos has 4 columns but weight is"):
        compiled(torch.rand(3, 4))


def test_compiled_labels_out_of_range_show_as_nan(fresh_compiler):
    compiled = torch.compile(ff.overlay_label, fullgraph=True, backend="aot_eager")
    assert compiled(torch.rand(2, 12), torch.tensor([3, 10]))[:, :10].isnan().any(1).tolist() == [False, True]


def test_a_compiled_forward_under_autograd(fresh_compiler):
    net, _ = network()
    x = torch.rand(6, 20)
    side, objective = torch.arange(6) < 3, ff.Objective()

    def loss_of(x: Tensor) -> Tensor:
        return sum(ff.goodness_loss(g, side, objective) for g in net.goodness(x).unbind(1))

    gradients = []
    for run in (loss_of, torch.compile(loss_of, fullgraph=True, backend="aot_eager")):
        net.zero_grad()
        run(x).backward()
        gradients.append([p.grad for p in net.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert error(b, a) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_the_compute_dtype_of_every_layer(dtype):
    (a, opt_a), (b, opt_b) = network("adam"), network("adam", compute_dtype=dtype)
    for _ in range(3):
        x_pos, x_neg = torch.rand(2, 8, 20)
        with torch.autocast("cpu", dtype):
            first = a.step(x_pos, x_neg, opt_a)
        second = b.step(x_pos, x_neg, opt_b)
        assert all(
            torch.equal(p.loss, q.loss) and p.loss.dtype == torch.float32 for p, q in zip(first, second, strict=True)
        )
    assert_same(a, b)
    assert all(p.dtype == torch.float32 for p in a.parameters())


SCHEDULES: dict[str, Callable[[Optimizer], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.3),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    # Changes momentum and betas too.
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=8),
}


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedulers(schedule, optimizer, tensor):
    made = problem(dtype=torch.float64)
    runs = []
    for step in (ff.linear_step_, reference.linear_step_):
        weight, bias = (nn.Parameter(p.detach().clone()) for p in (made.weight, made.bias))
        lr = torch.tensor(0.05, dtype=torch.float64) if tensor else 0.05
        o = OPTIMIZERS[optimizer]([weight, bias], lr)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            scheduler = SCHEDULES[schedule](o)
            for _ in range(6):
                step(made.x_pos, made.x_neg, weight, bias, o, objective=ff.Objective())
                scheduler.step()
        runs.append((weight, bias, o))
    for a, b in zip(runs[0][:2], runs[1][:2], strict=True):
        assert error(a, b) <= 1e-10
    assert float(runs[0][2].param_groups[0]["lr"]) == float(runs[1][2].param_groups[0]["lr"]) != 0.05


def test_a_parametrised_weight_is_refused_by_the_step_and_right_under_autograd():
    layer = ff.FFLinear(12, 8, dtype=torch.float64)
    nn.utils.parametrizations.weight_norm(layer)
    optimizer = SGD(layer.parameters(), lr=0.1)
    before = copy.deepcopy(layer.state_dict())
    x_pos, x_neg = torch.rand(2, 6, 12, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"weight has .*is_leaf=False.*parametrize.*goodness_loss"):
        layer.step(x_pos, x_neg, optimizer)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    x, side = torch.cat([x_pos, x_neg]), torch.arange(12) < 6
    ff.goodness_loss(layer.goodness(x), side, layer.objective).backward()
    ours = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    y = reference.linear_forward(x, layer.weight, layer.bias, norm="l2", eps=1e-4, eps_mode="add", activation="relu")
    reference.loss_of(reference.goodness_of(y, "mean"), side, layer.objective, None).backward()
    assert len(ours) == 3
    for mine, p in zip(ours, layer.parameters(), strict=True):
        assert error(mine, p.grad) <= 1e-10


def test_functional_call():
    layer, x = ff.FFLinear(12, 8, dtype=torch.float64), torch.rand(6, 12, dtype=torch.float64)
    parameters = {name: torch.randn_like(p).requires_grad_() for name, p in layer.named_parameters()}
    y = torch.func.functional_call(layer, parameters, (x,))
    expected = reference.linear_forward(x, *parameters.values(), norm="l2", eps=1e-4, eps_mode="add", activation="relu")
    assert error(y, expected) <= 1e-12
    ours, theirs = (torch.autograd.grad(v.sum(), list(parameters.values())) for v in (y, expected))
    assert all(error(a, b) <= 1e-10 for a, b in zip(ours, theirs, strict=True))


class Pairs(Dataset):
    """Positive and negative rows made in a worker, where a trained layer runs too."""

    def __init__(self, layer: ff.FFLinear) -> None:
        self.layer = layer

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(index)
        x, labels = torch.rand(8, 20, generator=generator), torch.arange(8)
        x_pos = ff.overlay_label(x, labels)
        x_neg = ff.overlay_label(x, ff.wrong_label(labels, generator=generator))
        with torch.no_grad():
            layer = copy.deepcopy(self.layer)
            layer.step(x_pos, x_neg, SGD(layer.parameters(), lr=0.1))
            return x_pos, x_neg, layer(x_pos)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_of_a_data_loader(context):
    """Workers give the numbers of the program itself, also when forked from one whose kernels have run on threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        layer = ff.FFLinear(20, 16)
        large = ff.FFLinear(600, 500)
        large.step(torch.rand(256, 600), torch.rand(256, 600), SGD(large.parameters(), lr=0.1))
        here = list(DataLoader(Pairs(layer), batch_size=None))
        options = {"num_workers": 1, "multiprocessing_context": context, "timeout": 120}
        there = list(DataLoader(Pairs(layer), batch_size=None, **options))
        assert len(there) == 6
        for a, b in zip(here, there, strict=True):
            assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and error(b[2], a[2]) <= 1e-6
        large.step(torch.rand(256, 600), torch.rand(256, 600), SGD(large.parameters(), lr=0.1))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("how", ["save", "deepcopy"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_goes_on_where_it_was_saved(optimizer, how):
    net, o = network(optimizer, peer=ff.PeerNormalisation())
    batches = [torch.rand(2, 8, 20) for _ in range(6)]
    for x in batches[:3]:
        net.step(x[0], x[1], o)
    if how == "save":
        buffer = io.BytesIO()
        torch.save({"net": net.state_dict(), "optimizer": o.state_dict()}, buffer)
        buffer.seek(0)
        saved = torch.load(buffer, weights_only=True)
        other, other_o = network(optimizer, peer=ff.PeerNormalisation())
        other.load_state_dict(saved["net"])
        other_o.load_state_dict(saved["optimizer"])
    else:
        other, other_o = copy.deepcopy((net, o))
        assert other.layers[0].weight is not net.layers[0].weight
    for x in batches[3:]:
        for n, p in ((net, o), (other, other_o)):
            n.step(x[0], x[1], p)
    assert_same(other, net)


def test_other_devices_run_on_the_eager_backend():
    weight = nn.Parameter(torch.empty(8, 12, device="meta"))
    text = ff.explain(weight, SGD([weight], lr=0.1))
    assert "backend: eager (first that can run it) for torch.float32 on meta" in text
    assert "native: runs on the CPU, not on meta" in text
    x = torch.empty(6, 12, device="meta")
    result = ff.linear_step_(x, x, weight, None, SGD([weight], lr=0.1))
    assert (result.y.shape, result.y.device.type, result.loss.shape) == ((12, 8), "meta", ())
    request = select.Request(torch.device("mps"), torch.float32, torch.bfloat16, "gelu", "adam", True)
    assert select.choose(request, None) == "eager"
    verdicts = select.verdicts(request)
    assert verdicts["native"] == "runs on the CPU, not on mps"
    assert verdicts["triton"] in ("Triton is not installed", "Triton kernels run on CUDA and ROCm devices, not on mps")


def test_a_network_made_without_memory_gets_it_later():
    net, _ = network(device="meta", peer=ff.PeerNormalisation())
    assert all(value.is_meta for value in net.state_dict().values())
    other, o = network("adam", peer=ff.PeerNormalisation())
    net.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)
    x_pos, x_neg = torch.rand(2, 8, 20)
    net.step(x_pos, x_neg, Adam(net.parameters(), lr=0.05))
    other.step(x_pos, x_neg, o)
    assert_same(net, other)
