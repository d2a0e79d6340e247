"""Download a released file with a progress bar, continue after an interruption, and check its MD5.

The authors put the start of a file's MD5 into its name (`model_final_94dc52.pkl`). A file has its own name only once
that has been checked; until then it is called `….part`.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import time
from collections.abc import Iterator
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from huggingface_hub import constants
from tqdm.auto import tqdm


ATTEMPTS = 5
TIMEOUT = 60.0  # seconds without a byte
_CHUNK = 2**20
_DIGEST = re.compile(r"_([0-9a-f]{6,32})\.\w+$")
_BY_HAND = "get the file in another way and pass it with --checkpoint"


class DownloadError(OSError):
    """The file could not be fetched, or is not the one that was released; the message says what to do."""


class _Interrupted(Exception):
    """The connection broke off; what has arrived is kept."""


def default_cache_dir() -> Path:
    """Return the folder of downloads: `m2f_hf` among Hugging Face's caches (`HF_HOME`)."""
    return Path(constants.HF_HOME) / "m2f_hf"


def digest_in_name(name: str) -> str | None:
    """Return the start of the MD5 that a released file's name ends with, or None."""
    match = _DIGEST.search(name)
    return match[1] if match else None


def md5_of(path: Path) -> str:
    """Return the MD5 of a file, in hexadecimal."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def download(url: str, folder: Path) -> Path:
    """Fetch a file into a folder, unless it is there already, and check it against the digest in its name.

    A download that broke off, now or in an earlier run, is continued where the server allows that.

    Args:
        url: Its last part is the file's name, with the start of the MD5 (`model_final_94dc52.pkl`).
        folder: Made if need be.

    Raises:
        ValueError: The name has no digest to check against.
        DownloadError: The server can't be reached, doesn't have the file or breaks off again and again; or the file
            is another than its name says. In the last case nothing of it is kept.
    """
    name = urlsplit(url).path.rpartition("/")[2]
    digest = digest_in_name(name)
    if digest is None:
        raise ValueError(f"{name} does not say its MD5, so that a download could not be checked.")
    target, partial = folder / name, folder / f"{name}.part"
    if target.is_file() and md5_of(target).startswith(digest):
        return target
    folder.mkdir(parents=True, exist_ok=True)
    _fetch_persistently(url, partial)
    actual = md5_of(partial)
    if not actual.startswith(digest):
        partial.unlink()
        raise DownloadError(
            f"What came from {url} is not the released file: its MD5 begins with {actual[: len(digest)]} instead of "
            f"{digest}. It was removed. Run again to fetch it once more; if it comes out the same, {_BY_HAND}."
        )
    os.replace(partial, target)
    return target


def _fetch_persistently(url: str, partial: Path) -> None:
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _fetch(url, partial)
            return
        except _Interrupted as error:
            if attempt == ATTEMPTS:
                raise DownloadError(
                    f"The download of {url} broke off {ATTEMPTS} times ({error}). What has arrived is kept in "
                    f"{partial}: run again to continue, or {_BY_HAND}."
                ) from error
            tqdm.write(f"The connection broke off ({error}); continuing.", file=sys.stderr)
            time.sleep(attempt - 1)
        except HTTPError as error:
            raise DownloadError(
                f"{urlsplit(url).netloc} answers {error.code} {error.reason} for {url}: {_BY_HAND}."
            ) from error
        except (URLError, HTTPException, TimeoutError, ConnectionError) as error:
            raise DownloadError(
                f"{urlsplit(url).netloc} cannot be reached ({getattr(error, 'reason', error)}). Behind a proxy, set "
                f"HTTPS_PROXY; without network, {_BY_HAND}. The address is {url}."
            ) from error


def _fetch(url: str, partial: Path) -> None:
    """Download the rest of `partial`, or the whole file where the server can't send a part."""
    have = partial.stat().st_size if partial.is_file() else 0
    headers = {"User-Agent": "m2f_hf", **({"Range": f"bytes={have}-"} if have else {})}
    try:
        response = urlopen(Request(url, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        if error.code != 416:
            raise
        if error.headers.get("Content-Range") == f"bytes */{have}":
            return  # it was all there
        partial.unlink()
        raise _Interrupted("the part that had arrived is longer than the file") from error
    with response:
        if response.status == 206 and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            partial.unlink()
            raise _Interrupted("the server continued at another place")
        start = have if response.status == 206 else 0
        length = response.headers.get("Content-Length")
        total = None if length is None else start + int(length)
        _save(response, partial, start, total)
    size = partial.stat().st_size
    if total is not None and size < total:
        raise _Interrupted(f"after {size:,} of {total:,} bytes")


def _save(response: HTTPResponse, partial: Path, start: int, total: int | None) -> None:
    bar = tqdm(total=total, initial=start, unit="B", unit_scale=True, unit_divisor=1024, desc=partial.stem)
    with bar, partial.open("ab" if start else "wb") as file:
        for chunk in _chunks(response):
            file.write(chunk)
            bar.update(len(chunk))


def _chunks(response: HTTPResponse) -> Iterator[bytes]:
    try:
        while chunk := response.read(_CHUNK):
            yield chunk
    except (OSError, HTTPException) as error:
        raise _Interrupted(str(error) or type(error).__name__) from error
