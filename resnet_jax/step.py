"""What the devices do: one update, and many updates in one call.

Everything drawn at random at a step is a function of (seed, step), so a run that was
interrupted ends as one that was not.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from ml_collections import ConfigDict

from resnet_jax import freeze, models
from resnet_jax.augment import alternate, augment, mix, normalize
from resnet_jax.plan import Plan

METRICS = ("loss", "accuracy", "gradient_norm")


class TrainState(struct.PyTreeNode):
    """The training state: arrays on the host or on devices, or their shapes."""

    step: Any  # int32 [], updates done
    params: dict
    batch_stats: dict
    opt_state: optax.OptState
    ema: dict | None = None  # the moving average of params, and statistics for it

    @property
    def trained(self) -> dict:
        """The variables that are trained: params and batch_stats."""
        return {"params": self.params, "batch_stats": self.batch_stats}

    @property
    def variables(self) -> dict:
        """The variables to evaluate or use the network with."""
        return self.ema or self.trained

    def split(self) -> dict:
        """The two trees of a checkpoint."""
        optimizer = {"step": self.step, "opt_state": self.opt_state}
        if self.ema:
            optimizer["trained"] = self.trained
        return {"variables": self.variables, "optimizer": optimizer}

    @classmethod
    def join(cls, trees: dict) -> "TrainState":
        """Undoes `split`."""
        variables, optimizer = trees["variables"], dict(trees["optimizer"])
        if "trained" in optimizer:
            return cls(**optimizer.pop("trained"), **optimizer, ema=variables)
        return cls(**variables, **optimizer)


class Batch(NamedTuple):
    """A batch of training examples as they are stored."""

    images: Any  # uint8 [batch, height, width, channels]
    labels: Any  # int32 [batch]
    positions: Any  # int32 [batch], places in the whole batch over all devices
    mirrored: Any = None  # bool [batch], which to flip; None: drawn


def create_state(
    net: models.ResNet,
    tx: optax.GradientTransformation,
    seed: int,
    image_shape: tuple[int, int, int],
    with_ema: bool = False,
) -> TrainState:
    """A new run's state, as NumPy arrays on the host."""
    variables = models.initialize(net, jax.random.key(seed), image_shape)
    params, batch_stats = variables["params"], variables["batch_stats"]
    opt_state = jax.device_get(jax.jit(tx.init)(params))
    state = TrainState(np.zeros((), np.int32), params, batch_stats, opt_state)
    return state.replace(ema=state.trained) if with_ema else state


def make_train_step(
    net: models.ResNet,
    tx: optax.GradientTransformation,
    config: ConfigDict,
    normalization: tuple[np.ndarray, np.ndarray],
    image_size: int = 0,
    unmixed_from_step: float = math.inf,
) -> Callable:
    """Builds `train_step(state, batch, rng, *, axis_name=None)`, one update.

    It is pure, and returns the new state and the step's metrics, float32 scalars:
    loss and accuracy on the batch before the update, and the gradient's norm. With
    `axis_name`, gradients, metrics and BatchNorm statistics are averaged over it.
    Images are scaled to `image_size` (0: as they are), and not mixed from step
    `unmixed_from_step` on. A mixed example counts as the class of its larger part.
    """

    def loss(params, batch_stats, images, targets, rngs):
        params = freeze.stop_gradients(config.optimizer, params)
        with freeze.kept_statistics(config.optimizer):
            logits, changed = net.apply(
                {"params": params, "batch_stats": batch_stats},
                images,
                train=True,
                mutable=["batch_stats"],
                rngs=rngs,
            )
        loss = optax.softmax_cross_entropy(logits, targets).mean()
        accuracy = (logits.argmax(-1) == targets.argmax(-1)).mean()
        metrics = {"loss": loss, "accuracy": accuracy}
        return loss, (changed["batch_stats"], metrics)

    def gradients(params, batch_stats, images, targets, rngs):
        """Gradients, new statistics and metrics of one part of the batch."""
        gradient, (batch_stats, metrics) = jax.grad(loss, has_aux=True)(
            params, batch_stats, images, targets, rngs
        )
        return gradient, batch_stats, metrics

    def accumulated(params, batch_stats, images, targets, rngs):
        """The same for all parts, one after another: takes the memory of one."""
        parts = config.optimizer.accumulate

        def add(carry, part):
            batch_stats, total = carry
            number, *examples = part
            own = rngs | {"dropout": jax.random.fold_in(rngs["dropout"], number)}
            gradient, batch_stats, metrics = gradients(
                params, batch_stats, *examples, own
            )
            return (
                batch_stats,
                jax.tree.map(jnp.add, total, (gradient, metrics)),
            ), None

        # Every `parts`-th example makes a part, so that each device keeps its own.
        split = [
            x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1) for x in (images, targets)
        ]
        shapes = jax.eval_shape(
            gradients, params, batch_stats, split[0][0], split[1][0], rngs
        )
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), (shapes[0], shapes[2])
        )
        (batch_stats, total), _ = jax.lax.scan(
            add, (batch_stats, zeros), (jnp.arange(parts), *split)
        )
        gradient, metrics = jax.tree.map(lambda x: x / parts, total)
        return gradient, batch_stats, metrics

    def train_step(state: TrainState, batch: Batch, rng, *, axis_name=None):
        images = normalize(batch.images, *normalization)
        images = augment(
            config.augment, images, rng, batch.positions, batch.mirrored, image_size
        )
        targets = jax.nn.one_hot(batch.labels, net.num_classes, dtype=images.dtype)
        targets = optax.smooth_labels(targets, config.label_smoothing)
        if config.augment.mixup or config.augment.cutmix:
            # A number after those of the examples' and the network's keys.
            mix_rng = jax.random.fold_in(rng, 2 * config.batch_size)
            images, targets = mix(
                config.augment,
                images,
                targets,
                mix_rng,
                state.step >= unmixed_from_step,
            )
        compute = gradients if config.optimizer.accumulate == 1 else accumulated
        # A number after the examples', for networks that draw random numbers.
        key = jax.random.fold_in(rng, config.batch_size)
        # Branches are dropped for the whole batch, and units for each example.
        rngs = {"stochastic_depth": key, "dropout": key}
        if axis_name:
            device = jax.lax.axis_index(axis_name)
            rngs["dropout"] = jax.random.fold_in(key, device)
        gradient, batch_stats, metrics = compute(
            state.params, state.batch_stats, images, targets, rngs
        )
        if axis_name:
            gradient, batch_stats, metrics = jax.lax.pmean(
                (gradient, batch_stats, metrics), axis_name
            )
        metrics["gradient_norm"] = optax.tree.norm(gradient)
        updates, opt_state = tx.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new = TrainState(state.step + 1, params, batch_stats, opt_state)
        if state.ema:
            # A small decay at first, so that the start is soon forgotten: as in
            # TensorFlow's ExponentialMovingAverage with `num_updates`.
            decay = jnp.minimum(
                config.optimizer.ema, (1 + new.step) / (10.0 + new.step)
            )
            mean = optax.incremental_update(params, state.ema["params"], 1 - decay)
            new = new.replace(ema={**state.ema, "params": mean})
        return new, metrics

    return train_step


