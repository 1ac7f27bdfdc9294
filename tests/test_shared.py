"""What rows under different labels share, and rows left out of the update: the numbers of doing neither."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import ffkernels as ff
from ffkernels import reference
from ffkernels.backends.eager import step as eager_step
from ffkernels.backends.native import library

from .steps import assert_same_state, error, problem
from .test_ops import step_arguments, step_records

K = 3
needs_library = pytest.mark.skipif(library.load().library is None, reason="the compiled library was not built")


def copies(rows: int, width: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x_pos = torch.rand(rows, width, dtype=dtype)
    x_neg = x_pos.clone()
    x_neg[:, :K] = torch.rand(rows, K, dtype=dtype)
    return x_pos, x_neg


@pytest.mark.parametrize("norm", ["l2", "none"])
@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("outputs", ["post", "pre", "none"])
def test_a_step_on_shared_rows_is_the_step(norm, blocks, given, outputs, monkeypatch):
    if blocks:
        monkeypatch.setattr(eager_step, "SINGLE_BLOCK_ELEMENTS", 64)
        monkeypatch.setattr(eager_step, "BLOCK_ELEMENTS", 42)
        monkeypatch.setattr(eager_step, "MIN_BLOCK_ROWS", 3)
    p = problem(12, 12, 9, 7)._replace(**dict(zip(("x_pos", "x_neg"), copies(12, 9), strict=True)))
    theirs = p.copy()
    for _ in range(3):
        product = ff.shared_product(p.x_pos, p.weight, K) if given else None
        ours = ff.linear_step_(
            p.x_pos, p.x_neg, p.weight, p.bias, p.optimizer, norm=norm, outputs=outputs,
            label_field=K, product=product, backend="eager",
        )  # fmt: skip
        theirs_result = reference.linear_step_(
            theirs.x_pos, theirs.x_neg, theirs.weight, theirs.bias, theirs.optimizer,
            objective=ff.Objective(), norm=norm, outputs=outputs,
        )  # fmt: skip
        assert error(ours.goodness, theirs_result.goodness) < 1e-12
        assert error(ours.y, theirs_result.y) < 1e-12
        assert_same_state(p, theirs, 1e-12)


def test_a_stale_product_is_used_as_it_came():
    """Were it not used, the step would not notice."""
    p = problem(4, 4, 9, 7)._replace(**dict(zip(("x_pos", "x_neg"), copies(4, 9), strict=True)))
    product = torch.zeros(4, 7, dtype=torch.float64)
    result = ff.linear_step_(
        p.x_pos, p.x_neg, p.weight, None, None, norm="none", outputs="pre", label_field=K, product=product
    )
    with torch.no_grad():
        expected = torch.cat([x[:, :K] @ p.weight[:, :K].T for x in (p.x_pos, p.x_neg)]).relu()
    assert error(result.y, expected) < 1e-12


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16], ids=str)
def test_forward_from_a_shared_product(compute_dtype):
    x, weight, bias = torch.rand(5, 9), torch.randn(7, 9), torch.randn(7)
    product = ff.shared_product(x, weight, K, compute_dtype=compute_dtype)
    exact = x[:, K:].double() @ weight[:, K:].double().T
    assert error(product, exact) < (1e-6 if compute_dtype is None else 1e-2)
    ours = ff.linear_forward(x, weight, bias, compute_dtype=compute_dtype, label_field=K, product=product)
    theirs = ff.linear_forward(x, weight, bias, compute_dtype=compute_dtype)
    for mine, other in zip(ours, theirs, strict=True):
        assert error(mine, other) < (1e-6 if compute_dtype is None else 2e-2)


def network(dtype: torch.dtype = torch.float64, **options: object) -> ff.FFNetwork:
    torch.manual_seed(2)
    return ff.FFNetwork([ff.FFLinear(a, b, dtype=dtype, **options) for a, b in pairwise([12, 9, 7, 6])])


@pytest.mark.parametrize("rows", [1, 6, 50])
def test_prediction_and_features_share_the_first_layer(rows, monkeypatch):
    monkeypatch.setattr("ffkernels.nn.network.PREDICTION_ROWS", 12)
    net, x = network(), torch.rand(rows, 12, dtype=torch.float64)
    goodness = [net.goodness(ff.overlay_label(x, torch.full((rows,), k), K)).sum(1) for k in range(K)]
    seen = []
    activity = ff.FFLinear.activity
    monkeypatch.setattr(
        ff.FFLinear, "activity", lambda self, *a, **o: seen.append(o.get("product")) or activity(self, *a, **o)
    )
    assert torch.equal(net.predict(x, K), torch.stack(goodness).argmax(0))
    assert all((product is None) == bool(i % 3) for i, product in enumerate(seen))  # float64 runs on eager
    plain = net.features(x, num_classes=K)
    assert error(net.features(x, num_classes=K, product=net.shared_product(x, K)), plain) < 1e-12
    unlabelled = net.features(x, num_classes=0)
    assert error(unlabelled[:, 7:], torch.nn.functional.normalize(net.activities(x)[2], eps=1e-4)) < 1e-3


@needs_library
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize(
    ("rows", "inputs", "units"), [(1, 90, 21), (5, 9, 3), (33, 500, 70), (1100, 24, 9), (5600, 800, 4)]
)
def test_compiled_code_takes_a_product(rows, inputs, units, activation):
    """By as much as its own sums from float64: depths of several runs, lanes that are not full, blocks of a step."""
    torch.manual_seed(3)
    x, weight, bias = torch.rand(rows, inputs), torch.randn(units, inputs), torch.randn(units)
    product = ff.shared_product(x, weight, K)
    given = {"label_field": K, "product": product, "backend": "native", "activation": activation}
    exact = ff.linear_forward(*(t.double() for t in (x, weight, bias)), activation=activation)
    ours = ff.linear_forward(x, weight, bias, **given)
    for mine, other in zip(ours, exact, strict=True):
        assert error(mine, other) < 1e-6

    sides = [ff.overlay_label(x, torch.full((rows,), k), K) for k in (0, 2)]
    for outputs in ("pre", "post"):
        found = []
        for dtype, options in ((torch.float64, {"activation": activation}), (torch.float32, given)):
            w, b = (nn.Parameter(t.to(dtype, copy=True)) for t in (weight, bias))
            optimizer = SGD([w, b], lr=0.01)
            result = ff.linear_step_(*(side.to(dtype) for side in sides), w, b, optimizer, outputs=outputs, **options)
            found.append((w.detach(), b.detach(), result.y, result.goodness, result.loss))
        for mine, other in zip(found[1], found[0], strict=True):
            assert error(mine, other) < 2e-6


@needs_library
def test_compiled_code_reads_a_stale_product_as_it_came():
    x_pos, x_neg = copies(6, 40, torch.float32)
    weight = torch.randn(11, 40)
    options = {"norm": "none", "outputs": "pre", "backend": "native", "label_field": K, "product": torch.zeros(6, 11)}
    ours = ff.linear_step_(x_pos, x_neg, nn.Parameter(weight), None, None, **options).y
    assert error(ours, torch.cat([x[:, :K] @ weight[:, :K].T for x in (x_pos, x_neg)]).relu()) < 1e-6


@needs_library
@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 130])
def test_copies_share_the_first_layer_of_the_compiled_backend(rows, compute_dtype):
    """130 rows under 10 labels are more than one block."""
    x = torch.rand(rows, 90)
    copies = ff.overlay_label(x.repeat(10, 1), torch.arange(10).repeat_interleave(rows))
    weight, bias = torch.randn(21, 90), torch.randn(21)
    ours = ff.linear_forward(copies, weight, bias, compute_dtype=compute_dtype, copies=10, backend="native")
    theirs = ff.linear_forward(copies, weight, bias, compute_dtype=compute_dtype, backend="eager")
    for mine, other in zip(ours, theirs, strict=True):
        assert error(mine, other) < (1e-6 if compute_dtype is None else 4e-3)
    strangers = torch.rand_like(copies)
    ours = ff.linear_forward(strangers, weight, bias, copies=10, backend="native")
    assert error(ours[0], ff.linear_forward(strangers, weight, bias, backend="eager")[0]) < 1e-6
    with pytest.raises(ValueError, match="copies=3"):
        ff.linear_forward(torch.rand(4, 90), weight, copies=3)


@needs_library
@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("idle", [False, True])
def test_several_negatives_of_a_row_share_its_products(compute_dtype, idle):
    """`idle`: the rows of one group weigh nothing."""
    made = problem(20, 60, 90, 21, dtype=torch.float32)
    x_neg = made.x_pos.repeat(3, 1)
    x_neg[:, 4:9] = torch.randint(3, (60, 5)).float()
    ours, theirs = made._replace(x_neg=x_neg), made.copy()._replace(x_neg=x_neg)
    sample_weight = torch.rand(80)
    sample_weight[40:60] *= not idle
    for p, backend in ((ours, "native"), (theirs, "eager")):
        for _ in range(2):
            ff.linear_step_(
                p.x_pos, p.x_neg, p.weight, p.bias, p.optimizer, sample_weight=sample_weight, norm="rms",
                objective=ff.Objective(goodness="sum", threshold=21), compute_dtype=compute_dtype, backend=backend,
            )  # fmt: skip
    assert_same_state(ours, theirs, 1e-5 if compute_dtype is None else 2e-2)


@pytest.mark.parametrize("options", [{}, {"outputs": "post"}, {"compute_dtype": torch.bfloat16}], ids=str)
@pytest.mark.parametrize(
    "objective", [ff.Objective(goodness="sum", threshold=9.0), ff.Objective(loss="swish")], ids=str
)
def test_step_and_features_in_one_pass_are_those_in_two(objective, options):
    torch.manual_seed(3)
    peer = ff.PeerNormalisation("loewex")
    made = {"objective": objective, "peer": peer, "norm": "rms", "outputs": "pre", **options}
    net, (x_pos, x_neg) = network(torch.float32, **made), copies(8, 12, torch.float32)
    other = copy.deepcopy(net)
    tolerance = 1e-5 if "compute_dtype" not in options else 2e-2
    optimizers = [SGD(n.parameters(), lr=0.1, momentum=0.9) for n in (net, other)]
    for _ in range(2):
        results, features = net.step_and_features(x_pos, x_neg, optimizers[0], K)
        assert error(features, other.features(x_pos, num_classes=K)) < tolerance
        theirs = other.step(x_pos, x_neg, optimizers[1])
        for a, b in zip(results, theirs, strict=True):
            assert a.y is None and error(a.loss, b.loss, floor=1) < tolerance
            assert error(a.goodness_pos, b.goodness_pos, floor=1) < tolerance
            assert error(a.goodness_neg, b.goodness_neg, floor=1) < tolerance
    for mine, of_other in zip(net.state_dict().values(), other.state_dict().values(), strict=True):
        assert error(mine, of_other) < tolerance


def test_float16_rows_are_scaled_first_and_share_no_product():
    net = network(torch.float32, compute_dtype=torch.float16)
    x = 1000 * torch.rand(4, 12)
    assert net.shared_product(x, K) is None
    assert net.predict(x, K).shape == (4,)


@pytest.mark.parametrize("outputs", ["pre", "post"])
def test_features_of_a_step_are_those_of_its_positive_rows(outputs):
    net, (x_pos, x_neg) = network(outputs=outputs), copies(5, 12)
    before = net.features(x_pos, num_classes=0)
    results = net.step(x_pos, x_neg, SGD(net.parameters(), lr=0.1), keep=True)
    expected = before if outputs == "pre" else net.features(x_pos, num_classes=0)
    assert error(net.features_of(results), expected) < 1e-12
    with pytest.raises(ValueError, match="keep=True"):
        net.features_of(net.step(x_pos, x_neg, None))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("backend", [pytest.param("native", marks=needs_library), "eager"])
@pytest.mark.parametrize(("rows", "width", "units"), [(1, 4, 1), (5, 13, 7), (37, 700, 130), (600, 1100, 20)])
def test_features_leave_the_product_on_the_way(rows, width, units, backend, activation, bias):
    """With twice PyTorch's error at most, whatever the label field holds; and features are what they are alone."""
    torch.manual_seed(4)
    options = {"activation": activation, "bias": bias, "backend": backend}
    net = ff.FFNetwork([ff.FFLinear(width, units, **options), ff.FFLinear(units, 6, **options)])
    x = torch.rand(rows, width)
    x[:, :3] = torch.nan
    exact = x[:, 3:].double() @ net.layers[0].weight.detach()[:, 3:].double().t()
    features, product = net.features_and_product(x, [0, 1], num_classes=3)
    plain = (net.shared_product(x, 3) - exact).abs().max()
    assert (product - exact).abs().max() <= 2 * plain + 1e-7
    wide = ff.FFNetwork(copy.deepcopy(list(net.layers))).double()
    for layer in wide:
        layer.backend = "eager"
    expected = wide.features(x.double(), [0, 1], num_classes=3)
    error = (net.features(x, [0, 1], num_classes=3) - expected).abs().max()
    assert (features - expected).abs().max() <= 2 * error + 1e-6


