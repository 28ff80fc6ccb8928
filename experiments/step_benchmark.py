"""Images a second of training: ours against a plain linen loop, in one sitting.

    python -m experiments.step_benchmark --networks=v1-20,v2-56 --batch_size=128
    python -m experiments.step_benchmark --networks=v2-1001 --batch_size=32 --peer=false

Each contender trains on random images in a process of its own, alone on the machine;
their rounds alternate, and the median counts. Compilation and a warm-up come before.
Ours is the loop that `resnet_jax.main` runs, augmentation included; 'input' is its
gather, normalisation and augmentation alone. `experiments/plain_linen.py` is the peer.
Compilation is that of training and evaluation; memory the whole process's peak.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from configs import common
from experiments import plain_linen
from resnet_jax import command_line, data, parallel
from resnet_jax.augment import augment, normalize
from resnet_jax.augment import statistics as image_statistics
from resnet_jax.trainer import Trainer


def _config(network: str, batch_size: int):
    version, depth = map(int, network.removeprefix("v").split("-"))
    deep = depth >= 1000
    config = common.get_config(
        "paper", version=version, depth=depth, scan=deep, remat=deep
    )
    config.update(batch_size=batch_size, steps=10**6)
    config.dataset.name = "fake"
    return config


def ours(network: str, batch_size: int) -> tuple[Callable, dict]:
    """Returns a function that trains some steps, and what preparing it took."""
    config = _config(network, batch_size)
    parallel.split_cpu(batch_size)
    trainer = Trainer(config, data.load(config.dataset))
    state = trainer.place(trainer.new_state())
    trainer.compile(state)
    step = 0

    def train(steps: int) -> None:
        nonlocal state, step
        state, _ = trainer.train(state, step, step + steps)
        step += steps

    return train, {"compile_seconds": trainer.compile_seconds}


def plain(network: str, batch_size: int) -> tuple[Callable, dict]:
    """The same for the plain loop."""
    config = _config(network, batch_size)
    dataset = data.load(config.dataset)
    images, labels = dataset.train
    mean, _ = image_statistics("pixel_mean", images)
    net = plain_linen.ResNet(config.model.version, config.model.depth)
    variables = jax.jit(net.init, static_argnames="train")(
        jax.random.key(0), jnp.zeros((1, *dataset.image_shape)), train=False
    )
    tx = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.1, momentum=0.9))
    train_step = plain_linen.make_train_step(net, tx)
    params, batch_stats = variables["params"], variables["batch_stats"]
    opt_state = tx.init(params)
    rng = np.random.default_rng(0)

    def train(steps: int) -> None:
        nonlocal params, batch_stats, opt_state
        for _ in range(steps):
            chosen = rng.integers(0, len(labels), batch_size)
            batch = images[chosen].astype(np.float32) / 255 - mean
            batch = plain_linen.augmented_batch(rng, batch)
            params, batch_stats, opt_state, loss = train_step(
                params, batch_stats, opt_state, batch, labels[chosen]
            )
        loss.block_until_ready()

    start = time.perf_counter()
    train(1)
    return train, {"compile_seconds": time.perf_counter() - start}


def input_only(network: str, batch_size: int) -> tuple[Callable, dict]:
    """The same for what comes before the network in ours."""
    config = _config(network, batch_size)
    images = jnp.asarray(data.load(config.dataset).train.images)
    mean, scale = image_statistics("pixel_mean", np.asarray(images))
    positions = jnp.arange(batch_size)

    @jax.jit
    def run(images, steps):
        def prepare(step, total):
            key = jax.random.fold_in(jax.random.key(0), step)
            chosen = jax.random.randint(key, (batch_size,), 0, len(images))
            batch = normalize(images[chosen], mean, scale)
            # The sum of squares reads every pixel, as the network would.
            return total + (augment(config.augment, batch, key, positions) ** 2).sum()

        return jax.lax.fori_loop(0, steps, prepare, jnp.float32(0))

    return lambda steps: run(images, steps).block_until_ready(), {}


CONTENDERS = {"ours": ours, "plain": plain, "input": input_only}


def time_one(contender: str, network: str, batch_size: int) -> dict:
    """Prepares a contender and times it, after a warm-up, for about ten seconds."""
    train, told = CONTENDERS[contender](network, batch_size)
    train(2)
    start = time.perf_counter()
    train(2)
    steps = max(2, round(2 * 5 / (time.perf_counter() - start)))
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        train(steps)
        seconds.append((time.perf_counter() - start) / steps)
    # Linux counts in kibibytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": min(seconds), "peak_bytes": peak, **told}


def measure(network: str, batch_size: int, rounds: int, peer: bool) -> dict[str, dict]:
    """Times the contenders in turn, each round in new processes; medians of rounds."""
    names = ["ours", "plain", "input"] if peer else ["ours", "input"]
    answers = {name: [] for name in names}
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            command = [sys.executable, "-m", "experiments.step_benchmark"]
            command += [f"--only={name}", f"--networks={network}"]
            command += [f"--batch_size={batch_size}"]
            answer = subprocess.run(command, stdout=subprocess.PIPE, check=True)
            answers[name].append(json.loads(answer.stdout))
    return {
        name: {
            what: statistics.median(answer[what] for answer in answers[name])
            for what in answers[name][0]
        }
        for name in names
    }


def main(argv: list[str]) -> None:
    """Prints a table of the networks asked for."""

    def define(values: flags.FlagValues) -> None:
        flags.DEFINE_list("networks", "v1-20,v2-56", "Networks.", flag_values=values)
        flags.DEFINE_integer("batch_size", 128, "Images a step.", flag_values=values)
        flags.DEFINE_integer("rounds", 5, "Timed rounds of each.", flag_values=values)
        flags.DEFINE_bool("peer", True, "Measure the plain loop.", flag_values=values)
        flags.DEFINE_enum(
            "only", None, list(CONTENDERS), "Time this one alone.", flag_values=values
        )

    values = command_line.parse(argv, __doc__, define)
    if values.only:
        print(json.dumps(time_one(values.only, values.networks[0], values.batch_size)))
        return
    print(f"{'':<10}{'images/s':>22}{'':>8}{'input':>9}{'compile':>9}{'memory':>9}")
    print(f"{'network':<10}{'ours':>11}{'plain':>11}{'ratio':>8}{'of step':>9}", end="")
    print(f"{'s':>9}{'GiB':>9}")
    for network in values.networks:
        result = measure(network, values.batch_size, values.rounds, values.peer)
        own, peer = result["ours"], result.get("plain")
        print(
            f"{network:<10}{values.batch_size / own['seconds']:>11.1f}"
            + (
                f"{values.batch_size / peer['seconds']:>11.1f}"
                if peer
                else f"{'-':>11}"
            )
            + (f"{peer['seconds'] / own['seconds']:>8.2f}" if peer else f"{'-':>8}")
            + f"{result['input']['seconds'] / own['seconds']:>9.2%}"
            + f"{own['compile_seconds']:>9.1f}{own['peak_bytes'] / 2**30:>9.2f}",
            flush=True,
        )


if __name__ == "__main__":
    command_line.run(main)
