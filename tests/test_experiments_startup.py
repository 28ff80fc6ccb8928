import pytest

from experiments import startup
from resnet_jax import UserError
from tests.quick import ENVIRONMENT

SMALL = ("--config.model.version=1", "--config.model.depth=8", "--config.model.width=4")


@pytest.mark.slow
def test_the_second_start_uses_what_the_first_compiled(tmp_path, monkeypatch, capfd):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    cache = tmp_path / "cache"
    first = startup.seconds_to_first_update("configs/digits.py", cache, *SMALL)
    programs = {path.name for path in cache.iterdir() if "atime" not in path.name}
    assert programs
    second = startup.seconds_to_first_update("configs/digits.py", cache, *SMALL)
    assert {
        path.name for path in cache.iterdir() if "atime" not in path.name
    } == programs
    assert min(first, second) > 0.5
    with pytest.raises(UserError, match="ended before its first update"):
        startup.seconds_to_first_update("configs/digits.py", cache, "--config.seed=x")
    assert "config.seed" in capfd.readouterr().err


def test_table_and_figure_have_the_medians():
    rounds = [{"cold": cold, "warm": 2.0} for cold in (9.0, 10.0, 14.0)]
    lines = startup.table(rounds).splitlines()
    assert lines[1].split() == ["nothing", "compiled", "10.0", "(9.0", "to", "14.0)"]
    (axes,) = startup.draw(rounds).axes
    assert [text.get_text() for text in axes.get_yticklabels()] == list(
        startup.TIMES.values()
    )
