"""On a CUDA or ROCm device: the Triton backend against float64, in every dtype, up to large shapes."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

import ffkernels as ff
from ffkernels import reference

from .steps import OPTIMIZERS, Problem, error, problem, state_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device"),
]

DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
SMALL = [(1, 1, 1, 1), (7, 0, 13, 5), (33, 65, 97, 129), (100, 100, 784, 1000), (64, 64, 1000, 3)]
LARGE = [(256, 256, 2000, 2000), (8192, 8192, 784, 500), (8192, 8192, 8192, 8192)]


def on_device(p: Problem, dtype: torch.dtype | None = None) -> Problem:
    """A copy of the problem on the GPU, in another dtype if wanted."""
    made = p.copy(dtype)
    weight, bias = (None if t is None else torch.nn.Parameter(t.detach().cuda()) for t in (made.weight, made.bias))
    optimizer = type(p.optimizer)([t for t in (weight, bias) if t is not None], lr=0.1)
    optimizer.load_state_dict(made.optimizer.state_dict())
    return Problem(weight, bias, optimizer, made.x_pos.cuda(), made.x_neg.cuda())


def gradients(p: Problem, step, **options) -> dict[str, torch.Tensor]:
    optimizer = torch.optim.Adagrad([p.weight, p.bias], lr=0.0)
    result = step(p.x_pos, p.x_neg, p.weight, p.bias, optimizer, outputs="pre", **options)
    return {"y": result.y, "goodness": result.goodness, "loss": result.loss, "dW": p.weight.grad, "db": p.bias.grad}


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SMALL + LARGE, ids=str)
def test_within_twice_the_error_of_plain_torch(shape, dtype, activation):
    if shape in LARGE and activation != "relu":
        pytest.skip("large shapes with one activation")
    made = problem(*shape, dtype=torch.float32)
    made.weight.data /= shape[2] ** 0.5
    compute = DTYPES[dtype]
    options = {"objective": ff.Objective(threshold=0.5), "activation": activation}
    exact = gradients(on_device(made, torch.float64), reference.linear_step_, **options)
    with torch.autocast("cuda", dtype=compute, enabled=compute is not None):
        torchs = gradients(on_device(made), reference.linear_step_, **options)
    ours = gradients(on_device(made), ff.linear_step_, compute_dtype=compute, backend="triton", **options)
    ulp = torch.finfo(compute or torch.float32).eps
    for name, value in exact.items():
        budget = 2 * error(torchs[name].cpu(), value.cpu()) + ulp
        assert error(ours[name].cpu(), value.cpu()) <= budget, name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("loss", ["logistic", "symba", "swish"])
def test_optimizers_and_losses(optimizer, loss):
    made = problem(60, 60, 50, 70, optimizer=optimizer, dtype=torch.float32)
    objective = ff.Objective(loss=loss)
    ours, exact = on_device(made), on_device(made, torch.float64)
    for _ in range(3):
        for p, step, options in ((ours, ff.linear_step_, {"backend": "triton"}), (exact, reference.linear_step_, {})):
            step(p.x_pos, p.x_neg, p.weight, p.bias, p.optimizer, objective=objective, **options)
    expected = state_of(exact)
    for name, value in state_of(ours).items():
        assert error(value.cpu(), expected[name].cpu(), 0.1) <= 1e-3, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(100, 100, 784, 1000), (4096, 4096, 300, 200)], ids=str)
def test_repeats_bit_by_bit(shape, dtype):
    made = on_device(problem(*shape, optimizer="adam", dtype=torch.float32))
    runs = []
    for _ in range(3):
        p = on_device(made)
        result = ff.linear_step_(
            p.x_pos, p.x_neg, p.weight, p.bias, p.optimizer, compute_dtype=DTYPES[dtype], backend="triton"
        )
        runs.append([result.y, result.sumsq, result.loss, *state_of(p).values()])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("goodness", ["mean", "sum", "activity"])
@pytest.mark.parametrize("loss", ["cross_entropy", "pvn", "cwc"])
def test_class_groups(loss, goodness):
    made = problem(60, 0, 50, 73, optimizer="adam", dtype=torch.float32)
    objective = ff.Objective(loss=loss, classes=10, goodness=goodness)
    labels = torch.arange(60, device="cuda") % 10
    ours, exact = on_device(made), on_device(made, torch.float64)
    for _ in range(3):
        for p, step, options in ((ours, ff.linear_step_, {"backend": "triton"}), (exact, reference.linear_step_, {})):
            step(p.x_pos, None, p.weight, p.bias, p.optimizer, objective=objective, labels=labels, **options)
    expected = state_of(exact)
    for name, value in state_of(ours).items():
        assert error(value.cpu(), expected[name].cpu(), 0.1) <= 1e-3, name


def test_a_label_out_of_range_makes_the_loss_nan_and_touches_nothing_else():
    made = problem(60, 0, 50, 73, dtype=torch.float32)
    labels = torch.arange(60, device="cuda") % 10
    labels[7] = 1 << 40
    p = on_device(made)
    objective = ff.Objective(loss="cross_entropy", classes=10)
    result = ff.linear_step_(
        p.x_pos, None, p.weight, p.bias, p.optimizer, objective=objective, labels=labels, backend="triton"
    )
    assert bool(result.loss.isnan())
    assert bool(p.weight.isfinite().all())


@pytest.mark.parametrize("options", [{}, {"batch_norm": "behind"}], ids=str)
@pytest.mark.parametrize("form", ["projection", "prototypes"])
def test_heads_learn_as_on_the_cpu(form, options):
    found = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        layer = ff.FFLinear(50, 73, objective=ff.ProjectionHead(10, form=form), outputs="pre", **options).to(device)
        x, labels = torch.randn(60, 50).to(device), (torch.arange(60) % 10).to(device)
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.01, eps=1e-3)
        for _ in range(3):
            layer.step(x, None, optimizer, labels=labels)
        found.append([p.detach().cpu() for p in layer.parameters()])
    for cpu, cuda in zip(*found, strict=True):
        torch.testing.assert_close(cuda, cpu, rtol=1e-3, atol=1e-4)


def test_saturated_rows_change_nothing():
    made = problem(300, 300, 64, 96, dtype=torch.float32)
    threshold = torch.cat([torch.full((300,), -1e6), torch.full((300,), 60.0)])
    objective = ff.Objective(goodness="sum", threshold=threshold.cuda())
    wide = replace(objective, threshold=threshold.double().cuda())
    ours, exact = on_device(made), on_device(made, torch.float64)
    ff.linear_step_(
        ours.x_pos, ours.x_neg, ours.weight, ours.bias, ours.optimizer, objective=objective, backend="triton"
    )
    reference.linear_step_(exact.x_pos, exact.x_neg, exact.weight, exact.bias, exact.optimizer, objective=wide)
    assert error(ours.weight.cpu(), exact.weight.cpu()) <= 1e-3


def test_a_graph_gives_the_same_numbers():
    def made():
        torch.manual_seed(0)
        net = ff.FFNetwork([ff.FFLinear(40, 50), ff.FFLinear(50, 30)]).cuda()
        return net, torch.optim.Adam(net.parameters(), lr=torch.tensor(0.01, device="cuda"), capturable=True)

    (plain, plain_optimizer), (graphed, graphed_optimizer) = made(), made()
    batches = [(torch.randn(20, 40, device="cuda"), torch.randn(20, 40, device="cuda")) for _ in range(6)]
    step = ff.GraphedStep(graphed, graphed_optimizer, *batches[0])
    for i, batch in enumerate(batches):
        for optimizer in (plain_optimizer, graphed_optimizer):
            optimizer.param_groups[0]["lr"].fill_(0.01 / (i + 1))
        plain.step(*batch, plain_optimizer)
        step(*batch)
    for a, b in zip(plain.parameters(), graphed.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("shape", [(33, 33, 97, 129), (4096, 4096, 1024, 1024)], ids=str)
def test_peer_normalisation(shape, mixed, gated):
    made = problem(*shape, dtype=torch.float32)
    made.weight.data /= shape[2] ** 0.5
    ours, exact = on_device(made), on_device(made, torch.float64)
    order = torch.randperm(shape[0] + shape[1], device="cuda")
    options = {"objective": ff.Objective("sum", threshold=50.0), "peer": ff.PeerNormalisation("hinton", gated=gated)}
    means = [torch.full((shape[3],), 0.5, dtype=p.weight.dtype, device="cuda") for p in (ours, exact)]
    for _ in range(2):
        for p, mean, step in zip((ours, exact), means, (ff.linear_step_, reference.linear_step_), strict=True):
            x, side = (p.x_pos, p.x_neg), {}
            if mixed:
                x = torch.cat(x)[order], None
                side = {"is_positive": order < shape[0]}
            backend = {"backend": "triton"} if p is ours else {}
            step(*x, p.weight, p.bias, p.optimizer, peer_mean=mean, **options, **side, **backend)
    assert error(means[0].cpu(), means[1].cpu()) <= 1e-5
    for name, value in state_of(ours).items():
        assert error(value.cpu(), state_of(exact)[name].cpu(), 0.1) <= 1e-3, name


# In narrower products rounding decides which rows lie below the slope.
@pytest.mark.parametrize(("dtype", "skip_below"), [("float32", 0.4), *((dtype, 0.0) for dtype in DTYPES)])
def test_shared_products_and_rows_left_out(skip_below, dtype):
    field = 10
    made = problem(600, 600, 1024, 1200, optimizer="sgd-momentum", dtype=torch.float32)
    made.weight.data /= 32
    made.x_neg[:, field:] = made.x_pos[:, field:]
    objective = ff.Objective("sum", threshold=600.0, temperature=100.0)
    states = []
    for backend in ("triton", "eager"):
        p = on_device(made)
        product = ff.shared_product(p.x_pos, p.weight, field, compute_dtype=DTYPES[dtype])
        result = ff.linear_step_(
            p.x_pos, p.x_neg, p.weight, p.bias, p.optimizer, objective=objective, norm="rms", skip_below=skip_below,
            compute_dtype=DTYPES[dtype], label_field=field, product=product, backend=backend,
        )  # fmt: skip
        states.append({"y": result.y, "loss": result.loss, **state_of(p)})
    rounding = torch.finfo(DTYPES[dtype] or torch.float32).eps
    for name, value in states[0].items():
        assert error(value.cpu(), states[1][name].cpu(), 0.1) <= max(1e-3, 8 * rounding), name


# Layers with their rows, and the side of their maps.
CONVOLUTIONS = {
    "first": ((1, 32, 3), {"padding": 1, "pool": 2}, 32, 28),
    "groups": ((20, 80, 3), {"padding": 1, "groups": 10, "batch_norm": "behind"}, 32, 16),
    "steps": ((16, 24, 5), {"padding": 2, "stride": 2, "norm": "l2", "activation": "silu"}, 33, 31),
    "windows that overlap": ((8, 40, 3), {"pool": torch.nn.MaxPool2d(3, 2), "batch_norm": "before"}, 16, 21),
    "nine places": ((8, 40, 1), {"pool": torch.nn.MaxPool2d(3), "activation": "leaky_relu", "bias": False}, 16, 20),
    "large": ((128, 256, 3), {"padding": 1, "pool": torch.nn.AvgPool2d(2), "activation": "gelu"}, 128, 16),
    "small maps": ((64, 100, 3), {"padding": 1, "pool": 2, "activation": "identity"}, 50, 4),
}


def gradients_of_maps(layer: ff.FFConv2d, x: torch.Tensor, labels: torch.Tensor, **options) -> dict[str, torch.Tensor]:
    """What a step without an optimizer leaves on a copy of the layer in another dtype, if `x` has one."""
    master = torch.float64 if x.dtype == torch.float64 else torch.float32
    layer = deepcopy(layer).to("cuda", master)
    result = layer.step(x, None, None, labels=labels, **options)
    found = {name: p.grad for name, p in layer.named_parameters()}
    found |= {"y": result.y, "goodness": result.goodness, "loss": result.loss}
    return {name: value.cpu() for name, value in found.items()}


@pytest.fixture
def no_tf32():
    """PyTorch's convolutions, and ours with them, have it unless told otherwise."""
    of = torch.backends.cudnn.conv
    before = of.fp32_precision
    of.fp32_precision = "ieee"
    yield
    of.fp32_precision = before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_within_twice_the_error_of_plain_torch(name, dtype, no_tf32):
    sizes, options, rows, side = CONVOLUTIONS[name]
    compute = DTYPES[dtype]
    objective = ff.Objective(loss="cross_entropy", classes=4)
    layer = ff.FFConv2d(*sizes, objective=objective, **options)
    x, labels = torch.randn(rows, sizes[0], side, side, device="cuda"), torch.arange(rows, device="cuda") % 4
    x = x.to(compute or torch.float32).float()
    exact = gradients_of_maps(layer, x.double(), labels)
    torchs = gradients_of_maps(layer, x, labels, compute_dtype=compute, backend="eager")
    ours = gradients_of_maps(layer, x, labels, compute_dtype=compute, backend="triton")
    ulp = torch.finfo(compute or torch.float32).eps
    for of, value in exact.items():
        budget = 2 * error(torchs[of], value, 1e-2) + ulp
        assert error(ours[of], value, 1e-2) <= budget, of


