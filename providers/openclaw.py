"""OpenClaw, through its gateway's OpenAI-compatible chat API. Written against OpenClaw 2026.9.6.

Remote API: `POST /v1/chat/completions`, always as a stream with usage; `GET /readyz` and `GET /v1/models` for the check. The gateway has
chat completions switched off by default (`gateway.http.endpoints.chatCompletions.enabled`).

Settings
    OPENCLAW_URL           http(s)://host[:port][/path] of the gateway. Without it, or without its token, this provider is off.
    OPENCLAW_TOKEN         the gateway's token, sent as a bearer token. It is an operator's credential: it may do anything there.
    OPENCLAW_AGENT         the agent that does the work, `default` being the gateway's default one: default
    OPENCLAW_PROFILES      the profiles it serves, as in `openclaw, qwen2.5-14b, vision=seer`: by OPENCLAW_AGENT, or by an agent of their
                           own: openclaw. A profile of vLLM's named here is served instead of it or after it, as PROFILE_PROVIDERS says.
    OPENCLAW_TIMEOUT       limit of one attempt from its start to its last word: 10m. The gateway's own retries alone may take 90 s, and
                           more requests than its `maxConcurrent` wait in silence.
    OPENCLAW_IDLE_TIMEOUT  limit between two pieces of an answer that has begun: 2m

What stands behind the name of a model is an agent, no proxy. It wraps the prompt in its own (8 KB and more) with the time and a session of
each request; makes one text of all turns but the system's; trims the answer, and takes `MEDIA:` lines, `<think>`, `<final>` and, inside
JSON too, `[[reply_to_current]]` out of it, without a word; asks a model again that answered nothing. An agent with tools runs them on the
gateway's host, and nothing in the answer tells. So it has to be set up without.

A job's input and the result are those of `providers.chat`, but only what the gateway passes on is sent: text messages of system, user and
assistant, `response_format`, `temperature`, `top_p`, `seed`, `stop`, `max_tokens`, `max_completion_tokens` and the two penalties. An input
with any other member, an image or tool calls it would answer as if they were not there: such a job is `unsupported`, left to another
provider of its profile. `user` is dropped, because requests of one user are joined into one conversation.

Always as a stream, because that tells more (both ways were tried on the gateway). A gateway that died is noticed by its silence. An answer
that the gateway alters after it has begun, or begins anew, ends in an error instead of a success. A text that was cut at max_tokens comes
without the sentence that is put under it otherwise. And `upstream provider timeout` (408) is said of an upstream that is not there as well
as of one that broke off or fell silent: whether words had come tells them apart. A key put aside after a 401 is named, and is no
`internal error`. What is lost is the status of such errors; `type` and message stand for it.

Refused though they look like answers: the sentences the gateway says in the model's place, JSON that is none. What the gateway took out
cannot be seen.

Usage: as in `providers.chat`, but `agent` instead of `model`, because the gateway does not say which model answered; the tokens of all it
asked that model, its own prompt included; none where all are zero, which is how it says that it does not know.
"""

import re
import time
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from typing import Any

import attrs
import msgspec
from urllib3.util import Url

from providers import (
    INVALID_OUTPUT,
    RATE_LIMITED,
    TRUNCATED,
    UNAUTHORIZED,
    UNAVAILABLE,
    Health,
    Job,
    NotCompleted,
    NotNow,
    Result,
    Unsupported,
)
from providers.chat import (
    STREAMED,
    Completion,
    Server,
    check_models,
    get_json,
    model_problems,
    parse_input,
    result_value,
    served_models,
    stream_completion,
)
from providers.exchange import CHECK_SECONDS, TOKEN_COUNTS, ErrorResponse, outcome_by_status
from providers.settings import (
    authorization,
    duration,
    header_word,
    pairs,
    profile_name,
    provider_settings,
    secrets_in,
    setting,
    web_address,
)

HOLD_OFF_SECONDS = 60.0
"""How long a token that was refused is not tried again: after ten within a minute the gateway refuses the right one as well."""

# ---------------------------------------------------------------- settings


