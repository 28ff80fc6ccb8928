"""Training in the style of a Flax tutorial: a peer of `benchmark`.

The same networks (v1 with shortcut A, v2 with B) and the same update as ours, with
unmodified `nn.Conv` and `nn.BatchNorm`, one jitted step a call, and batches cropped and
flipped by NumPy on the host.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax


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
