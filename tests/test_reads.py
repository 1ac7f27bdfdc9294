"""What a call only reads is never written, whatever its layout, and what is made for a call lives until it returns."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from torch import nn

import ffkernels as ff
from ffkernels.backends import select

from .steps import OPTIMIZERS, assert_same_state, error, problem

BACKENDS = ["eager", "native"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "native" and select.load("native").library.load().library is None:
        pytest.skip("the compiled library was not built")
    return request.param


def definition(x, weight, bias):
    x, weight, bias = x.double(), weight.double(), bias.double()
    return torch.relu(x / (x.norm(dim=1, keepdim=True) + 1e-4) @ weight.t() + bias)


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_a_kernel_in_a_read_only_file(backend, tmp_path):
    """Keras keeps `[in, out]`; a write to a read-only map kills the process."""
    made = np.random.default_rng(0).standard_normal((20, 6)).astype("float32")
    np.save(tmp_path / "kernel.npy", made)
    np.save(tmp_path / "bias.npy", made[:6].copy())
    kernel, strided = (np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("kernel", "bias"))
    assert not kernel.flags.writeable
    weight, bias = torch.from_numpy(kernel).t(), torch.from_numpy(strided)[:, 3]
    x = torch.rand(8, 20)
    y, sumsq = ff.linear_forward(x, weight, bias, backend=backend)
    expected = definition(x, torch.from_numpy(made).t(), torch.from_numpy(made)[:6, 3])
    assert error(y, expected) < 1e-6 and error(sumsq, expected.square().sum(1)) < 1e-6


READ = {
    "transposed": lambda w, b: (w.t().contiguous().t(), b),
    "expanded weight": lambda w, b: (w[:1].expand_as(w), b),
    "expanded bias": lambda w, b: (w, b[:1].expand_as(b)),
    "strided bias": lambda w, b: (w, torch.stack([b, b + 1], 1)[:, 0]),
    "columns of a wider one": lambda w, b: (torch.cat([w, w], 1)[:, : w.shape[1]], b),
    "negated view": lambda w, b: (torch.complex(b.new_zeros(w.shape), -w).conj().imag, b),
}


@pytest.mark.parametrize("layout", READ)
@pytest.mark.parametrize("inference", [False, True])
def test_a_forward_pass_writes_nothing(layout, inference, backend):
    w, b, x = torch.randn(6, 20), torch.randn(6), torch.rand(8, 20)
    with torch.inference_mode(inference):
        weight, bias = READ[layout](w, b)
        versions = [] if inference else [weight._version, bias._version]
        y, _ = ff.linear_forward(x, weight, bias, backend=backend)
        assert error(y, definition(x, weight, bias)) < 1e-6
        assert versions == ([] if inference else [weight._version, bias._version])


@pytest.mark.parametrize("optimizer", ["rmsprop", None])
def test_a_step_through_grad_writes_gradients_alone(optimizer, backend):
    """Before the optimizer's own step, the weight is read; so are rows, sums and row weights of any layout."""
    p = problem(optimizer="rmsprop", dtype=torch.float32)
    weight = nn.Parameter(p.weight.detach().t().contiguous().t())
    read = {
        "sample_weight": torch.rand(24)[::2],
        "input_sumsq": torch.cat([p.x_pos, p.x_neg]).square().sum(1).repeat_interleave(2)[::2],
    }
    threshold = torch.rand(24)[::2]
    everything = [weight, p.bias, p.x_pos, p.x_neg, threshold, *read.values()]
    versions = [t._version for t in everything]
    options = {"objective": ff.Objective(threshold=threshold), "outputs": "pre", "backend": backend, **read}
    ff.linear_step_(p.x_pos, p.x_neg, weight, p.bias, None, **options)
    assert [t._version for t in everything] == versions
    exact = p.copy(torch.float64)
    options = {**options, "objective": ff.Objective(threshold=threshold.double()), "backend": "eager"}
    options |= {name: value.double() for name, value in read.items()}
    ff.linear_step_(exact.x_pos, exact.x_neg, exact.weight, exact.bias, None, **options)
    assert error(weight.grad, exact.weight.grad) < 1e-5 and error(p.bias.grad, exact.bias.grad) < 1e-5


def test_a_weight_computed_from_another_keeps_its_graph(backend):
    V, x = torch.randn(20, 6, requires_grad=True), torch.rand(8, 20)
    V.data.mul_(0.3)
    found = []
    for forward in (
        lambda w: ff.linear_forward(x, w, torch.zeros(6), backend=backend)[0],
        lambda w: definition(x, w, torch.zeros(6)),
    ):
        loss = forward(torch.exp(V).t()).square().sum()
        found.append(torch.autograd.grad(loss, V)[0])
    assert error(*found) < 1e-5


def test_another_threads_writes_stay(backend):
    """A forward pass on a transposed weight, while another thread counts in it, loses none of its additions."""
    weight = torch.zeros(300, 400).t()
    rows, done = torch.rand(64, 300), threading.Event()

    def forward():
        while not done.is_set():
            ff.linear_forward(rows, weight, backend=backend)

    thread = threading.Thread(target=forward)
    thread.start()
    for _ in range(300):
        weight.add_(1)
    done.set()
    thread.join()
    assert (weight == 300).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("per_row", [False, True])
