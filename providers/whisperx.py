"""WhisperX, behind any of the HTTP servers that are written for it. Written against WhisperX 3.8.6.

Remote API, in one of two dialects
    openai  `POST /v1/audio/transcriptions` (`/v1/audio/translations` to translate), the file in `file`, options in the form, a bearer key.
            Met: whisperx-api-server 1.3.1, whisperx-asr-service 0.4.1, vLLM 0.32.0 with a Whisper model.
    asr     `POST /asr`, the file in `audio_file`, options in the query. Met: whisper-asr-webservice 1.10, whisperx-asr-service 0.4.1.
    `GET /openapi.json` tells which of them a server speaks, what each takes, and where it takes it. It is asked for once and remembered,
    and asked for again when a route is gone. A server that speaks both is asked in openai, unless only asr takes what the job asks for.
    A server without it is taken to speak the WHISPERX_DIALECT that is set.

Settings (the audio's own are in `providers.audio`)
    WHISPERX_URL          http(s)://host[:port][/path], with or without a closing `/v1`. `user:password@` is sent as basic authentication
                          and never shown. Certificates are checked against the system's store, or the file that SSL_CERT_FILE names.
    WHISPERX_API_KEY      the key, sent as a bearer token
    WHISPERX_DIALECT      `openai`, `asr`, or `auto`: auto
    WHISPERX_MODEL        the model to ask for where the job names none. Without it the server's own; one that insists on a name is asked
                          for `whisper-1`, which stands for that.
    WHISPERX_PROFILES     the model profiles served: whisperx
    WHISPERX_TIMEOUT      limit of one attempt at audio whose length is not known: 1h
    WHISPERX_TIME_FACTOR  seconds allowed for each second of audio whose length is known, on top of 120: 2

A job's input
    {"audio_url" | "audio_base64" | "audio_path": "…", "language"?: "en", "task"?: "transcribe" | "translate", "prompt"?, "model"?,
     "diarize"?: false, "min_speakers"?, "max_speakers"?, "word_timestamps"?: true, "filename"?, "duration_seconds"?}
    Anything else is refused. What the server does not take is `Unsupported`, and nothing is left out silently. `duration_seconds` is the
    caller's word for the time limit, where the file does not tell.

The result, the same for every server
    text              all of it: the segments, stripped, with one blank between them. Empty when nobody speaks, which is no failure.
    language          as the server says it, or null
    duration_seconds  of the audio, as the server says or a WAV file's header does, or null
    segments          each with `text` and, where the server says so, `start`, `end`, `speaker`, and `words`: each `word` and, where known,
                      `start`, `end`, `score`, `speaker`. None where the server gives only a text.
    speakers          if and only if `diarize` was asked for: who was told apart. Empty means that the server told nobody apart.
    model             only where the server says which it used

Usage: `audio_seconds`, `model`, tokens where the server counts them, and `raw`, what the server counted itself; each only where it is
known. Attempts that failed after the audio had been sent have `audio_seconds` too, because the server may well have worked through it.

These servers transcribe one file at a time, let the others wait in silence, and finish a file even when nobody waits for it any more: a
cancelled run ends here at once, and over there at its end. So a retry must not queue up behind its own ghost. Where the server keeps
results (whisperx-api-server: `GET /v1/audio/transcriptions/{id}/status` and `/result`), each job has an id of its own there, and a retry
asks for that, waits for it while it is under way, and sends the audio only when there is nothing. Elsewhere a retry after a time-out comes
late. A failure that the server does not explain (500) is tried twice, as is an answer that makes no sense.
"""

import contextlib
import itertools
import json
import math
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from http import HTTPStatus
from typing import Any, TypeAlias, TypeGuard
from urllib.parse import urlencode

import attrs
import urllib3
from urllib3.util import Url

from providers import (
    INTERNAL,
    INVALID_INPUT,
    INVALID_OUTPUT,
    TIMEOUT,
    UNAVAILABLE,
    Health,
    Job,
    Never,
    NotCompleted,
    NotNow,
    Result,
    Unsupported,
    provider_settings,
    setting,
)
from providers.audio import SOURCES, Audio, AudioSettings, audio_of
from providers.exchange import (
    CHECK_SECONDS,
    MAX_RETRY_AFTER_SECONDS,
    Exchange,
    cancellation,
    deadline_after,
    outcome_by_status,
    raw_usage,
    read_error,
    request_headers,
    request_id,
    seconds_until,
    token_counts,
)
from providers.settings import DAY_SECONDS, authorization, duration, header_word, profile_name, secrets_in, web_address, whole

