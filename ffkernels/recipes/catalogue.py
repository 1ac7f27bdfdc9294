"""Training recipes as data: everything that a run's numbers depend on besides data, seed, device and dtype.

Each says where its numbers come from (`source`), what it is held against (`published`), and what no source says or what
is done otherwise here (`assumed`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from ..objectives import CLASS_LOSSES, Form, Objective, ProjectionHead
from ..peer import PeerNormalisation
from ..spec import Activation, EpsMode, Goodness, Loss, Norm, OutputsOf


@dataclass(frozen=True)
class Rule:
    """A `torch.optim` rule: "sgd" or "adam" (which takes no momentum here).

    With `average` the momentum is an average of gradients that starts at zero: `a <- momentum a + (1 - momentum) g`.
    With `decoupled` the decay acts on matrices alone, beside the average: `p <- p - lr (a + weight_decay p)`; under
    Adam on all parameters, as in AdamW.
    """

    optimizer: str
    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    average: bool = False
    decoupled: bool = False


@dataclass(frozen=True)
class Convolution:
    """A convolutional layer, whose maps are padded to keep their size.

    Attributes:
        by_class: whether its channels are convolved in groups, one for each class.
        pool: size and stride of the pooling behind it, maximum pooling behind its activation or, where maps are
            normalised by groups, averages of what is handed on; 1 for none.
        learns: epochs in which it learns, from the first to before the second, counted from 0; None for all. Later it
            hands on as ever, by the statistics of each batch.
        kernel: height and width of its kernels, an odd number.
    """

    channels: int
    by_class: bool = False
    pool: int = 1
    learns: tuple[int, int] | None = None
    kernel: int = 3


@dataclass(frozen=True)
class Recipe:
    """One recipe. Labels are one-hot; layers are counted from 0.

    Where the loss is one of classes ("cross_entropy", "cwc", "pvn"), each layer's units are divided among the classes,
    or a head scores these, and there are neither negative rows nor labels in the image.

    Attributes:
        name: what the command line calls it.
        source: where its numbers come from.
        hidden: widths of the linear layers.
        convolutions: the layers in front of them, without norm.
        norm_of_maps: "batch" for batch normalisation of `eps` behind each; "groups" for convolutions without bias,
            which start normal by fan-out, images standardised whole, and group normalisation of what is handed on, a
            group for each class; "overlapped" for Trifecta's blocks, batch normalisation and a convolution without
            bias: every other one has a loss in a step, which reaches the one below too, and an Adam of its own.
        dropped_units: what share of a convolution's activities is left out in a step.
        epochs: passes over the training set.
        layers: one optimizer for all layers.
        classifier: optimizer of the linear classifier (no bias, starts at zero) that is trained alongside, by
            cross-entropy on `FFNetwork.features`, or beside overlapped blocks on the pixels; None for no classifier.
        classifier_layers: whose features it reads; None for all but the first.
        settling: how many minibatches of training images, neither shifted nor dropped, batch normalisation goes by in a
            test, with the weights as they are then (Wu & Johnson, Rethinking "Batch" in BatchNorm, 2021); 0: by the
            running statistics.
        averaging: a test, and the end of a run, go by averages over steps of what is trained; each keeps this share of
            the average and adds the rest. 0: by what the last step left.
        assumed: what the source leaves open or what departs from it.
        published: the test error that the source reports.
        published_on: the data that it is of.
        goodness: of the `Objective`, as are loss, alpha, temperature and label_smoothing.
        threshold: of the `Objective`; None for the width of the layer.
        head: None for class groups; "projection" or "prototypes" for a `ProjectionHead` of that form in every layer.
        norm: of the `FFLinear` layers, as are eps, eps_mode, activation and outputs.
        peer: peer normalisation of every layer.
        init: "torch" for `torch.nn.Linear`'s own, "fan_in" or "fan_out" for normal weights of standard deviation
            1/sqrt(inputs) or 1/sqrt(width) and zero biases.
        label: where it stands: in the image's first "pixels", in "columns" of its own before them, in a learned "map"
            beside the image, of overlapped convolutions; or there is "none" and nothing is predicted by goodness but
            of classes.
        negatives: the wrong label is drawn "uniform"-ly, from the "classifier"'s softmax without the right label (hard
            negatives, Hinton 2022, section 3.3), or half of them from there and half "met": of those that the image has
            had, the one whose goodness came nearest to the right one's in the last layer with a loss, which with
            overlapped updates is another one every other step; or it comes with the batch's labels "shuffled", some of
            which are right; or, without labels, "hybrid" images (section 3.2); "none" for a loss of classes.
        negatives_temperature: what the logits of that softmax are divided by: lower, harder negatives.
        batch_size: images in a minibatch; each is one positive and one negative row, or one row alone.
        train_images: how many of the training images, the first ones; None for all.
        jitter: training images are shifted by up to so many pixels, anew in every epoch.
        rotation: training images are turned by up to so many degrees, anew in every epoch.
        zoom: their size is changed by up to that share, anew in every epoch.
        flips: whether training images are turned left to right, half of them, drawn anew in every epoch.
        dropout: what share of a training image's inputs is set to 0, drawn anew in every epoch; the rest is divided by
            `1 - dropout`.
        pixel_mean: pixels of 0..1 are standardised by it and `pixel_std`; a label stands for the brightest pixel.
        pixel_std: see `pixel_mean`.
        cooldown: with `e` of `E` epochs the learning rates are multiplied by `min(1, (cooldown + 2 (E - e)) / E)`:
            constant for half of them, then linear to 0. None: constant.
        cosine: in place of `cooldown` the rates fall along half a cosine, to this share of them after the last epoch.
        layerwise_steps: with the number given, each layer takes so many steps on a batch before the next one starts.
        goodness_layers: those whose goodness is summed for a prediction; None for all. Of overlapped blocks each counts
            by its share of the goodness under all labels.
        test_shift: of overlapped blocks a prediction goes by the goodness of an image as it is and of it shifted by so
            many pixels in each of four directions; 0: as it is.
        goodness_every: epochs between tests by goodness, which cost a forward pass for each label; the last epoch
            is always tested.
    """

    name: str
    source: str
    hidden: tuple[int, ...]
    epochs: int
    layers: Rule
    classifier: Rule | None
    assumed: str = ""
    published: str = ""
    published_on: str = "mnist"
    goodness: Goodness = "mean"
    loss: Loss = "logistic"
    alpha: float = 4.0
    temperature: float = 1.0
    label_smoothing: float = 0.0
    threshold: float | None = 2.0
    head: Form | None = None
    norm: Norm = "rms"
    eps: float = 1e-8
    eps_mode: EpsMode = "add"
    activation: Activation = "relu"
    outputs: OutputsOf = "pre"
    peer: PeerNormalisation | None = None
    init: str = "torch"
    label: str = "pixels"
    negatives: str = "uniform"
    negatives_temperature: float = 1.0
    batch_size: int = 100
    train_images: int | None = None
    jitter: int = 0
    rotation: float = 0.0
    zoom: float = 0.0
    flips: bool = False
    dropout: float = 0.0
    pixel_mean: float = 0.0
    pixel_std: float = 1.0
    cooldown: float | None = 2.0
    layerwise_steps: int = 0
    goodness_layers: tuple[int, ...] | None = None
    test_shift: int = 0
    goodness_every: int = 1
    convolutions: tuple[Convolution, ...] = ()
    classifier_layers: tuple[int, ...] | None = None
    settling: int = 0
    averaging: float = 0.0
    norm_of_maps: Literal["batch", "groups", "overlapped"] = "batch"
    dropped_units: float = 0.0
    cosine: float | None = None

    @property
    def overlapped(self) -> bool:
        """Whether its layers are Trifecta's blocks."""
        return self.norm_of_maps == "overlapped"

    @property
    def of_classes(self) -> bool:
        """Whether layers learn from labels alone, without negative rows."""
        return self.loss in CLASS_LOSSES

    def objective(self, width: int, num_classes: int) -> Objective | ProjectionHead:
        """The objective of a layer of `width` units."""
        softmax: Any = {"temperature": self.temperature, "label_smoothing": self.label_smoothing}
        if self.head is not None:
            return ProjectionHead(num_classes, form=self.head, **softmax)
        return Objective(
            goodness=self.goodness,
            threshold=float(width if self.threshold is None else self.threshold),
            loss=self.loss,
            alpha=self.alpha,
            classes=num_classes if self.of_classes else None,
            **softmax,
        )

    @property
    def label_value(self) -> float:
        """What marks a label: the brightest pixel."""
        return (1 - self.pixel_mean) / self.pixel_std