@pytest.mark.parametrize("name", ["first", "windows that overlap", "nine places", "small maps"])
def test_ties_in_a_pool_are_pytorchs(name):
    """Of small whole numbers every sum is exact: the same winners, and so the same activities and gradients."""
    sizes, options, rows, side = CONVOLUTIONS[name]
    options = {**options, "batch_norm": None, "bias": False}
    layer = ff.FFConv2d(*sizes, objective=ff.Objective(loss="cross_entropy", classes=4), **options)
    with torch.no_grad():
        layer.weight.copy_(torch.randint(-1, 2, layer.weight.shape))
    x = torch.randint(-2, 3, (rows, sizes[0], side, side), device="cuda").float()
    labels = torch.arange(rows, device="cuda") % 4
    found = [gradients_of_maps(layer, x, labels, backend=backend) for backend in ("triton", "eager")]
    assert torch.equal(found[0]["y"], found[1]["y"])
    assert error(found[0]["weight"], found[1]["weight"]) <= 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["first", "groups", "windows that overlap", "large"])
def test_convolutions_repeat_bit_by_bit(name, dtype):
    """The kernels' own numbers: a batch normalisation in front has some of cuDNN's."""
    sizes, options, rows, side = CONVOLUTIONS[name]
    options = {**options, "batch_norm": "behind" if name == "groups" else None}
    layer = ff.FFConv2d(*sizes, objective=ff.Objective(loss="cross_entropy", classes=4), **options)
    x, labels = torch.randn(rows, sizes[0], side, side, device="cuda"), torch.arange(rows, device="cuda") % 4
    runs = [gradients_of_maps(layer, x, labels, compute_dtype=DTYPES[dtype], backend="triton") for _ in range(3)]
    for other in runs[1:]:
        for of, value in runs[0].items():
            assert torch.equal(other[of], value), of


