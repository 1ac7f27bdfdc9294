"""Wrong calls as data: a name, the call, the error, and words of its message as a regular expression.

A call is given the problem `p` of `test_wrong_calls.py`: a layer `weight`, `bias` of 7 x 5 with its `optimizer` after a
step, rows `x_pos`, `x_neg`, a running mean `mean`, a network `net`. Whatever it does, none of these may change.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import SGD, Adam

import ffkernels as ff
from ffkernels.negatives import hybrid_images, neutral_label, overlay_label, random_masks, wrong_label
from ffkernels.nn.graphs import GraphedStep


class Wrong(NamedTuple):
    """A call that must raise `error` with a message that `words` matches."""

    name: str
    call: Callable[[Any], object]
    error: type[Exception]
    words: str


HUGE = 10**400
PEER = ff.PeerNormalisation()
F32 = torch.float32


def step(p: Any, **change: Any) -> object:
    """A step of the problem's layer, some of its arguments changed."""
    arguments = {name: getattr(p, name) for name in ("x_pos", "x_neg", "weight", "bias", "optimizer")}
    return ff.linear_step_(**{**arguments, **change})


def threshold(value: Any) -> dict[str, Any]:
    return {"objective": ff.Objective(threshold=value)}


def with_state(p: Any, key: str, value: Any, parameter: str = "weight", **change: Any) -> object:
    """A step of a layer like the problem's whose optimizer keeps `value` under `key`."""
    weight, bias = (nn.Parameter(t.detach().clone()) for t in (p.weight, p.bias))
    optimizer = Adam([weight, bias])
    like = weight if parameter == "weight" else bias
    kept = {"step": torch.tensor(1.0), "exp_avg": torch.zeros_like(like), "exp_avg_sq": torch.zeros_like(like)}
    kept[key] = value
    optimizer.state[like].update({k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in kept.items()})
    before = [weight.detach().clone(), bias.detach().clone()]
    try:
        return step(p, weight=weight, bias=bias, optimizer=optimizer, **change)
    finally:
        assert torch.equal(weight, before[0]) and torch.equal(bias, before[1])


def with_rate(p: Any, rate: Any) -> object:
    weight, bias = (nn.Parameter(t.detach().clone()) for t in (p.weight, p.bias))
    optimizer = SGD([weight, bias], lr=0.1)
    optimizer.param_groups[0]["lr"] = rate
    return step(p, weight=weight, bias=bias, optimizer=optimizer)


def layer(weight: torch.Tensor, bias: torch.Tensor | None = None) -> dict[str, Any]:
    """A weight, a bias and an optimizer that holds them."""
    with torch.inference_mode(weight.is_inference()):
        weight = nn.Parameter(weight)
    bias = None if bias is None else nn.Parameter(bias)
    return {"weight": weight, "bias": bias, "optimizer": SGD([t for t in (weight, bias) if t is not None], lr=0.1)}


def nested() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.ones(5), torch.ones(5)])


def jagged() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.ones(2, 5), torch.ones(3, 5)], layout=torch.jagged)


def masked() -> torch.Tensor:
    return torch.masked.masked_tensor(torch.ones(6, 5), torch.ones(6, 5, dtype=torch.bool))


def of_inference_mode(shape: tuple[int, ...]) -> torch.Tensor:
    with torch.inference_mode():
        return torch.ones(shape)


def overlapping(down: int, across: int) -> torch.Tensor:
    """[7, 5] with elements that share memory."""
    return torch.as_strided(torch.randn(200), (7, 5), (down, across))


def a_view(of: torch.Tensor, *index: Any) -> torch.Tensor:
    return of.detach()[index]


def shared_parameters() -> dict[str, Any]:
    flat = torch.randn(40)
    return layer(flat[:35].view(7, 5), flat[30:37])


