import importlib
import math
import re
from pathlib import Path

import pytest

from configs import common
from resnet_jax import UserError, cost, data, models
from resnet_jax.config import build_network, get, validate

ROOT = Path(__file__).parents[1]
NAMES = sorted(
    path.stem
    for path in (ROOT / "configs").glob("*.py")
    if path.stem not in ("__init__", "common")
)
RECIPES = ("paper", "keras", "smoke", "strong", "fast")
# CIFAR-10 test accuracy in percent, last or best epoch as the sources give it.
PUBLISHED = {
    "v1_20": {"paper": 91.25, "keras": 92.16},
    "v1_32": {"paper": 92.49, "keras": 92.46},
    "v1_44": {"paper": 92.83, "keras": 92.50},
    "v1_56": {"paper": 93.03, "keras": 92.71},
    "v1_110": {"paper": 93.39, "keras": 92.65},
    "v1_1202": {"paper": 92.07},
    "v2_20": {},
    "v2_29": {},
    "v2_56": {"keras": 93.01},
    "v2_110": {"keras": 93.15},
    "v2_164": {"paper": 94.54},
    "v2_1001": {"paper": 95.08},
}


@pytest.fixture(autouse=True)
def _no_prepared_data(tmp_path, monkeypatch):
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def module(name):
    return importlib.import_module(f"configs.{name}")


def complete(config, tmp_path):
    """The config, with a folder of pictures where it needs one."""
    if config.dataset.name == "image_folder":
        config.dataset.path = str(tmp_path)
    return config


def cifar_config(recipe="paper", version=1, depth=20, **changes):
    config = common.get_config(recipe, version, depth)
    config.update_from_flattened_dict(changes)
    return config


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", NAMES)
def test_every_config_is_valid_under_every_recipe(name, recipe, tmp_path):
    config = complete(module(name).get_config(recipe), tmp_path)
    validate(config)
    assert not config.dataset.data_dir