@needs_library
@pytest.mark.parametrize(
    ("width", "field"), [(784, 10), (1024, 128), (1024, 129), (1024, 468), (2048, 1000), (5000, 4518)]
)
def test_wide_label_fields_keep_their_digits(width, field):
    """Beside a product that is known or left: within twice the error of PyTorch's one product."""
    torch.manual_seed(4)
    layer = ff.FFLinear(width, 128, norm="none", activation="identity")
    net, x = ff.FFNetwork([layer]), torch.randn(256, width)
    neutral = x.clone()
    neutral[:, :field] = 1 / field
    with torch.no_grad():
        exact = nn.functional.linear(neutral.double(), layer.weight.double(), layer.bias.double())
        plain = (nn.functional.linear(neutral, layer.weight, layer.bias) - exact).norm()
        given = {"label_field": field, "product": net.shared_product(x, field)}
        known, _ = ff.linear_forward(neutral, layer.weight, layer.bias, norm="none", activation="identity", **given)
        features, _ = net.features_and_product(x, num_classes=field)
    assert (known - exact).norm() <= 2 * plain
    scale = exact.square().mean(1, keepdim=True).sqrt() + layer.eps
    assert ((features - exact / scale) * scale).norm() <= 2 * plain + 1e-6 * exact.norm()


