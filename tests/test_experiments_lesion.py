import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import lesion, study, trained
from experiments.trained import Subject
from resnet_jax import models
from tests.quick import random_variables


def drawn(depth: int, **model) -> Subject:
    """A network that is not trained, but whose BatchNorms scale and shift."""
    net = models.resnet(1, depth, 10, **model)
    variables, rng = random_variables(net, (8, 8, 1)), np.random.default_rng(0)
    images = jnp.asarray(rng.standard_normal((8, 8, 8, 1)), jnp.float32)
    return Subject({}, net, variables, images, rng.integers(0, 10, 8))


@pytest.mark.slow
def test_the_gradient_is_the_sum_over_all_paths():
    subject = drawn(8)

    @jax.jit
    def loss(images):
        scores = subject.net.apply(subject.variables, images, train=False)
        return optax.softmax_cross_entropy_with_integer_labels(
            scores, subject.labels
        ).sum()

    gradient = lesion.make_path_gradient(subject)
    total = sum(
        gradient(np.array(through))
        for through in itertools.product([False, True], repeat=3)
    )
    expected = jax.grad(loss)(subject.images)
    np.testing.assert_allclose(total, expected, atol=1e-4 * abs(expected).max())


@pytest.mark.slow
def test_a_deleted_block_is_one_whose_branch_gives_nothing():
    subject = drawn(14)
    zeroed = jax.tree.map(np.copy, subject.variables)
    last = zeroed["params"]["stage2_block1"]["bn2"]
    last["scale"][:], last["bias"][:] = 0, 0

    def scores(variables, kept):
        def delete(number, shortcut, output):
            return jnp.where(kept[number], output, shortcut)

        return lesion.logits(subject.net, variables, subject.images, delete)

    everything, without = np.ones(6, bool), np.arange(6) != 2
    np.testing.assert_allclose(
        scores(subject.variables, without), scores(zeroed, everything), rtol=1e-5
    )
    assert not np.allclose(
        scores(subject.variables, everything), scores(zeroed, everything), rtol=1e-2
    )


@pytest.mark.slow
def test_swaps_stay_within_a_stage_and_keep_its_first_block():
    subject = drawn(32)
    variables, tau = lesion.swapped(subject, 20, np.random.default_rng(0))
    assert -1 < tau < 1
    for stage in (1, 2, 3):
        names = [f"stage{stage}_block{b}" for b in range(1, 6)]
        before = [
            subject.variables["params"][name]["conv2"]["kernel"] for name in names
        ]
        after = [variables["params"][name]["conv2"]["kernel"] for name in names]
        assert after[0] is before[0]
        assert {id(kernel) for kernel in after} == {id(kernel) for kernel in before}
    _, tau = lesion.swapped(subject, 0, np.random.default_rng(0))
    assert tau == pytest.approx(1)


@pytest.mark.slow
def test_end_to_end(tmp_path, monkeypatch, quick_training):
    monkeypatch.chdir(tmp_path)
    tiny = {"networks": ((20, True),), "draws": 1}
    monkeypatch.setitem(lesion.SCALES, "smoke", tiny)
    monkeypatch.setattr(study, "SEEDS", (0,))

    run_config = trained.run_config

    def short(*args, **smaller):
        config = run_config(*args, **smaller)
        config["augment"]["crop"] = 0.0  # compiles sooner
        config["dataset"]["eval_split"] = "test[:64]"
        return config | {"steps": 2, "epochs": 1}

    monkeypatch.setattr(trained, "run_config", short)
    lesion.main(["lesion", f"--out={tmp_path / 'results'}"])
    assert (tmp_path / "results" / "smoke.png").exists()
    assert len((tmp_path / "results" / "smoke.jsonl").read_text().splitlines()) == 1