@pytest.mark.parametrize("name", NAMES)
def test_docstring_gives_the_command_and_the_exact_number_of_parameters(name):
    doc, config = module(name).__doc__, module(name).get_config()
    command = f"python -m resnet_jax.main --config=configs/{name}.py"
    command += " --config.dataset.path=DIR" if name == "image_folder" else ""
    assert f"\n    {command}\n" in doc
    assert f"version {config.model.version}, depth {config.model.depth}" in doc.lower()

    config.model.scan = True  # traces equal blocks once
    digits = config.dataset.name == "digits"
    shapes = models.zeros(
        build_network(config, 10), (8, 8, 1) if digits else (32, 32, 3)
    )
    count = cost.count_parameters(shapes["params"])
    assert re.findall(r"([\d,]+) parameters", doc) == [f"{count:,}"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_docstring_quotes_the_published_accuracies(name):
    found = re.findall(r"^    (\w+): ([\d.]+)% \(.+\)$", module(name).__doc__, re.M)
    assert {recipe: float(value) for recipe, value in found} == PUBLISHED[name]


def test_every_network_has_its_published_accuracies_here():
    assert set(NAMES) == {*PUBLISHED, "digits", "image_folder"}


def test_imagenet_recipe_is_resnet_18_at_224_pixels(tmp_path):
    config = complete(module("image_folder").get_config("imagenet"), tmp_path)
    validate(config)
    net = build_network(config, 10)
    shapes = models.zeros(net, (224, 224, 3))
    count = cost.count_parameters(shapes["params"])
    assert config.dataset.image_size == 224
    assert count == 11_689_512 - 990 * 513
    assert f"{count:,}" in module("image_folder").__doc__
    with pytest.raises(UserError, match="did you mean 'imagenet'"):
        module("image_folder").get_config("imagnet")
    with pytest.raises(
        UserError, match=r"choose one of paper, keras, strong, fast, smoke$"
    ):
        module("v1_20").get_config("imagenet")


def test_names_say_version_and_depth():
    for name in PUBLISHED:
        model = module(name).get_config().model
        assert name == f"v{model.version}_{model.depth}"


def test_very_deep_networks_run_their_blocks_in_a_loop():
    scanned = {name for name in NAMES if module(name).get_config().model.scan}
    assert scanned == {"v1_1202", "v2_1001"}


PAPER = {
    "epochs": 164,
    "batch_size": 128,
    "label_smoothing": 0,
    "model.variant": "paper",
    "model.stem": "cifar",
    "model.width": 0,
    "dataset.name": "cifar10",
    "augment.normalization": "pixel_mean",
    "augment.crop": 4 / 32,
    "augment.shift": 0,
    "augment.flip": True,
    "optimizer.name": "sgd",
    "optimizer.learning_rate": 0.1,
    "optimizer.linear_rate_batch": 0,
    "optimizer.momentum": 0.9,
    "optimizer.nesterov": False,
    "optimizer.weight_decay": 1e-4,
    "optimizer.decay": "coupled",
    "optimizer.decay_on": "all",
    "optimizer.clip_norm": 0,
    "schedule.name": "step",
    "schedule.boundaries": (32 / 64, 48 / 64),
    "schedule.factors": (0.1, 0.01),
    "schedule.warmup_epochs": 0,
}
KERAS = PAPER | {
    "epochs": 200,
    "batch_size": 32,
    "model.variant": "keras",
    "augment.crop": 0,
    "augment.shift": 0.1,
    "optimizer.name": "adam",
    "optimizer.learning_rate": 1e-3,
    "optimizer.epsilon": 1e-7,
    "optimizer.weight_decay": 2e-4,
    "optimizer.decay_on": "convolutions",
    "schedule.boundaries": (0.405, 0.605, 0.805, 0.905),
    "schedule.factors": (1e-1, 1e-2, 1e-3, 0.5e-3),
}
DIGITS = PAPER | {
    "epochs": 20,
    "batch_size": 64,
    "dataset.name": "digits",
    "augment.normalization": "mean_std",
    "augment.flip": False,
    "optimizer.nesterov": True,
    "schedule.name": "cosine",
    "schedule.warmup_epochs": 1,
}


STRONG = PAPER | {
    "epochs": 200,
    "augment.normalization": "mean_std",
    "augment.alternating_flip": True,
    "augment.mixup": 0.2,
    "augment.plain_epochs": 15,
    "optimizer.nesterov": True,
    "optimizer.weight_decay": 5e-4,
    "optimizer.ema": 0.999,
    "schedule.name": "cosine",
    "schedule.warmup_epochs": 5,
}
FAST = PAPER | {
    "epochs": 16,
    "label_smoothing": 0.1,
    "test_time_flip": True,
    "augment.normalization": "mean_std",
    "augment.alternating_flip": True,
    "augment.sizes": (16, 24),
    "augment.size_ends": (0.35, 0.7),
    "optimizer.learning_rate": 0.4,
    "optimizer.nesterov": True,
    "optimizer.weight_decay": 5e-4,
    "schedule.name": "onecycle",
}


@pytest.mark.parametrize(
    ("recipe", "expected"),
    list(zip(RECIPES, (PAPER, KERAS, DIGITS, STRONG, FAST), strict=True)),
)
def test_recipe_has_the_values_of_its_source(recipe, expected):
    config = cifar_config(recipe)
    assert {field: get(config, field) for field in expected} == expected


def test_digits_config_is_the_smoke_recipe_of_v2_56():
    config = module("digits").get_config()
    assert config == common.get_config("smoke", version=2, depth=56)


@pytest.mark.parametrize(
    ("version", "depth", "updates"),
    [(1, 56, 0), (1, 110, 400), (2, 110, 400), (2, 1001, 400)],
)
def test_paper_warms_up_for_400_updates_from_depth_110(version, depth, updates):
    config = cifar_config("paper", version, depth)
    schedule = config.schedule
    assert schedule.warmup_epochs * 50_000 / config.batch_size == updates
    if updates:
        assert (schedule.warmup, schedule.warmup_factor) == ("constant", 0.1)


def test_a_recipe_changes_no_field_that_common_does_not_have():
    fields = set(common.default().to_dict())
    for recipe in RECIPES:
        config = cifar_config(recipe)
        assert set(config.to_dict()) == fields
        for name in fields:
            if hasattr(config[name], "to_dict"):
                assert set(config[name]) == set(common.default()[name])


@pytest.mark.parametrize("name", NAMES)
def test_unknown_recipe_is_an_error_with_the_nearest(name):
    with pytest.raises(UserError, match=r"'kears'.*did you mean 'keras'\?") as raised:
        module(name).get_config("kears")
    assert all(recipe in str(raised.value) for recipe in RECIPES)


def test_recipe_like_no_other_is_an_error_without_a_guess():
    with pytest.raises(UserError, match="'xyz'") as raised:
        cifar_config("xyz")
    assert "did you mean" not in str(raised.value)


def refusal(config) -> str:
    with pytest.raises(UserError) as raised:  # noqa: PT012
        validate(config)
        data.check(config.dataset)
    message = str(raised.value)
    assert "\n" not in message
    assert raised.value.exit_status == 2
    return message


BAD = [
    ("seed", -1),
    ("seed", 2**32),
    ("seeds", 0),
    ("epochs", 0),
    ("epochs", -3),
    ("epochs", 10**7),
    ("steps", -1),
    ("steps", 10**10),
    ("batch_size", 0),
    ("batch_size", -128),
    ("steps_per_call", -1),
    ("eval_every", 0),
    ("label_smoothing", -0.1),
    ("label_smoothing", 1.0),
    ("label_smoothing", math.nan),
    ("parallel", ""),
    ("parallel", "pjit"),
    ("model.version", 0),
    ("model.version", 3),
    ("model.depth", 0),
    ("model.depth", -20),
    ("model.depth", 2),
    ("model.depth", 21),
    ("model.variant", "torch"),
    ("model.variant", ""),
    ("model.block", "bottle"),
    ("model.activation", "none"),
    ("model.shortcut", "C"),
    ("model.shortcut", "a"),
    ("model.stem", "stl10"),
    ("model.width", -16),
    ("optimizer.linear_rate_batch", -128),
    ("model.dtype", "float16"),
    ("model.dtype", "int32"),
    ("model.stochastic_depth", 1.0),
    ("model.stochastic_depth", math.nan),
    ("dataset.name", "cifar11"),
    ("dataset.name", ""),
    ("dataset.data_dir", "not/there"),
    ("dataset.mirror", "ftp.example.org"),
    ("dataset.image_size", -8),
    ("dataset.path", "not/there"),
    ("dataset.split_seed", -1),
    ("dataset.stream", "yes"),
    ("dataset.train_split", ""),
    ("dataset.train_split", "train[:"),
    ("dataset.validation_split", "train[a:b]"),
    ("dataset.eval_split", "test[0.5:]"),
    ("augment.normalization", "mean-std"),
    ("augment.mean", (0.5, 0.5, 255.0)),
    ("augment.mean", ("a",)),
    ("augment.mean", (0.5,)),
    ("augment.std", (0.2, 0.2, 0.0)),
    ("augment.std", (math.nan,)),
    ("augment.crop", -0.125),
    ("augment.crop", 4.0),
    ("augment.crop", math.nan),
    ("augment.random_resized_crop", -0.1),
    ("augment.random_resized_crop", 1.1),
    ("augment.random_resized_crop", math.nan),
    ("augment.shift", -0.1),
    ("augment.shift", math.inf),
    ("augment.cutout", -0.1),
    ("augment.cutout", 1.5),
    ("augment.mixup", -1.0),
    ("augment.cutmix", math.nan),
    ("augment.plain_epochs", -1.0),
    ("augment.sizes", (4,)),
    ("augment.sizes", ("big",)),
    ("augment.size_ends", (0.5,)),
    ("optimizer.name", "sgdm"),
    ("optimizer.name", ""),
    ("optimizer.learning_rate", 0.0),
    ("optimizer.learning_rate", -0.1),
    ("optimizer.learning_rate", math.nan),
    ("optimizer.learning_rate", math.inf),
    ("optimizer.momentum", -0.9),
    ("optimizer.momentum", 1.5),
    ("optimizer.momentum", math.nan),
    ("optimizer.epsilon", 0.0),
    ("optimizer.epsilon", -1e-8),
    ("optimizer.epsilon", math.nan),
    ("optimizer.weight_decay", -1e-4),
    ("optimizer.weight_decay", math.inf),
    ("optimizer.decay", "l2"),
    ("optimizer.decay_on", "kernel"),
    ("optimizer.clip_norm", -1.0),
    ("optimizer.clip_norm", math.nan),
    ("optimizer.freeze", "(stem"),
    ("optimizer.backbone_factor", 0.0),
    ("optimizer.backbone_factor", math.inf),
    ("optimizer.bn_bias_factor", -1.0),
    ("optimizer.ema", 1.0),
    ("optimizer.ema", math.nan),
    ("optimizer.accumulate", 0),
    ("optimizer.accumulate", -2),
    ("optimizer.accumulate", 3),
    ("schedule.name", "cosin"),
    ("schedule.boundaries", (0.0, 0.5)),
    ("schedule.boundaries", (0.5, 1.0)),
    ("schedule.boundaries", (0.5, 32000.0)),
    ("schedule.boundaries", (0.75, 0.5)),
    ("schedule.boundaries", (0.5, 0.5)),
    ("schedule.boundaries", (math.nan, 0.5)),
    ("schedule.boundaries", ("a", "b")),
    ("schedule.factors", (0.1,)),
    ("schedule.factors", (0.1, 0.01, 0.001)),
    ("schedule.factors", (0.1, -0.01)),
    ("schedule.factors", (0.1, math.nan)),
    ("schedule.factors", (math.inf, 0.1)),
    ("schedule.factors", ("a", "b")),
    ("schedule.warmup", "cosine"),
    ("schedule.warmup_epochs", -1.0),
    ("schedule.warmup_epochs", math.nan),
    ("schedule.warmup_factor", -0.1),
    ("schedule.warmup_factor", 1.1),
    ("schedule.warmup_factor", math.nan),
    ("checkpoint.every", 0),
    ("checkpoint.every_minutes", -1.0),
    ("checkpoint.keep", 0),
    ("checkpoint.keep", -1),
]


@pytest.mark.parametrize(("field", "value"), BAD)
def test_bad_value_is_refused_with_field_and_value(field, value):
    config = cifar_config(**{field: value})
    if field == "augment.shift":
        config.augment.crop = 0.0
    message = refusal(config)
    assert f"{field}=" in message
    shown = message.split(f"{field}=", 1)[1]
    assert shown.startswith((repr(value), str(value)))
    assert len(shown) > len(repr(value)) + 10, "no fix is told"


def test_every_field_that_can_be_wrong_is_among_them():
    flags_and_free_text = {
        *("model.residual", "model.scan", "model.remat", "model.zero_init"),
        *("augment.flip", "augment.alternating_flip", "test_time_flip"),
        *("optimizer.nesterov", "init_from", "profile"),
    }
    fields = {
        name if not hasattr(value, "items") else f"{name}.{inner}"
        for name, value in common.default().items()
        for inner in (value if hasattr(value, "items") else [""])
    }
    assert fields - flags_and_free_text == {field for field, _ in BAD}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"augment.shift": 0.1}, ["config.augment.shift=0.1", "augment.crop"]),
        (
            {"augment.random_resized_crop": 0.08},
            ["config.augment.random_resized_crop=0.08", "augment.crop to 0"],
        ),
        ({"dataset.path": "."}, ["config.dataset.path=.", "name=image_folder"]),
        (
            {"dataset.name": "image_folder"},
            ["config.dataset.path=''", "give the folder"],
        ),
        (
            {"dataset.name": "image_folder", "dataset.path": __file__},
            ["config.dataset.path=/", "is a file"],
        ),
        ({"model.variant": "keras", "model.block": "basic"}, ["model.", "block"]),
        ({"model.variant": "keras", "model.shortcut": "A"}, ["model.", "shortcut"]),
        (
            {"schedule.name": "onecycle", "schedule.warmup_epochs": 5.0},
            ["config.schedule.warmup_epochs=5.0", "onecycle"],
        ),
        (
            {"batch_size": 100, "optimizer.accumulate": 8},
            ["config.optimizer.accumulate=8", "batch_size (100)"],
        ),
        (
            {"augment.mean": (0.5,), "augment.std": (0.2,)},
            ["config.augment.mean=(0.5,)", "augment.normalization to 'mean_std'"],
        ),
        ({"epochs": 0}, ["config.epochs=0", "init_from"]),
        (
            {"epochs": 0, "init_from": "runs/old", "optimizer.ema": 0.9},
            ["config.optimizer.ema=0.9", "set it to 0"],
        ),
    ],
)
def test_values_that_exclude_each_other_are_refused(changes, named):
    message = refusal(cifar_config(**changes))
    for text in named:
        assert text in message


