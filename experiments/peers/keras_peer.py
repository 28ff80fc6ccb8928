"""The same networks in Keras 3, trained by `fit` on any of its backends.

It follows https://keras.io/guides/training_with_built_in_methods/. The input pipeline
is tf.data, which Keras advises for every backend, except on PyTorch, where it is
PyTorch's DataLoader and images are [channels, height, width].
"""

import os

import numpy as np

from experiments.peers import PROBES, Task, process_memory


class Keras:
    def __init__(self, task: Task, backend: str):
        os.environ["KERAS_BACKEND"] = backend
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        import keras

        self._task, self._backend = task, backend
        self._first = backend == "torch"  # channels are first
        keras.config.set_image_data_format(
            "channels_first" if self._first else "channels_last"
        )
        self._model = network(task.version, task.depth, 1 if self._first else 3)
        self._load()
        self._model.compile(
            keras.optimizers.SGD(0.1, momentum=0.9, weight_decay=1e-4),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        self._ready = {
            split: (self._laid_out(task.images(split)), task.labels(split))
            for split in ("train", "eval")
        }
        self._pipeline = None

    def _load(self) -> None:
        """Loads the weights; layers have the names of ours, with '-' for '/'."""
        weights = self._task.weights("ours")
        for layer in self._model.layers:
            name = layer.name.replace("-", "/")
            paths = [f"params/{name}/{leaf}" for leaf in ("kernel", "scale", "bias")]
            paths += [f"batch_stats/{name}/{leaf}" for leaf in ("mean", "var")]
            if arrays := [weights[path] for path in paths if path in weights]:
                layer.set_weights(arrays)

    def _laid_out(self, images: np.ndarray) -> np.ndarray:
        if self._first:
            images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        return images

    def _fit(self, *data, **settings) -> None:
        self._model.fit(*data, epochs=1, verbose=0, **settings)

    def first_step(self) -> None:
        size = self._task.batch_size
        images, labels = (part[:size] for part in self._ready["train"])
        self._fit(images, labels, batch_size=size)

    def in_memory(self) -> None:
        size = self._task.batch_size
        self._fit(*self._ready["train"], batch_size=size, shuffle=False)

    def epoch(self) -> None:
        if self._pipeline is None:
            self._pipeline = self._torch_loader() if self._first else self._tf_data()
        self._fit(self._pipeline)

    def _torch_loader(self):
        from experiments.peers.torch_peer import loader

        return loader(self._task)

    def _tf_data(self):
        import tensorflow as tf

        images, labels = self._task.arrays["train_images"], self._task.labels("train")
        size = images.shape[1:]

        def augment(image, label):
            image = tf.cast(image, tf.float32) / 255 - self._task.mean
            image = tf.pad(image, ((4, 4), (4, 4), (0, 0)))
            image = tf.image.random_crop(image, size)
            return tf.image.random_flip_left_right(image), label

        return (
            tf.data.Dataset.from_tensor_slices((images, labels))
            .shuffle(len(labels))
            .map(augment, num_parallel_calls=tf.data.AUTOTUNE)
            .batch(self._task.batch_size, drop_remainder=True)
            .prefetch(tf.data.AUTOTUNE)
        )

    def evaluate(self) -> float:
        images, labels = self._ready["eval"]
        size = self._task.batch_size
        return self._model.evaluate(images, labels, batch_size=size, verbose=0)[1]

    def logits(self) -> list:
        self._load()
        images = self._ready["eval"][0][:PROBES]
        return self._model.predict(images, batch_size=PROBES, verbose=0).tolist()

    def peak_memory(self) -> int:
        """The peak without a loader's workers."""
        return process_memory()


def network(version: int, depth: int, axis: int):
    """The networks of `resnet_jax.models`; `axis` is that of the channels."""
    import keras
    from keras import layers, ops

    def conv(x, features, size, stride, name):
        if size > 1 and stride > 1:  # pads like ours and PyTorch's, not like 'same'
            x = layers.ZeroPadding2D(((1, 0), (1, 0)))(x)
            padding = "valid"
        else:
            padding = "same"
        return layers.Conv2D(
            features,
            size,
            stride,
            padding,
            use_bias=False,
            kernel_initializer="he_normal",
            name=name,
        )(x)

    def norm(x, name):
        return layers.BatchNormalization(axis, momentum=0.9, epsilon=1e-5, name=name)(x)

    def pad_channels(x, features):
        side = (features - x.shape[axis]) // 2
        pads = [(side, side) if i == axis else (0, 0) for i in range(4)]
        rows = tuple(
            slice(None, None, 2) if i in {1, 2, 3} - {axis} else slice(None)
            for i in range(4)
        )
        return ops.pad(x[rows], pads)

    def basic(x, width, stride, name):
        y = layers.ReLU()(
            norm(conv(x, width, 3, stride, f"{name}-conv1"), f"{name}-bn1")
        )
        y = norm(conv(y, width, 3, 1, f"{name}-conv2"), f"{name}-bn2")
        x = pad_channels(x, width) if stride > 1 else x
        return layers.ReLU()(layers.add([x, y]))

    def bottleneck(x, width, stride, name):
        y = activated = layers.ReLU()(norm(x, f"{name}-bn1"))
        y = conv(y, width, 1, stride, f"{name}-conv1")
        y = conv(layers.ReLU()(norm(y, f"{name}-bn2")), width, 3, 1, f"{name}-conv2")
        y = layers.ReLU()(norm(y, f"{name}-bn3"))
        y = conv(y, 4 * width, 1, 1, f"{name}-conv3")
        if x.shape[axis] != 4 * width:
            x = conv(activated, 4 * width, 1, stride, f"{name}-shortcut_conv")
        return layers.add([x, y])

    block, convs = ((basic, 6), (bottleneck, 9))[version - 1]
    inputs = layers.Input((3, 32, 32) if axis == 1 else (32, 32, 3))
    x = conv(inputs, 16, 3, 1, "stem_conv")
    x = layers.ReLU()(norm(x, "stem_bn")) if version == 1 else x
    for stage, width in enumerate((16, 32, 64), start=1):
        for b in range(1, (depth - 2) // convs + 1):
            stride = 2 if stage > 1 and b == 1 else 1
            x = block(x, width, stride, f"stage{stage}_block{b}")
    x = layers.ReLU()(norm(x, "final_bn")) if version == 2 else x
    x = layers.GlobalAveragePooling2D()(x)
    classifier = layers.Dense(10, kernel_initializer="he_normal", name="classifier")
    return keras.Model(inputs, classifier(x))
