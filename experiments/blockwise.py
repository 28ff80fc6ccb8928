"""Networks that run a block at a time, forward and back, recording norms in between.

A stage's blocks after its first are alike, so a network of any depth is eight functions
called one after another, and each compiles once. BatchNorm can be left out.
"""

import contextlib
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from experiments import study
from resnet_jax import models
from resnet_jax.blocks import PostActivationBlock, PreActivationBlock

# The arguments of `models.resnet`, and the layers of a block.
NETWORKS = {
    "plain": ({"version": 1, "residual": False}, 2),
    "v1": ({"version": 1}, 2),
    "v2": ({"version": 2}, 3),
}


def is_block(module: nn.Module) -> bool:
    return isinstance(module, PostActivationBlock | PreActivationBlock)


def _apply(module: nn.Module, norm: bool, variables: dict, x):
    def leave_norm_out(call, args, kwargs, context):
        is_norm = isinstance(context.module, nn.BatchNorm)
        return args[0] if is_norm else call(*args, **kwargs)

    with contextlib.nullcontext() if norm else nn.intercept_methods(leave_norm_out):
        return module.apply(variables, x, True, mutable="batch_stats")[0]


def _around_blocks(net: models.ResNet, norm: bool, variables: dict, images, last):
    """The first block's input, and the logits if the last block returns `last`."""
    read = []

    def replace_blocks(call, args, kwargs, context):
        if not is_block(context.module):
            return call(*args, **kwargs)
        read.append(args[0])
        return last

    with nn.intercept_methods(replace_blocks):
        logits = _apply(net, norm, variables, images)
    return read[0], logits


@functools.cache
def parts(
    network: str, norm: bool, image_shape: tuple[int, int, int]
) -> dict[str, Callable]:
    """Stem, head, and the first two blocks of each stage: functions of variables and x.

    The later blocks of a stage are like the second, so a network of any depth is these
    functions one after another, and each is compiled once.
    """
    model, layers = NETWORKS[network]
    # Two blocks in each of the three stages.
    net = models.resnet(depth=6 * layers + 2, num_classes=10, **model)
    blocks = {}

    def record(call, args, kwargs, context):
        if is_block(context.module):
            name = context.module.name
            block = context.module.clone(parent=None, name=None)
            blocks[name] = functools.partial(_apply, block, norm)
        return call(*args, **kwargs)

    def stem(variables, images):
        features = variables["params"]["classifier"]["kernel"].shape[0]
        unused = jnp.zeros((len(images), 1, 1, features))
        return _around_blocks(net, norm, variables, images, unused)[0]

    def head(variables, x):
        unused = jnp.zeros((len(x), *image_shape))
        return _around_blocks(net, norm, variables, unused, x)[1]

    with nn.intercept_methods(record):
        jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, *image_shape)))
    return {"stem": stem, **blocks, "head": head}


def split(variables: dict) -> dict:
    """A network's variables by part; stem and head each get those of both."""
    blocks = {name for name in variables["params"] if name.startswith("stage")}
    outer = {
        kind: {name: leaf for name, leaf in tree.items() if name not in blocks}
        for kind, tree in variables.items()
    }
    inner = {
        name: {kind: tree[name] for kind, tree in variables.items()} for name in blocks
    }
    return {"stem": outer, **inner, "head": outer}


@functools.partial(jax.jit, static_argnums=0)
def _forward(part: Callable, variables, x):
    return part(variables, x)


@functools.partial(jax.jit, static_argnums=0)
def _backward(part: Callable, variables, x, gradient):
    return jax.vjp(part, variables, x)[1](gradient)


@jax.jit
def _loss(logits, labels):
    def loss(logits):
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return jax.value_and_grad(loss)(logits)


_root_mean_square = jax.jit(lambda x: jnp.sqrt((x**2).mean()))


def passes(network: str, norm: bool, variables: dict, images, labels):
    """One pass forward and one back, a part at a time.

    Args:
      network: of NETWORKS.
      norm: False turns every BatchNorm into the identity.
      variables: as `split` gives them.
      images: float [batch, height, width, channels].
      labels: int [batch].

    Returns:
      The gradients with respect to `variables`, and a record: the loss, the root mean
      square of what each block and the head read, and the norms of the loss's gradients
      with respect to that.
    """
    functions = parts(network, norm, images.shape[1:])
    names = sorted(variables.keys() - {"stem", "head"}, key=_place)
    names = ["stem", *names, "head"]
    chain = [
        functions.get(name) or functions[f"stage{_place(name)[0]}_block2"]
        for name in names
    ]
    inputs = [jnp.asarray(images)]
    for name, part in zip(names, chain, strict=True):
        inputs.append(_forward(part, variables[name], inputs[-1]))
    loss, gradient = _loss(inputs.pop(), labels)
    activations = study.numbers([float(_root_mean_square(x)) for x in inputs[1:]])
    gradients, norms = {}, []
    for name, part in zip(reversed(names), reversed(chain), strict=True):
        gradients[name], gradient = _backward(
            part, variables[name], inputs.pop(), gradient
        )
        norms.append(optax.tree.norm(gradient))
    norms = study.numbers([float(norm) for norm in norms[-2::-1]])
    record = {"loss": study.numbers(float(loss)), "activations": activations}
    return gradients, record | {"gradients": norms}


def _place(block: str) -> tuple[int, int]:
    """Stage and number of the block of this name."""
    stage, number = block.removeprefix("stage").split("_block")
    return int(stage), int(number)
