"""A stand-in for an OpenClaw gateway, as a real HTTP server in a thread: it answers as the real one was seen to, or misbehaves on request.

    with fake_openclaw() as gateway:
        os.environ |= gateway.environ
        gateway.behave(replays("upstream-503"))    # the next chat request; later ones get the default
        gateway.always(hangs())                    # every chat request from now on, as in `fake_vllm`

By default its agent says something that fits. `answers/openclaw.json` holds what a real OpenClaw 2026.9.6 answered: `captured("length")` is
one of those, `replays("length")` gives it as an answer. Behaviours of `fake_vllm` work here as well.
"""

import json
from pathlib import Path
from typing import Any

from fake_vllm import Behaviour, FakeVLLM, Handler, as_captured, captured_answers

ANSWERS = Path(__file__).with_name("answers") / "openclaw.json"
UNAUTHORIZED = b'{"error":{"message":"Unauthorized","type":"unauthorized"}}'


class FakeOpenClaw(FakeVLLM):
    """The gateway. A context manager that listens on a free port of 127.0.0.1 until it is left."""

    def __init__(self, token: str = "test-token", agents: tuple[str, ...] = ("default", "main")) -> None:
        super().__init__(api_key=token, models=("openclaw", *(f"openclaw/{agent}" for agent in agents)))
        self.token = token
        self.readiness = "ready"
        """Which captured answer `/readyz` gives."""
        self.looks: list[str] = []
        """The paths that were asked for with GET."""
        self.refused = 0
        """How many requests came with a wrong token."""

    def handler(self) -> type[Handler]:
        """What meets the requests."""
        return _GatewayHandler

    @property
    def url(self) -> str:
        """The address to put into OPENCLAW_URL."""
        return self.base_url.removesuffix("/v1")

    @property
    def environ(self) -> dict[str, str]:
        """The provider's settings for this gateway."""
        return {"OPENCLAW_URL": self.url, "OPENCLAW_TOKEN": self.token}


fake_openclaw = FakeOpenClaw


class _GatewayHandler(Handler):
    """The routes of a gateway; `/readyz` needs no token."""

    server: FakeOpenClaw

    def do_GET(self) -> None:  # noqa: N802 -- the name http.server calls
        self.server.looks.append(self.path)
        if self.path == "/readyz":
            as_captured(captured(self.server.readiness))(self)
        else:
            super().do_GET()

    def do_POST(self) -> None:  # noqa: N802 -- the name http.server calls
        # Anything on loopback that says it was forwarded is refused, whatever the token.
        if any(name.lower().startswith("x-forwarded") for name in self.headers):
            as_captured(captured("403-forwarded-for"))(self)
        else:
            super().do_POST()

    def refuse_key(self) -> None:
        self.server.refused += 1
        self.send_whole(401, UNAUTHORIZED)


def captured(case: str) -> dict[str, Any]:
    """One captured answer: `request`, `status`, `headers`, `body` as text, `seconds`."""
    return captured_answers(ANSWERS)[case]


def chat_cases() -> list[str]:
    """All captured answers of the chat endpoint."""
    return [case for case, answer in captured_answers(ANSWERS).items() if answer["request"]["path"] == "/v1/chat/completions"]


def text_of(case: str) -> str:
    """The text of a captured whole answer."""
    return str(json.loads(captured(case)["body"])["choices"][0]["message"]["content"])


def replays(case: str) -> Behaviour:
    """A captured answer, as it came: whole or as a stream."""
    return as_captured(captured(case))
