"""The Triton backend where no GPU is: what it says, chooses and launches; its kernels in the interpreter."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch

import ffkernels as ff
from ffkernels import optim, peer, spec
from ffkernels import validation as check
from ffkernels.backends import select
from ffkernels.backends.triton import configs, support
from ffkernels.nn import graphs
from ffkernels.objectives import DEFAULT_OBJECTIVE, LOSSES

from .steps import Problem, problem

ROOT = Path(__file__).parent.parent
GPU = torch.device("cuda", 0)
ON_GPU = select.Request(GPU, torch.float32, torch.bfloat16, "relu", "adam")


@pytest.fixture
def a_gpu(monkeypatch):
    """As if torch had found a GPU of capability 9.0."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    support._unsupported_capability.cache_clear()
    yield
    support._unsupported_capability.cache_clear()


needs_triton = pytest.mark.skipif(not support._installed(), reason="Triton is not installed")


@needs_triton
def test_kernels_in_the_interpreter(interpreted):
    """Triton reads the variable when it is imported: a process of its own, which `conftest.py` starts."""
    status, output = interpreted()
    print(output)
    assert status == 0, output[-8000:]
    assert "passed" in output and "skipped" not in output


@needs_triton
def test_a_cpu_alone_fails_with_one_clear_sentence(monkeypatch):
    p = problem(dtype=torch.float32)
    before = p.weight.detach().clone()
    monkeypatch.setenv("FFKERNELS_BACKEND", "triton")
    with pytest.raises(ValueError) as caught:
        ff.linear_step_(p.x_pos, p.x_neg, p.weight, p.bias, p.optimizer)
    assert str(caught.value) == (
        "FFKERNELS_BACKEND='triton' cannot run this call: "
        "Triton needs a GPU, or TRITON_INTERPRET=1 to run in its interpreter"
    )
    assert torch.equal(p.weight, before) and not p.optimizer.state


@needs_triton
def test_it_comes_first_on_a_gpu(a_gpu):
    assert next(iter(select.BACKENDS)) == "triton"
    assert select.choose(ON_GPU, None) == "triton"
    assert select.choose(ON_GPU._replace(device=torch.device("cpu")), None) != "triton"


@needs_triton
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float64}, "float64 runs on the eager backend"),
        ({"device": torch.device("meta")}, "Triton kernels run on CUDA and ROCm devices, not on meta"),
        ({"rule": "lion"}, "update rule 'lion' has no Triton kernel"),
        ({"activation": "tanh"}, "activation 'tanh' has no Triton kernel"),
    ],
    ids=str,
)
def test_what_it_leaves_to_others(change, reason, a_gpu):
    assert support.unsupported(ON_GPU._replace(**change)) == reason
    assert select.choose(ON_GPU._replace(**change), None) == "eager"


@needs_triton
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, "its convolutions, which no GPU has run yet, run only where they are forced"),
        ({"forced": True}, None),
        ({"forced": True, "geometry": spec.Geometry(pool="average", pool_size=(3, 3))}, None),
        ({"forced": True, "dtype": torch.float64}, "float64 runs on the eager backend"),
        (
            {"forced": True, "compute_dtype": torch.float16},
            "a convolution's products in float16, whose sums leave that range: has float32 and bfloat16 ones",
        ),
        ({"device": torch.device("cpu")}, "Triton needs a GPU, or TRITON_INTERPRET=1 to run in its interpreter"),
    ],
    ids=str,
)
def test_convolutions_run_where_they_are_forced(change, reason, a_gpu):
    request = ON_GPU._replace(**{"geometry": spec.Geometry(), **change})
    assert support.unsupported(request) == reason
    assert select.choose(request._replace(forced=False), None) != "triton"


@needs_triton
def test_the_environment_forces_convolutions_too(a_gpu, monkeypatch):
    request = ON_GPU._replace(geometry=spec.Geometry())
    assert select.choose(request, "triton") == "triton"
    monkeypatch.setenv("FFKERNELS_BACKEND", "triton")
    assert select.choose(request, None) == "triton"
    assert select.choose(request._replace(compute_dtype=torch.float16), None) == "eager"


