"""One request that can be called off: what its own end looks like to who reads."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from urllib3.util import parse_url

from providers import NotNow
from providers.exchange import Exchange


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
