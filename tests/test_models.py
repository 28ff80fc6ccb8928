import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from resnet_jax import cost, layers, models
from tests import quick
from tests.quick import declared_shapes, quick_jit

BOTH = {"scan": True, "remat": True}
CIFAR = (32, 32, 3)
TINY = (8, 8, 3)

V1 = {"version": 1}
V1_B = {"version": 1, "shortcut": "B"}
PRE_BASIC_B = {"version": 1, "activation": "pre", "shortcut": "B"}
PRE_BASIC_A = {"version": 1, "activation": "pre", "shortcut": "A"}
V2 = {"version": 2}
POST_BOTTLENECK = {"version": 2, "activation": "post", "shortcut": "B"}
KERAS_V1 = {"version": 1, "variant": "keras"}
KERAS_V2 = {"version": 2, "variant": "keras"}

# Trainable parameters for 10 classes by depth.
PARAMETERS = [
    (
        V1,
        {
            20: 269_722,
            32: 464_154,
            44: 658_586,
            56: 853_018,
            110: 1_727_962,
            1202: 19_421_274,
        },
    ),
    (
        V1_B,
        {
            20: 272_474,
            32: 466_906,
            44: 661_338,
            56: 855_770,
            110: 1_730_714,
            1202: 19_424_026,
        },
    ),
    (
        PRE_BASIC_B,
        {
            20: 272_282,
            56: 855_578,
            110: 1_730_522,
            164: 2_605_466,
            1202: 19_423_834,
        },
    ),
    (
        PRE_BASIC_A,
        {
            20: 269_722,
            56: 853_018,
            110: 1_727_962,
            164: 2_602_906,
            1202: 19_421_274,
        },
    ),
    (
        V2,
        {
            20: 219_482,
            29: 312_218,
            56: 590_426,
            110: 1_146_842,
            164: 1_703_258,
            1001: 10_327_706,
        },
    ),
    (POST_BOTTLENECK, {164: 1_704_154, 1001: 10_328_602}),
    (
        KERAS_V1,
        {
            20: 273_066,
            32: 467_946,
            44: 662_826,
            56: 857_706,
            110: 1_734_666,
            1202: 19_468_746,
        },
    ),
    (
        KERAS_V2,
        {
            20: 570_602,
            29: 843_786,
            56: 1_663_338,
            110: 3_302_442,
            164: 4_941_546,
            1001: 30_347_658,
        },
    ),
]
STATISTICS = [
    (V1, 20, 1_376),
    (V1_B, 20, 1_568),
    (V2, 56, 8_096),
    (V2, 164, 24_224),
    (KERAS_V1, 20, 1_376),
    (KERAS_V2, 56, 10_400),
]
# Millions of multiply-accumulates for an image of 32x32.
MACS = [
    (V1, 20, 40.55),
    (V1_B, 20, 40.81),
    (V1, 56, 125.49),
    (V1, 110, 252.89),
    (V2, 56, 84.07),
    (V2, 110, 164.28),
    (V2, 164, 244.50),
    (V2, 1001, 1487.85),
    (KERAS_V2, 56, 193.12),
]
KINDS = [V1, V1_B, PRE_BASIC_A, PRE_BASIC_B, V2, POST_BOTTLENECK, KERAS_V1, KERAS_V2]


def label(value) -> str | None:
    if isinstance(value, dict):
        return "-".join(str(part) for part in value.values()) or "default"
    return None


def build(kind: dict, depth: int, num_classes: int = 10, **changes) -> models.ResNet:
    kind = kind | changes
    return models.resnet(kind.pop("version"), depth, num_classes, **kind)


def shallowest(kind: dict) -> int:
    """The depth with one block a stage."""
    return 8 if build(kind, 20).block == "basic" else 11


def random_variables(net: models.ResNet, image_shape=TINY, dtype=np.float64) -> dict:
    return quick.random_variables(net, image_shape, dtype)


def random_images(batch: int, image_shape=TINY, dtype=np.float64) -> jax.Array:
    images = np.random.default_rng(1).normal(size=(batch, *image_shape))
    return jnp.asarray(images.astype(dtype))


def structure(tree):
    """Names, shapes and types: what must agree before values can."""
    return jax.tree.map(lambda leaf: (leaf.shape, np.dtype(leaf.dtype).name), tree)


def assert_equal(actual, expected):
    """The same structure, shapes, types and values."""
    assert structure(actual) == structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def assert_close(actual, expected, tolerance):
    """The same structure, and values within `tolerance` of the largest in each leaf."""
    assert structure(actual) == structure(expected)

    def check(actual, expected):
        atol = tolerance * max(np.abs(expected).max(), 1e-6)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)

    jax.tree.map(check, actual, expected)


# Counts


@pytest.mark.parametrize(
    ("kind", "depth", "count"),
    [(kind, *row) for kind, counts in PARAMETERS for row in counts.items()],
    ids=label,
)
def test_number_of_parameters_is_the_published_networks(kind, depth, count):
    params = declared_shapes(build(kind, depth, scan=True), CIFAR)["params"]
    assert cost.count_parameters(params) == count


