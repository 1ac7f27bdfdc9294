"""Random layer steps over the whole surface of `linear_step_`: cases that `hypothesis` draws, and their tensors."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

import ffkernels as ff
from ffkernels import validation as check
from ffkernels.objectives import GOODNESS, REDUCTIONS
from ffkernels.optim import SGDW
from ffkernels.peer import FORMS

COMPUTE = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
THRESHOLD_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _rows_in(layout: str, x: Tensor) -> Tensor:
    """`x` `[rows, columns]` (or a vector) in other memory; what lies around it is NaN."""
    if layout == "read-only":
        return read_only(x)
    if x.dim() == 1:
        return x if layout == "contiguous" else torch.stack([x, torch.full_like(x, torch.nan)], 1)[:, 0]
    if layout == "transposed":
        return x.t().contiguous().t()
    if layout == "wider":
        return torch.nn.functional.pad(x, (1, 2), value=torch.nan)[:, 1:-2]
    if layout == "strided":
        return torch.stack([x, torch.full_like(x, torch.nan)], 2)[:, :, 0]
    return x


def read_only(x: Tensor) -> Tensor:
    """A copy of `x` in memory that a write to would end the process."""
    if x.dtype == torch.bfloat16 or not x.numel():
        return x.clone()
    pages = mmap.mmap(-1, x.numel() * x.element_size())
    pages.write(x.contiguous().numpy().tobytes())
    sealed = np.frombuffer(pages, dtype=x.numpy().dtype).reshape(tuple(x.shape))
    _protect(pages)
    return torch.from_numpy(sealed)


def _protect(pages: mmap.mmap) -> None:
    start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(start), len(pages), mmap.PROT_READ) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")


LAYOUTS = ("contiguous", "transposed", "wider", "strided", "read-only")
WRITABLE = LAYOUTS[:-1]


def _sgdw(p: list[Tensor], **options: Any) -> Optimizer:
    return SGDW(p, **options)


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"SGD": SGD, "SGDW": _sgdw, "Adam": Adam, "AdamW": AdamW}


@dataclass(frozen=True)
class Case:
    """One drawn step: everything but the tensors, which follow from `seed`."""

    seed: int
    compute: str
    n_pos: int
    n_neg: int
    in_features: int
    out_features: int
    has_bias: bool
    objective: dict[str, Any]
    threshold: str
    threshold_dtype: torch.dtype
    options: dict[str, Any]
    optimizer: str
    settings: dict[str, Any]
    lr_tensor: bool
    copies: bool
    label_at: float
    label_size: float
    told: bool
    product: bool
    mixed: bool
    weighted: bool
    known_sumsq: bool
    layouts: dict[str, str]
    rounded_input: bool
    row_scale: float
    peer: dict[str, Any] | None
    steps: int = 2

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.compute == "float64" else torch.float32

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """The argument of a step: None where its products are taken in its own dtype."""
        return None if COMPUTE[self.compute] == self.dtype else COMPUTE[self.compute]

    @property
    def u(self) -> float:
        # The truth is itself of float64: its rounding counts beside that of the package's.
        return torch.finfo(self.dtype).eps * (1 if self.dtype == torch.float64 else 0.5)

    @property
    def u_operand(self) -> float:
        return 0.0 if COMPUTE[self.compute] == self.dtype else torch.finfo(COMPUTE[self.compute]).eps / 2

    @property
    def least_operand(self) -> float:
        """What is lost of operands that are small for the compute dtype: half of its smallest number."""
        lowest = torch.finfo(COMPUTE[self.compute])
        return lowest.smallest_normal * lowest.eps / 2 if self.u_operand else 0.0


_sgd_settings = st.fixed_dictionaries(
    {"lr": st.sampled_from([0.0, 0.01, 0.5]), "maximize": st.booleans(), "weight_decay": st.sampled_from([0.0, 0.1])}
)
_momentum = st.one_of(
    st.fixed_dictionaries({"momentum": st.just(0.0)}),
    st.fixed_dictionaries({"momentum": st.sampled_from([0.5, 0.9]), "dampening": st.sampled_from([0.0, 0.1, 0.9])}),
    st.fixed_dictionaries({"momentum": st.sampled_from([0.5, 0.9]), "nesterov": st.just(True)}),
)
_sgd = st.builds(lambda a, b: {**a, **b}, _sgd_settings, _momentum)
_adam = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([0.0, 1e-3, 0.1]),
        "betas": st.sampled_from([(0.9, 0.999), (0.0, 0.9), (0.8, 0.5)]),
        "eps": st.sampled_from([1e-8, 1e-3]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "maximize": st.booleans(),
    }
)
_settings = {
    "SGD": _sgd,
    "SGDW": st.builds(lambda a, b: {**a, "decoupled": b}, _sgd, st.sampled_from([0.0, 0.3])),
    "Adam": _adam,
    "AdamW": _adam,
}


@st.composite
def cases(draw: Any, backend: str) -> Case:
    """Steps that `backend` can run."""
    compute = draw(st.sampled_from([name for name in COMPUTE if backend != "native" or name != "float64"]))
    paired = draw(st.booleans()) and draw(st.booleans())
    objective: dict[str, Any] = {
        "goodness": draw(st.sampled_from(GOODNESS)),
        "maximize": draw(st.booleans()),
        "reduction": draw(st.sampled_from(REDUCTIONS)),
    }
    if paired:
        objective |= {"loss": draw(st.sampled_from(["symba", "swish"])), "alpha": draw(st.sampled_from([0.3, 4.0]))}
    else:
        objective |= {"temperature": draw(st.sampled_from([0.2, 1.0, 5.0]))}
    copies = draw(st.booleans())
    n_pos = draw(st.integers(0, 40) | st.integers(0, 5))
    n_neg = n_pos if copies or paired else draw(st.integers(0, 40))
    peer = None
    if draw(st.integers(0, 3)) == 0:
        peer = {
            "form": draw(st.sampled_from(FORMS)),
            "strength": draw(st.sampled_from([0.0, 0.03, 1.0])),
            "momentum": draw(st.sampled_from([0.0, 0.9])),
            "gated": draw(st.booleans()),
        }
    optimizer = draw(st.sampled_from(list(OPTIMIZERS)))
    mixed = draw(st.booleans()) and not copies
    label_sizes = [1.0, 30.0] if compute == "float16" else [1.0, 1e2, 1e4, 1e8]
    return Case(
        seed=draw(st.integers(0, 2**20)),
        compute=compute,
        n_pos=n_pos,
        n_neg=n_neg,
        in_features=draw(st.integers(1, 70)),
        out_features=draw(st.integers(1, 70)),
        has_bias=draw(st.booleans()),
        objective=objective,
        threshold=draw(st.sampled_from(["number", "sides", "tensor", "rows"])) if not paired else "number",
        threshold_dtype=draw(st.sampled_from(THRESHOLD_DTYPES)),
        options={
            "norm": draw(st.sampled_from(check.NORMS)),
            "eps": draw(st.sampled_from([0.0, 1e-4, 0.5])),
            "eps_mode": draw(st.sampled_from(check.EPS_MODES)),
            "activation": draw(st.sampled_from(check.ACTIVATIONS)),
            "outputs": draw(st.sampled_from(check.OUTPUTS)),
            "skip_below": draw(st.sampled_from([0.0, 0.0, 1e-3, 0.3])),
        },
        optimizer=optimizer,
        settings=draw(_settings[optimizer]),
        lr_tensor=draw(st.booleans()) and draw(st.booleans()),
        copies=copies,
        label_at=draw(st.sampled_from([0.0, 0.0, 0.5, 1.0])),
        label_size=draw(st.sampled_from(label_sizes)),
        told=draw(st.booleans()),
        product=draw(st.booleans()) and backend != "native" and compute != "float16",
        mixed=mixed,
        weighted=draw(st.booleans()),
        known_sumsq=draw(st.booleans()) and draw(st.booleans()),
        layouts={
            "weight": draw(st.sampled_from(WRITABLE)),
            "bias": draw(st.sampled_from(WRITABLE)),
            "x_pos": draw(st.sampled_from(LAYOUTS)),
            "x_neg": draw(st.sampled_from(LAYOUTS)),
            "rows": draw(st.sampled_from(LAYOUTS)),
        },
        rounded_input=draw(st.booleans()),
        row_scale=draw(st.sampled_from([1.0, 1.0, 1e-3, 10.0 if compute == "float16" else 1e3])),
        peer=peer,
    )


@dataclass
class Made:
    """A case's tensors: those that the package gets, in their layouts."""

    x_pos: Tensor
    x_neg: Tensor | None
    weight: torch.nn.Parameter
    bias: torch.nn.Parameter | None
    optimizer: Optimizer
    objective: ff.Objective
    peer_mean: Tensor | None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def x(self) -> Tensor:
        return self.x_pos if self.x_neg is None else torch.cat([self.x_pos, self.x_neg])


