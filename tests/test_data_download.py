"""The downloader against servers on the loopback that misbehave in every usual way."""

import http.server
import socket
import threading
import time
from dataclasses import dataclass, field

import pytest

from pof.data.download import Downloader, DownloadFailed
from pof.data.official import Packed
from pof.errors import PofError
from tests.data_archives import md5

CONTENT = bytes(range(256)) * 1024


@dataclass
class Behaviour:
    """How the server answers; what it was asked for."""

    content: bytes = CONTENT
    status: int = 200
    ranges: bool = True
    truncate: list[int] = field(default_factory=list)
    chunk: int = 1 << 16
    pause: float = 0.0
    announce_length: bool = True
    asked: list[str] = field(default_factory=list)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        behaviour = self.server.behaviour
        asked = self.headers.get("Range", "")
        behaviour.asked.append(asked)
        if behaviour.status != 200:
            self.send_error(behaviour.status)
            return
        start = int(asked[6:-1]) if asked and behaviour.ranges else 0
        body = behaviour.content[start:]
        self.send_response(206 if start else 200)
        if start:
            end, size = len(behaviour.content) - 1, len(behaviour.content)
            self.send_header("Content-Range", f"bytes {start}-{end}/{size}")
        if behaviour.announce_length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if behaviour.truncate:
            body = body[: behaviour.truncate.pop(0)]
        try:
            for at in range(0, len(body), behaviour.chunk):
                self.wfile.write(body[at : at + behaviour.chunk])
                time.sleep(behaviour.pause)
        except OSError:
            pass  # the client has had enough

    def log_message(self, *args):
        pass


@pytest.fixture
def serve():
    servers = []

    def start(**behaviour):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        server.behaviour = Behaviour(**behaviour)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/file", server.behaviour

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def target(tmp_path):
    return tmp_path / "data" / "file.gz"


def packed(*urls, content=CONTENT):
    return Packed("file.gz", md5(content), len(content), urls, ("file",))


def part(target):
    return target.with_name("file.gz.part")


def closed_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/file"


def test_whole_file(serve, target):
    url, behaviour = serve()
    assert Downloader().fetch(packed(url), target) == url
    assert target.read_bytes() == CONTENT
    assert not part(target).exists()
    assert behaviour.asked == [""]


@pytest.mark.parametrize("announce_length", [True, False])
def test_broken_connection_is_resumed(serve, target, announce_length):
    url, behaviour = serve(truncate=[100_000, 50_000], announce_length=announce_length)
    Downloader().fetch(packed(url), target)
    assert target.read_bytes() == CONTENT
    assert behaviour.asked == ["", "bytes=100000-", "bytes=150000-"]


def test_part_of_an_earlier_process_is_resumed(serve, target):
    url, behaviour = serve()
    target.parent.mkdir()
    part(target).write_bytes(CONTENT[:1000])
    Downloader().fetch(packed(url), target)
    assert target.read_bytes() == CONTENT
    assert behaviour.asked == ["bytes=1000-"]


def test_whole_part_needs_no_transfer(serve, target):
    url, behaviour = serve()
    target.parent.mkdir()
    part(target).write_bytes(CONTENT)
    Downloader().fetch(packed(url), target)
    assert target.read_bytes() == CONTENT
    assert behaviour.asked == []


@pytest.mark.parametrize("stale", [b"x" * 1000, b"x" * len(CONTENT), b"x" * (len(CONTENT) + 1)])
def test_wrong_part_is_started_afresh(serve, target, stale):
    url, behaviour = serve()
    target.parent.mkdir()
    part(target).write_bytes(stale)
    Downloader().fetch(packed(url), target)
    assert target.read_bytes() == CONTENT
    assert behaviour.asked[-1] == ""


def test_server_without_ranges_is_restarted(serve, target):
    url, behaviour = serve(ranges=False)
    target.parent.mkdir()
    part(target).write_bytes(CONTENT[:1000])
    Downloader().fetch(packed(url), target)
    assert target.read_bytes() == CONTENT
    assert behaviour.asked == ["bytes=1000-"]


def test_always_broken_off_is_never_taken_for_whole(serve, target):
    url, behaviour = serve(ranges=False, truncate=[1000] * 10)
    with pytest.raises(DownloadFailed, match=f"broke off after 1000 of {len(CONTENT)} bytes"):
        Downloader().fetch(packed(url), target)
    assert not target.exists()
    assert part(target).stat().st_size == 1000
    assert len(behaviour.asked) == 2


def test_wrong_content_goes_on_to_the_mirror(serve, target):
    wrong, _ = serve(content=b"y" * len(CONTENT))
    mirror, _ = serve()
    assert Downloader().fetch(packed(wrong, mirror), target) == mirror
    assert target.read_bytes() == CONTENT


def test_part_of_one_mirror_is_resumed_at_the_next(serve, target):
    first, _ = serve(truncate=[5000, 0, 0, 0])
    second, behaviour = serve()
    Downloader().fetch(packed(first, second), target)
    assert target.read_bytes() == CONTENT
    assert behaviour.asked == ["bytes=5000-"]


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ({"content": b"y" * len(CONTENT)}, "wrong content, md5:"),
        ({"content": b"<html>log in</html>"}, f"serves 19 bytes instead of {len(CONTENT)}"),
        ({"content": CONTENT + b"z"}, "serves"),
        ({"content": CONTENT + b"z", "announce_length": False}, "broke off"),
        ({"status": 404}, "HTTP 404 Not Found"),
        ({"status": 503}, "HTTP 503"),
    ],
)
def test_reason_names_host_and_failure(serve, target, behaviour, reason):
    url, _ = serve(**behaviour)
    with pytest.raises(DownloadFailed) as error:
        Downloader().fetch(packed(url, closed_port()), target)
    first, second = error.value.reasons
    assert first.startswith("127.0.0.1:")
    assert reason in first
    assert "cannot be reached (Connection refused)" in second
    assert not target.exists()


def test_silent_server_is_left(serve, target):
    url, _ = serve(chunk=1000, pause=5.0)
    before = time.monotonic()
    with pytest.raises(DownloadFailed, match=r"silent for 0\.2 s"):
        Downloader(read_seconds=0.2, attempts=2).fetch(packed(url), target)
    assert time.monotonic() - before < 3


def test_trickling_server_is_left(serve, target):
    url, _ = serve(chunk=10, pause=0.02)
    before = time.monotonic()
    with pytest.raises(DownloadFailed, match="too slow"):
        Downloader(window_seconds=0.3, attempts=2).fetch(packed(url), target)
    assert time.monotonic() - before < 3


def test_host_that_never_answers_is_asked_once(target):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/file"
        downloader = Downloader(answer_seconds=0.3)
        for _ in range(5):
            before = time.monotonic()
            with pytest.raises(DownloadFailed, match=r"no answer within 0\.3 s"):
                downloader.fetch(packed(url), target)
            later = time.monotonic() - before
        assert later < 0.1


def test_folder_that_cannot_be_written(serve, tmp_path):
    url, _ = serve()
    (tmp_path / "data").write_text("a file, no folder")
    with pytest.raises(PofError, match="data cannot be written here"):
        Downloader().fetch(packed(url), tmp_path / "data" / "file.gz")
