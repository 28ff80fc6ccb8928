"""Notices that training has diverged, before any of it is saved."""

import math

import jax
import numpy as np
from jax.tree_util import keystr

from resnet_jax import UserError
from resnet_jax.step import TrainState

REMEDY = (
    "try a lower optimizer.learning_rate, a longer schedule.warmup_epochs, or "
    "optimizer.clip_norm=1, in another --workdir"
)


class DivergedError(UserError):
    """A loss or a gradient became infinite or NaN."""

    exit_status = 1


def require_finite(means: dict, start: int, stop: int, saved: int | None) -> None:
    """Raises DivergedError if a mean of the updates' metrics is not finite.

    Args:
      means: by metric.
      start: step before the call.
      stop: step after it.
      saved: the step of the newest checkpoint; None: there is none.
    """
    bad = [name for name, value in means.items() if not math.isfinite(value)]
    if bad:
        raise _diverged(bad[0], f"between steps {start:,} and {stop:,}", saved)


def require_finite_state(state: TrainState, step: int, saved: int | None) -> None:
    """Raises DivergedError if an array of a state is not finite.

    The last update can overflow even if the loss before it did not.
    """
    for path, leaf in jax.tree.leaves_with_path(state):
        if not np.isfinite(leaf).all():
            name = keystr(path, simple=True, separator="/")
            raise _diverged(name, f"at step {step:,}", saved)


def _diverged(what: str, where: str, saved: int | None) -> DivergedError:
    kept = "none has been saved yet"
    if saved is not None:
        kept = f"the checkpoint of step {saved:,} is kept"
    return DivergedError(
        f"training diverged: {what} is no longer finite {where} ({kept}): {REMEDY}"
    )
