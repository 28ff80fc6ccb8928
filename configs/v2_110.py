"""ResNet version 2, depth 110: pre-activation bottleneck blocks.

    python -m resnet_jax.main --config=configs/v2_110.py

1,146,842 parameters (10 classes); 3,302,442 in the Keras example's network.
Published CIFAR-10 test accuracy, by recipe:
    keras: 93.15% (keras-team/keras, examples/cifar10_resnet.py)
"""

from configs import common


def get_config(recipe="paper"):
    return common.get_config(recipe, version=2, depth=110)
