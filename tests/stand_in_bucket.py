"""A stand-in for gs://, in a directory: whole files alone, as in a bucket.

Run as a program it is a command of resnet_jax that finds its buckets there:

    python -m tests.stand_in_bucket DIRECTORY MODULE ARGUMENTS...
"""

import importlib
import shutil
import sys
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem


class StandIn(LocalFileSystem):
    """Files of gs://NAME/... under DIRECTORY/NAME; what a bucket has not, raises.

    Attributes:
      root: the directory.
      failure: raised by every call from now on; None: none.
      writes: names of the files written and deleted (behind a minus), in order.
    """

    protocol = "gs"
    root: Path
    failure: Exception | None = None
    writes: list[str]

    @classmethod
    def _strip_protocol(cls, path):
        if str(path).startswith("gs://"):
            return f"{cls.root}/{str(path).removeprefix('gs://')}".rstrip("/")
        return super()._strip_protocol(path)

    def _use(self, path=None, sign=""):
        if self.failure:
            raise self.failure
        if path:
            self.writes.append(sign + str(Path(path).relative_to(self.root)))

    def find(self, *args, **options):
        self._use()
        return super().find(*args, **options)

    def put_file(self, source, target, **options):
        self._use(target)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)

    def get_file(self, source, target, **options):
        self._use()
        shutil.copyfile(source, target)

    def rm_file(self, path):
        self._use(path, "-")
        super().rm_file(path)

    def _refused(self, *_, **__):
        raise AssertionError("a bucket has no such operation")

    mv = mv_file = rename = move = touch = link = symlink = chmod = _refused
    open = mkdir = makedirs = rmdir = cp_file = _refused


def stand_in(directory: Path) -> type[StandIn]:
    """Makes gs:// a directory in this process, until fsspec's registry is undone."""
    StandIn.root, StandIn.failure, StandIn.writes = directory, None, []
    StandIn.clear_instance_cache()
    fsspec.register_implementation("gs", StandIn, clobber=True)
    return StandIn


if __name__ == "__main__":
    stand_in(Path(sys.argv[1]))
    command = importlib.import_module(f"resnet_jax.{sys.argv[2]}")
    from resnet_jax import command_line

    del sys.argv[1:3]
    command_line.run(command.main)