@pytest.mark.parametrize(
    ("kind", "depth", "count"),
    [(kind, *max(counts.items())) for kind, counts in PARAMETERS],
    ids=label,
)
def test_summary_counts_the_parameters_of_the_deepest_networks(kind, depth, count):
    assert cost.totals(cost.layers(build(kind, depth), CIFAR))["params"] == count


# Version 1: torchvision's. Version 2: less the BatchNorms of stem and shortcuts,
# plus the last one, those of the blocks being over the blocks' inputs.
IMAGENET = [
    (1, 18, 11_689_512, 1_814.07),
    (1, 34, 21_797_672, 3_663.76),
    (1, 50, 25_557_032, 4_089.18),
    (1, 101, 44_549_160, 7_801.41),
    (1, 152, 60_192_808, 11_513.63),
    (2, 18, 11_687_720, 1_814.07),
    (2, 34, 21_795_880, 3_663.76),
    (2, 50, 25_549_352, 4_089.18),
    (2, 101, 44_541_480, 7_801.41),
    (2, 152, 60_185_128, 11_513.63),
]


@pytest.mark.parametrize(("version", "depth", "count", "millions"), IMAGENET)
def test_imagenet_networks_have_the_published_cost(version, depth, count, millions):
    net = models.resnet(version, depth, 1000, stem="imagenet", scan=True)
    image = (224, 224, 3)
    params = declared_shapes(net, image)["params"]
    assert cost.count_parameters(params) == count
    total = cost.totals(cost.layers(net, image))
    assert total["params"] == count
    assert round(total["macs"] / 1e6, 2) == millions


def test_imagenet_stem_shrinks_by_four_and_every_later_stage_by_two():
    net = models.resnet(1, 50, 10, stem="imagenet")
    shapes = {layer.name: layer.output_shape for layer in cost.layers(net, CIFAR)}
    assert shapes["stem_conv"] == (16, 16, 64)
    for stage, size in enumerate((8, 4, 2, 1), start=1):
        wide = 2 ** (stage - 1)
        assert shapes[f"stage{stage}_block1/conv3"] == (size, size, 256 * wide)
        # The stride is in the 3x3 convolution.
        before = size if stage == 1 else 2 * size
        assert shapes[f"stage{stage}_block1/conv1"] == (before, before, 64 * wide)
        assert shapes[f"stage{stage}_block1/conv2"] == (size, size, 64 * wide)


@pytest.mark.parametrize(("kind", "depth", "count"), STATISTICS, ids=label)
def test_number_of_batchnorm_statistics(kind, depth, count):
    for scan in (False, True):
        shapes = declared_shapes(build(kind, depth, scan=scan), CIFAR)
        assert cost.count_parameters(shapes["batch_stats"]) == count


@pytest.mark.parametrize(("kind", "depth", "millions"), MACS, ids=label)
def test_multiply_accumulates_of_an_image(kind, depth, millions):
    net = build(kind, depth)
    macs = cost.totals(cost.layers(net, CIFAR))["macs"]
    assert round(macs / 1e6, 2) == millions
    looped = cost.layers(net.clone(scan=True, remat=True), CIFAR)
    assert cost.totals(looped)["macs"] == macs


@pytest.mark.parametrize("kind", KINDS, ids=label)
def test_scan_and_remat_keep_the_variables_of_the_unrolled_network(kind):
    net = build(kind, 20)
    unrolled = declared_shapes(net, CIFAR)
    stacked = declared_shapes(net.clone(scan=True), CIFAR)
    assert stacked == jax.eval_shape(models.stack, unrolled)
    assert unrolled == jax.eval_shape(models.unstack, stacked)
    assert unrolled == declared_shapes(net.clone(remat=True), CIFAR)
    assert stacked == declared_shapes(net.clone(scan=True, remat=True), CIFAR)


@pytest.mark.parametrize("kind", [V1, KERAS_V2], ids=label)
def test_zeros_have_the_unrolled_networks_shapes_whatever_scan_is(kind):
    net = build(kind, 29 if kind is KERAS_V2 else 20)
    declared = declared_shapes(net, TINY)
    for loop in ({}, {"scan": True}, {"remat": True}, BOTH):
        zeros = models.zeros(net.clone(**loop), TINY)
        assert jax.eval_shape(lambda tree: tree, zeros) == declared


def test_classes_and_channels_change_only_the_ends():
    small = declared_shapes(build(V2, 20), CIFAR)["params"]
    large = declared_shapes(build(V2, 20, 100), (32, 32, 4))["params"]
    assert {name for name in small if small[name] != large[name]} == {
        "stem_conv",
        "classifier",
    }
    assert large["stem_conv"]["kernel"].shape == (3, 3, 4, 16)
    assert large["classifier"]["kernel"].shape == (256, 100)


