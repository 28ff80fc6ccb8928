"""Checkpoints by Orbax: the newest ones, and the best by validation."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers


class Checkpoints:
    """The checkpoints of a run: by step, named trees of arrays and a record (JSON).

    The trees hold NumPy arrays under the unrolled names of the blocks, whatever devices
    and loops computed them: 'variables' what the network needs, 'optimizer' what else
    it takes to go on training.
    """

    def __init__(self, directory: Path, keep: int, best: bool):
        """Opens a directory, in which the newest `keep` stay; with `best`, that too."""
        kept = [checkpoint_managers.LatestN(keep)]
        if best:
            kept.append(
                checkpoint_managers.BestN(
                    get_metric_fn=_accuracy, n=1, keep_checkpoints_without_metrics=False
                )
            )
        self._best = best
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(kept),
                best_fn=_accuracy if best else None,
                cleanup_tmp_directories=True,
            ),
            item_names=("variables", "optimizer", "record"),
        )

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    @property
    def best_step(self) -> int | None:
        """The step with the best validation accuracy; None without `best`."""
        return self._manager.best_step() if self._best else None

    def save(
        self,
        step: int,
        trees: dict[str, Any],
        record: dict,
        validation_accuracy: float | None,
    ) -> None:
        """Saves in the background; the arrays must stay unchanged meanwhile."""
        metrics = {"validation_accuracy": validation_accuracy} if self._best else None
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        items["record"] = ocp.args.JsonSave(record)
        self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)

    def restore(self, step: int, like: dict[str, Any]) -> tuple[dict[str, Any], dict]:
        """Returns the trees named in `like`, in its structure, and the record."""
        items = {name: ocp.args.StandardRestore(tree) for name, tree in like.items()}
        items["record"] = ocp.args.JsonRestore()
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        trees = {name: jax.tree.map(np.asarray, restored[name]) for name in like}
        return trees, restored["record"]

    def close(self) -> None:
        """Waits until all is saved."""
        self._manager.wait_until_finished()
        self._manager.close()


def _accuracy(metrics: dict) -> float:
    return metrics["validation_accuracy"]