def _keys(seed):
    """The keys of the epochs' orders and of the steps' draws."""
    return jax.random.split(jax.random.fold_in(jax.random.key(seed), 1))


def epoch_order(seed, epoch, examples: int):
    """int32 [examples], the order in which an epoch takes the examples."""
    return jax.random.permutation(jax.random.fold_in(_keys(seed)[0], epoch), examples)


def make_train_call(
    build_step: Callable, batches: Callable, axis_name: str | None
) -> Callable:
    """Builds `train_call(state, sums, images, labels, positions, seed, stop, rates)`.

    It makes the updates until step `stop`, on the batches that the result of
    `batches(images, labels, positions, seed, first)` gives for each step, and with the
    learning rates float32 [stop - first or more]. `build_step(schedule)` builds a
    `train_step` with an Optax schedule. Returns the new state, and `sums` with these
    steps' metrics added.
    """

    def train_call(
        state: TrainState, sums, images, labels, positions, seed, stop, rates
    ):
        draws_key, first = _keys(seed)[1], state.step
        batch = batches(images, labels, positions, seed, first)
        train_step = build_step(lambda step: rates[step - first])

        def update(step, carry):
            state, sums = carry
            rng = jax.random.fold_in(draws_key, step)
            state, metrics = train_step(state, batch(step), rng, axis_name=axis_name)
            return state, jax.tree.map(jnp.add, sums, metrics)

        # Seed, learning rates and number of steps are not compile-time constants: one
        # compilation serves all, and a step's bits do not depend on its call's length.
        return jax.lax.fori_loop(first, stop, update, (state, sums))

    return train_call


def streamed_batches(images, labels, positions, seed, first):
    """Batches of a block: images [batch, steps, ...], labels [batch, steps]."""
    return lambda step: Batch(
        images[:, step - first], labels[:, step - first], positions
    )


def resident_batches(plan: Plan, alternating_flip: bool = False) -> Callable:
    """Batches of a training split that is held whole on the device.

    Update s takes places s*B to s*B+B-1 of the epochs' permutations laid end to end, B
    being the batch size.
    """
    # A call ends with its epoch; the last batch of one reaches into the next.
    steps = min(plan.steps_per_call, math.ceil(plan.steps_per_epoch))
    epochs_a_call = steps * plan.batch_size // plan.examples + 2

    def batches(images, labels, positions, seed, first):
        flip_key = jax.random.fold_in(jax.random.key(seed), 2)
        first_epoch = first * plan.batch_size // plan.examples
        orders = jax.vmap(lambda epoch: epoch_order(seed, epoch, plan.examples))(
            first_epoch + jnp.arange(epochs_a_call)
        )

        def batch(step):
            epoch, place = jnp.divmod(step * plan.batch_size + positions, plan.examples)
            chosen = orders[epoch - first_epoch, place]
            flips = alternate(flip_key, chosen, epoch) if alternating_flip else None
            return Batch(images[chosen], labels[chosen], positions, flips)

        return batch

    return batches
