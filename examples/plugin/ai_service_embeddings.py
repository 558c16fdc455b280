"""Embeddings from any server with the OpenAI API (llama.cpp, Ollama, vLLM), as a provider of AI Service.

Remote API: `POST /embeddings` for the texts, some at a time; `GET /models` for the check.

Settings
    EMBEDDINGS_URL      http(s)://host[:port]/v1, the part before /embeddings; `user:password@` is sent as basic authentication
    EMBEDDINGS_KEY      the key, sent as a bearer token
    EMBEDDINGS_MODEL    the model to ask for, and the one model profile served: nomic-embed-text
    EMBEDDINGS_BATCH    texts in one request: 32
    EMBEDDINGS_TIMEOUT  limit of one attempt: 5m

A job's input is a text, or a list of texts. The result is `{"embeddings": [[…], …], "model": "…"}`, one list of numbers per text in their
order. Usage: `prompt_tokens`, `total_tokens`, `model`; a failed attempt has what its requests came to. Progress: `{"done": 64, "of": 500}`.
"""

import json
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import attrs
import msgspec
from urllib3.util import Url

from providers import (
    CANCELLED,
    CONTEXT_LENGTH_EXCEEDED,
    INVALID_INPUT,
    INVALID_OUTPUT,
    TIMEOUT,
    Health,
    Job,
    Never,
    NotCompleted,
    NotNow,
    Result,
    provider_settings,
    secrets_in,
    setting,
)
from providers.exchange import CHECK_SECONDS, ErrorResponse, Exchange, outcome_by_status, read_error
from providers.settings import authorization, declared, duration, header_word, profile_name, web_address, whole

T = TypeVar("T")


@attrs.frozen(kw_only=True)
class Settings:
    """What the environment says of the server."""

    url: Url = setting("EMBEDDINGS_URL", "server with the OpenAI API, up to its /v1", read=web_address, required=True)
    key: str | None = setting("EMBEDDINGS_KEY", "its key", read=header_word, secret=True)
    model: str = setting("EMBEDDINGS_MODEL", "the model, and the model profile served", default="nomic-embed-text", read=profile_name)
    batch: int = setting("EMBEDDINGS_BATCH", "texts in one request", default="32", read=whole(1, 2048))
    timeout_seconds: float = setting("EMBEDDINGS_TIMEOUT", "limit of one attempt", default="5m", read=duration())

    def problems(self) -> Iterator[str]:
        """What is wrong although each setting is right by itself."""
        if self.key and self.url.auth:
            yield "EMBEDDINGS_URL has user info and EMBEDDINGS_KEY is set: the server can be sent only one of them"


