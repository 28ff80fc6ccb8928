"""How many updates a run makes, and where its epochs and its calls end."""

import dataclasses
import math

import jax
from ml_collections import ConfigDict

from resnet_jax import UserError


def total_steps(config: ConfigDict, examples: int) -> int:
    """The updates of a whole run, with a training split of this many examples."""
    return config.steps or math.ceil(config.epochs * examples / config.batch_size)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How many updates a run makes, and where its calls end.

    Attributes:
      size_ends: the last update on images of each of `sizes`, in pixels; after the
        last of these, images are full-size.
    """

    examples: int
    batch_size: int
    total_steps: int
    steps_per_call: int
    sizes: tuple[int, ...] = ()
    size_ends: tuple[int, ...] = ()

    @classmethod
    def of(cls, config: ConfigDict, examples: int) -> "Plan":
        """The plan for a training split of this many examples.

        Raises:
          UserError: a batch is larger than the split, or the run is too long to count.
        """
        if config.batch_size > examples:
            raise UserError(
                f"config.batch_size={config.batch_size} is larger than the training "
                f"split, which has {examples:,} examples: choose a smaller one"
            )
        total = total_steps(config, examples)
        if total * config.batch_size >= 2**31:
            field = "steps" if config.steps else "epochs"
            raise UserError(
                f"config.{field}={config[field]:,} makes {total:,} steps of "
                f"{config.batch_size} examples, over 2^31 examples: lower it"
            )
        default = 10 if jax.default_backend() == "cpu" else 100
        ends = [round(fraction * total) for fraction in config.augment.size_ends]
        return cls(
            examples=examples,
            batch_size=config.batch_size,
            total_steps=total,
            steps_per_call=config.steps_per_call or default,
            sizes=tuple(config.augment.sizes),
            size_ends=tuple(ends),
        )

    @property
    def steps_per_epoch(self) -> float:
        return self.examples / self.batch_size

    @property
    def total_epochs(self) -> float:
        return self.total_steps / self.steps_per_epoch

    def epoch(self, step: int) -> int:
        """The epoch, counted from 1, that the update number `step` belongs to."""
        return (step - 1) * self.batch_size // self.examples + 1

    def epoch_end(self, epoch: int) -> int:
        """The number of the last update of an epoch, or of the run."""
        end = math.ceil(epoch * self.examples / self.batch_size)
        return min(end, self.total_steps)

    def call_end(self, step: int) -> int:
        """Where the call that starts after update `step` ends.

        At fixed multiples, at epochs' ends and where the image size changes, wherever
        the run was resumed, so that the numbers reported for each call are the same
        too.
        """
        multiple = (step // self.steps_per_call + 1) * self.steps_per_call
        changes = [end for end in self.size_ends if end > step]
        return min(multiple, self.epoch_end(self.epoch(step + 1)), *changes)

    def image_size(self, step: int) -> int:
        """The image size in the call that starts after update `step`; 0: full size."""
        return next(
            (
                size
                for size, end in zip(self.sizes, self.size_ends, strict=True)
                if step < end
            ),
            0,
        )
