"""ResNet version 1, depth 20: post-activation basic blocks.

    python -m resnet_jax.main --config=configs/v1_20.py

269,722 parameters (10 classes).
Published CIFAR-10 test accuracy, by recipe:
    paper: 91.25% (He et al. 2015, table 6)
    keras: 92.16% (keras-team/keras, examples/cifar10_resnet.py)
"""

from configs import common


def get_config(recipe="paper"):
    return common.get_config(recipe, version=1, depth=20)
