"""A job's audio, wherever the job has it, as a file to send on: what providers that listen share.

A job names exactly one of
    audio_url      an http or https address that whoever asks may have chosen, so it is fetched with care, as below
    audio_base64   the file itself, in base64
    audio_path     a path in AUDIO_FOLDER; neither `..` nor a link leads out of it

Settings
    AUDIO_FOLDER         where audio_path may point; without it such jobs are refused
    AUDIO_PRIVATE_HOSTS  host names, addresses and networks (`minio, 10.20.0.0/16`) that audio_url may name although they are not public
    AUDIO_MAX_BYTES      the largest file: 209715200
    AUDIO_URL_TIMEOUT    limit for fetching one file: 5m

What a caller writes into audio_url makes this machine ask another one, with this machine's place in the network. So the host is looked up
once, every address it has is judged, and the connection goes to one that passed: a name that means something else a moment later gains
nothing, nor does any spelling of an address, because the address itself is judged and not its text. Only public addresses pass, and what
AUDIO_PRIVATE_HOSTS allows. Each redirect is judged in the same way. Nothing is sent along, no proxy is asked, and messages name the host
alone, because the rest of such an address is often a secret.

Trouble at the place the audio comes from has a category of its own, `audio_unavailable`: it says nothing about the model service.
Memory stays small: beyond 4 MB a file lies on disk, in the folder for temporary files.

Sections: settings, audio, sources, fetching, addresses, what the file looks like.
"""

import binascii
import contextlib
import errno
import ipaddress
import math
import os
import queue
import re
import socket
import stat
import struct
import tempfile
import threading
import time
from collections.abc import Generator, Iterator, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import IO, Any
from urllib.parse import urljoin

import attrs
import urllib3
from urllib3.exceptions import LocationParseError
from urllib3.util import Url, parse_url

from providers import CANCELLED, INVALID_INPUT, Job, Never, NotNow, setting
from providers.exchange import Exchange, cancellation, deadline_after, request_headers, retry_after, seconds_until
from providers.settings import duration, whole

MAX_CHUNKS = 10_000
"""How many parts of a file are looked at for its length; real ones have a few dozen."""
AUDIO_UNAVAILABLE = "audio_unavailable"
"""The audio cannot be had now from where the job says it is."""
SOURCES = ("audio_url", "audio_base64", "audio_path")
"""Where a job may have its audio."""
MAX_REDIRECTS = 5
IDLE_SECONDS = 30.0
"""How long a download may pause."""
MAX_MEMORY_BYTES = 4 * 1024 * 1024
"""How much of a file is held in memory before it goes to disk."""
BLOCK_BYTES = 65_536
MIN_BYTES_PER_SECOND = 1_000
"""The thinnest audio in use, speech at 8 kbit/s. More bytes than these make a second, so a file's size bounds its length."""

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# ---------------------------------------------------------------- settings


@attrs.frozen
class PrivateHosts:
    """Hosts that may be asked although their addresses are not public."""

    names: frozenset[str] = frozenset()
    networks: tuple[Network, ...] = ()

    def permits(self, host: str, address: Address) -> bool:
        """Whether this address may be connected to for this host of a URL."""
        return host.lower().rstrip(".") in self.names or any(address in network for network in self.networks) or is_public(address)


def private_hosts(text: str) -> PrivateHosts:
    """Host names, addresses and networks between commas."""
    names: set[str] = set()
    networks: list[Network] = []
    for item in filter(None, (part.strip().strip("[]") for part in text.split(","))):
        try:
            networks.append(ipaddress.ip_network(item))
        except ValueError:
            if not re.fullmatch(r"(?=.*[A-Za-z])[A-Za-z0-9._-]{1,253}", item):
                raise ValueError(f"{item!r} is no host name, address or network, as in minio, 10.20.0.0/16") from None
            names.add(item.lower().rstrip("."))
    return PrivateHosts(frozenset(names), tuple(networks))


