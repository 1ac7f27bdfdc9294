"""Data parallel with sharded optimizer state: the numbers of one process, of which each has its own rows' alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD, Adam, Muon

import ffkernels as ff
from ffkernels.parallel import shards
from tests.parallel_cases import (
    OBJECTIVES,
    OPTIMIZERS,
    Case,
    failing,
    killed,
    layer_by_layer,
    refused,
    state_of,
    trained_alone,
    trained_together,
)
from tests.processes import GROUPS, Failed, Processes
from tests.test_parallel import NORMALISED, check_as_one, check_close, trained_by_all, trained_by_parts


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


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_processes_with_their_own_state_are_one(processes, objective):
    check_as_one(processes, Case(objective, shard_optimizer=True), (4, 0, 7))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_rule_on_rows_that_cannot_be_divided(processes, optimizer):
    """Of 7 rows the processes have 3, 3 and 1, of 2 the last one has none."""
    check_as_one(processes, Case(optimizer=optimizer, kind="narrow", shard_optimizer=True), (4, 3, 2))


@pytest.mark.parametrize("outputs", ["pre", "post"])
@pytest.mark.parametrize("gated", [False, True])
def test_peers_of_all_processes(processes, outputs, gated):
    options = (("peer", ff.PeerNormalisation(strength=0.5, gated=gated)),)
    check_as_one(processes, Case(outputs=outputs, options=options, shard_optimizer=True), (5, 3, 0))


@pytest.mark.parametrize("optimizer", ["groups", "sgd", "rmsprop"])
@pytest.mark.parametrize("objective", ["logistic", "projection"])
def test_convolutions(processes, objective, optimizer):
    check_as_one(processes, Case(objective, optimizer=optimizer, kind="convolution", shard_optimizer=True), (3, 5, 2))


@pytest.mark.parametrize(("kind", "options"), NORMALISED)
def test_batch_normalisation(processes, kind, options):
    case = Case("cross_entropy", kind=kind, options=options, sync_batch_norm=True, shard_optimizer=True)
    check_as_one(processes, case, (4, 0, 6))
    splits, case = (4, 2, 6), case._replace(sync_batch_norm=False)
    found, _ = trained_by_all(processes, case, splits)
    check_close(found, trained_by_parts(case, splits), 1e-10)


@pytest.mark.parametrize("outputs", ["pre", "post"])
def test_fifty_steps_in_float32(processes, outputs):
    case = Case("cross_entropy", outputs, "sgd", torch.float32, steps=50, shard_optimizer=True)
    check_as_one(processes, case, (9, 7, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_processes_have_the_bits_of_whole_state(processes, dtype):
    """Two numbers have one sum, and the rule of RMSprop no last elements that it rounds by other instructions."""
    case = Case(optimizer="rmsprop", kind="narrow", dtype=dtype)
    whole, losses = trained_by_all(processes, case, (5, 8))
    sharded, of_sharded = trained_by_all(processes, case._replace(shard_optimizer=True), (5, 8))
    assert torch.equal(losses, of_sharded)
    assert whole.keys() == sharded.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, sharded[name]), name


def kept(case: Case, size: int, rank: int) -> list[tuple[int, int]]:
    """Of each parameter: its elements, and those of its state on this process."""
    net = case.net()
    optimizer = OPTIMIZERS[case.optimizer](net.parameters())
    parallel = ff.parallel.DataParallel(net, GROUPS.get(size), shard_optimizer=True)
    for step in range(2):
        rows, options = case.batch(step, (4,) * size)[rank]
        parallel.step(*rows, optimizer, **options)
    counts = [sum(t.numel() for t in optimizer.state[p].values() if t.dim()) for p in net.parameters()]
    return [(p.numel(), count) for p, count in zip(net.parameters(), counts, strict=True)]


@pytest.mark.parametrize("kind", ["linear", "narrow", "convolution"])
@pytest.mark.parametrize(("optimizer", "per_element"), [("adam", 2), ("sgd", 1), ("amsgrad", 3), ("rmsprop", 1)])
def test_each_process_keeps_its_own_part(processes, kind, optimizer, per_element):
    found = processes.run(kept, Case(optimizer=optimizer, kind=kind), 3, each=[(rank,) for rank in range(3)])
    for i, p in enumerate(Case(kind=kind).net().parameters()):
        counts = [of_rank[i][1] for of_rank in found]
        assert sum(counts) == per_element * p.numel()
        assert max(counts) == per_element * -(-len(p) // 3) * p[0].numel()
    if kind == "narrow":
        assert found[2][4] == (5 * 2, 0)


def resumed(
    case: Case, size: int, first: int, saved: tuple[dict[str, Any], dict[str, Any]] | None, own: bool, rank: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Three more steps on joint batches, of what was `saved`; its network and whole optimizer state.

    `own`: goes over each process's own `state_dict`, and another network, in the middle.
    """
    net = case.net()
    optimizer = OPTIMIZERS[case.optimizer](net.parameters())
    if saved is not None:
        net.load_state_dict(saved[0])
        # What came through a pipe lies in memory that the processes share.
        optimizer.load_state_dict(copy.deepcopy(saved[1]))
    parallel = ff.parallel.DataParallel(net, GROUPS.get(size), shard_optimizer=case.shard_optimizer)
    for step in range(first, first + 3):
        ends = (0, 7, 12) if size == 2 else (0, 4, 4, 12)
        (pos, neg), _ = case.batch(step, (12,))[-1]
        rows = slice(ends[rank], ends[rank + 1])
        parallel.step(pos[rows], neg[rows], optimizer)
        if own and step == first:
            # On the same process it goes on from its own part.
            of_net, of_optimizer = net.state_dict(), optimizer.state_dict()
            net = case.net()
            net.load_state_dict(of_net)
            optimizer = OPTIMIZERS[case.optimizer](net.parameters())
            optimizer.load_state_dict(of_optimizer)
            parallel = ff.parallel.DataParallel(net, GROUPS.get(size), shard_optimizer=case.shard_optimizer)
    return dict(net.state_dict()), parallel.whole_optimizer_state_dict(optimizer)


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "adagrad", "groups", "asgd"])
def test_saved_state_goes_on_under_any_number_of_processes(processes, optimizer):
    case, saved = Case(optimizer=optimizer, kind="narrow"), None
    for first, size, is_sharded, own in (
        (0, 2, True, False),
        (3, 3, True, True),
        (6, 2, False, False),
        (9, 3, True, False),
    ):
        of_size = case._replace(shard_optimizer=is_sharded)
        each = [(rank,) for rank in range(size)]
        saved, *others = processes.run(resumed, of_size, size, first, saved, own, each=each)
        for net, state in others:
            assert all(torch.equal(tensor, net[name]) for name, tensor in saved[0].items())
            assert all(
                torch.equal(value, state["state"][i][key])
                for i, entry in saved[1]["state"].items()
                for key, value in entry.items()
            )
    assert saved is not None
    net = case.net()
    optimizer_ = OPTIMIZERS[optimizer](net.parameters())
    for step in range(12):
        net.step(*case.batch(step, (12,))[-1][0], optimizer_)
    check_close(saved[0], net.state_dict(), 1e-10)
    expected = optimizer_.state_dict()
    assert saved[1]["param_groups"] == expected["param_groups"]
    assert saved[1]["state"].keys() == expected["state"].keys()
    for i, entry in expected["state"].items():
        assert {key: t.shape for key, t in entry.items()} == {key: t.shape for key, t in saved[1]["state"][i].items()}
        check_close(saved[1]["state"][i], entry, 1e-10)


