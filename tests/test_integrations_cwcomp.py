"""CwComp's layer by its contract: numbers by autograd, and what programs read, call, change and save."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

from ffkernels.integrations.cwcomp import Conv_Layer

from .steps import error

pytestmark = pytest.mark.usefixtures("fresh_warnings")
LOSSES = ("CwC", "CwC_CE", "PvN", "CWG")


def loss_of(name: str, goodness: Tensor, labels: Tensor) -> Tensor:
    own = goodness.gather(1, labels[:, None])
    others = (goodness.sum(1, keepdim=True) - own) / (goodness.shape[1] - 1)
    cross = F.cross_entropy(goodness, labels)
    pvn = torch.logaddexp(torch.cat([2 - own, others - 2]), torch.zeros(())).mean()
    if name == "CwC":
        power = goodness.clamp(-50, 50).exp()
        return -((own.clamp(-50, 50).exp() + 1e-9).log() - (power.sum(1, keepdim=True) + 1e-9).log()).mean()
    return {"CwC_CE": cross, "PvN": pvn, "CWG": 0.28 * cross + 0.72 * pvn}[name]


class Theirs(nn.Module):
    """The original's formulas, by autograd, on a copy of a layer's parameters."""

    def __init__(self, layer: Conv_Layer) -> None:
        super().__init__()
        self.of = copy.deepcopy(layer)
        self.opt = Adam(self.of.parameters(), lr=0.01)

    def forward(self, x: Tensor) -> Tensor:
        of = self.of
        x = F.relu(F.conv2d(x, of.weight, of.bias, of.stride, of.padding, groups=of.groups))
        return of.conv_bn(F.max_pool2d(x, 2) if of.ismaxpool else x)

    def forward_forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        y = self(x)
        goodness = torch.stack([part.pow(2).mean((1, 2, 3)) for part in y.split(y.shape[1] // 5, 1)], 1)
        labels = labels if self.of.ClassGroups is None else labels // self.of.ClassGroups
        loss = loss_of(self.of.loss_criterion, goodness, labels)
        self.opt.zero_grad()
        loss.backward()
        self.opt.step()
        return y.detach(), loss.detach()


def network(loss: str, dtype: torch.dtype = torch.float64, **options) -> list[Conv_Layer]:
    torch.manual_seed(1)
    dims, layers = [2, 9, 9], []
    for i, channels in enumerate((10, 20)):
        layer = Conv_Layer(
            dims, dims[0], channels, 5, 3, maxpool=i % 2 == 1, groups=5 if i % 2 else 1, loss_criterion=loss, **options
        )
        layer.to(dtype)
        layer.opt = Adam(layer.parameters(), lr=0.01)
        layers.append(layer)
        dims = layer.next_dims
    return layers


def assert_same(ours: list[Conv_Layer], theirs: list[Theirs], tolerance: float) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        for name, value in other.of.state_dict().items():
            assert error(mine.state_dict()[name], value, 1.0) <= tolerance, name


@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("loss", LOSSES)
def test_steps_are_the_originals(loss, groups):
    ours = network(loss, ClassGroups=groups)
    theirs = [Theirs(layer) for layer in ours]
    for _ in range(5):
        x = h = torch.randn(12, 2, 9, 9, dtype=torch.float64)
        labels = torch.randint(5 * (groups or 1), (12,))
        for mine, other in zip(ours, theirs, strict=True):
            x = mine.forward_forward(x, labels, False)
            h, value = other.forward_forward(h, labels)
            assert error(x, h) <= 1e-10 and error(mine.loss, value) <= 1e-10
            assert not x.requires_grad
    assert_same(ours, theirs, 1e-10)


def test_layers_outside_their_window_and_prediction():
    ours = network("CwC_CE")
    theirs = [Theirs(layer) for layer in ours]
    x, labels = torch.randn(12, 2, 9, 9, dtype=torch.float64), torch.randint(5, (12,))
    mine = ours[1].forward_forward(ours[0].ff_infer(x), labels, False)
    with torch.no_grad():
        below = theirs[0](x)
    other, _ = theirs[1].forward_forward(below, labels)
    assert error(mine, other) <= 1e-10
    assert_same(ours, theirs, 1e-10)
    for layer in (*ours, *theirs):
        layer.eval()
    h, g = x, x
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine(h), mine.ff_infer(h))
        h, g = mine.ff_infer(h), other(g)
        assert error(h, g) <= 1e-12


def test_what_programs_read_and_save(capsys):
    layer = Conv_Layer([1, 28, 28], 1, 80, kernel_size=3, groups=1)
    assert capsys.readouterr().out == "[1, 28, 28] 15680\n"
    assert list(layer.state_dict()) == [
        "weight", "bias", "conv_bn.weight", "conv_bn.bias", "conv_bn.running_mean", "conv_bn.running_var",
        "conv_bn.num_batches_tracked",
    ]  # fmt: skip
    assert [name for name, _ in layer.named_children()] == ["maxpool", "conv_bn", "dropout"]
    assert (layer.dims, layer.outc, layer.outsize, layer.wsz, layer.kernel_size) == ([1, 28, 28], 80, 14, 14, 3)
    assert (layer.N_neurons_out, layer.next_dims, layer.num_classes, layer.threshold) == (15680, [80, 14, 14], 10, 2.0)
    assert layer.lr == 0.01 and layer.conv_bn.eps == 1e-4 and isinstance(layer.opt, Adam) and layer.gf is None
    x, labels = torch.rand(6, 1, 28, 28), torch.arange(6)
    layer.forward_forward(x, labels, True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "-" * 30 and lines[1].startswith("g_pos_CW: ") and ", g_neg_CW:" in lines[1]
    assert lines[2] == f"Loss: {layer.loss}"
    layer.forward_forward(x, labels, False)
    assert capsys.readouterr().out == ""
    losses = [float(loss) for loss in layer.ep_losses]
    assert layer.epoch_loss() == pytest.approx(sum(losses) / 2) and layer.ep_losses == []
    own, others, goodness = layer.goodness_factorCW(layer(x), labels)
    assert own.shape == others.shape == (6, 1) and goodness.shape == layer.gf.shape == (6, 10)
    torch.testing.assert_close(own[:, 0], goodness[torch.arange(6), labels])


def plain_pair(**options) -> tuple[Conv_Layer, Theirs]:
    layer = network("CwC_CE", **options)[0]
    return layer, Theirs(layer)


def test_what_a_program_has_changed_is_obeyed():
    x, labels = torch.randn(12, 2, 9, 9, dtype=torch.float64), torch.randint(5, (12,))
    for change, reason in (
        (lambda of: of.register_forward_hook(lambda *_: None), "hooks watch it"),
        (lambda of: of.weight.requires_grad_(False), "weight is frozen"),
        (lambda of: of.setdropout(0.5), "it drops 0.5 of its input"),
    ):
        layer, theirs = plain_pair()
        change(layer), change(theirs.of)
        torch.manual_seed(4)
        with pytest.warns(UserWarning, match=reason):
            y = layer.forward_forward(x, labels, False)
        torch.manual_seed(4)
        dropped = theirs.of.dropout(x)
        expected, _ = theirs.forward_forward(dropped, labels)
        assert error(y, expected) <= 1e-10, reason
        assert_same([layer], [theirs], 1e-10)


def test_gradient_hooks_run_without_a_warning():
    x, labels = torch.randn(12, 2, 9, 9, dtype=torch.float64), torch.randint(5, (12,))
    layer, theirs = plain_pair()
    for of in (layer, theirs.of):
        of.weight.register_hook(lambda g: g * (g > 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.forward_forward(x, labels, False)
    theirs.forward_forward(x, labels)
    assert_same([layer], [theirs], 1e-10)


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="loss_criterion='CE' is not one of"):
        Conv_Layer([1, 9, 9], loss_criterion="CE")
    with pytest.raises(ValueError, match="num_classes=10 does not divide out_channels=8"):
        Conv_Layer([1, 9, 9])


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_float32_is_as_near_to_float64_as_the_original(compute_dtype):
    exact = network("CwC_CE")
    single = [copy.deepcopy(layer).float() for layer in exact]
    theirs = [Theirs(layer) for layer in single]
    for layer in single:
        layer.opt, layer.compute_dtype = Adam(layer.parameters(), lr=0.01), compute_dtype
    torch.manual_seed(5)
    for _ in range(3):
        x = torch.randn(12, 2, 9, 9).bfloat16().double()
        labels = torch.randint(5, (12,))
        h = [x, x.float(), x.float()]
        for layer, mine, other in zip(exact, single, theirs, strict=True):
            h[0] = layer.forward_forward(h[0], labels, False)
            h[1] = mine.forward_forward(h[1], labels, False)
            with torch.autocast("cpu", torch.bfloat16, enabled=compute_dtype is not None):
                y = other(h[2])
            goodness = torch.stack([part.float().pow(2).mean((1, 2, 3)) for part in y.split(y.shape[1] // 5, 1)], 1)
            other.opt.zero_grad()
            F.cross_entropy(goodness, labels).backward()
            other.opt.step()
            h[2] = y.detach().float()
            assert h[1].dtype == torch.float32
            budget = 2 * error(h[2], h[0]) + (1e-5 if compute_dtype is None else 1e-2)
            assert error(h[1], h[0]) <= budget
