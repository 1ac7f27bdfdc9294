"""The one list of what is measured, shared by the command, by pytest-benchmark and by the tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from .originals import ORIGINALS, Original

NUM_CLASSES = 10
Layers = list[tuple[Tensor, ...]]
Batch = tuple[Tensor, ...]
# The mean goodness of normalised rows has gradients of a millionth: SGD needs a large rate, and the eps of the others
# keeps them from taking the sign of what is nothing but rounding.
OPTIMIZERS: dict[str, Callable[[Iterable[Tensor]], Optimizer]] = {
    "sgd": partial(SGD, lr=1000),
    "momentum": partial(SGD, lr=1000, momentum=0.9),
    "adam": partial(Adam, lr=0.003, eps=1e-5),
    "adamw": partial(AdamW, lr=0.003, eps=1e-5),
    "rmsprop": partial(RMSprop, lr=0.003, eps=1e-5),
}
# Channels, groups and pool of each layer of CwC's network.
CONVOLUTIONS = ((20, 1, 1), (80, 10, 2), (240, 1, 1), (480, 10, 2))
# Channels, pool and height of the kernel of each layer of the other networks of maps.
NETWORKS = {
    "trifecta": ((128, 2, 3), (128, 1, 3), (256, 2, 3), (256, 1, 3), (256, 1, 3), (512, 2, 3)),
    "scff-1": ((96, 1, 5),),
    "scff-2": ((384, 1, 3),),
}
# Which run by default; those of a tier run in the later ones too.
TIERS = ("quick", "default", "all")

# What grows along these names, and by how much.
AXES = {
    "width": {f"width-{n}": n for n in (512, 1024, 2048, 4096, 8192)},
    "batch": {f"batch-{n}": n for n in (1, 16, 128, 1024, 8192, 65536)},
    "depth": {f"depth-{n}": n for n in (1, 2, 4, 8, 16)},
}


@dataclass(frozen=True)
class Case:
    """A network, its data, and what is done: a training step as an original takes it, or the prediction of labels.

    `dtype` is that of weights and products; under "bfloat16" and "float16" only the products' operands are in it,
    weights and data are float32.
    """

    name: str
    original_name: str
    sizes: tuple[int, ...]
    rows: int  # of each side; to predict, the rows to label
    task: str = "train"  # or "predict": the best of 10 labels
    dtype: str = "float32"
    optimizer_name: str | None = None  # instead of the original's
    package: str | None = None  # the original as a package, a contender besides the plain writing of its step
    one_optimizer: bool = False  # for all layers, as against one for each
    label: str = "overlaid"  # on the first pixels, "concatenated", "apart"; or noise: "none", "colours" with labels
    compiled: bool = False  # with torch.compile's contenders, which take half a minute to build
    bare: bool = False  # with the bare products and torch's fused optimizer, where a step is overhead
    proof_steps: int = 3  # after which the weights of all contenders must agree
    warm_steps: int = 5  # taken by every contender before its steps are timed
    seconds: float = 4.0  # of timing, all contenders together
    tier: str = "default"
    device: str = "cpu"
    maps: tuple[int, int, int] | None = None  # channels, height, width of images, for the network's convolutions
    network: str = "cwc"  # `CONVOLUTIONS`; or one of `NETWORKS`
    proof_rows: int | None = None  # of a batch, the first ones, by which contenders prove what they compute

    @property
    def original(self) -> Original:
        """The original whose step this is."""
        return ORIGINALS[self.original_name]

    @property
    def convolutions(self) -> tuple[tuple[int, int, int], ...]:
        """Channels of each, and two numbers as `CONVOLUTIONS` or `NETWORKS` have them."""
        if self.maps is None:
            return ()
        return CONVOLUTIONS if self.network == "cwc" else NETWORKS[self.network]

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of every layer."""
        return list(zip(self.sizes[:-1], self.sizes[1:], strict=True))

    @property
    def sides(self) -> int:
        """2: a step takes positive and negative rows; 1: rows and their labels."""
        return self.original.sides

    @property
    def low_precision(self) -> torch.dtype | None:
        """The dtype of the products' operands where it is not the weights'."""
        return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(self.dtype)

    @property
    def master_dtype(self) -> torch.dtype:
        """The dtype of weights and data."""
        return torch.float64 if self.dtype == "float64" else torch.float32

    @property
    def product_dtype(self) -> torch.dtype:
        """The dtype of the products' operands."""
        return self.low_precision or self.master_dtype

    def __str__(self) -> str:
        """Network, rows and optimizer in a few words."""
        rows = f"{self.rows:,}" if self.task == "predict" or self.sides == 1 else f"2x{self.rows:,}"
        doing = "10 labels" if self.task == "predict" else type(self.optimizer([torch.zeros(1)])).__name__
        channels = [str(out) for out, *_ in self.convolutions]
        return f"{'-'.join([*map(str, self.maps or self.sizes), *channels])}, {rows} rows, {doing}"

    def optimizer(self, parameters: Iterable[Tensor]) -> Optimizer:
        """A new optimizer; on CUDA one that a graph can replay."""
        make = self.original.optimizer if self.optimizer_name is None else OPTIMIZERS[self.optimizer_name]
        made = make(parameters)
        for group in made.param_groups:
            if self.device == "cuda" and "capturable" in group:
                group["capturable"] = True
        return made

    def initial(self, seed: int = 0) -> Layers:
        """Weights and biases of every layer as the original initialises them.

        To predict, and on noise, weights that bring the goodness of normalised rows to the threshold, as training
        does: of smaller ones a step changes so little, or so much, that rounding shows more than who computes what.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if self.network in NETWORKS:
                from .blocks import initial_of

                return initial_of(self)
            if self.maps is not None:
                return self._initial_convolutions(self.maps[0])
            layers = [nn.Linear(inputs, outputs) for inputs, outputs in self.shapes]
            for layer in layers:
                if self.task == "predict" or self.label == "none":
                    # z of a row of length 1 is normal with this deviation, and a ReLU keeps half of its square.
                    nn.init.normal_(layer.weight, std=(2 * self.original.objective.get("threshold", 2.0)) ** 0.5)
                    nn.init.zeros_(layer.bias)
                elif self.original.init is not None:
                    self.original.init(layer.weight)
                    nn.init.zeros_(layer.bias)
            heads = [nn.Linear(outputs, NUM_CLASSES, bias=False).weight for _, outputs in self.shapes]
        found: Layers = [(layer.weight, layer.bias) for layer in layers]
        if self.original.has_head:
            found = [(*layer, head) for layer, head in zip(found, heads, strict=True)]
        return [tuple(p.detach().to(self.device, self.master_dtype) for p in layer) for layer in found]

    def _initial_convolutions(self, channels: int) -> Layers:
        """Weight and bias of every convolution, and those of the normalisation behind it."""
        layers: Layers = []
        for out, groups, _ in CONVOLUTIONS:
            of = nn.Conv2d(channels, out, 3, groups=groups), nn.BatchNorm2d(out)
            parameters = [p.detach().to(self.device, self.master_dtype) for module in of for p in module.parameters()]
            layers.append(tuple(parameters))
            channels = out
        return layers

    def states_per_parameter(self) -> int:
        """How many tensors of the parameter's size its optimizer keeps, as one step shows."""
        probe = nn.Parameter(torch.zeros(2, 2))
        probe.grad = torch.ones(2, 2)
        optimizer = replace(self, device="cpu").optimizer([probe])
        optimizer.step()
        return sum(isinstance(v, Tensor) and v.shape == probe.shape for v in optimizer.state[probe].values())


