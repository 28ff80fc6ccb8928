"""PyTorch and Keras, training until their time is up, for `experiments.minutes`.

python -m experiments.peers.timed torch|keras START SECONDS SEED SETTINGS

The time counts from START, in seconds since the epoch (of Unix).
"""

import json
import sys
import time
from pathlib import Path

from configs import common
from experiments.peers import Task
from resnet_jax import data, workdir
from resnet_jax.augment import statistics


def task_of(recipe: str, normalization: str, settings: dict) -> Task:
    """The data set of a config, as the contenders take it."""
    config = common.get_config(recipe, 1, 20)
    config.update_from_flattened_dict(settings)
    dataset = data.load(config.dataset)
    mean, scale = statistics(normalization, dataset.train.images)
    arrays = {"mean": mean, "scale": scale}
    for name, split in (("train", dataset.train), ("eval", dataset.eval)):
        arrays |= {f"{name}_images": split.images, f"{name}_labels": split.labels}
    return Task(Path(), workdir.as_json(config), arrays)


def train_torch(elapsed, seed: int, settings: dict) -> tuple[int, float]:
    """Returns the images trained on and the test accuracy when the time is up.

    `elapsed()` is the part of the time that has passed.
    """
    import torch
    import torch.nn.functional as F  # noqa: N812

    from experiments.peers.torch_peer import ResNet, loader

    torch.manual_seed(seed)
    task = task_of("paper", "mean_std", settings)
    net, images_seen = ResNet(task.version, task.depth), 0
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.kaiming_normal_(module.weight)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    batches = loader(task)
    while elapsed() < 1:
        for images, labels in batches:
            if (part := elapsed()) >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * (1 if part < 0.5 else 0.1 if part < 0.75 else 0.01)
            optimizer.zero_grad()
            F.cross_entropy(net(images), labels).backward()
            optimizer.step()
            images_seen += len(labels)
    net.eval()
    images = torch.from_numpy(task.images("eval")).permute(0, 3, 1, 2)
    labels = torch.from_numpy(task.labels("eval"))
    with torch.no_grad():
        predicted = torch.cat([net(part).argmax(1) for part in images.split(500)])
    return images_seen, (predicted == labels).float().mean().item()


def train_keras(elapsed, seed: int, settings: dict) -> tuple[int, float]:
    """The same for the Keras example's recipe, on TensorFlow."""
    import os

    os.environ["KERAS_BACKEND"] = "tensorflow"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import keras
    import tensorflow as tf

    from experiments.peers.keras_peer import network

    keras.utils.set_random_seed(seed)
    task = task_of("keras", "pixel_mean", settings)
    model = network(task.version, task.depth, 3)
    for layer in model.layers:
        if isinstance(layer, keras.layers.Conv2D):
            layer.kernel.regularizer = keras.regularizers.L2(1e-4)
    model.compile(
        keras.optimizers.Adam(1e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    move = keras.layers.RandomTranslation(0.1, 0.1, fill_mode="nearest")
    flip = keras.layers.RandomFlip("horizontal")
    batches = (
        tf.data.Dataset.from_tensor_slices((task.images("train"), task.labels("train")))
        .shuffle(len(task.labels("train")))
        .repeat()
        .batch(task.batch_size)
        .map(
            lambda images, labels: (
                flip(move(images, training=True), training=True),
                labels,
            ),
            num_parallel_calls=tf.data.AUTOTUNE,
        )
        .prefetch(tf.data.AUTOTUNE)
    )
    updates = 0

    class Clock(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            part = elapsed()
            drops = sum(
                part >= end for end in (81 / 200, 121 / 200, 161 / 200, 181 / 200)
            )
            rate = 1e-3 * (1, 0.1, 0.01, 0.001, 0.0005)[drops]
            self.model.optimizer.learning_rate.assign(rate)

        def on_train_batch_end(self, batch, logs=None):
            nonlocal updates
            updates += 1
            self.model.stop_training = elapsed() >= 1

    model.fit(
        batches, epochs=10**6, steps_per_epoch=100, verbose=0, callbacks=[Clock()]
    )
    labels = task.labels("eval")
    _, accuracy = model.evaluate(task.images("eval"), labels, 500, verbose=0)
    return updates * task.batch_size, accuracy


def main(contender: str, start: str, seconds: str, seed: str, settings: str) -> None:
    """Prints a line of JSON: accuracy, seconds and images."""
    ended = []

    def elapsed() -> float:
        ended[:] = [time.time() - float(start)]
        return ended[0] / float(seconds)

    train = {"torch": train_torch, "keras": train_keras}[contender]
    images, accuracy = train(elapsed, int(seed), json.loads(settings))
    answer = {"accuracy": accuracy, "seconds": round(ended[0], 1), "images": images}
    print(json.dumps(answer))


if __name__ == "__main__":
    main(*sys.argv[1:])
