"""Download one file from the first of several addresses that serves it whole.

The bytes go to a `.part` file beside the target, which a later attempt resumes; it is renamed
only after the checksum holds. Every wait is bounded: for an answer, for the next bytes, and for
a connection that trickles.
"""

import contextlib
import http.client
import logging
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pof.data.official import Packed
from pof.data.storage import checksum, writing_into

_log = logging.getLogger(__name__)
_CHUNK = 1 << 16


class _Failed(Exception):
    """This address did not serve the file; the message says why."""


class _HostDead(_Failed):
    """The host cannot be reached at all."""


class DownloadFailed(Exception):
    """No address served the file.

    Attributes:
        reasons: "HOST: why", one for each address.
    """

    def __init__(self, reasons: Sequence[str]) -> None:
        super().__init__("; ".join(reasons))
        self.reasons = tuple(reasons)


@dataclass
class Downloader:
    """Downloads files; remembers, as long as it lives, which hosts cannot be reached.

    Attributes:
        answer_seconds: A host that has not answered by then is left alone, name look-up and
            redirections included.
        read_seconds: The longest silence within a transfer.
        window_seconds: In each window of this length …
        window_bytes: … at least so many bytes have to arrive.
        attempts: Transfers started at one address, resumed ones included.
    """

    answer_seconds: float = 10.0
    read_seconds: float = 15.0
    window_seconds: float = 60.0
    window_bytes: int = 64 * 1024
    attempts: int = 4
    _dead: dict[str, str] = field(default_factory=dict, init=False, repr=False)

    def fetch(self, packed: Packed, target: Path) -> str:
        """Download a file.

        Args:
            packed: What to download, from where, and its checksum.
            target: Where it goes.

        Returns:
            The address that served it.

        Raises:
            DownloadFailed: No address served the file.
            PofError: The folder cannot be written.
        """
        part = target.with_name(f"{target.name}.part")
        reasons: list[str] = []
        for url in packed.urls:
            host = urlsplit(url).netloc
            try:
                if host in self._dead:
                    raise _Failed(self._dead[host])
                _log.info("downloading %s (%.0f MB) from %s", packed.name, packed.size / 1e6, host)
                self._fetch_from(url, packed, part)
            except _Failed as failure:
                _log.info("%s: %s", host, failure)
                reasons.append(f"{host}: {failure}")
                if isinstance(failure, _HostDead):
                    self._dead[host] = str(failure)
                continue
            with writing_into(target.parent):
                part.replace(target)
            return url
        raise DownloadFailed(reasons)

    def _fetch_from(self, url: str, packed: Packed, part: Path) -> None:
        """Transfer, resume, and start afresh once if what was resumed turns out wrong."""
        with writing_into(part.parent):
            part.parent.mkdir(parents=True, exist_ok=True)
        failure = _Failed("no attempt")
        for _ in range(self.attempts):
            start = part.stat().st_size if part.exists() else 0
            try:
                if start < packed.size:
                    self._transfer(url, packed, part, start)
            except _HostDead:
                raise
            except _Failed as error:
                failure = error
                if not part.exists() or part.stat().st_size <= start:
                    raise  # no progress: this address will not do better a second time
                continue
            found = checksum(part, packed.checksum.partition(":")[0])
            if found == packed.checksum:
                return
            size = part.stat().st_size
            part.unlink()
            failure = _Failed(f"wrong content, {found} ({size} bytes) for {packed.checksum}")
            if start == 0:
                raise failure
        raise failure

    def _transfer(self, url: str, packed: Packed, part: Path, start: int) -> None:
        response = self._open(url, start)
        with contextlib.closing(response):
            resumed = response.status == 206 and response.headers.get(
                "Content-Range", ""
            ).startswith(f"bytes {start}-")
            if start and not resumed:
                start = 0
            length = response.headers.get("Content-Length")
            if length is not None and length.isdigit() and start + int(length) != packed.size:
                raise _Failed(f"serves {start + int(length)} bytes instead of {packed.size}")
            with writing_into(part.parent), part.open("ab" if start else "wb") as file:
                size = start
                for chunk in self._read(response):
                    size += len(chunk)
                    if size > packed.size:
                        break
                    file.write(chunk)
        if size != packed.size:
            if size > packed.size:
                part.unlink()
            raise _Failed(f"broke off after {size} of {packed.size} bytes")

    def _open(self, url: str, start: int) -> Any:
        """The response, or _Failed; in a thread, since a name look-up knows no time limit."""
        request = urllib.request.Request(
            url, headers={"Accept-Encoding": "identity", "User-Agent": "pof-data/1"}
        )
        if start:
            request.add_header("Range", f"bytes={start}-")
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def ask() -> None:
            try:
                answers.put(urllib.request.urlopen(request, timeout=self.read_seconds))
            except Exception as error:  # handed over to the waiting thread
                answers.put(error)

        threading.Thread(target=ask, daemon=True).start()
        try:
            answer = answers.get(timeout=self.answer_seconds)
        except queue.Empty:
            raise _HostDead(f"no answer within {self.answer_seconds:g} s") from None
        if isinstance(answer, urllib.error.HTTPError):
            answer.close()
            raise _Failed(f"HTTP {answer.code} {answer.reason}") from answer
        if isinstance(answer, urllib.error.URLError):
            raise _HostDead(f"cannot be reached ({_reason(answer.reason)})") from answer
        if isinstance(answer, OSError | http.client.HTTPException):
            raise _HostDead(f"cannot be reached ({_reason(answer)})") from answer
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _read(self, response: Any) -> Iterator[bytes]:
        window_end = time.monotonic() + self.window_seconds
        received = 0
        while True:
            try:
                chunk = response.read1(_CHUNK)
            except TimeoutError as error:
                raise _Failed(f"silent for {self.read_seconds:g} s") from error
            except (OSError, http.client.HTTPException) as error:
                raise _Failed(f"broke off ({_reason(error)})") from error
            if not chunk:
                return
            yield chunk
            received += len(chunk)
            if time.monotonic() >= window_end:
                if received < self.window_bytes:
                    raise _Failed(f"too slow, {received} bytes in {self.window_seconds:g} s")
                window_end = time.monotonic() + self.window_seconds
                received = 0


def _reason(error: object) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
