from experiments import optimizers


def result(error: float, loss: float | None, **more) -> dict:
    return {"validation_error": [0, error], "validation_loss": [0, loss], **more}


def test_the_rate_is_chosen_by_validation_error_then_loss():
    results = {
        0.01: result(0.2, 0.1, test_error=[0.0]),
        0.1: result(0.1, 0.5, test_error=[0.9]),
        1.0: result(0.1, 0.4, test_error=[0.9]),
        10.0: result(0.1, None, test_error=[0.0]),
    }
    assert optimizers.best(results) == 1.0


def test_a_rate_at_which_training_diverges_is_not_chosen():
    results = {
        0.1: result(0.0, 0.0, diverged="training diverged"),
        0.01: result(0.9, 9),
    }
    assert optimizers.best(results) == 0.01


def test_decay_takes_as_much_of_a_weight_at_every_middle_rate():
    """Where it is decoupled: AdamW's and Lion's against SGD's 1e-4 * 0.1."""
    for name in ("adamw", "lion"):
        rate, settings = optimizers.OPTIMIZERS[name]
        assert abs(rate * settings["weight_decay"] - 1e-5) < 1e-12
