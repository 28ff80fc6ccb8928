"""The official archives of data sets: found where the user put them, or downloaded."""

import sys
from pathlib import Path
from typing import NamedTuple

from resnet_jax import UserError
from resnet_jax.data import download


class Archive(NamedTuple):
    """A file that a data set is published in; `size` in bytes."""

    url: str
    size: int
    sha256: str

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]


def official(name: str) -> list[Archive]:
    """The official files of a set, as TFDS records them."""
    import tensorflow_datasets as tfds

    infos = tfds.builder_cls(name).url_infos.items()
    files = [Archive(url, int(info.size), info.checksum) for url, info in infos]
    # The third split of svhn_cropped, 1.3 GB that few use, is left out.
    return [file for file in files if file.name != "extra_32x32.mat"]


def find(archive: Archive, data_dir: Path) -> Path | None:
    """The path of an archive in `data_dir` or its downloads/; None: it is not there.

    Raises:
      UserError: the file there is another one.
    """
    for path in (data_dir / archive.name, data_dir / "downloads" / archive.name):
        if not path.exists():
            continue
        if not path.is_file() or download.sha256(path) != archive.sha256:
            raise UserError(
                f"{path} is not the official archive (it has "
                f"{path.stat().st_size} bytes of {archive.size}, and another "
                "SHA-256): delete it, or put the right one there"
            )
        return path
    return None


def obtain(archive: Archive, name: str, data_dir: Path, mirror: str) -> Path:
    """Finds an archive in `data_dir` or its downloads/, or downloads it there.

    Args:
      archive: the file to obtain.
      name: the data set that needs it, for the messages.
      data_dir: TFDS's data directory; its downloads/ exists.
      mirror: the base URL to download from, '' for the official host.

    Returns:
      The path of the file, whose checksum is right.

    Raises:
      UserError: the file that is there, or that came, is another one; or it cannot
        be had: the message has what was tried and the ways out.
    """
    if path := find(archive, data_dir):
        return path
    downloads = data_dir / "downloads"
    url = f"{mirror.rstrip('/')}/{archive.name}" if mirror else archive.url
    path = downloads / archive.name
    print(
        f"Downloading {url} ({archive.size / 1e6:.0f} MB) to {downloads}; if it is "
        "stopped, the next run resumes it.",
        file=sys.stderr,
    )
    try:
        download.fetch(url, path, size=archive.size, digest=archive.sha256)
    except download.DownloadError as error:
        raise UserError(
            f"{name} is not prepared in {data_dir}, {archive.name} is neither there "
            f"nor in its downloads/, and {url} failed: {error}. Ways out:\n"
            f"  put {archive.name} ({archive.size} bytes, SHA-256 {archive.sha256}) "
            f"into {downloads}, or give --config.dataset.mirror=URL;\n"
            "  give --config.dataset.data_dir or TFDS_DATA_DIR, a directory that has "
            f"{name}, prepared by TFDS as array_record;\n"
            "  or take --config.dataset.name=digits, which needs no download"
        ) from None
    return path
