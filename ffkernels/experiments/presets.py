"""Training recipes as data: everything that a run's numbers depend on besides data, seed, device and dtype."""

from __future__ import annotations

from dataclasses import dataclass

from ..objective import Objective


@dataclass(frozen=True)
class Rule:
    """A `torch.optim` rule: "sgd" or "adam" (which takes no momentum here)."""

    optimizer: str
    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Preset:
    """One recipe. Labels are overlaid one-hot with value 1; layers are counted from 0.

    Attributes:
        name: what the command line calls it.
        source: where its numbers come from, and where it departs from there.
        hidden: widths of the layers.
        epochs: passes over the training set; the learning rates are constant for the first half of them, then fall
            linearly to 0.
        layers: one optimizer for all layers.
        classifier: optimizer of the linear classifier (no bias, starts at zero) that is trained alongside, by
            cross-entropy on `FFNetwork.features`.
        goodness, loss, alpha: of the `Objective`.
        threshold: of the `Objective`; None for the width of the layer.
        norm, eps, eps_mode, activation, outputs: of the `FFLinear` layers.
        init: "torch" for `torch.nn.Linear`'s own, "fan_out" for normal weights of standard deviation 1/sqrt(width)
            and zero biases.
        negatives: the wrong label is drawn "uniform"-ly, or from the "classifier"'s softmax without the right label
            (hard negatives, Hinton 2022, section 3.3).
        batch_size: images in a minibatch; each is one positive and one negative row.
        goodness_layers: those whose goodness is summed for a prediction; None for all.
        goodness_every: epochs between tests by goodness, which cost a forward pass for each label; the last epoch
            is always tested.
    """

    name: str
    source: str
    hidden: tuple[int, ...]
    epochs: int
    layers: Rule
    classifier: Rule
    goodness: str = "mean"
    loss: str = "logistic"
    alpha: float = 4.0
    threshold: float | None = 2.0
    norm: str = "rms"
    eps: float = 1e-8
    eps_mode: str = "add"
    activation: str = "relu"
    outputs: str = "pre"
    init: str = "torch"
    negatives: str = "uniform"
    batch_size: int = 100
    goodness_layers: tuple[int, ...] | None = None
    goodness_every: int = 1

    def objective(self, width: int) -> Objective:
        """The objective of a layer of `width` units."""
        threshold = width if self.threshold is None else self.threshold
        return Objective(goodness=self.goodness, threshold=float(threshold), loss=self.loss, alpha=self.alpha)


QUICK = Preset(
    name="quick",
    source="Small and fast, made for this package: pairs of positive and hard negative rows under the swish loss "
    "(loss and alpha as in dah33's exploration of Forward-Forward losses), Adam, the loewex classifier with Adam.",
    hidden=(500, 500),
    epochs=6,
    layers=Rule("adam", lr=2e-3),
    classifier=Rule("adam", lr=1e-3),
    loss="swish",
    alpha=6.0,
    negatives="classifier",
)

LOEWEX = Preset(
    name="loewex",
    source="github.com/loeweX/Forward-Forward, after Hinton's Matlab code. Departures: 60 epochs for its 100, all of "
    "the training images for 50 000 of them, the true gradient of the ReLU, and no peer normalisation (its 0.03).",
    hidden=(1000, 1000, 1000),
    epochs=60,
    layers=Rule("sgd", lr=1e-3, momentum=0.9, weight_decay=3e-4),
    classifier=Rule("sgd", lr=1e-2, momentum=0.9, weight_decay=3e-3),
    goodness="sum",
    threshold=None,
    init="fan_out",
    goodness_layers=(1, 2),
    goodness_every=10,
)

PRESETS = {preset.name: preset for preset in (QUICK, LOEWEX)}
