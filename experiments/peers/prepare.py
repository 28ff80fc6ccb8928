"""Writes what a comparison's contenders share, and checks ours against the plain loop.

python -m experiments.peers.prepare DIRECTORY
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import unflatten_dict

from configs import common
from experiments.peers import plain
from resnet_jax import data, models, pytorch, weights
from resnet_jax.augment import normalize, statistics
from resnet_jax.config import build_network
from resnet_jax.step import Batch, TrainState, make_train_step

# Values are under test, not speed.
_QUICK = {"xla_backend_optimization_level": 0}


def start_weights(net: models.ResNet, image_shape: tuple[int, int, int]) -> dict:
    """A network's variables, with BatchNorms that do not begin as the identity.

    Logits then depend on each of their statistics and parameters.
    """
    variables = models.initialize(net.clone(scan=False), jax.random.key(0), image_shape)
    flat, rng = weights.flatten(variables), np.random.default_rng(0)
    for path, array in flat.items():
        if path.rpartition("/")[2] in ("scale", "bias", "mean", "var"):
            flat[path] = array + rng.uniform(-0.1, 0.1, array.shape).astype(np.float32)
    return unflatten_dict(flat, sep="/")


def update_error(config, variables: dict, images, labels, mean) -> float:
    """The distance of one update of ours from the plain loop's, relative to its length.

    In float64, where rounding hides nothing, whatever the depth. The larger of the
    parameters' and the BatchNorm statistics' distances.

    Args:
      config: of the network, whose augmentation is left out here.
      variables: to begin with.
      images: uint8 [batch, height, width, channels].
      labels: int32 [batch].
      mean: to subtract.
    """
    config = config.copy_and_resolve_references()
    config.augment.update(crop=0.0, flip=False)
    config.model.dtype = "float64"
    with jax.enable_x64(True):
        return _update_error(config, variables, images, labels, mean)


def _update_error(config, variables: dict, images, labels, mean) -> float:
    variables = jax.tree.map(lambda array: np.asarray(array, np.float64), variables)
    net = build_network(config, 10)
    tx = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.1, momentum=0.9))
    params, stats = variables["params"], variables["batch_stats"]
    opt_state = tx.init(params)
    arrange = models.stack if net.scan else lambda tree: tree
    state = arrange(TrainState(jnp.int32(0), params, stats, opt_state))
    step = make_train_step(net, tx, config, (mean, np.ones_like(mean)))
    batch = Batch(images, labels, np.arange(len(labels)))
    ours, _ = jax.jit(step, compiler_options=_QUICK)(state, batch, jax.random.key(0))

    plain_net = plain.ResNet(config.model.version, config.model.depth)
    plain_step = plain.make_train_step(plain_net, tx)
    images = np.asarray(normalize(jnp.asarray(images), mean, np.ones_like(mean)))
    theirs = plain_step(params, stats, opt_state, images, labels)[:2]

    def distance(one, other):
        return float(optax.tree.norm(optax.tree.sub(one, other)))

    ours = models.unstack((ours.params, ours.batch_stats))
    return max(
        distance(one, other) / distance(other, old)
        for one, other, old in zip(ours, theirs, (params, stats), strict=True)
    )


def main(directory: Path) -> None:
    """Reads DIRECTORY/config.json; writes data and weights there, prints the error."""
    config = common.completed(json.loads((directory / "config.json").read_text()))
    dataset = data.load(config.dataset)
    mean, _ = statistics("pixel_mean", dataset.train.images)
    arrays = {
        f"{name}_{kind}": array
        for name, split in (("train", dataset.train), ("eval", dataset.eval))
        for kind, array in zip(("images", "labels"), split, strict=True)
    }
    np.savez(directory / "data.npz", mean=mean, **arrays)
    net = build_network(config, 10)
    variables = start_weights(net, dataset.image_shape)
    np.savez(directory / "ours.npz", **weights.flatten(variables))
    start = weights.Weights(config.model.to_dict(), variables)
    np.savez(directory / "torch.npz", **pytorch.to_state(start, "akamaster"))
    images, labels = (part[:4] for part in dataset.train)
    small = images[:, ::2, ::2], labels, mean[::2, ::2]  # float64 is slow
    error = update_error(config, variables, *small)
    answer = {
        "dataset": dataset.name,
        "images": len(dataset.train.labels),
        "eval_images": len(dataset.eval.labels),
        "update_error": error,
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
