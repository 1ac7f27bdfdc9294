"""`torch.func` and forward mode: tangents and gradients of the definition, or an error that says what is accepted."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jvp, vmap

import ffkernels as ff
from ffkernels import reference
from ffkernels import validation as check

from .steps import error, problem

EXACT = 1e-10
OPTIONS = {"norm": "l2", "eps": 1e-4, "eps_mode": "add"}


def plain(p, activation):
    def forward(weight, bias):
        y = reference.linear_forward(p.x_pos, weight, bias, activation=activation, **OPTIONS)
        return y, y.square().sum(1)

    return forward


def ours(p, activation, **options):
    return lambda weight, bias: ff.linear_forward(p.x_pos, weight, bias, activation=activation, **OPTIONS, **options)


def parameters(p):
    return p.weight.detach(), p.bias.detach()


def assert_close(a, b, tolerance=EXACT):
    for x, y in zip(a, b, strict=True):
        assert float(y.abs().sum()) > 0 and error(x, y) <= tolerance


@pytest.mark.parametrize("activation", check.ACTIVATIONS)
@pytest.mark.parametrize("known", [False, True])
def test_jvp(activation, known):
    p = problem()
    options = {"input_sumsq": p.x_pos.square().sum(1)} if known else {}
    tangents = tuple(torch.randn_like(t) for t in parameters(p))
    found = [jvp(f, parameters(p), tangents) for f in (ours(p, activation, **options), plain(p, activation))]
    assert_close([*found[0][0], *found[0][1]], [*found[1][0], *found[1][1]])


@pytest.mark.parametrize("of", ["weight", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dual_numbers(of, dtype):
    p, found = problem(dtype=dtype), []
    tangent = torch.randn_like(getattr(p, of).detach())
    for f in (ours(p, "gelu"), plain(p, "gelu")):
        with forward_ad.dual_level():
            values = dict(zip(("weight", "bias"), parameters(p), strict=True))
            values[of] = forward_ad.make_dual(values[of], tangent)
            found.append([forward_ad.unpack_dual(t).tangent for t in f(**values)])
    assert_close(*found, EXACT if dtype == torch.float64 else 1e-5)


def test_grad_and_forward_over_reverse():
    p = problem()
    for transform in (lambda f: grad(f, argnums=(0, 1)), lambda f: jacfwd(grad(f), argnums=(0, 1))):
        found = [
            transform(lambda w, b, f=f: f(w, b)[1].pow(2).sum())(*parameters(p))
            for f in (ours(p, "silu"), plain(p, "silu"))
        ]
        assert_close(*found)


def test_an_ensemble_by_vmap():
    p = problem()
    weights, biases = torch.randn(3, 7, 5, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
    found = [vmap(f)(weights, biases) for f in (ours(p, "relu"), plain(p, "relu"))]
    assert_close(*found)


def test_a_layer_and_a_network():
    """Each layer's goodness has a tangent by its own parameters alone."""
    net = ff.FFNetwork([ff.FFLinear(5, 7, dtype=torch.float64), ff.FFLinear(7, 4, dtype=torch.float64)])
    x = torch.randn(6, 5, dtype=torch.float64)
    values = {name: value.detach() for name, value in net.named_parameters()}
    tangents = {name: torch.randn_like(value) for name, value in values.items()}
    _, found = jvp(lambda v: functional_call(net, v, (x,)), (values,), (tangents,))

    below = net.layers[0](x).detach()

    def last(v):
        return reference.linear_forward(below, v["layers.1.weight"], v["layers.1.bias"], activation="relu", **OPTIONS)

    assert_close([found], [jvp(last, (values,), (tangents,))[1]])


@pytest.mark.parametrize("loss", ["logistic", "symba", "swish"])
@pytest.mark.parametrize("dual", [False, True])
def test_goodness_loss(loss, dual):
    goodness, side = torch.rand(8, dtype=torch.float64) * 4, torch.arange(8) % 2 == 0
    objective, tangent, found = ff.Objective(loss=loss, reduction="sum_of_means"), torch.randn(8).double(), []
    for f in (ff.goodness_loss, lambda g, s, o: reference.loss_of(g, s, o, None)):
        if dual:
            with forward_ad.dual_level():
                result = f(forward_ad.make_dual(goodness, tangent), side, objective)
                found.append(forward_ad.unpack_dual(result).tangent)
        else:
            _, t = jvp(lambda g, f=f: f(g, side, objective), (goodness,), (tangent,))
            found.append(torch.stack([t, *grad(lambda g, f=f: f(g, side, objective))(goodness)]))
    assert_close(found[:1], found[1:])


def test_the_tangent_of_a_threshold():
    goodness, side = torch.rand(8, dtype=torch.float64) * 4, torch.arange(8) % 2 == 0
    at = torch.tensor(2.0, dtype=torch.float64)
    found = []
    with forward_ad.dual_level():
        objective = ff.Objective(threshold=forward_ad.make_dual(at, torch.ones_like(at)))
        for result in (ff.goodness_loss(goodness, side, objective), reference.loss_of(goodness, side, objective, None)):
            found.append([forward_ad.unpack_dual(result).tangent])
    assert_close(*found)


def test_no_derivative_goes_through_the_input():
    p = problem()
    weight, bias = parameters(p)
    with pytest.raises(ValueError, match=r"x carries a derivative and weight and bias do not.*x.detach\(\)"):
        jvp(lambda x: ff.linear_forward(x, weight, bias)[1], (p.x_pos,), (torch.ones_like(p.x_pos),))
    with pytest.raises(ValueError, match="x carries a derivative"):
        grad(lambda x: ff.linear_forward(x, weight, bias)[1].sum())(p.x_pos)
    # Beside the weight's own, the input's is left out, as the algorithm has it.
    t = torch.randn_like(weight)
    both = jvp(lambda x, w: ff.linear_forward(x, w, bias), (p.x_pos, weight), (torch.ones_like(p.x_pos), t))[1]
    assert_close(both, jvp(lambda w: plain(p, "relu")(w, bias), (weight,), (t,))[1])


@pytest.mark.parametrize("how", ["vmap", "jvp", "dual"])
def test_a_step_refuses(how):
    p = problem()
    before = p.weight.detach().clone()

    def step(x):
        return ff.linear_step_(x, p.x_neg, p.weight, p.bias, p.optimizer).loss

    def by_dual_numbers():
        with forward_ad.dual_level():
            step(forward_ad.make_dual(p.x_pos, p.x_pos))

    call = {
        "vmap": lambda: vmap(step)(p.x_pos.expand(2, -1, -1)),
        "jvp": lambda: jvp(step, (p.x_pos,), (p.x_pos,)),
        "dual": by_dual_numbers,
    }[how]
    with pytest.raises(ValueError, match=r"linear_step_ was called on tensors of a torch\.func transform"):
        call()
    assert torch.equal(p.weight, before) and not p.optimizer.state


def test_a_product_is_refused():
    p = problem()
    product = ff.shared_product(p.x_pos, p.weight, 2)
    with pytest.raises(ValueError, match="product came where"):
        jvp(
            lambda w: ff.linear_forward(p.x_pos, w, product=product, label_field=2)[1],
            (p.weight.detach(),), (p.weight.detach(),),
        )  # fmt: skip