def _in_dtypes(case: Case, **tiers: str) -> list[Case]:
    return [replace(case, name=f"{case.name}-{dtype}", dtype=dtype, tier=tier) for dtype, tier in tiers.items()]


def _networks() -> list[Case]:
    """Networks of the size that MNIST asks for, as the originals train them."""
    fflib = Case(
        "fflib", "fflib", (794, 2000, 2000), 128,
        package="fflib", label="concatenated", compiled=True, warm_steps=10, seconds=16,
    )  # fmt: skip
    loewex = Case(
        "loewex", "loewex", (784, 1000, 1000, 1000), 100,
        one_optimizer=True, compiled=True, warm_steps=50, seconds=16,
    )  # fmt: skip
    full_batch = Case(
        "mohammadpz", "mohammadpz", (784, 500), 50_000, compiled=True, proof_steps=2, warm_steps=0, seconds=60
    )
    bioff = Case(
        "bioff-float32", "bioff", (794, 256, 128), 500,
        package="bioff", label="concatenated", compiled=True, seconds=10,
    )  # fmt: skip
    grouped = Case(
        "grouped", "grouped", (784, 1000, 1000), 128,
        one_optimizer=True, label="apart", compiled=True, warm_steps=10, seconds=12,
    )  # fmt: skip
    headed = replace(grouped, name="mono-forward-float32", original_name="mono-forward")
    cwc = Case(
        "cwc-mnist", "cwc", (784,), 128,
        label="apart", compiled=True, proof_steps=1, seconds=20, maps=(1, 28, 28),
    )  # fmt: skip
    coloured = replace(cwc, name="cwc-cifar10", sizes=(3 * 32 * 32,), label="colours", seconds=30, maps=(3, 32, 32))
    trifecta = Case(
        "trifecta", "trifecta", (784,), 512,
        label="apart", proof_steps=1, warm_steps=1, seconds=120, tier="all", maps=(1, 28, 28), network="trifecta",
        proof_rows=16,
    )  # fmt: skip
    pairs = [
        Case(
            name, "scff", (maps[0] * maps[1] * maps[2],), 50,
            label="colours", seconds=20, tier="all", maps=maps, network=name, proof_steps=1, proof_rows=16,
        )
        for name, maps in {"scff-1": (3, 32, 32), "scff-2": (96, 16, 16)}.items()
    ]  # fmt: skip
    others = {
        "hinton": ((784, 1000, 1000, 1000), 100),
        "ffpytorch": ((784, 500, 500), 5000),
        "nebuly": ((784, 500, 500), 1000),
        "keras-io": ((784, 500, 500), 30_000),
        "dah33-symba": ((784, 500, 500), 1000),
        "barbano": ((784, 2000, 2000), 128),
        "recurrentff": ((784, 500, 500), 500),
    }
    # Nearly all its gradients are smaller than the eps of its Adam, under which rounding decides by luck.
    eased = {"dah33-symba": "adam"}
    return [
        *_in_dtypes(fflib, float32="quick", bfloat16="default", float64="all", float16="all"),
        *_in_dtypes(loewex, float32="quick", bfloat16="default", float64="all", float16="all"),
        *_in_dtypes(full_batch, float32="default", bfloat16="all"),
        bioff,
        *_in_dtypes(grouped, float32="default", bfloat16="default"),
        headed,
        *_in_dtypes(cwc, float32="all", bfloat16="all"),
        *_in_dtypes(coloured, float32="default", bfloat16="default"),
        *_in_dtypes(trifecta, float32="all", bfloat16="all"),
        *(case for of in pairs for case in _in_dtypes(of, float32="all", bfloat16="all")),
        *(
            Case(f"{name}-float32", name, *shape, optimizer_name=eased.get(name), proof_steps=2, tier="all")
            for name, shape in others.items()
        ),
    ]


