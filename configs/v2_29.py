"""ResNet version 2, depth 29: pre-activation bottleneck blocks.

    python -m resnet_jax.main --config=configs/v2_29.py

312,218 parameters (10 classes).
Published CIFAR-10 test accuracy, by recipe:
    none
"""

from configs import common


def get_config(recipe="paper"):
    return common.get_config(recipe, version=2, depth=29)
