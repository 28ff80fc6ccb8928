"""Published CIFAR-10 accuracies, which `experiments.reproduce` trains again."""

from typing import NamedTuple


class Published(NamedTuple):
    """A published test accuracy."""

    percent: float
    runs: int = 1  # that it is the mean or median of
    model: dict | None = None  # fields of `config.model` besides version and depth


class Table(NamedTuple):
    """Published accuracies of networks that were trained alike."""

    source: str
    recipe: str  # of configs/common.py
    networks: dict[str, Published]
    changes: dict | None = None  # to the recipe


TABLES = {
    "he2015": Table(
        "He et al. 2015, arXiv 1512.03385, table 6 (110 layers: mean of 5 runs)",
        "paper",
        {
            "v1-20": Published(91.25),
            "v1-32": Published(92.49),
            "v1-44": Published(92.83),
            "v1-56": Published(93.03),
            "v1-110": Published(93.39, runs=5),
            "v1-1202": Published(92.07),
        },
    ),
    "he2016": Table(
        "He et al. 2016, arXiv 1603.05027, tables 2 and 4 (medians of 5 runs)",
        "paper",
        {
            "v1-110-pre": Published(93.63, 5, {"activation": "pre"}),
            "v2-164": Published(94.54, 5),
            "v2-1001": Published(95.08, 5),
        },
    ),
    "keras": Table(
        "keras-team/keras, examples/cifar10_resnet.py (best epoch on the test set)",
        "keras",
        {
            "v1-20": Published(92.16),
            "v1-32": Published(92.46),
            "v1-44": Published(92.50),
            "v1-56": Published(92.71),
            "v1-110": Published(92.65),
            "v2-56": Published(93.01),
            "v2-110": Published(93.15),
        },
    ),
    "akamaster": Table(
        "akamaster/pytorch_resnet_cifar10 (best epoch on the test set)",
        "paper",
        {
            "v1-20": Published(91.73),
            "v1-32": Published(92.63),
            "v1-44": Published(93.10),
            "v1-56": Published(93.39),
            "v1-110": Published(93.68),
        },
        {"epochs": 200, "augment.normalization": "mean_std"},
    ),
    "imgclsmob": Table(
        "osmr/imgclsmob, gluon/README.md (best epoch on the test set)",
        "strong",
        {
            "v1-20": Published(94.03, model={"shortcut": "B"}),
            "v1-56": Published(95.48, model={"shortcut": "B"}),
            "v1-110": Published(96.31, model={"shortcut": "B"}),
            "v2-164": Published(96.36),
            "v2-1001": Published(97.35),
        },
    ),
}