def test_width_multiplies_every_channel():
    narrow = declared_shapes(build(V1, 20, width=16), CIFAR)["params"]
    wide = declared_shapes(build(V1, 20, width=160), CIFAR)["params"]
    for name in (name for name in narrow if name.startswith("stage")):
        for conv in ("conv1", "conv2"):
            shape = narrow[name][conv]["kernel"].shape
            assert wide[name][conv]["kernel"].shape == (
                *shape[:2],
                10 * shape[2],
                10 * shape[3],
            )


# Choices


@pytest.mark.parametrize(
    ("block", "depth", "nearest"),
    [
        ("basic", -1202, (8, 14)),
        ("basic", -4, (8, 14)),
        ("basic", 0, (8, 14)),
        ("basic", 2, (8, 14)),
        ("basic", 7, (8, 14)),
        ("basic", 9, (8, 14)),
        ("basic", 19, (14, 20)),
        ("basic", 21, (20, 26)),
        ("basic", 1001, (998, 1004)),
        ("bottleneck", -7, (11, 20)),
        ("bottleneck", 1, (11, 20)),
        ("bottleneck", 2, (11, 20)),
        ("bottleneck", 10, (11, 20)),
        ("bottleneck", 50, (47, 56)),
        ("bottleneck", 57, (56, 65)),
        ("bottleneck", 1202, (1199, 1208)),
    ],
)
def test_wrong_depth_names_the_rule_and_the_nearest_depths(block, depth, nearest):
    rule = {"basic": "6n+2", "bottleneck": "9n+2"}[block]
    with pytest.raises(ValueError, match=re.escape(rule)) as error:
        models.resnet(1, depth, 10, block=block)
    numbers = [int(number) for number in re.findall(r"-?\d+\b", str(error.value))]
    assert numbers[0] == depth
    assert tuple(numbers[-2:]) == nearest
    for fits in nearest:
        models.resnet(1, fits, 10, block=block)


@pytest.mark.parametrize("variant", ["paper", "keras"])
@pytest.mark.parametrize("version", [1, 2])
def test_depth_rule_follows_the_version(version, variant):
    rule = {1: r"6n\+2", 2: r"9n\+2"}[version]
    fits = {1: range(8, 120, 6), 2: range(11, 120, 9)}[version]
    for depth in range(120):
        if depth in fits:
            models.resnet(version, depth, 10, variant=variant)
        else:
            with pytest.raises(ValueError, match=rule):
                models.resnet(version, depth, 10, variant=variant)


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_depth_164_fits_both_blocks(block):
    n = {"basic": 27, "bottleneck": 18}[block]
    assert build(V1, 164, block=block).blocks_per_stage == (n, n, n)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("version", 3),
        ("version", 0),
        ("variant", "torch"),
        ("block", "wide"),
        ("activation", "relu"),
        ("shortcut", "C"),
        ("shortcut", "a"),
        ("width", -16),
    ],
)
def test_wrong_choice_is_named(field, value):
    with pytest.raises(ValueError, match=rf"{field} '?{value}") as error:
        build(V1, 20, **{field: value})
    if field != "width":
        choices = re.search("is not one of (.+)", str(error.value))
        assert choices
        assert len(choices[1].split(", ")) == 2


@pytest.mark.parametrize(
    "choice", [{"block": "basic"}, {"activation": "pre"}, {"shortcut": "B"}], ids=label
)
def test_keras_variant_cannot_be_changed(choice):
    with pytest.raises(ValueError, match=f"keras.*{next(iter(choice))}"):
        build(KERAS_V1, 20, **choice)


# Scan, remat and the two forms of the variables


def training_values(net: models.ResNet, variables: dict, images) -> dict:
    """Logits, the gradient of every parameter and the new statistics, unrolled."""

    def loss(params, batch_stats):
        logits, changed = net.apply(
            {"params": params, "batch_stats": batch_stats},
            images,
            train=True,
            mutable=["batch_stats"],
        )
        return jnp.sum(logits**2), (logits, changed["batch_stats"])

    if net.scan:
        variables = models.stack(variables)
    gradient = quick_jit(jax.grad(loss, has_aux=True))
    params, (logits, batch_stats) = gradient(
        variables["params"], variables["batch_stats"]
    )
    if net.scan:
        params, batch_stats = models.unstack((params, batch_stats))
    return {"logits": logits, "params": params, "batch_stats": batch_stats}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "depth", "loops"),
    [
        (V1, 20, [{"scan": True}, {"remat": True}, BOTH]),
        (KERAS_V1, 20, [BOTH]),
        (V2, 29, [{"scan": True}, BOTH]),
        (PRE_BASIC_B, 20, [BOTH]),
        (POST_BOTTLENECK, 20, [BOTH]),
        (KERAS_V2, 29, [BOTH]),
    ],
    ids=label,
)
def test_scan_and_remat_change_no_logit_gradient_or_statistic(
    float64, kind, depth, loops
):
    net = build(kind, depth, width=4, dtype=jnp.float64)
    variables, images = random_variables(net), random_images(2)
    expected = training_values(net, variables, images)
    for loop in loops:
        actual = training_values(net.clone(**loop), variables, images)
        assert_close(actual, expected, 1e-9)


