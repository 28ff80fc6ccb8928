"""ResNet version 1, depth 1202: post-activation basic blocks.

    python -m resnet_jax.main --config=configs/v1_1202.py

19,421,274 parameters (10 classes).

The identical blocks of a stage run in a loop (`model.scan`), so that it compiles in
seconds, and their activations are recomputed in the backward pass (`model.remat`), so
that it fits a small device. `--config.model.remat=false` turns that off, if there is
enough memory.

Published CIFAR-10 test accuracy, by recipe:
    paper: 92.07% (He et al. 2015, table 6)
"""

from configs import common


def get_config(recipe="paper"):
    return common.get_config(recipe, version=1, depth=1202, scan=True, remat=True)
