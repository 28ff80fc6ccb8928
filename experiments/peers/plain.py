"""Training in the style of a Flax tutorial.

The same networks (v1 with shortcut A, v2 with B) and the same update as ours, with
unmodified `nn.Conv` and `nn.BatchNorm`, one jitted step per call, and batches cropped
and flipped by NumPy on the host.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import unflatten_dict

from experiments.peers import PROBES, Task
from resnet_jax import results


def _conv(features, size, stride=1, name=None):
    init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
    padding = size // 2
    return nn.Conv(
        features,
        (size, size),
        stride,
        padding,
        use_bias=False,
        kernel_init=init,
        name=name,
    )


class BasicBlock(nn.Module):
    features: int
    stride: int

    @nn.compact
    def __call__(self, x, train):
        norm = nn.BatchNorm(not train, momentum=0.9, name="bn1")
        y = nn.relu(norm(_conv(self.features, 3, self.stride, "conv1")(x)))
        norm = nn.BatchNorm(not train, momentum=0.9, name="bn2")
        y = norm(_conv(self.features, 3, name="conv2")(y))
        if self.stride > 1:
            new = self.features - x.shape[-1]
            x = jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (new // 2, new // 2)))
        return nn.relu(x + y)


class Bottleneck(nn.Module):
    features: int
    stride: int

    @nn.compact
    def __call__(self, x, train):
        y = nn.relu(nn.BatchNorm(not train, momentum=0.9, name="bn1")(x))
        if x.shape[-1] != 4 * self.features or self.stride > 1:
            x = _conv(4 * self.features, 1, self.stride, "shortcut_conv")(y)
        y = _conv(self.features, 1, self.stride, "conv1")(y)
        y = nn.relu(nn.BatchNorm(not train, momentum=0.9, name="bn2")(y))
        y = _conv(self.features, 3, name="conv2")(y)
        y = nn.relu(nn.BatchNorm(not train, momentum=0.9, name="bn3")(y))
        return x + _conv(4 * self.features, 1, name="conv3")(y)


class ResNet(nn.Module):
    version: int
    depth: int
    num_classes: int = 10

    @nn.compact
    def __call__(self, x, train):
        blocks = (self.depth - 2) // (6 if self.version == 1 else 9)
        x = _conv(16, 3, name="stem_conv")(x)
        if self.version == 1:
            x = nn.relu(nn.BatchNorm(not train, momentum=0.9, name="stem_bn")(x))
        for stage in range(3):
            for block in range(blocks):
                kind = BasicBlock if self.version == 1 else Bottleneck
                stride = 2 if stage > 0 and block == 0 else 1
                name = f"stage{stage + 1}_block{block + 1}"
                x = kind(16 * 2**stage, stride, name=name)(x, train)
        if self.version == 2:
            x = nn.relu(nn.BatchNorm(not train, momentum=0.9, name="final_bn")(x))
        return nn.Dense(self.num_classes, name="classifier")(x.mean((1, 2)))


def make_train_step(net: ResNet, tx: optax.GradientTransformation):
    """Builds the jitted step, which returns the new state and the loss."""

    @jax.jit
    def train_step(params, batch_stats, opt_state, images, labels):
        def loss_fn(params):
            logits, changed = net.apply(
                {"params": params, "batch_stats": batch_stats},
                images,
                train=True,
                mutable=["batch_stats"],
            )
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return loss.mean(), changed["batch_stats"]

        (loss, stats), gradient = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), stats, opt_state, loss

    return train_step


def augmented_batch(rng: np.random.Generator, images: np.ndarray) -> np.ndarray:
    """Crops float images [batch, height, width, channels] padded by 4, and flips."""
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    batch = np.empty_like(images)
    height, width = images.shape[1:3]
    offsets = rng.integers(0, 9, (len(images), 2))
    for i, (row, column) in enumerate(offsets):
        crop = padded[i, row : row + height, column : column + width]
        batch[i] = crop[:, ::-1] if rng.random() < 0.5 else crop
    return batch


class Plain:
    """Batches come from NumPy; for `in_memory` they are on the device already."""

    def __init__(self, task: Task):
        self._task, self._rng = task, np.random.default_rng(0)
        self._net = ResNet(task.version, task.depth)
        self._start = unflatten_dict(task.weights("ours"), sep="/")
        tx = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.1, momentum=0.9))
        params = self._start["params"]
        self._state = params, self._start["batch_stats"], tx.init(params)
        self._train_step = make_train_step(self._net, tx)
        self._apply = jax.jit(self._net.apply, static_argnames="train")
        self._ready = {split: self._batches(split) for split in ("train", "eval")}

    def _batches(self, split: str) -> list:
        images, labels = self._task.images(split), self._task.labels(split)
        starts = range(0, len(labels), self._task.batch_size)
        rows = [slice(start, start + self._task.batch_size) for start in starts]
        return [jax.device_put((images[row], labels[row])) for row in rows]

    def _train(self, batches) -> None:
        for images, labels in batches:
            *self._state, loss = self._train_step(*self._state, images, labels)
        loss.block_until_ready()

    def first_step(self) -> None:
        self._train(self._ready["train"][:1])

    def in_memory(self) -> None:
        self._train(self._ready["train"])

    def epoch(self) -> None:
        images, labels = (self._task.arrays[f"train_{x}"] for x in ("images", "labels"))
        order = self._rng.permutation(len(labels)).reshape(-1, self._task.batch_size)

        def batches():
            for rows in order:
                batch = images[rows].astype(np.float32) / 255 - self._task.mean
                yield augmented_batch(self._rng, batch), labels[rows]

        self._train(batches())

    def evaluate(self) -> float:
        variables = {"params": self._state[0], "batch_stats": self._state[1]}
        correct = [
            (self._apply(variables, images, train=False).argmax(-1) == labels).sum()
            for images, labels in self._ready["eval"]
        ]
        return float(sum(correct)) / len(self._task.labels("eval"))

    def logits(self) -> list:
        images = self._task.images("eval")[:PROBES]
        return self._apply(self._start, images, train=False).tolist()

    def peak_memory(self) -> int:
        return results.peak_memory()