HARD_NEGATIVES = Recipe(
    name="hard-negatives",
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

HINTON_MATLAB = Recipe(
    name="hinton-matlab",
    source="Hinton's Matlab code for section 3.3 of the paper (cs.toronto.edu/~hinton), through its ports: three "
    "passes a batch on the same weights (positive, neutral, hard negative). The mean over 2B rows of a loss of q - "
    "width has his gradient, which is a sum over B with the 2 of the square's derivative dropped.",
    assumed="All 60,000 training images. Decay 1e-3 (ports that train longer have 2e-3). Weights start at standard "
    "deviation 1/sqrt(inputs). His tiny constant exp(-100) is no normal float32: 1e-20. The classifier's softmax reads "
    "the features before its own step, as the hard negatives do.",
    published="1.47 to 1.65%",
    hidden=(1000, 1000, 1000),
    epochs=100,
    layers=Rule("sgd", lr=1e-2, momentum=0.9, weight_decay=1e-3, average=True, decoupled=True),
    classifier=Rule("sgd", lr=1e-1, momentum=0.9, weight_decay=3e-3, average=True, decoupled=True),
    goodness="sum",
    threshold=None,
    eps=1e-20,
    peer=PeerNormalisation("hinton", strength=0.03, momentum=0.9),
    init="fan_in",
    negatives="classifier",
    cooldown=1.0,
    goodness_layers=(1, 2),
    goodness_every=10,
)

HINTON_SUPERVISED = replace(
    HINTON_MATLAB,
    name="hinton-supervised",
    source="Hinton 2022, section 3.3: four layers of 2000 ReLUs, labels in the first pixels, hard negatives, 60 "
    "epochs.",
    assumed="Everything else as in hinton-matlab; the classifier and the goodness read all layers but the first.",
    published="1.36%",
    hidden=(2000, 2000, 2000, 2000),
    epochs=60,
    goodness_layers=(1, 2, 3),
)

HINTON_JITTER = replace(
    HINTON_SUPERVISED,
    name="hinton-jitter",
    source="Hinton 2022, section 3.3: hinton-supervised on images shifted by up to two pixels in each direction, 500 "
    "epochs.",
    assumed="As hinton-supervised; a shift of the 25 is drawn anew for each image in each epoch.",
    published="0.64%",
    epochs=500,
    jitter=2,
    goodness_every=50,
)

HINTON_UNSUPERVISED = replace(
    HINTON_MATLAB,
    name="hinton-unsupervised",
    source="Hinton 2022, section 3.2: four layers of 2000 ReLUs, hybrid images as negatives, 100 epochs; a linear "
    "softmax on the normalised activities of the last three layers.",
    assumed="Rates, decay, averages, peer normalisation and threshold as in hinton-matlab; ten passes of the mask's "
    "blur; the softmax is trained alongside, on the activities of the positive rows, instead of afterwards.",
    published="1.37%",
    hidden=(2000, 2000, 2000, 2000),
    label="none",
    negatives="hybrid",
    goodness_layers=None,
)

LOEWEX = Recipe(
    name="loewex",
    source="github.com/loeweX/Forward-Forward, after Hinton's Matlab code: its first 50,000 training images, random "
    "wrong labels, one SGD for everything.",
    assumed="The true gradient of the ReLU, for which theirs lets that of inactive units through (the same but for "
    "peer normalisation, which is straight through here as well).",
    published="1.45%",
    hidden=(1000, 1000, 1000),
    epochs=100,
    layers=Rule("sgd", lr=1e-3, momentum=0.9, weight_decay=3e-4),
    classifier=Rule("sgd", lr=1e-2, momentum=0.9, weight_decay=3e-3),
    goodness="sum",
    threshold=None,
    peer=PeerNormalisation("loewex", strength=0.03, momentum=0.9),
    init="fan_out",
    train_images=50_000,
    goodness_layers=(1, 2),
    goodness_every=10,
)

ABLATION = replace(
    LOEWEX,
    name="ablation",
    source="Made for this package: loewex, smaller and shorter, so that many runs can be held against each other.",
    assumed="",
    published="",
    hidden=(500, 500, 500),
    epochs=8,
    goodness_every=8,
)

MOHAMMADPZ = Recipe(
    name="mohammadpz",
    source="github.com/mohammadpz/pytorch_forward_forward: 50,000 images as one batch, shuffled labels as negatives, "
    "1000 steps of one layer and then of the next.",
    assumed="The first 50,000 images; one draw of the negatives for all steps, as theirs.",
    published="6.8%",
    hidden=(500, 500),
    epochs=1,
    layers=Rule("adam", lr=0.03),
    classifier=None,
    norm="l2",
    eps=1e-4,
    outputs="post",
    negatives="shuffled",
    batch_size=50_000,
    train_images=50_000,
    pixel_mean=0.1307,
    pixel_std=0.3081,
    cooldown=None,
    layerwise_steps=1000,
)

FFLIB = Recipe(
    name="fflib",
    source="fflib 0.3.0, examples/ff_net_mnist.py: label beside the image, batches of 128, Adam of its own for each "
    "layer, 60 epochs on nine tenths of the training images.",
    assumed="The first 54,000 images for its random ones; one Adam for both layers, which is the same; the label "
    "stands before the image instead of behind it.",
    hidden=(2000, 2000),
    epochs=60,
    layers=Rule("adam", lr=0.02),
    classifier=None,
    threshold=20.0,
    norm="l2",
    eps=1e-4,
    outputs="post",
    label="columns",
    batch_size=128,
    train_images=54_000,
    cooldown=None,
    goodness_every=10,
)

GROUPED_MNIST = Recipe(
    name="grouped-mnist",
    source="Made for this package: ten groups of units in each layer, cross-entropy of their mean goodness, as in the "
    "layers of CwC (Papachristodoulou et al., 2024) but fully connected; no negative data.",
    assumed="Everything else: two layers of 1000 ReLUs, rms norm, Adam at 1e-3, ten epochs.",
    hidden=(1000, 1000),
    epochs=10,
    layers=Rule("adam", lr=1e-3),
    classifier=None,
    loss="cross_entropy",
    label="none",
    negatives="none",
    batch_size=128,
    cooldown=1.0,
)

MONO_FORWARD = replace(
    GROUPED_MNIST,
    name="mono-forward",
    source="Gong et al., Mono-Forward, 2025: each layer's activities times a learned matrix are its goodness of the "
    "classes, whose cross-entropy trains layer and matrix; activities are handed on as they are. Batches of 128 and "
    "AdamW at 1e-3 as in a re-implementation; the authors' code is not public.",
    assumed="Two layers of 1000 ReLUs; torch's decay of 1e-2; the matrix starts as a torch.nn.Linear does; ten epochs, "
    "constant for half of them and then linear to 0, for up to 100 with a plateau schedule and early stopping.",
    layers=Rule("adam", lr=1e-3, weight_decay=1e-2, decoupled=True),
    norm="none",
    head="projection",
)

PROJECTED = replace(
    GROUPED_MNIST,
    name="projected",
    source="Made for this package: heads as in mono-forward, on layers with rms norm; what keeps them from learning "
    "the training images by heart: three tenths of the pixels dropped, smoothed labels. Batches of 256, Adam at 3e-3.",
    assumed="",
    hidden=(500, 500),
    epochs=14,
    layers=Rule("adam", lr=3e-3),
    label_smoothing=0.1,
    head="projection",
    batch_size=256,
    dropout=0.3,
)

QUICK = replace(
    PROJECTED,
    name="quick",
    source="Made for this package: projected for a few epochs, without pixels dropped. Rate, batch and smoothing were "
    "chosen on the last 10,000 training images.",
    epochs=5,
    layers=Rule("adam", lr=2e-3),
    batch_size=128,
    dropout=0.0,
)

PROJECTED_SHIFTED = replace(
    PROJECTED,
    name="projected-shifted",
    source="Made for this package: projected on images shifted by up to a pixel in each direction, with a tenth of the "
    "pixels dropped, 1000 units a layer and 30 epochs.",
    hidden=(1000, 1000),
    epochs=30,
    jitter=1,
    dropout=0.1,
)

PROJECTED_TURNED = replace(
    PROJECTED,
    name="projected-turned",
    source="Made for this package: projected, wider and longer, on images turned by up to ten degrees, a tenth smaller "
    "to larger, and shifted by up to a pixel in each direction, in place of pixels dropped; averaged weights. Turns "
    "and width were chosen on the last 10,000 training images.",
    hidden=(1000, 1000),
    epochs=60,
    layers=Rule("adam", lr=2e-3),
    dropout=0.0,
    jitter=1,
    rotation=10.0,
    zoom=0.1,
    averaging=0.998,
    goodness_every=5,
)

CWC_MNIST = Recipe(
    name="cwc-mnist",
    source="CwC (Papachristodoulou et al., 2024, and its code): four convolutions, class groups of channels behind "
    "batch normalisation, cross-entropy of their goodness, Adam at 0.01 on batches of 128; each layer learns in the "
    "first epochs alone, lower layers in fewer; a linear classifier on the last layer.",
    assumed="The classifier's loss is the cross-entropy of its logits, where the code takes a softmax twice; it learns "
    "by Adam on features of mean square one. Rates fall linearly to 0 in the second half. Errors are those after the "
    "last epoch, where the published one is that of the best; a test goes by the statistics of training images.",
    published="0.58%",
    hidden=(),
    convolutions=(
        Convolution(20, learns=(0, 2)),
        Convolution(80, by_class=True, pool=2, learns=(0, 3)),
        Convolution(240, learns=(0, 4)),
        Convolution(480, by_class=True, pool=2, learns=(0, 5)),
    ),
    epochs=5,
    layers=Rule("adam", lr=0.01),
    classifier=Rule("adam", lr=1e-3),
    classifier_layers=(3,),
    loss="cross_entropy",
    norm="none",
    eps=1e-4,
    label="none",
    negatives="none",
    batch_size=128,
    cooldown=1.0,
    goodness_layers=(3,),
    settling=20,
)


def _windows(recipe: Recipe, ends: tuple[int, ...]) -> tuple[Convolution, ...]:
    """A recipe's convolutions, each learning in the epochs before these."""
    return tuple(replace(of, learns=(0, end)) for of, end in zip(recipe.convolutions, ends, strict=True))


CWC_FASHION = replace(
    CWC_MNIST,
    name="cwc-fashion",
    published="7.69%",
    published_on="fashion-mnist",
    epochs=23,
    convolutions=_windows(CWC_MNIST, (10, 15, 19, 23)),
)

CWC_CIFAR10 = replace(
    CWC_MNIST,
    name="cwc-cifar10",
    assumed=f"{CWC_MNIST.assumed} Never run here on the whole of CIFAR-10. The mean and deviation of all pixels.",
    published="21.89%",
    published_on="cifar-10",
    epochs=25,
    convolutions=_windows(CWC_MNIST, (11, 16, 21, 25)),
    pixel_mean=0.473,
    pixel_std=0.251,
)

CONV_HEADS = replace(
    CWC_MNIST,
    name="conv-heads",
    source="Made for this package: four convolutions as in cwc-mnist, but with learned heads on their pooled maps in "
    "place of class groups, none of them divided by class, all of which learn in all epochs; images shifted by up to "
    "two pixels in each direction, turned by up to ten degrees, and a tenth smaller to larger; smoothed labels, "
    "averaged weights. Without turns and sizes it ended at 0.58% (seed 0), the training images learned by heart.",
    assumed="",
    published="",
    convolutions=(Convolution(32), Convolution(64, pool=2), Convolution(128), Convolution(256, pool=2)),
    head="projection",
    epochs=20,
    layers=Rule("adam", lr=3e-3),
    label_smoothing=0.1,
    jitter=2,
    rotation=10.0,
    zoom=0.1,
    averaging=0.998,
)

CONV_QUICK = replace(
    CONV_HEADS,
    name="conv-quick",
    source="Made for this package: two convolutions and a linear layer with learned heads, for two epochs, predicted "
    "by the last layer alone. Rate and width were chosen on the last 10,000 training images.",
    convolutions=(Convolution(32, pool=2), Convolution(64, pool=2)),
    hidden=(512,),
    norm="rms",
    epochs=2,
    layers=Rule("adam", lr=2e-3),
    classifier=None,
    classifier_layers=None,
    goodness_layers=(2,),
    settling=0,
    jitter=0,
    rotation=0.0,
    zoom=0.0,
    averaging=0.0,
)

DEEPER_FORWARD = Recipe(
    name="deeper-forward",
    source="DeeperForward's TinyCNN (Sun et al., 2025, and a copy of its code): four convolutions, cross-entropy of "
    "the mean activities of class groups of channels, a fifth of the activities dropped, group normalisation and "
    "average pooling on the way up, AdamW at 0.03 along half a cosine to 0.003, batches of 128, 150 epochs.",
    assumed="All training images at 28 pixels a side, where the code has 45,000 at 32 and takes the rest to choose the "
    "layers whose goodness is summed: here all but the first. AdamW's decay is torch's own, 0.01.",
    published="0.50%",
    hidden=(),
    convolutions=(
        Convolution(100, kernel=5, pool=2),
        Convolution(200, kernel=5, pool=2),
        Convolution(400),
        Convolution(400),
    ),
    epochs=150,
    layers=Rule("adam", lr=0.03, weight_decay=0.01, decoupled=True),
    classifier=None,
    goodness="activity",
    loss="cross_entropy",
    norm="none",
    label="none",
    negatives="none",
    batch_size=128,
    cooldown=None,
    goodness_layers=(1, 2, 3),
    goodness_every=5,
    norm_of_maps="groups",
    dropped_units=0.2,
    cosine=0.1,
)

TRIFECTA_MNIST = Recipe(
    name="trifecta-mnist",
    source="The small network of Trifecta (Dooms, Tsang and Oramas, 2023, and its code): six blocks of batch "
    "normalisation, convolution, ReLU and pool, the label a learned map beside the image, a SymBa loss of pairs in "
    "every other block of a step, which reaches the one below too, and an Adam for each block.",
    assumed="Three eighths of its channels, 50 epochs for its 100, on batches of 64 for its 512, at rates of 2e-3 for "
    "its 1e-3, which fall linearly to 0 in the second half; shifts by two pixels for its four, and images a tenth "
    "smaller to larger. All training images are in an epoch, where the code drops the last batch. Wrong labels are "
    "drawn from a linear classifier of the pixels, or half of them are those that an image took best before, where the "
    "code draws all alike, which soon tells nothing more; averaged weights; a prediction by all blocks and five views, "
    "the image and four that are moved by a pixel, where the code takes the last block and the image. Negatives, "
    "averages, sizes, blocks and views were chosen on the last 10,000 training images, at a quarter of the channels "
    "and eight or ten epochs.",
    published="0.42%",
    hidden=(),
    convolutions=(
        Convolution(48, pool=2),
        Convolution(48),
        Convolution(96, pool=2),
        Convolution(96),
        Convolution(96),
        Convolution(192, pool=2),
    ),
    epochs=50,
    layers=Rule("adam", lr=2e-3),
    classifier=Rule("adam", lr=1e-3),
    loss="symba",
    norm="none",
    label="map",
    negatives="met",
    negatives_temperature=2.0,
    batch_size=64,
    jitter=2,
    rotation=15.0,
    zoom=0.1,
    pixel_mean=0.1307,
    pixel_std=0.3081,
    cooldown=1.0,
    test_shift=1,
    goodness_every=25,
    settling=80,
    averaging=0.998,
    norm_of_maps="overlapped",
)

RECIPES = {
    recipe.name: recipe
    for recipe in (
        QUICK, HARD_NEGATIVES, HINTON_MATLAB, HINTON_SUPERVISED, HINTON_JITTER, HINTON_UNSUPERVISED, LOEWEX, MOHAMMADPZ,
        FFLIB, ABLATION, GROUPED_MNIST, MONO_FORWARD, PROJECTED, PROJECTED_SHIFTED, PROJECTED_TURNED, CWC_MNIST,
        CWC_FASHION, CWC_CIFAR10, CONV_HEADS, CONV_QUICK, DEEPER_FORWARD, TRIFECTA_MNIST,
    )
}  # fmt: skip
