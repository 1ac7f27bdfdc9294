"""What programs do with loeweX's model: what they read, call, log and save, what they change.

The tables are the original's own, in names and shapes; the numbers are those of its formulas by autograd.
"""

from __future__ import annotations

import re
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from ffkernels.integrations import contracts

from .copied_code import (
    EXACT,
    TheirModel,
    assert_same,
)
from .steps import error

pytestmark = pytest.mark.usefixtures("fresh_warnings")


def configuration(**model: Any) -> Any:
    options = {"peer_normalization": 0.03, "momentum": 0.9, "hidden_dim": 9, "num_layers": 3, **model}
    return SimpleNamespace(device="cpu", model=SimpleNamespace(**options), input=SimpleNamespace(batch_size=8))


def images(n: int = 8) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    found = {name: torch.rand(n, 1, 28, 28) for name in ("pos_images", "neg_images", "neutral_sample")}
    return found, {"class_labels": torch.arange(n) % 10}


def optimizer_of(model: Any) -> SGD:
    head = list(model.linear_classifier.parameters())
    rest = [p for p in model.parameters() if all(p is not q for q in head)]
    groups = [{"params": rest, "lr": 1e-2, "weight_decay": 3e-4}, {"params": head, "lr": 1e-1, "weight_decay": 3e-3}]
    return SGD(groups, lr=0.1, momentum=0.9)


def pair(opt: Any, **options: Any) -> tuple[contracts.OneLoopNetwork, TheirModel]:
    ours = contracts.OneLoopNetwork.from_opt(opt, **options)
    theirs = TheirModel(ours, opt.model.peer_normalization, whole_gradient=True)
    return ours, theirs


def their_step(model: TheirModel, optimizer: Any, inputs: dict[str, Tensor], labels: dict[str, Tensor]) -> Any:
    found = model(
        *(inputs[k].flatten(1) for k in ("pos_images", "neg_images", "neutral_sample")), labels["class_labels"]
    )
    optimizer.zero_grad()
    found["Loss"].backward()
    optimizer.step()
    return found


LOGGED = {
    "Loss": (1,), "Peer Normalization": (1,),
    "loss_layer_0": (), "ff_accuracy_layer_0": (), "loss_layer_1": (), "ff_accuracy_layer_1": (),
    "loss_layer_2": (), "ff_accuracy_layer_2": (),
    "classification_loss": (), "classification_accuracy": (),
}  # fmt: skip
VALIDATED = {"Loss": (1,), "classification_loss": (), "classification_accuracy": ()}
SAVED = [f"model.{i}.{name}" for i in range(3) for name in ("weight", "bias")] + ["linear_classifier.0.weight"]
CHILDREN = ["model", "ff_loss", "linear_classifier", "classification_loss"]


def test_loewex_model_has_what_its_program_reads():
    ours, theirs = pair(configuration())
    optimizer = optimizer_of(ours)
    inputs, labels = images()
    logged = ours.train_step(inputs, labels, optimizer)
    their_step(theirs, optimizer_of(theirs), inputs, labels)
    assert {name: tuple(value.shape) for name, value in logged.items()} == LOGGED and list(logged) == list(LOGGED)
    ours.eval()
    with torch.no_grad():
        validated = ours.forward_downstream_classification_model(inputs, labels)
        expected = theirs(inputs["pos_images"].flatten(1), inputs["neg_images"].flatten(1),
                          inputs["neutral_sample"].flatten(1), labels["class_labels"])  # fmt: skip
    assert {name: tuple(v.shape) for name, v in validated.items()} == VALIDATED and list(validated) == list(VALIDATED)
    for name in list(VALIDATED)[1:]:
        assert error(validated[name], expected[name]) <= 1e-5
    assert torch.equal(validated["Loss"], validated["classification_loss"].view(1))
    ours.train()
    assert [name for name, _ in ours.named_children()] == CHILDREN
    assert [name for name in ours.state_dict() if "running_mean" not in name] == SAVED
    assert [m.shape for m in ours.running_means] == [(9,)] * 3 and type(ours.linear_classifier[0]) is nn.Linear
    assert [name for name, _ in ours.named_parameters()] == SAVED and ours.opt.model.num_layers == 3


@pytest.mark.parametrize("loop", ["train_step", "unchanged"])
@pytest.mark.parametrize("model", [{}, {"peer_normalization": 0.5, "momentum": 0.5}, {"peer_normalization": 0},
                                   {"hidden_dim": 7, "num_layers": 2}], ids=str)  # fmt: skip
