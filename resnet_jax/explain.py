"""Shows which pixels are evidence for a class: Grad-CAM and integrated gradients.

python -m resnet_jax.explain --workdir=runs/v2_56/seed0 cat.jpg --out=explained

Writes an overlay of each kind for each picture, a contact sheet of all, and
explanations.json. It also checks them: maps that do not change when the weights are
drawn at random explain nothing of what the network has learned.
"""

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import matplotlib
import numpy as np
from absl import flags
from matplotlib.figure import Figure
from PIL import Image
from scipy.special import softmax

from resnet_jax import (
    UserError,
    as_text,
    attribution,
    bucket,
    command_line,
    did_you_mean,
    predict,
    trained,
    workdir,
)
from resnet_jax.augment import normalize
from resnet_jax.config import Build, build_network
from resnet_jax.trained import Trained

_BATCH_SIZE = 8
_CHECKED = 32  # pictures whose maps are compared with those of random weights
_SHEET_ROWS = 50
_NAME_LENGTH = 50  # characters of a picture's name that are shown
_PIXELS = 224  # of an overlay's shorter side, at least


class Explanations(NamedTuple):
    """Explanations of a batch of images, in input order.

    Attributes:
      grad_cam: [images, height, width], non-negative.
      integrated_gradients: [images, height, width], sums over the channels.
      completeness_errors: [images], see `attribution.integrated_gradients`.
    """

    grad_cam: np.ndarray
    integrated_gradients: np.ndarray
    completeness_errors: np.ndarray

    def overlays(self, number: int, image: np.ndarray) -> dict[str, Image.Image]:
        """'grad_cam' and 'integrated_gradients' of an image, drawn over it."""
        return {
            "grad_cam": overlay(image, self.grad_cam[number], signed=False),
            "integrated_gradients": overlay(
                image, self.integrated_gradients[number], signed=True
            ),
        }


class Explainer:
    """One compiled program that explains any number of images."""

    def __init__(self, run: Trained, layer: str = "features"):
        self._run = run

        @jax.jit
        def explain(variables, images, labels):
            images = normalize(images, *run.inputs.normalization)
            gradients, errors = attribution.integrated_gradients(
                run.net, variables, images, labels
            )
            heat = attribution.grad_cam(run.net, variables, images, labels, layer)
            return heat, gradients.sum(-1), errors

        self._explain = explain

    def __call__(
        self, images: np.ndarray, labels: np.ndarray, variables: dict | None = None
    ) -> Explanations:
        """Explains the class `labels[i]` in `images[i]`, as they are stored.

        `variables` are weights to use instead of the run's.
        """
        variables = jax.device_put(variables or self._run.variables)
        parts = []
        for start in range(0, len(images), _BATCH_SIZE):
            rows = np.arange(start, start + _BATCH_SIZE).clip(max=len(images) - 1)
            batch = self._explain(variables, images[rows], np.int32(labels[rows]))
            count = min(_BATCH_SIZE, len(images) - start)
            parts.append([np.array(array)[:count] for array in batch])
        return Explanations(*map(np.concatenate, zip(*parts, strict=True)))

    def check(
        self, images: np.ndarray, labels: np.ndarray, explanations: Explanations
    ) -> list[dict]:
        """Compares the maps with those of more and more randomised weights.

        Returns:
          For each step of the cascade, the part that is 'randomized', and the rank
          correlations with the trained network's maps, of 'grad_cam' and
          'integrated_gradients': 1 where nothing changes, about 0 where the maps depend
          on what was learned.
        """
        run, rows = self._run, []
        cascade = attribution.cascading_randomization(
            run.net, run.variables, run.inputs.image_shape, run.config.seed + 1
        )
        for title, variables in cascade.items():
            other = self(images, labels, variables)
            row = {"randomized": title}
            for kind in ("grad_cam", "integrated_gradients"):
                row[kind] = attribution.rank_correlation(
                    getattr(explanations, kind), getattr(other, kind)
                )
            rows.append(row)
        return rows


