"""Exports a trained network: a program that runs without this package, and weights.

python -m resnet_jax.export --workdir=runs/v2_56/seed0

Writes model.zip (StableHLO by jax.export: any number of uint8 images in, probabilities
out), model.safetensors and a model card, README.md.
"""

import io
import json
import zipfile
from functools import partial
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from absl import flags

from configs import common
from resnet_jax import (
    UserError,
    bucket,
    command_line,
    cost,
    models,
    trained,
    weights,
    workdir,
)
from resnet_jax.config import Build, build_network
from resnet_jax.trained import Trained

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
# On a probability, by `model.dtype`: what another summation order may do, no more.
TOLERANCES = {"float32": 1e-2, "bfloat16": 1e-1}


def program(run: Trained) -> jax.export.Exported:
    """The whole prediction as StableHLO, weights included.

    Maps images, uint8 [batch, height, width, channels] as in the data set, to
    probabilities, float32 [batch, classes], for any batch size.
    """

    def predict(images):
        return jax.nn.softmax(run.logits(run.variables, images))

    sizes = ", ".join(map(str, run.inputs.image_shape))
    shape = jax.export.symbolic_shape(f"batch, {sizes}")
    images = jax.ShapeDtypeStruct(shape, jnp.uint8)
    return jax.export.export(jax.jit(predict), platforms=PLATFORMS)(images)


def archive(run: Trained, exported: jax.export.Exported) -> bytes:
    """The file that `usage_snippet` reads: 'program', and 'model.json' about it."""
    described = {
        "class_names": run.inputs.class_names,
        "image_shape": run.inputs.image_shape,
        "dataset": run.inputs.dataset,
        "platforms": exported.platforms,
        "jax": jax.__version__,
    }
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as parts:
        for name, content in (
            ("program", bytes(exported.serialize())),
            ("model.json", json.dumps(described, indent=2)),
        ):
            parts.writestr(zipfile.ZipInfo(name), content)  # no date: same bytes
    return file.getvalue()


def usage_snippet(run: Trained, path: str) -> str:
    """Python code that runs an archive with only JAX and flatbuffers."""
    sizes = ", ".join(map(str, run.inputs.image_shape))
    return "\n".join(
        [
            "import json, zipfile, jax.export",
            f"file = zipfile.ZipFile({path!r})",
            'classes = json.loads(file.read("model.json"))["class_names"]',
            'program = jax.export.deserialize(bytearray(file.read("program")))',
            f"probabilities = program.call(images)  # uint8 [any number, {sizes}]",
        ]
    )


def max_difference(run: Trained, content: bytes) -> float:
    """The largest difference between an archive's and the network's probabilities."""
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        exported = jax.export.deserialize(bytearray(file.read("program")))
    draws = np.random.default_rng(0)
    largest = 0.0
    for batch in (1, 7):
        shape = (batch, *run.inputs.image_shape)
        images = draws.integers(0, 256, shape, dtype=np.uint8)
        logits = jax.jit(run.logits)(run.variables, jnp.asarray(images))
        apart = jnp.abs(exported.call(images) - jax.nn.softmax(logits)).max()
        largest = float(np.maximum(largest, apart))  # NaN stays
    return largest


