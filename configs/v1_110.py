"""ResNet version 1, depth 110: post-activation basic blocks.

    python -m resnet_jax.main --config=configs/v1_110.py

1,727,962 parameters (10 classes).
Published CIFAR-10 test accuracy, by recipe:
    paper: 93.39% (He et al. 2015, table 6)
    keras: 92.65% (keras-team/keras, examples/cifar10_resnet.py)
"""

from configs import common


def get_config(recipe="paper"):
    return common.get_config(recipe, version=1, depth=110)
