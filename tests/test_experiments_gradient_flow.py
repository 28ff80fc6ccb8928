import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import blockwise, gradient_flow, study
from resnet_jax import models
from tests.quick import quick_jit, random_variables

TINY = {
    "dataset": {"name": "digits", "image_size": 8},
    "depths": (8, 14),
    "initial_scales": (0.5,),
    "steps": (0, 1),
}


def drawn(network: str, depth: int):
    model, _ = blockwise.NETWORKS[network]
    net = models.resnet(depth=depth, num_classes=10, **model)
    variables = random_variables(net, (8, 8, 1))
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.standard_normal((8, 8, 8, 1)), jnp.float32)
    return net, variables, images, rng.integers(0, 10, 8)


def norm(tree) -> float:
    return np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(tree)))


@pytest.mark.slow
@pytest.mark.parametrize(("network", "depth"), [("plain", 20), ("v2", 29)])
def test_block_by_block_the_gradient_is_the_whole_networks(network, depth):
    net, variables, images, labels = drawn(network, depth)

    def loss(params):
        logits, _ = net.apply(
            variables | {"params": params}, images, train=True, mutable="batch_stats"
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    value, expected = quick_jit(jax.value_and_grad(loss))(variables["params"])
    gradients, record = blockwise.passes(
        network, True, blockwise.split(variables), images, labels
    )
    assert record["loss"] == pytest.approx(float(value), rel=1e-4)
    for name in expected:
        part = "head" if name in ("classifier", "final_bn") else name.split("_")[0]
        part = name if name.startswith("stage") else part
        got = gradients[part]["params"]
        got = got if name.startswith("stage") else got[name]
        difference = jax.tree.map(np.subtract, got, expected[name])
        assert norm(difference) < 1e-3 * norm(expected[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "scale", "tolerance"),
    [("plain", 0.8, 0.08), ("v1", 1.2, 0.04), ("v2", 1.0, 0.03)],
)
def test_without_norm_gradients_grow_as_predicted(network, scale, tolerance):
    growths = []
    for seed in study.SEEDS:
        result = gradient_flow.measure(
            {"name": "digits", "image_size": 8}, network, False, 56, scale, [0], seed
        )
        growths.append(gradient_flow.growth(network, result["gradients"][0]))
    expected = gradient_flow.predicted_growth(network, scale, image_size=8)
    assert np.mean(growths) == pytest.approx(expected, abs=tolerance)


def test_growth_of_geometric_gradients_with_jumps_between_stages():
    layers = 2 * np.arange(28)
    gradients = np.exp(-0.3 * layers + 5 * (layers > 18) + 3 * (layers > 36))
    assert gradient_flow.growth("v1", list(gradients)) == pytest.approx(0.3)
    vanished = [None, 0.0, *gradients[2:]]
    assert gradient_flow.growth("v1", vanished) == pytest.approx(0.3)


@pytest.mark.slow
def test_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(gradient_flow.SCALES, "smoke", TINY)
    monkeypatch.setattr(study, "SEEDS", (0,))
    monkeypatch.setattr(gradient_flow, "NETWORKS", {"v1": blockwise.NETWORKS["v1"]})
    command = ["gradient_flow", f"--out={tmp_path}"]
    gradient_flow.main(command)
    lines = (tmp_path / "smoke.jsonl").read_text().splitlines()
    cells = [json.loads(line) for line in lines]
    assert len(cells) == 7
    assert {cell["settings"]["seed"] for cell in cells} == {0}
    assert all("jax" in cell["versions"] for cell in cells)
    assert (tmp_path / "smoke.svg").exists()
    assert "measuring" in capsys.readouterr().out
    monkeypatch.setattr(study, "save", lambda *_: None)  # the same figure
    gradient_flow.main(command)
    assert "measuring" not in capsys.readouterr().out
