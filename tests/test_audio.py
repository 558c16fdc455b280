"""Audio from where jobs have it: what is fetched, what is refused, what no address of a caller's reaches, and what a file looks like."""

from __future__ import annotations

import base64
import contextlib
import ipaddress
import math
import os
import socket
import ssl
import struct
import threading
import time
import tracemalloc
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import attrs
import pytest
import trustme
from fake_whisperx import silence
from hypothesis import given
from hypothesis import strategies as st

from providers import CANCELLED, INVALID_INPUT, Job, Never, NotCompleted, NotNow
from providers.audio import AUDIO_UNAVAILABLE, Audio, AudioSettings, audio_of, is_public, private_hosts
from providers.conformance import closed_port, silent_server, timed
from providers.settings import read_settings

HERE = {"AUDIO_PRIVATE_HOSTS": "127.0.0.1"}
WAV = silence(2)


def settings_of(**environ: str) -> AudioSettings:
    return read_settings(AudioSettings, environ)


def job_with(input_: Any, **changes: Any) -> Job:
    facts = {"owner_service": "tests", "owner_ref": "audio", "task_type": "transcribe", "model_profile": "whisperx"}
    return Job(id=str(uuid.uuid4()), input=input_, **(facts | changes))


@attrs.frozen
class Got:
    """The audio of a job, and its bytes, which cannot be had later."""

    audio: Audio
    content: bytes


def got(input_: Any, environ: Mapping[str, str] = HERE, **changes: Any) -> Got:
    with audio_of(job_with(input_, **changes), settings_of(**environ)) as audio:
        return Got(audio, b"".join(audio.blocks()))


def failure_of(input_: Any, environ: Mapping[str, str] = HERE, **changes: Any) -> NotCompleted:
    with pytest.raises(NotCompleted) as raised:
        got(input_, environ, **changes)
    return raised.value


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


# ---------------------------------------------------------------- a server of files

Behaviour = Callable[["_Handler"], None]


class Files(ThreadingHTTPServer):
    """A server of files, on a free port of an address of this machine. A context manager."""

    daemon_threads = True

    def __init__(self, paths: Mapping[str, Behaviour | bytes] | None = None, address: str = "127.0.0.1", port: int = 0) -> None:
        super().__init__((address, port), _Handler)
        self.paths = dict(paths or {})
        self.seen: list[tuple[str, dict[str, str]]] = []
        self.closing = threading.Event()
        self.began = threading.Event()

    @property
    def url(self) -> str:
        return f"http://{self.server_address[0]}:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients hang up on purpose here."""

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, _type: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Files

    def do_GET(self) -> None:
        self.server.seen.append((self.path, dict(self.headers)))
        self.server.began.set()
        answer = self.server.paths.get(self.path.partition("?")[0], answers(404))
        (sends(answer) if isinstance(answer, bytes) else answer)(self)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 -- the name http.server calls
        """Quiet."""


def sends(content: bytes, **headers: str) -> Behaviour:
    """A file; a header's name is written with `_` for `-`."""
    return answers(200, content, **headers)


def answers(status: int, content: bytes = b"", **headers: str) -> Behaviour:
    def behave(handler: _Handler) -> None:
        handler.send_response(status)
        for name, value in ({"Content_Length": str(len(content))} | headers).items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(content)

    return behave


def chunked(block: bytes, count: int, between_seconds: float = 0.0) -> Behaviour:
    """The block so often, without telling how long it will be."""

    def behave(handler: _Handler) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for _ in range(count):
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(block), block))
            if handler.server.closing.wait(between_seconds):
                return
        handler.wfile.write(b"0\r\n\r\n")

    return behave


