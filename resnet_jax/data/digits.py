"""scikit-learn's bundled handwritten digits: real data with no download."""

import importlib.util
from pathlib import Path

import numpy as np

from resnet_jax.data.source import Source

TEST_EXAMPLES = 360


def source() -> Source:
    """1,797 grey 8x8 images of handwritten digits, 1,437 to train on and 360 to test.

    The pixels, 0 to 16 in the file, are scaled to 0 to 255. The file lists the
    writers one after the other, so the examples are shuffled before they are split:
    by the permutation that NumPy's legacy generator (RandomState, whose stream is
    frozen) gives for seed 0; the last 360 are the test set.

    Source: `sklearn.datasets.load_digits`, a copy of the test set of UCI's "Optical
    Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998).
    """
    # As `load_digits` reads it, without the second that importing it takes.
    (package,) = importlib.util.find_spec("sklearn").submodule_search_locations
    file = Path(package, "datasets", "data", "digits.csv.gz")
    rows = np.loadtxt(file, delimiter=",")
    order = np.random.RandomState(0).permutation(len(rows))
    pixels = rows[order, :-1].reshape(-1, 8, 8)
    images = np.rint(pixels * (255 / 16)).astype(np.uint8)
    labels = rows[order, -1].astype(int)
    first = {"train": 0, "test": len(labels) - TEST_EXAMPLES}

    def examples(split, indices):
        places = first[split] + np.asarray(indices)
        return zip(images[places], labels[places], strict=True)

    return Source(
        name="digits",
        class_names=tuple(map(str, range(10))),
        sizes={"train": first["test"], "test": TEST_EXAMPLES},
        examples=examples,
    )