BASE_SECONDS = 120.0
"""What any file may take, however short: models are loaded, others wait before it."""
MAX_SECONDS = float(DAY_SECONDS)
MAX_DESCRIPTION_BYTES = 4 * 1024 * 1024
DEFAULT_MODEL = "whisper-1"
"""The name that the servers of the openai dialect take for: your default."""


# ---------------------------------------------------------------- settings


def _base_url(text: str) -> Url:
    url = web_address(text)
    return url._replace(path=re.sub(r"/v1$", "", url.path or ""))


def _dialect(text: str) -> str:
    if text not in ("auto", "openai", "asr"):
        raise ValueError("must be auto, openai or asr")
    return text


def _profiles(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(profile_name(part.strip()) for part in text.split(",") if part.strip()))


@attrs.frozen(kw_only=True)
class WhisperXSettings(AudioSettings):
    """The settings of this module's description, and those of the audio."""

    url: Url = setting("WHISPERX_URL", "address of the WhisperX server", read=_base_url, required=True)
    key: str | None = setting("WHISPERX_API_KEY", "its key", read=header_word, secret=True)
    dialect: str = setting("WHISPERX_DIALECT", "what it speaks: openai, asr, or auto to ask it", default="auto", read=_dialect)
    model: str | None = setting("WHISPERX_MODEL", "the model to ask for; the server's own without it", read=header_word)
    profiles: tuple[str, ...] = setting("WHISPERX_PROFILES", "model profiles it serves", default="whisperx", read=_profiles)
    timeout_seconds: float = setting(
        "WHISPERX_TIMEOUT", "limit of one attempt at audio of unknown length", default="1h", read=duration(0.1, MAX_SECONDS)
    )
    time_factor: int = setting(
        "WHISPERX_TIME_FACTOR", f"seconds allowed per second of audio, on top of {BASE_SECONDS:g}", default="2", read=whole(1, 1_000)
    )

    def problems(self) -> Iterator[str]:
        """What does not go together."""
        if self.key and self.url.auth:
            yield "WHISPERX_URL has user info and WHISPERX_API_KEY is set: the server can be sent only one of them"
        if not self.profiles:
            yield "WHISPERX_PROFILES must name at least one profile"

    @property
    def endpoint(self) -> str:
        """The address as it may be shown."""
        return self.url._replace(auth=None).url

    @property
    def secrets(self) -> tuple[str, ...]:
        """What a server might repeat and nobody should read."""
        return secrets_in({"WHISPERX_API_KEY": self.key or "", "WHISPERX_URL": self.url.url})

    def headers(self, job: Job | None = None) -> dict[str, str]:
        """What every request carries."""
        return request_headers("application/json", authorization(self.key, self.url), job)


# ---------------------------------------------------------------- provider


class WhisperX:
    """Transcribes audio on one WhisperX server. Safe to use from several threads at once."""

    name = "whisperx"
    settings = WhisperXSettings

    def __init__(self, environ: Mapping[str, str]) -> None:
        """Raises `NotConfigured` without WHISPERX_URL and `SettingsError` with all problems of the settings."""
        self._settings = provider_settings(WhisperXSettings, environ)
        self._description_lock = threading.Lock()
        self._known_server: _Server | None = None
        self.model_profiles = self._settings.profiles

    def check(self) -> Health:
        """Ask what the server offers, and whether it takes the key.

        `degraded` when it takes the connection and then says nothing: some of these servers answer no one while they transcribe.
        """
        started = time.monotonic()
        try:
            server = self._known_server = _fetch_description(self._settings, CHECK_SECONDS)
            _check_key(self._settings, server, CHECK_SECONDS - (time.monotonic() - started))
        except NotCompleted as trouble:
            busy = trouble.category == TIMEOUT and getattr(trouble, "burns_attempt", False)
            detail = f"busy or slow: {trouble.message}" if busy else trouble.message
            return Health("degraded" if busy else "unavailable", detail, endpoint=self._settings.endpoint)
        is_model_ignored = self._settings.model is not None and not any(route.supports("model") for route in server.routes)
        return Health(
            "degraded" if is_model_ignored else "ok",
            "WHISPERX_MODEL is set, and the server takes no model" if is_model_ignored else f"speaks {server.dialects}",
            endpoint=self._settings.endpoint,
            latency_ms=(time.monotonic() - started) * 1000,
        )

    def run(self, job: Job) -> Result:
        """Transcribe one file. The attempt is abandoned at the job's deadline or its own limit, and when the job is cancelled."""
        options = _read_options(job.input)
        job.seconds_allowed(MAX_SECONDS)  # raises NotNow when it is too late to begin
        server = self._get_server(job)
        server.route_for(options)  # before the audio is fetched for nothing
        job.report_progress({"stage": "audio"})
        with audio_of(job, self._settings) as audio:
            attempt = _Attempt(job, options, audio, _limit_seconds(self._settings, options, audio))
            try:
                answer = self._answer(server, attempt)
                return Result(_result_value(answer, attempt), _usage(answer, audio))
            except NotCompleted as outcome:
                worked = getattr(outcome, "burns_attempt", outcome.category in (INTERNAL, INVALID_OUTPUT))
                outcome.usage = _usage({}, audio) if worked else None
                raise

    def _get_server(self, job: Job) -> "_Server":
        """What the server offers, as it said when it was asked. One thread asks, the others wait for that, each as long as it may."""
        until = deadline_after(job, self._settings.timeout_seconds)
        while (known := self._known_server) is None:
            _raise_if_over(job, until)
            if self._description_lock.acquire(timeout=0.05):
                try:
                    self._known_server = self._known_server or _fetch_description(self._settings, seconds_until(until), job)
                finally:
                    self._description_lock.release()
        return known

    def _answer(self, server: "_Server", attempt: "_Attempt") -> Mapping[str, Any]:
        """What the server makes of the audio. Raises `NotNow`, `Never`, `Unsupported`."""
        try:
            return _transcribe(self._settings, server, attempt)
        except _NoSuchRoute:
            # Another server may have taken its place.
            again = self._known_server = _fetch_description(self._settings, seconds_until(attempt.until), attempt.job)
            if again == server:
                raise
            return _transcribe(self._settings, again, attempt)