def make(case: Case) -> Made:
    """The tensors of a case, always the same ones."""
    g = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(case.dtype)

    n = case.n_pos + case.n_neg
    x = normal(n, case.in_features) * case.row_scale
    x[: n // 5] *= 0.01
    x[n // 2 : n // 2 + 1] = 0
    width = max(1, case.in_features // 10)
    first = 0 if case.told else round(case.label_at * (case.in_features - width))
    if case.copies:
        x[case.n_pos :] = x[: case.n_pos]
        labels = normal(n, width)
        x[:, first : first + width] = labels * case.row_scale
        x[: case.n_pos, first : first + width] *= case.label_size
    if case.rounded_input:
        x = x.to(COMPUTE[case.compute])
    weight = torch.nn.Parameter(_rows_in(case.layouts["weight"], normal(case.out_features, case.in_features)))
    bias = torch.nn.Parameter(_rows_in(case.layouts["bias"], normal(case.out_features))) if case.has_bias else None
    parameters = [weight] if bias is None else [weight, bias]
    settings = dict(case.settings)
    if case.lr_tensor:
        settings["lr"] = torch.tensor(settings["lr"])
    objective, options = ff.Objective(**case.objective), dict(case.options)
    numbers = torch.rand(n, generator=g, dtype=torch.float64) * 4
    if case.threshold == "sides":
        objective = replace(objective, threshold=(1.5, 3.0))
    elif case.threshold == "tensor":
        objective = replace(objective, threshold=numbers.sum().fmod(5).to(case.threshold_dtype))
    elif case.threshold == "rows":
        objective = replace(objective, threshold=_rows_in(case.layouts["rows"], numbers.to(case.threshold_dtype)))
    if case.weighted:
        entries = n // 2 if objective.paired else n
        drawn = torch.rand(entries, generator=g, dtype=torch.float64).to(case.dtype)
        options["sample_weight"] = _rows_in(case.layouts["rows"], drawn)
    made = Made(
        _rows_in(case.layouts["x_pos"], x[: case.n_pos]),
        _rows_in(case.layouts["x_neg"], x[case.n_pos :]),
        weight,
        bias,
        OPTIMIZERS[case.optimizer](parameters, **settings),
        objective,
        None if case.peer is None else torch.rand(case.out_features, generator=g, dtype=torch.float64).to(case.dtype),
        options,
    )
    if case.peer is not None:
        options["peer"] = ff.PeerNormalisation(**case.peer)
    if case.mixed:
        order = torch.randperm(n, generator=g)
        made.x_pos, made.x_neg = _rows_in(case.layouts["x_pos"], x[order]), None
        options["is_positive"] = (torch.arange(n) < case.n_pos)[order]
    elif case.copies and case.told:
        options["label_field"] = width
        if case.product:
            made.options["product"] = None  # made anew for each step's weight
    if case.known_sumsq:
        options["input_sumsq"] = _rows_in(case.layouts["rows"], made.x.double().square().sum(1).to(case.dtype))
    return made


def take_step(case: Case, made: Made, backend: str) -> ff.StepResult:
    """One step of a case on `backend`."""
    if "product" in made.options:
        made.options["product"] = ff.shared_product(
            made.x_pos, made.weight, made.options["label_field"], compute_dtype=case.compute_dtype
        )
    return ff.linear_step_(
        made.x_pos, made.x_neg, made.weight, made.bias, made.optimizer, objective=made.objective,
        compute_dtype=case.compute_dtype, peer_mean=made.peer_mean, backend=backend, **made.options,
    )  # fmt: skip
