"""What people and programs read about the interface: the OpenAPI document and the pages."""

import base64
import hashlib
import re
from pathlib import Path

import falcon
import msgspec

from ai_internal.server.openapi import document
from ai_internal.server.web import Call

PAGES = Path(__file__).with_name("pages")


class Documents:
    """The OpenAPI document, and the pages, which are the same for everybody and hold no secret.

    What a page shows it asks of this service, with the token of whoever looks at it.
    """

    def __init__(self, version: str) -> None:
        self._document = msgspec.json.encode(document(version))
        self._pages = {path.stem: path.read_bytes() for path in PAGES.glob("*.html")}
        self._policies = {name: content_policy(html) for name, html in self._pages.items()}

    def openapi(self, call: Call) -> None:
        """GET describes the interface, for programs."""
        call.answer(self._document)

    def page(self, call: Call) -> None:
        """GET shows the operator's page."""
        self._show(call, "operator")

    def docs(self, call: Call) -> None:
        """GET shows a page to read the OpenAPI document."""
        self._show(call, "docs")

    def _show(self, call: Call, name: str) -> None:
        call.response.content_type = falcon.MEDIA_HTML
        call.response.data = self._pages[name]
        call.response.set_header("Content-Security-Policy", self._policies[name])


def content_policy(html: bytes) -> str:
    """The policy under which a browser runs the style and the script of this page and nothing else, and asks only this service."""
    hashes = {
        name: base64.b64encode(hashlib.sha256(re.findall(rb"<%b>(.*?)</%b>" % (name, name), html, re.DOTALL)[0]).digest()).decode()
        for name in (b"style", b"script")
    }
    return (
        f"default-src 'none'; connect-src 'self'; img-src 'self' data:; style-src 'sha256-{hashes[b'style']}'; "
        f"script-src 'sha256-{hashes[b'script']}'; require-trusted-types-for 'script'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
