import json

import jax
import jax.numpy as jnp
import pytest

from configs import common
from resnet_jax import profile, train
from resnet_jax.profile import Operation

PROGRAM = """\
HloModule jit_train_call
  %fusion.3 = f32[8]{0} fusion(%x), kind=kLoop, metadata={op_name="jit(train_call)/\
while/body/transpose(jvp(ResNet))/stage1_block1/bn1/jit(normalize_batch)/reduce_sum" \
source_line=3}
  ROOT %convolution.1 = f32[8]{0} convolution(%x, %y), metadata={op_type="conv" \
op_name="jit(train_call)/while/body/jvp(ResNet)/stem_conv/conv_general_dilated"}
  %add.2 = f32[] add(%a, %b), metadata={op_name="jit(train_call)/while/body/add"}
"""


def test_places_of_operations_come_from_the_program():
    assert profile.sources(PROGRAM) == {
        "fusion.3": "stage1_block1/bn1/reduce_sum, backward",
        "convolution.1": "stem_conv/conv_general_dilated",
        "add.2": "jit(train_call)/add",
    }


def test_table_shows_shares_of_the_whole():
    found = [Operation("a.1", 3.0, 6), Operation("b.2__onednn$matmul", 0.5, 1)]
    found += [Operation("c.3", 0.5, 1)]
    places = {"a.1": "stem_conv", "b.2": "stage1_block1/conv1"}
    head, *rows = profile.table(found, places, count=2).splitlines()
    assert head.split() == ["share", "ms", "each", "times", "operation"]
    assert rows[0].split() == ["75.0%", "500.000", "6", "a.1", "stem_conv"]
    assert rows[1].split()[-2:] == ["b.2__onednn$matmul", "stage1_block1/conv1"]
    assert len(rows) == 2


def test_operations_are_summed(tmp_path):
    x = jnp.ones((64, 64))
    product = jax.jit(lambda x: x @ x).lower(x).compile()
    with jax.profiler.trace(tmp_path):
        for _ in range(3):
            product(x).block_until_ready()
    (file,) = tmp_path.glob("plugins/profile/*/*.xplane.pb")
    found = profile.operations(file)
    assert [operation.count for operation in found] == [3] * len(found)
    assert found[0].seconds == max(operation.seconds for operation in found) > 0


@pytest.mark.slow
def test_a_run_traces_its_second_call(tmp_path, capsys):
    config = common.get_config("smoke", version=1, depth=8)
    config.update(steps=6, steps_per_call=2, profile=True)
    train.train_and_evaluate(config, tmp_path)
    assert len(list(tmp_path.glob("profile/plugins/profile/*/*.xplane.pb"))) == 1
    lines = capsys.readouterr().out.splitlines()
    (start,) = (i for i, line in enumerate(lines) if line.startswith("profile "))
    assert "of steps 3 to 4" in lines[start]
    rows = [line.split() for line in lines[start + 2 : start + 12]]
    shares = [float(row[0].removesuffix("%")) for row in rows]
    assert shares == sorted(shares, reverse=True)
    assert any("stage" in row[-1] or "stem" in row[-1] for row in rows)
    config.update(steps=8, steps_per_call=10)
    train.train_and_evaluate(config, tmp_path / "one_call")
    assert (
        "nothing is traced: the whole run is one call; set config.steps_per_call=4"
        in capsys.readouterr().out
    )
    config.update(steps_per_call=2, profile=False)  # may differ when the run is resumed
    assert train.train_and_evaluate(config, tmp_path)["steps"] == 8
    assert json.loads((tmp_path / "config.json").read_text())["profile"] is False