def _absolute(text: str) -> Path:
    if not Path(text).is_absolute():
        raise ValueError("must be an absolute path")
    return Path(text)


@attrs.frozen(kw_only=True)
class AudioSettings:
    """The settings of this module, for a provider's own settings to inherit."""

    audio_folder: Path | None = setting("AUDIO_FOLDER", "where the audio_path of a job may point; none without it", read=_absolute)
    audio_private_hosts: PrivateHosts | None = setting(
        "AUDIO_PRIVATE_HOSTS", "hosts, addresses and networks that audio_url may name although they are not public", read=private_hosts
    )
    max_audio_bytes: int = setting("AUDIO_MAX_BYTES", "largest audio file", default="209715200", read=whole(1, 10**12))
    audio_url_seconds: float = setting("AUDIO_URL_TIMEOUT", "limit for fetching one file", default="5m", read=duration())


# ---------------------------------------------------------------- audio


@attrs.frozen(kw_only=True)
class Audio:
    """One file that is said to be audio."""

    size: int
    suffix: str | None
    """The kind of file its first bytes speak of, `wav` or `mp3` for example; None when they speak of none."""
    seconds: float | None = None
    """How long it is, where the file says so and is simple enough to be believed; else None."""
    defect: str | None = None
    """Why no decoder will make anything of it, as far as its bytes can tell; None if they look right."""
    _file: IO[bytes] = attrs.field(repr=False)

    @property
    def max_seconds(self) -> float:
        """What it lasts at the longest: good for a time limit, and for nothing else."""
        return self.size / MIN_BYTES_PER_SECOND if self.seconds is None else self.seconds

    def blocks(self) -> Iterator[bytes]:
        """All of it, from the beginning, piece by piece."""
        self._file.seek(0)
        left = self.size
        while left:
            block = self._file.read(min(left, BLOCK_BYTES))
            if not block:
                raise NotNow(AUDIO_UNAVAILABLE, "the audio file became shorter while it was read")
            left -= len(block)
            yield block


@contextlib.contextmanager
def audio_of(job: Job, settings: AudioSettings) -> Iterator[Audio]:
    """The audio that the input of a job names, until the context is left. Raises `Never`, `NotNow`."""
    source, given = _source(job.input)
    with contextlib.ExitStack() as stack:
        if source == "audio_path":
            file = stack.enter_context(_file_in(settings.audio_folder, given))
            size = os.fstat(file.fileno()).st_size
        else:
            blocks = _decode_base64(given, settings) if source == "audio_base64" else _download(given, settings, job)
            file = stack.enter_context(tempfile.SpooledTemporaryFile(max_size=MAX_MEMORY_BYTES))
            size = _store(stack.enter_context(contextlib.closing(blocks)), file, settings)
        if size > settings.max_audio_bytes:
            raise _too_big(settings)
        if not size:
            raise Never(INVALID_INPUT, f"{source}: the audio is empty")
        yield _inspect(file, size)


# ---------------------------------------------------------------- sources

_NO_SUCH_FILE = frozenset(
    {errno.EACCES, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.ENXIO, errno.EPERM}
)
"""What opening says about a path; everything else it says about the machine."""


def _source(given: Mapping[str, Any]) -> tuple[str, str]:
    named = [name for name in SOURCES if given.get(name) is not None]
    if len(named) != 1:
        raise Never(INVALID_INPUT, f"input must have exactly one of {', '.join(SOURCES)}")
    if not isinstance(given[named[0]], str):
        raise Never(INVALID_INPUT, f"{named[0]} must be a text")
    return named[0], given[named[0]]


def _store(blocks: Iterator[bytes], file: IO[bytes], settings: AudioSettings) -> int:
    size = 0
    for block in blocks:
        size += file.write(block)
        if size > settings.max_audio_bytes:
            raise _too_big(settings)
    return size


def _too_big(settings: AudioSettings) -> Never:
    return Never(INVALID_INPUT, f"the audio has more than {settings.max_audio_bytes} bytes (AUDIO_MAX_BYTES)")