@needs_triton
def test_an_older_gpu_is_left_to_others(a_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    wanted = "the kernels need compute capability 8.0 or newer, this device has 7.5"
    assert support.unsupported(ON_GPU) == wanted


@needs_triton
def test_no_gpu_after_all():
    """Fake tensors may be on a device that is not there."""
    if not torch.cuda.is_available():
        assert support.unsupported(ON_GPU) == "no CUDA or ROCm device is available"


def test_it_knows_everything_that_the_package_has():
    assert set(support.ACTIVATIONS) == set(check.ACTIVATIONS)
    assert set(support.LOSSES) == set(LOSSES)
    assert set(support.RULES) == set(get_args(spec.Rule))


def test_without_triton_the_package_says_so_and_works():
    code = """
import sys
sys.modules["triton"] = None
import torch
import ffkernels as ff
weight = torch.nn.Parameter(torch.randn(4, 3))
ff.linear_step_(torch.rand(2, 3), torch.rand(2, 3), weight, None, torch.optim.SGD([weight]))
print(ff.explain(weight))
try:
    ff.explain(weight, backend="triton")
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "passed over: triton: Triton is not installed" in done.stdout, done.stderr
    assert "backend='triton' cannot run this call: Triton is not installed" in done.stdout


class Recorder:
    """Stands for a kernel, and remembers its launches."""

    def __init__(self) -> None:
        self.launches = []

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((grid, kwargs))


@pytest.fixture
def recorded(monkeypatch):
    launch = pytest.importorskip("ffkernels.backends.triton.launch")
    names = ("forward", "coefficient", "update", "finish", "peers", "list", "scale", "units")
    kernels = {f"{name}_kernel": Recorder() for name in names}
    for name, recorder in kernels.items():
        monkeypatch.setattr(launch, name, recorder)
    monkeypatch.setattr(configs, "for_device", lambda index: configs.find("sm_90"))
    monkeypatch.setattr(launch, "processors", lambda device: 132)
    return kernels


def step_on_meta(
    p: Problem, compute_dtype=torch.bfloat16, objective=DEFAULT_OBJECTIVE, is_positive=None, peers=None
) -> None:
    """A step of the backend on tensors without values: whatever would bring one to the host raises."""
    rows, width = len(p.x_pos) + len(p.x_neg), len(p.weight)
    written = [torch.empty(shape, device="meta") for shape in ((rows, width), (rows,), ())]
    mean = torch.empty(width, device="meta")
    with torch.no_grad():
        select.load("triton").linear_step_(
            spec.Rows(p.x_pos, p.x_neg, is_positive),
            spec.Layer(p.weight, p.bias, "l2", 1e-4, "add", "relu", compute_dtype),
            objective.goal(),
            peer.pull(peers, mean, width),
            optim.plan(p.optimizer, p.weight, p.bias).record,
            spec.Outputs(written[0].to(compute_dtype), *written[1:]),
        )


def meta_problem(n_pos, n_neg, in_features, out_features, optimizer=torch.optim.Adam, **settings) -> Problem:
    weight, bias = (
        torch.nn.Parameter(torch.empty(shape, device="meta"))
        for shape in ((out_features, in_features), (out_features,))
    )
    x_pos, x_neg = (torch.empty(n, in_features, device="meta") for n in (n_pos, n_neg))
    return Problem(weight, bias, optimizer([weight, bias], lr=0.1, **settings), x_pos, x_neg)


@needs_triton
@pytest.mark.parametrize(
    ("shape", "launched"),
    [
        ((100, 100, 1000, 1000), [1, 0, 1, 0]),
        ((4096, 4096, 2048, 2048), [1, 1, 1, 0]),
        ((4096, 4096, 784, 500), [1, 0, 1, 1]),
        ((4, 4, 8, 4000), [1, 1, 1, 0]),
    ],
    ids=str,
)
@pytest.mark.parametrize("goodness", ["mean", "sum"])
def test_launches(shape, launched, goodness, recorded):
    """Two as a rule: coefficients before where that pays or column blocks are many, an end where tiles are few."""
    step_on_meta(meta_problem(*shape), objective=ff.Objective(goodness))
    names = ("forward", "coefficient", "update", "finish")
    assert [len(recorded[f"{name}_kernel"].launches) for name in names] == launched
    (grid, given), *_ = recorded["update_kernel"].launches
    made = given["made"]
    assert (made.coefficient is not None) == (given["terms"] is None) == bool(launched[1])
    # Rows are left out where a loss may saturate and the product is large.
    assert (made is not None and made.listed is not None) == (
        goodness == "sum" and shape[0] == 4096 and shape[2] == 2048
    )
    assert (grid[1] > 1) == (given["parts"].weight is not None) == bool(launched[3])


@needs_triton
@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [
        (torch.optim.SGD, {}),
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.Adam, {}),
        (torch.optim.AdamW, {"capturable": True}),
        (torch.optim.RMSprop, {}),
    ],
)
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("peers", [None, peer.PeerNormalisation(), peer.PeerNormalisation(gated=True)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_step_never_waits_for_the_device(optimizer, settings, mixed, peers, dtype, recorded):
    p = meta_problem(6, 0 if mixed else 6, 5, 7, optimizer, **settings)
    is_positive = torch.empty(6, dtype=torch.bool, device="meta") if mixed else None
    step_on_meta(p, dtype, ff.Objective(reduction="sum_of_means"), is_positive, peers)
    assert len(recorded["peers_kernel"].launches) == (peers is not None)
    (_, given), *_ = recorded["update_kernel"].launches
    step_pointer = getattr(given["weight"].numbers, "step_pointer", None)
    assert (step_pointer is not None) == ("capturable" in settings)
    assert (given["terms"].n_positive is not None) == mixed


@needs_triton
@pytest.mark.parametrize(
    ("widths", "form"), [((None, 1), "listed"), ((None, 5), "slopes"), ((1, 2048), "slopes"), ((None, None), "listed")]
)
@pytest.mark.parametrize("peers", [None, peer.PeerNormalisation(), peer.PeerNormalisation(gated=True)], ids=str)
@pytest.mark.parametrize("mixed", [False, True])
def test_an_update_with_given_slopes_never_waits_for_the_device(mixed, peers, widths, form, recorded):
    """Large enough for rows at rest to be left out, where there is one slope a row and nothing pulls each of them."""
    p = meta_problem(4096, 0 if mixed else 4096, 2048, 2048)
    rows = 4096 if mixed else 8192
    slopes = [None if width is None else torch.empty(rows, width, device="meta") for width in widths]
    mean = None if peers is None else torch.empty(2048, device="meta")
    with torch.no_grad():
        select.load("triton").linear_update_(
            spec.Rows(p.x_pos, p.x_neg, torch.empty(rows, dtype=torch.bool, device="meta") if mixed else None),
            spec.Layer(p.weight, p.bias, "l2", 1e-4, "add", "relu", torch.bfloat16),
            spec.Slopes(torch.empty(rows, 2048, device="meta"), *slopes),
            peer.pull(peers, mean, 2048),
            optim.plan(p.optimizer, p.weight, p.bias).record,
        )
    lists = form == "listed" and not (peers is not None and peers.gated)
    wanted = {
        "update": 1,
        "scale": 1,
        "list": int(lists),
        "units": int(peers is not None),
        "peers": int(peers is not None),
    }
    assert {name: len(recorded[f"{name}_kernel"].launches) for name in wanted} == wanted
    ((_, given),) = recorded["update_kernel"].launches
    made = given["made"]
    assert (made.coefficient is None) == (form == "slopes") and (made.listed is not None) == lists
    assert given["terms"] is None and given["written"] is None


CONV_KERNELS = ("conv_forward", "pool", "gradient", "conv_update", "finish")


@pytest.fixture
def recorded_maps(monkeypatch):
    """Of a convolution's kernels, on a device with so many processors that its places are split."""
    conv = pytest.importorskip("ffkernels.backends.triton.conv")
    kernels = {f"{name}_kernel": Recorder() for name in CONV_KERNELS}
    for name, recorder in kernels.items():
        monkeypatch.setattr(conv, name, recorder)
    monkeypatch.setattr(configs, "for_device", lambda index: configs.find("sm_90"))
    monkeypatch.setattr(conv, "processors", lambda device: 132)
    return kernels


# A pool in the product's tile; one for each pool whose windows are no power of two, or overlap; and a gradient that is
# written where windows overlap, or where somebody asks for it.
@needs_triton
@pytest.mark.parametrize(
    ("pool", "size", "step", "by_place", "launched"),
    [
        ("none", 1, 1, False, [2, 0, 0, 1, 1]),
        ("max", 2, 2, False, [2, 0, 0, 1, 1]),
        ("average", 4, 5, False, [2, 0, 0, 1, 1]),
        ("max", 2, 2, True, [2, 0, 1, 1, 1]),
        ("max", 3, 3, False, [2, 2, 0, 1, 1]),
        ("max", 3, 2, False, [2, 2, 1, 1, 1]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_launches_of_a_convolution_never_wait_for_the_device(
    dtype, pool, size, step, by_place, launched, recorded_maps
):
    """Tensors without values: whatever would bring one to the host raises. One of two forwards is of a row alone."""
    rows, channels = 64, 48
    x = torch.empty(rows, 32, 16, 16, dtype=dtype, device="meta").contiguous(memory_format=torch.channels_last)
    weight, bias = torch.empty(channels, 32, 3, 3, device="meta"), torch.empty(channels, device="meta")
    layer = spec.Layer(weight, bias, "none", 0.0, "add", "relu", dtype)
    geometry = spec.Geometry(padding=(1, 1), pool=pool, pool_size=(size, size), pool_stride=(step, step))
    triton = select.load("triton")
    maps = triton.conv2d_forward(spec.MapRows(x, None), layer, geometry, True, None)
    slope = torch.empty(rows, channels, device="meta")
    slopes = spec.MapSlopes(slope, slope[:, :1], bias, bias, by_place)
    made = triton.conv2d_gradients_(spec.MapRows(x, None), layer, geometry, maps, slopes)
    assert [len(recorded_maps[f"{name}_kernel"].launches) for name in CONV_KERNELS] == launched
    (grid, given), *_ = recorded_maps["conv_update_kernel"].launches
    assert grid[1] > 1 and given["parts"].weight.shape == (grid[1], channels, 9 * 32)
    assert (given["maps"].dz is not None) == bool(launched[2])
    assert made.weight.shape == weight.shape and made.bias.shape == bias.shape
    assert made.by_place.shape == ((1, channels, 16, 16) if by_place else (0,))
    like = triton.conv2d_forward_like(spec.MapRows(x, None), layer, geometry, True, None)
    for one, other in zip(like, maps, strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


@needs_triton
def test_tiles_are_no_larger_than_a_group():
    wide = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP": 8, "num_warps": 8, "num_stages": 3}
    # Of 96 channels 32 divide a tap's; of 20 no block does, and all columns lie one behind the other.
    for ins, outs, columns, expected in (
        (128, 256, 1152, {}),
        (96, 256, 864, {"BLOCK_K": 32}),
        (20, 40, 180, {"BLOCK_N": 64, "num_warps": 4}),
        (1, 8, 9, {"BLOCK_N": 16, "BLOCK_K": 16, "num_warps": 4}),
    ):
        assert configs.fitted("conv_forward", wide, (1000, columns, outs), ins) == {**wide, **expected}
    update = {"BLOCK_OUT": 64, "BLOCK_IN": 128, "BLOCK_K": 32, "GROUP": 8, "num_warps": 8, "num_stages": 3}
    found = configs.fitted("conv_update", update, (1000, 9, 8), 1)
    assert found == {**update, "BLOCK_OUT": 16, "BLOCK_IN": 16, "num_warps": 4}


def test_a_file_made_without_convolutions_leaves_them_to_the_architectures(monkeypatch):
    old = {"forward": {"float32": []}, "update": {"float32": []}}
    monkeypatch.setattr(configs, "for_device", lambda index: old)
    monkeypatch.setattr(configs, "device_names", lambda index: ("NVIDIA H200", "sm_90"))
    assert configs.of_kernel("update", 0) == {"float32": []}
    assert configs.of_kernel("conv_update", 0) == configs.find("sm_90")["conv_update"]


@needs_triton
def test_the_tuner_times_every_kernel_in_every_kind_of_its_operands():
    tune = pytest.importorskip("ffkernels.backends.triton.tune")
    work = list(tune._work())
    assert {(kernel, kind) for kernel, kind, _ in work} == {
        (kernel, kind) for kernel in configs.KERNELS for kind in configs.kinds_of(kernel)
    }
    assert len(work) == len(set(work)) == 2 * 3 * len(tune.SHAPES) + 2 * 2 * len(tune.MAPS)
    for kernel in configs.CONV_KERNELS:
        for config in tune.CANDIDATES[kernel]:
            assert set(config) == {*configs.INTERPRETED[kernel], "num_warps", "num_stages"}
    assert tune.config_shape("conv_update", (100, 3, 32, 28)) == (78400, 27, 32)
    sources = set(tune.SOURCES)
    assert {"conv_forward", "conv_update", "conv_slopes", "pools", "windows"} <= sources


def test_the_nearest_configuration_in_log_space():
    entries = [{"shape": [200, 1000, 1000], "config": "small"}, {"shape": [8192, 2048, 2048], "config": "large"}]
    assert configs.nearest(entries, (256, 2000, 2000)) == "small"
    assert configs.nearest(entries, (100_000, 784, 500)) == "large"
    assert configs.nearest(entries, (0, 1, 1)) == "small"


@pytest.mark.parametrize(
    ("architecture", "nearest"),
    [
        ("sm_75", "sm_80"), ("sm_86", "sm_80"), ("sm_89", "sm_80"), ("sm_90", "sm_90"), ("sm_103", "sm_100"),
        ("sm_120", "sm_100"), ("gfx90a", "gfx942"), ("gfx950", "gfx942"),
    ],
)  # fmt: skip
def test_the_nearest_architecture(architecture, nearest):
    assert configs.nearest_architecture(architecture) == nearest


def test_a_device_without_a_file_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr(configs, "device_names", lambda index: ("NVIDIA L40S", "sm_89"))
    configs.for_device.cache_clear()
    with caplog.at_level(logging.INFO, configs.__name__):
        assert configs.for_device(0) == configs.find("sm_80")
        assert configs.for_device(0) == configs.find("sm_80")
    assert len(caplog.messages) == 1 and "no configurations for NVIDIA L40S (sm_89)" in caplog.messages[0]
    configs.for_device.cache_clear()


def test_a_file_of_ones_own(monkeypatch, tmp_path):
    own = {"made_for": "NVIDIA H200"}
    (tmp_path / "NVIDIA_H200.json").write_text(json.dumps(own))
    monkeypatch.setattr(configs, "device_names", lambda index: ("NVIDIA H200", "sm_90"))
    monkeypatch.setenv(configs.VARIABLE, str(tmp_path))
    configs.for_device.cache_clear()
    assert configs.for_device(0) == own
    configs.for_device.cache_clear()


@pytest.mark.parametrize("path", sorted(configs.FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_configuration_files(path):
    """Every kernel and kind of operands has its configurations, with the keys that the kernels take."""
    found = json.loads(path.read_text())
    for kernel in configs.KERNELS:
        for kind in configs.kinds_of(kernel):
            assert found[kernel][kind]
            for entry in found[kernel][kind]:
                assert len(entry["shape"]) == 3
                needed = {*configs.INTERPRETED[kernel], "num_warps", "num_stages"}
                assert needed <= set(entry["config"]) <= needed | set(configs.DEFAULTS[kernel])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tuning_without_a_gpu_fails_with_one_clear_sentence(capsys):
    from ffkernels import cli

    assert cli.main(["tune"]) == cli.USER_ERROR
    assert capsys.readouterr().err == (
        f"python -m ffkernels: tune needs a CUDA or ROCm device; torch {torch.__version__} finds none on this machine\n"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_cuda_graph_without_a_gpu_fails_with_one_clear_sentence():
    net = ff.FFNetwork([ff.FFLinear(3, 2)])
    x = torch.rand(4, 3)
    with pytest.raises(ValueError, match="x_pos is on cpu; accepted: a CUDA or ROCm device"):
        ff.GraphedStep(net, torch.optim.SGD(net.parameters()), x, x)
    with pytest.raises(TypeError, match="net is a Linear; accepted: an FFNetwork"):
        ff.GraphedStep(torch.nn.Linear(3, 2), None, x, x)
    with pytest.raises(TypeError, match="x_neg is a list"):
        ff.GraphedStep(net, None, x, [1.0])


@pytest.mark.parametrize(
    ("optimizer", "options", "message"),
    [
        (torch.optim.RMSprop, {}, r"optimizers\[0\] cannot be replayed \(RMSprop runs through"),
        (torch.optim.Adam, {}, r"optimizers\[0\] has capturable=False; accepted: capturable=True"),
        (torch.optim.SGD, {"objective": ff.Objective(threshold=torch.tensor(1.0))}, "has a threshold on cpu"),
        (torch.optim.SGD, {"objective": ff.Objective(loss="symba"), "is_positive": 1}, "with is_positive"),
    ],
)
def test_what_a_cuda_graph_cannot_replay(optimizer, options, message, monkeypatch):
    """On devices that are only named: nothing is launched before the arguments are checked."""
    net = ff.FFNetwork([ff.FFLinear(3, 2)])
    monkeypatch.setattr(graphs, "_has_graphs", lambda device: True)
    with pytest.raises(ValueError, match=message):
        ff.GraphedStep(net, optimizer(net.parameters()), torch.rand(4, 3), torch.rand(4, 3), **options)
