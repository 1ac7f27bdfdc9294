"""Every bad input meets its error here, before anything is launched or written.

An error names the argument, says what came and what is accepted.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from itertools import pairwise
from operator import attrgetter
from typing import get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import spec
from .compiling import once_per_trace
from .objectives import AnyObjective, GivenLoss, Objective, ProjectionHead, short
from .peer import PeerNormalisation

NORMS = get_args(spec.Norm)
EPS_MODES = get_args(spec.EpsMode)
ACTIVATIONS = get_args(spec.Activation)
OUTPUTS = get_args(spec.OutputsOf)
MASTER_DTYPES = (torch.float32, torch.float64)
COMPUTE_DTYPES = (torch.bfloat16, torch.float16)
WITHOUT_CLASSES = (
    "labels came with an objective without classes; accepted: labels=None, or an objective with classes, such as "
    "Objective(loss='cross_entropy', classes=10)"
)


def one_of(name: str, value: object, accepted: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is one of the `accepted` names."""
    if not isinstance(value, str) or value not in accepted:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, accepted))}")


def layer_options(norm: str, eps: float, eps_mode: str, activation: str) -> None:
    """Checks how a layer normalises and activates."""
    one_of("norm", norm, NORMS)
    one_of("eps_mode", eps_mode, EPS_MODES)
    one_of("activation", activation, ACTIVATIONS)
    if isinstance(eps, bool) or not isinstance(eps, int | float):
        raise TypeError(f"eps={eps!r} is not a number")
    if not 0 <= eps <= sys.float_info.max:
        raise ValueError(f"eps={short(eps)} is not a finite number >= 0")


def autocast_is_on(device: torch.device) -> bool:
    """Whether autocast is on for a device; some, like "meta", do not know it."""
    kind = device.type
    return (kind == "cpu" or torch.amp.is_autocast_available(kind)) and torch.is_autocast_enabled(kind)


def compute_dtype_of(compute_dtype: torch.dtype | None, weight: Tensor) -> torch.dtype:
    """The dtype of the products' operands: as asked for, as autocast says, or the weight's own."""
    if compute_dtype is None:
        kind = weight.device.type
        if weight.dtype == torch.float32 and autocast_is_on(weight.device):
            return torch.get_autocast_dtype(kind)
        return weight.dtype
    if compute_dtype != weight.dtype and (compute_dtype not in COMPUTE_DTYPES or weight.dtype != torch.float32):
        raise TypeError(
            f"compute_dtype={compute_dtype!r} does not go with a {weight.dtype} weight; accepted: None, "
            "or torch.bfloat16 or torch.float16 with a float32 weight"
        )
    return compute_dtype


@once_per_trace
def precision_of(compute_dtype: torch.dtype) -> spec.Precision:
    """What `torch.set_float32_matmul_precision` says now of products in this dtype.

    "medium" permits more than "high" does, and is taken for it: products of single bfloat16 numbers are asked for by
    their name.
    """
    is_highest = compute_dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "highest" if is_highest else "high"


def layer_tensors(weight: Tensor, bias: Tensor | None) -> None:
    """Checks weight `[out, in]` and bias `[out]`."""
    matrix("weight", weight)
    if weight.dtype not in MASTER_DTYPES:
        raise TypeError(
            f"weight is {weight.dtype}; accepted: torch.float32 or torch.float64 "
            "(for products in bfloat16 or float16 keep float32 weights and set compute_dtype)"
        )
    if 0 in weight.shape:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; accepted: [out, in], both at least 1")
    if bias is not None:
        vector("bias", bias, weight.shape[0], weight.dtype, weight.device)


def rows_of(name: str, x: Tensor, weight: Tensor, compute_dtype: torch.dtype) -> None:
    """Checks a block of input rows `[rows, in]` against the weight."""
    matrix(name, x)
    if x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{name} has {x.shape[1]} columns but weight is {tuple(weight.shape)}; accepted: {weight.shape[1]} columns"
        )
    dtype_of_rows(name, x, weight, compute_dtype)
    _same_device(name, x, weight.device)