@pytest.mark.parametrize("way", [{}, {"TMA": 1}, {"TMA": 1, "PERSISTENT": 1}, {"PERSISTENT": 2}], ids=str)
def test_ways_give_the_same_bits(way, monkeypatch):
    """Bulk copies and persistent programs change who multiplies, and no sum's order."""
    from ffkernels.backends.triton import configs

    made = problem(500, 524, 512, 768, optimizer="adam", dtype=torch.float32)
    made.weight.data /= 23
    forward = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP": 8, "num_warps": 8, "num_stages": 3}
    update = {"BLOCK_OUT": 128, "BLOCK_IN": 128, "BLOCK_K": 64, "GROUP": 8, "PARTS": 2, "num_warps": 8, "num_stages": 3}
    runs = []
    for chosen in ({}, way):
        monkeypatch.setitem(configs.FORCED, "forward", {**forward, **chosen})
        monkeypatch.setitem(configs.FORCED, "update", {**update, "TMA": chosen.get("TMA", 0)})
        p = on_device(made)
        x = torch.cat([p.x_pos, p.x_neg]).bfloat16()
        result = ff.linear_step_(
            x[:500], x[500:], p.weight, p.bias, p.optimizer, compute_dtype=torch.bfloat16, backend="triton"
        )
        runs.append([result.y, result.sumsq, result.loss, *state_of(p).values()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_more_than_two_to_the_31_elements():
    """Offsets are 64 bits wide: the last rows of a batch too large for 32 give what they give alone."""
    rows, width = 2_800_000, 784
    if torch.cuda.mem_get_info()[0] < 3 * 2 * rows * width:
        pytest.skip("needs 13 GB of free memory")
    x = torch.zeros(rows, width, dtype=torch.bfloat16, device="cuda")
    x[-200:] = torch.randn(200, width, device="cuda")
    made = problem(1, 1, width, 33, optimizer="sgd", dtype=torch.float32)
    states, outputs = [], []
    for batch in (x, x[-200:]):
        p = on_device(made)
        with torch.no_grad():
            y, sumsq = ff.linear_forward(batch, p.weight, p.bias, compute_dtype=torch.bfloat16, backend="triton")
        outputs.append([y[-200:].clone(), sumsq[-200:].clone()])
        # The last rows alone have a weight.
        weights = torch.zeros(len(batch), device="cuda")
        weights[-200:] = len(batch)
        ff.linear_step_(
            batch[:0], batch, p.weight, p.bias, p.optimizer, sample_weight=weights, outputs="none",
            compute_dtype=torch.bfloat16, backend="triton",
        )  # fmt: skip
        states.append(state_of(p))
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
    for name, value in states[0].items():
        assert error(value.cpu(), states[1][name].cpu()) <= 1e-2, name