def test_scan_changes_no_logit_in_evaluation(float64):
    net = build(V1, 14, width=4, dtype=jnp.float64)
    variables, images = random_variables(net), random_images(2)
    expected = quick_jit(net.apply)(variables, images)
    actual = quick_jit(net.clone(scan=True).apply)(models.stack(variables), images)
    assert_close(actual, expected, 1e-12)


@pytest.mark.parametrize("depth", [8, 14, 20, 68])
def test_stack_and_unstack_undo_each_other(depth):
    net = build(V1, depth, width=2)
    unrolled = random_variables(net, dtype=np.float32)
    stacked = models.stack(unrolled)
    assert structure(stacked) == structure(declared_shapes(net.clone(scan=True), TINY))
    assert_equal(models.unstack(stacked), unrolled)
    assert_equal(models.stack(models.unstack(stacked)), stacked)


def test_blocks_are_stacked_in_the_order_in_which_they_run():
    net = build(V1, 68, width=2)
    unrolled = random_variables(net, dtype=np.float32)["params"]
    kernels = models.stack(unrolled)["stage2_blocks"]["conv1"]["kernel"]
    assert len(kernels) == 10
    for b, kernel in enumerate(kernels, start=2):
        expected = unrolled[f"stage2_block{b}"]["conv1"]["kernel"]
        np.testing.assert_array_equal(kernel, expected)


def test_one_block_a_stage_has_nothing_to_stack():
    variables = random_variables(build(V2, 11, width=2), dtype=np.float32)
    assert_equal(models.stack(variables), variables)
    assert_equal(models.unstack(variables), variables)


def test_stack_and_unstack_reach_into_tuples_of_states():
    stacked = models.stack(random_variables(build(V1, 20, width=2), dtype=np.float32))
    trees = {"opt_state": (stacked["params"], ()), "step": np.int32(3)}
    unrolled = models.unstack(trees)
    assert "stage1_block2" in unrolled["opt_state"][0]
    assert_equal(models.stack(unrolled), trees)


def summed_logits(net, variables, images):
    return net.apply(variables, images).sum()


def test_remat_computes_first_and_single_blocks_again_too():
    """XLA undoes it where it need not be kept from that, as outside loops."""
    for blocks in ((1, 1, 1), (2, 2, 2), (3, 1, 1)):
        net = build(V1, 8, width=2).clone(blocks_per_stage=blocks, remat=True)
        variables = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, *TINY)))
        loop, stacked = net.clone(scan=True), jax.eval_shape(models.stack, variables)
        for network, shapes in ((net, variables), (loop, stacked)):
            gradient = jax.jit(jax.grad(partial(summed_logits, network)))
            program = gradient.lower(shapes, jnp.ones((2, *TINY))).as_text()
            assert program.count("optimization_barrier") >= 3


def test_stack_and_unstack_leave_numpy_arrays_numpy():
    stacked = jax.device_get(
        models.stack(random_variables(build(V1, 20, width=2), dtype=np.float32))
    )
    unstacked = models.unstack(stacked)
    leaves = jax.tree.leaves((unstacked, models.stack(unstacked)))
    assert all(isinstance(leaf, np.ndarray) for leaf in leaves)


@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.1, momentum=0.9)),
        optax.adam(optax.constant_schedule(1e-3)),
    ],
    ids=["sgd", "adam"],
)
def test_stack_and_unstack_convert_optimizer_states(tx):
    net = build(V1, 20, width=2)
    unrolled = random_variables(net, dtype=np.float32)["params"]
    stacked = models.stack(unrolled)
    rng = np.random.default_rng(0)
    state = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype),
        jax.eval_shape(tx.init, unrolled),
    )
    converted = models.stack(state)
    assert structure(converted) == structure(jax.eval_shape(tx.init, stacked))
    assert_equal(models.unstack(converted), state)
    assert_equal(models.stack(models.unstack(converted)), converted)
    for name in ("trace", "mu", "nu"):
        moments = optax.tree.get(state, name)
        if moments is not None:
            assert_equal(optax.tree.get(converted, name), models.stack(moments))


# Initial values


@pytest.mark.slow
@pytest.mark.parametrize("kind", [V1, KERAS_V2], ids=label)
def test_initial_values_do_not_depend_on_scan(kind):
    net = build(kind, 20, width=4)
    key = jax.random.key(3)
    unrolled = models.initialize(net, key, TINY)
    stacked = models.initialize(net.clone(scan=True), key, TINY)
    assert_equal(models.stack(unrolled), stacked)
    assert structure(unrolled) == structure(declared_shapes(net, TINY))
    leaves = jax.tree.leaves((unrolled, stacked))
    assert all(isinstance(leaf, np.ndarray) for leaf in leaves)
    assert all(leaf.dtype == np.float32 for leaf in leaves)