def enlarge(image: np.ndarray) -> Image.Image:
    """An image as the network reads it, its pixels enlarged to visible squares.

    Of neither one nor three channels, the first is shown.
    """
    picture = Image.fromarray(image if image.shape[-1] == 3 else image[..., 0])
    factor = -(-_PIXELS // min(picture.size))
    size = (picture.width * factor, picture.height * factor)
    return picture.convert("RGB").resize(size, Image.Resampling.NEAREST)


def overlay(image: np.ndarray, values: np.ndarray, signed: bool) -> Image.Image:
    """Lays a map over its image: the stronger a value, the less of the image is seen.

    Values from 0 up run from dark to yellow; signed ones are red for the class and blue
    against it. The strongest one percent all look alike.
    """
    picture = enlarge(image)
    limit = np.percentile(np.abs(values), 99) or np.abs(values).max() or 1.0
    strength = Image.fromarray((values / limit).clip(-1, 1).astype(np.float32))
    # Integrated gradients are per pixel, Grad-CAM's maps are smooth.
    method = Image.Resampling.NEAREST if signed else Image.Resampling.BILINEAR
    strength = np.asarray(strength.resize(picture.size, method))
    colors = matplotlib.colormaps["bwr" if signed else "inferno"]
    color = colors(strength / 2 + 0.5 if signed else strength)[..., :3] * 255
    # The image is grey, so that all colour comes from the map.
    grey = np.asarray(picture.convert("L"), np.float32)[..., None]
    alpha = 0.85 * np.sqrt(np.abs(strength))[..., None]
    return Image.fromarray(np.uint8((1 - alpha) * grey + alpha * color))


def contact_sheet(rows: list[tuple[str, list[Image.Image]]]) -> Figure:
    """Draws rows of a caption with image, Grad-CAM and integrated gradients."""
    titles = ("what the network sees", "Grad-CAM", "integrated gradients")
    figure = Figure(figsize=(6.6, 2.5 * len(rows) + 0.4), layout="constrained")
    lines = np.ravel(figure.subfigures(len(rows), 1))
    for line, (caption, images) in zip(lines, rows, strict=True):
        line.suptitle(caption, fontsize=8, x=0.01, ha="left", parse_math=False)
        for cell, image, title in zip(line.subplots(1, 3), images, titles, strict=True):
            cell.imshow(image)
            cell.axis("off")
            if line is lines[0]:
                cell.set_title(title, fontsize=8, loc="left")
    figure.supxlabel(
        "Grad-CAM: the brighter, the stronger the evidence for the class. Integrated "
        "gradients: red is evidence for the class, blue against it.",
        fontsize=7,
    )
    return figure


def _write(path: Path, save: Callable[[io.BytesIO], None]) -> None:
    buffer = io.BytesIO()
    save(buffer)
    workdir.write(path, buffer.getvalue(), "give another --out=DIR")


def _label(name: str, classes: tuple[str, ...]) -> int:
    if name in classes:
        return classes.index(name)
    shown = ", ".join(classes[:20]) + (", ..." if len(classes) > 20 else "")
    raise UserError(
        f"--class={name} is not a class of this network: "
        f"{did_you_mean(name, classes)}choose one of {shown}"
    )


def explain(
    run: Trained, names: list[str], out: Path, target: str | None, layer: str
) -> None:
    """Explains pictures; see `main`."""
    classes = run.inputs.class_names
    label = None if target is None else _label(target, classes)
    stages = len(run.net.blocks_per_stage)
    if layer.startswith("stage") and int(layer.removeprefix("stage")) > stages:
        raise UserError(
            f"--layer={layer} is not in this network: give stage1 to stage{stages}, or "
            "features"
        )
    pictures = predict.read_pictures(names, run.inputs.image_shape)
    pictures = [(name, image) for name, image in pictures if image is not None]
    if not pictures:
        predict.require_all_read(0, len(names))
    workdir.make(out)
    images = np.stack([image for _, image in pictures])
    logits = predict.Predictor(run, len(images))(images)
    probabilities = softmax(np.float64(logits), axis=-1)
    likeliest = probabilities.argmax(1)
    labels = likeliest if label is None else np.full(len(images), label)
    explainer = Explainer(run, layer)
    explanations = explainer(images, labels)
    rows, entries = [], []
    for number, (name, image) in enumerate(pictures):
        overlays = explanations.overlays(number, image)
        origin = Path(name).stem if name != predict.STDIN else "stdin"
        stem = f"{number + 1:03}_{origin[:_NAME_LENGTH]}"
        for kind, picture in overlays.items():
            save = partial(picture.save, format="png")
            _write(out / f"{stem}_{kind}.png", save)
        row, chosen = probabilities[number], labels[number]
        best = likeliest[number]
        caption = f"{_shortened(name)}: {classes[best]} {row[best]:.1%}"
        if chosen != best:
            caption += f", explained: {classes[chosen]} {row[chosen]:.1%}"
        print(caption)
        if number < _SHEET_ROWS:
            rows.append((caption, [enlarge(image), *overlays.values()]))
        entries.append(
            {
                "file": name,
                "predicted": classes[best],
                "explained": classes[chosen],
                "probability": round(float(row[chosen]), 6),
                "completeness_error": float(explanations.completeness_errors[number]),
            }
        )
    sheet = contact_sheet(rows)
    _write(out / "contact_sheet.png", partial(sheet.savefig, format="png", dpi=110))
    first = slice(min(len(images), _CHECKED))
    explanations = Explanations(*(array[first] for array in explanations))
    check = explainer.check(images[first], labels[first], explanations)
    errors = [entry["completeness_error"] for entry in entries]
    content = {"layer": layer, "pictures": entries, "sanity_check": check}
    workdir.write_json(out / "explanations.json", content)
    print(_check_table(check))
    print(
        "integrated gradients add up to the logit's change to within "
        f"{np.median(errors):.1%} (median), {max(errors):.1%} (worst)"
    )
    print(f"written   {bucket.display_path(out)}/")
    predict.require_all_read(len(pictures), len(names))


def _shortened(name: str) -> str:
    """A file's name, cut off where a caption would be too long."""
    name = as_text(Path(name).name)
    return name if len(name) <= _NAME_LENGTH else f"{name[:_NAME_LENGTH]}…"


def _check_table(check: list[dict]) -> str:
    """The sanity check in words and numbers."""
    lines = ["sanity check: rank correlation with the maps of random weights"]
    lines += [f"  {'randomised':<16} Grad-CAM  integrated gradients"]
    lines += [
        f"  {row['randomized']:<16} {row['grad_cam']:>8.2f}  "
        f"{row['integrated_gradients']:>20.2f}"
        for row in check
    ]
    left = max(abs(check[-1][kind]) for kind in ("grad_cam", "integrated_gradients"))
    lines += [
        f"  at most {left:.2f} remains with all weights random: near 0, the maps "
        "depend on what was learned; near 1, they do not"
    ]
    return "\n".join(lines)


def main(argv: list[str], build: Build = build_network) -> None:
    """Explains what a network sees in pictures. `build` as for `trained.load`."""

    def define(values: flags.FlagValues) -> None:
        trained.define_flags(values)
        string = partial(flags.DEFINE_string, flag_values=values)
        enum = partial(flags.DEFINE_enum, flag_values=values)
        string("out", None, "Directory to write to. (default: WORKDIR/explanations)")
        string("class", None, "Class to explain. (default: the likeliest)")
        enum(
            "layer",
            "features",
            list(attribution.LAYERS),
            "Layer whose maps Grad-CAM shows: the pooled features or a stage's output.",
        )

    values, arguments = command_line.parse_with_arguments(argv, __doc__, define)
    names = predict.find_pictures(arguments)
    run = trained.load(values.workdir, values.checkpoint, build)
    out = Path(values.out or run.directory / "explanations")
    explain(run, names, out, values["class"].value, values.layer)


if __name__ == "__main__":
    command_line.run(main)
