"""ResNet versions 1 and 2 of any depth, for small images, in JAX and Flax."""


class UserError(Exception):
    """An error that the user can fix, explained in one sentence.

    The sentence names the field (or file), the value and the fix. Commands print it
    without a traceback and exit with `exit_status`.
    """

    exit_status = 2
    label = "error"  # what the printed line begins with