# ---------------------------------------------------------------- input


@attrs.frozen(kw_only=True)
class _Options:
    """What a job asks for, the audio apart."""

    language: str | None = None
    task: str = "transcribe"
    prompt: str | None = attrs.field(default=None, repr=False)
    model: str | None = None
    diarize: bool = False
    min_speakers: int | None = None
    max_speakers: int | None = None
    word_timestamps: bool = True
    filename: str | None = None
    duration_seconds: float | None = None


def _is_text(most: int, pattern: str = r"[^\ud800-\udfff]+") -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and len(value) <= most and bool(re.fullmatch(pattern, value))


_Rule: TypeAlias = tuple[Callable[[Any], bool], str]
_FLAG: _Rule = (lambda value: isinstance(value, bool), "true or false")
_COUNT: _Rule = (lambda value: type(value) is int and 1 <= value <= 100, "a whole number from 1 to 100")
_WEEK: _Rule = (
    lambda value: type(value) in (int, float) and 0 < value <= 7 * DAY_SECONDS,
    "a number of seconds, at most a week",
)
_OPTION_RULES: Mapping[str, _Rule] = {
    "language": (_is_text(3, "[a-z]{2,3}"), "a language's code of two or three small letters, as in en"),
    "task": (_is_text(10, "transcribe|translate"), "transcribe or translate"),
    "prompt": (_is_text(4_000), "a text of 1 to 4000 characters"),
    "model": (_is_text(200, r"[\x21-\x7e]+"), "the name of a model"),
    "diarize": _FLAG,
    "min_speakers": _COUNT,
    "max_speakers": _COUNT,
    "word_timestamps": _FLAG,
    "filename": (_is_text(200), "a text of 1 to 200 characters"),
    "duration_seconds": _WEEK,
}


def _read_options(given: Any) -> _Options:
    """What the job asks for. Raises `Never` with all that is wrong with it, and quotes none of its values."""
    if not isinstance(given, dict):
        raise Never(INVALID_INPUT, f"input must be an object with one of {', '.join(SOURCES)}")
    options = {name: value for name, value in given.items() if name not in SOURCES and value is not None}
    unknown = [name for name in given if name not in SOURCES and name not in _OPTION_RULES]
    problems = [f"input has an unknown member {name}" for name in unknown if re.fullmatch(r"\w{1,40}", name)]
    problems = problems or ["input has an unknown member" for _ in unknown[:1]]
    problems += [
        f"{name} must be {_OPTION_RULES[name][1]}"
        for name, value in options.items()
        if name in _OPTION_RULES and not _OPTION_RULES[name][0](value)
    ]
    problems += [] if problems else _option_conflicts(options)
    if problems:
        raise Never(INVALID_INPUT, "; ".join(problems[:10]))
    return _Options(**options)


def _option_conflicts(options: Mapping[str, Any]) -> Iterator[str]:
    for name in ("min_speakers", "max_speakers"):
        if name in options and not options.get("diarize"):
            yield f"{name} goes with diarize"
    if options.get("min_speakers", 1) > options.get("max_speakers", math.inf):
        yield "min_speakers must not be more than max_speakers"


def _limit_seconds(settings: WhisperXSettings, options: _Options, audio: Audio) -> float:
    """How long the server may take: what the audio's length allows where it is known, else at most what the file's size does."""
    known_seconds = options.duration_seconds if audio.seconds is None else audio.seconds
    allowed = BASE_SECONDS + settings.time_factor * (audio.max_seconds if known_seconds is None else known_seconds)
    return min(allowed, settings.timeout_seconds if known_seconds is None else MAX_SECONDS)


