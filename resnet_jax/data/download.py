"""A download that can be cut off and resumed, and is checked before it is used."""

import hashlib
import time
from pathlib import Path

import requests
import urllib3
from tqdm import tqdm

from resnet_jax import UserError

CONNECT_SECONDS = 10.0
SILENCE_SECONDS = 30.0
ATTEMPTS = 3  # in a row that bring nothing new
PAUSE_SECONDS = 1.0


class DownloadError(Exception):
    """Why a file could not be downloaded, in a few words."""


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(url: str, path: Path, *, size: int, digest: str) -> None:
    """Downloads a file to `path`, where it appears only once it is whole and right.

    The bytes received so far stay in `path` + '.part', also when the program is
    stopped, and the next call resumes from there, if the server knows the Range header.

    Args:
      url: where the file is.
      path: where to put it; its folder exists.
      size: its length in bytes.
      digest: its SHA-256, in hexadecimal.

    Raises:
      DownloadError: the server does not have it or does not answer, after a few
        attempts.
      UserError: another file came; it is deleted.
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
            f"The file from {url} is not {path.name}: its SHA-256 is wrong. It is "
            "deleted; run again, or give another config.dataset.mirror"
        )
    part.rename(path)


def _receive(url: str, part: Path, size: int) -> None:
    """Appends to `part` the bytes that one request brings."""
    have = _length(part)
    # 'identity': some servers would label a .gz as compressed, to be unpacked.
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    timeout = (CONNECT_SECONDS, SILENCE_SECONDS)
    with requests.get(url, headers=headers, stream=True, timeout=timeout) as response:
        status = response.status_code
        if 400 <= status < 500 and status not in (408, 429):
            raise DownloadError(f"HTTP {status} {response.reason}")
        response.raise_for_status()
        if status != 206:  # The server does not know Range and sends all of it.
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
