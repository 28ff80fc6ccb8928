"""Images per second from a folder of pictures: streamed, by PyTorch, and in training.

    python -m experiments.streaming_benchmark --path=DIR --out=results.json

DIR has train/CLASS/* and test/CLASS/*. Each contender runs in a process of its own,
alone on the machine, in alternating rounds, of which the median counts: 'ours', the
batches of `resnet_jax.feed` placed on the devices; 'torch' and 'torch_workers',
PyTorch's DataLoader in its own process and with a worker for each core, on the same
files, decoded, resized, cropped and stacked by Pillow and NumPy; 'step' and 'streamed',
training from memory and by streaming. Images per second of CPU time are also given: on
a busy machine, compare these.
"""

import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from absl import flags

from configs import image_folder
from experiments import study
from experiments.peers import report, require
from resnet_jax import UserError, command_line, data, parallel, workdir
from resnet_jax.feed import train_feed
from resnet_jax.trainer import Trainer

BATCH_SIZE = 128
WARM_UP, STEPS = 10, 20


def _config(path: str, image_size: int, stream: str):
    config = image_folder.get_config()
    config.update(batch_size=BATCH_SIZE, steps=10**6, steps_per_call=10)
    config.dataset.update(path=path, image_size=image_size, stream=stream)
    config.dataset.eval_split = f"test[:{BATCH_SIZE}]"
    return config


def ours(path: str, image_size: int) -> Callable[[int], None]:
    """Returns a function that consumes the given number of batches."""
    parallel.split_cpu(BATCH_SIZE)
    config = _config(path, image_size, "always")
    trainer = Trainer(config, data.load(config.dataset))
    split = data.load(config.dataset).train
    feed = train_feed(split, trainer.plan, 0, trainer.parallel)
    done = 0

    def take(batches: int) -> None:
        nonlocal done
        for _, _, images, _ in feed.blocks(done, done + batches, end=10**6):
            images.block_until_ready()
        done += batches

    return take


def torch(path: str, image_size: int, workers: int = 0) -> Callable[[int], None]:
    """PyTorch's DataLoader on the same files, shuffled."""
    import torch
    from PIL import Image

    root = Path(path) / "train"
    classes = sorted(entry.name for entry in root.iterdir())
    files = [
        (file, label)
        for label, name in enumerate(classes)
        for file in sorted((root / name).iterdir())
    ]

    class Pictures(torch.utils.data.Dataset):
        def __len__(self):
            return len(files)

        def __getitem__(self, row):
            path, label = files[row]
            with Image.open(path) as image:
                image.draft("RGB", (image_size, image_size))
                image = image.convert("RGB")
            scale = image_size / min(image.size)
            size = [max(image_size, round(side * scale)) for side in image.size]
            if tuple(size) != image.size:
                image = image.resize(size, Image.Resampling.BILINEAR)
            left, top = ((side - image_size) // 2 for side in size)
            image = image.crop((left, top, left + image_size, top + image_size))
            return torch.from_numpy(np.array(image)).permute(2, 0, 1), label

    loader = torch.utils.data.DataLoader(
        Pictures(),
        BATCH_SIZE,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
        persistent_workers=workers > 0,
    )
    batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def take(count: int) -> None:
        for _ in range(count):
            next(batches)

    return take


def torch_workers(path: str, image_size: int) -> Callable[[int], None]:
    """The same with a worker process for each core."""
    return torch(path, image_size, workers=len(os.sched_getaffinity(0)))


def step(path: str, image_size: int, stream: str = "never") -> Callable[[int], None]:
    """Training v1-20 from memory, augmentation included."""
    parallel.split_cpu(BATCH_SIZE)
    config = _config(path, image_size, stream)
    trainer = Trainer(config, data.load(config.dataset))
    state = trainer.place(trainer.new_state())
    trainer.compile()
    done = 0

    def train(steps: int) -> None:
        nonlocal state, done
        for _ in range(steps // 10):
            state, _ = trainer.train(state, done, done + 10)
            done += 10

    return train


def streamed(path: str, image_size: int) -> Callable[[int], None]:
    """Training v1-20 by streaming."""
    return step(path, image_size, "always")


CONTENDERS = {
    contender.__name__: contender
    for contender in (ours, torch, torch_workers, step, streamed)
}


def time_one(name: str, path: str, image_size: int) -> dict[str, float]:
    """A contender's images per second of wall time, and of this process's CPU time."""
    take = CONTENDERS[name](path, image_size)
    take(WARM_UP)
    start, cpu = time.perf_counter(), os.times()
    take(STEPS)
    seconds, after = time.perf_counter() - start, os.times()
    used = after.user + after.system - cpu.user - cpu.system
    images = STEPS * BATCH_SIZE
    rates = {"images_per_second": images / seconds, "per_cpu_second": images / used}
    if name == "torch_workers":
        del rates["per_cpu_second"]  # most of the CPU time is its workers'
    return rates


def measure(path: str, image_size: int, rounds: int) -> dict[str, list[dict]]:
    """Times the contenders in turn; returns the rates of each round."""
    answers = {name: [] for name in CONTENDERS}
    for number in range(rounds):
        names = list(CONTENDERS)
        for name in names if number % 2 == 0 else reversed(names):
            command = [sys.executable, "-m", "experiments.streaming_benchmark"]
            command += [
                f"--only={name}",
                f"--path={path}",
                f"--image_size={image_size}",
            ]
            answer = study.run_process(command)
            answers[name].append(json.loads(answer.splitlines()[-1]))
            print(f"round {number + 1}: {name} {answers[name][-1]}", file=sys.stderr)
    return answers


def medians(answers: list[dict]) -> dict[str, float]:
    """The medians of a contender's rates over its rounds."""
    return {
        rate: round(statistics.median(answer[rate] for answer in answers), 1)
        for rate in answers[0]
    }


def main(argv: list[str]) -> None:
    """Prints a table, and writes the rates if asked."""

    def define(values: flags.FlagValues) -> None:
        for name, default, text in (
            ("path", None, "A folder of pictures."),
            ("out", None, "A JSON file to write the rates to."),
        ):
            flags.DEFINE_string(name, default, text, flag_values=values)
        flags.DEFINE_integer("image_size", 32, "Pixels per side.", flag_values=values)
        flags.DEFINE_integer(
            "rounds", 3, "Rounds per contender.", 1, flag_values=values
        )
        flags.DEFINE_enum(
            "only",
            None,
            list(CONTENDERS),
            "Time only this contender.",
            flag_values=values,
        )

    values = command_line.parse(argv, __doc__, define)
    if not values.path:
        raise UserError("--path is missing: give a folder of pictures")
    if values.only:
        print(json.dumps(time_one(values.only, values.path, values.image_size)))
        return
    require("torch")
    if values.out:
        workdir.make(Path(values.out).parent)
    rounds = measure(values.path, values.image_size, values.rounds)
    result = {name: medians(answers) for name, answers in rounds.items()}
    base = result["step"]
    print(f"{'':<15}{'images/s':>10}{'vs. step':>11}{'per CPU second':>16}")
    for name, rates in result.items():
        rate = rates["images_per_second"]
        ratio = rate / base["images_per_second"]
        per_cpu_second = rates.get("per_cpu_second")
        per_cpu_second = format(per_cpu_second, ",.0f") if per_cpu_second else "-"
        print(f"{name:<15}{rate:>10,.0f}{ratio:>11.2f}{per_cpu_second:>16}")
    if values.out:
        content = {"medians": result, "rounds": rounds, **report.conditions()}
        workdir.write_json(Path(values.out), content)


if __name__ == "__main__":
    command_line.run(main)