def test_loewex_options_are_obeyed_by_both_loops(loop, model):
    opt = configuration(**model)
    ours, theirs = (m.double() for m in pair(opt))
    theirs.means = [m.double() for m in theirs.means]
    theirs.momentum = opt.model.momentum
    optimizers = [optimizer_of(m) for m in (ours, theirs)]
    assert [m.out_features for m in ours.layers] == [opt.model.hidden_dim] * opt.model.num_layers
    for step in range(4):
        if step == 2:  # the original reads its configuration at each step
            opt.model.peer_normalization *= 2
            theirs.strength *= 2
        inputs, labels = images()
        inputs = {name: t.double() for name, t in inputs.items()}
        if loop == "train_step":
            logged = ours.train_step(inputs, labels, optimizers[0])
        else:
            optimizers[0].zero_grad()
            logged = ours(inputs, labels)
            logged["Loss"].backward()
            optimizers[0].step()
        expected = their_step(theirs, optimizers[1], inputs, labels)
        assert list(logged) == list(expected)
        for name in set(expected) - ({"Peer Normalization"} if not theirs.strength else set()):
            assert error(logged[name], expected[name]) <= EXACT and logged[name].shape == expected[name].shape, name
        assert_same(ours, theirs)


def test_checkpoints_of_the_original_and_of_the_first_version_load():
    source = contracts.OneLoopNetwork.from_opt(configuration())
    source.train_step(*images(), optimizer_of(source))
    now = source.state_dict()
    original = {name: now[name] for name in SAVED}
    first = {f"layers.{i}.{name}": now[f"model.{i}.{name}"] for i in range(3) for name in ("weight", "bias")}
    first |= {f"layers.{i}.peer_mean": now[f"running_mean_{i}"] for i in range(3)}
    first["linear_classifier.weight"] = now["linear_classifier.0.weight"]
    for state, means in ((now, source.running_means), (original, [torch.full((9,), 0.5)] * 3),
                         (first, source.running_means)):  # fmt: skip
        names = list(state)
        fresh = contracts.OneLoopNetwork.from_opt(configuration())
        fresh.load_state_dict(state)
        assert list(state) == names
        for name in SAVED:
            assert torch.equal(fresh.state_dict()[name], now[name]), name
        for mean, expected in zip(fresh.running_means, means, strict=True):
            assert torch.equal(mean, expected)
    within = nn.Sequential(contracts.OneLoopNetwork.from_opt(configuration()))
    within.load_state_dict({f"0.{name}": value for name, value in original.items()})
    assert torch.equal(within[0].state_dict()["model.2.bias"], now["model.2.bias"])


def test_loewex_weights_start_where_the_original_starts():
    """The same seed draws the same numbers: torch's own for all layers first, then normal ones."""
    torch.manual_seed(42)
    ours = contracts.OneLoopNetwork.from_opt(configuration())
    torch.manual_seed(42)
    linear = [nn.Linear(a, b) for a, b in ((784, 9), (9, 9), (9, 9))]
    nn.Linear(18, 10, bias=False)
    for layer, mine in zip(linear, ours.layers, strict=True):
        nn.init.normal_(layer.weight, std=1 / 3)
        assert torch.equal(mine.weight, layer.weight) and not mine.bias.any()
    assert not ours.linear_classifier[0].weight.any()


ON_LOEWEX = {
    "frozen layer": (lambda m: m.model[0].requires_grad_(False), r"model\[0\]: weight is frozen"),
    "frozen classifier": (lambda m: m.linear_classifier.requires_grad_(False), "linear_classifier is frozen"),
    "frozen bias": (lambda m: m.model[2].bias.requires_grad_(False), r"model\[2\]: bias is frozen"),
    "gradient hook": (lambda m: m.model[1].weight.register_hook(lambda g: 0.5 * g), r"model\[1\]: weight has gradient"),
    "forward hook": (lambda m: m.model[1].register_forward_hook(lambda _, x, z: 2 * z), r"model\[1\]: hooks watch it"),
    "forward": (
        lambda m: setattr(m.model[0], "forward", lambda x, w=m.model[0]: F.linear(x, 2 * w.weight, w.bias)),
        r"model\[0\]: Linear.forward is overridden",
    ),
}


@pytest.mark.parametrize("change", ON_LOEWEX)
def test_what_a_program_changes_in_loewex_model_is_obeyed(change):
    ours, theirs = (m.double() for m in pair(configuration()))
    theirs.means = [m.double() for m in theirs.means]
    act, message = ON_LOEWEX[change]
    for model in (ours, theirs):
        act(model)
    optimizers = [optimizer_of(m) for m in (ours, theirs)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            inputs, labels = images()
            inputs = {name: t.double() for name, t in inputs.items()}
            logged = ours.train_step(inputs, labels, optimizers[0])
            expected = their_step(theirs, optimizers[1], inputs, labels)
            for name, value in expected.items():
                assert error(logged[name], value) <= EXACT and not logged[name].requires_grad, name
    assert len(caught) == 1 and re.search(message, str(caught[0].message))
    assert_same(ours, theirs)
