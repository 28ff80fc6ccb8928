"""ResNet version 1, depth 56: post-activation basic blocks.

    python -m resnet_jax.main --config=configs/v1_56.py

853,018 parameters (10 classes).
Published CIFAR-10 test accuracy, by recipe:
    paper: 93.03% (He et al. 2015, table 6)
    keras: 92.71% (keras-team/keras, examples/cifar10_resnet.py)
"""

from configs import common


def get_config(recipe="paper"):
    return common.get_config(recipe, version=1, depth=56)