def model_card(run: Trained) -> str:
    """The model card, in Markdown with the header that model hubs read."""
    config, inputs = run.config, run.inputs
    model = config.model
    name = f"v{model.version}-{model.depth}"
    total = cost.totals(cost.layers(run.net, inputs.image_shape))
    result = workdir.read_summary(run.directory)
    if result and result["steps"] == run.step:
        accuracy = (
            f"{result['test_accuracy']:.2%} of {result['test_examples']:,} images of "
            f"the split `{result['eval_split']}`"
        )
    else:
        accuracy = f"not measured at step {run.step:,}"
    shape = "x".join(map(str, inputs.image_shape))
    origin = f"the weights of `{config.init_from}`"
    trained_on = f"It was trained only on {inputs.dataset}."
    if config.init_from:
        trained_on = (
            f"It began with {origin}, and was then trained only on {inputs.dataset}."
        )
    if not run.step:
        trained_on = f"It has {origin}, without any further training."
    changed = workdir.differences(
        workdir.as_json(common.default()), workdir.as_json(config)
    )
    return f"""---
library_name: jax
pipeline_tag: image-classification
tags: [resnet, jax, flax, stablehlo]
---
# {name} {"trained" if run.step else "evaluated"} on {inputs.dataset}

A residual network of He et al. ([2015](https://arxiv.org/abs/1512.03385),
[2016](https://arxiv.org/abs/1603.05027)): {models.describe(run.net)}.

| | |
|---|---|
| data | {inputs.dataset} |
| test accuracy | {accuracy} |
| training | {run.step:,} updates of {config.batch_size} images, seed {config.seed} |
| parameters | {total["params"]:,} |
| multiply-accumulates per image | {total["macs"]:,} |
| images | {shape}, values 0 to 255; normalised inside `model.zip` |
| classes | {", ".join(inputs.class_names)} |

## Use

`model.zip` holds the whole prediction, for {", ".join(PLATFORMS)}. It needs
`pip install jax flatbuffers`, with JAX {jax.__version__} or newer:

```python
{usage_snippet(run, "model.zip")}
print(classes[probabilities[0].argmax()])
```

{_weights_section(run)}## Limits

{trained_on} Any other picture is still assigned
one of these classes, often with high probability.

## Config

Differences from the defaults:

```
{chr(10).join(changed)}
```
"""


def _weights_section(run: Trained) -> str:
    """What the card says about model.safetensors; '' if there is none."""
    if run.inputs.network:
        return ""
    for_torch, convert = "", ""
    if not run.net.keras and run.net.shortcut:  # else PyTorch has no such network
        for_torch = ", or for PyTorch"
        convert = (
            "\npython -m resnet_jax.convert --source=model.safetensors --out=model.pt"
        )
    return f"""`model.safetensors` has the weights, the architecture, and the mean and
scale of the images. To continue training from them on other classes with
`resnet_jax`{for_torch}:

```bash
python -m resnet_jax.main --config=... --config.init_from=model.safetensors{convert}
```

"""


def _is_card(path: Path) -> bool:
    return path.read_bytes().startswith(b"---\n")


def main(argv: list[str], build: Build = build_network) -> None:
    """Exports the network of a run. `build` as for `trained.load`."""

    def define(values: flags.FlagValues) -> None:
        trained.define_flags(values)
        string = partial(flags.DEFINE_string, flag_values=values)
        string("out", None, "Directory to write to. (default: WORKDIR/export)")

    values = command_line.parse(argv, __doc__, define)
    run = trained.load(values.workdir, values.checkpoint, build)
    out = Path(values.out or run.directory / "export")
    workdir.make(out)
    if (out / "README.md").exists() and not _is_card(out / "README.md"):
        raise UserError(
            f"--out={out} has a README.md that is not a model card and would be "
            "replaced by one: give another directory"
        )
    content = archive(run, program(run))
    apart = max_difference(run, content)
    outcome = f"probabilities of random images differ by at most {apart:.1e}"
    if not apart <= TOLERANCES[run.config.model.dtype]:
        raise weights.MismatchError(
            f"{outcome}: nothing was written; please report this"
        )
    print(f"compared  {outcome}")
    parts = {"model.zip": content, "README.md": model_card(run).encode()}
    if not run.inputs.network:  # the config in the file describes it
        parts["model.safetensors"] = weights.to_bytes(weights.from_run(run))
    for name, part in parts.items():
        workdir.write(out / name, part, "give another --out=DIR")
        print(f"written   {bucket.display_path(out / name)}: {len(part):,} bytes")
    print("\nTo run it, with only jax and flatbuffers installed:\n")
    lines = usage_snippet(run, bucket.display_path(out / "model.zip")).splitlines()
    print("\n".join(f"    {line}" for line in lines))


if __name__ == "__main__":
    command_line.run(main)