def dtype_of_rows(name: str, x: Tensor, weight: Tensor, compute_dtype: torch.dtype) -> None:
    """Raises TypeError unless input rows are in the dtype of the weight or of the products."""
    if x.dtype not in (weight.dtype, compute_dtype):
        other = f" or {compute_dtype}" if compute_dtype != weight.dtype else ""
        raise TypeError(f"{name} is {x.dtype}; accepted: {weight.dtype}{other}{pixels(name, x)}")


def pixels(name: str, x: Tensor) -> str:
    """What to do about images in whole numbers."""
    return f", as {name} / 255 makes of pixels" if x.dtype == torch.uint8 else ""


def tensor(name: str, value: object) -> None:
    """Raises TypeError unless `value` is a dense tensor with memory of its own, as the backends read it."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; accepted: a torch.Tensor{source_of_tensor(value)}")
    if type(value) not in (Tensor, nn.Parameter) and _is_wrapper(value):
        raise TypeError(
            f"{name} is a {type(value).__name__}; accepted: a plain tensor (of one that is sharded over processes "
            "ffkernels sees no part)"
        )
    if value.layout != torch.strided or value.is_nested:
        raise TypeError(f"{name} has layout {_layout_of(value)}; accepted: a dense tensor")


def source_of_tensor(value: object) -> str:
    """How a tensor comes out of what was given in its place."""
    if isinstance(value, nn.Module):
        return ", such as its weight"
    return ", as torch.from_numpy makes one" if type(value).__module__ == "numpy" else ""


def _is_wrapper(value: Tensor) -> bool:
    """Whether a subclass holds its numbers in other tensors, as DTensor does, or means something else by them."""
    return hasattr(value, "__tensor_flatten__") or isinstance(value, torch.masked.MaskedTensor)


def _layout_of(value: Tensor) -> str:
    return "nested" if value.is_nested else str(value.layout)


def matrix(name: str, value: object) -> None:
    """Raises TypeError or ValueError unless `value` is a dense two-dimensional tensor."""
    tensor(name, value)
    assert isinstance(value, Tensor)
    if value.dim() != 2:
        hint = f"; flatten each row first: {name}.flatten(1)" if value.dim() > 2 else ""
        raise ValueError(f"{name} has shape {tuple(value.shape)}; accepted: two dimensions{hint}")


def vector(
    name: str, value: object, length: int, dtype: torch.dtype, device: torch.device, beside: str = "weight"
) -> None:
    """Raises TypeError or ValueError unless `value` is a tensor `[length]` of this dtype on this device."""
    tensor(name, value)
    assert isinstance(value, Tensor)
    if value.shape != (length,):
        raise ValueError(f"{name} has shape {tuple(value.shape)}; accepted: ({length},)")
    if value.dtype != dtype:
        raise TypeError(f"{name} is {value.dtype}; accepted: {dtype}")
    _same_device(name, value, device, beside)


def labels(values: object, rows: int, classes: int, device: torch.device, beside: str = "weight") -> None:
    """Checks `[rows]` int64 labels of `classes` classes; on a device not their range, which would wait for it."""
    if values is None:
        raise ValueError(
            f"labels=None came with an objective of {classes} classes; accepted: each row's class, [rows] int64"
        )
    if isinstance(values, Tensor) and values.shape == (rows, classes):
        raise ValueError(f"labels has shape {tuple(values.shape)}; accepted: ({rows},), as labels.argmax(1) makes them")
    vector("labels", values, rows, torch.int64, device, beside)
    assert isinstance(values, Tensor)
    if rows and device.type == "cpu" and not torch.compiler.is_compiling() and not in_transform():
        least, largest = (int(v) for v in values.aminmax())
        if least < 0 or largest >= classes:
            wrong = least if least < 0 else largest
            raise ValueError(f"labels hold {wrong}; accepted: 0..{classes - 1}, the {classes} classes of the objective")


def in_transform() -> bool:
    """Whether a transform of `torch.func` is going on, in which no value is known."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def head(objective: AnyObjective, weight: Tensor) -> Tensor | None:
    """The matrix of a head, which must fit its layer's weight `[out, in]`; None for other objectives."""
    if not isinstance(objective, ProjectionHead):
        return None
    matrix_of_head = objective.weight
    if matrix_of_head is None:
        raise ValueError(
            "objective is a ProjectionHead without a matrix; accepted: one made with units, or that of an FFLinear"
        )
    plain_module("objective", objective, ProjectionHead)
    objective.fit(weight)
    if not matrix_of_head.is_contiguous():
        raise ValueError(f"objective.weight has strides {matrix_of_head.stride()}; accepted: a contiguous one")
    if (matrix_of_head.dtype, matrix_of_head.device) != (weight.dtype, weight.device):
        came, accepted = (f"{t.dtype} on {t.device}" for t in (matrix_of_head, weight))
        raise ValueError(f"objective.weight is {came}; accepted: {accepted}, as weight is")
    return matrix_of_head