def _raise_if_over(job: Job, until: float, *, burns_attempt: bool = False) -> None:
    if job.cancelled.is_set():
        raise cancellation()
    if time.monotonic() >= until:
        raise NotNow(TIMEOUT, "there was no answer in time", burns_attempt=burns_attempt)


@attrs.frozen
class _Attempt:
    """One job, what it asks for, its audio, and the time there is for it."""

    job: Job
    options: _Options
    audio: Audio
    limit_seconds: float
    until: float = attrs.field(init=False)

    @until.default
    def _until(self) -> float:
        return deadline_after(self.job, self.limit_seconds)


# ---------------------------------------------------------------- what the server offers

_TRANSCRIPTIONS, _TRANSLATIONS, _ASR = "/v1/audio/transcriptions", "/v1/audio/translations", "/asr"
_RESULT_ROUTES = re.compile(rf"{_TRANSCRIPTIONS}/\{{[^/]+\}}/(status|result)")
_PARAMETER_NAMES = {"asr": {"prompt": "initial_prompt"}, "openai": {"word_timestamps": "align"}}
"""What an option is called where it is not called as in the input."""


@attrs.frozen
class _Route:
    """One way to have a file transcribed."""

    dialect: str
    path: str
    tasks: frozenset[str]
    query: frozenset[str]
    form: frozenset[str]
    required: frozenset[str] = frozenset()

    def parameter_name(self, option: str) -> str:
        """What the option is called here."""
        return _PARAMETER_NAMES[self.dialect].get(option, option)

    def supports(self, option: str) -> bool:
        """Whether there is such an option here."""
        return self.parameter_name(option) in self.query | self.form

    def missing_options(self, options: _Options) -> list[str]:
        """What the job asks for and cannot be had here."""
        asked = ("language", "prompt", "model", "diarize", "min_speakers", "max_speakers")
        lacking = [option for option in asked if getattr(options, option) and not self.supports(option)]
        return lacking + ([] if options.task in self.tasks else [f"task {options.task}"])


_ASSUMED = (
    _Route(
        "openai", _TRANSCRIPTIONS, frozenset({"transcribe"}), frozenset(), frozenset({"model", "language", "prompt"}), frozenset({"model"})
    ),
    _Route("openai", _TRANSLATIONS, frozenset({"translate"}), frozenset(), frozenset({"model", "prompt"}), frozenset({"model"})),
    _Route(
        "asr",
        _ASR,
        frozenset({"transcribe", "translate"}),
        frozenset({"task", "language", "initial_prompt", "word_timestamps", "diarize", "min_speakers", "max_speakers"}),
        frozenset(),
    ),
)
"""What a server takes that speaks a dialect and does not describe itself: what the dialect's first server took."""


@attrs.frozen
class _Server:
    """What a server offers: ways to transcribe, in the order to try them, and whether it finds earlier requests again."""

    routes: tuple[_Route, ...]
    keeps_results: bool = False

    @property
    def dialects(self) -> str:
        """The dialects it speaks, for a person to read."""
        return " and ".join(dict.fromkeys(route.dialect for route in self.routes))

    def route_for(self, options: _Options) -> _Route:
        """The first way that does all that is asked for. Raises `Unsupported` if there is none."""
        for route in self.routes:
            if not route.missing_options(options):
                return route
        raise Unsupported(
            "; ".join(f"{route.path} of this server takes no {', no '.join(route.missing_options(options))}" for route in self.routes)
        )


def _fetch_description(settings: WhisperXSettings, limit_seconds: float, job: Job | None = None) -> _Server:
    """What the server says it offers. Raises `NotNow`, which burns no attempt: nothing has been done for the job."""
    cancelled = job.cancelled if job else None
    try:
        with Exchange(settings.url, limit_seconds=limit_seconds, cancelled=cancelled) as exchange:
            response = exchange.send("GET", "/openapi.json", settings.headers())
            _raise_if_unavailable(response, settings)
            text = b"".join(exchange.blocks(response, MAX_DESCRIPTION_BYTES)) if response.status == HTTPStatus.OK else b""
    except NotNow as trouble:
        # A check wants to know whether the connection was taken.
        trouble.burns_attempt = trouble.burns_attempt and job is None
        raise
    return _described_server(_json_object(text), settings)


