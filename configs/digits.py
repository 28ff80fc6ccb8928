"""Version 2, depth 56, on scikit-learn's 1,797 real digits: nothing to download.

    python -m resnet_jax.main --config=configs/digits.py

590,138 parameters.
"""

from configs import common


def get_config(recipe="smoke"):
    config = common.get_config(recipe, version=2, depth=56)
    config.dataset.name = "digits"
    # A mirrored digit is not a digit.
    config.augment.update(flip=False, alternating_flip=False)
    config.test_time_flip = False
    # Nor is there a size below 8 pixels to start with.
    config.augment.update(sizes=(), size_ends=())
    return config
