import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import layer_responses, study, trained
from resnet_jax import models


@pytest.mark.slow
def test_with_statistics_of_the_batch_every_response_has_the_scale_of_its_norm():
    net = models.resnet(1, 8, 10)
    variables = models.initialize(net, jax.random.key(0), (8, 8, 1))
    images = jnp.asarray(np.random.default_rng(0).standard_normal((64, 8, 8, 1)))
    scales = 0.5 + np.arange(7)
    names = ["stem_bn", *(f"stage{s}_block1/bn{i}" for s in (1, 2, 3) for i in (1, 2))]
    for name, scale in zip(names, scales, strict=True):
        node = variables["params"]
        for part in name.split("/"):
            node = node[part]
        node["scale"] = np.full_like(node["scale"], scale)
    update = jax.jit(lambda v: net.apply(v, images, train=True, mutable="batch_stats"))
    for _ in range(100):
        variables = variables | update(variables)[1]
    responses = layer_responses.responses(net, variables, images)
    np.testing.assert_allclose(responses, scales, rtol=1e-2)


@pytest.mark.slow
def test_end_to_end(tmp_path, monkeypatch, quick_training):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(layer_responses.SCALES, "smoke", ((8, True),))
    monkeypatch.setattr(study, "SEEDS", (0,))
    run_config = trained.run_config
    monkeypatch.setattr(
        trained,
        "run_config",
        lambda *args: run_config(*args) | {"steps": 2, "epochs": 1},
    )
    layer_responses.main(["layer_responses", f"--out={tmp_path / 'results'}"])
    lines = (tmp_path / "results" / "smoke.jsonl").read_text().splitlines()
    assert [len(json.loads(line)["result"]["responses"]) for line in lines] == [7]
    assert (tmp_path / "results" / "smoke.svg").exists()
