"""Files named by URL: their names, and how they are fetched, through fsspec, with tries, pauses and limits of time.

A URL is shown without user, password and query, which may be secrets; so is no text of an error of another library.
Knows no cache and no index. Imports no torch, and fsspec only where a file is fetched.
"""

import errno
import hashlib
import logging
import re
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote, urlsplit

from mae_dist.checksum import sha256
from mae_dist.errors import MachineFault
from mae_dist.paths import is_url
from mae_dist.watchdog import progress

log = logging.getLogger(__name__)
T = TypeVar("T")

PAUSES = (1.0, 2.0, 5.0, 10.0)
"""Seconds before each further try of a request that failed."""
STALL = 60.0
"""Seconds without a byte after which a request counts as failed."""
EXTRAS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub", "abfs": "adlfs"}
"""Packages that read URLs with these schemes; aiohttp reads http:// and https://."""
AGAIN = (408, 425, 429)
"""Statuses from 400 to 499 after which the same request may succeed."""
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Refused(ValueError):
    """A file that the user must change or make readable; trying again does not help."""


class _WrongContent(Exception):
    """A transfer that ended well, but not with the file that was wanted."""


class Remote(NamedTuple):
    """A file: URL, size in bytes, and sha256 (empty: unknown)."""

    url: str
    size: int
    sha256: str = ""

    @property
    def name(self) -> str:
        """Its name in a cache. The query of its URL may be a signature that changes."""
        place = shown(self.url)
        key = hashlib.sha256(f"{place} {self.size} {self.sha256}".encode()).hexdigest()[:16]
        return f"{key}-{self.size}-{re.sub(r'[^A-Za-z0-9_.+-]', '_', name_of(self.url)[-100:])}"


def shown(url: str) -> str:
    """A URL for people: without user, password, query and fragment. A path is shown as it is."""
    if not is_url(url):
        return url
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def name_of(url: str) -> str:
    """The name of the file of a URL, without folder and query."""
    return unquote(urlsplit(url).path).rstrip("/").rpartition("/")[2]


def beside(url: str, name: str) -> str:
    """The URL of the file `name` in the folder of another, with the same query."""
    parts = urlsplit(url)
    return parts._replace(path=f"{parts.path.rpartition('/')[0]}/{name}").geturl()


def fetch_bytes(url: str) -> bytes | None:
    """The content of a small file; None where it cannot be had (for a file that is not there S3 may say 403).

    Raises MachineFault as `attempt`.
    """
    try:
        return attempt(url, lambda system, path: system.cat_file(path))
    except Refused:
        return None


def size_of(url: str) -> int:
    """Size of a file in bytes, as its store says. Raises as `attempt`."""
    size = attempt(url, lambda system, path: system.info(path)).get("size")
    if not isinstance(size, int):
        raise Refused(f"{shown(url)}: the server does not say how long it is (no Content-Length)")
    return size


def download(remote: Remote, part: Path) -> None:
    """Download a file to `part`, and check its size and, where it is known, its sha256. Raises as `attempt`."""

    def action(system: Any, path: str) -> None:
        system.get_file(path, str(part))
        if (length := _length(part)) != remote.size:
            raise _WrongContent(f"has {length} bytes instead of {remote.size}")
        if remote.sha256 and (found := sha256(part)) != remote.sha256:
            raise _WrongContent(f"has the sha256 {found[:16]}... instead of {remote.sha256[:16]}...")

    attempt(remote.url, action, part)


def attempt(url: str, action: Callable[[Any, str], T], part: Path | None = None) -> T:
    """Do ``action(filesystem, path)``, which may write to the file `part`; again after pauses where it fails.

    Raises Refused where another try would not help, or where all tries end with the same wrong content;
    MachineFault with URL, cause and bytes otherwise; OSError where `part` cannot be written.
    """
    causes, wrong = [], False
    for pause in (*PAUSES, None):
        try:
            system, path = _filesystem(url)
            return _watched(partial(action, system, path), part)
        except Exception as caught:
            error = _unwrapped(caught)
            local = isinstance(error, OSError) and (error.errno in DISK_FULL or error.filename == str(part))
            if local:
                raise error from None
            if (refusal := _refusal(url, error)) is not None:
                raise refusal from None  # its text may have secrets
            causes.append(str(error) if isinstance(error, _WrongContent) else _cause(error))
            wrong = isinstance(error, _WrongContent) and len(set(causes)) == 1
        if pause is not None:
            log.warning("%s: %s, %d bytes came; trying again in %g s", shown(url), causes[-1], _length(part), pause)
            time.sleep(pause)
    if wrong:
        raise Refused(
            f"{shown(url)}: {causes[-1]}: it was changed after it was indexed, or is cut short on "
            f"its way; index it again"
        )
    raise MachineFault(
        f"{shown(url)}: not fetched in {len(causes)} tries ({causes[-1]}, {_length(part)} bytes came); the same "
        f"command goes on"
    )


def _filesystem(url: str) -> tuple[Any, str]:
    """The fsspec filesystem of a URL, and the path in it."""
    from fsspec.core import url_to_fs

    options = {}
    if urlsplit(url).scheme in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=STALL, sock_read=STALL)
        options = {"client_kwargs": {"timeout": timeout, "trust_env": True}}  # proxies, ~/.netrc
    return url_to_fs(url, **options)


def _watched(action: Callable[[], T], part: Path | None) -> T:
    """Run `action` in a thread, which is left to itself where `part` does not grow for STALL s (TimeoutError)."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(action())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    length, since = _length(part), time.monotonic()
    while thread.is_alive():
        thread.join(min(1.0, STALL / 4))
        if (now := _length(part)) != length:
            length, since = now, time.monotonic()
            progress()
        elif thread.is_alive() and time.monotonic() - since > STALL:
            raise TimeoutError
    if errors:
        raise errors[0]
    return results[0]


def _length(part: Path | None) -> int:
    """Bytes of a file that is being downloaded; 0 where there is none."""
    try:
        return 0 if part is None else part.stat().st_size
    except FileNotFoundError:
        return 0


def _unwrapped(error: Exception) -> Exception:
    """The first cause: fsspec turns any failure of a HEAD request into a FileNotFoundError."""
    while isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error of a library stands for."""
    found = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    return found if isinstance(found, int) else None


def _cause(error: BaseException) -> str:
    status = _status(error)
    name = "no byte in time" if isinstance(error, TimeoutError) else type(error).__name__
    return name if status is None else f"status {status}"


def _refusal(url: str, error: Exception) -> Refused | None:
    """The error to raise where another try would not help."""
    scheme, status, where = urlsplit(url).scheme, _status(error), shown(url)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return Refused(f"{where}: there is no such file")
    if isinstance(error, ImportError):
        package = EXTRAS.get(scheme, "aiohttp" if scheme in ("http", "https") else scheme)
        return Refused(f"{where}: {scheme}:// needs the package {package}; install it: pip install {package}")
    if isinstance(error, PermissionError) or status in (401, 403) or type(error).__name__.endswith("CredentialsError"):
        return Refused(f"{where}: access is refused ({_cause(error)}); check the credentials of {scheme}://")
    if isinstance(error, ValueError | TypeError) or (status and 400 <= status < 500 and status not in AGAIN):
        return Refused(f"{where}: cannot be opened ({_cause(error)}); is the URL right?")
    return None