def test_features_and_product_where_the_backend_leaves_none():
    """Rounded operands and layers that somebody watches: what `features` and `shared_product` say."""
    torch.manual_seed(4)
    x = torch.rand(5, 13)
    net = ff.FFNetwork([ff.FFLinear(*shape, compute_dtype=torch.bfloat16) for shape in ((13, 7), (7, 6))])
    for _ in range(2):
        features, product = net.features_and_product(x, num_classes=3)
        assert torch.equal(product, net.shared_product(x, 3))
        assert torch.equal(features, net.features(x, num_classes=3, product=product))
        net = ff.FFNetwork([ff.FFLinear(13, 7), ff.FFLinear(7, 6)])
        net.layers[0].register_forward_hook(lambda module, given, y: 2 * y)
    with pytest.raises(ValueError, match="columns"):
        net.features_and_product(x[:, :12], num_classes=3)
    assert ff.FFNetwork([ff.FFLinear(13, 7, compute_dtype=torch.float16)]).features_and_product(x, None, 3)[1] is None


def test_a_network_shares_its_first_layer_alone():
    net, (x_pos, x_neg) = network(), copies(5, 12)
    other = copy.deepcopy(net)
    product = net.shared_product(x_pos, K)
    net.step(x_pos, x_neg, SGD(net.parameters(), lr=0.1), label_field=K, product=product)
    other.step(x_pos, x_neg, SGD(other.parameters(), lr=0.1))
    for mine, theirs in zip(net.parameters(), other.parameters(), strict=True):
        assert error(mine, theirs) < 1e-12