@pytest.mark.parametrize(
    ("version", "depth", "block", "nearest"),
    [
        (1, 21, "", "20 and 26"),
        (1, 164, "bottleneck", None),
        (1, 57, "", "56 and 62"),
        (2, 57, "", "56 and 65"),
        (2, 57, "basic", "56 and 62"),
        (2, 1, "", "11 and 20"),
        (1, 3, "", "8 and 14"),
        (1, 18, "", "or choose stem 'imagenet' with basic blocks"),
        (2, 50, "", "or choose stem 'imagenet' with bottleneck blocks"),
        (2, 18, "", "or choose stem 'imagenet' with basic blocks"),
    ],
)
def test_depth_that_does_not_fit_is_refused_with_the_nearest(
    version, depth, block, nearest
):
    config = cifar_config("paper", version, depth, **{"model.block": block})
    if nearest is None:
        validate(config)
        return
    message = refusal(config)
    assert f"config.model.depth={depth}" in message
    assert nearest in message


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model.depth": 20}, ["config.model.depth=20", "18, 34, 50, 101, 152", "18"]),
        ({"model.depth": 1000}, ["config.model.depth=1000", "the nearest is 152"]),
        ({"model.depth": 1}, ["config.model.depth=1:", "the nearest is 18"]),
        (
            {"model.depth": 34, "model.block": "bottleneck"},
            ["config.model.depth=34", "has basic blocks, not bottleneck"],
        ),
        (
            {"model.depth": 18, "model.variant": "keras"},
            ["config.model.variant='keras'", "choose variant 'paper'"],
        ),
    ],
)
def test_what_does_not_fit_the_imagenet_stem_is_refused(changes, named):
    message = refusal(cifar_config(**changes, **{"model.stem": "imagenet"}))
    for text in named:
        assert text in message


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 2**32 - 1},
        {"steps": 1, "epochs": 1},
        {"batch_size": 1},
        {"parallel": "pmap"},
        {"label_smoothing": 0.1},
        {"model.dtype": "bfloat16"},
        {"model.residual": False},
        {"model.block": "bottleneck", "model.depth": 164},
        {"augment.crop": 0.0, "augment.shift": 0.0, "augment.flip": False},
        {"dataset.validation_split": "train[45000:]"},
        {"dataset.mirror": "https://example.org/data"},
        {"optimizer.momentum": 0.0, "optimizer.weight_decay": 0.0},
        {"optimizer.accumulate": 128},
        {"schedule.boundaries": (), "schedule.factors": ()},
        {"schedule.boundaries": (0.9,), "schedule.factors": (0.0,)},
        {"schedule.name": "onecycle"},
        {"epochs": 0, "init_from": "runs/old"},
        {"epochs": 0, "steps": 10},
        {
            "augment.normalization": "mean_std",
            "augment.mean": (0.485, 0.456, 0.406),
            "augment.std": [0.229, 0.224, 0.225],
        },
    ],
    ids=str,
)
def test_unusual_values_are_allowed(changes):
    validate(cifar_config(**changes))


