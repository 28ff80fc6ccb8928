"""A config's network, data and programs, placed on the devices and ready to run."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from resnet_jax import UserError, data, freeze, models, optimizers
from resnet_jax.augment import normalization
from resnet_jax.averaged import make_statistics_call, other_statistics
from resnet_jax.compilation import Program
from resnet_jax.config import Build, build_network, get
from resnet_jax.evaluator import Evaluator
from resnet_jax.feed import Resident, train_feed
from resnet_jax.parallel import Parallel
from resnet_jax.plan import Plan
from resnet_jax.step import (
    METRICS,
    TrainState,
    create_state,
    make_train_call,
    make_train_step,
    resident_batches,
    streamed_batches,
)


class Trainer:
    """Runs a config's updates and evaluations; it holds no state of the training.

    Attributes:
      plan: how many updates, and where calls end.
      parallel: the devices.
      net: the network.
      normalization: mean and scale that images are normalised by.
      learning_rates: float32 [updates], of each update of the run.
      compile_seconds: spent in compiling so far.
      programs: the compiled calls that train, by image size, after `compile`; none if
        no update is made.
    """

    def __init__(
        self,
        config: ConfigDict,
        dataset: data.Dataset,
        build: Build = build_network,
        devices: list | None = None,
    ):
        """Builds the network by `build(config, num_classes)`; `devices` None: all.

        Raises:
          UserError: the batch does not suit the data or the devices.
        """
        self._config = config
        self._dataset = dataset
        self.plan = Plan.of(config, len(dataset.train.labels))
        self.parallel = Parallel.over(
            devices or jax.devices(),
            config.parallel,
            config.batch_size,
            image_shape=dataset.image_shape,
        )
        _check(config, dataset, self.parallel.device_count)
        self.net = build(config, dataset.num_classes)
        schedule = optimizers.schedule(
            config.schedule,
            optimizers.peak_rate(config),
            self.plan.total_steps,
            self.plan.steps_per_epoch,
        )
        self.learning_rates = optimizers.rates(schedule, self.plan.total_steps)
        self._tx = optimizers.optimizer(config.optimizer, schedule)
        self.normalization = normalization(config.augment, dataset.train.images)
        self.compile_seconds = 0.0
        self._begun: list[Program] | None = None

    def new_state(self) -> TrainState:
        """The state of step 0: NumPy arrays, blocks under their unrolled names."""
        config, shape = self._config, self._dataset.image_shape
        ema = config.optimizer.ema > 0
        state = create_state(self.net, self._tx, config.seed, shape, ema)
        return models.unstack(state)

    def blank_state(self) -> TrainState:
        """A state of zeros, in the form of `new_state`: nothing is compiled."""
        variables = models.zeros(self.net, self._dataset.image_shape)
        params, batch_stats = variables["params"], variables["batch_stats"]
        freeze.check(self._config.optimizer, params)
        opt_state = jax.tree.map(
            lambda leaf: np.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(self._tx.init, params),
        )
        state = TrainState(np.zeros((), np.int32), params, batch_stats, opt_state)
        return state.replace(ema=state.trained) if self._config.optimizer.ema else state

    def place(self, state: TrainState) -> TrainState:
        """Puts a state as `new_state` and `fetch` return it on the devices."""
        return self.parallel.replicate(models.stack(state) if self.net.scan else state)

    def fetch(self, state: TrainState) -> TrainState:
        """Copies a state from the devices, into the form of `new_state`."""
        return models.unstack(self.parallel.fetch(self._with_statistics(state)))

    def compile(self) -> None:
        """Compiles what `train` and `evaluate` run, and places the data."""
        if self._begun is None:
            self.begin_compiling()
        start = time.perf_counter()
        Program.wait(self._begun)
        self.compile_seconds += time.perf_counter() - start

    def begin_compiling(self) -> None:
        """Begins in the background what `compile` then waits for."""
        start = time.perf_counter()
        self._begun = self._begin()
        self.compile_seconds += time.perf_counter() - start

    def _begin(self) -> list[Program]:
        config, dataset, parallel = self._config, self._dataset, self.parallel
        state = self.place(self.blank_state())
        self._positions = parallel.shard(np.arange(config.batch_size, dtype=np.int32))
        self._seed = parallel.replicate(np.uint32(config.seed))
        self._no_sums = parallel.replicate(dict.fromkeys(METRICS, np.float32(0)))
        if dataset.train.streams:
            self._feed = train_feed(dataset.train, self.plan, config.seed, parallel)
            batches = streamed_batches
        else:
            self._feed = Resident(dataset.train, parallel)
            batches = resident_batches(self.plan, config.augment.alternating_flip)
        self.programs = {}
        for size in (*self.plan.sizes, 0) if self.plan.total_steps else ():
            build_step = partial(self._train_step, size)
            self.programs[size] = parallel.compile(
                make_train_call(build_step, batches, parallel.axis_name),
                state,
                self._no_sums,
                *self._feed.empty_block(),
                self._positions,
                self._seed,
                *self._until(0, 1),
                donated=(0,),
            )
        self._evaluators = {
            name: Evaluator(
                self.net,
                split,
                self.normalization,
                config.batch_size,
                parallel,
                config.test_time_flip,
                # As long as a training call: a forward pass is a third of a step.
                batches_per_call=3 * self.plan.steps_per_call,
            )
            for name, split in (
                ("validation", dataset.validation),
                ("test", dataset.eval),
            )
            if split
        }
        programs = list(self.programs.values())
        programs += [
            evaluator.compile(state.variables)
            for evaluator in self._evaluators.values()
        ]
        if state.ema:
            self._statistics = self._compile_statistics(state)
            programs.append(self._statistics)
        return programs

    def _train_step(self, image_size: int, schedule: optax.Schedule) -> Callable:
        config, plan = self._config, self.plan
        plain_steps = config.augment.plain_epochs * plan.steps_per_epoch
        return make_train_step(
            self.net,
            optimizers.optimizer(config.optimizer, schedule),
            config,
            self.normalization,
            image_size,
            unmixed_from_step=plan.total_steps - plain_steps,
        )

    def _compile_statistics(self, state: TrainState) -> Program:
        config, parallel = self._config, self.parallel
        if other := other_statistics(self.net, self._dataset.image_shape):
            raise UserError(
                f"config.optimizer.ema={config.optimizer.ema} does not work with the "
                f"statistics that {other} keeps, which are not those of the network's "
                "own BatchNorm: set it to 0"
            )
        return parallel.compile(
            make_statistics_call(
                self.net, self.plan, config, self.normalization, parallel.axis_name
            ),
            state.ema["params"],
            state.batch_stats,
            self._feed.split,
            self._positions,
            self._seed,
        )

    def _with_statistics(self, state: TrainState) -> TrainState:
        """The state with the statistics that its averaged weights need, if any."""
        if not state.ema:
            return state
        params = state.ema["params"]
        found = self._statistics(
            params, state.batch_stats, self._feed.split, self._positions, self._seed
        )
        return state.replace(ema={"params": params, "batch_stats": found})

    def train(
        self, state: TrainState, start: int, stop: int
    ) -> tuple[TrainState, dict[str, float]]:
        """Makes the updates from step `start` to `stop`: one call to the devices.

        At most `plan.steps_per_call` of them; a run's calls end at `plan.call_end`.
        `state` is donated. Returns the new one, and the means of the steps' metrics.
        """
        call = self.programs[self.plan.image_size(start)]
        end, sums, before = self.plan.total_steps, self._no_sums, None
        for first, last, *block in self._feed.blocks(start, stop, end):
            until = self._until(first, last)
            state, sums = call(state, sums, *block, self._positions, self._seed, *until)
            # The host is one block ahead, so that few wait in memory.
            jax.block_until_ready(before)
            before = sums
        sums = self.parallel.fetch(sums)
        return state, {
            name: float(total) / (stop - start) for name, total in sums.items()
        }

    def _until(self, first: int, last: int) -> tuple[jax.Array, jax.Array]:
        """What tells a call its end and the learning rates of its updates."""
        rates = np.zeros(self.plan.steps_per_call, np.float32)
        rates[: last - first] = self.learning_rates[first:last]
        return self.parallel.replicate((np.int32(last), rates))

    def evaluate(
        self,
        state: TrainState,
        every_split: bool,
        stop: Callable[[], bool] = lambda: False,
    ) -> dict[str, Any] | None:
        """Evaluates on every split, or on validation alone (test, if there is none).

        Returns:
          What `Evaluator` does, named as 'validation_loss' and 'test_loss'; None if
          `stop`, asked between calls to the devices, says so.
        """
        names = list(self._evaluators) if every_split else list(self._evaluators)[:1]
        metrics, variables = {}, self._with_statistics(state).variables
        for name in names:
            found = self._evaluators[name](variables, stop)
            if found is None:
                return None
            metrics |= {f"{name}_{metric}": value for metric, value in found.items()}
        return metrics


def _check(config: ConfigDict, dataset: data.Dataset, device_count: int) -> None:
    """Raises UserError where the config does not suit the data or the devices."""
    for field in ("augment.alternating_flip", "optimizer.ema"):
        if dataset.train.streams and (value := get(config, field)):
            raise UserError(
                f"config.{field}={value} does not work with streamed images: "
                f"set it to {type(value)()}, or dataset.stream to 'never'"
            )
    height, width, channels = dataset.image_shape
    if (mean := config.augment.mean) and len(mean) != channels:
        raise UserError(
            f"config.augment.mean={tuple(mean)}: give one number for each of the "
            f"{channels} channels of the images, and as many in augment.std"
        )
    if any(size >= min(height, width) for size in config.augment.sizes):
        raise UserError(
            f"config.augment.sizes={tuple(config.augment.sizes)}: give sizes below "
            f"the {min(height, width)} pixels of the images, or set it and "
            "augment.size_ends to ()"
        )
    for name, pixels in (
        ("crop", min(height, width)),
        ("cutout", min((height, width, *config.augment.sizes))),
    ):
        if (part := config.augment[name]) and not round(part * pixels):
            raise UserError(
                f"config.augment.{name}={part} is less than a pixel in images of "
                f"{pixels} pixels: give {1 / pixels:.3g} or more, or 0"
            )
    parts = config.optimizer.accumulate
    pieces = device_count if config.parallel == "pmap" else 1
    if config.batch_size // pieces % parts:
        raise UserError(
            f"config.optimizer.accumulate={parts} does not divide the "
            f"{config.batch_size // pieces} images that each device gets: choose "
            "a divisor of that"
        )