def _described_server(description: Mapping[str, Any], settings: WhisperXSettings) -> _Server:
    paths = _object_at(description, "paths")
    described = {path: _route(path, _object_at(paths, path, "post"), description) for path in (_TRANSCRIPTIONS, _TRANSLATIONS, _ASR)}
    routes = [route for route in described.values() if route and settings.dialect in ("auto", route.dialect)]
    if not routes:
        routes = [route for route in _ASSUMED if route.dialect == settings.dialect and not paths]
    if not routes:
        wanted = " or ".join(
            path for path, dialect in ((_TRANSCRIPTIONS, "openai"), (_ASR, "asr")) if settings.dialect in ("auto", dialect)
        )
        raise NotNow(UNAVAILABLE, f"/openapi.json does not tell of {wanted} (look at WHISPERX_URL, WHISPERX_DIALECT)", burns_attempt=False)
    kinds = {found[1] for path in paths if (found := _RESULT_ROUTES.fullmatch(path))}
    return _Server(tuple(routes), keeps_results=len(kinds) == 2)


def _route(path: str, operation: Mapping[str, Any], description: Mapping[str, Any]) -> _Route | None:
    if not operation:
        return None
    parameters = operation.get("parameters")
    listed = [item for item in parameters if isinstance(item, dict)] if isinstance(parameters, list) else []
    query = {str(item.get("name")) for item in listed if item.get("in") == "query"}
    bodies = [_object_at(content, "schema") for content in _object_at(operation, "requestBody", "content").values()]
    schema = _object_at(description, *_reference_path(bodies[0])) if bodies and _reference_path(bodies[0]) else bodies[0] if bodies else {}
    form, required = set(_object_at(schema, "properties")), schema.get("required")
    tasks = {"transcribe", "translate"} if "task" in query | form else {"translate"} if path == _TRANSLATIONS else {"transcribe"}
    needed = frozenset(map(str, required)) if isinstance(required, list) else frozenset()
    dialect = "asr" if path == _ASR else "openai"
    return _Route(dialect, path, frozenset(tasks), frozenset(query), frozenset(form), needed)


def _reference_path(schema: Mapping[str, Any]) -> list[str]:
    """The way to what a schema refers to, within the description; none if it says all itself."""
    several = schema.get("allOf")
    reference = (several[0] if isinstance(several, list) and several and isinstance(several[0], dict) else schema).get("$ref")
    return reference.removeprefix("#/").split("/") if isinstance(reference, str) else []


def _object_at(value: Any, *names: str) -> Mapping[str, Any]:
    """The object that lies there, or an empty one."""
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def _check_key(settings: WhisperXSettings, server: _Server, limit_seconds: float) -> None:
    """Raises `NotNow` when the server refuses the key, or everything.

    Its description needs no key. A request without a file does, and ends before any work: with a complaint about the missing file.
    """
    if "Authorization" not in settings.headers():
        return
    with Exchange(settings.url, limit_seconds=max(0.1, limit_seconds)) as exchange:
        response = exchange.send("POST", server.routes[0].path, settings.headers(), b"")
        _raise_if_unavailable(response, settings)


# ---------------------------------------------------------------- request

_RESULT_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
"""Which ids whisperx-api-server takes; it puts one of its own in the place of any other."""


def _transcribe(settings: WhisperXSettings, server: _Server, attempt: _Attempt) -> Mapping[str, Any]:
    """The server's answer about the audio: one it has kept from before, or else a new one."""
    route = server.route_for(attempt.options)
    try:
        result_id = attempt.job.id if server.keeps_results and _RESULT_ID.fullmatch(attempt.job.id) else None
        if result_id and (known := _earlier_answer(settings, attempt)):
            return known
        attempt.job.report_progress({"stage": "transcription", "limit_seconds": round(attempt.limit_seconds)})
        return _upload(settings, route, attempt, result_id)
    except NotNow as outcome:
        if outcome.category == TIMEOUT and outcome.burns_attempt and not server.keeps_results and outcome.retry_in_seconds is None:
            # The server works on. Another limit's time is what it may take to come to the end, with luck.
            outcome.retry_in_seconds = min(MAX_RETRY_AFTER_SECONDS, max(60.0, attempt.limit_seconds) * attempt.job.attempt)
        raise


def _upload(settings: WhisperXSettings, route: _Route, attempt: _Attempt, result_id: str | None) -> Mapping[str, Any]:
    fields = _fields(route, attempt.options, settings.model)
    query = urlencode([field for field in fields if _goes_into_query(route, field[0])])
    form = [field for field in fields if not _goes_into_query(route, field[0])]
    body_headers, body = _multipart(form, "audio_file" if route.dialect == "asr" else "file", attempt)
    # Where an id means nothing to the server it is for its log, and then two of one name at the same time would confuse.
    headers = settings.headers(attempt.job) | body_headers | {"X-Request-ID": result_id or request_id(attempt.job)}
    with Exchange(settings.url, limit_seconds=seconds_until(attempt.until), cancelled=attempt.job.cancelled) as exchange:
        response = exchange.send("POST", f"{route.path}?{query}".rstrip("?"), headers, body)
        if response.status != HTTPStatus.OK:
            raise _error_outcome(response, attempt, settings)
        return _parse_answer(b"".join(exchange.blocks(response)), response.headers.get("content-type", ""), attempt)


