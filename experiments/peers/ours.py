"""The loop that `resnet_jax.main` runs."""

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from configs import common
from experiments.peers import PROBES, Task
from resnet_jax import data, models, parallel, results
from resnet_jax.augment import augment, normalize
from resnet_jax.trainer import Trainer


class Ours:
    """Data are on the device from the start: `epoch` and `in_memory` are the same."""

    def __init__(self, task: Task, dtype: str = "float32"):
        self._task = task
        self._config = common.completed(task.config)
        self._config.model.dtype = dtype
        size = data.known_size(self._config.dataset)
        parallel.split_cpu(task.batch_size, image_size=size)
        self._trainer = Trainer(self._config, data.load(self._config.dataset))
        variables = unflatten_dict(task.weights("ours"), sep="/")
        self._start = self._trainer.new_state().replace(**variables)

    def first_step(self) -> None:
        """Also compiles the evaluation."""
        state = self._trainer.place(self._start)
        self._trainer.compile()
        self._trainer.train(state, 0, 1)
        self._state, self._step = self._trainer.place(self._start), 0

    def epoch(self) -> None:
        plan = self._trainer.plan
        end = self._step + plan.examples // plan.batch_size
        while self._step < end:
            stop = plan.call_end(self._step)
            self._state, _ = self._trainer.train(self._state, self._step, stop)
            self._step = stop

    in_memory = epoch

    def evaluate(self) -> float:
        return self._trainer.evaluate(self._state, every_split=True)["test_accuracy"]

    def logits(self) -> list:
        images = jnp.asarray(self._task.arrays["eval_images"][:PROBES])
        images = normalize(images, *self._trainer.normalization)
        variables = self._start.variables
        if self._trainer.net.scan:
            variables = models.stack(variables)
        return jax.jit(self._trainer.net.apply)(variables, images).tolist()

    def input(self) -> float:
        """An epoch's input work alone: gather, normalise, augment."""
        images = jnp.asarray(self._task.arrays["train_images"])
        batch_size = self._task.batch_size
        positions = np.arange(batch_size)

        @jax.jit
        def run(images, steps):
            def prepare(step, total):
                key = jax.random.fold_in(jax.random.key(0), step)
                chosen = jax.random.randint(key, (batch_size,), 0, len(images))
                batch = normalize(images[chosen], *self._trainer.normalization)
                batch = augment(self._config.augment, batch, key, positions)
                # The sum of squares reads every pixel, as the network would.
                return total + (batch**2).sum()

            return jax.lax.fori_loop(0, steps, prepare, jnp.float32(0))

        self.input = lambda: float(run(images, len(images) // batch_size))
        return self.input()

    def peak_memory(self) -> int:
        return results.peak_memory()
