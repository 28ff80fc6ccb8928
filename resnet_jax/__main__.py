"""`python -m resnet_jax` lists the commands."""

from functools import partial

from resnet_jax import command_line

if __name__ == "__main__":
    command_line.run(partial(command_line.list_commands, "resnet_jax"))