def _fields(route: _Route, options: _Options, model: str | None) -> list[tuple[str, str]]:
    """The options, each under its name here. What is always asked for is sent even where a server does not tell that it takes it."""
    if route.dialect == "asr":
        always, words = [("output", "json")], options.word_timestamps
    else:
        detail = ["word", "segment"] if options.word_timestamps else ["segment"]
        always = [("response_format", "verbose_json"), *(("timestamp_granularities[]", one) for one in detail)]
        words = options.word_timestamps or options.diarize  # in the openai dialect the option is called align, and diarize needs it
    default = model or (DEFAULT_MODEL if "model" in route.required else None)
    # One server tells speakers apart unless it is told not to.
    values = attrs.asdict(options) | {"word_timestamps": words, "model": options.model or default}
    names = ("model", "task", "language", "prompt", "word_timestamps", "diarize", "min_speakers", "max_speakers")
    asked = [(route.parameter_name(name), values[name]) for name in names if values[name] is not None and route.supports(name)]
    return always + [(name, str(value).lower() if isinstance(value, bool) else str(value)) for name, value in asked]


def _goes_into_query(route: _Route, name: str) -> bool:
    return name in route.query or (route.dialect == "asr" and name not in route.form)


def _multipart(fields: list[tuple[str, str]], file_field: str, attempt: _Attempt) -> tuple[dict[str, str], Iterable[bytes]]:
    """Headers and body of a form with the fields and then the file, which is read while it is sent."""
    boundary = secrets.token_hex(16)
    start = f"--{boundary}\r\nContent-Disposition: form-data; name="
    parts = [f'{start}"{name}"\r\n\r\n{value}\r\n' for name, value in fields]
    parts.append(f'{start}"{file_field}"; filename="{_file_name(attempt)}"\r\nContent-Type: application/octet-stream\r\n\r\n')
    head, tail = "".join(parts).encode(), f"\r\n--{boundary}--\r\n".encode()
    length = str(len(head) + attempt.audio.size + len(tail))
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}", "Content-Length": length}
    return headers, itertools.chain([head], attempt.audio.blocks(), [tail])


def _file_name(attempt: _Attempt) -> str:
    """A name without anything that a header or a server's disk could trip over."""
    named = re.sub(r"[^A-Za-z0-9._-]+", "_", attempt.options.filename or "")[-100:].lstrip(".")
    return named or f"audio.{attempt.audio.suffix or 'bin'}"


# ---------------------------------------------------------------- what the server has kept


def _earlier_answer(settings: WhisperXSettings, attempt: _Attempt) -> Mapping[str, Any]:
    """The answer to what an earlier attempt had sent, waited for while the server is at it; empty if it has none."""
    path = f"{_TRANSCRIPTIONS}/{attempt.job.id}"
    pause = 0.25
    while (state := _get_object(settings, attempt, f"{path}/status")).get("status") in ("queued", "in_progress"):
        attempt.job.report_progress({"stage": "transcription", "server_stage": str(state.get("stage"))[:100]})
        attempt.job.cancelled.wait(min(pause, seconds_until(attempt.until)))
        _raise_if_over(attempt.job, attempt.until, burns_attempt=True)
        pause = min(5.0, pause * 1.5)
    return {} if state.get("status") != "completed" else _get_object(settings, attempt, f"{path}/result?response_format=verbose_json")


def _get_object(settings: WhisperXSettings, attempt: _Attempt, path: str) -> Mapping[str, Any]:
    """The object at this path; empty if there is none. Raises `NotNow` when the server does not take requests."""
    with Exchange(settings.url, limit_seconds=seconds_until(attempt.until), cancelled=attempt.job.cancelled) as exchange:
        response = exchange.send("GET", path, settings.headers())
        if response.status == HTTPStatus.OK:
            return _parse_answer(b"".join(exchange.blocks(response)), response.headers.get("content-type", ""), attempt)
        _raise_if_unavailable(response, settings)
        return {}


# ---------------------------------------------------------------- answer


def _parse_answer(text: bytes, content_type: str, attempt: _Attempt) -> Mapping[str, Any]:
    """The answer as an object. Its type is often told wrong, so what it looks like counts. Raises `NotNow`, `Never`."""
    if answer := _json_object(text):
        return answer
    # Neither cut JSON, nor a page, nor subtitles; and nothing at all is not silence.
    if content_type.startswith("text/plain") and re.match(rb"\s*[^\s\[{<]", text) and b"-->" not in text:
        with contextlib.suppress(UnicodeDecodeError):
            return {"text": text.decode()}
    raise _retryable_once(attempt, INVALID_OUTPUT, "the server's answer is neither JSON nor a text")