STEPS = [
    # Elements that share memory.
    Wrong(
        "weight of overlapping runs", lambda p: step(p, **layer(overlapping(2, 1))), ValueError, "weight has strides"
    ),
    Wrong("weight of one diagonal", lambda p: step(p, **layer(overlapping(1, 1))), ValueError, "elements share memory"),
    Wrong("weight expanded", lambda p: step(p, **layer(torch.ones(5).expand(7, 5))), ValueError, "not expanded"),
    Wrong(
        "weight of runs that meet late", lambda p: step(p, **layer(overlapping(4, 6))), ValueError, "weight has strides"
    ),
    Wrong(
        "bias expanded",
        lambda p: step(p, **layer(torch.randn(7, 5), torch.ones(1).expand(7))),
        ValueError,
        "bias has str",
    ),
    Wrong(
        "running mean expanded",
        lambda p: step(p, peer=PEER, peer_mean=torch.ones(1).expand(7)),
        ValueError,
        "peer_mean has strides",
    ),
    *(
        Wrong(
            f"{key} of the {name} expanded",
            lambda p, key=key, name=name: with_state(p, key, torch.zeros(1).expand_as(getattr(p, name)), name),
            ValueError,
            f"the optimizer's {key} has strides",
        )
        for key in ("exp_avg", "exp_avg_sq")
        for name in ("weight", "bias")
    ),
    Wrong(
        "state of overlapping runs",
        lambda p: with_state(p, "exp_avg", overlapping(1, 1)),
        ValueError,
        "the optimizer's exp_avg has strides",
    ),
    Wrong(
        "bias in the weight's memory", lambda p: step(p, **shared_parameters()), ValueError, "bias shares memory with w"
    ),
    Wrong(
        "rows in the weight", lambda p: step(p, x_pos=a_view(p.weight, slice(0, 6))), ValueError, "x_pos shares memory"
    ),
    Wrong(
        "strided rows in the weight",
        lambda p: step(p, x_neg=a_view(p.weight, slice(None, None, 2))),
        ValueError,
        r"x_neg shares memory with weight, which the step writes; accepted: x_neg.clone\(\)",
    ),
    Wrong(
        "running mean in the bias",
        lambda p: step(p, peer=PEER, peer_mean=p.bias.detach()),
        ValueError,
        "peer_mean shares memory with bias",
    ),
    # Where memory is.
    Wrong("rate on meta", lambda p: with_rate(p, torch.tensor(0.1, device="meta")), ValueError, "lr is on meta"),
    Wrong("rate of two numbers", lambda p: with_rate(p, torch.ones(2)), ValueError, r"lr has shape \(2,\)"),
    Wrong(
        "count on meta",
        lambda p: with_state(p, "step", torch.tensor(1.0, device="meta")),
        ValueError,
        "the optimizer's step is on meta",
    ),
    Wrong("count a number", lambda p: with_state(p, "step", 1), TypeError, "the optimizer's step is a int"),
    Wrong("count of many", lambda p: with_state(p, "step", torch.ones(3)), ValueError, r"step has shape \(3,\)"),
    Wrong(
        "state on meta",
        lambda p: with_state(p, "exp_avg", torch.zeros(7, 5, device="meta")),
        ValueError,
        "the optimizer's exp_avg is .* on meta",
    ),
    Wrong("state a list", lambda p: with_state(p, "exp_avg", [0.0]), TypeError, "the optimizer's exp_avg is a list"),
    *(
        Wrong(
            f"{name} on meta",
            lambda p, name=name, shape=shape: step(p, **{name: torch.ones(shape, device="meta")}),
            ValueError,
            f"{name} is on meta but weight is on cpu",
        )
        for name, shape in (("x_neg", (6, 5)), ("sample_weight", 12), ("input_sumsq", 12))
    ),
    Wrong(
        "threshold on meta",
        lambda p: step(p, **threshold(torch.ones(12, device="meta"))),
        ValueError,
        "threshold is on",
    ),
    Wrong(
        "one threshold on meta",
        lambda p: step(p, **threshold(torch.ones((), device="meta"))),
        ValueError,
        "threshold is on",
    ),
    Wrong(
        "running mean on meta",
        lambda p: step(p, peer=PEER, peer_mean=torch.ones(7, device="meta")),
        ValueError,
        "peer_mean is on meta",
    ),
    Wrong(
        "mask on meta",
        lambda p: step(p, x_neg=None, is_positive=torch.ones(6, dtype=torch.bool, device="meta")),
        ValueError,
        "is_positive is on meta",
    ),
    Wrong(
        "weight of inference mode",
        lambda p: step(p, backend="eager", **layer(of_inference_mode((7, 5)))),
        ValueError,
        "made in inference mode",
    ),
    Wrong(
        "state of inference mode",
        lambda p: with_state(p, "exp_avg", of_inference_mode((7, 5)), backend="eager"),
        ValueError,
        "made in inference mode",
    ),
    # What would wait for a gradient in vain.
    Wrong(
        "threshold to train",
        lambda p: step(p, **threshold(torch.ones((), requires_grad=True))),
        ValueError,
        r"threshold has requires_grad=True but gets no gradient; accepted: threshold.detach\(\)",
    ),
    Wrong(
        "row thresholds to train",
        lambda p: step(p, **threshold(torch.ones(12).requires_grad_() * 2)),
        ValueError,
        "threshold has requires_grad=True",
    ),
    Wrong(
        "row weights to train",
        lambda p: step(p, sample_weight=torch.ones(12, requires_grad=True)),
        ValueError,
        "sample_weight has requires_grad=True",
    ),
    # Tensors of other kinds.
    Wrong("rows nested", lambda p: step(p, x_pos=nested()), TypeError, "x_pos has layout nested"),
    Wrong("rows jagged", lambda p: step(p, x_pos=jagged()), TypeError, "x_pos is a NestedTensor"),
    Wrong("rows masked", lambda p: step(p, x_neg=masked()), TypeError, "x_neg is a MaskedTensor; accepted: a plain"),
    Wrong("rows complex", lambda p: step(p, x_pos=p.x_pos.to(torch.complex64)), TypeError, "x_pos is torch.complex64"),
    Wrong(
        "rows quantized",
        lambda p: step(p, x_pos=torch.quantize_per_tensor(p.x_pos, 0.1, 0, torch.qint8)),
        TypeError,
        "x_pos is torch.qint8",
    ),
    Wrong(
        "rows sparse", lambda p: step(p, x_neg=p.x_neg.to_sparse_csr()), TypeError, "x_neg has layout torch.sparse_csr"
    ),
    Wrong("rows of numpy", lambda p: step(p, x_pos=p.x_pos.numpy()), TypeError, "x_pos is a ndarray"),
    Wrong(
        "weight complex",
        lambda p: step(p, weight=nn.Parameter(p.weight.detach().to(torch.complex64))),
        TypeError,
        "weight is torch.complex64",
    ),
    Wrong("bias nested", lambda p: step(p, bias=nested()), TypeError, "bias has layout nested"),
    Wrong(
        "row weights nested", lambda p: step(p, sample_weight=nested()), TypeError, "sample_weight has layout nested"
    ),
    Wrong("row weights a list", lambda p: step(p, sample_weight=[1.0] * 12), TypeError, "sample_weight is a list"),
    Wrong(
        "sums sparse", lambda p: step(p, input_sumsq=torch.ones(12).to_sparse()), TypeError, "input_sumsq has layout"
    ),
    # Numbers and names.
    Wrong("eps of 401 digits", lambda p: step(p, eps=HUGE), ValueError, r"eps=1000.*000 is not a finite number >= 0"),
    Wrong("eps too long to write", lambda p: step(p, eps=10**9999), ValueError, "eps=<int of too many digits>"),
    Wrong("eps not a number", lambda p: step(p, eps=math.nan), ValueError, "eps=nan"),
    Wrong("eps a tensor", lambda p: step(p, eps=torch.tensor(1.0)), TypeError, "eps=tensor"),
    Wrong("skip_below of 401 digits", lambda p: step(p, skip_below=HUGE), ValueError, "skip_below=1000"),
    Wrong("norm a tensor", lambda p: step(p, norm=torch.ones(2)), ValueError, "norm=tensor.*is not one of"),
    Wrong(
        "activation a module", lambda p: step(p, activation=nn.ReLU()), ValueError, r"activation=ReLU\(\) is not one of"
    ),
    Wrong("outputs a list", lambda p: step(p, outputs=["post"]), ValueError, "outputs="),
    Wrong("backend a list", lambda p: step(p, backend=["native"]), ValueError, "backend=.*is not a backend"),
    Wrong("backend a number", lambda p: step(p, backend=3), ValueError, "backend=3 is not a backend"),
    Wrong("compute_dtype a name", lambda p: step(p, compute_dtype="bfloat16"), TypeError, "compute_dtype='bfloat16'"),
    Wrong("label_field a number", lambda p: step(p, label_field=2.0), ValueError, "label_field=2.0"),
    Wrong("product a list", lambda p: step(p, label_field=5, product=[1]), TypeError, "product is a list"),
    Wrong("optimizer a class", lambda p: step(p, optimizer=SGD), TypeError, "optimizer is a type"),
    Wrong("peer a dict", lambda p: step(p, peer={}, peer_mean=torch.ones(7)), TypeError, "peer={} is not"),
    Wrong("running mean a list", lambda p: step(p, peer=PEER, peer_mean=[0.5] * 7), TypeError, "peer_mean is a list"),
]