def is_watched(module: nn.Module) -> bool:
    """Whether a module's own hooks wait for calls of it."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def plain_module(name: str, module: nn.Module, kind: type[nn.Module]) -> None:
    """Raises unless a module is of this very kind and unwatched: a closed form does not call it."""
    if type(module) is not kind:
        raise TypeError(f"{name} is a {type(module).__name__}; accepted: a {kind.__name__}, or None")
    if is_watched(module):
        raise ValueError(f"{name} has hooks, which a step does not call; accepted: one without, or hooks on the layer")


def batch_norm(
    norm: object,
    weight: Tensor,
    outputs: str,
    peer: object,
    kind: type[nn.BatchNorm1d] | type[nn.BatchNorm2d] = nn.BatchNorm1d,
) -> None:
    """Checks a batch normalisation behind a layer with this weight, and what does not go with it."""
    if norm is None:
        return
    batch_norm_alone("batch_norm", norm, len(weight), weight, kind)
    if outputs == "post":
        raise ValueError(
            "outputs='post' came with batch_norm, whose statistics are those of the step's own pass; accepted: "
            "outputs='pre' or outputs='none'"
        )
    if peer is not None:
        raise ValueError("peer came with batch_norm, behind which means are fixed already; accepted: one of the two")


def batch_norm_alone(
    name: str, norm: object, features: int, weight: Tensor, kind: type[nn.BatchNorm1d] | type[nn.BatchNorm2d]
) -> None:
    """Checks a batch normalisation of so many units or channels beside a layer with this weight."""
    if not isinstance(norm, kind):
        raise TypeError(f"{name} is a {type(norm).__name__}; accepted: a torch.nn.{kind.__name__}, or None")
    plain_module(name, norm, kind)
    if norm.num_features != features:
        raise ValueError(f"{name} has {norm.num_features} features; accepted: {features}")
    for part, value in (*norm.named_parameters(), *norm.named_buffers()):
        if part != "num_batches_tracked":
            vector(f"{name}.{part}", value, features, weight.dtype, weight.device)
            writable(f"{name}.{part}", value)
    momentum = norm.momentum
    if momentum is not None:
        fraction(f"{name}.momentum", momentum)
    elif norm.running_mean is not None and norm.num_batches_tracked is None:
        raise ValueError(f"{name}.momentum=None came without num_batches_tracked; accepted: both, or a momentum")


def enough_for_statistics(
    norm: nn.BatchNorm1d | nn.BatchNorm2d | None, rows: int, places: int = 1, name: str = "batch_norm"
) -> None:
    """Raises ValueError for a single row of one place, which has no variance; of several processes any have more."""
    if (
        norm is not None
        and not hasattr(norm, "together")
        and rows * places == 1
        and (norm.training or norm.running_mean is None)
    ):
        raise ValueError(f"x_pos has 1 row, which has no variance for {name}; accepted: at least 2, or eval()")


def goodness_values(goodness: object, classes: int | None = None) -> Tensor:
    """A goodness `[rows]`, or `[rows, classes]`, in float32 if it came narrower."""
    tensor("goodness", goodness)
    assert isinstance(goodness, Tensor)
    if goodness.dim() != (1 if classes is None else 2) or (classes is not None and goodness.shape[1] != classes):
        accepted = "one value for each row" if classes is None else f"[rows, {classes}], one for each row and class"
        raise ValueError(f"goodness has shape {tuple(goodness.shape)}; accepted: {accepted}")
    if not goodness.is_floating_point():
        raise TypeError(f"goodness is {goodness.dtype}; accepted: a floating-point tensor")
    values = goodness.detach()
    return values if values.dtype in MASTER_DTYPES else values.float()


def constant(name: str, value: Tensor) -> None:
    """Raises ValueError for a tensor that waits for a gradient that nothing computes."""
    if value.requires_grad:
        raise ValueError(f"{name} has requires_grad=True but gets no gradient; accepted: {name}.detach()")


def optimizer_object(optimizer: object, name: str = "optimizer") -> None:
    """Raises TypeError unless it is a `torch.optim` optimizer or None."""
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise TypeError(f"{name} is a {type(optimizer).__name__}; accepted: a torch.optim.Optimizer, or None")


def optimizer_state(key: str, value: object, parameter: Tensor) -> None:
    """Raises unless what an optimizer keeps for a parameter is like it, as a backend takes for granted.

    Adam's step count is one number, on the parameter's device or on the host.
    """
    # The usual case costs little.
    if type(value) is Tensor and value.layout is torch.strided and not value.is_nested and value.is_contiguous():
        if key == "step":
            if value.dim() == 0 and value.device.type == "cpu":
                return
        elif value.shape == parameter.shape and value.dtype == parameter.dtype and value.device == parameter.device:
            return
    name = f"the optimizer's {key}"
    tensor(name, value)
    assert isinstance(value, Tensor)
    if key == "step":
        one_number(name, value, parameter)
        return
    writable(name, value)
    if (value.dtype, value.shape, value.device) != (parameter.dtype, parameter.shape, parameter.device):
        kept, accepted = (f"{t.dtype} {tuple(t.shape)} on {t.device}" for t in (value, parameter))
        raise ValueError(
            f"the optimizer's {key} is {kept}; accepted: {accepted}, as its parameter is "
            "(one that is moved or cast after training began needs a new optimizer)"
        )


def one_number(name: str, value: Tensor, parameter: Tensor) -> None:
    """Raises ValueError unless a tensor holds one number, on the parameter's device or on the host."""
    if value.numel() != 1:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; accepted: one number")
    if value.device != parameter.device and value.device.type != "cpu":
        raise ValueError(f"{name} is on {value.device} but its parameter on {parameter.device}; accepted: there or cpu")