@pytest.fixture
def files() -> Iterator[Files]:
    with Files({"/call.wav": WAV}) as running:
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of recordings, with a secret beside it."""
    inside = tmp_path / "recordings"
    (inside / "2026").mkdir(parents=True)
    (inside / "2026" / "call.wav").write_bytes(WAV)
    (tmp_path / "secret.wav").write_bytes(b"secret")
    (tmp_path / "recordings-of-others").mkdir()
    (tmp_path / "recordings-of-others" / "call.wav").write_bytes(b"secret")
    return inside


# ---------------------------------------------------------------- sources


def test_all_sources_give_the_same_file(files: Files, folder: Path) -> None:
    environ = HERE | {"AUDIO_FOLDER": str(folder)}
    inputs = ({"audio_url": f"{files.url}/call.wav"}, {"audio_base64": encoded(WAV)}, {"audio_path": "2026/call.wav"})
    for one in (got(input_, environ) for input_ in inputs):
        assert one.content == WAV
        assert (one.audio.size, one.audio.suffix, one.audio.seconds, one.audio.defect) == (len(WAV), "wav", 2.0, None)


def test_a_file_can_be_read_again_from_its_beginning() -> None:
    with audio_of(job_with({"audio_base64": encoded(WAV)}), settings_of()) as audio:
        assert b"".join(audio.blocks()) == b"".join(audio.blocks()) == WAV


@pytest.mark.parametrize("input_", [{}, {"audio_url": None}, {"audio_url": "http://a", "audio_path": "b"}, {"audio_path": 5}], ids=str)
def test_there_must_be_exactly_one_source(input_: Any) -> None:
    outcome = failure_of(input_)
    assert isinstance(outcome, Never)
    assert outcome.category == INVALID_INPUT


@pytest.mark.parametrize("text", [encoded(WAV), base64.encodebytes(WAV).decode(), encoded(WAV).replace("A", "A\r\n", 5)])
def test_base64_may_be_broken_into_lines(text: str) -> None:
    assert got({"audio_base64": text}).content == WAV


NO_BASE64 = ("YQ=", "Y", "YQ==YQ==", "a b+", "__--", "é", "data:audio/wav;base64,YQ==", "A" * 65_534 + "==AAAA")


@pytest.mark.parametrize("text", NO_BASE64, ids=lambda text: text[:20])
def test_what_is_no_base64_is_final(text: str) -> None:
    outcome = failure_of({"audio_base64": text})
    assert isinstance(outcome, Never)
    assert outcome.message.startswith("audio_base64 is not base64")


def test_large_base64_is_decoded_whole() -> None:
    content = os.urandom(300_001)
    assert got({"audio_base64": encoded(content)}).content == content


@pytest.mark.parametrize("source", ["audio_url", "audio_base64", "audio_path", "of unknown length", "by its own word"])
def test_a_file_that_is_too_big_is_final(source: str, files: Files, folder: Path) -> None:
    files.paths["/endless"] = chunked(b"x" * 10_000, 1_000_000, 0.001)
    values = {"audio_url": f"{files.url}/call.wav", "audio_base64": encoded(WAV), "audio_path": "2026/call.wav"}
    files.paths["/promised"] = sends(b"", Content_Length="60001")
    values |= {"of unknown length": f"{files.url}/endless", "by its own word": f"{files.url}/promised"}
    input_ = {source if source.startswith("audio") else "audio_url": values[source]}
    outcome = failure_of(input_, HERE | {"AUDIO_FOLDER": str(folder), "AUDIO_MAX_BYTES": "60000"})
    assert isinstance(outcome, Never)
    assert outcome.message == "the audio has more than 60000 bytes (AUDIO_MAX_BYTES)"


@pytest.mark.parametrize("input_", [{"audio_base64": ""}, {"audio_base64": "\n"}, {"audio_path": "empty"}, {"audio_url": ""}], ids=str)
def test_an_empty_file_is_final(input_: dict[str, str], files: Files, folder: Path) -> None:
    (folder / "empty").write_bytes(b"")
    files.paths["/empty"] = b""
    if "audio_url" in input_:
        input_ = {"audio_url": f"{files.url}/empty"}
    outcome = failure_of(input_, HERE | {"AUDIO_FOLDER": str(folder)})
    assert isinstance(outcome, Never)
    assert outcome.message.endswith("the audio is empty")


def test_memory_stays_small(files: Files) -> None:
    files.paths["/long"] = chunked(bytes(65_536), 480)  # 31 MB
    tracemalloc.start()
    try:
        with audio_of(job_with({"audio_url": f"{files.url}/long"}), settings_of(**HERE)) as audio:
            size = sum(map(len, audio.blocks()))
        assert size == audio.size == 480 * 65_536
        assert tracemalloc.get_traced_memory()[1] < 12_000_000
    finally:
        tracemalloc.stop()


# ---------------------------------------------------------------- paths


@pytest.mark.parametrize(
    "path",
    [
        "../secret.wav",
        "2026/../../secret.wav",
        "/etc/hostname",
        "../recordings-of-others/call.wav",
        "link-out",
        "linked-folder/secret.wav",
        "2026/call.wav\0",
    ],
)
def test_no_path_leads_out_of_the_folder(folder: Path, path: str) -> None:
    (folder / "link-out").symlink_to(folder.parent / "secret.wav")
    (folder / "linked-folder").symlink_to(folder.parent)
    outcome = failure_of({"audio_path": path}, {"AUDIO_FOLDER": str(folder)})
    assert isinstance(outcome, Never)
    assert outcome.message == "audio_path leads out of AUDIO_FOLDER"


def test_links_and_whole_paths_within_the_folder_are_followed(folder: Path) -> None:
    (folder / "latest").symlink_to("2026")
    (folder.parent / "mounted").symlink_to(folder)
    for root in (folder, folder.parent / "mounted"):
        for path in ("latest/call.wav", str(folder / "2026" / "call.wav"), "2026/../2026//./call.wav"):
            assert got({"audio_path": path}, {"AUDIO_FOLDER": str(root)}).content == WAV


@pytest.mark.parametrize("link", ["file", "folder"])
def test_a_link_put_there_after_the_look_is_not_followed(folder: Path, monkeypatch: pytest.MonkeyPatch, link: str) -> None:
    (folder / "file").symlink_to(folder.parent / "secret.wav")
    (folder / "folder").symlink_to(folder.parent)
    # As if the links had not been there when the path was resolved.
    monkeypatch.setattr(os.path, "realpath", os.path.abspath)
    outcome = failure_of({"audio_path": {"file": "file", "folder": "folder/secret.wav"}[link]}, {"AUDIO_FOLDER": str(folder)})
    assert isinstance(outcome, Never)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("nothing.wav", "audio_path: No such file or directory"),
        ("2026/call.wav/x", "audio_path: Not a directory"),
        ("x" * 300, "audio_path: File name too long"),
        ("2026", "audio_path is not a file"),
        ("", "audio_path is not a file"),
        ("pipe", "audio_path is not a file"),
        ("socket", "audio_path: No such device or address"),
    ],
    ids=lambda value: value[:30],
)
def test_what_is_no_file_is_final(folder: Path, path: str, said: str) -> None:
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as listener, contextlib.chdir(folder):
        listener.bind("socket")
        outcome = failure_of({"audio_path": path}, {"AUDIO_FOLDER": str(folder)})
    assert isinstance(outcome, Never)
    assert outcome.message == said


def test_a_folder_that_is_away_is_not_the_jobs_fault(folder: Path) -> None:
    outcome = failure_of({"audio_path": "call.wav"}, {"AUDIO_FOLDER": str(folder / "unmounted")})
    assert isinstance(outcome, NotNow)
    assert outcome.category == AUDIO_UNAVAILABLE


def test_a_file_that_shrinks_while_it_is_read_is_told(folder: Path) -> None:
    path = folder / "long.wav"
    path.write_bytes(bytes(200_000))
    with audio_of(job_with({"audio_path": "long.wav"}), settings_of(AUDIO_FOLDER=str(folder))) as audio:
        os.truncate(path, 100_000)
        with pytest.raises(NotNow) as raised:
            list(audio.blocks())
    assert raised.value.category == AUDIO_UNAVAILABLE


def test_no_descriptor_is_left_open(folder: Path) -> None:
    before = descriptors()
    for path in ("2026/call.wav", "2026", "nothing", "2026/call.wav/x", "../secret.wav") * 20:
        with contextlib.suppress(Never):
            got({"audio_path": path}, {"AUDIO_FOLDER": str(folder)})
    assert descriptors() < before + 15


def descriptors() -> int:
    """How many this process has open."""
    return len(os.listdir("/dev/fd"))  # noqa: PTH208 -- what it names is gone when it is looked at


# ---------------------------------------------------------------- fetching


def test_a_request_tells_the_host_and_nothing_about_us(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    got({"audio_url": f"{files.url}/call.wav?signature=a%2Fb#part"})
    path, headers = files.seen[0]
    assert path == "/call.wav?signature=a%2Fb"
    assert headers.pop("Host") == files.url.removeprefix("http://")
    assert headers == {"Accept": "*/*", "Accept-Encoding": "identity", "User-Agent": "ai-service"}


# What the other server answers, and what becomes of the job: later, or never.
@pytest.mark.parametrize(
    ("behaviour", "kind"),
    [
        (answers(401), Never),
        (answers(403), Never),
        (answers(404), Never),
        (answers(410), Never),
        (answers(204), Never),
        (answers(206, WAV), Never),
        (answers(304), Never),
        (sends(WAV, Content_Encoding="gzip"), Never),
        (answers(408), NotNow),
        (answers(425), NotNow),
        (answers(429), NotNow),
        (answers(500), NotNow),
        (answers(503), NotNow),
        (sends(WAV[:1_000], Content_Length=str(len(WAV)), Connection="close"), NotNow),
        (lambda handler: handler.connection.shutdown(socket.SHUT_RDWR), NotNow),
    ],
    ids=["401", "403", "404", "410", "204", "206", "304", "gzip", "408", "425", "429", "500", "503", "cut", "reset"],
)
def test_what_another_server_does_has_its_class(files: Files, behaviour: Behaviour, kind: type[NotCompleted]) -> None:
    files.paths["/call.wav"] = behaviour
    outcome = failure_of({"audio_url": f"{files.url}/call.wav?signature=secret-value"})
    assert type(outcome) is kind
    assert outcome.category == (INVALID_INPUT if kind is Never else AUDIO_UNAVAILABLE)
    assert outcome.message.startswith("audio_url: ")
    assert "call.wav" not in outcome.message
    assert "secret-value" not in outcome.message


def test_the_other_servers_delay_is_honoured(files: Files) -> None:
    files.paths["/call.wav"] = answers(503, Retry_After="70")
    outcome = failure_of({"audio_url": f"{files.url}/call.wav"})
    assert isinstance(outcome, NotNow)
    assert (outcome.retry_in_seconds, outcome.burns_attempt) == (70.0, True)


def test_redirects_are_followed_a_few_times(files: Files) -> None:
    for number in range(9):
        files.paths[f"/{number}"] = answers((301, 302, 303, 307, 308)[number % 5], Location=f"/{number + 1}")
    files.paths["/9"] = WAV
    assert got({"audio_url": f"{files.url}/4"}).content == WAV
    outcome = failure_of({"audio_url": f"{files.url}/3"})
    assert isinstance(outcome, Never)
    assert "more than 5 times" in outcome.message
    assert len(files.seen) == 12


@pytest.mark.parametrize("headers", [{}, {"Location": ""}, {"Location": "/loop"}], ids=str)
def test_a_redirect_to_itself_ends(files: Files, headers: Mapping[str, str]) -> None:
    files.paths["/loop"] = answers(302, **headers)
    assert isinstance(failure_of({"audio_url": f"{files.url}/loop"}), Never)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "call.wav",
        "//host/call.wav",
        "ftp://host/call.wav",
        "file:///etc/passwd",
        "gopher://host/",
        "http://",
        "http:///path",
        "http://host:port/",
        "http://host:99999/",
        "http://user:password@host/",
        "http://user@host/",
        "http://ho st/",
        "http://host\\@other/",
        "http://host/\r\nHost: other",
        "http://host/\u00e9",
        "http://[::1/",
        "http://" + "a" * 9_000,
    ],
    ids=lambda url: url[:40],
)
def test_an_address_that_cannot_be_used_is_final(url: str) -> None:
    outcome = failure_of({"audio_url": url})
    assert isinstance(outcome, Never)
    assert outcome.message.startswith("audio_url must ")
    assert "password" not in outcome.message


@pytest.mark.parametrize(
    "location", ["ftp://127.0.0.1/call.wav", "file:///etc/passwd", "http://user:password@127.0.0.1/", "http://é/", "http://["]
)
def test_a_redirect_must_lead_to_what_could_have_been_asked_for(files: Files, location: str) -> None:
    files.paths["/moved"] = answers(302, Location=location.encode().decode("latin-1"))
    assert isinstance(failure_of({"audio_url": f"{files.url}/moved"}), Never)


def test_a_server_that_cannot_be_reached_is_tried_later() -> None:
    with closed_port() as nobody:
        outcome = failure_of({"audio_url": f"{nobody}/call.wav?secret-value"})
    assert isinstance(outcome, NotNow)
    assert (outcome.category, outcome.message) == (AUDIO_UNAVAILABLE, f"audio_url: cannot reach {nobody}: Connection refused")


@pytest.mark.parametrize("silent", [True, False], ids=["silent", "trickling"])
def test_a_download_has_a_limit(files: Files, silent: bool) -> None:
    files.paths["/slow"] = chunked(b"x", 1_000_000, 0.01)
    with silent_server() as nothing:
        url = f"{nothing if silent else files.url}/slow"
        outcome, seconds = timed(lambda: failure_of({"audio_url": url}, HERE | {"AUDIO_URL_TIMEOUT": "0.4"}))
        late, _ = timed(lambda: failure_of({"audio_url": url}, deadline=time.monotonic() + 0.4))
    assert {outcome.category, late.category} == {AUDIO_UNAVAILABLE}
    assert 0.3 < seconds < 5


@pytest.mark.parametrize("silent", [True, False], ids=["silent", "trickling"])
def test_cancel_reaches_a_download(files: Files, silent: bool) -> None:
    files.paths["/slow"] = chunked(b"x", 1_000_000, 0.01)
    cancelled = threading.Event()
    with silent_server() as nothing, ThreadPoolExecutor(1) as threads:
        run = threads.submit(failure_of, {"audio_url": f"{nothing if silent else files.url}/slow"}, cancelled=cancelled)
        assert silent or files.began.wait(5)
        cancelled.set()
        outcome = run.result(5)
    assert isinstance(outcome, NotNow)
    assert (outcome.category, outcome.burns_attempt) == (CANCELLED, False)


# ---------------------------------------------------------------- addresses

INSIDE = """
127.0.0.1 127.1 2130706433 0x7f000001 0x7f.1 0177.0.0.1 017700000001 127.000.000.001 0 0.0.0.0 localhost LOCALHOST. [::1] [::]
[0:0:0:0:0:0:0:1] [::ffff:127.0.0.1] [::ffff:7f00:1] [::127.0.0.1] [64:ff9b::7f00:1] [64:ff9b::127.0.0.1] [2002:7f00:1::]
[2001:0:4136:e378:8000:63bf:3fff:fdd2] [fe80::1] [fe80::1%25lo] [fc00::1] [fd00:ec2::254] [fec0::1] [ff02::1] [100::1] [2001:db8::1]
10.0.0.1 10.1 172.16.0.1 172.31.255.254 192.168.1.1 169.254.169.254 0xa9fea9fe 100.64.0.1 100.100.100.200 192.0.0.192 198.18.0.1
168.63.129.16 192.0.2.1 203.0.113.7 224.0.0.1 239.255.255.255 240.0.0.1 255.255.255.255
"""


@pytest.mark.parametrize("host", INSIDE.split())
def test_no_spelling_of_an_address_inside_is_asked(host: str) -> None:
    outcome = failure_of({"audio_url": f"http://{host}:1/call.wav"}, {})
    # Where a name of this machine is not known, or an address cannot be written so, there is nothing to ask.
    assert "cannot reach" not in outcome.message
    assert isinstance(outcome, Never) or "cannot be found" in outcome.message


def test_nothing_of_a_server_inside_is_reached(files: Files) -> None:
    port = files.server_address[1]
    for host in ("127.0.0.1", "127.1", "2130706433", "0x7f.1", "0177.0.0.1", "localhost", "[::ffff:127.0.0.1]", "0.0.0.0"):
        outcome = failure_of({"audio_url": f"http://{host}:{port}/call.wav"}, {})
        assert isinstance(outcome, Never)
        assert "is not at a public address" in outcome.message
    assert not files.seen


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("1.1.1.1", True),
        ("100.128.0.1", True),
        ("2606:2800:220:1::1", True),
        ("2a00:1450:4001::200e", True),
        ("64:ff9b::5db8:d822", True),
        ("64:ff9b::a00:1", False),
        ("64:ff9b:1::5db8:d822", False),
        ("2001::1", False),
        ("2002:5db8:d822::1", False),
        ("::5db8:d822", False),
        ("3fff::1", False),
        ("ff0e::1", False),
        ("192.88.99.1", False),
    ],
)
def test_only_what_all_the_internet_knows_is_public(address: str, public: bool) -> None:
    assert is_public(ipaddress.ip_address(address)) is public


@given(st.ip_addresses(v=4))
def test_no_private_address_is_public_in_any_clothes(address: ipaddress.IPv4Address) -> None:
    mapped, translated = ipaddress.IPv6Address(f"::ffff:{address}"), ipaddress.IPv6Address(f"64:ff9b::{address}")
    assert not is_public(mapped)
    assert is_public(translated) == is_public(address)
    assert not (is_public(address) and (address.is_private or address.is_link_local or address.is_loopback or address.is_multicast))


@pytest.mark.parametrize(
    ("permitted", "host", "address", "expected"),
    [
        ("minio", "minio", "10.0.0.5", True),
        ("MinIO.Example.", "minio.example", "10.0.0.5", True),
        ("minio", "minio.example", "10.0.0.5", False),
        ("minio", "other", "10.0.0.5", False),
        ("10.20.0.0/16", "anything", "10.20.3.4", True),
        ("10.20.0.0/16", "anything", "10.21.3.4", False),
        ("[fd00::1], 10.0.0.1", "fd00::1", "fd00::1", True),
        ("fd00::/8", "a", "fd12::1", True),
        ("fd00::/8", "a", "10.0.0.1", False),
        ("minio", "other", "1.1.1.1", True),
        ("0.0.0.0/0", "a", "127.0.0.1", True),
    ],
)
def test_what_the_operator_allows_is_allowed(permitted: str, host: str, address: str, expected: bool) -> None:
    assert private_hosts(permitted).permits(host, ipaddress.ip_address(address)) is expected


@pytest.mark.parametrize("text", ["10.0.0.0/33", "10.0.0.1/8", "http://minio", "minio:9000", "a b", "*", "256.0.0.1", "1234"])
def test_what_is_neither_host_nor_network_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no host name, address or network"):
        private_hosts(text)


def test_a_redirect_does_not_lead_inside(files: Files) -> None:
    port = files.server_address[1]
    with Files({"/call.wav": WAV}, "127.0.0.2", port) as inside:
        for host in ("127.0.0.2", "127.2", "2130706434", "[::ffff:127.0.0.2]"):
            files.paths["/moved"] = answers(302, Location=f"http://{host}:{port}/call.wav")
            assert isinstance(failure_of({"audio_url": f"{files.url}/moved"}), Never)
        assert not inside.seen
        files.paths["/moved"] = answers(302, Location=f"http://127.0.0.2:{port}/call.wav")
        assert got({"audio_url": f"{files.url}/moved"}, {"AUDIO_PRIVATE_HOSTS": "127.0.0.0/29"}).content == WAV


class Names:
    """A resolver that gives other addresses each time it is asked for a name that ends in `.test`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: list[str]) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []
        self._real = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", self)

    def __call__(self, host: str, port: Any, *rest: Any, **more: Any) -> list[Any]:
        if not host.endswith(".test"):
            return self._real(host, port, *rest, **more)
        self.asked.append(host)
        found = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return [(socket.AF_INET6 if ":" in one else socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, port or 0)) for one in found]