class Embeddings:
    """Turns texts into embeddings on one server. Safe to use from several threads at once: nothing of a job stays in it."""

    name = "embeddings"
    settings = Settings

    def __init__(self, environ: Mapping[str, str]) -> None:
        """Raises `NotConfigured` without EMBEDDINGS_URL and `SettingsError` with all problems of the settings."""
        self._settings = provider_settings(Settings, environ)
        self._secrets = secrets_in(environ, declared(Settings))
        self.model_profiles = (self._settings.model,)

    def check(self) -> Health:
        """Ask for the list of models. `degraded` when ours is not among them: some servers load a model when it is asked for."""
        started, endpoint = time.monotonic(), self._settings.url._replace(auth=None).url
        try:
            with Exchange(self._settings.url, limit_seconds=CHECK_SECONDS) as exchange:
                models = tuple(model.id for model in self._answer(exchange, _Models, "GET", "/models").data)
        except NotCompleted as trouble:
            return Health("unavailable", trouble.message, endpoint=endpoint)
        # Ollama lists a model with its tag.
        known = not {self._settings.model, f"{self._settings.model}:latest"}.isdisjoint(models)
        detail = None if known else f"{self._settings.model} is not among the models served: {', '.join(models) or 'none'}"
        latency_ms = (time.monotonic() - started) * 1000
        return Health("ok" if known else "degraded", detail, models=models, endpoint=endpoint, latency_ms=latency_ms)

    def run(self, job: Job) -> Result:
        """Send the texts, some at a time, until all are done, the job is cancelled or its time is over."""
        texts, left, batch = _texts(job.input), job.seconds_left(), self._settings.batch
        until = time.monotonic() + min(self._settings.timeout_seconds, float("inf") if left is None else left)
        embeddings: list[list[float]] = []
        counts = Counter[str]()
        try:
            while len(embeddings) < len(texts):
                answer = self._embed(texts[len(embeddings) :][:batch], job, until)
                embeddings += [item.embedding for item in answer.data]
                counts.update(answer.counts())
                job.report_progress({"done": len(embeddings), "of": len(texts)})
        except NotCompleted as outcome:
            outcome.usage = self._usage(counts)
            if isinstance(outcome, NotNow) and embeddings:
                outcome.burns_attempt = True  # the server has worked for this job, whatever became of the last request
            raise
        return Result({"embeddings": embeddings, "model": self._settings.model}, self._usage(counts))

    def _embed(self, texts: list[str], job: Job, until: float) -> "_Answer":
        """One request. Raises `NotNow` or `Never`."""
        if job.cancelled.is_set():
            raise NotNow(CANCELLED, "the job was cancelled", burns_attempt=False)
        if (limit_seconds := until - time.monotonic()) <= 0:
            raise NotNow(TIMEOUT, "the job's time was over", burns_attempt=False)
        body = json.dumps({"model": self._settings.model, "input": texts}).encode()
        with Exchange(self._settings.url, limit_seconds=limit_seconds, cancelled=job.cancelled) as exchange:
            answer = self._answer(exchange, _Answer, "POST", "/embeddings", body)
        answer.data.sort(key=lambda item: item.index)
        if [item.index for item in answer.data] != list(range(len(texts))):
            raise NotNow(INVALID_OUTPUT, f"the server gave {len(answer.data)} embeddings for {len(texts)} texts")
        return answer

    def _answer(self, exchange: Exchange, kind: type[T], method: str, path: str, body: bytes | None = None) -> T:
        """The decoded answer. Raises `NotNow` or `Never` for a refusal, and for what is no such answer."""
        headers = {"Accept": "application/json", "Content-Type": "application/json", "User-Agent": "ai-service-embeddings"}
        if word := authorization(self._settings.key, self._settings.url):
            headers["Authorization"] = word
        response = exchange.send(method, path, headers, body)
        if response.status != 200:
            raise _outcome(read_error(response, self._secrets))
        try:
            return msgspec.json.decode(b"".join(exchange.blocks(response)), type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            raise NotNow(INVALID_OUTPUT, f"{method} {path} was not answered as the OpenAI API says") from None

    def _usage(self, counts: Mapping[str, int]) -> dict[str, Any] | None:
        """None while nothing was counted: absent is not zero."""
        return {**counts, "model": self._settings.model} if counts else None


def _texts(given: Any) -> list[str]:
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise Never(INVALID_INPUT, "input must be a text or a list of texts, none of them empty")
    return texts


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


class _Embedding(msgspec.Struct):
    index: int
    embedding: list[float]


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    total_tokens: int | None = None


class _Answer(msgspec.Struct):
    data: list[_Embedding]
    usage: _Usage | None = None

    def counts(self) -> dict[str, int]:
        counted = {} if self.usage is None else msgspec.structs.asdict(self.usage)
        return {name: count for name, count in counted.items() if count is not None}


def _outcome(error: ErrorResponse) -> NotNow | Never:
    # llama.cpp says the first with status 500, vLLM and Ollama say the second with 400.
    if re.search(r"too large to process|context length", error.text):
        return Never(CONTEXT_LENGTH_EXCEEDED, error.message)
    return outcome_by_status(error, {401: "EMBEDDINGS_KEY", 404: "EMBEDDINGS_URL and EMBEDDINGS_MODEL"})
