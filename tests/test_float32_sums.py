"""Low precision rounds the operands of products and nothing else: sums, goodness, loss and gradients are float32's.

Integers make that exact: operands that bfloat16 and float16 hold, sums that float32 holds and they do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ffkernels as ff
from ffkernels.backends.eager import step as eager_step
from ffkernels.backends.eager.products import binary_exponent
from ffkernels.backends.native import library
from ffkernels.normalisation import row_scale, row_sumsq

LOW = (torch.bfloat16, torch.float16)
WAYS = [("eager", torch.bfloat16), ("eager", torch.float16)]
if library.load().library is not None:
    WAYS += [("native", dtype) for dtype in LOW]
ways = pytest.mark.parametrize(("backend", "dtype"), WAYS, ids=[f"{b}-{d}".replace("torch.", "") for b, d in WAYS])
EPS = torch.finfo(torch.float32).eps


class NoLowProducts(TorchDispatchMode):
    """Fails where PyTorch multiplies matrices of low precision on a CPU: it gives the sums in that precision."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.mv):
            assert not [a.dtype for a in args if isinstance(a, Tensor) and a.dtype in LOW], func
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def a_cpu_with_a_unit(monkeypatch) -> Iterator[None]:
    """As on a CPU for which PyTorch has bfloat16 products, whatever this one is."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    with NoLowProducts():
        yield


@contextmanager
def asked_for(how: str, dtype: torch.dtype) -> Iterator[dict]:
    """Options of a call in low precision: by argument, or none under autocast."""
    if how == "argument":
        yield {"compute_dtype": dtype}
    else:
        with torch.autocast("cpu", dtype=dtype):
            yield {}


def integers(*shape: int, largest: int) -> Tensor:
    return torch.randint(-largest, largest + 1, shape).float()


ROWS, OUT = 16, 8  # of each side, units: powers of two, so that means are exact
FAR = 2.0**18  # logits so large that every slope is exactly one


def integer_step(backend: str, dtype: torch.dtype, how: str, case: str, largest: int) -> None:
    """One step on integers, gradients and running mean to the last bit."""
    width = 33
    weight = torch.nn.Parameter(integers(OUT, width, largest=largest))
    bias = torch.nn.Parameter(integers(OUT, largest=5))
    x_pos, x_neg = (integers(ROWS, width, largest=3) for _ in range(2))
    if case != "rows":
        x_neg = x_pos.clone()
        x_neg[:, :4] = integers(ROWS, 4, largest=3)
    mean = integers(OUT, largest=8)
    peer = ff.PeerNormalisation("hinton", strength=0.5, momentum=0.5)

    x, w = torch.cat([x_pos, x_neg]).double(), weight.detach().double()
    y = (x @ w.T + bias.detach().double()).relu()
    sumsq = y.square().sum(1)
    sign = torch.tensor([-1.0, 1.0]).repeat_interleave(ROWS).double()
    logit = sign * sumsq + FAR
    dz = sign[:, None] * y * 2 / (2 * ROWS)
    expected_mean = (mean.double() + y[:ROWS].mean(0)) / 2
    pull = (expected_mean - expected_mean.mean()) * 0.5 / ROWS
    grad_weight = dz.to(dtype).double().T @ x + pull[:, None] * x[:ROWS].sum(0)
    grad_bias = dz.sum(0) + pull * ROWS
    # What the test rests on: sums that low precision cannot hold, and that float32 can.
    for value in (sumsq, grad_weight, grad_bias, logit.mean()):
        assert torch.equal(value, value.float().double())
    for value in (sumsq, grad_weight):
        assert not torch.equal(value, value.to(torch.bfloat16).double())

    with asked_for(how, dtype) as options:
        product = None
        if case == "product":
            product = ff.shared_product(x_pos, weight, 4, **options)
            assert torch.equal(product.double(), x_pos[:, 4:].double() @ w[:, 4:].T)
        result = ff.linear_step_(
            x_pos, x_neg, weight, bias, None, objective=ff.Objective("sum", threshold=(FAR, -FAR)), norm="none",
            outputs="pre", peer=peer, peer_mean=mean, backend=backend, label_field=None if case == "rows" else 4,
            product=product, **options,
        )  # fmt: skip
    assert result.y is not None and weight.grad is not None and bias.grad is not None
    assert torch.equal(result.y, y.to(dtype))
    for name, ours, expected in (
        ("sumsq", result.sumsq, sumsq),
        ("goodness", result.goodness, sumsq),
        ("loss", result.loss, logit.mean()),
        ("mean", mean, expected_mean),
        ("db", bias.grad, grad_bias),
        ("dW", weight.grad, grad_weight),
    ):
        assert ours.dtype == torch.float32
        # A sum of squares may come as the square of its root, which is rounded twice.
        rounded = 4 * EPS if name in ("sumsq", "goodness", "loss") else 0
        assert ((ours.double() - expected).abs() <= rounded * expected.abs()).all(), name


@ways
@pytest.mark.parametrize("how", ["argument", "autocast"])
@pytest.mark.parametrize(
    ("case", "largest"), [("rows", 3), ("rows", 20), ("copies", 3), ("product", 3)], ids=lambda value: str(value)
)
def test_a_step_on_integers_is_exact(backend, dtype, how, case, largest):
    if case == "product" and backend == "native":
        pytest.skip("takes no product")
    integer_step(backend, dtype, how, case, largest)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_sums_over_blocks_of_rows_are_exact(dtype, monkeypatch):
    monkeypatch.setattr(eager_step, "SINGLE_BLOCK_ELEMENTS", 64)
    monkeypatch.setattr(eager_step, "BLOCK_ELEMENTS", 48)
    monkeypatch.setattr(eager_step, "MIN_BLOCK_ROWS", 3)
    for case in ("rows", "copies", "product"):
        integer_step("eager", dtype, "argument", case, 3)


@ways
@pytest.mark.parametrize("how", ["argument", "autocast"])
def test_a_forward_pass_and_its_gradient_on_integers_are_exact(backend, dtype, how):
    """Kept for the backward is `y` as it was handed out; what is made of it is summed in float32."""
    weight, bias = integers(OUT, 33, largest=20).requires_grad_(), integers(OUT, largest=5).requires_grad_()
    x, slope = integers(2 * ROWS, 33, largest=3), 2.0 ** torch.randint(-3, 2, (2 * ROWS,))
    with asked_for(how, dtype) as options:
        y, sumsq = ff.linear_forward(x, weight, bias, norm="none", backend=backend, **options)
        (slope * sumsq).sum().backward()
    exact = (x.double() @ weight.detach().double().T + bias.detach().double()).relu()
    dz = 2 * slope.double()[:, None] * exact.to(dtype).double()
    assert torch.equal(y, exact.to(dtype))
    assert weight.grad is not None and bias.grad is not None
    torch.testing.assert_close(sumsq.detach().double(), exact.square().sum(1), rtol=4 * EPS, atol=0)
    assert torch.equal(bias.grad.double(), dz.sum(0))
    assert torch.equal(weight.grad.double(), dz.T @ x.double())


def near(ours: Tensor, torchs: Tensor, exact: Tensor, slack: Tensor | float = 0.0) -> bool:
    """Every element within twice the largest error of float32's own sums, and some roundings of the largest."""
    budget = 2 * (torchs.double() - exact).abs().max() + 4 * EPS * exact.abs().max()
    return bool(((ours.double() - exact).abs() <= budget + slack).all())


