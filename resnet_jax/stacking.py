"""Names of blocks: one for each in files, or one for a stack of them in a loop.

Under `model.scan` the blocks of a stage after its first, which are identical, are
stacked along a new first axis of each array.
"""

import jax
import jax.numpy as jnp
import numpy as np


def unstack(tree):
    """Gives blocks that are stacked under `scan` their own names, anywhere in `tree`.

    `tree` is variables, gradients, or a state that holds such dicts (Optax's too).
    """

    def split(node):
        if not isinstance(node, dict):
            return node
        unrolled = {}
        for name, value in node.items():
            if not is_stack(name):
                unrolled[name] = unstack(value)
                continue
            leaves = jax.tree.leaves(value)  # none where an optimizer skips the block
            for b in range(leaves[0].shape[0] if leaves else 0):
                block = jax.tree.map(lambda leaf, b=b: leaf[b], value)
                unrolled[f"{name.removesuffix('s')}{b + 2}"] = block
        return unrolled

    return jax.tree.map(split, tree, is_leaf=lambda node: isinstance(node, dict))


def stack(tree):
    """Undoes `unstack`: a stage's blocks after its first are stacked under one name."""

    def join(node):
        if not isinstance(node, dict):
            return node
        stacked, groups = {}, {}
        for name, value in node.items():
            stage, _, number = name.partition("_block")
            if stage.startswith("stage") and number.isdigit() and int(number) > 1:
                groups.setdefault(f"{stage}_blocks", {})[int(number)] = value
            else:
                stacked[name] = stack(value)
        for name, blocks in groups.items():
            ordered = [blocks[number] for number in sorted(blocks)]
            stacked[name] = jax.tree.map(_stack_arrays, *ordered)
        return stacked

    return jax.tree.map(join, tree, is_leaf=lambda node: isinstance(node, dict))


def _stack_arrays(*arrays):
    on_host = isinstance(arrays[0], np.ndarray)
    return np.stack(arrays) if on_host else jnp.stack(arrays)


def is_stack(name: str) -> bool:
    """Whether blocks are stacked under this name."""
    return name.startswith("stage") and name.endswith("_blocks")