def test_a_name_that_means_something_else_a_moment_later_gains_nothing(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    port = files.server_address[1]
    names = Names(monkeypatch, ["127.0.0.1"], ["127.0.0.2"])
    with Files({"/call.wav": b"secret"}, "127.0.0.2", port) as inside:
        assert got({"audio_url": f"http://audio.test:{port}/call.wav"}).content == WAV
        assert names.asked == ["audio.test"]
        assert files.seen[0][1]["Host"] == f"audio.test:{port}"
        # The second time it means the other one, which is not allowed.
        assert isinstance(failure_of({"audio_url": f"http://audio.test:{port}/call.wav"}), Never)
        assert not inside.seen


def test_only_permitted_ones_of_several_addresses_are_asked(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    port = files.server_address[1]
    with Files({"/call.wav": b"secret"}, "127.0.0.2", port) as inside:
        Names(monkeypatch, ["127.0.0.2", "::ffff:127.0.0.1"])
        assert got({"audio_url": f"http://audio.test:{port}/call.wav"}).content == WAV
        assert not inside.seen


def test_the_next_address_is_tried_when_one_cannot_be_reached(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    Names(monkeypatch, ["127.0.0.3", "127.0.0.1"])
    url = f"http://audio.test:{files.server_address[1]}/call.wav"
    assert got({"audio_url": url}, {"AUDIO_PRIVATE_HOSTS": "127.0.0.0/8"}).content == WAV


def test_a_certificate_must_be_the_names_and_not_the_addresss(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("audio.test").configure_cert(context)
    authority.cert_pem.write_to_path(tmp_path / "authority.pem")
    asked_for: list[str] = []
    context.sni_callback = lambda _socket, name, _context: asked_for.append(name)
    files.socket = context.wrap_socket(files.socket, server_side=True)
    Names(monkeypatch, ["127.0.0.1"])
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
    port = files.server_address[1]
    assert got({"audio_url": f"https://audio.test:{port}/call.wav"}).content == WAV
    assert asked_for == ["audio.test"]
    outcome = failure_of({"audio_url": f"https://other.test:{port}/call.wav"})
    assert outcome.category == AUDIO_UNAVAILABLE
    assert "TLS" in outcome.message


def test_a_name_that_is_not_found_is_asked_for_again_later() -> None:
    outcome = failure_of({"audio_url": "http://no-such-host.invalid/call.wav"})
    assert isinstance(outcome, NotNow)
    assert (outcome.category, outcome.message) == (
        AUDIO_UNAVAILABLE,
        "audio_url: the address of no-such-host.invalid cannot be found",
    )


def test_a_name_too_long_for_a_name_is_not_found() -> None:
    assert failure_of({"audio_url": f"http://{'a' * 70}.test/"}).category == AUDIO_UNAVAILABLE


@pytest.mark.parametrize("by", ["limit", "cancellation"])
def test_a_lookup_that_hangs_ends_with_the_rest(monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    asked, over, cancelled = threading.Event(), threading.Event(), threading.Event()

    def hang(*_: Any, **__: Any) -> list[Any]:
        asked.set()
        over.wait(30)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    try:
        with ThreadPoolExecutor(1) as threads:
            environ = {"AUDIO_URL_TIMEOUT": "0.3"} if by == "limit" else {}
            run = threads.submit(failure_of, {"audio_url": "http://audio.test/"}, environ, cancelled=cancelled)
            assert asked.wait(5)
            if by == "cancellation":
                cancelled.set()
            assert run.result(5).category == (AUDIO_UNAVAILABLE if by == "limit" else CANCELLED)
    finally:
        over.set()


# ---------------------------------------------------------------- what a file looks like


def wav(*chunks: tuple[bytes, bytes], form: bytes = b"RIFF") -> bytes:
    """A WAV file of these chunks, each with its size before it and padded to an even one."""
    body = b"".join(name + struct.pack("<I", len(content)) + content + bytes(len(content) % 2) for name, content in chunks)
    return form + struct.pack("<I", len(body) + 4) + b"WAVE" + body


def format_of(kind: int, rate: int = 8_000, frame_bytes: int = 2, extra: bytes = b"") -> tuple[bytes, bytes]:
    return b"fmt ", struct.pack("<HHIIHH", kind, 1, rate, rate * frame_bytes, frame_bytes, 8 * frame_bytes) + extra


SECOND = (b"data", bytes(16_000))
PCM = wav(format_of(1), SECOND)


@pytest.mark.parametrize(
    ("content", "seconds"),
    [
        (PCM, 1.0),
        (silence(2.5), 2.5),
        (wav(format_of(3, frame_bytes=4), SECOND), 0.5),
        (wav(format_of(7, frame_bytes=1), SECOND), 2.0),
        (wav(format_of(0xFFFE, extra=bytes(24)), SECOND), 1.0),
        (wav(format_of(1), (b"LIST", b"INFOISFT\x05\0\0\0Lavf\0\0"), SECOND), 1.0),
        (wav((b"JUNK", bytes(27)), format_of(1), SECOND), 1.0),
        (wav(format_of(1), SECOND, (b"LIST", bytes(100))), 1.0),
        (wav(format_of(1), SECOND, form=b"RF64"), 1.0),
        (PCM[:4] + b"\xff\xff\xff\xff" + PCM[8:40] + b"\xff\xff\xff\xff" + PCM[44:], 1.0),
        (PCM[:4] + bytes(4) + PCM[8:40] + bytes(4) + PCM[44:], 1.0),
        (PCM[: 44 + 8_000], 0.5),
        (wav(format_of(2), SECOND), None),
        (wav(format_of(1, rate=0), SECOND), None),
        (wav(format_of(1, rate=1), SECOND), None),
        (wav(SECOND), None),
    ],
    ids=[
        "PCM",
        "by the standard library",
        "float",
        "mu-law",
        "extensible",
        "a list before the samples",
        "junk first, odd",
        "a list at the end",
        "RF64",
        "written to a pipe",
        "written to a pipe, zeros",
        "cut off",
        "ADPCM",
        "no rate",
        "unbelievable rate",
        "no format",
    ],
)
def test_the_length_of_a_wav_file_is_what_is_there(content: bytes, seconds: float | None) -> None:
    audio = got({"audio_base64": encoded(content)}).audio
    assert (audio.suffix, audio.seconds, audio.defect) == ("wav", seconds, None)


@pytest.mark.parametrize("content", [PCM[:44], PCM[:40], PCM[:20], PCM[:12], wav(format_of(1)), wav((b"data", b""))], ids=len)
def test_a_wav_file_without_samples_is_broken(content: bytes) -> None:
    audio = got({"audio_base64": encoded(content)}).audio
    assert (audio.suffix, audio.seconds, audio.defect) == ("wav", None, "it holds no samples")


def box(name: bytes, content: bytes = b"", long: bool = False) -> bytes:
    size = len(content) + (16 if long else 8)
    return (struct.pack(">I4sQ", 1, name, size) if long else struct.pack(">I4s", size, name)) + content


BRAND = box(b"ftyp", b"M4A " + bytes(100))
INDEX = box(b"moov", bytes(100))


@pytest.mark.parametrize(
    ("content", "suffix", "sound"),
    [
        (b"ID3\x04" + bytes(200), "mp3", True),
        (b"\xff\xfb\x90\x64" + bytes(200), "mp3", True),
        (b"OggS" + bytes(200), "ogg", True),
        (b"fLaC" + bytes(200), "flac", True),
        (b"\x1aE\xdf\xa3" + bytes(200), "webm", True),
        (b"RIFF\0\0\0\0AVI " + bytes(200), "avi", True),
        (BRAND + INDEX, "m4a", True),
        (BRAND + box(b"mdat", bytes(500)) + INDEX, "m4a", True),
        (BRAND + box(b"mdat", bytes(500), long=True) + INDEX, "m4a", True),
        (BRAND + box(b"mdat", bytes(500)), "m4a", False),
        (BRAND + INDEX[:-1], "m4a", False),
        (BRAND + bytes(500), "m4a", False),
        (BRAND + b"\0\0\0\x01mdat\0", "m4a", False),
        (b"OggS" + bytes(100), "ogg", False),
        (b"this is not audio" * 50, None, False),
        (b"\xff\xfet\0e\0x\0t\0" * 50, None, False),
        (b"<html>" * 50, None, False),
        (b"{}", None, False),
    ],
    ids=lambda value: None if isinstance(value, bytes) else str(value),
)
def test_a_file_is_known_by_its_bytes(content: bytes, suffix: str | None, sound: bool) -> None:
    audio = got({"audio_base64": encoded(content)}).audio
    assert (audio.suffix, audio.seconds, audio.defect is None) == (suffix, None, sound)


BEGINNINGS = (b"", b"RIFF\0\0\0\0WAVE", b"RIFF\0\0\0\0WAVEfmt \x10\0\0\0", BRAND, b"\xff\xfb")


@given(st.sampled_from(BEGINNINGS), st.binary(min_size=1, max_size=300))
def test_no_bytes_break_the_look(begin: bytes, rest: bytes) -> None:
    audio = got({"audio_base64": encoded(begin + rest)}).audio
    assert audio.seconds is None or 0 < audio.seconds < math.inf


def test_a_size_bounds_the_length_and_a_known_length_is_the_length() -> None:
    assert got({"audio_base64": encoded(b"OggS" + bytes(9_996))}).audio.max_seconds == 10.0
    assert got({"audio_base64": encoded(WAV)}).audio.max_seconds == 2.0


def test_audio_does_not_show_what_it_holds() -> None:
    assert "file" not in repr(got({"audio_base64": encoded(WAV)}).audio)


@pytest.mark.parametrize("head", [b"RIFF\xff\xff\xff\xffWAVE", b"\x00\x00\x00\x10ftypM4A \x00\x00\x00\x00"], ids=["wav", "mp4"])
def test_a_file_of_nothing_but_tiny_parts_is_soon_done_with(head: bytes) -> None:
    part = b"abcd\x00\x00\x00\x00" if head.startswith(b"RIFF") else b"\x00\x00\x00\x08free"
    began = time.monotonic()
    sent = {"audio_base64": base64.b64encode(head + part * 2_000_000).decode()}
    with contextlib.suppress(Never), audio_of(job_with(sent), settings_of()) as audio:
        assert audio.seconds is None
    assert time.monotonic() - began < 1.5
