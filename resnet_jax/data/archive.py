"""The official archives of data sets: found where the user put them, or downloaded.

A download can be cut off and resumed, and is checked before it is used.
"""

import hashlib
import sys
import time
from pathlib import Path
from typing import NamedTuple

import requests
import urllib3
from tqdm import tqdm

from resnet_jax import UserError

CONNECT_SECONDS = 10.0
SILENCE_SECONDS = 30.0
ATTEMPTS = 3  # in a row without new data
PAUSE_SECONDS = 1.0


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
      UserError: the file there is a different one.
    """
    for path in (data_dir / archive.name, data_dir / "downloads" / archive.name):
        if not path.exists():
            continue
        if not path.is_file() or sha256(path) != archive.sha256:
            raise UserError(
                f"{path} is not the official archive (it has "
                f"{path.stat().st_size} of {archive.size} bytes, and another "
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
      UserError: the file found or downloaded is a different one; or it cannot be
        obtained: the message says what was tried and what to do.
    """
    if path := find(archive, data_dir):
        return path
    downloads = data_dir / "downloads"
    url = f"{mirror.rstrip('/')}/{archive.name}" if mirror else archive.url
    path = downloads / archive.name
    print(
        f"download  {url} ({archive.size / 1e6:.0f} MB) to {downloads}; if it is "
        "interrupted, the next run resumes it",
        file=sys.stderr,
    )
    try:
        download(url, path, size=archive.size, digest=archive.sha256)
    except DownloadError as error:
        raise UserError(
            f"{name} is not prepared in {data_dir}, {archive.name} is neither there "
            f"nor in its downloads/, and {url} failed ({error}):\n"
            f"  put {archive.name} ({archive.size} bytes, SHA-256 {archive.sha256}) "
            f"into {downloads}, or give --config.dataset.mirror=URL;\n"
            "  give --config.dataset.data_dir or TFDS_DATA_DIR, a directory that has "
            f"{name}, prepared by TFDS as array_record;\n"
            "  or give --config.dataset.name=digits, which needs no download"
        ) from None
    return path


class DownloadError(Exception):
    """Why a file could not be downloaded, in a few words."""


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(url: str, path: Path, *, size: int, digest: str) -> None:
    """Downloads a file to `path`, where it appears only once complete and verified.

    The bytes received so far stay in `path` + '.part', even if the program is stopped;
    the next call resumes from there, if the server supports the Range header.

    Args:
      url: where the file is.
      path: where to put it; its folder exists.
      size: its length in bytes.
      digest: its SHA-256, in hexadecimal.

    Raises:
      DownloadError: the server does not have it or does not answer, after a few
        attempts.
      UserError: a different file came; it is deleted.
    """
    part = path.with_name(path.name + ".part")
    most, failures = _length(part), 0
    while _length(part) < size:
        try:
            _receive(url, part, size)
            reason = "the connection was closed early"
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            reason = _reason(error)
        # A slow or unreliable host is accepted as long as it sends more.
        failures = 0 if _length(part) > most else failures + 1
        most = max(most, _length(part))
        if failures == ATTEMPTS:
            raise DownloadError(reason)
        if most < size:
            time.sleep(PAUSE_SECONDS * failures)
    if sha256(part) != digest:
        part.unlink()
        raise UserError(
            f"{url} sent something other than {path.name} (its SHA-256 is wrong), "
            "which was deleted: run again, or give another config.dataset.mirror"
        )
    part.rename(path)


def _receive(url: str, part: Path, size: int) -> None:
    """Appends to `part` the bytes that one request brings."""
    have = _length(part)
    # 'identity': some servers would otherwise label a .gz as content to unpack.
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    timeout = (CONNECT_SECONDS, SILENCE_SECONDS)
    with requests.get(url, headers=headers, stream=True, timeout=timeout) as response:
        status = response.status_code
        if 400 <= status < 500 and status not in (408, 429):
            raise DownloadError(f"HTTP {status} {response.reason}")
        response.raise_for_status()
        if status != 206:  # The server does not support Range and sends all of it.
            have = 0
        coming = int(response.headers.get("Content-Length", size - have))
        if have + coming != size:
            raise DownloadError(f"the file there has {have + coming} bytes, not {size}")
        with (
            part.open("ab" if have else "wb") as file,
            tqdm(
                desc=part.stem,
                total=size,
                initial=have,
                unit="B",
                unit_scale=True,
                disable=None,
            ) as progress,
        ):
            # Not iter_content, which unpacks content labelled as compressed.
            for chunk in response.raw.stream(2**14, decode_content=False):
                file.write(chunk)
                progress.update(len(chunk))


def _length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _reason(error: Exception) -> str:
    """A short reason for a long message of requests or urllib3."""
    if isinstance(error, requests.ConnectTimeout):
        return f"no answer in {CONNECT_SECONDS:g} s"
    if isinstance(error, requests.Timeout | urllib3.exceptions.TimeoutError):
        return f"no data for {SILENCE_SECONDS:g} s"
    if isinstance(error, requests.ConnectionError):
        return f"no connection ({type(error).__name__})"
    if isinstance(error, urllib3.exceptions.ProtocolError):
        return "the connection was cut off"
    return str(error)