FORWARD = [
    Wrong("rows nested, forward", lambda p: ff.linear_forward(nested(), p.weight), TypeError, "x has layout nested"),
    Wrong("rows a list, forward", lambda p: ff.linear_forward([[1.0]], p.weight), TypeError, "x is a list"),
    Wrong("weight a list", lambda p: ff.linear_forward(p.x_pos, [[1.0]]), TypeError, "weight is a list"),
    Wrong("weight masked", lambda p: ff.linear_forward(p.x_pos, masked()), TypeError, "weight is a MaskedTensor"),
    Wrong(
        "sums on meta",
        lambda p: ff.linear_forward(p.x_pos, p.weight, input_sumsq=torch.ones(6, device="meta")),
        ValueError,
        "input_sumsq is on meta",
    ),
    Wrong(
        "weight on meta", lambda p: ff.linear_forward(p.x_pos, p.weight.detach().to("meta")), ValueError, "x is on cpu"
    ),
    Wrong(
        "keep a name", lambda p: ff.linear_forward(p.x_pos, p.weight, keep="no"), TypeError, "keep='no' is not a bool"
    ),
    Wrong("copies a float", lambda p: ff.linear_forward(p.x_pos, p.weight, copies=2.0), ValueError, "copies=2.0"),
    Wrong(
        "eps of 401 digits, forward", lambda p: ff.linear_forward(p.x_pos, p.weight, eps=HUGE), ValueError, "eps=1000"
    ),
    Wrong(
        "product of rows nested", lambda p: ff.shared_product(nested(), p.weight, 2), TypeError, "x has layout nested"
    ),
    Wrong("product of no weight", lambda p: ff.shared_product(p.x_pos, None, 2), TypeError, "weight is a NoneType"),
    Wrong(
        "goodness nested",
        lambda p: ff.goodness_loss(nested(), torch.ones(2, dtype=torch.bool)),
        TypeError,
        "goodness has",
    ),
    Wrong(
        "goodness complex",
        lambda p: ff.goodness_loss(torch.ones(2).cfloat(), torch.ones(2, dtype=torch.bool)),
        TypeError,
        "goodness is torch.complex64",
    ),
    Wrong("sides a list", lambda p: ff.goodness_loss(torch.ones(2), [True, False]), TypeError, "is_positive is a list"),
    Wrong("sides of values that are none", lambda p: step_result(p).sides("x"), TypeError, "values is a str"),
]


