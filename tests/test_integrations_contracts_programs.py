"""What programs do with copied code: how they make its classes, what they read, call, log and save, what they change.

The tables are the originals' own, in names and shapes; the numbers are those of the originals' formulas by autograd.
"""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam

from ffkernels.integrations import common, contracts

from .steps import error
from .test_integrations_contracts import LinearReLU, TheirModel, direction, signed, softplus, their_signed_step

EXACT = 1e-10


@pytest.fixture(autouse=True)
def fresh_warnings():
    common.warn_once.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield
    common.warn_once.cache_clear()


def rows(n: int = 6, width: int = 12) -> Tensor:
    return torch.rand(n, width, dtype=torch.float64)


def assert_same(a: nn.Module, b: nn.Module, tolerance: float = EXACT) -> None:
    mine = dict(a.named_parameters())
    for name, value in b.named_parameters():
        assert error(mine[name], value) <= tolerance, name


# How the originals' classes are made, and what is there afterwards.

INNER_LOOP = [
    ((nn.ReLU(),), {}, {"activation": nn.ReLU}),
    ((nn.GELU(), None, 1.5, 3), {}, {"activation": nn.GELU, "threshold": 1.5, "layer_iters": 3}),
    ((nn.ReLU(), None, 2.0, 10, True, "cpu", torch.float64), {}, {"activation": nn.ReLU, "layer_iters": 10}),
    ((), {"activation": nn.LeakyReLU(), "layer_iters": 4}, {"activation": nn.LeakyReLU, "layer_iters": 4}),
    ((nn.Tanh,), {"threshold": 0.5}, {"activation": nn.Tanh, "threshold": 0.5}),
    ((), {"activation": "silu", "bias": True, "device": None, "dtype": None}, {"activation": nn.SiLU}),
    ((), {}, {"activation": nn.GELU, "threshold": 2.0, "layer_iters": 10}),
]


@pytest.mark.parametrize(("args", "options", "expected"), INNER_LOOP)
def test_inner_loop_layer_is_made_as_the_original_is(args, options, expected):
    layer = contracts.InnerLoopLayer(20, 16, *args, **options)
    for name, value in expected.items():
        assert type(getattr(layer, name)) is value if isinstance(value, type) else getattr(layer, name) == value, name
    assert [name for name, _ in layer.named_children()] == ["activation"] and "(activation)" in repr(layer)
    assert list(layer.state_dict()) == ["weight", "bias"] and layer.weight.shape == (16, 20)
    assert type(layer.opt) is Adam and layer.opt.param_groups[0]["lr"] == 0.03


GREEDY = [
    ((), {}),
    ((True,), {}),
    ((True, "cpu", torch.float64), {}),
    ((), {"bias": True, "device": None, "dtype": None}),
]


@pytest.mark.parametrize(("args", "options"), GREEDY)
def test_greedy_layer_is_made_as_the_original_is(args, options):
    layer = contracts.GreedyLayer(20, 16, *args, **options)
    assert (layer.threshold, layer.num_epochs, type(layer.opt), type(layer.relu)) == (2.0, 1000, Adam, nn.ReLU)
    assert [name for name, _ in layer.named_children()] == ["relu"] and "(relu): ReLU()" in repr(layer)
    assert list(layer.state_dict()) == ["weight", "bias"] and layer.opt.param_groups[0]["lr"] == 0.03


MISTAKES = [
    (lambda: contracts.InnerLoopLayer(4, 3, True), "activation=True is not a module or function"),
    (
        lambda: contracts.InnerLoopLayer(4, 3, "tanh"),
        "activation='tanh' is not a module or function, nor one of",
    ),
    (lambda: contracts.InnerLoopLayer(4, 3, optimizer=Adam), "is not an optimizer; accepted: a torch.optim object"),
    (lambda: contracts.GreedyLayer(4, 3, log_interval=0), "log_interval=0 is not an integer >= 1"),
    (lambda: contracts.SignedLayer(12, 10), "missing"),
    (lambda: contracts.SignedLayer(12, "Adam", {}, "alternative_loss_fn"), "layer=12 is not a module"),
    (lambda: contracts.SignedLayer(LinearReLU(3, 3), "Adam", {}), "loss_fn_name='loss_fn' is not here"),
]