def _json_object(text: bytes) -> Mapping[str, Any]:
    """The JSON object that this is, or an empty one."""
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return answer if isinstance(answer, dict) else {}


def _result_value(answer: Mapping[str, Any], attempt: _Attempt) -> dict[str, Any]:
    """The result. Raises `NotNow` or `Never` when the answer is in no shape that is known."""
    try:
        segments = _segments(answer, with_words=attempt.options.word_timestamps)
        spoken = [segment["text"] for segment in segments] or _text_lines(answer.get("text"))
        value: dict[str, Any] = {
            "text": " ".join(spoken),
            "language": answer.get("language") if isinstance(answer.get("language"), str) else None,
            "duration_seconds": _seconds(answer, attempt.audio),
            "segments": segments,
        }
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise _retryable_once(attempt, INVALID_OUTPUT, "the server's answer has half of a surrogate pair") from None
    except _UnknownFormat as error:
        raise _retryable_once(attempt, INVALID_OUTPUT, f"the server's answer is no transcription: {error}") from None
    if attempt.options.diarize:
        value["speakers"] = _speakers(segments)
    return value | _model(answer)


class _UnknownFormat(Exception):
    """What is odd about an answer, without a word of it."""


def _segments(answer: Mapping[str, Any], *, with_words: bool) -> list[dict[str, Any]]:
    """The segments from wherever the answer has them, with their words."""
    given = answer.get("segments")
    nested = given if isinstance(given, dict) else {}
    if nested or given is None:
        given = nested.get("segments", answer["text"] if isinstance(answer.get("text"), list) else None)
    if given is None and not isinstance(answer.get("text"), str):
        raise _UnknownFormat("it has neither segments nor a text")
    segments = [segment for item in _objects(given, "segments") if (segment := _segment(item))["text"]]
    separate_words = next(filter(None, (nested.get("word_segments"), answer.get("word_segments"), answer.get("words"))), None)
    if separate_words and not any(segment.get("words") for segment in segments):
        _assign_words([_word(item) for item in _objects(separate_words, "words")], segments)
    if not with_words:
        for segment in segments:
            segment.pop("words", None)
    return segments


def _objects(given: Any, what: str) -> list[Mapping[str, Any]]:
    if given is None:
        return []
    if not isinstance(given, list) or not all(isinstance(item, dict) for item in given):
        raise _UnknownFormat(f"its {what} are no list of objects")
    return given


def _segment(item: Mapping[str, Any]) -> dict[str, Any]:
    words = [_word(word) for word in _objects(item.get("words"), "words")]
    text = item.get("text")
    if not isinstance(text, str):
        raise _UnknownFormat("a segment has no text")
    return _numbers(item, "start", "end") | {"text": text.strip()} | _speaker(item) | ({"words": words} if words else {})


def _word(item: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(item.get("word"), str):
        raise _UnknownFormat("a word has no text")
    return {"word": item["word"].strip()} | _numbers(item, "start", "end", "score") | _speaker(item)


def _numbers(item: Mapping[str, Any], *names: str) -> dict[str, float]:
    return {name: item[name] for name in names if _is_number(item.get(name))}


def _is_number(value: Any) -> TypeGuard[float]:
    # WhisperX writes NaN for what it could not align: that is no number, and no reason to throw the rest away.
    return type(value) in (int, float) and -1e15 < value < 1e15


def _speaker(item: Mapping[str, Any]) -> dict[str, str]:
    return {"speaker": item["speaker"]} if isinstance(item.get("speaker"), str) else {}


def _assign_words(words: list[dict[str, Any]], segments: list[dict[str, Any]]) -> None:
    """Put words that stand for themselves into their segments: by their times, and one without a time with the word before it."""
    if words and not segments:
        segments.append({"text": " ".join(word["word"] for word in words)})
    at = 0
    for word in words:
        while at + 1 < len(segments) and word.get("start", -math.inf) >= segments[at + 1].get("start", math.inf):
            at += 1
        segments[at].setdefault("words", []).append(word)


def _text_lines(text: Any) -> list[str]:
    """The lines of a text: some servers put each segment on one."""
    return [line.strip() for line in text.splitlines() if line.strip()] if isinstance(text, str) else []


def _speakers(segments: list[dict[str, Any]]) -> list[str]:
    labels = (item["speaker"] for segment in segments for item in (segment, *segment.get("words", ())) if "speaker" in item)
    return sorted(set(labels))


# ---------------------------------------------------------------- usage


def _seconds(answer: Mapping[str, Any], audio: Audio) -> float | None:
    """How long the audio is. The server has decoded it and knows best; some of them write the number as a text."""
    reported = answer.get("duration")
    if isinstance(reported, str) and re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,20})?", reported):
        reported = float(reported)
    return reported if _is_number(reported) and reported >= 0 else audio.seconds


