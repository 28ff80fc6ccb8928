"""Exact evaluation: every example counts once, whatever the batch size and devices."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, UInt8

from resnet_jax import data, models
from resnet_jax.augment import averaged_over_flip, normalize
from resnet_jax.compilation import Program
from resnet_jax.feed import Feed, Resident
from resnet_jax.parallel import Parallel


def logits(
    net: models.ResNet,
    variables: dict,
    images: UInt8[Array, "batch height width channels"],
    normalization: tuple[np.ndarray, np.ndarray],
    test_time_flip: bool,
) -> Float[Array, "batch classes"]:
    """A network's logits in evaluation, for images as they are stored."""
    forward = partial(net.apply, variables, train=False)
    if test_time_flip:
        forward = averaged_over_flip(forward)
    return forward(normalize(images, *normalization))


class Evaluator:
    """Evaluates a network on one split, which it keeps on the devices or streams."""

    def __init__(
        self,
        net: models.ResNet,
        split: data.Split,
        normalization: tuple[np.ndarray, np.ndarray],
        batch_size: int,
        parallel: Parallel,
        test_time_flip: bool = False,
        batches_per_call: int | None = None,
    ):
        """Evaluates `batches_per_call` at a time; None: all."""
        self._parallel, self._batch_size = parallel, batch_size
        self._examples = len(split.labels)
        self._batches = -(-self._examples // batch_size)
        self._batches_per_call = batches_per_call or self._batches
        sizes = np.bincount(split.labels, minlength=net.num_classes)
        self._class_sizes = sizes.tolist()

        def add(variables, sums, images, labels, counts):
            """Adds a batch's sums, without the examples that do not count."""
            scores = logits(net, variables, images, normalization, test_time_flip)
            loss = optax.softmax_cross_entropy_with_integer_labels(scores, labels)
            score = jnp.take_along_axis(scores, labels[:, None], axis=1)
            known = counts & jnp.isfinite(score[:, 0])  # nothing is above NaN
            correct = known & (scores.argmax(-1) == labels)
            top5 = known & ((scores > score).sum(-1) < 5)
            batch = {
                "loss": jnp.where(counts, loss, 0).sum(),
                "top5": top5.sum(),
                "correct": jnp.zeros(net.num_classes, jnp.int32)
                .at[labels]
                .add(correct.astype(jnp.int32)),
            }
            return jax.tree.map(jnp.add, sums, batch)

        zeros = {
            "loss": np.float32(0),
            "top5": np.int32(0),
            "correct": np.zeros(net.num_classes, np.int32),
        }

        def over_devices(sums):
            return jax.lax.psum(sums, axis) if (axis := parallel.axis_name) else sums

        last = self._examples - 1
        self._positions = parallel.shard(np.arange(batch_size, dtype=np.int32))
        if split.streams:
            self._feed = Feed(
                split,
                lambda place: min(place, last),
                batch_size,
                self._batches_per_call,
                parallel,
            )

            def rows(place, column):
                return slice(None), column

        else:
            self._feed = Resident(split, parallel)

            def rows(place, column):
                return jnp.minimum(place, last)

        def evaluate_call(variables, images, labels, positions, start, stop):
            def body(number, sums):
                place = number * batch_size + positions
                # The last batch is padded with examples that do not count.
                counts, chosen = place <= last, rows(place, number - start)
                return add(variables, sums, images[chosen], labels[chosen], counts)

            return over_devices(jax.lax.fori_loop(start, stop, body, zeros))

        self._function = evaluate_call

    def compile(self, variables) -> Program:
        """Compiles for variables like these, placed by `Parallel.replicate`."""
        self._program = self._parallel.compile(
            self._function,
            variables,
            *self._feed.empty_block(),
            self._positions,
            *map(self._parallel.replicate, (np.int32(0), np.int32(1))),
            inference=True,
        )
        return self._program

    def _run(self, variables, start: int, stop: int) -> list[dict]:
        place, parts, before = self._parallel.replicate, [], None
        for first, last, *block in self._feed.blocks(start, stop, end=self._batches):
            bounds = place(np.int32(first)), place(np.int32(last))
            parts.append(self._program(variables, *block, self._positions, *bounds))
            jax.block_until_ready(before)  # so that few blocks wait in memory
            before = parts[-1]
        return [self._parallel.fetch(part) for part in parts]

    def __call__(
        self, variables, stop: Callable[[], bool] = lambda: False
    ) -> dict | None:
        """Returns accuracy, loss, the number of examples, and each class's accuracy.

        That of a class without examples is None. With more than ten classes, it also
        returns the top-5 accuracy. Returns None if `stop`, asked between calls, says
        so.
        """
        parts = []
        for start in range(0, self._batches, self._batches_per_call):
            if stop():
                return None
            end = min(start + self._batches_per_call, self._batches)
            parts += self._run(variables, start, end)
        sums = jax.tree.map(lambda *values: sum(values), *parts)
        classes = list(zip(sums["correct"].tolist(), self._class_sizes, strict=True))
        metrics = {
            "accuracy": sum(correct for correct, _ in classes) / self._examples,
            "loss": float(sums["loss"]) / self._examples,
            "examples": self._examples,
            "class_accuracy": [
                correct / size if size else None for correct, size in classes
            ],
        }
        if len(classes) > 10:
            metrics["top5_accuracy"] = int(sums["top5"]) / self._examples
        return metrics