@pytest.mark.parametrize("form", ["hinton", "loewex"])
def test_sharing_and_peer_normalisation_together(form):
    peer = ff.PeerNormalisation(form)
    net, (x_pos, x_neg) = network(peer=peer, outputs="pre"), copies(5, 12)
    other = copy.deepcopy(net)
    for _ in range(3):
        product = net.shared_product(x_pos, K)
        net.step(x_pos, x_neg, SGD(net.parameters(), lr=0.1), label_field=K, product=product)
        other.step(x_pos, x_neg, SGD(other.parameters(), lr=0.1))
    for (name, mine), theirs in zip(net.state_dict().items(), other.state_dict().values(), strict=True):
        assert error(mine, theirs) < 1e-12, name


@pytest.mark.parametrize("loss", ["logistic", "symba", "swish"])
@pytest.mark.parametrize("shared", [False, True])
def test_rows_below_the_fraction_are_left_out(loss, shared):
    """The same update as when the reference gives those rows no weight."""
    skip, rows = 0.3, 12
    x_pos, x_neg = copies(rows, 9)
    p = problem(rows, rows, 9, 7, optimizer="sgd")._replace(
        x_pos=x_pos, x_neg=x_neg if shared else torch.rand_like(x_neg)
    )
    median = ff.linear_forward(p.x_pos, p.weight, p.bias)[1].detach().median().item() / 7
    objective = ff.Objective(loss=loss, threshold=median, alpha=20.0) if loss != "logistic" else ff.Objective(
        threshold=median, temperature=0.1
    )  # fmt: skip
    theirs = p.copy()
    ours = ff.linear_step_(
        p.x_pos, p.x_neg, p.weight, p.bias, p.optimizer, objective=objective, skip_below=skip, backend="eager",
        outputs="none",
    )  # fmt: skip
    side = torch.arange(2 * rows) < rows
    kept = objective.in_doubt(ours.goodness, side, skip)
    assert 0 < kept.sum() < len(kept)
    goodness = ours.goodness
    if loss == "logistic":
        logit = torch.where(side, median - goodness, goodness - median) / 0.1
        assert torch.equal(kept, torch.sigmoid(logit) >= skip)
    reference.linear_step_(
        theirs.x_pos, theirs.x_neg, theirs.weight, theirs.bias, theirs.optimizer, objective=objective, outputs="none",
        sample_weight=kept.double(),
    )  # fmt: skip
    assert_same_state(p, theirs, 1e-12)


