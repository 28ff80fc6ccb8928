"""Our networks and updates against PyTorch's, in float64.

The tolerance leaves room for the order of sums alone: no difference in padding, in an
epsilon or in the decay of one parameter would pass.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from configs import common
from resnet_jax import models, optimizers
from resnet_jax.step import Batch, TrainState, make_train_step

torch = pytest.importorskip("torch")

from tests import torch_networks as nets  # noqa: E402

# Its threads wait for each other, busily, where others use the cores too.
torch.set_num_threads(1)

BATCH, SIZE = 4, 16
MEAN, SCALE = 0.5, 0.25
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 1e-4
TOLERANCE = 1e-9
# Values are under test, not speed: compile without optimisation.
QUICK = {"xla_backend_optimization_level": 0}


def imagenet(version: int, depth: int):
    return models.resnet(
        version, depth, 10, stem="imagenet", width=8, scan=True, dtype=jnp.float64
    )


NETWORKS = {
    "v1-20-A": (
        lambda: models.resnet(1, 20, 10, dtype=jnp.float64),
        lambda: nets.ResNet(nets.BasicBlock, 3, "A"),
    ),
    "v1-20-B": (
        lambda: models.resnet(1, 20, 10, shortcut="B", dtype=jnp.float64),
        lambda: nets.ResNet(nets.BasicBlock, 3, "B"),
    ),
    "v1-14-plain": (
        lambda: models.resnet(1, 14, 10, residual=False, dtype=jnp.float64),
        lambda: nets.ResNet(nets.BasicBlock, 2, None),
    ),
    "v1-14-pre-A": (
        lambda: models.resnet(
            1, 14, 10, activation="pre", shortcut="A", dtype=jnp.float64
        ),
        lambda: nets.ResNet(nets.PreActBlock, 2, "A"),
    ),
    "v1-14-pre-B": (
        lambda: models.resnet(
            1, 14, 10, activation="pre", shortcut="B", dtype=jnp.float64
        ),
        lambda: nets.ResNet(nets.PreActBlock, 2, "B"),
    ),
    "v2-20-post-B": (
        lambda: models.resnet(2, 20, 10, activation="post", dtype=jnp.float64),
        lambda: nets.ResNet(nets.Bottleneck, 2, "B"),
    ),
    "v2-20": (
        lambda: models.resnet(2, 20, 10, dtype=jnp.float64),
        lambda: nets.ResNet(nets.PreActBottleneck, 2, "B"),
    ),
    "v2-20-plain": (
        lambda: models.resnet(2, 20, 10, residual=False, dtype=jnp.float64),
        lambda: nets.ResNet(nets.PreActBottleneck, 2, None),
    ),
    "v2-164": (
        lambda: models.resnet(2, 164, 10, scan=True, dtype=jnp.float64),
        lambda: nets.ResNet(nets.PreActBottleneck, 18, "B"),
    ),
    "v1-18-imagenet": (
        lambda: imagenet(1, 18),
        lambda: nets.ImageNetResNet(nets.BasicBlock, (2, 2, 2, 2), 8),
    ),
    "v1-50-imagenet": (
        lambda: imagenet(1, 50),
        lambda: nets.ImageNetResNet(nets.StridedIn3x3, (3, 4, 6, 3), 8),
    ),
    "v2-34-imagenet": (
        lambda: imagenet(2, 34),
        lambda: nets.ImageNetResNet(nets.PreActBlock, (3, 4, 6, 3), 8),
    ),
    "v2-50-imagenet": (
        lambda: imagenet(2, 50),
        lambda: nets.ImageNetResNet(nets.PreActStridedIn3x3, (3, 4, 6, 3), 8),
    ),
    "v1-20-keras": (
        lambda: models.resnet(1, 20, 10, variant="keras", dtype=jnp.float64),
        lambda: nets.KerasResNet(1, 3),
    ),
    "v2-20-keras": (
        lambda: models.resnet(2, 20, 10, variant="keras", dtype=jnp.float64),
        lambda: nets.KerasResNet(2, 2),
    ),
}
pytestmark = pytest.mark.usefixtures("float64")
NAMES = [
    pytest.param(name, marks=pytest.mark.slow)
    if name == "v2-164" or name.endswith("-imagenet")
    else name
    for name in NETWORKS
]


def pair(name: str) -> tuple:
    """Our network, its variables (float64, unrolled), and PyTorch's with the same.

    Every value is drawn, so that none is at rest at an initial 0 or 1.
    """
    ours, theirs = (build() for build in NETWORKS[name])
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path[-1].key in ("scale", "var"):
            return rng.uniform(0.5, 1.5, leaf.shape)
        deviation = (2 / np.prod(leaf.shape[:-1])) ** 0.5 if leaf.ndim > 1 else 0.1
        return rng.normal(0, deviation, leaf.shape)

    shapes = models.zeros(ours.clone(scan=False), (SIZE, SIZE, 3))
    variables = jax.tree_util.tree_map_with_path(draw, shapes)
    theirs = theirs.double()
    nets.load_ours(theirs, traverse_util.flatten_dict(variables))
    return ours, variables, theirs


def as_ours_holds_them(net, variables: dict) -> dict:
    return models.stack(variables) if net.scan else variables


def draw_images(rng) -> np.ndarray:
    """Only 0 and 255, so that normalising them rounds nothing in float32."""
    return (255 * rng.integers(0, 2, (BATCH, SIZE, SIZE, 3))).astype(np.uint8)


def for_torch(images: np.ndarray):
    return torch.tensor((images / 255 - MEAN) / SCALE).permute(0, 3, 1, 2)


def assert_close(actual, expected, what=""):
    atol = TOLERANCE * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol, err_msg=what)


def assert_same_values(variables: dict, theirs) -> None:
    actual = traverse_util.flatten_dict(variables)
    expected = nets.our_values(theirs)
    assert actual.keys() == expected.keys()
    for path, value in expected.items():
        assert_close(actual[path], value, "/".join(path))


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_pytorchs(name):
    ours, variables, theirs = pair(name)
    images = draw_images(np.random.default_rng(1))

    def logits(variables, images):
        trained, _ = ours.apply(variables, images, train=True, mutable=["batch_stats"])
        return ours.apply(variables, images, train=False), trained

    evaluated, trained = jax.jit(logits, compiler_options=QUICK)(
        as_ours_holds_them(ours, variables), (images / 255 - MEAN) / SCALE
    )
    assert evaluated.dtype == trained.dtype == jnp.float64
    with torch.no_grad():
        theirs.eval()
        assert_close(evaluated, theirs(for_torch(images)).numpy())
        theirs.train()
        assert_close(trained, theirs(for_torch(images)).numpy())


def torch_update(net, optimizer, images, labels) -> float:
    """One update; running variances get the biased estimate, as in Flax."""
    old, counts, hooks = {}, {}, []

    def count(module, inputs, _):
        counts[module] = inputs[0].numel() / inputs[0].shape[1]

    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            old[module] = module.running_var.clone()
            hooks.append(module.register_forward_hook(count))
    net.train()
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(net(for_torch(images)), labels)
    loss.backward()
    optimizer.step()
    for hook in hooks:
        hook.remove()
    for module, n in counts.items():
        kept = (1 - module.momentum) * old[module]
        module.running_var.copy_(kept + (module.running_var - kept) * (n - 1) / n)
    return loss.item()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "nesterov"),
    [
        ("v1-20-A", False),
        pytest.param("v1-20-B", True, marks=pytest.mark.slow),
        ("v2-20", True),
        pytest.param("v2-164", False, marks=pytest.mark.slow),
    ],
)
def test_sgd_updates_are_pytorchs(name, nesterov):
    """Two updates, since the first does not show the momentum."""
    ours, variables, theirs = pair(name)
    config = common.default()
    config.augment.update(crop=0.0, flip=False)
    config.optimizer.update(
        momentum=MOMENTUM, nesterov=nesterov, weight_decay=WEIGHT_DECAY
    )
    tx = optimizers.optimizer(config.optimizer, optax.constant_schedule(LEARNING_RATE))
    train_step = jax.jit(
        make_train_step(ours, tx, config, (np.full(3, MEAN), np.full(3, SCALE))),
        compiler_options=QUICK,
    )
    held = as_ours_holds_them(ours, variables)
    state = TrainState(
        np.int32(0), held["params"], held["batch_stats"], tx.init(held["params"])
    )
    optimizer = torch.optim.SGD(
        theirs.parameters(),
        lr=LEARNING_RATE,
        momentum=MOMENTUM,
        nesterov=nesterov,
        weight_decay=WEIGHT_DECAY,
    )
    rng = np.random.default_rng(1)
    for update in range(2):
        images = draw_images(rng)
        labels = rng.integers(0, 10, BATCH)
        batch = Batch(
            jnp.asarray(images),
            jnp.asarray(labels, jnp.int32),
            jnp.arange(BATCH, dtype=jnp.int32),
        )
        state, metrics = train_step(state, batch, jax.random.key(update))
        loss = torch_update(theirs, optimizer, images, torch.tensor(labels))
        assert_close(metrics["loss"], loss)
        assert_same_values(models.unstack(state.variables), theirs)
    assert state.step == 2