@pytest.fixture(scope="module")
def paper_variables():
    return models.initialize(build(V2, 20), jax.random.key(0), CIFAR)


@pytest.fixture(scope="module")
def keras_variables():
    return models.initialize(build(KERAS_V2, 20), jax.random.key(0), CIFAR)


def named_leaves(tree, name: str) -> dict[str, np.ndarray]:
    return {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if path[-1].key == name
    }


def assert_standard_deviation(kernel, expected, path):
    # Five standard errors; a truncated normal's is smaller.
    tolerance = 5 * expected / (2 * kernel.size) ** 0.5
    assert abs(kernel.std() - expected) < tolerance, path
    assert abs(kernel.mean()) < 5 * expected / kernel.size**0.5, path


def test_paper_convolutions_start_normal_by_kernel_size_and_outputs(paper_variables):
    kernels = named_leaves(paper_variables["params"], "kernel")
    del kernels["['classifier']['kernel']"]
    assert len(kernels) == 19 + 3
    standardised = []
    for path, kernel in kernels.items():
        height, width, _, outputs = kernel.shape
        deviation = (2 / (height * width * outputs)) ** 0.5
        assert_standard_deviation(kernel, deviation, path)
        standardised.append(kernel.ravel() / deviation)
    standardised = np.concatenate(standardised)
    assert np.abs(standardised).max() > 4  # 13 of 210,000 in a normal distribution
    assert abs(np.mean(np.abs(standardised) > 2) - 0.0455) < 0.002


def test_keras_convolutions_start_truncated_normal_by_inputs(keras_variables):
    kernels = named_leaves(keras_variables["params"], "kernel")
    for path, kernel in kernels.items():
        deviation = (2 / np.prod(kernel.shape[:-1])) ** 0.5
        assert_standard_deviation(kernel, deviation, path)
        # Cut at two standard deviations of the normal distribution before the cut.
        assert np.abs(kernel).max() <= 2 * deviation / 0.8796 + 1e-6, path
        assert np.abs(kernel).max() > 2 * deviation, path


def test_paper_classifier_starts_uniform_as_torchs(paper_variables):
    kernel = paper_variables["params"]["classifier"]["kernel"]
    bound = 1 / kernel.shape[0] ** 0.5
    assert np.abs(kernel).max() <= bound
    assert np.abs(kernel).max() > 0.99 * bound
    assert_standard_deviation(kernel, bound / 3**0.5, "classifier")


def test_normalisation_and_biases_start_neutral(paper_variables, keras_variables):
    for variables in (paper_variables, keras_variables):
        for name, value in (("scale", 1), ("bias", 0), ("mean", 0), ("var", 1)):
            leaves = named_leaves(variables, name)
            assert leaves
            assert all((leaf == value).all() for leaf in leaves.values())


def test_no_two_layers_start_with_the_same_values(paper_variables):
    kernels = named_leaves(paper_variables["params"], "kernel").values()
    firsts = [float(kernel.ravel()[0]) for kernel in kernels]
    assert len(set(firsts)) == len(firsts)


def test_initial_values_follow_the_key():
    net = build(V1, 8, width=4)
    kernels = [
        models.initialize(net, jax.random.key(seed), TINY)["params"]["stem_conv"]
        for seed in (0, 1)
    ]
    assert not np.isclose(*(leaf["kernel"] for leaf in kernels)).any()


# Inputs, types and modes


@pytest.mark.parametrize("kind", KINDS, ids=label)
def test_any_image_size_and_number_of_channels(kind):
    net = build(kind, shallowest(kind), 7)
    for shape in [
        (8, 8, 1),
        (8, 8, 3),
        (9, 15, 4),
        (28, 28, 1),
        (48, 33, 3),
        (64, 64, 4),
    ]:
        images = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
        variables = declared_shapes(net, shape)
        logits = jax.eval_shape(net.apply, variables, images)
        assert (logits.shape, logits.dtype) == ((2, 7), jnp.float32)


@pytest.mark.parametrize("size", [(8, 8), (11, 9), (64, 64)])
def test_logits_are_finite_at_small_and_large_sizes(size):
    net = build(V1, 8, width=4)
    variables = random_variables(net, dtype=np.float32)
    logits = quick_jit(net.apply)(variables, random_images(2, (*size, 3), np.float32))
    assert logits.shape == (2, 10)
    assert np.isfinite(logits).all()