def test_nothing_is_left_out_at_0_and_everything_below_1():
    p = problem(optimizer="sgd")
    before, plain = p.copy(), p.copy()
    ff.linear_step_(p.x_pos, p.x_neg, p.weight, p.bias, p.optimizer, skip_below=1.0)
    assert_same_state(p, before, 0.0)
    for q, options in ((p, {"skip_below": 0.0}), (plain, {})):
        ff.linear_step_(q.x_pos, q.x_neg, q.weight, q.bias, q.optimizer, **options)
    assert_same_state(p, plain, 0.0)
    assert ff.Objective().in_doubt(torch.tensor([1e4, 2.0]), torch.tensor([True, True])).tolist() == [False, True]


@needs_library
def test_what_the_compiled_library_does_not_take_runs_elsewhere():
    p = problem(dtype=torch.float32)._replace(**dict(zip(("x_pos", "x_neg"), copies(6, 5, torch.float32), strict=True)))
    product = ff.shared_product(p.x_pos, p.weight, K, compute_dtype=torch.bfloat16)
    options = {"product": product, "label_field": K, "compute_dtype": torch.bfloat16}
    ff.linear_step_(p.x_pos, p.x_neg, p.weight, p.bias, p.optimizer, **options)
    with pytest.raises(ValueError, match="backend='native' cannot run this call"):
        ff.linear_step_(p.x_pos, p.x_neg, p.weight, p.bias, p.optimizer, backend="native", **options)


def test_opcheck_with_everything_given():
    x = problem(dtype=torch.float32).x_pos
    known = {"x_pos": x, "x_neg": x.clone(), "product": torch.zeros(6, 7), "label_field": 2}
    arguments = step_arguments("adam", True, torch.float32, ff.Objective(), skip_below=0.2, **known)
    torch.library.opcheck(torch.ops.ffkernels.linear_step_.default, arguments)


def test_on_a_device_sharing_waits_for_nothing():
    known = {"product": torch.zeros(6, 7), "label_field": 2}
    records = step_records("sgd-momentum", True, torch.bfloat16, ff.Objective(), skip_below=0.2, **known)

    def to_meta(value: object) -> object:
        if isinstance(value, list):
            return [to_meta(v) for v in value]
        if isinstance(value, tuple):
            return type(value)(*map(to_meta, value)) if value else value
        return value.to("meta") if isinstance(value, Tensor) else value

    with torch.no_grad():
        eager_step.linear_step_(*map(to_meta, records))


@pytest.mark.parametrize(
    ("options", "error_type", "said"),
    [
        ({"skip_below": -0.1}, ValueError, "skip_below=-0.1 is not in 0..1"),
        ({"skip_below": True}, TypeError, "skip_below=True is not a number"),
        ({"label_field": 0}, ValueError, "label_field=0 is not None or a number of columns in 1..5"),
        ({"label_field": 6}, ValueError, "label_field=6 is not None"),
        ({"label_field": 2}, ValueError, "x_neg differs from x_pos outside the first 2 columns"),
        ({"product": torch.zeros(6, 7).double()}, ValueError, "product came without label_field"),
        ({"product": torch.zeros(6, 7), "label_field": 5}, ValueError, r"product is torch.float32 \(6, 7\); accepted"),
        ({"product": torch.zeros(5, 7).double(), "label_field": 5}, ValueError, r"\(5, 7\); accepted: .*\(6, 7\)"),
    ],
)
def test_bad_input_changes_nothing(options, error_type, said):
    p = problem()
    before = p.copy()
    with pytest.raises(error_type, match=said):
        ff.linear_step_(p.x_pos, p.x_neg, p.weight, p.bias, p.optimizer, **options)
    assert_same_state(p, before, 0.0)