def test_validate_changes_nothing_and_touches_no_file(tmp_path):
    config = cifar_config()
    before = config.copy_and_resolve_references()
    validate(config)
    assert config == before
    assert not list(tmp_path.iterdir())


def test_build_network_hands_every_field_on():
    config = cifar_config(
        **{
            "model.depth": 29,
            "model.block": "bottleneck",
            "model.activation": "pre",
            "model.shortcut": "B",
            "model.width": 8,
            "model.dtype": "bfloat16",
            "model.scan": True,
            "model.remat": True,
            "model.zero_init": True,
            "model.stochastic_depth": 0.25,
        }
    )
    net = build_network(config, num_classes=7)
    assert (net.stem, net.zero_init, net.stochastic_depth) == ("cifar", True, 0.25)
    assert (net.block, net.activation, net.shortcut) == ("bottleneck", "pre", "B")
    assert (net.blocks_per_stage, net.width, net.num_classes) == ((3, 3, 3), 8, 7)
    assert (net.dtype, net.scan, net.remat, net.keras) == (
        "bfloat16",
        True,
        True,
        False,
    )
    config.model.residual = False
    assert build_network(config, num_classes=7).shortcut is None
    config = cifar_config(depth=50, **{"model.stem": "imagenet"})
    net = build_network(config, num_classes=7)
    assert (net.block, net.blocks_per_stage, net.width) == (
        "bottleneck",
        (3, 4, 6, 3),
        64,
    )
    assert net.stem == "imagenet"
    assert build_network(cifar_config("keras"), num_classes=7).keras
