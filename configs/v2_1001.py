"""ResNet version 2, depth 1001: pre-activation bottleneck blocks.

    python -m resnet_jax.main --config=configs/v2_1001.py

10,327,706 parameters (10 classes).

The identical blocks of a stage run in a loop (`model.scan`), so that it compiles in
seconds, and their activations are recomputed in the backward pass (`model.remat`), so
that it fits a small device. `--config.model.remat=false` turns that off, if there is
enough memory.

Published CIFAR-10 test accuracy, by recipe:
    paper: 95.08% (He et al. 2016, table 4)
"""

from configs import common


def get_config(recipe="paper"):
    return common.get_config(recipe, version=2, depth=1001, scan=True, remat=True)