def boolean(name: str, value: object) -> None:
    """Raises TypeError unless `value` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r} is not a bool")


def fraction(name: str, value: object) -> None:
    """Raises TypeError or ValueError unless `value` is a number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}={value!r} is not a number")
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value!r} is not in 0..1")


def label_field(columns: object, weight: Tensor, x_pos: Tensor, x_neg: Tensor | None) -> int:
    """The width of the label field, 0 for None; on a CPU, that both sides hold the same numbers outside it."""
    if columns is None:
        return 0
    width = weight.shape[1]
    if isinstance(columns, bool) or not isinstance(columns, int) or not 0 < columns <= width:
        raise ValueError(f"label_field={columns!r} is not None or a number of columns in 1..{width}")
    if x_neg is None or not len(x_neg):
        return columns
    if x_neg.shape != x_pos.shape:
        raise ValueError(f"x_neg has shape {tuple(x_neg.shape)}; accepted with label_field: {tuple(x_pos.shape)}")
    if x_pos.device.type == "cpu" and not same_numbers(x_pos[:, columns:], x_neg[:, columns:]):
        raise ValueError(
            f"x_neg differs from x_pos outside the first {columns} columns, the label_field; accepted: images that are "
            "the same, or no label_field"
        )
    return columns


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape hold the same numbers; NaN is the same as NaN."""
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


def copies(count: object, rows: int) -> None:
    """Checks that rows are so many copies of the same ones."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1 or rows % count:
        raise ValueError(f"copies={count!r} is not an integer >= 1 that divides the {rows} rows of x")


def shared_product(product: Tensor | None, columns: int, rows: int, weight: Tensor) -> None:
    """Checks `product` `[rows, out]` and that its label field is known."""
    if product is None:
        return
    matrix("product", product)
    accepted = (rows, weight.shape[0])
    if product.shape != accepted or product.dtype != weight.dtype:
        raise ValueError(f"product is {product.dtype} {tuple(product.shape)}; accepted: {weight.dtype} {accepted}")
    _same_device("product", product, weight.device)
    constant("product", product)
    if not columns:
        raise ValueError("product came without label_field; accepted: both, or label_field alone")