@pytest.mark.parametrize(
    "kind", [V1_B, V2, pytest.param(KERAS_V2, marks=pytest.mark.slow)], ids=label
)
def test_bfloat16_is_the_type_of_the_computation_alone(kind):
    net = build(kind, shallowest(kind), width=8)
    half = net.clone(dtype=jnp.bfloat16)
    variables = declared_shapes(half, TINY)
    assert structure(variables) == structure(declared_shapes(net, TINY))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}

    variables = random_variables(net, dtype=np.float32)
    images = random_images(4, dtype=np.float32)

    @quick_jit
    def both(variables):
        (logits, seen), (full, statistics) = (
            half.apply(
                variables,
                images,
                train=True,
                mutable=["batch_stats", "intermediates"],
                capture_intermediates=True,
            ),
            net.apply(variables, images, train=True, mutable=["batch_stats"]),
        )
        return logits, seen, full, statistics

    logits, seen, full, statistics = both(variables)
    assert logits.dtype == jnp.float32
    assert structure(seen["batch_stats"]) == structure(statistics["batch_stats"])
    outputs = {
        jax.tree_util.keystr(path): leaf.dtype
        for path, leaf in jax.tree_util.tree_leaves_with_path(seen["intermediates"])
        if "classifier" not in jax.tree_util.keystr(path)
    }
    del outputs["['__call__'][0]"]
    assert set(outputs.values()) == {jnp.dtype("bfloat16")}
    assert 0 < np.abs(logits - full).max() < 0.05 * np.abs(full).max()

    # The pool and the classifier behind it round nothing to bfloat16.
    name = "final_bn" if net.activation == "pre" else "stage3_block1"
    features = np.float32(seen["intermediates"][name]["__call__"][0])
    pooled = np.maximum(features, 0).mean((1, 2))
    classifier = variables["params"]["classifier"]
    expected = pooled @ classifier["kernel"] + classifier["bias"]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", [V1_B, V2, KERAS_V1, KERAS_V2], ids=label)
def test_plain_network_has_no_shortcut_parameters(kind):
    depth = shallowest(kind)
    plain = declared_shapes(build(kind, depth, residual=False), CIFAR)["params"]
    residual = declared_shapes(build(kind, depth), CIFAR)["params"]
    for name, block in residual.items():
        kept = {key: block[key] for key in block if not key.startswith("shortcut")}
        assert plain[name] == kept
    shortcuts = {key for block in residual.values() for key in block}
    assert any(key.startswith("shortcut") for key in shortcuts)


@pytest.mark.parametrize("kind", [V1, V2], ids=label)
def test_every_shortcut_counts(kind):
    """The residual and the plain network differ at each stage's first block."""
    net = build(kind, shallowest(kind), width=4)
    plain = net.clone(shortcut=None)
    assert plain == build(kind, shallowest(kind), width=4, residual=False)
    variables = random_variables(net, dtype=np.float32)
    images = random_images(2, dtype=np.float32)

    def shortcuts(net):
        _, seen = quick_jit(net.apply, static_argnames="capture_intermediates")(
            variables, images, capture_intermediates=True
        )
        return [
            seen["intermediates"][f"stage{stage}_block1"]["__call__"][0]
            for stage in (1, 2, 3)
        ]

    for with_shortcut, without in zip(shortcuts(net), shortcuts(plain), strict=True):
        assert with_shortcut.shape == without.shape
        assert np.abs(with_shortcut - without).max() > 0.1


@pytest.mark.parametrize("kind", [V1_B, KERAS_V2], ids=label)
def test_statistics_change_in_training_alone(kind):
    net = build(kind, shallowest(kind), width=4)
    variables = random_variables(net, dtype=np.float32)
    images = random_images(4, dtype=np.float32)

    @quick_jit
    def both(variables):
        return [
            net.apply(variables, images, train=train, mutable=["batch_stats"])
            for train in (True, False)
        ]

    (trained, new), (evaluated, kept) = both(variables)
    assert_equal(kept["batch_stats"], variables["batch_stats"])
    changed = jax.tree.map(
        lambda a, b: (a != b).all(),
        new["batch_stats"],
        variables["batch_stats"],
    )
    assert structure(new["batch_stats"]) == structure(variables["batch_stats"])
    assert all(jax.tree.leaves(changed))
    assert np.abs(trained - evaluated).max() > 0.01

    moved = variables | {
        "batch_stats": jax.tree.map(lambda x: 2 * x, variables["batch_stats"])
    }
    (trained_too, _), (evaluated_too, _) = both(moved)
    np.testing.assert_array_equal(trained_too, trained)
    assert np.abs(evaluated_too - evaluated).max() > 0.01


@pytest.mark.parametrize(
    ("kind", "momentum", "epsilon"), [(V1, 0.9, 1e-5), (KERAS_V1, 0.99, 1e-3)]
)
def test_batchnorm_momentum_and_epsilon(kind, momentum, epsilon):
    net = build(kind, 8, width=4)
    variables = random_variables(net, dtype=np.float32)
    images = 0.01 * random_images(4, dtype=np.float32)

    @quick_jit
    def apply(variables):
        return net.apply(
            variables,
            images,
            train=True,
            mutable=["batch_stats", "intermediates"],
            capture_intermediates=lambda module, _: (module.name or "").startswith(
                "stem"
            ),
        )

    _, seen = apply(variables)
    convolved = np.float64(seen["intermediates"]["stem_conv"]["__call__"][0])
    normalised = seen["intermediates"]["stem_bn"]["__call__"][0]
    mean, var = convolved.mean((0, 1, 2)), convolved.var((0, 1, 2))
    params = variables["params"]["stem_bn"]
    expected = (convolved - mean) / np.sqrt(var + epsilon)
    expected = expected * params["scale"] + params["bias"]
    np.testing.assert_allclose(normalised, expected, rtol=1e-4, atol=1e-4)
    old = variables["batch_stats"]["stem_bn"]
    new = seen["batch_stats"]["stem_bn"]
    for name, value in (("mean", mean), ("var", var)):
        expected = momentum * old[name] + (1 - momentum) * value
        np.testing.assert_allclose(new[name], expected, rtol=1e-5, atol=1e-6)


