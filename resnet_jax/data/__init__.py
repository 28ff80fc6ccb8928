"""Image-classification data: `load(config.dataset)`.

`image_folder` (your own pictures), `digits` (scikit-learn's, no download), `fake`
(random, for speed tests), and every image-classification set that TFDS has prepared in
array_record format; cifar10, cifar100, fashion_mnist and svhn_cropped are downloaded
and prepared here. TensorFlow is never imported.
"""

import re

import numpy as np
from ml_collections import ConfigDict

from resnet_jax import UserError
from resnet_jax.data import dataset, digits, fake, image_folder, splits, tfds
from resnet_jax.data.cache import cached
from resnet_jax.data.dataset import Dataset
from resnet_jax.data.dataset import Split as Split
from resnet_jax.data.picture import DECODING, fit
from resnet_jax.data.source import KNOWN as KNOWN
from resnet_jax.data.source import Source
from resnet_jax.data.stream import StreamedImages as StreamedImages

# Decoded images up to this many bytes stay on the device; more of them are streamed.
RESIDENT_BYTES = 2 * 2**30
# What makes a `Source`, by name in a config; besides image_folder and TFDS's sets.
SOURCES = {"digits": digits.source, "fake": fake.source}


def base_name(name: str) -> str:
    """A data set's name without TFDS's config and version."""
    return re.split("[/:]", name)[0]


def known_size(config: ConfigDict) -> int:
    """Pixels a side of the images of `config.dataset`; 0: known once they are read."""
    known = KNOWN.get(base_name(config.name))
    return config.image_size or (known[1][0] if known else 0)


def check(config: ConfigDict) -> None:
    """Checks `config.dataset` without reading data.

    Args:
      config: the fields of `load`.

    Raises:
      UserError: the set is unknown, or cannot be read or prepared; `data_dir` or `path`
        is given but missing; a split is not in TFDS's syntax; or the mirror is not an
        address.
    """
    for field, spec in _specs(config).items():
        splits.parse(spec, field)
    if config.mirror and not config.mirror.startswith(("http://", "https://")):
        raise UserError(
            f"config.dataset.mirror={config.mirror} is not an address: begin it with https://"
        )
    if config.name == "image_folder":
        image_folder.check(config.path)
        return
    if config.path:
        raise UserError(
            f"config.dataset.path={config.path} is for pictures of your own: give "
            "config.dataset.name=image_folder, too"
        )
    if config.name not in SOURCES:
        tfds.locate(config.name, config.data_dir)


def load(config: ConfigDict) -> Dataset:
    """Reads a data set, downloading and preparing it if need be.

    Args:
      config: `name`; `path` and `split_seed` of image_folder; `data_dir` ('':
        $TFDS_DATA_DIR or ~/tensorflow_datasets); `mirror` ('': the official host, else
        the base URL to download from); `image_size` (0: as stored, else pixels a side
        of the square to which an image's middle is resized, bilinearly); `stream`
        ('always', 'never', or 'auto': if larger than `RESIDENT_BYTES`); and
        `train_split`, `validation_split` (may be '') and `eval_split` in TFDS's syntax.

    Raises:
      UserError: as for `check`; also if the set cannot be obtained, is damaged, has no
        such split, or has images of several sizes; or training and validation overlap.
    """
    check(config)
    source = _source(config)
    selections = {
        field: splits.select(spec, field, source.sizes)
        for field, spec in _specs(config).items()
    }
    train, *validation, _ = selections.values()
    if validation:
        splits.check_disjoint(train, *validation, source.sizes)
    notes = list(source.notes)
    *others, (field, test) = selections.items()
    for other, seen in others:
        if shared := splits.overlap(seen, test):
            notes.append(
                f"warning   {field} shares {shared:,} examples with {other}: the test "
                "accuracy is not that on unseen images"
            )
    chosen, size = list(selections.values()), config.image_size
    streams = _streams(config, source, chosen)
    arrays = cached(
        source.key
        and f"{source.key} {DECODING} {chosen} {size} pixels, streams={streams}",
        lambda: dataset.read(source, chosen, size, streams=streams),
    )
    notes += dataset.notes_on_skipped(arrays["skipped"].tolist())
    parts = dataset.cut(arrays, source, size)
    return Dataset(
        name=source.name,
        class_names=source.class_names,
        train=parts[0],
        validation=parts[1] if validation else None,
        eval=parts[-1],
        notes=tuple(notes),
    )


def reopen(loaded: Dataset, config: ConfigDict) -> None:
    """Lets a data set that came from another process read its streamed images here.

    Raises:
      UserError: they are missing here, or not the same.
    """
    parts = [loaded.train, loaded.validation, loaded.eval]
    streamed = [part.images for part in parts if part and part.streams]
    if streamed:
        source = _source(config)
        for images in streamed:
            images.reopen(source)


def _source(config: ConfigDict) -> Source:
    if config.name == "image_folder":
        return image_folder.source(config.path, config.image_size, config.split_seed)
    if config.name in SOURCES:
        return SOURCES[config.name]()
    return tfds.source(config.name, config.data_dir, config.mirror, config.image_size)


def _specs(config: ConfigDict) -> dict[str, str]:
    """The splits to read, by field, in the order of `Dataset`."""
    specs = {"config.dataset.train_split": config.train_split}
    if config.validation_split:
        specs["config.dataset.validation_split"] = config.validation_split
    return specs | {"config.dataset.eval_split": config.eval_split}


def _streams(
    config: ConfigDict, source: Source, selections: dataset.Selections
) -> bool:
    """Whether the images are read batch by batch, rather than kept in memory."""
    if config.stream != "auto":
        return config.stream == "always"
    size, (split, rows) = config.image_size, selections[0][0]

    def probe() -> dict[str, np.ndarray]:
        for index in rows[:16]:  # the first may be damaged
            ((image, _),) = source.examples(split, range(index, index + 1))
            if isinstance(image, np.ndarray):
                return {"bytes": np.array(fit(image, size).size)}
        return {"bytes": np.array(0)}

    key = source.key and f"{source.key} {split} {rows[:16]} {size} pixels, bytes"
    examples = sum(len(rows) for parts in selections for _, rows in parts)
    return examples * int(cached(key, probe)["bytes"]) > RESIDENT_BYTES
