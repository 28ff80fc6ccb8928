"""Several seeds of one config, one after another, each as if it were run alone.

One program for all seeds would be no faster: on a CPU, `vmap` turns a convolution with
several kernels into a grouped one, which is slower than one after another.
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from resnet_jax import UserError, bucket, divergence, hosts, results, workdir
from resnet_jax.divergence import DivergedError


def run_all(
    config: ConfigDict, parent: Path, run: Callable[[ConfigDict, Path], dict]
) -> dict:
    """Runs `config.seeds` seeds from `config.seed` on, in PARENT/seed<seed>.

    Finished ones are left as they are, and one that was stopped resumes. A seed that
    diverges does not keep the others from training.

    Args:
      config: the config that all share.
      parent: where the runs are, and `seeds.json`.
      run: trains one, given its config and directory, and returns its summary.

    Returns:
      The content of `seeds.json`: 'seeds', their 'test_accuracy' (None: diverged) and
      'length_changes' (see `results.length_changes`), and the result of
      `accuracy_interval` for those accuracies.

    Raises:
      UserError: a directory is not what it should be, or `run` raised it.
      DivergedError: seeds diverged; the results of the others are written.
    """
    configs = {}
    for seed in range(config.seed, config.seed + config.seeds):
        one = configs[seed] = config.copy_and_resolve_references()
        one.update(seed=seed, seeds=1)
    hosts.run_on_first(lambda: _check(parent, configs))
    accuracies, lengths = {}, {}
    for number, (seed, one) in enumerate(configs.items(), start=1):
        hosts.print_once(f"seed      {seed}, {number} of {len(configs)}")
        try:
            summary = run(one, _directory(parent, seed))
            accuracies[seed] = summary["test_accuracy"]
            lengths[seed] = results.length_changes(summary)
        except DivergedError as error:
            hosts.print_once(f"seed {seed}: {error}")
            accuracies[seed] = None
    finished = [each for each in accuracies.values() if each is not None]
    diverged = [seed for seed, each in accuracies.items() if each is None]
    result = {
        "seeds": list(accuracies),
        "test_accuracy": list(accuracies.values()),
        "length_changes": [lengths.get(seed, "") for seed in accuracies],
        **accuracy_interval(finished),
    }
    hosts.run_on_first(lambda: workdir.write_json(parent / "seeds.json", result))
    hosts.print_once(_table(result))
    if len(set(lengths.values())) > 1:
        for seed, told in lengths.items():
            if told:
                hosts.print_once(
                    f"warning   seed {seed} began with another length ({told}), so "
                    "these are not samples of one training"
                )
    hosts.print_once(f"written   {bucket.display_path(parent / 'seeds.json')}")
    if diverged:
        raise DivergedError(
            f"of {len(configs)} seeds, {', '.join(map(str, diverged))} diverged: "
            f"{divergence.REMEDY}"
        )
    return result


def _directory(parent: Path, seed: int) -> Path:
    return parent / f"seed{seed}"


def _check(parent: Path, configs: dict[int, ConfigDict]) -> None:
    """Refuses, before the first seed trains, anything that would end a later one."""
    if workdir.is_run(parent):
        raise UserError(
            f"--workdir={parent} holds a run of one seed: give another --workdir, or "
            "--config.seeds=1"
        )
    new = not all(workdir.is_run(_directory(parent, seed)) for seed in configs)
    for seed, config in configs.items():
        directory = _directory(parent, seed)
        changed = workdir.check(directory, config)
        for change in results.of_length(changed) if new else ():
            print(
                f"warning   {bucket.display_path(directory)} began with another length "
                f"({change}), so it differs from a run of its seed alone: give another "
                "--workdir for that"
            )


def mean_and_interval(values: list[float]) -> dict:
    """Mean, standard deviation and 95% interval of the mean (Student's t) over seeds.

    For one value there is only a mean, and for none not even that: None instead.
    """
    mean = float(np.mean(values)) if values else None
    deviation = interval = None
    if len(values) > 1:
        from scipy.special import stdtrit  # importing takes a fifth of a second

        deviation = float(np.std(values, ddof=1))
        half = deviation / math.sqrt(len(values)) * stdtrit(len(values) - 1, 0.975)
        interval = [mean - float(half), mean + float(half)]
    return {"mean": mean, "standard_deviation": deviation, "interval": interval}


def accuracy_interval(accuracies: list[float]) -> dict:
    """`mean_and_interval` of fractions; the interval is clipped to [0, 1]."""
    result = mean_and_interval(accuracies)
    if result["interval"]:
        result["interval"] = np.clip(result["interval"], 0, 1).tolist()
    return result


def _table(result: dict) -> str:
    lines = [
        f"seed {seed:<4} " + ("diverged" if accuracy is None else f"{accuracy:.2%}")
        for seed, accuracy in zip(result["seeds"], result["test_accuracy"], strict=True)
    ]
    if result["interval"]:
        low, high = result["interval"]
        lines.append(
            f"mean      {result['mean']:.2%}, standard deviation "
            f"{result['standard_deviation']:.2%}, 95% interval {low:.2%} to {high:.2%}"
        )
    return "\n".join(lines)