# Summary


def test_summary_counts_the_activations_that_are_kept():
    """Of v1-20: three blocks a stage, of two convolutions and their BatchNorms each."""
    net = models.resnet(1, 20, 10, width=4)
    stages = [8 * 8 * 4, 4 * 4 * 8, 2 * 2 * 16]  # an output's values
    outside = 2 * stages[0] + 10
    rows = cost.layers(net, (8, 8, 1))
    kept = outside + 3 * 4 * sum(stages)
    assert cost.activation_bytes(net, rows, 32) == 32 * 4 * kept
    again = net.clone(remat=True)
    ends = outside + 3 * sum(stages) + 4 * stages[0]
    assert cost.activation_bytes(again, rows, 32) == 32 * 4 * ends
    half = again.clone(dtype="bfloat16")
    logits = 10  # float32 all the same
    assert cost.activation_bytes(half, rows, 32) == 32 * (2 * ends + 2 * logits)


def test_summary_names_the_layers_in_the_order_in_which_they_run():
    found = cost.layers(build(V1, 8), CIFAR)
    block = ["conv1", "bn1", "conv2", "bn2"]
    assert [layer.name for layer in found] == [
        "stem_conv",
        "stem_bn",
        *(f"stage{s}_block1/{name}" for s in (1, 2, 3) for name in block),
        "classifier",
    ]
    assert [layer.output_shape for layer in found] == [
        *([(32, 32, 16)] * 6),
        *([(16, 16, 32)] * 4),
        *([(8, 8, 64)] * 4),
        (10,),
    ]
    by_name = {layer.name: layer for layer in found}
    assert by_name["stem_conv"].macs == 32 * 32 * 3 * 3 * 3 * 16
    assert by_name["stage2_block1/conv1"].macs == 16 * 16 * 3 * 3 * 16 * 32
    assert by_name["classifier"].macs == 640
    assert by_name["classifier"].parameters == 650
    assert by_name["stem_bn"].macs == 0
    assert by_name["stem_bn"].parameters == 32


@pytest.mark.parametrize("scan", [False, True])
def test_summary_counts_equal_blocks_once_with_their_number(scan):
    layers = cost.layers(build(V2, 29, scan=scan), CIFAR)
    names = [layer.name for layer in layers]
    block = ["bn1", "conv1", "bn2", "conv2", "bn3", "conv3"]
    first = [*block, "shortcut_conv"]
    assert names == [
        "stem_conv",
        *(
            f"stage{s}_block{b}/{name}"
            for s in (1, 2, 3)
            for b, members in (("1", first), ("2-3", block))
            for name in members
        ),
        "final_bn",
        "classifier",
    ]
    for layer in layers:
        assert layer.copies == (2 if "block2-3" in layer.name else 1)
    pair = [layer.name for layer in cost.layers(build(V1, 14), CIFAR)]
    assert "stage3_block2/bn2" in pair


@pytest.mark.parametrize("kind", KINDS, ids=label)
def test_summary_agrees_with_the_variables_layer_by_layer(kind):
    params = declared_shapes(build(kind, 20), CIFAR)["params"]
    total = 0
    for layer in cost.layers(build(kind, 20), CIFAR):
        module = params
        for name in layer.name.replace("-3", "").split("/"):
            module = module[name]
        assert cost.count_parameters(module) == layer.parameters
        total += layer.parameters * layer.copies
    assert cost.count_parameters(params) == total


# Stochastic depth and blocks that begin as the identity


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_stochastic_depth_falls_linearly_from_block_to_block(scan, monkeypatch):
    """Branches scaled by what is given as their chance: a network of known weights."""
    monkeypatch.setattr(layers, "stochastic_depth", lambda survival, _: survival)
    net = build(V1, 20, stochastic_depth=0.5, scan=scan)
    plain = build(V1, 20)
    variables = models.initialize(plain, jax.random.key(0), TINY)
    images = jax.random.normal(jax.random.key(1), (4, *TINY))
    # In the plain network, scales of each block's last BN do the same.
    scaled = jax.tree.map(np.copy, variables)
    for number in range(9):
        name = f"stage{number // 3 + 1}_block{number % 3 + 1}"
        scaled["params"][name]["bn2"]["scale"] *= 1 - 0.5 * (number + 1) / 9
    expected, _ = quick_apply(plain, scaled, images)
    used = models.stack(variables) if scan else variables
    found, _ = quick_apply(
        net, used, images, rngs={"stochastic_depth": jax.random.key(0)}
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def quick_apply(net, variables, images, **more):
    return quick_jit(partial(apply, net))(variables, images, **more)


def apply(net, variables, images, **more):
    return net.apply(variables, images, train=True, mutable=["batch_stats"], **more)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [V1, V2], ids=label)