def _gateway_url(text: str) -> Url:
    """The URL up to and with its version, as for other chat servers; the gateway's other routes stand beside that."""
    url = web_address(text)
    return url._replace(path=f"{(url.path or '').removesuffix('/v1')}/v1")


def _agent_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", text):
        raise ValueError("must be an agent's name alone, without openclaw/")
    return text


def _profiles(text: str) -> dict[str, str]:
    """Profile → agent, the empty text for one without."""
    items = [item.strip() for item in text.split(",") if item.strip()]
    agents = {profile: _agent_name(agent) for profile, agent in pairs(",".join(item for item in items if "=" in item)).items()}
    plain = {profile_name(item): "" for item in items if "=" not in item}
    if not items or agents.keys() & plain.keys():
        raise ValueError("must name one profile at least, and each of them once")
    return plain | agents


@attrs.frozen(kw_only=True)
class OpenClawSettings:
    """What OpenClaw needs to know."""

    url: Url = setting("OPENCLAW_URL", "the gateway of OpenClaw", read=_gateway_url, required=True)
    token: str = setting("OPENCLAW_TOKEN", "its token", read=header_word, secret=True, required=True)
    agent: str = setting("OPENCLAW_AGENT", "the agent that does the work", default="default", read=_agent_name)
    profiles: dict[str, str] = setting(
        "OPENCLAW_PROFILES", "the profiles served, some by agents of their own: `openclaw, vision=seer`", default="openclaw", read=_profiles
    )
    timeout_seconds: float = setting("OPENCLAW_TIMEOUT", "limit of one attempt", default="10m", read=duration())
    idle_seconds: float = setting("OPENCLAW_IDLE_TIMEOUT", "longest pause within an answer that has begun", default="2m", read=duration())

    def models(self) -> dict[str, str]:
        """What to ask for, for each profile."""
        return {profile: f"openclaw/{agent or self.agent}" for profile, agent in self.profiles.items()}

    def problems(self) -> Iterator[str]:
        """What contradicts itself."""
        if self.url.auth:
            yield "OPENCLAW_URL has user info: the gateway takes only OPENCLAW_TOKEN"


# ---------------------------------------------------------------- provider


class OpenClaw:
    """Runs chat completions through agents of one OpenClaw gateway. Safe to use from several threads at once."""

    name = "openclaw"
    settings = OpenClawSettings

    def __init__(self, environ: Mapping[str, str]) -> None:
        """Raises `NotConfigured` without OPENCLAW_URL and OPENCLAW_TOKEN, and `SettingsError` with all problems of the settings."""
        given = provider_settings(OpenClawSettings, environ)
        self._models = given.models()
        self.model_profiles = tuple(self._models)
        self._token_rejected_at = float("-inf")
        self._server = Server(
            url=given.url,
            authorization=authorization(given.token, given.url),
            secrets=secrets_in({"OPENCLAW_TOKEN": given.token}),
            timeout_seconds=given.timeout_seconds,
            idle_seconds=given.idle_seconds,
            outcome_of=self._outcome,
        )

    def check(self) -> Health:
        """Ask whether the gateway is ready, and for the list of its agents, with the token. `degraded` when one of ours is not among them.

        The model server behind the gateway is not looked at: nothing there tells how it is.
        """
        return check_models(self._server, self._models.values(), self._agents)

    def run(self, job: Job) -> Result:
        """Run one chat completion, abandoned at the job's deadline, at OPENCLAW_TIMEOUT or when the job is cancelled."""
        body = _request_body(job, self._models[job.model_profile])
        completion = Completion()
        try:
            self._raise_during_hold_off()
            stream_completion(self._server, job, body, completion)
            _reject_gateway_text("".join(completion.content))
            return Result(result_value(completion, body, is_deterministic=False), _usage(completion, body["model"]))
        except NotCompleted as outcome:
            outcome.usage = _usage(completion, body["model"])
            raise

    def _agents(self) -> tuple[str, ...]:
        """The agents of a gateway that is ready. Raises `NotNow`."""
        started = time.monotonic()
        self._raise_during_hold_off()
        _raise_unless_ready(self._server)
        return served_models(self._server, limit_seconds=CHECK_SECONDS - (time.monotonic() - started))

    def _raise_during_hold_off(self) -> None:
        """Raises `NotNow` while a refused token is not to be tried again."""
        left = self._token_rejected_at + HOLD_OFF_SECONDS - time.monotonic()
        if left > 0:
            message = f"the gateway refused its token (look at OPENCLAW_TOKEN), which is not tried again for {left:.0f} s"
            raise NotNow(UNAUTHORIZED, message, retry_in_seconds=left, burns_attempt=False)

    def _outcome(self, error: ErrorResponse) -> NotCompleted:
        if error.status == HTTPStatus.UNAUTHORIZED and error.kind == "unauthorized":
            self._token_rejected_at = time.monotonic()
        return _outcome(error)