def step_result(p: Any) -> ff.StepResult:
    return ff.StepResult(None, torch.ones(2), torch.ones(2), torch.ones(()), 1)


EXPLAIN = [
    Wrong("objective a name", lambda p: ff.explain(p.weight, objective="x"), TypeError, "objective='x' is not an ffk"),
    Wrong("peer a name", lambda p: ff.explain(p.weight, peer="hinton"), TypeError, "peer='hinton' is not an ffk"),
    Wrong("activation unknown", lambda p: ff.explain(p.weight, activation="tanh"), ValueError, "activation='tanh'"),
    Wrong("no weight", lambda p: ff.explain(None), TypeError, "weight is a NoneType"),
    Wrong("optimizer a name", lambda p: ff.explain(p.weight, "adam"), TypeError, "optimizer is a str"),
    Wrong("backend unknown", lambda p: ff.explain(p.weight, backend="x"), ValueError, "backend='x' is not a backend"),
]

OBJECTIVES = [
    *(
        Wrong(f"{name} of 401 digits", lambda p, name=name: ff.Objective(**{name: HUGE}), ValueError, f"{name}=1000")
        for name in ("threshold", "temperature", "alpha")
    ),
    Wrong("a pair of huge thresholds", lambda p: ff.Objective(threshold=(1.0, HUGE)), ValueError, "is not finite"),
    Wrong("temperature that divides to infinity", lambda p: ff.Objective(temperature=5e-324), ValueError, "too small"),
    Wrong("threshold nested", lambda p: ff.Objective(threshold=nested()), TypeError, "threshold has layout"),
    Wrong(
        "threshold sparse", lambda p: ff.Objective(threshold=torch.ones(3).to_sparse()), TypeError, "threshold has lay"
    ),
    Wrong("goodness a tensor", lambda p: ff.Objective(goodness=torch.ones(2)), ValueError, "goodness=tensor"),
    Wrong("loss a list", lambda p: ff.Objective(loss=["symba"]), ValueError, "loss="),
    Wrong("strength of 401 digits", lambda p: ff.PeerNormalisation(strength=HUGE), ValueError, "strength=1000"),
    Wrong("form a tensor", lambda p: ff.PeerNormalisation(form=torch.ones(2)), ValueError, "form=tensor"),
]