def _decode_base64(text: str, settings: AudioSettings) -> Generator[bytes, None, None]:
    """The bytes of base64, which may be broken into lines. In pieces, because the text is large enough."""
    text = text.replace("\r", "").replace("\n", "")
    if len(text) // 4 * 3 - 2 > settings.max_audio_bytes:
        raise _too_big(settings)
    if "=" in text[:-2]:
        raise Never(INVALID_INPUT, "audio_base64 is not base64: it goes on after its end")
    try:
        for start in range(0, len(text), BLOCK_BYTES):  # a multiple of 4, as each piece has to be
            yield binascii.a2b_base64(text[start : start + BLOCK_BYTES], strict_mode=True)
    except ValueError:
        raise Never(INVALID_INPUT, "audio_base64 is not base64") from None


@contextlib.contextmanager
def _file_in(folder: Path | None, path: str) -> Iterator[IO[bytes]]:
    """The file at this path of the folder, opened so that nothing outside of it can be meant. Raises `Never`, `NotNow`."""
    if folder is None:
        raise Never(INVALID_INPUT, "audio_path cannot be used here: AUDIO_FOLDER is not set")
    try:
        descriptor = _open_in(Path(os.path.realpath(folder)), path)
    except ValueError:
        raise Never(INVALID_INPUT, "audio_path leads out of AUDIO_FOLDER") from None
    except OSError as error:
        final = error.errno in _NO_SUCH_FILE and folder.is_dir()
        reason = f"audio_path: {os.strerror(error.errno or 0)}"
        raise (Never(INVALID_INPUT, reason) if final else NotNow(AUDIO_UNAVAILABLE, reason)) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Never(INVALID_INPUT, "audio_path is not a file")
    with os.fdopen(descriptor, "rb") as file:
        yield file


def _open_in(root: Path, path: str) -> int:
    """A descriptor of the file. Raises OSError, and ValueError if the path leads out of the root.

    Links inside the root are followed first. Then each step from the root is taken without following any, so that one put there meanwhile
    is an error. Not blocking: opening a pipe would wait for its writer.
    """
    steps = Path(os.path.realpath(root / path)).relative_to(root).parts or (".",)
    directory_fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    for step in steps:
        try:
            opened = os.open(step, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory_fd)
        finally:
            os.close(directory_fd)
        directory_fd = opened
    return directory_fd


# ---------------------------------------------------------------- fetching

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_RETRYABLE = frozenset({408, 425, 429})


def _download(text: str, settings: AudioSettings, job: Job) -> Generator[bytes, None, None]:
    """What this URL leads to. Raises `Never` for what it must not lead to or will never have, else `NotNow`."""
    until = deadline_after(job, settings.audio_url_seconds)
    url = _web_url(text)
    try:
        for _ in range(MAX_REDIRECTS + 1):
            addresses = _addresses(url, settings.audio_private_hosts, until, job.cancelled)
            with _get(url, addresses, until, job) as (exchange, response):
                if response.status not in _REDIRECTS:
                    _raise_unless_file(response, url, settings)
                    yield from exchange.blocks(response, max_bytes=math.inf)
                    return
                url = _web_url(_redirect_url(url, response.headers.get("location", "")))
    except NotNow as error:
        if error.category == CANCELLED:
            raise
        raise NotNow(AUDIO_UNAVAILABLE, f"audio_url: {error.message}", retry_in_seconds=error.retry_in_seconds) from None
    raise Never(INVALID_INPUT, f"audio_url leads on to another address more than {MAX_REDIRECTS} times")


@contextlib.contextmanager
def _get(url: Url, addresses: list[str], until: float, job: Job) -> Iterator[tuple[Exchange, urllib3.HTTPResponse]]:
    origin = url._replace(path=None, query=None, fragment=None)
    with Exchange(
        origin, limit_seconds=seconds_until(until), idle_seconds=IDLE_SECONDS, cancelled=job.cancelled, addresses=addresses
    ) as exchange:
        yield exchange, exchange.send("GET", url.request_uri, request_headers("*/*", None))


