"""ResNet version 1, depth 32: post-activation basic blocks.

    python -m resnet_jax.main --config=configs/v1_32.py

464,154 parameters (10 classes).
Published CIFAR-10 test accuracy, by recipe:
    paper: 92.49% (He et al. 2015, table 6)
    keras: 92.46% (keras-team/keras, examples/cifar10_resnet.py)
"""

from configs import common


def get_config(recipe="paper"):
    return common.get_config(recipe, version=1, depth=32)
