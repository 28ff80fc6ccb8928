"""The loop of `experiments.plain_linen`."""

import jax
import numpy as np
import optax
from flax.traverse_util import unflatten_dict

from experiments import plain_linen
from experiments.peers import PROBES, Job
from resnet_jax import results


class Plain:
    """Batches come from NumPy; `in_memory` has each on the device already."""

    def __init__(self, job: Job):
        self._job, self._rng = job, np.random.default_rng(0)
        self._net = plain_linen.ResNet(job.version, job.depth)
        self._start = unflatten_dict(job.weights("ours"), sep="/")
        tx = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.1, momentum=0.9))
        params = self._start["params"]
        self._state = params, self._start["batch_stats"], tx.init(params)
        self._train_step = plain_linen.make_train_step(self._net, tx)
        self._apply = jax.jit(self._net.apply, static_argnames="train")
        self._ready = {split: self._batches(split) for split in ("train", "eval")}

    def _batches(self, split: str) -> list:
        images, labels = self._job.images(split), self._job.labels(split)
        starts = range(0, len(labels), self._job.batch_size)
        rows = [slice(start, start + self._job.batch_size) for start in starts]
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
        images, labels = (self._job.arrays[f"train_{x}"] for x in ("images", "labels"))
        order = self._rng.permutation(len(labels)).reshape(-1, self._job.batch_size)

        def batches():
            for rows in order:
                batch = images[rows].astype(np.float32) / 255 - self._job.mean
                yield plain_linen.augmented_batch(self._rng, batch), labels[rows]

        self._train(batches())

    def evaluate(self) -> float:
        variables = {"params": self._state[0], "batch_stats": self._state[1]}
        correct = [
            (self._apply(variables, images, train=False).argmax(-1) == labels).sum()
            for images, labels in self._ready["eval"]
        ]
        return float(sum(correct)) / len(self._job.labels("eval"))

    def logits(self) -> list:
        images = self._job.images("eval")[:PROBES]
        return self._apply(self._start, images, train=False).tolist()

    def peak_memory(self) -> int:
        return results.peak_memory()