def _redirect_url(url: Url, location: str) -> str:
    try:
        return urljoin(url.url, location)
    except ValueError:
        return ""


def _web_url(text: str) -> Url:
    """The URL, if it is one that may be looked at."""
    try:
        # A backslash or a blank is read in one way here and in another there.
        url = parse_url(text) if re.fullmatch(r"[!-\[\]-~]{1,8192}", text) else Url()
    except LocationParseError:
        url = Url()
    if url.scheme not in ("http", "https") or not url.host:
        raise Never(INVALID_INPUT, "audio_url must be an address that begins with http:// or https://, names a host and is plain ASCII")
    if url.auth is not None:
        raise Never(INVALID_INPUT, "audio_url must not have user info")
    return url


def _raise_unless_file(response: urllib3.HTTPResponse, url: Url, settings: AudioSettings) -> None:
    """Raises `NotNow`, `Never` for any answer but a whole file."""
    answered = f"{url.host} answered {response.status}"
    if response.status in _RETRYABLE or response.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        raise NotNow(AUDIO_UNAVAILABLE, answered, retry_in_seconds=retry_after(response))
    if response.status != HTTPStatus.OK:
        raise Never(INVALID_INPUT, f"audio_url: {answered}")
    if response.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise Never(INVALID_INPUT, f"audio_url: {url.host} sends the file compressed, although it was asked not to")
    if response.length_remaining is not None and response.length_remaining > settings.max_audio_bytes:
        raise _too_big(settings)


# ---------------------------------------------------------------- addresses

_UNICAST = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_NOT_PUBLIC = tuple(
    map(
        ipaddress.ip_network,
        (
            "168.63.129.16/32",  # the host agent of every Azure machine, on a public address
            "192.0.0.0/24",  # protocol assignments, with Oracle's instance metadata among them
            "192.88.99.0/24",  # way into 6to4
            "2001::/23",  # Teredo and its like: tunnels to IPv4 addresses that would not be judged
            "2002::/16",  # 6to4, the same
            "3fff::/20",  # documentation
        ),
    )
)
"""Addresses that some version of Python in use calls global, or that are, and that no audio comes from."""


def is_public(address: Address) -> bool:
    """Whether anybody on the internet means the same machine by this address."""
    if isinstance(address, ipaddress.IPv6Address):
        if address in _NAT64:
            return is_public(ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF))
        if address not in _UNICAST:
            return False
    return address.is_global and not address.is_multicast and not any(address in network for network in _NOT_PUBLIC)


def _addresses(url: Url, private: PrivateHosts | None, until: float, cancelled: threading.Event) -> list[str]:
    """The addresses of the URL's host that may be connected to, in the order to try them. Raises `Never` if there are none."""
    host = (url.host or "").strip("[]")
    found = _resolve(host, until, cancelled)
    permitted = [str(address) for address in found if (private or PrivateHosts()).permits(host, address)]
    if not permitted:
        raise Never(INVALID_INPUT, f"audio_url: {host} is not at a public address, nor among AUDIO_PRIVATE_HOSTS")
    return permitted


