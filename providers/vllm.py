"""vLLM, through its OpenAI-compatible chat API. Written against vLLM 0.32.0.

Remote API: `POST /v1/chat/completions`, always as a stream with usage; `GET /v1/models` for the check.

Settings
    LLM_BASE_URL      http(s)://host[:port][/path], with or without the closing `/v1` (any `/v<digit>…` at the end is kept as it is).
                      `user:password@` is sent as basic authentication and never shown. Certificates are checked against the system's
                      store, or the file that SSL_CERT_FILE names.
    LLM_API_KEY       the key, sent as a bearer token
    LLM_MODEL         the model to ask for, and the model profile it serves under that name: qwen2.5-14b
    LLM_PROFILES      more profiles and their models, as in `vision=qwen2.5-vl-7b, small=qwen2.5-3b`
    LLM_TIMEOUT       limit of one attempt from its start to its last token: 5m
    LLM_IDLE_TIMEOUT  limit between two pieces of an answer that has begun: 60s. Before the first piece a request may stand in vLLM's queue
                      in silence, so only LLM_TIMEOUT and the job's deadline count there.

A job's input, the result and usage are those of `providers.chat`. Every member of the input goes along as it is (temperature, max_tokens,
response_format, seed, stop, tools, ...), but: `model` is ours, and refused when it names neither the profile nor its model; `guided_json`
and its like are refused, because vLLM ignores them and answers as if nothing had been asked.

Sampling is random, so an answer that is not the JSON asked for may be right in a later attempt, unless the request pins it down (`seed`, or
temperature 0): then the failure is final.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import attrs
from urllib3.util import Url

from providers import INVALID_INPUT, UNAVAILABLE, Health, Job, Never, NotCompleted, NotNow, Result
from providers.chat import (
    STREAMED,
    Completion,
    Server,
    check_models,
    model_problems,
    parse_input,
    result_value,
    served_models,
    stream_completion,
)
from providers.exchange import ErrorResponse, outcome_by_status
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

DEFAULT_MODEL = "qwen2.5-14b"

# ---------------------------------------------------------------- settings


def _base_url(text: str) -> Url:
    """The URL up to and with its version."""
    url = web_address(text)
    return url if re.search(r"/v[0-9]\w*$", url.path or "") else url._replace(path=f"{url.path or ''}/v1")


@attrs.frozen(kw_only=True)
class VLLMSettings:
    """What vLLM needs to know."""

    url: Url = setting("LLM_BASE_URL", "vLLM, or another server with the OpenAI chat API", read=_base_url, required=True)
    key: str | None = setting("LLM_API_KEY", "its key", read=header_word, secret=True)
    model: str = setting("LLM_MODEL", "the model to ask for, and the model profile served", default=DEFAULT_MODEL, read=profile_name)
    profiles: dict[str, str] | None = setting("LLM_PROFILES", "more profiles and their models: `vision=qwen2.5-vl-7b, …`", read=pairs)
    timeout_seconds: float = setting("LLM_TIMEOUT", "limit of one attempt", default="5m", read=duration())
    idle_seconds: float = setting("LLM_IDLE_TIMEOUT", "longest pause within an answer that has begun", default="60s", read=duration())

    def models(self) -> dict[str, str]:
        """The model of each profile."""
        return {self.model: self.model, **(self.profiles or {})}

    def problems(self) -> Iterator[str]:
        """What contradicts itself."""
        if self.key and self.url.auth:
            yield "LLM_BASE_URL has user info and LLM_API_KEY is set: the server can be sent only one of them"
        if self.models()[self.model] != self.model:
            yield f"LLM_PROFILES gives {self.model} another model, but that profile is LLM_MODEL and means itself"


# ---------------------------------------------------------------- provider


class VLLM:
    """Runs chat completions on one vLLM server. Safe to use from several threads at once."""

    name = "vllm"
    settings = VLLMSettings

    def __init__(self, environ: Mapping[str, str]) -> None:
        """Raises `NotConfigured` without LLM_BASE_URL and `SettingsError` with all problems of the settings."""
        given = provider_settings(VLLMSettings, environ)
        self._models = given.models()
        self.model_profiles = tuple(self._models)
        self._server = Server(
            url=given.url,
            authorization=authorization(given.key, given.url),
            secrets=secrets_in({"LLM_API_KEY": given.key or "", "LLM_BASE_URL": given.url.url}),
            timeout_seconds=given.timeout_seconds,
            idle_seconds=given.idle_seconds,
            outcome_of=_outcome,
        )

    def check(self) -> Health:
        """Ask for the list of models, with the key. `degraded` when one of ours is not among them."""
        return check_models(self._server, self._models.values(), lambda: served_models(self._server))

    def run(self, job: Job) -> Result:
        """Run one chat completion, abandoned at the job's deadline, at LLM_TIMEOUT or when the job is cancelled."""
        body = _request_body(job, self._models[job.model_profile])
        completion = Completion()
        try:
            stream_completion(self._server, job, body, completion)
            return Result(result_value(completion, body, is_deterministic=_is_deterministic(body)), completion.usage())
        except NotCompleted as outcome:
            outcome.usage = completion.usage()
            raise


# ---------------------------------------------------------------- request


def _request_body(job: Job, model: str) -> dict[str, Any]:
    """The body to send. Raises `Never` when the input is none of the forms described."""
    request = parse_input(job.input)
    if problems := "; ".join([*model_problems(request, model, job.model_profile), *_ignored_members(request)]):
        raise Never(INVALID_INPUT, problems)
    return {**request, "model": model, **STREAMED}


def _ignored_members(request: Mapping[str, Any]) -> Iterator[str]:
    """What vLLM would quietly not do."""
    for name in ("guided_json", "guided_regex", "guided_choice", "guided_grammar"):
        if request.get(name) is not None:
            yield f"vLLM ignores {name}: use response_format or structured_outputs"


def _is_deterministic(body: Mapping[str, Any]) -> bool:
    return body.get("seed") is not None or body.get("temperature") == 0


# ---------------------------------------------------------------- error responses

_SETTINGS_BY_STATUS = {
    3: "LLM_BASE_URL: redirects are not followed",
    401: "LLM_API_KEY",
    403: "LLM_API_KEY",
    404: "LLM_BASE_URL, LLM_MODEL and LLM_PROFILES",
    405: "LLM_BASE_URL",
}


def _outcome(error: ErrorResponse) -> NotCompleted:
    if error.status == 500 and "after shutdown" in error.text and not error.in_stream:
        # A vLLM that is shutting down refuses new work in these words, with 500 instead of 503.
        return NotNow(UNAVAILABLE, error.message, retry_in_seconds=error.retry_in_seconds, burns_attempt=False)
    return outcome_by_status(error, _SETTINGS_BY_STATUS)