def without_product(product: Tensor | None) -> None:
    """Raises ValueError for a product where derivatives are asked for."""
    if product is not None:
        raise ValueError("product came where a torch.func transform or a tangent is asked for; accepted: None")


def trainable(name: str, parameter: Tensor | None) -> None:
    """Raises ValueError unless the parameter is a leaf that an optimizer may update."""
    if parameter is not None and not (parameter.requires_grad and parameter.is_leaf):
        raise ValueError(
            f"{name} has requires_grad={parameter.requires_grad} and is_leaf={parameter.is_leaf}; "
            "accepted: a trainable nn.Parameter (for one that is computed from others, as by parametrize, there are "
            "linear_forward and goodness_loss, whose gradients go on to those)"
        )
    if getattr(parameter, "_fsdp_flattened", False):
        raise ValueError(
            f"{name} lies in a flat parameter of FullyShardedDataParallel, which would not see its step; accepted: a "
            "plain nn.Parameter"
        )


def writable(name: str, value: Tensor | None) -> None:
    """Raises ValueError for a tensor whose elements share memory, which an update would write twice."""
    if value is not None and not value.is_contiguous() and _overlaps_itself(value.shape, value.stride()):
        raise ValueError(
            f"{name} has strides {value.stride()} for shape {tuple(value.shape)}, so that elements share memory; "
            "accepted: a tensor that is not expanded, one place for each element"
        )


def _overlaps_itself(shape: torch.Size, strides: tuple[int, ...]) -> bool:
    """Whether two elements lie in one place."""
    if 0 in shape:
        return False
    if len(shape) == 1:
        return strides[0] == 0 and shape[0] > 1
    if len(shape) > 2:
        extent = 0
        for stride, size in sorted(zip(strides, shape, strict=True)):
            if size > 1 and stride <= extent:
                break
            extent += (size - 1) * stride
        else:
            return False
        places = torch.zeros((), dtype=torch.int64)
        for size, stride in zip(shape, strides, strict=True):
            places = places.unsqueeze(-1) + torch.arange(size) * stride
        return len(places.unique()) < places.numel()
    (rows, columns), (down, across) = shape, strides
    common = math.gcd(down, across)
    # down i = across j, where i rows and j columns apart are the fewest that can coincide.
    return rows * columns > 1 if not common else across // common < rows and down // common < columns


def writable_here(written: list[Tensor]) -> None:
    """Raises ValueError for parameters or state that were made in inference mode, where alone it is written."""
    if not torch.is_inference_mode_enabled() and any(t.is_inference() for t in written):
        raise ValueError(
            "a parameter, its optimizer state or peer_mean was made in inference mode, outside of which it cannot be "
            "written; accepted: clones of them"
        )


_BYTES = attrgetter("nbytes")


def apart(
    weight: Tensor,
    bias: Tensor | None,
    peer_mean: Tensor | None,
    x_pos: Tensor | None,
    x_neg: Tensor | None,
    product: Tensor | None,
    others: Mapping[str, Tensor],
) -> None:
    """Raises ValueError where what a step writes lies in memory that it reads or writes besides.

    It writes the first three, and `others` by name.
    """
    if weight.is_meta or type(weight) not in (Tensor, nn.Parameter):
        return
    tensors = (weight, bias, peer_mean, *others.values(), x_pos, x_neg, product)
    # The usual case costs little: tensors without gaps, none of which begins before another ends.
    given = [t for t in tensors if t is not None]
    if all(map(Tensor.is_contiguous, given)):
        spans = sorted(zip(map(Tensor.data_ptr, given), map(_BYTES, given), strict=True))
        if all([start + size <= after for (start, size), (after, _) in pairwise(spans)]):
            return
    names = ("weight", "bias", "peer_mean", *others, "x_pos", "x_neg", "product")
    there = [(name, t, *_span(t)) for name, t in zip(names, tensors, strict=True) if t is not None and t.numel()]
    for i, (name, tensor, first, last) in enumerate(there):
        if name in ("x_pos", "x_neg", "product"):
            break
        for other_name, other, start, end in there[i + 1 :]:
            if start < last and first < end and _share_memory(tensor, other, min(first, start), max(last, end)):
                raise ValueError(
                    f"{other_name} shares memory with {name}, which the step writes; accepted: {other_name}.clone()"
                )