def _resolve(host: str, until: float, cancelled: threading.Event) -> list[Address]:
    """The addresses of a host. In a thread of its own: the lookup itself knows neither limit nor cancellation."""
    answers: queue.SimpleQueue[list[Any] | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            answers.put(error)

    threading.Thread(target=ask, name="audio-lookup", daemon=True).start()
    while not cancelled.is_set():
        with contextlib.suppress(queue.Empty):
            answer = answers.get(timeout=max(0.0, min(0.05, until - time.monotonic())))
            if isinstance(answer, Exception):
                raise NotNow(AUDIO_UNAVAILABLE, f"the address of {host} cannot be found")
            return list(dict.fromkeys(_address(item[4][0]) for item in answer))
        if time.monotonic() >= until:
            raise NotNow(AUDIO_UNAVAILABLE, f"the address of {host} was not found in time")
    raise cancellation()


def _address(text: str) -> Address:
    """The address, as IPv4 when it is one in the clothes of IPv6: the machine would connect to that."""
    address = ipaddress.ip_address(text)
    return (isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped) or address


# ---------------------------------------------------------------- what the file looks like

_MAGIC = (
    (8, b"WAVE", "wav"),
    (8, b"AVI ", "avi"),
    (0, b"ID3", "mp3"),
    (0, b"OggS", "ogg"),
    (0, b"fLaC", "flac"),
    (4, b"ftyp", "m4a"),
    (0, b"\x1aE\xdf\xa3", "webm"),
    (0, b"#!AMR", "amr"),
    (0, b"FORM", "aiff"),
    (0, b"caff", "caf"),
    (0, b".snd", "au"),
    (0, b"0&\xb2u", "wma"),
    (0, b"FLV", "flv"),
    (0, b"\x00\x00\x01\xba", "mpg"),
)
"""Where in a file which bytes stand, and what it then is. MPEG audio without a tag begins with eleven bits set instead."""
_MIN_BYTES = 128
"""No container holds any sound in less; a WAV file does."""
_CONSTANT_RATE_WAV = frozenset({1, 3, 6, 7, 0xFFFE})
"""Formats of WAV in which every second has the same number of bytes: PCM, float, A-law, µ-law and their extensible form."""


def _inspect(file: IO[bytes], size: int) -> Audio:
    suffix = _suffix(file)
    seconds, defect = None, None
    if suffix is None:
        defect = "it begins like no audio file"
    elif suffix == "wav":
        seconds, defect = _wav(file, size)
    elif size < _MIN_BYTES:
        defect = "it is too short to hold any sound"
    elif suffix == "m4a" and not _has_index(file, size):
        defect = "it is cut off before its index"
    return Audio(size=size, suffix=suffix, seconds=seconds, defect=defect, file=file)


def _suffix(file: IO[bytes]) -> str | None:
    file.seek(0)
    head = file.read(256)
    if head[:1] == b"\xff" and b"\xe0" <= head[1:2] < b"\xfe":
        return "mp3"
    return next((suffix for at, magic, suffix in _MAGIC if head[at : at + len(magic)] == magic), None)


def _wav(file: IO[bytes], size: int) -> tuple[float | None, str | None]:
    """The length of a WAV file in seconds if it is known, and what is wrong with the file.

    A file that was written to a pipe says 0 or the largest number for the size of its samples, and one that was cut off says too much:
    what is there counts, as decoders have it.
    """
    per_second = 0
    at = 12
    for _ in range(MAX_CHUNKS):
        if at + 8 > size:
            break
        file.seek(at)
        name, length, *_ = struct.unpack("<4sI", file.read(8))
        if name == b"fmt " and length >= 16 and at + 24 <= size:
            kind, _, rate, _, frame_bytes, _ = struct.unpack("<HHIIHH", file.read(16))
            per_second = rate * frame_bytes if kind in _CONSTANT_RATE_WAV else 0
        if name == b"data":
            available = size - at - 8
            samples = min(length or available, available)
            believable = MIN_BYTES_PER_SECOND <= per_second <= 100_000_000
            return samples / per_second if believable and samples else None, None if samples else "it holds no samples"
        at += 8 + length + length % 2
    return None, "it holds no samples"


def _has_index(file: IO[bytes], size: int) -> bool:
    """Whether an MP4 file has its `moov` box, without which nothing in it can be found; a recording that broke off lacks it."""
    at = 0
    for _ in range(MAX_CHUNKS):
        if at + 8 > size:
            return False
        file.seek(at)
        length, name = struct.unpack(">I4s", file.read(8))
        if name == b"moov":
            return bool(at + length <= size)
        if length == 1:
            length = int.from_bytes(file.read(8), "big")
        if length < 8:
            return False
        at += length
    return True