# ---------------------------------------------------------------- check


class _Readiness(msgspec.Struct):
    ready: bool
    failing: list[str] = []


def _raise_unless_ready(server: Server) -> None:
    """Raises `NotNow` when the gateway takes no work: it is draining, or something else than a gateway."""
    gateway = attrs.evolve(server, url=server.url._replace(path=(server.url.path or "").removesuffix("/v1")), authorization=None)
    readiness = get_json(gateway, "/readyz", _Readiness, limit_seconds=CHECK_SECONDS / 2, accepted_statuses=(200, 503))
    if not readiness.ready:
        raise NotNow(UNAVAILABLE, f"the gateway is not ready: {', '.join(readiness.failing)[:200]}", burns_attempt=False)


# ---------------------------------------------------------------- request

_SAMPLING = {"temperature", "top_p", "seed", "frequency_penalty", "presence_penalty"}
_FORWARDED = frozenset({"messages", "response_format", "stop", "max_tokens", "max_completion_tokens"} | _SAMPLING)
"""What was seen to reach the model. The gateway takes whatever else without a word, and drops it."""
_REPLACED = frozenset({"model", "stream", "stream_options", "n", "user"})


def _request_body(job: Job, model: str) -> dict[str, Any]:
    """The body to send. Raises `Never` for no form of input, `Unsupported` for what would be answered as if it had not been asked."""
    request = parse_input(job.input)
    if problems := "; ".join([*model_problems(request, model, job.model_profile), *_unsupported_parts(request)]):
        raise Unsupported(problems)
    forwarded = {name: value for name, value in request.items() if name in _FORWARDED}
    return {**forwarded, "model": model, **STREAMED}


def _unsupported_parts(request: Mapping[str, Any]) -> Iterator[str]:
    others = [name for name, value in request.items() if value is not None and name not in _FORWARDED | _REPLACED]
    if others:
        # The names are the caller's text: what does not look like a parameter is not repeated.
        names = [name for name in others if re.fullmatch(r"[a-z_]{1,40}", name)]
        yield f"OpenClaw does not pass on {', '.join(names[:10]) or 'what else is asked for'}"
    if not all(map(_is_plain_text, request["messages"])):
        yield "OpenClaw passes on messages of system, user and assistant only, and of these only text"


def _is_plain_text(message: Mapping[str, Any]) -> bool:
    content, others = message.get("content"), {name for name, value in message.items() if value is not None} - {"role", "content"}
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = all(isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts)
    return texts and not others and message.get("role") in ("system", "developer", "user", "assistant")


# ---------------------------------------------------------------- answer

_GATEWAY_SENTENCE = re.compile(r"^(No response from OpenClaw\.$|⚠\ufe0f? (Agent couldn't generate a|Turn yielded without))", re.MULTILINE)
_GATEWAY_NOTICE = re.compile(r"^⚠\ufe0f? Reply truncated at the model's output token limit", re.MULTILINE)


def _reject_gateway_text(content: str) -> None:
    """Raises `NotNow` for an answer that is not the model's own."""
    if _GATEWAY_NOTICE.search(content):
        raise NotNow(TRUNCATED, "the answer was cut off, and the gateway put a sentence of its own under it")
    if _GATEWAY_SENTENCE.search(content):
        raise NotNow(INVALID_OUTPUT, "the gateway answered with a sentence of its own in the model's place")


