"""One request that can be called off: what its own end looks like to who reads."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from urllib3.util import parse_url

from providers import Job, NotCompleted, NotNow, Provider
from providers.exchange import Exchange
from providers.openclaw import OpenClaw
from providers.vllm import VLLM
from providers.whisperx import WhisperX


@contextmanager
def trickling(head: bytes) -> Iterator[str]:
    """The address of a server that answers one request with this head, and then with a piece every few milliseconds, for ever."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=trickle, args=(listener, head))
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join(10)


def trickle(listener: socket.socket, head: bytes) -> None:
    connection, _ = listener.accept()
    pause = threading.Event()
    with connection:
        connection.recv(65536)
        connection.sendall(head)
        try:
            while not pause.wait(0.01):
                connection.sendall(b"piece ")
        except OSError:
            return


def outcome_of(url: str, cancelled: threading.Event, limit_seconds: float = 30.0, *, cancels: bool = False) -> NotNow:
    """How a request ended that has no end of its own."""
    try:
        with Exchange(parse_url(url), limit_seconds=limit_seconds, cancelled=cancelled, addresses=["127.0.0.1"]) as exchange:
            for _ in exchange.blocks(exchange.send("GET", "/", {})):
                if cancels:
                    cancelled.set()
    except NotNow as outcome:
        return outcome
    raise AssertionError("it was taken for a whole answer")


HEADS = [b"HTTP/1.0 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n"]


@pytest.mark.parametrize("head", HEADS, ids=["until-close", "length"])
def test_what_our_own_limit_cut_off_is_never_taken_for_a_whole_answer(head: bytes) -> None:
    with trickling(head) as url:
        assert outcome_of(url, threading.Event(), 0.3).category == "timeout"


@pytest.mark.parametrize("head", HEADS, ids=["until-close", "length"])
def test_what_was_cancelled_is_never_taken_for_a_whole_answer(head: bytes) -> None:
    with trickling(head) as url:
        assert outcome_of(url, threading.Event(), cancels=True).category == "cancelled"


def test_a_cancelled_request_connects_to_nobody() -> None:
    cancelled = threading.Event()
    cancelled.set()
    outcome = outcome_of("http://127.0.0.1:1", cancelled)
    assert (outcome.category, outcome.burns_attempt) == ("cancelled", False)


# ---------------------------------------------------------------- where a key goes

KEY = "planted-key"
SPEECH = {"audio_base64": "UklGRiQAAABXQVZFZm10IBAAAAABAAEAQB8AAIA+AAACABAAZGF0YQQAAAAAAAAA"}
PROVIDERS: dict[str, tuple[Callable[[Mapping[str, str]], Provider], str, str, Any]] = {
    "vllm": (VLLM, "LLM_BASE_URL", "LLM_API_KEY", "Hello"),
    "openclaw": (OpenClaw, "OPENCLAW_URL", "OPENCLAW_TOKEN", "Hello"),
    "whisperx": (WhisperX, "WHISPERX_URL", "WHISPERX_API_KEY", SPEECH),
}


@contextmanager
def redirecting(answer: bytes) -> Iterator[tuple[str, list[bytes]]]:
    """The address of a server that gives every request this answer, and the requests it has seen."""
    seen: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    seen.append(connection.recv(65536))
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", seen
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)


def is_untouched(listener: socket.socket) -> bool:
    """Whether nobody has connected."""
    listener.setblocking(False)
    try:
        listener.accept()[0].close()
    except BlockingIOError:
        return True
    return False


@pytest.mark.parametrize("name", PROVIDERS)
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_takes_neither_key_nor_request_elsewhere(name: str, status: int) -> None:
    make, url, key, input_ = PROVIDERS[name]
    with ExitStack() as stack:
        elsewhere = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        there = f"http://127.0.0.1:{elsewhere.getsockname()[1]}/"
        head = f"HTTP/1.1 {status} Moved\r\nLocation: {there}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        origin, seen = stack.enter_context(redirecting(head.encode()))
        provider = make({url: origin, key: KEY})
        job = Job(id="1", owner_service="o", owner_ref="r", task_type="t", model_profile=provider.model_profiles[0], input=input_)
        with pytest.raises(NotCompleted):
            provider.run(job)
        assert provider.check().status == "unavailable"
        assert len(seen) >= 2
        assert is_untouched(elsewhere)


@pytest.mark.parametrize("name", PROVIDERS)
def test_no_proxy_of_the_environment_gets_the_key(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, url, key, _ = PROVIDERS[name]
    with socket.create_server(("127.0.0.1", 0)) as proxy, redirecting(b"HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n") as (origin, seen):
        for variable in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(variable, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        make({url: origin, key: KEY}).check()
        assert seen
        assert is_untouched(proxy)