def with_hook(net: ff.FFNetwork, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    optimizer.register_step_pre_hook(lambda *_: None)
    return optimizer


class OwnAdam(Adam):
    pass


REFUSED: dict[str, tuple[Callable[[ff.FFNetwork], Any], type[Exception], str]] = {
    "of a matrix": (
        lambda net: [Muon([net.layers[0].weight]), None, None],
        TypeError,
        r"net\.layers\[0\]: optimizer is a Muon, of which nobody knows.*accepted under shard_optimizer=True: SGD, SGDW",
    ),
    "subclass": (lambda net: OwnAdam(net.parameters()), TypeError, r"optimizer is a OwnAdam, of which nobody knows"),
    "step hooks": (
        lambda net: with_hook(net, SGD(net.parameters(), lr=0.1)),
        ValueError,
        r"net\.layers\[0\]: optimizer \(SGD\): there are step hooks.*this process's rows alone",
    ),
    "other parameters": (
        lambda net: SGD([net.layers[0].weight, net.layers[0].bias], lr=0.1),
        ValueError,
        r"net\.layers\[1\]: optimizer \(SGD of 2 parameters\) does not hold weight \(16, 20\)",
    ),
    "too few": (lambda net: [None], ValueError, r"optimizers has 1 entries"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_optimizers_that_cannot_step_on_rows_are_refused_by_name(alone, kind):
    net = Case().net()
    parallel = ff.parallel.DataParallel(net, shard_optimizer=True)
    make, error, text = REFUSED[kind]
    optimizer = make(net)
    (pos, neg), _ = Case().batch(0, (4,))[-1]
    with pytest.raises(error, match=text):
        parallel.step(pos, neg, optimizer)
    for name, tensor in Case().net().state_dict().items():
        assert torch.equal(net.state_dict()[name], tensor), name


def test_what_else_is_refused_by_name(alone):
    net = Case().net()
    with pytest.raises(TypeError, match="shard_optimizer=1 is not a bool"):
        ff.parallel.DataParallel(net, shard_optimizer=1)
    parallel = ff.parallel.DataParallel(net, shard_optimizer=True)
    optimizer = Adam(net.parameters(), lr=0.01)
    (pos, neg), _ = Case().batch(0, (4,))[-1]
    parallel.step(pos, neg, optimizer)
    with pytest.raises(TypeError, match=r"optimizer is a list; accepted: a torch\.optim\.Optimizer"):
        parallel.whole_optimizer_state_dict([optimizer])
    for to in (1, -1, True, "0"):
        with pytest.raises(ValueError, match=r"to=.*; accepted: a rank from 0 to 0, or None"):
            parallel.whole_optimizer_state_dict(optimizer, to)
    before = state_of(net, optimizer)
    kept = optimizer.state[net.layers[1].weight]
    # The part of one of two processes.
    optimizer.state[net.layers[1].weight] = {key: t[:8] if t.dim() else t for key, t in kept.items()}
    with pytest.raises(
        ValueError, match=r"net\.layers\[1\]: the optimizer's exp_avg is \(8, 20\); accepted: \(16, 20\)"
    ):
        parallel.step(pos, neg, optimizer)
    optimizer.state[net.layers[1].weight] = kept
    hook = net.layers[2].bias.register_hook(lambda gradient: gradient)
    with pytest.raises(ValueError, match=r"net\.layers\[2\]: bias has gradient hooks, but no process has its whole"):
        parallel.step(pos, neg, optimizer)
    hook.remove()
    for name, tensor in state_of(net, optimizer).items():
        assert torch.equal(before[name], tensor), name
    parallel.step(pos, neg, optimizer)
    assert not torch.equal(before["layers.2.bias"], net.layers[2].bias)


def other_flags(rank: int) -> str:
    """What a process says of another one that shards while it does not."""
    try:
        ff.parallel.DataParallel(Case().net(), GROUPS.get(2), shard_optimizer=rank == 0)
    except ValueError as error:
        return str(error)
    return ""


def test_processes_must_agree_to_shard(processes):
    for said in processes.run(other_flags, each=[(0,), (1,)]):
        assert "or they are divided otherwise there" in said


@pytest.mark.parametrize(
    ("wrong", "text"), [("columns", "x_pos has 11 columns"), ("optimizer", "does not hold weight")]
)
def test_what_one_process_refuses_all_refuse(processes, wrong, text):
    case = Case(shard_optimizer=True)
    (first, is_as_before), (last, last_is) = processes.run(refused, case, wrong, 2, each=[(0,), (1,)])
    assert text in last
    assert "another process refused" in first
    assert is_as_before
    assert last_is


def test_a_killed_process_ends_the_others(processes):
    with pytest.raises(Failed, match="rank 2: died") as failed:
        processes.run(killed, "shards", 3, each=[(rank,) for rank in range(3)])
    for text, is_whole in failed.value.values[:-1]:
        assert "another process died, or did not answer within the timeout" in text
        assert is_whole


def test_a_step_that_fails_in_its_midst_leaves_all_weights_as_they_were():
    """Sums of lower layers are there, but what the rule has made of them reaches nobody."""
    short_of_patience = Processes(2, timeout=4)
    (errors, state), (own, other) = short_of_patience.run(failing, 2, True, each=[(0,), (1,)])
    short_of_patience.stop()
    assert "a loss of inf" in own[0]
    assert "ProcessLost: another process died, or did not answer" in errors[0]
    assert ["no longer at the same step" in text for text in (errors[1], own[1])] == [True, True]
    for name, tensor in Case().net().state_dict().items():
        assert torch.equal(tensor, state[name]), name
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("batch_norm", [None, "behind"])
def test_layer_by_layer(processes, batch_norm):
    options = () if batch_norm is None else (("batch_norm", batch_norm),)
    case = Case("cross_entropy", options=options, sync_batch_norm=batch_norm is not None, shard_optimizer=True)
    found = processes.run(layer_by_layer, case, (4, 0, 5), each=[(rank,) for rank in range(3)])
    expected, losses = layer_by_layer(case, (4, 0, 5), -1)
    for state, of_rank in found:
        torch.testing.assert_close(of_rank, losses, rtol=1e-10, atol=1e-12)
        check_close(state, expected, 1e-10)


def without_scattering(case: Case, splits: tuple[int, ...], rank: int) -> tuple[dict[str, Tensor], Tensor]:
    """`trained_together` over a group that only sums."""

    def missing(*_: object, **__: object) -> None:
        raise RuntimeError("no backend of this group does that")

    before = shards.REDUCE_SCATTER, shards.ALL_GATHER
    shards.REDUCE_SCATTER = shards.ALL_GATHER = missing
    try:
        return trained_together(case, splits, rank)
    finally:
        shards.REDUCE_SCATTER, shards.ALL_GATHER = before


def test_a_group_that_only_sums(processes):
    case, splits = Case(kind="narrow", shard_optimizer=True), (4, 3, 2)
    found = processes.run(without_scattering, case, splits, each=[(rank,) for rank in range(3)])
    expected, losses = trained_alone(case, splits)
    for state, of_rank in found:
        torch.testing.assert_close(of_rank, losses, rtol=1e-10, atol=1e-12)
        check_close(state, expected, 1e-10)
        for name, tensor in found[0][0].items():
            assert torch.equal(tensor, state[name]), name


def mixed(rank: int) -> dict[str, Any]:
    """A layer without an optimizer, one that is frozen, and one under an optimizer that holds something else too."""
    net, beside = Case().net(), nn.Parameter(torch.ones(3))
    net.layers[1].requires_grad_(False)
    optimizer = Adam([beside, *net.layers[2].parameters()], lr=0.003, eps=1e-3)
    beside.grad = torch.ones(3)
    of_all: Any = net
    if rank >= 0:
        of_all = ff.parallel.DataParallel(net, GROUPS.get(2), shard_optimizer=True)
    of_all.step(*Case().batch(0, (4, 6))[rank][0], [None, None, optimizer])
    state = of_all.whole_optimizer_state_dict(optimizer, 1) if rank >= 0 else optimizer.state_dict()
    beside.grad = None
    return {"weights": dict(net.state_dict()), "gradient": net.layers[0].weight.grad, "state": state, "beside": beside}


def test_layers_without_an_optimizer_and_what_an_optimizer_holds_besides(processes):
    first, last = processes.run(mixed, each=[(0,), (1,)])
    expected = mixed(-1)
    assert first["state"] == {}
    for found in (first, last):
        check_close(found["weights"], expected["weights"], 1e-10)
        torch.testing.assert_close(found["gradient"], expected["gradient"])
        assert torch.equal(found["beside"], expected["beside"])
    assert last["state"]["state"].keys() == expected["state"]["state"].keys() == {1, 2}
    for i, entry in expected["state"]["state"].items():
        check_close(last["state"]["state"][i], entry, 1e-10)


def test_whole_state_and_a_step_without_shards(alone):
    """Nothing is sharded: it is the optimizer's own."""
    net = Case().net()
    parallel = ff.parallel.DataParallel(net)
    optimizer = Adam(net.parameters(), lr=0.01)
    parallel.step(*Case().batch(0, (4,))[-1][0], optimizer)
    found, own = parallel.whole_optimizer_state_dict(optimizer), optimizer.state_dict()
    assert found["param_groups"] == own["param_groups"]
    for i, entry in own["state"].items():
        for key, tensor in entry.items():
            assert torch.equal(found["state"][i][key], tensor)
            assert found["state"][i][key].data_ptr() != tensor.data_ptr()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("outputs", ["pre", "post"])
def test_on_a_gpu_by_nccl(tmp_path, outputs):
    dist.init_process_group("nccl", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        case = Case(outputs=outputs, dtype=torch.float32)
        alone, net = case.net().cuda(), case.net().cuda()
        rows = [x.cuda() for x in case.batch(0, (6,))[-1][0]]
        alone.step(*rows, OPTIMIZERS["sgd"](alone.parameters()))
        optimizer = OPTIMIZERS["sgd"](net.parameters())
        parallel = ff.parallel.DataParallel(net, shard_optimizer=True)
        parallel.step(*rows, optimizer)
        check_close(net.state_dict(), alone.state_dict(), 1e-5)
        whole = parallel.whole_optimizer_state_dict(optimizer)
        assert {t.device.type for entry in whole["state"].values() for t in entry.values()} == {"cpu"}
    finally:
        dist.destroy_process_group()