@pytest.mark.parametrize(("call", "message"), MISTAKES)
def test_mistakes_are_named(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


# Greedy and inner-loop layers: what a program changes is obeyed.


class Plain:
    """Both originals' layer by autograd, on the same module: its weights, optimizer and attributes."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.greedy = isinstance(layer, contracts.GreedyLayer)

    def activities(self, x: Tensor) -> Tensor:
        act = self.layer.relu if self.greedy else self.layer.activation
        return act(direction(x, 1e-4) @ self.layer.weight.t() + self.layer.bias)

    def learn(self, x_pos: Tensor, x_neg: Tensor) -> tuple[Tensor, Tensor]:
        layer = self.layer
        for _ in range(layer.num_epochs if self.greedy else layer.layer_iters):
            g_pos, g_neg = (self.activities(x).pow(2).mean(1) for x in (x_pos, x_neg))
            loss = softplus(torch.cat([layer.threshold - g_pos, g_neg - layer.threshold])).mean()
            layer.opt.zero_grad()
            loss.backward(retain_graph=True)
            layer.opt.step()
        return self.activities(x_pos), self.activities(x_neg)


def made(kind: str, dtype: torch.dtype = torch.float64) -> Any:
    if kind == "greedy":
        return contracts.GreedyLayer(12, 10, dtype=dtype, num_epochs=4, threshold=0.3)
    return contracts.InnerLoopLayer(12, 10, nn.GELU(), None, 0.3, 4, dtype=dtype)


def learn(layer: Any, x_pos: Tensor, x_neg: Tensor) -> tuple[Tensor, Tensor]:
    return layer.train(x_pos, x_neg) if isinstance(layer, contracts.GreedyLayer) else layer(x_pos, x_neg)


def replace_activation(layer: Any, activation: Any) -> None:
    name = layer.PARTS[0]
    if not isinstance(activation, nn.Module):
        delattr(layer, name)  # torch lets no function take the place of a module
    setattr(layer, name, activation)


def capped(layer: Any) -> None:
    act = getattr(layer, layer.PARTS[0])
    act.forward = lambda z: z.clamp(0, 0.2)


def watched(layer: Any) -> None:
    getattr(layer, layer.PARTS[0]).register_forward_hook(lambda module, x, y: 2 * y)


def rescaled(layer: Any) -> None:
    nn.utils.parametrizations.weight_norm(layer)
    layer.opt = Adam(layer.parameters(), lr=0.01)


def its_own_loss_threshold(layer: Any) -> None:
    layer.threshold = torch.tensor(0.7, dtype=torch.float64)


CHANGES = {
    "leaky relu": (lambda layer: replace_activation(layer, nn.LeakyReLU()), None),
    "silu function": (lambda layer: replace_activation(layer, F.silu), None),
    "sgd": (lambda layer: setattr(layer, "opt", SGD(layer.parameters(), lr=0.1, momentum=0.9)), None),
    "threshold": (lambda layer: setattr(layer, "threshold", 1.5), None),
    "steeper leaky relu": (lambda layer: replace_activation(layer, nn.LeakyReLU(0.3)), r"activation LeakyReLU\("),
    "tanh": (lambda layer: replace_activation(layer, nn.Tanh()), r"activation Tanh\(\) is not one of"),
    "activation's own forward": (capped, "activation .* is not one of"),
    "watched activation": (watched, "hooks watch its activation"),
    "mask of a gradient": (
        lambda layer: layer.weight.register_hook(lambda g: g * (g > 0)),
        "weight has gradient hooks",
    ),
    "clamp of a bias": (lambda layer: layer.bias.register_hook(lambda g: g.clamp(max=0)), "bias has gradient hooks"),
    "frozen weight": (lambda layer: layer.weight.requires_grad_(False), "weight is frozen"),
    "frozen bias": (lambda layer: layer.bias.requires_grad_(False), "bias is frozen"),
    "half of the optimizer": (lambda layer: setattr(layer, "opt", SGD([layer.weight], lr=0.1)), "does not hold bias"),
    "weight norm": (rescaled, "weight is frozen or computed from other parameters"),
    "threshold tensor": (its_own_loss_threshold, "threshold tensor.* is not a finite number"),
}


@pytest.mark.parametrize("kind", ["greedy", "inner loop"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_a_program_changes_is_obeyed(kind, change):
    ours, theirs = made(kind), made(kind)
    theirs.load_state_dict(ours.state_dict())
    act, message = CHANGES[change]
    for layer in (ours, theirs):
        act(layer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            x_pos, x_neg = rows(), rows(5)
            h = learn(ours, x_pos, x_neg)
            expected = Plain(theirs).learn(x_pos, x_neg)
            for a, b in zip(h, expected, strict=True):
                assert error(a, b) <= EXACT and not a.requires_grad
    assert [bool(re.search(f"runs on its original path: .*{message}", str(w.message))) for w in caught] == (
        [True] * (message is not None)
    )
    assert_same(ours, theirs)


class Doubled(contracts.GreedyLayer):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class DoubledPass(contracts.InnerLoopLayer):
    def forward_pass(self, x: Tensor) -> Tensor:
        return 2 * super().forward_pass(x)


@pytest.mark.parametrize("kind", ["subclass", "replaced"])
@pytest.mark.parametrize(
    ("which", "subclass", "name"), [("greedy", Doubled, "forward"), ("inner", DoubledPass, "forward_pass")]
)
def test_an_overridden_or_replaced_forward_is_obeyed(which, subclass, name, kind):
    ours, theirs = made(which), made(which)
    theirs.load_state_dict(ours.state_dict())
    if kind == "subclass":
        ours.__class__ = subclass
    else:
        method = getattr(ours, name)
        setattr(ours, name, lambda x: 2 * method(x))
    plain = Plain(theirs)
    activities = plain.activities
    plain.activities = lambda x: 2 * activities(x)  # type: ignore[method-assign]
    x_pos, x_neg = rows(), rows()
    with pytest.warns(UserWarning, match=rf"\.{name} is overridden"):
        h = learn(ours, x_pos, x_neg)
    for a, b in zip(h, plain.learn(x_pos, x_neg), strict=True):
        assert error(a, b) <= EXACT
    assert_same(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["greedy", "inner loop"])
def test_a_layer_cast_to_a_narrow_dtype_trains_as_the_original_does(kind, dtype):
    ours, theirs = (made(kind, torch.float32).to(dtype) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    for layer in (ours, theirs):
        layer.opt = SGD(layer.parameters(), lr=0.1)
    before = ours.weight.detach().clone()
    x_pos, x_neg = rows().to(dtype), rows().to(dtype)
    with pytest.warns(UserWarning, match=f"weight is {dtype}"):
        h = learn(ours, x_pos, x_neg)
    for a, b in zip(h, Plain(theirs).learn(x_pos, x_neg), strict=True):
        assert error(a, b) <= torch.finfo(dtype).eps
    assert not torch.equal(ours.weight, before)
    assert_same(ours, theirs, torch.finfo(dtype).eps)


@pytest.mark.parametrize("kind", ["greedy", "inner loop"])
def test_saliency_and_backprop_reach_the_input_and_the_layer_below(kind):
    ours, theirs = ([made(kind), contracts.GreedyLayer(10, 7, dtype=torch.float64)] for _ in range(2))
    for mine, other in zip(ours, theirs, strict=True):
        other.load_state_dict(mine.state_dict())
    x = rows()
    for layer in ours:
        nn.Module.eval(layer)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    h = ours[1](ours[0](a))
    expected = Plain(theirs[1]).activities(Plain(theirs[0]).activities(b))
    assert error(h, expected) <= EXACT
    h.square().sum().backward()
    expected.square().sum().backward()
    assert error(a.grad, b.grad) <= EXACT
    for mine, other in zip(ours, theirs, strict=True):
        for p, q in zip(mine.parameters(), other.parameters(), strict=True):
            assert error(p.grad, q.grad) <= EXACT
    tangent = torch.rand_like(x)
    found = torch.func.jvp(lambda x: ours[0](x), (x,), (tangent,))[1]
    assert error(found, torch.func.jvp(Plain(theirs[0]).activities, (x,), (tangent,))[1]) <= EXACT


def test_rows_that_wait_for_a_gradient_in_training_get_it():
    """FFPytorch's steps leave the sum of their gradients in the rows; its outputs hang on them."""
    ours, theirs = made("inner loop"), made("inner loop")
    theirs.load_state_dict(ours.state_dict())
    x, x_neg = rows(), rows()
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    with pytest.warns(UserWarning, match="x_pos or x_neg waits for a gradient"):
        h = ours(a, x_neg)
    expected = Plain(theirs).learn(b, x_neg)
    (h[0].sum() + h[1].sum()).backward()
    (expected[0].sum() + expected[1].sum()).backward()
    assert error(a.grad, b.grad) <= EXACT
    assert_same(ours, theirs)


def test_greedy_layer_reads_arguments_and_prints_losses_as_pytorch_examples_does(capsys):
    args = SimpleNamespace(epochs=8, lr=0.02, threshold=1.5, log_interval=3)
    layer = contracts.GreedyLayer(
        12, 10, dtype=torch.float64,
        lr=args.lr, threshold=args.threshold, num_epochs=args.epochs, log_interval=args.log_interval,
    )  # fmt: skip
    theirs = copy.deepcopy(layer)
    x_pos, x_neg = rows(), rows()
    expected = []
    for _ in range(8):
        theirs.num_epochs = 1
        with torch.no_grad():
            g = [Plain(theirs).activities(x).pow(2).mean(1) for x in (x_pos, x_neg)]
            expected.append(softplus(torch.cat([1.5 - g[0], g[1] - 1.5])).mean().item())
        Plain(theirs).learn(x_pos, x_neg)
    for hooked in (False, True):
        each = copy.deepcopy(layer)
        if hooked:
            each.weight.register_hook(lambda g: g)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            each.train(x_pos, x_neg)
        lines = capsys.readouterr().out.splitlines()
        assert [line.rsplit(" ", 1)[0] for line in lines] == ["Loss: "] * 3
        found = [float(line.split()[1]) for line in lines]
        assert found == pytest.approx([expected[i] for i in (0, 3, 6)], rel=1e-12)
        assert_same(each, theirs)
    assert layer.opt.param_groups[0]["lr"] == 0.02


def test_layers_that_the_original_has_pickled_train_on():
    """A pickle has the original's attributes alone, under a name that is this class now."""
    layer = made("greedy")
    old = contracts.GreedyLayer.__new__(contracts.GreedyLayer)
    ours_only = ("compute_dtype", "backend", "log_interval")
    state = copy.deepcopy({k: v for k, v in vars(layer).items() if k not in ours_only})
    old.__setstate__(state)
    copied = pickle.loads(pickle.dumps(old))
    x_pos, x_neg = rows(), rows()
    Plain(layer).learn(x_pos, x_neg)
    for each in (old, copied):
        each.train(x_pos, x_neg)
        assert_same(each, layer)


def test_nets_of_the_originals_stay_theirs():
    """Their Net keeps layers in a list, hands one's activities to the next, and predicts by goodness."""
    layers = [contracts.GreedyLayer(a, b, dtype=torch.float64, num_epochs=3) for a, b in ((12, 10), (10, 8))]
    plain = [Plain(copy.deepcopy(layer)) for layer in layers]
    h, expected = ((rows(), rows()),) * 2
    for layer, other in zip(layers, plain, strict=True):
        h = layer.train(*h)
        expected = tuple(t.detach() for t in other.learn(*expected))
    x = rows(20)
    goodness, total = x, 0
    for layer in layers:
        goodness = layer(goodness)
        total = total + goodness.pow(2).mean(1)
    for other in plain:
        x = other.activities(x)
        total = total - x.pow(2).mean(1)
    assert total.abs().max() <= EXACT


# loeweX


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


def seen(model: Any, calls: list[Tensor]) -> None:
    model.model[0].register_forward_hook(lambda module, x, z: calls.append(z))


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


# nebuly


class Normalisation(nn.Module):
    """Stands before every layer of nebuly's net, needs no training, and its goodness counts as zero."""

    requires_training = False

    def forward(self, x: Tensor) -> Tensor:
        return direction(x, 1e-8)

    def positive_eval(self, x: Tensor, theta: float) -> tuple[Tensor, Tensor]:
        return self(x), torch.zeros(len(x))


class TheirSigned(nn.Module):
    requires_training = True

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.optimizer = layer, Adam(layer.parameters(), lr=0.03)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def ff_train(self, x: Tensor, signs: Tensor, theta: float) -> tuple[Tensor, list[float]]:
        y, above = their_signed_step(self, self.optimizer, x.detach(), signs, theta)
        return y.detach(), [above[signs == side].mean().item() for side in (1, -1)]

    @torch.no_grad()
    def positive_eval(self, x: Tensor, theta: float) -> tuple[Tensor, Tensor]:
        return self(x), self(x).square().mean(1) - theta


def progressive(layers: list[Any], x: Tensor, signs: Tensor, x_test: Tensor, theta: float = 1.0) -> tuple[Any, Tensor]:
    """nebuly's program: each entry that requires training is trained on what the ones below give; then its evaluation,
    which leaves out the first two entries."""
    separations = []
    for layer in layers:
        if layer.requires_training:
            separations += [layer.ff_train(x, signs, theta)[1] for _ in range(60)]
        with torch.no_grad():
            x = layer(x)
    total = torch.zeros(len(x_test))
    for i, layer in enumerate(layers):
        x_test, goodness = layer.positive_eval(x_test, theta)
        if i > 1:
            total += goodness
    return separations, total


def test_nebulys_training_and_evaluation_are_its_own():
    torch.manual_seed(3)
    labels = torch.arange(60) % 3
    x = 0.5 * torch.randn(60, 12) + F.one_hot(labels, 12)
    wrong = (labels + 1 + torch.arange(60) // 3 % 2) % 3
    sides = [torch.cat([x, F.one_hot(y, 3)], 1) for y in (labels, wrong)]
    signs = torch.cat([torch.ones(60), -torch.ones(60)])
    under_all = torch.cat([torch.cat([x, F.one_hot(torch.full((60,), k), 3)], 1) for k in range(3)])
    linear = [LinearReLU(15, 30), LinearReLU(30, 20)]
    found = []
    for kind in (signed, TheirSigned):
        layers = [part for each in copy.deepcopy(linear) for part in (Normalisation(), kind(each))]
        separations, goodness = progressive(layers, torch.cat(sides), signs, under_all)
        found.append((torch.tensor(separations), goodness.view(3, -1)))
    assert error(found[0][0], found[1][0]) <= 1e-4 and error(found[0][1], found[1][1]) <= 1e-4
    accuracy = [(goodness.argmax(0) == labels).float().mean() for _, goodness in found]
    assert accuracy[0] == accuracy[1] > 0.5


def test_signed_layer_has_what_nebulys_program_reads():
    layer = signed(LinearReLU(12, 10))
    assert layer.requires_training is True and type(layer.optimizer) is Adam
    assert list(layer.state_dict()) == ["layer.linear.weight", "layer.linear.bias"]
    assert [name for name, _ in layer.named_modules()] == ["", "layer", "layer.linear", "layer.relu"]
    copied = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    x, signs = rows(8).float(), torch.tensor([1.0, -1.0] * 4)
    for each in (layer, copied):
        each.ff_train(x, signs, 1.0)
    assert_same(layer, copied, 0.0)


class Residual(LinearReLU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


class Deeper(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12))


def other_relu(layer: Any) -> None:
    layer.layer.relu = nn.LeakyReLU()


def doubled(module: nn.Module, x: Any, y: Tensor) -> Tensor:
    return 2 * y


ON_NEBULY = {
    "leaky relu": (LinearReLU, other_relu, None),
    "sequential": (lambda a, b: nn.Sequential(nn.Linear(a, b), nn.ReLU()), lambda layer: None, None),
    "tanh": (LinearReLU, lambda layer: setattr(layer.layer, "relu", nn.Tanh()), "activation Tanh"),
    "frozen": (LinearReLU, lambda layer: layer.layer.linear.bias.requires_grad_(False), "bias is frozen"),
    "gradient hook": (
        LinearReLU,
        lambda layer: layer.layer.linear.weight.register_hook(lambda g: 2 * g),
        "gradient hooks",
    ),
    "hook": (
        LinearReLU,
        lambda layer: layer.layer.register_forward_hook(lambda m, x, y: 2 * y),
        "hooks watch its layer",
    ),
    "outer hook": (LinearReLU, lambda layer: layer.register_forward_hook(doubled), "hooks watch it"),
    "residual": (Residual, lambda layer: None, "Residual's forward is not its activation of its linear layer"),
    "deeper": (lambda a, b: Deeper(), lambda layer: None, "layer is a Deeper, not a linear layer and an activation"),
}


@pytest.mark.parametrize("change", ON_NEBULY)
def test_what_a_program_changes_in_nebulys_layer_is_obeyed(change):
    make, act, message = ON_NEBULY[change]
    inner = make(12, 12).double()
    ours, theirs = signed(copy.deepcopy(inner)), TheirSigned(copy.deepcopy(inner))
    for layer in (ours, theirs):
        act(layer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            x, signs = rows(9), torch.where(torch.arange(9) % 3 > 0, 1, -1)
            for a, b in zip(ours.ff_train(x, signs, 0.2), theirs.ff_train(x, signs, 0.2), strict=True):
                assert torch.allclose(torch.as_tensor(a), torch.as_tensor(b), rtol=EXACT, atol=EXACT)
            for a, b in zip(ours.positive_eval(x, 0.2), theirs.positive_eval(x, 0.2), strict=True):
                assert error(a, b) <= EXACT
    assert [bool(re.search(message or "", str(w.message))) for w in caught] == [True] * (message is not None)
    assert_same(ours, theirs)


def test_nebulys_input_gets_its_gradient():
    inner = LinearReLU(12, 10).double()
    x = rows()
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    signed(inner)(a).square().sum().backward()
    inner(b).square().sum().backward()
    assert error(a.grad, b.grad) <= EXACT