NEGATIVES = [
    Wrong(
        "images nested",
        lambda p: overlay_label(nested(), torch.zeros(2).long(), 2),
        TypeError,
        "x must be dense; got a n",
    ),
    Wrong("images sparse", lambda p: neutral_label(p.x_pos.to_sparse(), 2), TypeError, "x must be dense"),
    Wrong(
        "value of 401 digits", lambda p: neutral_label(p.x_pos, 2, HUGE), ValueError, "value must be finite; got 1000"
    ),
    Wrong("labels a list", lambda p: wrong_label([1, 2]), TypeError, "labels must be a tensor"),
    Wrong(
        "labels nested",
        lambda p: wrong_label(torch.nested.nested_tensor([torch.ones(2).long()]), 2),
        TypeError,
        "labels must be dense",
    ),
    Wrong("one image", lambda p: hybrid_images(torch.rand(1, 9)), ValueError, "at least 2 rows"),
    Wrong("blurs a float", lambda p: random_masks(2, 3, 3, blurs=1.0), TypeError, "blurs must be an int"),
]

GRAPHS = [
    Wrong("no rows to capture", lambda p: GraphedStep(p.net, None, None, None), TypeError, "x_pos is a NoneType"),
    Wrong("rows to capture a list", lambda p: GraphedStep(p.net, None, [[1.0]], None), TypeError, "x_pos is a list"),
    Wrong("no net to capture", lambda p: GraphedStep(None, None, p.x_pos, p.x_neg), TypeError, "net is a NoneType"),
    Wrong("optimizers a number", lambda p: p.net.step(p.x_pos, p.x_neg, 3), TypeError, "optimizers is a int"),
    Wrong("a network's outputs", lambda p: p.net.step(p.x_pos, p.x_neg, None, outputs="pre"), TypeError, "outputs"),
    Wrong("a network's sums", lambda p: p.net.step(p.x_pos, p.x_neg, None, input_sumsq=0), TypeError, "input_sumsq c"),
    Wrong("too many optimizers", lambda p: GraphedStep(p.net, [None] * 2, p.x_pos, p.x_neg), ValueError, "2 entries"),
    Wrong("an optimizer a number", lambda p: GraphedStep(p.net, [1], p.x_pos, p.x_neg), TypeError, r"optimizers\[0\]"),
    Wrong("rows on the host", lambda p: GraphedStep(p.net, None, p.x_pos, p.x_neg), ValueError, "x_pos is on cpu"),
    Wrong("objective a name, to capture", lambda p: GraphedStep(p.net, None, p.x_pos, None, objective="x"), TypeError,
          "objective='x'"),
]  # fmt: skip

WRONG_CALLS = [*STEPS, *FORWARD, *EXPLAIN, *OBJECTIVES, *NEGATIVES, *GRAPHS]
assert all(re.compile(wrong.words) for wrong in WRONG_CALLS)