def test_stochastic_depth_is_drawn_in_training_alone(kind):
    depth = 8 if kind is V1 else 11
    net = build(kind, depth, stochastic_depth=0.5)
    variables = random_variables(net, dtype=np.float32)
    images = jax.random.normal(jax.random.key(1), (2, *TINY))
    np.testing.assert_array_equal(
        net.apply(variables, images), build(kind, depth).apply(variables, images)
    )
    train = partial(net.apply, train=True, mutable=["batch_stats"])
    draw = quick_jit(
        lambda key: train(variables, images, rngs={"stochastic_depth": key})[0]
    )
    outcomes = {np.asarray(draw(jax.random.key(seed))).tobytes() for seed in range(40)}
    assert 3 <= len(outcomes) <= 2**3


@pytest.mark.slow
@pytest.mark.parametrize("kind", [V1, V2, KERAS_V2], ids=label)
def test_scan_and_remat_draw_the_same_blocks(kind):
    net = build(kind, shallowest(kind), stochastic_depth=0.7)
    net = net.clone(blocks_per_stage=(3, 2, 2))
    variables = random_variables(net, dtype=np.float32)
    images = jax.random.normal(jax.random.key(1), (2, *TINY))
    loop = net.clone(scan=True, remat=True)

    @quick_jit
    def draws(keys):
        unrolled, stacked = variables, models.stack(variables)
        return jax.lax.map(
            lambda key: (
                apply(net, unrolled, images, rngs={"stochastic_depth": key})[0],
                apply(loop, stacked, images, rngs={"stochastic_depth": key})[0],
            ),
            keys,
        )

    expected, found = draws(jax.random.split(jax.random.key(2), 12))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert len({logits.tobytes() for logits in np.asarray(expected)}) > 6


def test_stochastic_depth_keeps_the_mean_and_leaves_out_whole_batches():
    survival = jnp.asarray([0.8, 1.0, 0.3])
    keys = jax.random.split(jax.random.key(0), 4000)
    factors = jax.vmap(lambda key: layers.stochastic_depth(survival, key))(keys)
    assert factors.shape == (4000, 3)  # one of each block, for all images
    for chance, drawn in zip(survival, np.asarray(factors).T, strict=True):
        kept = drawn[drawn != 0]
        np.testing.assert_allclose(kept, 1 / chance, 1e-6)
        error = 4 * np.sqrt(chance * (1 - chance) / 4000)
        assert abs(len(kept) / 4000 - chance) <= error + 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(
    "kind",
    [V1, V1_B, V2, PRE_BASIC_A, POST_BOTTLENECK, KERAS_V1, KERAS_V2],
    ids=label,
)
def test_blocks_begin_as_the_identity_and_learn(kind, scan):
    # With and without others behind a stage's first block, and with several.
    net = build(kind, shallowest(kind), zero_init=True)
    net = net.clone(scan=scan, blocks_per_stage=(3, 2, 1))
    variables = models.initialize(net, jax.random.key(0), TINY)
    images = jax.random.normal(jax.random.key(1), (4, *TINY))
    # Behind the first block of a stage nothing changes, so its length does not matter.
    unrolled = models.unstack(variables)
    short = net.clone(scan=False, blocks_per_stage=(1, 1, 1))
    kept = {
        collection: {
            name: tree
            for name, tree in unrolled[collection].items()
            if "_block" not in name or name.endswith("_block1")
        }
        for collection in unrolled
    }
    expected, _ = quick_apply(short, kept, images)

    def loss(params):
        logits, _ = apply(net, {**variables, "params": params}, images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(4))
        return losses.mean(), logits

    gradient, found = quick_jit(jax.grad(loss, has_aux=True))(variables["params"])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    gradient = models.unstack(gradient)
    last = "bn" if net.activation == "post" else "conv"
    last += "2" if net.block == "basic" else "3"
    leaf = "scale" if net.activation == "post" else "kernel"
    for name, tree in gradient.items():
        if "_block" in name:
            assert np.abs(tree[last][leaf]).max() > 0


def test_shapes_and_values_are_traced_once():
    traced = []

    class Norm(nn.Module):
        @nn.compact
        def __call__(self, x, use_running_average):
            traced.append(self.path)
            return x

    net = models.resnet(1, 8, 10, width=1).clone(norm_class=Norm)
    models.zeros(net, (8, 8, 1))
    once = len(traced)
    variables = models.initialize(net, jax.random.key(0), (8, 8, 1))
    assert variables["batch_stats"] == {}
    assert once == len(traced) == 7
