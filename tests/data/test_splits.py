import pytest

from resnet_jax import UserError
from resnet_jax.data import splits

SIZES = {"train": 1000, "test": 150, "unlabelled-1": 5}


def select(spec):
    return splits.select(spec, "config.dataset.train_split", SIZES)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("train", [("train", range(1000))]),
        ("train[:]", [("train", range(1000))]),
        ("train[:450]", [("train", range(450))]),
        ("train[450:]", [("train", range(450, 1000))]),
        ("train[100:200]", [("train", range(100, 200))]),
        ("train[:1_000]", [("train", range(1000))]),
        ("train[-100:]", [("train", range(900, 1000))]),
        ("train[:-100]", [("train", range(900))]),
        ("train[90%:]", [("train", range(900, 1000))]),
        ("train[-10%:]", [("train", range(900, 1000))]),
        ("test[33%:67%]", [("test", range(50, 100))]),
        ("test[:100%]", [("test", range(150))]),
        ("train+test", [("train", range(1000)), ("test", range(150))]),
        ("unlabelled-1[:-1%]", [("unlabelled-1", range(5))]),
        (
            "train[:10] + test[140:]",
            [("train", range(10)), ("test", range(140, 150))],
        ),
        ("unlabelled-1", [("unlabelled-1", range(5))]),
    ],
)
def test_select(spec, expected):
    assert select(spec) == expected


@pytest.mark.parametrize(
    "spec", ["test[:33%]", "train[-67%:-1%]", "test[17%:83%]", "train[5:-5]"]
)
def test_same_as_tfds(spec):
    import tensorflow_datasets as tfds

    name = spec.split("[")[0]
    info = tfds.core.SplitInfo(
        name=name, shard_lengths=[SIZES[name]], num_bytes=0, filename_template=None
    )
    (part,) = tfds.core.ReadInstruction.from_spec(spec).to_absolute({name: info})
    first, last = part.from_ or 0, SIZES[name] if part.to is None else part.to
    assert select(spec) == [(name, range(first, last))]


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "train[",
        "train[5]",
        "train[:5:2]",
        "train[a:]",
        "train++test",
        "train[:_5]",
        "train[5:9%]",
    ],
)
def test_wrong_syntax(spec):
    with pytest.raises(UserError, match="is not a split: write for example train"):
        splits.parse(spec, "dataset.eval_split")


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("tran", r"no split 'tran': did you mean 'train'\? choose one of train, test"),
        ("zzz", r"no split 'zzz': choose one of train, test"),
        ("train[:1001]", r"train_split='train\[:1001\]': 1001 is beyond the 1000 exam"),
        ("train[-1001:]", "-1001 is beyond the 1000 examples of 'train'"),
        ("train[:101%]", "101% is beyond"),
        ("train[5:5]", r"train\[5:5\] is empty"),
        ("train[7:5]", r"train\[7:5\] is empty"),
        ("train+test[150:]", r"test\[150:\] is empty"),
        ("unlabelled-1[-1%:]", r"unlabelled-1\[-1%:\] is empty"),
    ],
)
def test_wrong_selection(spec, sentence):
    with pytest.raises(UserError, match=sentence):
        select(spec)


@pytest.mark.parametrize(
    ("train", "validation", "sentence"),
    [
        (
            "train",
            "train[900:]",
            "config.dataset.train_split and config.dataset.validation_split share "
            "100 examples of 'train': give for example "
            "config.dataset.train_split=train[:900]",
        ),
        ("train", "train[:10%]", "config.dataset.train_split=train[100:]"),
        ("test+train", "train[4:7]", "config.dataset.train_split=train[:4]+train[7:]"),
        ("train[:901]", "train[900:]", "share 1 examples"),
        (
            "train[:5]",
            "train",
            "config.dataset.train_split=train[:90%] and "
            "config.dataset.validation_split=train[90%:]",
        ),
    ],
)
def test_overlap(train, validation, sentence):
    with pytest.raises(UserError) as error:
        splits.check_disjoint(select(train), select(validation), SIZES)
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("train", "validation"),
    [
        ("train[:900]", "train[900:]"),
        ("train[:5]", "train[900:]"),
        ("train", "test"),
        ("train[5:]+test", "train[:5]"),
    ],
)
def test_no_overlap(train, validation):
    splits.check_disjoint(select(train), select(validation), SIZES)
