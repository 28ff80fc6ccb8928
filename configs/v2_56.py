"""ResNet version 2, depth 56: pre-activation bottleneck blocks.

    python -m resnet_jax.main --config=configs/v2_56.py

590,426 parameters (10 classes); 1,663,338 in the Keras example's network.
Published CIFAR-10 test accuracy, by recipe:
    keras: 93.01% (keras-team/keras, examples/cifar10_resnet.py)
"""

from configs import common


def get_config(recipe="paper"):
    return common.get_config(recipe, version=2, depth=56)
