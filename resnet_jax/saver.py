"""Saving the state while training continues."""

import time
from collections.abc import Callable

from resnet_jax import hosts
from resnet_jax.checkpoint import Checkpoints
from resnet_jax.divergence import require_finite_state
from resnet_jax.metrics import Recorder
from resnet_jax.step import TrainState
from resnet_jax.trainer import Trainer


class Saver:
    """Saves states, in the first process, and reports when they are saved.

    Attributes:
      saved_step: that of the last state passed to `save`; None: none yet.
    """

    def __init__(
        self,
        trainer: Trainer,
        checkpoints: Checkpoints | None,
        recorder: Recorder,
        record: Callable[[], dict],
        saved_step: int | None,
    ):
        self._trainer, self._checkpoints = trainer, checkpoints
        self._recorder, self._record = recorder, record
        self.saved_step = saved_step
        self._time = time.perf_counter()

    @property
    def minutes(self) -> float:
        """Minutes since a state was last passed to `save`, or since the start."""
        return (time.perf_counter() - self._time) / 60

    def save(self, state: TrainState, step: int) -> None:
        """Saves in the background. Raises DivergedError if the state is not finite."""
        saved = self._trainer.fetch(state)
        require_finite_state(saved, step, self.saved_step)
        self.saved_step, self._time = step, time.perf_counter()
        if self._checkpoints:
            self._recorder.write()
            self._checkpoints.best_step = self._recorder.best_step
            trees = saved.split()
            self._report(self._checkpoints.save(step, trees, self._record()))

    def poll(self) -> None:
        """Reports a save that has ended."""
        if self._checkpoints:
            self._report(self._checkpoints.poll())

    def wait(self) -> None:
        """Waits in all processes for the end of a save, and reports it.

        Those that do not save must not end earlier: JAX would end the first one, too.
        """
        hosts.run_on_first(lambda: self._report(self._checkpoints.wait()))

    def _report(self, ended: tuple[int, int, float] | None) -> None:
        if ended:
            step, size, seconds = ended
            self._recorder.print_line(
                f"saved     step {step:,}: {size / 1e6:.1f} MB in {seconds:.2f} s"
            )
