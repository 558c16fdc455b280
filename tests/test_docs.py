"""The page at /docs, in a real browser: it shows the whole document, as text, and asks nobody but the service."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from service import Answer, Api, Service

from ai_internal.server.operations import OPERATIONS

FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update"
QUIET = "--disable-sync --enable-logging=stderr --virtual-time-budget=5000 --dump-dom"
# What a page may say in a console, and where Chromium writes it.
CONSOLE = re.compile(r":CONSOLE[:(].*")


@pytest.fixture
def browse(tmp_path: Path) -> Callable[[str], str]:
    """Opens an address in a new Chromium; the elements of the page when its script is done. Fails where the console has a word."""
    program = shutil.which("chromium")
    if program is None and os.environ.get("CI") != "true":
        pytest.skip("Chromium is not installed: apt-get install chromium")
    assert program, "CI must install Chromium"

    def opened(address: str) -> str:
        command = [program, *FLAGS.split(), *QUIET.split(), f"--user-data-dir={tmp_path / 'chromium'}", address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        assert CONSOLE.findall(done.stderr) == []
        return done.stdout

    return opened


def test_the_page_shows_every_operation_type_and_problem(browse: Callable[[str], str], api: Api) -> None:
    page = browse(f"http://127.0.0.1:{api.port}/docs")
    document = api.get("/openapi.json").json
    shown = set(re.findall(r'<article id="([^"]+)"', page))
    assert {operation.name for operation in OPERATIONS.values()} | {f"type-{name}" for name in document["components"]["schemas"]} <= shown
    codes = [each["const"] for each in document["components"]["schemas"]["Problem"]["properties"]["code"]["oneOf"]]
    assert [code for code in codes if f"<code>{code}</code>" not in page] == []
    assert "Reading" not in page


def test_the_page_may_run_its_own_script_and_ask_the_service_and_nothing_else(api: Api) -> None:
    answer = api.get("/docs")
    policy = dict(part.strip().partition(" ")[::2] for part in answer.headers["Content-Security-Policy"].split(";"))
    assert {name: value for name, value in policy.items() if not value.startswith("'sha256-")} == {
        "default-src": "'none'",
        "connect-src": "'self'",
        "img-src": "'self' data:",
        "require-trusted-types-for": "'script'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    assert set(policy) >= {"style-src", "script-src"}
    assert "unsafe" not in answer.headers["Content-Security-Policy"]
    text = answer.body.decode()
    assert [
        word for word in ("//cdn", "http:", "https:", "innerHTML", "insertAdjacentHTML", "document.write", "eval(") if word in text
    ] == []


TOKEN_IN_EXAMPLES = '-H "Authorization: Bearer $AI_SERVICE_TOKEN"'


@pytest.mark.long
def test_the_examples_carry_a_token_where_the_service_asks_for_one_and_the_route_does(
    browse: Callable[[str], str], api: Api, start_service: Callable[..., Service]
) -> None:
    guarded = start_service(API_TOKENS="desk=operator=a-secret-of-the-desk")
    requests = re.findall(r"<pre[^>]*>(curl [^<]*)", browse(f"http://127.0.0.1:{guarded.api.port}/docs"))
    bare = {each.partition("//")[2].split()[0] for each in requests if TOKEN_IN_EXAMPLES not in html.unescape(each)}
    assert len(requests) > 30
    assert bare == {f"127.0.0.1:{guarded.api.port}{path}" for path in ("/healthz", "/readyz", "/openapi.json", "/docs", "/")}
    assert TOKEN_IN_EXAMPLES not in html.unescape(browse(f"http://127.0.0.1:{api.port}/docs"))


MARKUP = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


def test_the_page_shows_markup_in_the_document_as_text(browse: Callable[[str], str], api: Api) -> None:
    with another_document(api.get("/docs"), spoilt(api.get("/openapi.json").json)) as address:
        page = browse(address)
    assert page.count("&lt;img src=x") > 100
    assert "<img" not in page
    assert "<title>AI Service: the interface</title>" in page


def test_the_page_says_that_it_has_no_document(browse: Callable[[str], str], api: Api) -> None:
    with another_document(api.get("/docs"), ["no", "document"]) as address:
        page = browse(address)
    assert "The document cannot be shown" in page


def spoilt(value: Any, name: str = "") -> Any:
    """The document with markup in every text that people read, and in examples."""
    if isinstance(value, dict):
        return {key: spoilt(each, key) for key, each in value.items()}
    if isinstance(value, list):
        return [spoilt(each, name) for each in value]
    return (
        value + MARKUP
        if name in ("description", "summary", "title", "examples", "owner_ref", "prompt") and isinstance(value, str)
        else value
    )


@contextmanager
def another_document(page: Answer, document: Any) -> Iterator[str]:
    """The page as the service sends it, beside another document; its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_page = self.path == "/docs"
            self.send_response(200)
            for name in ("Content-Type", "Content-Security-Policy") if is_page else ():
                self.send_header(name, page.headers[name])
            self.end_headers()
            self.wfile.write(page.body if is_page else json.dumps(document).encode())

        def log_message(self, *_arguments: Any) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/docs"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
