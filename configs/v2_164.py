"""ResNet version 2, depth 164: pre-activation bottleneck blocks.

    python -m resnet_jax.main --config=configs/v2_164.py

1,703,258 parameters (10 classes).
Published CIFAR-10 test accuracy, by recipe:
    paper: 94.54% (He et al. 2016, table 4)
"""

from configs import common


def get_config(recipe="paper"):
    return common.get_config(recipe, version=2, depth=164)