def _span(t: Tensor) -> tuple[int, int]:
    """The addresses between which a tensor lies."""
    first = t.data_ptr()
    if t.is_contiguous():
        return first, first + t.nbytes
    extent = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return first, first + extent * t.element_size()


def _share_memory(a: Tensor, b: Tensor, first: int, last: int) -> bool:
    """Whether two tensors whose spans meet have a place in common; columns of one matrix have none."""
    if a.is_contiguous() and b.is_contiguous():
        return True
    taken = torch.zeros(last - first, dtype=torch.bool)
    for t in (a, b):
        size = t.element_size()
        places = taken.as_strided((*t.shape, size), (*(s * size for s in t.stride()), 1), t.data_ptr() - first)
        if t is b:
            return bool(places.any())
        places.fill_(True)
    return False


def objective_object(objective: object) -> None:
    """Raises TypeError unless it is an `Objective`."""
    if not isinstance(objective, Objective):
        raise TypeError(f"objective={objective!r} is not an ffkernels.Objective")


def class_groups(objective: AnyObjective, units: int) -> None:
    """Raises ValueError unless a layer of so many units has one for each class."""
    if not isinstance(objective, ProjectionHead) and (objective.classes or 0) > units:
        raise ValueError(f"classes={objective.classes} came to a layer of {units} units; accepted: 1..{units}")


def objective_alone(objective: AnyObjective, skip_below: float, units: int | None = None) -> None:
    """Checks of an objective what does not hang on rows; `units`: the layer's width."""
    if units is not None:
        class_groups(objective, units)
    if isinstance(objective.threshold, Tensor):
        constant("threshold", objective.threshold)
    if skip_below and isinstance(objective, GivenLoss):
        raise ValueError(f"skip_below={skip_below!r} came with a loss of your own; accepted: 0, or an Objective")


def objective_for(objective: AnyObjective, rows: int, n_pos: int | None, like: Tensor, beside: str = "weight") -> None:
    """Checks that an objective fits a batch of `rows` rows; `n_pos` is None where only a mask knows it."""
    threshold = objective.threshold
    if isinstance(threshold, Tensor):
        if threshold.shape not in ((), (rows,)):
            raise ValueError(
                f"threshold has shape {tuple(threshold.shape)}; accepted: 0-dim or one value for each of {rows} rows"
            )
        if threshold.dim() == 1 or threshold.device.type != "cpu":
            _same_device("threshold", threshold, like.device, beside)
    if objective.paired and n_pos is not None and 2 * n_pos != rows:
        raise ValueError(
            f"loss={objective.loss!r} pairs rows but there are {n_pos} positive and {rows - n_pos} negative ones; "
            "accepted: equally many"
        )


def sample_weight(weights: Tensor, objective: AnyObjective, rows: int, like: Tensor) -> None:
    """Checks `[rows]` factors of the rows' losses, `[pairs]` for pair losses."""
    if isinstance(objective, GivenLoss):
        raise ValueError("sample_weight came with a loss of your own; accepted: None, and the weights in the loss")
    vector("sample_weight", weights, rows // 2 if objective.paired else rows, like.dtype, like.device)
    constant("sample_weight", weights)


def peer_normalisation(peer: object, mean: Tensor | None, weight: Tensor) -> None:
    """Checks peer normalisation and its running mean `[out]`, which come together or not at all."""
    peer_object(peer)
    if (peer is None) != (mean is None):
        came, missing = ("peer_mean", "peer") if peer is None else ("peer", "peer_mean")
        raise ValueError(f"{came} came without {missing}; accepted: both or neither")
    if mean is not None:
        vector("peer_mean", mean, weight.shape[0], weight.dtype, weight.device)
        constant("peer_mean", mean)
        writable("peer_mean", mean)


def peer_object(peer: object) -> None:
    """Raises TypeError unless it is a `PeerNormalisation` or None."""
    if peer is not None and not isinstance(peer, PeerNormalisation):
        raise TypeError(f"peer={peer!r} is not an ffkernels.PeerNormalisation(), nor None")


def _same_device(name: str, value: Tensor, device: torch.device, beside: str = "weight") -> None:
    if value.device != device:
        raise ValueError(f"{name} is on {value.device} but {beside} is on {device}; accepted: the same device")
