"""The data sets that need no TensorFlow, and what is known of them without reading."""

# Classes, image shape, and examples of all splits; None: as the user's folder has them.
KNOWN = {
    "cifar10": (10, (32, 32, 3), 60_000),
    "cifar100": (100, (32, 32, 3), 60_000),
    "fashion_mnist": (10, (28, 28, 1), 70_000),
    "svhn_cropped": (10, (32, 32, 3), 99_289),
    "image_folder": None,
    "digits": (10, (8, 8, 1), 1_797),
    "fake": (10, (32, 32, 3), 60_000),
}