def test_a_threshold_of_another_dtype(dtype, per_row, backend):
    """Its copy in the weight's dtype must live until the compiled call has read it."""
    rows = 4096
    p = problem(rows, rows, 5, 7, optimizer="sgd", dtype=torch.float32)
    value = torch.linspace(0.5, 3, 2 * rows).to(dtype) if per_row else torch.tensor(2.0, dtype=dtype)
    ours, exact = p.copy(), p.copy(torch.float64)
    a = ff.linear_step_(
        ours.x_pos, ours.x_neg, ours.weight, ours.bias, ours.optimizer,
        objective=ff.Objective(threshold=value), backend=backend,
    )  # fmt: skip
    b = ff.linear_step_(
        exact.x_pos, exact.x_neg, exact.weight, exact.bias, exact.optimizer,
        objective=ff.Objective(threshold=value.double()), backend="eager",
    )  # fmt: skip
    assert error(a.loss, b.loss) < 1e-6
    assert_same_state(ours.copy(torch.float64), exact, 1e-6)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "adam-decay", "sgdw"])
@pytest.mark.parametrize("strided", [False, True])
def test_a_float32_learning_rate_of_a_float64_layer(optimizer, strided):
    """`torch.optim` takes the tensor's number; in float32 the rest of the formula would lose 1e-8."""
    p = problem(optimizer=optimizer)
    weight = nn.Parameter(p.weight.detach().t().contiguous().t() if strided else p.weight.detach().clone())
    bias = nn.Parameter(p.bias.detach().clone())
    ours, theirs = p._replace(weight=weight, bias=bias, optimizer=OPTIMIZERS[optimizer]([weight, bias])), p
    rate = torch.tensor(0.01)
    ours.optimizer.param_groups[0]["lr"] = rate
    theirs.optimizer.param_groups[0]["lr"] = float(rate)
    for q in (ours, theirs):
        for _ in range(3):
            ff.linear_step_(q.x_pos, q.x_neg, q.weight, q.bias, q.optimizer)
    assert_same_state(ours, theirs, 1e-14)


@pytest.mark.parametrize("optimizer", ["sgd-momentum", "adam"])
def test_weight_bias_and_rows_as_columns_of_one_matrix(optimizer, backend):
    """Their memory is interleaved but nowhere the same, so each is as right as on its own."""
    p = problem(n_pos=7, n_neg=7, optimizer=optimizer, dtype=torch.float32)
    matrix = torch.cat([p.weight.detach(), p.bias.detach()[:, None], p.x_pos, p.x_neg], 1)
    weight, bias = nn.Parameter(matrix[:, :5]), nn.Parameter(matrix[:, 5])
    ours = p._replace(weight=weight, bias=bias, optimizer=OPTIMIZERS[optimizer]([weight, bias]))
    ours = ours._replace(x_pos=matrix[:, 6:11], x_neg=matrix[:, 11:])
    for q in (ours, p):
        for _ in range(2):
            ff.linear_step_(q.x_pos, q.x_neg, q.weight, q.bias, q.optimizer, backend=backend)
    assert_same_state(ours, p, 1e-6)
    assert torch.equal(matrix[:, 6:11], p.x_pos)


def test_a_step_on_meta_tensors_alone():
    """All on meta is a step without numbers: shapes and dtypes come out, nothing on the host is touched."""
    p = problem(optimizer="adam", dtype=torch.float32)
    weight, bias = (nn.Parameter(t.detach().to("meta")) for t in (p.weight, p.bias))
    objective = ff.Objective(threshold=torch.ones(12, device="meta"))
    optimizer = OPTIMIZERS["adam"]([weight, bias])
    result = ff.linear_step_(p.x_pos.to("meta"), p.x_neg.to("meta"), weight, bias, optimizer, objective=objective)
    assert result.y.is_meta and result.y.shape == (12, 7) and result.goodness.shape == (12,)
    assert optimizer.state[weight]["exp_avg"].is_meta


def test_state_of_a_step_in_inference_mode_can_be_written_outside(backend):
    runs = []
    for inference in (True, False):
        torch.manual_seed(0)
        p = problem(optimizer="adam", dtype=torch.float32)
        with torch.inference_mode(inference):
            ff.linear_step_(p.x_pos, p.x_neg, p.weight, p.bias, p.optimizer, backend=backend)
        ff.linear_step_(p.x_pos, p.x_neg, p.weight, p.bias, p.optimizer, backend=backend)
        runs.append(p)
    assert_same_state(*runs, 0)


def test_sharded_parameters_are_named():
    from torch import distributed
    from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

    p = problem(dtype=torch.float32)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        weight = nn.Parameter(distribute_tensor(p.weight.detach(), init_device_mesh("cpu", (1,)), [Replicate()]))
        for call in (
            lambda: ff.linear_step_(p.x_pos, p.x_neg, weight, p.bias, None),
            lambda: ff.linear_forward(p.x_pos, weight, p.bias),
        ):
            with pytest.raises(TypeError, match="weight is a DTensor; accepted: a plain tensor"):
                call()
    finally:
        distributed.destroy_process_group()