def _layers() -> list[Case]:
    """Layers by themselves, on noise: over optimizers, and along width, batch and depth."""
    base = Case(
        "", "mohammadpz", (1024, 1024), 128,
        label="none", optimizer_name="adam", proof_steps=2, warm_steps=2, seconds=5,
    )  # fmt: skip
    tiny = replace(base, name="overhead", sizes=(8, 8), rows=1, compiled=True, bare=True, tier="quick", seconds=3)
    small = replace(
        base, name="overhead-3", sizes=(64,) * 4, rows=16, one_optimizer=True, compiled=True, bare=True, seconds=5
    )
    optimizers = [
        replace(base, name=f"optimizer-{name}", optimizer_name=name, tier="all" if name == "adam" else "default")
        for name in OPTIMIZERS  # with Adam it is width-1024
    ]
    widths = [
        replace(base, name=name, sizes=(n, n), seconds=5 if n < 2048 else 10, tier=_tier(n, 4096))
        for name, n in AXES["width"].items()
    ]
    batches = [
        replace(base, name=name, rows=n, seconds=5 if n < 1024 else 10, tier=_tier(n, 8192))
        for name, n in AXES["batch"].items()
    ]
    depths = [
        replace(base, name=name, sizes=(512,) * (n + 1), rows=512, seconds=5 if n < 4 else 7)
        for name, n in AXES["depth"].items()
    ]
    square = replace(base, name="square-2048", sizes=(2048, 2048), rows=2048, seconds=12)
    return [tiny, small, square, *optimizers, *widths, *batches, *depths]


def _tier(size: int, largest: int) -> str:
    return "default" if size <= largest else "all"


def _predictions() -> list[Case]:
    fflib = Case(
        "predict-fflib", "fflib", (794, 2000, 2000), 128,
        task="predict", package="fflib", label="concatenated", seconds=8,
    )  # fmt: skip
    mohammadpz = Case(
        "predict-mohammadpz", "mohammadpz", (784, 500, 500), 1000, task="predict", seconds=8, tier="quick"
    )
    low = replace(fflib, name="predict-fflib-bfloat16", dtype="bfloat16", tier="all")
    grouped = Case("predict-grouped", "grouped", (784, 1000, 1000), 128, task="predict", label="apart", seconds=8)
    return [fflib, low, mohammadpz, grouped]


CASES = {case.name: case for case in (*_networks(), *_predictions(), *_layers())}


def select_cases(patterns: Iterable[str] | None, tier: str, device: str = "cpu") -> list[Case]:
    """The cases whose names match one of the shell patterns; without any, those of a tier.

    Raises:
        ValueError: for a pattern that no name matches.
    """
    if patterns is None:
        chosen = [case for case in CASES.values() if TIERS.index(case.tier) <= TIERS.index(tier)]
    else:
        patterns = list(patterns)
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in CASES):
                raise ValueError(f"no case is named {pattern!r}; there are: {', '.join(CASES)}")
        chosen = [case for case in CASES.values() if any(fnmatchcase(case.name, p) for p in patterns)]
    return [replace(case, device=device) for case in chosen]
