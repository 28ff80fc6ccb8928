import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from experiments.fixup import norm_free
from resnet_jax import models


def drawn(method: str, depth: int = 20):
    settings = common.default()
    settings.model.update(depth=depth, width=16)
    net = norm_free(method, settings, 10)
    variables = models.initialize(net, jax.random.key(0), (8, 8, 1))
    images = np.random.default_rng(0).standard_normal((4, 8, 8, 1))
    return net, variables, jnp.asarray(images, jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["SkipInit", "Fixup"])
def test_branches_give_nothing_at_the_start(method):
    net, variables, images = drawn(method)
    _, state = net.apply(
        variables,
        images,
        capture_intermediates=lambda module, _: "block" in (module.name or ""),
        mutable="intermediates",
    )
    blocks = state["intermediates"]
    outputs = {name: blocks[name]["__call__"][0] for name in blocks}
    for stage in (1, 2, 3):
        first = outputs[f"stage{stage}_block1"]
        for block in (2, 3):
            np.testing.assert_array_equal(outputs[f"stage{stage}_block{block}"], first)
    assert abs(first).max() > 0


@pytest.mark.slow
def test_fixup_makes_the_other_kernels_smaller_by_the_root_of_the_blocks():
    _, he, _ = drawn("SkipInit", 56)
    _, fixup, _ = drawn("Fixup", 56)
    for name in ("stage1_block2", "stage3_block9"):
        kernels = [tree["params"][name]["conv1"]["kernel"] for tree in (fixup, he)]
        ratio = kernels[0].std() / kernels[1].std()
        # Blocks to the power of -1 / (2 m - 2), for branches of m = 2 convolutions.
        assert ratio == pytest.approx(27**-0.5, rel=1e-3)
    assert "batch_stats" not in fixup