ACTIVATIONS = {
    "relu": torch.relu,
    "leaky_relu": torch.nn.LeakyReLU(0.01),
    "identity": lambda z: z,
    "gelu": torch.nn.functional.gelu,
    "silu": torch.nn.functional.silu,
}


def digits(values: Tensor) -> Tensor:
    """To the digits of float16, at any exponent."""
    mantissa, exponent = torch.frexp(values)
    return torch.ldexp(mantissa.half().to(values.dtype), exponent)


def formulas(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: str,
    norm: str,
    dtype: torch.dtype,
    master: torch.dtype,
    backend: str,
) -> dict[str, Tensor]:
    """A step on rounded operands, all else in `master`; "slack": what roundings that tip over move in `dW`."""
    operands = x
    has_range = dtype == torch.float16 and backend == "eager"
    scale = torch.ones(len(x), dtype=master)
    if norm == "l2":
        scale = 1 / (x.to(master).square().sum(1).sqrt() + 1e-4)
        if has_range:  # has no room for rows of any length, and takes them normalised
            operands = x * row_scale(row_sumsq(x, torch.float32), x.shape[1], "l2", 1e-4, "add")[:, None]
            scale = torch.ones_like(scale)

    def narrow(values: Tensor) -> Tensor:
        return digits(values) if dtype == torch.float16 and not has_range else values.to(dtype).to(values.dtype)

    operands, rounded = (narrow(v).to(master) for v in (operands, weight))
    z = ((operands @ rounded.T) * scale[:, None] + bias.to(master)).requires_grad_()
    y = ACTIVATIONS[activation](z)
    (slope,) = torch.autograd.grad(y.sum(), z, retain_graph=True)
    y, z = y.detach(), z.detach()
    sumsq = y.square().sum(1)
    sign = torch.ones(len(x), dtype=master)
    sign[: len(x) // 2] = -1
    logit = sign * (sumsq / y.shape[1] - 0.7)
    dz = (2 / (len(x) * y.shape[1]) * sign * torch.sigmoid(logit))[:, None] * y * slope
    scaled = dz * scale[:, None]
    exponent = 2.0 ** float(binary_exponent(scaled)) if has_range else 1.0
    low, at, high = (narrow(scaled * k / exponent) * exponent for k in (1 - 1e-5, 1, 1 + 1e-5))
    return {
        "y": y, "sumsq": sumsq, "loss": torch.nn.functional.softplus(logit).mean(), "db": dz.sum(0),
        "dW": at.T @ operands, "slack": (high - low).abs().T @ operands.abs(),
    }  # fmt: skip


@ways
@pytest.mark.parametrize("norm", ["none", "l2"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(60, 129, 47), (300, 65, 96)], ids=str)
def test_every_element_is_as_near_as_float32_sums_are(backend, dtype, norm, activation, shape):
    rows, inputs, outputs = shape
    x = torch.randn(2 * rows, inputs) / (1 if norm == "l2" else inputs**0.5)
    weight, bias = torch.randn(outputs, inputs), torch.randn(outputs) / 4
    exact, torchs = (
        formulas(x, weight, bias, activation, norm, dtype, master, backend) for master in (torch.float64, torch.float32)
    )
    p, b = torch.nn.Parameter(weight.clone()), torch.nn.Parameter(bias.clone())
    result = ff.linear_step_(
        x[:rows], x[rows:], p, b, None, objective=ff.Objective(threshold=0.7), norm=norm, activation=activation,
        outputs="pre", compute_dtype=dtype, backend=backend,
    )  # fmt: skip
    assert result.y is not None and p.grad is not None and b.grad is not None
    assert torch.allclose(result.y.double(), exact["y"], rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert near(result.sumsq, torchs["sumsq"], exact["sumsq"])
    assert near(result.loss, torchs["loss"], exact["loss"])
    assert near(b.grad, torchs["db"], exact["db"])
    assert near(p.grad, torchs["dW"], exact["dW"], exact["slack"])


def amid_nans(values: Tensor, offset: int) -> Tensor:
    """`values` as a view of some columns of a wider tensor that holds NaN everywhere else."""
    wide = torch.full((len(values) + 2, values.shape[1] + offset + 5), float("nan"), dtype=values.dtype)
    view = wide[1:-1, offset : offset + values.shape[1]]
    view.copy_(values)
    return view


@pytest.mark.parametrize("backend", ["eager", *(["native"] if library.load().library is not None else [])])
@pytest.mark.parametrize("compute", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("stored", ["float32", "compute dtype"])
@pytest.mark.parametrize("width", [1, 7, 33, 129])
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_rows_amid_nans_are_read_to_their_ends_and_no_further(backend, compute, stored, width, offset):
    x_pos, x_neg = (torch.randn(19, width).to(compute if stored != "float32" else torch.float32) for _ in range(2))
    weight = torch.randn(11, width)
    options = {"compute_dtype": compute, "backend": backend}
    found = []
    for view in (lambda values: values, lambda values: amid_nans(values, offset)):
        p = torch.nn.Parameter(view(weight.clone()))
        result = ff.linear_step_(view(x_pos), view(x_neg), p, None, None, outputs="pre", **options)
        q = view(weight.clone()).requires_grad_()
        y, sumsq = ff.linear_forward(view(x_pos), q, **options)
        sumsq.sum().backward()
        product = ff.shared_product(view(x_pos), view(weight), max(1, width // 3), compute_dtype=compute)
        found.append([result.y, result.sumsq, result.loss, p.grad, y, sumsq, q.grad, product])
    for packed, viewed in zip(*found, strict=True):
        assert packed is not None and viewed is not None
        if compute == torch.float32:  # may be summed in another order
            torch.testing.assert_close(viewed, packed, rtol=1e-5, atol=1e-5)
        assert packed.isfinite().all() and (torch.equal(packed, viewed) or compute == torch.float32)


def test_with_amx_bfloat16_runs_compiled_by_default():
    if library.load().library is None:
        pytest.skip("the compiled library was not built")
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    adam = torch.optim.Adam([weight])
    assert ff.explain(weight, adam, compute_dtype=torch.bfloat16).startswith("backend: native (first that can run it)")
