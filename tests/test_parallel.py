"""Several processes on gloo: data parallel against one process on the joint batch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

import ffkernels as ff
from tests.parallel_cases import (
    OBJECTIVES,
    OPTIMIZERS,
    Case,
    failing,
    killed,
    layer_by_layer,
    not_piped,
    partly_frozen,
    piped,
    refused,
    saved_in_parts,
    trained_alone,
    trained_by_parts,
    trained_together,
    with_hooks,
)
from tests.processes import GROUPS, Failed, Processes

RELATIVE = {torch.float64: 1e-10, torch.float32: 1e-5}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the others have: on more, products may be summed otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    started = Processes(3)
    yield started
    started.stop()


@pytest.fixture
def alone(tmp_path) -> Iterator[None]:
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def trained_by_all(processes: Processes, case: Case, splits: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
    """What all processes end up with, bit for bit."""
    found = processes.run(trained_together, case, splits, each=[(rank,) for rank in range(len(splits))])
    (first, first_losses), *others = found
    for other, other_losses in others:
        assert torch.equal(first_losses, other_losses)
        for name, tensor in first.items():
            assert torch.equal(tensor, other[name]), name
    return first, first_losses


def check_as_one(processes: Processes, case: Case, splits: Sequence[int]) -> None:
    """All processes end up with what one has on the joint batch."""
    found, found_losses = trained_by_all(processes, case, splits)
    expected, losses = trained_alone(case, splits)
    bound = RELATIVE[case.dtype]
    torch.testing.assert_close(found_losses, losses, rtol=10 * bound, atol=bound)
    check_close(found, expected, bound)


def check_close(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        error = (found[name] - tensor).double().norm() / tensor.double().norm().clamp(min=1e-30)
        assert error <= bound, f"{name}: {error}"


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_processes_are_one_on_the_joint_batch(processes, objective):
    check_as_one(processes, Case(objective), (5, 8))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "rmsprop"])
@pytest.mark.parametrize("outputs", ["pre", "post"])
def test_optimizers_and_hand_overs(processes, optimizer, outputs):
    check_as_one(processes, Case("logistic", outputs, optimizer), (6, 6))


@pytest.mark.parametrize("objective", ["logistic", "sum_of_means", "symba", "cross_entropy", "projection"])
def test_weights_of_rows(processes, objective):
    check_as_one(processes, Case(objective, weighted=True), (7, 4))


@pytest.mark.parametrize("objective", ["logistic", "sum_of_means", "symba", "given mean"])
def test_rows_in_any_order(processes, objective):
    check_as_one(processes, Case(objective, sides="mixed", weighted=objective == "logistic"), (7, 4))


@pytest.mark.parametrize("objective", ["logistic", "sum_of_means", "swish", "cwc", "projection", "given mean"])
def test_three_processes_one_of_them_without_rows(processes, objective):
    check_as_one(processes, Case(objective), (4, 0, 7))


@pytest.mark.parametrize("outputs", ["pre", "post"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_peers_are_those_of_all_processes(processes, outputs, gated, activation):
    peer = ff.PeerNormalisation(strength=0.5, gated=gated)
    check_as_one(processes, Case(outputs=outputs, options=(("peer", peer), ("activation", activation))), (5, 3, 0))


@pytest.mark.parametrize("outputs", ["pre", "post"])
@pytest.mark.parametrize("objective", ["logistic", "cross_entropy"])
def test_fifty_steps_in_float32(processes, objective, outputs):
    check_as_one(processes, Case(objective, outputs, "sgd", torch.float32, steps=50), (9, 7))


@pytest.mark.parametrize("objective", ["logistic", "symba", "cross_entropy", "projection", "given mean"])
def test_convolutions(processes, objective):
    check_as_one(processes, Case(objective, kind="convolution"), (3, 5))


NORMALISED = [
    ("linear", (("batch_norm", "behind"),)),
    ("convolution", (("batch_norm", "behind"),)),
    # A bias in front of one has no gradient but rounding.
    ("convolution", (("batch_norm", "between"), ("bias", False))),
    ("convolution", (("batch_norm", "before"),)),
]


@pytest.mark.parametrize(("kind", "options"), NORMALISED)
@pytest.mark.parametrize("objective", ["logistic", "cross_entropy", "given mean"])
def test_batch_normalisation_of_all_rows(processes, kind, options, objective):
    check_as_one(processes, Case(objective, kind=kind, options=options, sync_batch_norm=True), (4, 0, 6))


@pytest.mark.parametrize(("kind", "options"), NORMALISED)
@pytest.mark.parametrize("objective", ["logistic", "cross_entropy"])
def test_batch_normalisation_goes_by_each_process_s_own_rows(processes, kind, options, objective):
    splits = (4, 2, 6)
    case = Case(objective, kind=kind, options=options)
    found, _ = trained_by_all(processes, case, splits)
    assert any("running_mean" in name and tensor.any() for name, tensor in found.items())
    check_close(found, trained_by_parts(case, splits), 1e-10)


def test_batch_normalisation_and_a_process_without_rows(processes):
    case = Case("cross_entropy", options=(("batch_norm", "behind"),))
    found, _ = trained_by_all(processes, case, (4, 0, 6))
    assert all(tensor.isfinite().all() for tensor in found.values())
    assert found["layers.0.batch_norm.num_batches_tracked"] == case.steps


def check_pipeline(processes: Processes, case: Case, size: int) -> None:
    """Each process ends up with the very bits of one."""
    found = processes.run(piped, case, (0,) * size, each=[(rank,) for rank in range(size)])
    expected = not_piped(case)
    for of_rank in found:
        assert of_rank["net"].keys() == expected["net"].keys()
        for name, tensor in expected["net"].items():
            assert torch.equal(of_rank["net"][name], tensor), name
        for name in expected.keys() - {"net"}:
            assert torch.equal(of_rank[name], expected[name]), name
    assert [name for of_rank in found for name in of_rank["own"]] == list(expected["net"])


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("outputs", ["pre", "post"])
def test_a_pipeline_has_the_bits_of_one_process(processes, size, outputs):
    check_pipeline(processes, Case(outputs=outputs, dtype=torch.float32, steps=200), size)


@pytest.mark.parametrize("objective", ["symba", "cross_entropy", "projection", "given mean"])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_pipelines_of_every_kind(processes, objective, kind):
    check_pipeline(processes, Case(objective, kind=kind, weighted=objective == "symba"), 2)


@pytest.mark.parametrize("sides", ["apart", "mixed"])
def test_a_pipeline_hands_on_what_is_known_of_rows(processes, sides):
    check_pipeline(processes, Case(sides=sides, weighted=True), 3)


def test_a_pipeline_of_batch_normalisation_and_of_rounded_products(processes):
    check_pipeline(processes, Case("cross_entropy", kind="convolution", options=(("batch_norm", "behind"),)), 2)
    rounded = (("compute_dtype", torch.bfloat16),)
    check_pipeline(processes, Case(dtype=torch.float32, options=rounded, steps=20), 3)


@pytest.mark.parametrize("batch_norm", [None, "behind"])
@pytest.mark.parametrize("objective", ["logistic", "cross_entropy"])
def test_layer_by_layer(processes, objective, batch_norm):
    options = () if batch_norm is None else (("batch_norm", batch_norm),)
    case, splits = Case(objective, options=options, sync_batch_norm=batch_norm is not None), (4, 0, 5)
    found = processes.run(layer_by_layer, case, splits, each=[(rank,) for rank in range(3)])
    expected, losses = layer_by_layer(case, splits, -1)
    for state, of_rank in found:
        torch.testing.assert_close(of_rank, losses, rtol=1e-10, atol=1e-12)
        check_close(state, expected, 1e-10)


def test_layers_that_hand_nothing_on_learn_one_after_the_other(processes):
    case, splits = Case(outputs="none"), (4, 0, 5)
    expected, losses = layer_by_layer(case, splits, -1)
    for state, of_rank in processes.run(layer_by_layer, case, splits, each=[(rank,) for rank in range(3)]):
        torch.testing.assert_close(of_rank, losses, rtol=1e-10, atol=1e-12)
        check_close(state, expected, 1e-10)


def test_one_row_of_several_has_statistics(processes):
    options = (("batch_norm", "behind"),)
    check_as_one(processes, Case("cross_entropy", options=options, sync_batch_norm=True), (1, 4))


def test_a_pipeline_leaves_modes_as_they_are(alone):
    net = ff.FFNetwork([ff.FFLinear(5, 4, batch_norm="behind", outputs="pre"), ff.FFLinear(4, 3)])
    net.layers[0].batch_norm.eval()
    pipeline = ff.parallel.Pipeline(net)
    assert pipeline.stage.training
    assert not net.layers[0].batch_norm.training


def test_what_is_no_tensor_is_refused_by_name(alone):
    net = ff.FFNetwork([nn.Flatten(), ff.FFLinear(12, 20)])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="x_neg"):
        ff.parallel.DataParallel(net).step(torch.rand(2, 3, 4), [1.0], optimizer)


def test_gradient_hooks_see_the_joint_gradient_once(processes):
    found = processes.run(with_hooks, 2, each=[(0,), (1,)])
    case = Case()
    net = case.net()
    net.step(*case.batch(0, (4, 6))[-1][0], None)
    for seen, left in found:
        assert len(seen) == 1
        torch.testing.assert_close(seen[0], net.layers[0].weight.grad)
        torch.testing.assert_close(left, net.layers[0].weight.grad / 2)


def test_a_frozen_layer_hands_on_and_moves_its_statistics(processes):
    (state, losses), (other, other_losses) = processes.run(partly_frozen, False, 2, each=[(0,), (1,)])
    assert torch.equal(losses, other_losses)
    assert all(torch.equal(tensor, other[name]) for name, tensor in state.items())
    net = Case(options=(("batch_norm", "behind"),)).net()
    assert torch.equal(state["layers.0.weight"], net.layers[0].weight)
    assert not torch.equal(state["layers.1.weight"], net.layers[1].weight)
    assert state["layers.0.batch_norm.running_mean"].any()
    assert state["layers.0.batch_norm.num_batches_tracked"] == 1
    expected, expected_losses = partly_frozen(True, 2, -1)
    for found, of_rank in processes.run(partly_frozen, True, 2, each=[(0,), (1,)]):
        check_close(found, expected, 1e-10)
        torch.testing.assert_close(of_rank, expected_losses)


@pytest.mark.parametrize(
    ("wrong", "objective", "options", "text"),
    [
        ("columns", "logistic", (), "x_pos has 11 columns"),
        ("labels", "cross_entropy", (), "labels hold"),
        ("rows", "cross_entropy", (("batch_norm", "behind"),), "x_pos has 1 row"),
        ("optimizer", "logistic", (), "does not hold weight"),
    ],
)
def test_what_one_process_refuses_all_refuse(processes, wrong, objective, options, text):
    case = Case(objective, options=options)
    (first, is_as_before), (last, last_is) = processes.run(refused, case, wrong, 2, each=[(0,), (1,)])
    assert text in last
    assert "another process refused" in first
    assert is_as_before
    assert last_is


@pytest.mark.parametrize(("kind", "size"), [("data", 3), ("pipeline", 2)])
def test_a_killed_process_ends_the_others(processes, kind, size):
    with pytest.raises(Failed, match=f"rank {size - 1}: died") as failed:
        processes.run(killed, kind, size, each=[(rank,) for rank in range(size)])
    for text, is_whole in failed.value.values[:-1]:
        assert "another process died, or did not answer within the timeout" in text
        assert is_whole


def test_a_step_that_fails_in_its_midst_leaves_all_alike():
    short_of_patience = Processes(2, timeout=4)
    (errors, state), (own, other) = short_of_patience.run(failing, 2, False, each=[(0,), (1,)])
    short_of_patience.stop()
    assert "a loss of inf" in own[0]
    assert "ProcessLost: another process died, or did not answer" in errors[0]
    assert ["no longer at the same step" in text for text in (errors[1], own[1])] == [True, True]
    before = Case().net().state_dict()
    for name, tensor in state.items():
        assert torch.equal(tensor, other[name]), name
        assert torch.equal(tensor, before[name]) == name.startswith("layers.2"), name


def test_before_there_is_a_group(monkeypatch):
    for kind in (ff.parallel.DataParallel, ff.parallel.Pipeline):
        with pytest.raises(ValueError, match=r"process_group=None came before .*init_process_group"):
            kind(Case().net())
    with monkeypatch.context() as without:
        without.setattr(dist, "is_available", lambda: False)
        with pytest.raises(ValueError, match=r"process_group: this build of torch has no torch\.distributed"):
            ff.parallel.DataParallel(Case().net())


def wrapped(kind: str) -> nn.Module:
    net = Case().net()
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(net)
    return nn.Sequential(net)


@pytest.mark.parametrize("kind", ["ddp", "sequential"])
@pytest.mark.parametrize("parallel", [ff.parallel.DataParallel, ff.parallel.Pipeline])
def test_wrapped_networks_are_refused(alone, kind, parallel):
    with pytest.raises(TypeError, match=r"net is a (DistributedDataParallel|Sequential); accepted: .*wrapper"):
        parallel(wrapped(kind))


def test_sharded_parameters_are_refused_by_name(alone):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    x = torch.rand(4, 12, dtype=torch.float64)
    weight = nn.Parameter(distribute_tensor(torch.rand(5, 12, dtype=torch.float64), mesh, [Shard(0)]))
    with pytest.raises(TypeError, match="weight is a DTensor; accepted: a plain tensor"):
        ff.linear_step_(x, x, weight, None, None)
    net = Case().net()
    fully_shard(net, mesh=mesh)
    with pytest.raises(TypeError, match="weight is a DTensor"):
        net.step(x, x, None)
    with pytest.raises(TypeError, match=r"net.layers.0.weight is a DTensor"):
        ff.parallel.DataParallel(net)
    for use_orig_params in (True, False):
        net = Case().net()
        FullyShardedDataParallel(net, use_orig_params=use_orig_params, device_id=torch.device("cpu"))
        for step in (lambda net=net: net.step(x, x, None), lambda net=net: ff.parallel.DataParallel(net)):
            with pytest.raises(ValueError, match=r"weight (lies in a flat parameter|has requires_grad)"):
                step()


def learns_besides(goodness: Tensor, is_positive: Tensor) -> Tensor:
    return (goodness * torch.ones((), dtype=goodness.dtype, requires_grad=True)).mean()


def test_what_cannot_be_put_together_is_refused(alone):
    net = Case("given mean").net()
    with pytest.raises(ValueError, match=r"net.layers\[0\].objective is a loss of your own.*given_loss='mean'"):
        ff.parallel.DataParallel(net)
    with pytest.raises(ValueError, match="given_loss='median' is not one of 'mean', 'sum'"):
        ff.parallel.DataParallel(net, given_loss="median")
    parallel = ff.parallel.DataParallel(Case().net(), given_loss="mean")
    x = torch.rand(4, 12, dtype=torch.float64)
    with pytest.raises(ValueError, match="parameters of its own, whose gradients nobody reduces"):
        parallel.step(x, x, None, objective=learns_besides)
    net = Case().net()
    net.layers[1].bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"net.layers\[1\] is frozen in part"):
        ff.parallel.DataParallel(net)
    net = Case().net()
    net.layers[2].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"net.layers\[2\] is watched by hooks"):
        ff.parallel.DataParallel(net)
    net = Case().net()
    net.layers[0].batch_norm = nn.SyncBatchNorm(20)
    with pytest.raises(TypeError, match=r"net.layers\[0\].batch_norm is a SyncBatchNorm"):
        ff.parallel.DataParallel(net)
    for layers in ([2], [1, 2], [0]):
        with pytest.raises(ValueError, match=r"layers=.* accepted: 1 integers >= 1 that sum to the 3 layers"):
            ff.parallel.Pipeline(Case().net(), layers=layers)


def test_one_process_has_the_numbers_of_a_step_without_a_group(alone):
    case = Case(optimizer="sgd", dtype=torch.float32)
    nets = case.net(), case.net()
    optimizers = [OPTIMIZERS["sgd"](net.parameters()) for net in nets]
    parallel = ff.parallel.DataParallel(nets[1])
    (pos, neg), _ = case.batch(0, (6,))[-1]
    results, features = nets[0].step_and_features(pos, neg, optimizers[0], 4)
    other_results, other_features = parallel.step_and_features(pos, neg, optimizers[1], 4)
    torch.testing.assert_close(features, other_features)
    for result, other in zip(results, other_results, strict=True):
        torch.testing.assert_close(result.loss, other.loss)
        torch.testing.assert_close(result.goodness, other.goodness)
    for p, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(p, other)


def test_a_pipeline_is_saved_in_parts_and_loaded_otherwise(processes, tmp_path):
    whole, _ = processes.run(saved_in_parts, str(tmp_path), 2, each=[(0,), (1,)])
    net = Case().net()
    state = {"net": net.state_dict()}
    dcp.load(state, checkpoint_id=str(tmp_path), no_dist=True)
    net.load_state_dict(state["net"])
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, whole[name]), name


def test_a_pipeline_of_one_process(alone):
    case = Case(dtype=torch.float32)
    nets = case.net(), case.net()
    pipeline = ff.parallel.Pipeline(nets[1])
    optimizers = [OPTIMIZERS["adam"](nets[0].parameters()), OPTIMIZERS["adam"](pipeline.parameters())]
    rows, _ = case.batch(0, (6,))[-1]
    results = nets[0].step(*rows, optimizers[0], keep=True)
    others = pipeline.step(*rows, optimizers[1], keep=True)
    assert all(torch.equal(result.y, other.y) for result, other in zip(results, others, strict=True))
    for name, tensor in nets[0].state_dict().items():
        assert torch.equal(tensor, pipeline.state_dict()[name])
    with pytest.raises(ValueError, match=r"x_pos has 11 columns"):
        pipeline.step(rows[0][:, 1:], rows[1][:, 1:], optimizers[1])
    with pytest.raises(ValueError, match=r"state_dict holds layers\.7\.weight"):
        pipeline.load_state_dict({"layers.7.weight": torch.zeros(1)})


def loaded_wrongly(rank: int) -> list[str]:
    """What processes say of states that lack an entry of the third layer, or hold one of another shape."""
    pipeline = ff.parallel.Pipeline(Case().net(), GROUPS.get(2), layers=(1, 2))
    whole = Case().net().state_dict()
    missing = {name: tensor for name, tensor in whole.items() if name != "layers.2.bias"}
    narrow = {**whole, "layers.2.bias": torch.zeros(3)}
    said = []
    for state in (missing, narrow):
        try:
            pipeline.load_state_dict(state)
            said.append("")
        except RuntimeError as error:
            said.append(str(error))
    found = pipeline.load_state_dict({**missing, "layers.7.weight": torch.zeros(1)}, strict=False)
    return [*said, *found.missing_keys, *found.unexpected_keys]


def test_what_a_stage_cannot_load_has_the_name_that_the_whole_network_gives_it(processes):
    first, second = processes.run(loaded_wrongly, each=[(0,), (1,)])
    assert first == ["", "", "layers.7.weight"]
    assert re.search(r'Missing key\(s\) in state_dict: "layers\.2\.bias"\.', second[0])
    assert re.search(r"size mismatch for layers\.2\.bias: .*\[3\].*\[12\]", second[1])
    assert second[2:] == ["layers.2.bias", "layers.7.weight"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("outputs", ["pre", "post"])
def test_on_a_gpu_by_nccl(tmp_path, outputs):
    dist.init_process_group("nccl", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        case = Case(outputs=outputs, dtype=torch.float32)
        nets = [case.net().cuda() for _ in range(3)]
        trains = [nets[0], ff.parallel.DataParallel(nets[1]), ff.parallel.Pipeline(nets[2])]
        rows = [x.cuda() for x in case.batch(0, (6,))[-1][0]]
        for net, of in zip(nets, trains, strict=True):
            of.step(*rows, OPTIMIZERS["sgd"](net.parameters()))
        for found in (nets[1].state_dict(), trains[2].state_dict()):
            check_close(found, nets[0].state_dict(), 1e-5)
    finally:
        dist.destroy_process_group()