def _usage(completion: Completion, agent: str) -> dict[str, Any] | None:
    usage = completion.usage()
    if usage is None:
        return None
    unknown = not any(usage.get(name) for name in TOKEN_COUNTS)
    return {"agent": agent} | {name: value for name, value in usage.items() if name != "model" and not (unknown and name in TOKEN_COUNTS)}


# ---------------------------------------------------------------- error responses

_SETTINGS_BY_STATUS = {
    3: "OPENCLAW_URL: redirects are not followed",
    401: "OPENCLAW_TOKEN",
    403: "OPENCLAW_URL, and the gateway's trustedProxies",
    404: "OPENCLAW_URL, and the gateway's http.endpoints.chatCompletions",
    405: "OPENCLAW_URL",
}
_UPSTREAM_KEY_HINT = "look at the keys in the gateway's own configuration: the model server behind it refuses them"

_OUTCOMES_BY_TYPE: dict[str | None, tuple[str, str | None]] = {
    "authentication_error": (UNAUTHORIZED, _UPSTREAM_KEY_HINT),
    "permission_error": (UNAUTHORIZED, _UPSTREAM_KEY_HINT),
    "insufficient_quota": (UNAVAILABLE, "look at the account that the gateway uses at its model server"),
    "rate_limit_error": (RATE_LIMITED, None),
    "rate_limited": (RATE_LIMITED, "look at OPENCLAW_TOKEN: the gateway says this after wrong ones"),
    "service_unavailable": (UNAVAILABLE, None),
}
"""Type of error: category, and where to look. No work was done for these."""

_OUTCOMES_BY_TEXT = {
    "upstream provider overloaded": (UNAVAILABLE, False),
    "upstream provider timeout": (UNAVAILABLE, False),
    "upstream provider error": (UNAVAILABLE, True),
    "temporarily disabled after a provider auth/billing failure": (UNAUTHORIZED, False),
    "cannot be represented as an append-only response stream": (INVALID_OUTPUT, True),
}
"""Words in an `api_error`: category, and whether it burns an attempt even when nothing of the answer had come.

A time-out does not. It is what the gateway says, after 0.2 s or 90 s of own retries, when nobody listens at its upstream; also when that
broke off, which is rarer before the first word. An upstream that takes the request and is silent is an `internal error` instead.
An upstream's own 500 and most of its 503 are an `error`: it may have died of the job.
"""


def _outcome(error: ErrorResponse) -> NotCompleted:
    """What a refusal means, by status, type and, within an `api_error` or `invalid_request_error`, by message."""
    if error.kind in _OUTCOMES_BY_TYPE:
        category, hint = _OUTCOMES_BY_TYPE[error.kind]
        return _not_now(error, category, burns=False, hint=hint)
    if error.kind == "invalid_request_error":
        return _invalid_request(error)
    known = next((outcome for words, outcome in _OUTCOMES_BY_TEXT.items() if words in error.text), None)
    if error.kind == "api_error" and known and error.status != HTTPStatus.GATEWAY_TIMEOUT:
        return _not_now(error, known[0], burns=known[1])
    return outcome_by_status(error, _SETTINGS_BY_STATUS)


def _invalid_request(error: ErrorResponse) -> NotCompleted:
    """The gateway's own refusals, and those of the model server: only these begin with a status."""
    upstream = re.match(r"([45]\d\d) ", error.text)
    if error.text.startswith(("Unknown agent", "Invalid `model`")):
        return _not_now(error, UNAVAILABLE, burns=False, hint="look at OPENCLAW_AGENT and OPENCLAW_PROFILES")
    if error.text.startswith("Unknown model") or (upstream and upstream[1] == "404"):
        return _not_now(error, UNAVAILABLE, burns=False, hint="look at the models in the gateway's own configuration")
    if upstream:
        return outcome_by_status(attrs.evolve(error, status=int(upstream[1])), _SETTINGS_BY_STATUS)
    return Unsupported(error.message)


def _not_now(error: ErrorResponse, category: str, *, burns: bool, hint: str | None = None) -> NotNow:
    message = f"{error.message} ({hint})" if hint else error.message
    return NotNow(category, message, retry_in_seconds=error.retry_in_seconds, burns_attempt=burns or error.has_output)
