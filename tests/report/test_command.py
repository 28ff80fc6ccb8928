import shlex

import pytest

from configs import common, digits, image_folder, v1_110, v2_56
from resnet_jax import command_line
from resnet_jax.config import flat
from resnet_jax.report.command import training_command


def changed(config, **fields):
    config.update_from_flattened_dict(fields)
    return config


@pytest.mark.parametrize(
    ("config", "command"),
    [
        (v2_56.get_config(), "--config=configs/v2_56.py"),
        (v2_56.get_config("keras"), "--config=configs/v2_56.py:keras"),
        (digits.get_config(), "--config=configs/digits.py"),
        (
            image_folder.get_config("imagenet"),
            "--config=configs/image_folder.py:imagenet",
        ),
        (changed(v1_110.get_config(), seed=3), "configs/v1_110.py --config.seed=3"),
        (
            changed(
                common.get_config("paper", version=1, depth=26),
                **{
                    "model.residual": False,
                    "model.block": "bottleneck",
                    "dataset.train_split": "train[:45000]",
                    "schedule.boundaries": (0.3, 0.6),
                    "optimizer.learning_rate": 3e-5,
                },
            ),
            "--config.model.residual=false",
        ),
    ],
)
def test_the_command_gives_the_config_back(config, command, monkeypatch):
    monkeypatch.setattr("resnet_jax.data.check", lambda _: None)
    found = training_command(config)
    assert command in found
    python, dash, module, *arguments = shlex.split(found)
    assert (python, dash, module) == ("python", "-m", "resnet_jax.main")
    argv = ["main", *arguments]
    values = command_line.parse(
        argv, "", lambda values: command_line.define_config(values, argv)
    )
    assert flat(values.config) == flat(config)


def test_little_is_changed():
    assert training_command(v2_56.get_config()).count("--") == 1