def _usage(answer: Mapping[str, Any], audio: Audio) -> dict[str, Any] | None:
    """What is known of it; None if nothing is."""
    counted = _object_at(answer, "usage")
    seconds = _seconds(answer, audio)
    if seconds is None and counted.get("type") == "duration" and _is_number(counted.get("seconds")) and counted["seconds"] >= 0:
        seconds = counted["seconds"]
    usage: dict[str, Any] = {"audio_seconds": seconds} | token_counts(counted) | _model(answer) | raw_usage(counted)
    return {name: value for name, value in usage.items() if value is not None} or None


def _model(answer: Mapping[str, Any]) -> dict[str, str]:
    return {"model": answer["model"][:200]} if isinstance(answer.get("model"), str) and answer["model"] else {}


# ---------------------------------------------------------------- error responses

_SETTINGS_BY_STATUS = {
    3: "WHISPERX_URL: redirects are not followed",
    401: "WHISPERX_API_KEY",
    403: "WHISPERX_API_KEY",
    404: "WHISPERX_URL",
    405: "WHISPERX_URL",
}
_NO_ROUTE = frozenset({404, 405})

_UNDECODABLE = re.compile(
    r"could not decode audio|invalid data found when processing input|invalid or corrupted audio|no audio samples|moov atom not found"
    r"|does not contain any stream|could not find codec parameters|failed to load audio: ffmpeg version",
    re.IGNORECASE,
)
"""How servers, and the ffmpeg behind them, say that they cannot read the audio, with whatever status."""
_OUT_OF_RESOURCES = re.compile(r"out of memory|cannot allocate memory|no space left", re.IGNORECASE)
_MODEL_REJECTED = re.compile(
    r'"param"\s*:\s*"model"|"loc"\s*:\s*\[[^\]]*"model"|(invalid|unknown|unsupported) model|model[^"]{0,200}(not found|does not exist)',
    re.IGNORECASE,
)


class _NoSuchRoute(NotNow):
    """The server has no such route, although it had told of it."""


def _raise_if_unavailable(response: urllib3.HTTPResponse, settings: WhisperXSettings) -> None:
    """Raises `NotNow` when the server refuses us, or everything, rather than this one request."""
    if response.status not in _NO_ROUTE and response.status >= 300:
        outcome = outcome_by_status(read_error(response, settings.secrets), _SETTINGS_BY_STATUS)
        if isinstance(outcome, NotNow):
            raise outcome


def _error_outcome(response: urllib3.HTTPResponse, attempt: _Attempt, settings: WhisperXSettings) -> NotNow | Never:
    """The outcome for a file that was not transcribed."""
    status = response.status
    error = read_error(response, settings.secrets)
    full_text = error.body.decode(errors="replace")
    if status in (400, 415, 422, 500) and _UNDECODABLE.search(full_text):
        return Never(INVALID_INPUT, f"the server answered {status}: it cannot decode the audio")
    if status in (400, 404, 422) and _MODEL_REJECTED.search(full_text):
        if attempt.options.model:
            return Never(INVALID_INPUT, error.message)
        return NotNow(UNAVAILABLE, f"{error.message} (look at WHISPERX_MODEL)", burns_attempt=False)
    outcome = outcome_by_status(error, _SETTINGS_BY_STATUS)
    if status in _NO_ROUTE:
        return _NoSuchRoute(outcome.category, outcome.message, burns_attempt=False)
    return _outcome_of_500(outcome, full_text, attempt) if status == HTTPStatus.INTERNAL_SERVER_ERROR else outcome


def _outcome_of_500(outcome: NotNow | Never, full_text: str, attempt: _Attempt) -> NotNow | Never:
    """The outcome for a 500. Half of these servers answer it to what is no audio, to an unknown language or model, without a word why."""
    if attempt.audio.defect:
        return Never(INVALID_INPUT, f"{outcome.message}; the file cannot be audio: {attempt.audio.defect}")
    if _OUT_OF_RESOURCES.search(full_text):
        return NotNow(UNAVAILABLE, outcome.message)
    return _retryable_once(attempt, INTERNAL, outcome.message)


def _retryable_once(attempt: _Attempt, category: str, message: str) -> NotNow | Never:
    """The outcome for what may be an accident once. These models give the same answer to the same file, so twice it is none."""
    return NotNow(category, message) if attempt.job.attempt < 2 else Never(category, f"{message} (again)")
