"""The WhisperX provider against fake servers that answer as real ones were seen to; at the end, against real ones if there are any.

A real server: REAL_WHISPERX_URL and REAL_WHISPERX_KEY in the environment, REAL_FIXTURES for the folder of speech, and `pytest -m real`.
For the tests that start and kill servers: REAL_WHISPERX_COMMAND as real_servers.py has it, a command that also takes DIALECT, SHAPE and
BLOCKING from the environment.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
import wave
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import attrs
import pytest
from fake_whisperx import (
    ASR,
    TRANSCRIPTIONS,
    TRANSLATIONS,
    Behaviour,
    FakeWhisperX,
    captured,
    captured_answers,
    described,
    drops_connection,
    fake_whisperx,
    hangs,
    refuses,
    replays,
    silence,
    slow,
    trickles,
    works_on,
)
from real_servers import command_of

from providers import (
    CANCELLED,
    INTERNAL,
    INVALID_INPUT,
    INVALID_OUTPUT,
    RATE_LIMITED,
    TIMEOUT,
    UNAUTHORIZED,
    UNAVAILABLE,
    UNSUPPORTED,
    Job,
    NotCompleted,
    NotConfigured,
    NotNow,
    Result,
    SettingsError,
)
from providers.audio import AUDIO_UNAVAILABLE
from providers.conformance import ProviderConformance, closed_port, outcome_of, silent_server, timed
from providers.settings import provider_settings
from providers.whisperx import WhisperX, WhisperXSettings

API, SERVICE, WEBSERVICE, OF_VLLM = "whisperx-api-server", "whisperx-asr-service", "whisper-asr-webservice", "whisper-vllm"
KINDS = (API, SERVICE, WEBSERVICE, OF_VLLM)

EN = "The meeting starts at nine in the morning. Please send the report before Friday. Our server room is too hot today."
EN_BEGINS = "The meeting starts at nine in the morning. Please send the report before Friday."
EN_MISHEARD = "The meeting starts at nine in the morning. Thank you very much and goodbye. Our server room is too hot today."
DE = "Guten Morgen, willkommen zur Besprechung. Der Bericht ist am Freitag fertig."
S3 = "We agreed to buy three new printers."

# Every answer with status 200 that a real server gave to a file: the text that it holds, or None where it is no transcription.
TEXTS: dict[tuple[str, str], str | None] = {
    (API, "json"): EN,
    (API, "verbose-json-aligned"): EN,
    (API, "verbose-json-not-aligned"): EN,
    (API, "auto-language"): DE,
    (API, "text"): EN,
    (API, "srt"): None,
    (API, "silence"): "",
    (API, "silence-json"): "",
    (SERVICE, "openai-json"): EN_BEGINS,
    (SERVICE, "openai-verbose-json-words"): EN_BEGINS,
    (SERVICE, "openai-verbose-json"): EN_BEGINS,
    (SERVICE, "silence"): "",
    (SERVICE, "asr-json"): EN,
    (WEBSERVICE, "asr-json"): EN,
    (WEBSERVICE, "asr-txt"): EN_MISHEARD,
    (WEBSERVICE, "asr-srt"): None,
    (WEBSERVICE, "asr-silence"): "",
    (WEBSERVICE, "unknown-output-is-txt"): EN,
    (OF_VLLM, "json"): S3,
    (OF_VLLM, "json-auto-language"): "Wir kaufen drei neue Drucker.",
    (OF_VLLM, "verbose-json-words-asked"): "",
}

# What a server does, and what becomes of the job: final (Never) or not now; whether that burns an attempt; the category.
BURNT, UNHARMED, FINAL = "not now, attempt burnt", "not now, unharmed", "final"
FAILURES: list[tuple[str, str, Behaviour, str, str]] = [
    ("no key", API, replays("401-no-key"), UNHARMED, UNAUTHORIZED),
    ("wrong key", API, replays("403-bad-key"), UNHARMED, UNAUTHORIZED),
    ("wrong key of vLLM", OF_VLLM, replays("401-bad-key"), UNHARMED, UNAUTHORIZED),
    ("shutting down", API, replays("503-shutting-down"), UNHARMED, UNAVAILABLE),
    ("rate limit", API, refuses(429), UNHARMED, RATE_LIMITED),
    ("redirect", API, refuses(307, {"Location": "http://127.0.0.1:1/"}), UNHARMED, UNAVAILABLE),
    ("no such route", WEBSERVICE, replays("404-openai-route"), UNHARMED, UNAVAILABLE),
    ("wrong method", API, refuses(405), UNHARMED, UNAVAILABLE),
    ("model missing", SERVICE, replays("422-model-missing"), UNHARMED, UNAVAILABLE),
    ("model of the settings unknown, 400", SERVICE, replays("400-model"), UNHARMED, UNAVAILABLE),
    ("model of the settings unknown, 404", OF_VLLM, replays("404-model"), UNHARMED, UNAVAILABLE),
    ("bad gateway", API, refuses(502, body=b"<h1>Bad Gateway</h1>", content_type="text/html"), BURNT, UNAVAILABLE),
    ("gateway timeout", API, refuses(504), BURNT, TIMEOUT),
    ("request timeout", API, refuses(408), BURNT, TIMEOUT),
    ("memory of the card full", SERVICE, refuses(500, body={"detail": "CUDA out of memory. Tried to allocate"}), BURNT, UNAVAILABLE),
    ("no weights to tell speakers apart", API, replays("500-diarize-without-model"), BURNT, INTERNAL),
    ("no alignment for the language", WEBSERVICE, replays("500-no-align-model"), BURNT, INTERNAL),
    ("unknown language, 500", WEBSERVICE, replays("500-language"), BURNT, INTERNAL),
    ("unknown model, 500", API, replays("500-unknown-model"), BURNT, INTERNAL),
    ("killed in the middle of a file", API, drops_connection(), BURNT, UNAVAILABLE),
    ("not audio, 422", API, replays("422-not-audio"), FINAL, INVALID_INPUT),
    ("empty file, 422", API, replays("422-empty-file"), FINAL, INVALID_INPUT),
    ("not audio, 500 with ffmpeg's banner", SERVICE, replays("500-not-audio"), FINAL, INVALID_INPUT),
    ("not audio, 500 from /asr", SERVICE, replays("asr-500-not-audio"), FINAL, INVALID_INPUT),
    ("not audio, 400", OF_VLLM, replays("400-not-audio"), FINAL, INVALID_INPUT),
    ("empty file, 400", OF_VLLM, replays("400-empty-file"), FINAL, INVALID_INPUT),
    ("language, 422", API, replays("422-language"), FINAL, INVALID_INPUT),
    ("language, 400", OF_VLLM, replays("400-language"), FINAL, INVALID_INPUT),
    ("too big, 413", SERVICE, replays("413-too-big"), FINAL, INVALID_INPUT),
    ("too big, 400", OF_VLLM, replays("400-too-big"), FINAL, INVALID_INPUT),
    ("no file", API, replays("422-no-file"), FINAL, INVALID_INPUT),
    ("wrong field", WEBSERVICE, replays("422-wrong-field-name"), FINAL, INVALID_INPUT),
    ("granularity", SERVICE, replays("400-granularity-without-verbose"), FINAL, INVALID_INPUT),
    ("subtitles", API, replays("srt"), BURNT, INVALID_OUTPUT),
    ("a page", API, refuses(200, body=b"<html>hello</html>", content_type="text/html"), BURNT, INVALID_OUTPUT),
    ("a page as plain text", WEBSERVICE, refuses(200, body=b"\n<html>hello</html>", content_type="text/plain"), BURNT, INVALID_OUTPUT),
    ("nothing at all", WEBSERVICE, refuses(200, body=b" \n", content_type="text/plain"), BURNT, INVALID_OUTPUT),
    ("no UTF-8", WEBSERVICE, refuses(200, body=b"caf\xe9", content_type="text/plain"), BURNT, INVALID_OUTPUT),
    ("cut JSON", WEBSERVICE, refuses(200, body=b'{"segments": [{"te', content_type="text/plain"), BURNT, INVALID_OUTPUT),
    ("too deep", API, refuses(200, body=b"[" * 100_000), BURNT, INVALID_OUTPUT),
    ("an empty object", API, refuses(200, body={}), BURNT, INVALID_OUTPUT),
    ("neither text nor segments", API, refuses(200, body={"language": "en"}), BURNT, INVALID_OUTPUT),
    ("segments that are none", API, refuses(200, body={"segments": ["a"], "text": "a"}), BURNT, INVALID_OUTPUT),
    ("a number of segments", API, refuses(200, body={"segments": 5, "text": "a"}), BURNT, INVALID_OUTPUT),
    ("a segment without text", API, refuses(200, body={"segments": [{"start": 0}]}), BURNT, INVALID_OUTPUT),
    ("words that are none", API, refuses(200, body={"segments": [{"text": "a", "words": ["a"]}]}), BURNT, INVALID_OUTPUT),
    ("a word without text", API, refuses(200, body={"segments": [{"text": "a"}], "words": [{"start": 1}]}), BURNT, INVALID_OUTPUT),
    ("half a surrogate pair", API, refuses(200, body=b'{"segments": [{"text": "\\ud83d"}]}'), BURNT, INVALID_OUTPUT),
]


def encoded(audio: bytes) -> str:
    return base64.b64encode(audio).decode()


AUDIO = {"audio_base64": encoded(silence())}


@pytest.fixture
def server() -> Iterator[FakeWhisperX]:
    with fake_whisperx() as running:
        yield running


def provider_of(server: FakeWhisperX, **settings: str) -> WhisperX:
    return WhisperX(server.environ | settings)


def job_with(input_: Any, **changes: Any) -> Job:
    facts = {"owner_service": "tests", "owner_ref": "whisperx", "task_type": "transcribe", "model_profile": "whisperx"}
    return Job(id=str(uuid.uuid4()), input=input_, **(facts | changes))


def failure_of(provider: WhisperX, job: Job) -> NotCompleted:
    with pytest.raises(NotCompleted) as raised:
        provider.run(job)
    return raised.value


def class_of(outcome: NotCompleted) -> str:
    if isinstance(outcome, NotNow):
        return BURNT if outcome.burns_attempt else UNHARMED
    return FINAL


def value_for(behaviour: Behaviour, input_: Mapping[str, Any] = AUDIO, kind: str = API) -> Any:
    """The result of a job on a server that meets it so."""
    with fake_whisperx(kind) as server:
        server.always(behaviour)
        return provider_of(server).run(job_with(input_)).value


def answers(body: Any) -> Behaviour:
    return refuses(200, body=body)


# ---------------------------------------------------------------- contract


class TestConformance(ProviderConformance):
    good_input = AUDIO
    other_inputs = ({"audio_base64": encoded(silence(2))}, {"audio_base64": encoded(silence(3)), "language": "de"})
    bad_input: ClassVar = {"audio_base64": "no base64"}
    unsupported_input = AUDIO | {"task": "translate", "language": "de"}

    def provider(self, environ: Mapping[str, str]) -> WhisperX:
        return WhisperX(environ)

    @pytest.fixture(autouse=True)
    def environments(self) -> Iterator[None]:
        with fake_whisperx() as good, silent_server() as silent, closed_port() as closed:
            self.good, self.hanging = good.environ, {"WHISPERX_URL": silent}
            self.unreachable = {"WHISPERX_URL": closed.replace("://", "://user:hidden-password@")}
            yield


# ---------------------------------------------------------------- answers of real servers


def test_every_captured_answer_about_a_file_is_told_of_here() -> None:
    good = {(kind, case) for kind in KINDS for case, answer in captured_answers(kind).items() if answer["status"] == 200}
    assert set(TEXTS) == {one for one in good if captured(*one)["request"]["path"].split("?")[0] in (TRANSCRIPTIONS, ASR)}


@pytest.mark.parametrize(("kind", "case"), [one for one, text in TEXTS.items() if text is not None])
def test_every_shape_becomes_one_result(kind: str, case: str) -> None:
    value = value_for(replays(case), kind=kind)
    assert value["text"] == TEXTS[kind, case]
    assert list(value) == ["text", "language", "duration_seconds", "segments"]
    for segment in value["segments"]:
        assert set(segment) <= {"start", "end", "text", "words"}
        assert segment["text"] == segment["text"].strip() != ""
        assert all(set(word) <= {"word", "start", "end", "score"} for word in segment.get("words", ()))


@pytest.mark.parametrize(
    ("kind", "case", "score"),
    [
        (API, "verbose-json-aligned", True),
        (SERVICE, "asr-json", True),
        (WEBSERVICE, "asr-json", True),
        (SERVICE, "openai-verbose-json-words", False),
    ],
)
def test_words_are_in_their_segments_whatever_the_shape(kind: str, case: str, score: bool) -> None:
    segments = value_for(replays(case), kind=kind)["segments"]
    assert [segment["text"] for segment in segments] == [" ".join(word["word"] for word in segment["words"]) for segment in segments]
    assert segments[1]["words"][0]["start"] == segments[1]["start"] == 1.45
    assert all(("score" in word) == score for segment in segments for word in segment["words"])


def test_the_length_is_the_servers_word_or_that_of_the_wav_header() -> None:
    told = value_for(replays("openai-verbose-json"), kind=SERVICE)
    assert (told["duration_seconds"], told["language"]) == (10.2021875, "en")
    measured = value_for(replays("asr-json"), kind=WEBSERVICE)
    assert (measured["duration_seconds"], measured["language"]) == (1.0, "en")
    unknown = value_for(replays("json"), {"audio_base64": encoded(b"OggS" + bytes(500))})
    assert (unknown["duration_seconds"], unknown["language"]) == (None, None)


@pytest.mark.parametrize(
    ("duration", "seconds"), [("2.5", 2.5), (3, 3), ("soon", 1.0), (None, 1.0), (True, 1.0), ("9" * 20, 1.0), (10**400, 1.0)], ids=str
)
def test_a_length_may_be_written_as_text_and_must_be_a_number(duration: Any, seconds: float) -> None:
    assert value_for(answers({"segments": [], "duration": duration}))["duration_seconds"] == seconds


def test_what_could_not_be_aligned_has_no_times_and_stays_in_its_place() -> None:
    words = [{"word": "In", "start": 0.1, "end": 0.2, "score": 0.9}, {"word": "2014"}, {"word": "too", "start": 1.5, "end": 1.7}]
    value = value_for(answers({"segments": [{"text": "In 2014", "start": 0, "end": 1}, {"text": "too", "start": 1.5}], "words": words}))
    assert value["segments"] == [
        {"start": 0, "end": 1, "text": "In 2014", "words": words[:2]},
        {"start": 1.5, "text": "too", "words": words[2:]},
    ]


def test_not_a_number_is_no_time() -> None:
    body = b'{"segments": [{"text": "a", "start": NaN, "end": 1e999, "words": [{"word": "a", "score": NaN, "start": -Infinity}]}]}'
    assert value_for(answers(body))["segments"] == [{"text": "a", "words": [{"word": "a"}]}]


def test_words_without_segments_make_one() -> None:
    words = [{"word": " Hello", "start": 0.0, "end": 0.5}, {"word": "there."}]
    value = value_for(answers({"text": "Hello there.", "words": words, "segments": None}))
    assert value["segments"] == [{"text": "Hello there.", "words": [{"word": "Hello", "start": 0.0, "end": 0.5}, {"word": "there."}]}]
    assert value["text"] == "Hello there."


def test_empty_segments_add_no_blanks() -> None:
    assert value_for(answers({"segments": [{"text": " a "}, {"text": "  "}, {"text": "b"}]}))["text"] == "a b"


def test_words_are_left_out_when_they_are_not_wanted() -> None:
    segments = value_for(replays("verbose-json-aligned"), AUDIO | {"word_timestamps": False})["segments"]
    assert not any("words" in segment for segment in segments)


def test_speakers_are_kept_and_named() -> None:
    segments = [
        {"text": "Hello", "speaker": "SPEAKER_01", "words": [{"word": "Hello", "speaker": "SPEAKER_01"}]},
        {"text": "Who?", "words": [{"word": "Who?", "speaker": "SPEAKER_00"}]},
        {"text": "Me"},
    ]
    value = value_for(answers({"segments": segments}), AUDIO | {"diarize": True, "max_speakers": 2})
    assert value["segments"] == segments
    assert value["speakers"] == ["SPEAKER_00", "SPEAKER_01"]


def test_a_result_says_that_nobody_was_told_apart() -> None:
    assert value_for(replays("asr-json"), AUDIO | {"diarize": True}, SERVICE)["speakers"] == []


def test_a_server_may_name_the_model_it_used(server: FakeWhisperX) -> None:
    server.always(answers({"text": "a", "model": "large-v3"}))
    result = provider_of(server).run(job_with(AUDIO | {"model": "large"}))
    assert result.value["model"] == "large-v3"
    assert result.usage == {"audio_seconds": 1.0, "model": "large-v3"}


# ---------------------------------------------------------------- failures


@pytest.mark.parametrize(("kind", "behaviour", "expected", "category"), [row[1:] for row in FAILURES], ids=[row[0] for row in FAILURES])
def test_every_way_to_fail_has_its_class(kind: str, behaviour: Behaviour, expected: str, category: str) -> None:
    with fake_whisperx(kind) as server:
        server.always(behaviour)
        outcome = failure_of(provider_of(server), job_with(AUDIO))
    assert (class_of(outcome), outcome.category) == (expected, category), outcome
    assert 0 < len(outcome.message) <= 600
    assert "/srv" not in outcome.message
    assert "test-key" not in repr(vars(outcome))


def test_every_captured_refusal_is_told_of_here() -> None:
    held = [cell.cell_contents for row in FAILURES for cell in row[2].__closure__ or ()]
    replayed = {case for case in held if isinstance(case, str)}
    posts = {
        case
        for kind in KINDS
        for case, answer in captured_answers(kind).items()
        if answer["status"] >= 400 and answer["request"]["path"].split("?")[0] in (TRANSCRIPTIONS, ASR)
    }
    # What we never send: no file, other formats, a queue of the server's own, URLs, chat.
    never_sent = {"422-response-format", "400-async", "422-private-url", "422-json-body", "400-srt", "400-no-file"}
    # What a bare 500 means depends on the file: tested below.
    assert posts - never_sent - replayed == {"500-empty-file"}


def test_the_servers_wish_to_be_left_alone_is_honoured(server: FakeWhisperX) -> None:
    server.always(replays("503-shutting-down"))
    outcome = failure_of(provider_of(server), job_with(AUDIO))
    assert isinstance(outcome, NotNow)
    assert outcome.retry_in_seconds == 5.0


NO_SAMPLES = silence(0)
HEADER_CUT = silence()[:30]
NO_INDEX = b"\x00\x00\x00\x20ftypM4A " + bytes(20) + b"\x00\x10\x00\x00mdat" + bytes(2_000)


@pytest.mark.parametrize("case", ["500-not-audio", "500-empty-file"])
@pytest.mark.parametrize(
    "audio",
    [b"this is not audio" * 50, b"\xff\xfet\x00e\x00x\x00t\x00" * 50, NO_SAMPLES, HEADER_CUT, NO_INDEX, b"OggS" + bytes(20)],
    ids=["text", "text in UTF-16", "no samples", "cut in the header", "no index", "a few bytes"],
)
def test_a_file_that_cannot_be_audio_is_final_even_when_the_server_only_says_500(audio: bytes, case: str) -> None:
    with fake_whisperx(WEBSERVICE) as server:
        server.always(replays(case))
        outcome = failure_of(provider_of(server), job_with({"audio_base64": encoded(audio)}))
    assert (class_of(outcome), outcome.category) == (FINAL, INVALID_INPUT), outcome


@pytest.mark.parametrize("behaviour", [replays("500-not-audio", WEBSERVICE), replays("500-unknown-model"), replays("srt")])
def test_what_the_server_does_not_explain_is_tried_twice(server: FakeWhisperX, behaviour: Behaviour) -> None:
    server.always(behaviour)
    provider = provider_of(server)
    assert class_of(failure_of(provider, job_with(AUDIO, attempt=1, max_attempts=9))) == BURNT
    assert class_of(failure_of(provider, job_with(AUDIO, attempt=2, max_attempts=9))) == FINAL


def test_an_empty_file_is_final_and_not_sent(server: FakeWhisperX) -> None:
    outcome = failure_of(provider_of(server), job_with({"audio_base64": ""}))
    assert (class_of(outcome), outcome.category) == (FINAL, INVALID_INPUT)
    assert not server.seen


@pytest.mark.parametrize(("kind", "case"), [(SERVICE, "400-model"), (OF_VLLM, "404-model")])
def test_a_model_that_the_job_chose_is_the_jobs_own_fault(kind: str, case: str) -> None:
    with fake_whisperx(kind) as server:
        server.always(replays(case))
        outcome = failure_of(provider_of(server), job_with(AUDIO | {"model": "nope"}))
    assert (class_of(outcome), outcome.category) == (FINAL, INVALID_INPUT)


def test_a_refusal_before_the_whole_file_was_sent_is_understood(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer_early() -> None:
            # No description, and then no file.
            for status, body in ((b"404 Not Found", b"{}"), (b"413 Too Large", b'{"detail":"big"}')):
                connection, _ = listener.accept()
                connection.recv(10_000)
                head = b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
                connection.sendall(head % (status, len(body)) + body)
                connection.close()

        threading.Thread(target=answer_early, daemon=True).start()
        (tmp_path / "long.wav").write_bytes(silence(300))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        provider = WhisperX({"WHISPERX_URL": url, "WHISPERX_DIALECT": "asr", "AUDIO_FOLDER": str(tmp_path)})
        outcome = failure_of(provider, job_with({"audio_path": "long.wav"}))
    assert (class_of(outcome), outcome.category, outcome.message) == (FINAL, INVALID_INPUT, "the server answered 413: big")


# ---------------------------------------------------------------- dialects


@pytest.mark.parametrize(
    ("kind", "settings", "path"),
    [
        (API, {}, TRANSCRIPTIONS),
        (OF_VLLM, {}, TRANSCRIPTIONS),
        (WEBSERVICE, {}, ASR),
        (SERVICE, {}, TRANSCRIPTIONS),
        (SERVICE, {"WHISPERX_DIALECT": "asr"}, ASR),
        (SERVICE, {"WHISPERX_DIALECT": "openai"}, TRANSCRIPTIONS),
    ],
)
def test_the_dialect_is_set_or_found(kind: str, settings: Mapping[str, str], path: str) -> None:
    with fake_whisperx(kind) as server:
        provider_of(server, **settings).run(job_with(AUDIO))
        assert [seen.path for seen in server.seen] == [path]
        assert server.seen[0].file_field == ("audio_file" if path == ASR else "file")
        assert server.seen[0].file == silence()


@pytest.mark.parametrize(
    ("kind", "input_", "options"),
    [
        (
            API,
            {"language": "en", "prompt": "Bee\nline", "diarize": True, "min_speakers": 2, "max_speakers": 3, "model": "large-v3"},
            {
                "response_format": "verbose_json",
                "timestamp_granularities[]": "word,segment",
                "model": "large-v3",
                "language": "en",
                "prompt": "Bee\nline",
                "align": "true",
                "diarize": "true",
                "min_speakers": "2",
                "max_speakers": "3",
            },
        ),
        (
            API,
            {"word_timestamps": False},
            {"response_format": "verbose_json", "timestamp_granularities[]": "segment", "align": "false", "diarize": "false"},
        ),
        (
            SERVICE,
            {"language": "de"},
            {"response_format": "verbose_json", "timestamp_granularities[]": "word,segment", "model": "whisper-1", "language": "de"},
        ),
        (
            SERVICE,
            {"diarize": True, "prompt": "x"},
            {"output": "json", "task": "transcribe", "initial_prompt": "x", "word_timestamps": "true", "diarize": "true"},
        ),
        (
            WEBSERVICE,
            {"language": "en", "word_timestamps": False},
            {"output": "json", "task": "transcribe", "language": "en", "word_timestamps": "false"},
        ),
        (OF_VLLM, {}, {"response_format": "verbose_json", "timestamp_granularities[]": "word,segment"}),
    ],
)
def test_options_go_where_the_server_takes_them(kind: str, input_: Mapping[str, Any], options: Mapping[str, str]) -> None:
    with fake_whisperx(kind) as server:
        provider_of(server).run(job_with({**AUDIO, **input_}))
        assert server.seen[0].options == options
        assert set(server.seen[0].query) == (set(options) if server.seen[0].path == ASR else set())


def test_a_server_that_tells_speakers_apart_by_default_is_told_not_to() -> None:
    with fake_whisperx(SERVICE) as server:
        provider_of(server, WHISPERX_DIALECT="asr").run(job_with(AUDIO))
        assert server.seen[0].query["diarize"] == "false"


def test_options_of_an_older_server_go_into_its_form() -> None:
    with fake_whisperx(SERVICE) as server:
        server.description = described({ASR: ("output min_speakers", "audio_file task language model", "audio_file")})
        provider_of(server, WHISPERX_MODEL="tiny").run(job_with(AUDIO | {"language": "en"}))
        assert server.seen[0].query == {"output": "json"}
        assert server.seen[0].form == [("model", "tiny"), ("task", "transcribe"), ("language", "en")]


@pytest.mark.parametrize(
    ("kind", "input_", "path"),
    [
        (API, {"task": "translate"}, TRANSLATIONS),
        (SERVICE, {"task": "translate"}, TRANSLATIONS),
        (SERVICE, {"task": "translate", "language": "de"}, ASR),
        (SERVICE, {"min_speakers": 2, "diarize": True}, ASR),
        (WEBSERVICE, {"task": "translate"}, ASR),
    ],
)
def test_a_server_of_both_dialects_is_asked_where_it_can(kind: str, input_: Mapping[str, Any], path: str) -> None:
    with fake_whisperx(kind) as server:
        provider_of(server).run(job_with({**AUDIO, **input_}))
        assert server.seen[0].path == path


@pytest.mark.parametrize(
    ("kind", "input_", "lacking"),
    [
        (WEBSERVICE, {"diarize": True}, "diarize"),
        (WEBSERVICE, {"model": "tiny"}, "model"),
        (OF_VLLM, {"diarize": True, "max_speakers": 2}, "diarize, no max_speakers"),
        (OF_VLLM, {"task": "translate"}, "task translate"),
        (API, {"task": "translate", "language": "de"}, "language"),
    ],
)
def test_what_the_server_does_not_take_is_left_to_another_provider(kind: str, input_: Mapping[str, Any], lacking: str) -> None:
    with fake_whisperx(kind) as server:
        outcome = failure_of(provider_of(server), job_with({**AUDIO, **input_}))
        assert outcome.category == UNSUPPORTED
        assert f"takes no {lacking}" in outcome.message
        assert not server.seen


def test_unsupported_jobs_fetch_no_audio() -> None:
    with fake_whisperx(WEBSERVICE) as server:
        outcome = failure_of(provider_of(server), job_with({"audio_url": "http://127.0.0.1:1/", "diarize": True}))
        assert outcome.category == UNSUPPORTED


def test_one_look_serves_all_threads(server: FakeWhisperX) -> None:
    server.description_behaviour = slow(0.3, lambda handler: handler.send_json(200, server.description))
    provider = provider_of(server)
    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(lambda _: provider.run(job_with(AUDIO)), range(16)))
    assert len(results) == 16
    assert server.looks == 1


@pytest.mark.parametrize(
    "behaviour", [refuses(503), drops_connection(), refuses(200, body={"paths": {}})], ids=["503", "reset", "no routes"]
)
def test_a_look_that_failed_is_not_remembered(server: FakeWhisperX, behaviour: Behaviour) -> None:
    server.description_behaviour = behaviour
    provider = provider_of(server)
    outcome = failure_of(provider, job_with(AUDIO))
    assert (class_of(outcome), outcome.category) == (UNHARMED, UNAVAILABLE)
    server.description_behaviour = None
    assert isinstance(provider.run(job_with(AUDIO)), Result)
    assert not failure_of(provider_of(server, WHISPERX_DIALECT="asr"), job_with(AUDIO)).usage


def test_a_server_in_the_place_of_another_is_looked_at_again() -> None:
    with fake_whisperx(SERVICE) as server:
        provider = provider_of(server)
        provider.run(job_with(AUDIO))
        server.description = described({ASR: ("output task language", "audio_file", "audio_file")})
        provider.run(job_with(AUDIO))
        provider.run(job_with(AUDIO))
        assert [seen.path for seen in server.seen] == [TRANSCRIPTIONS, ASR, ASR]
        assert server.looks == 2


def test_a_route_that_is_gone_for_good_costs_one_more_look(server: FakeWhisperX) -> None:
    server.always(refuses(404))
    outcome = failure_of(provider_of(server), job_with(AUDIO))
    assert (class_of(outcome), server.looks, len(server.seen)) == (UNHARMED, 2, 1)
    assert "WHISPERX_URL" in outcome.message


@pytest.mark.parametrize(("dialect", "path"), [("openai", TRANSCRIPTIONS), ("asr", ASR)])
@pytest.mark.parametrize("behaviour", [refuses(404), refuses(200, body=b"hello")], ids=["404", "no JSON"])
def test_a_server_that_does_not_describe_itself_needs_the_setting(dialect: str, path: str, behaviour: Behaviour) -> None:
    with fake_whisperx(SERVICE) as server:
        server.description_behaviour = behaviour
        outcome = failure_of(provider_of(server), job_with(AUDIO))
        assert (class_of(outcome), outcome.category) == (UNHARMED, UNAVAILABLE)
        assert "WHISPERX_DIALECT" in outcome.message
        provider = provider_of(server, WHISPERX_DIALECT=dialect)
        provider.run(job_with(AUDIO | {"language": "en", "prompt": "x"}))
        assert server.seen[0].path == path
        assert provider.check().status == "ok"


@pytest.mark.parametrize(
    "description",
    [
        [],
        {"paths": []},
        {"paths": {ASR: 5}},
        {"paths": {ASR: {"post": {"parameters": 5}}}},
        {"paths": {ASR: {"post": {"parameters": [5, {"in": "query"}], "requestBody": {"content": {"a": {"schema": {"$ref": "#/x/y"}}}}}}}},
        {"paths": {ASR: {"post": {"requestBody": {"content": {"a": {"schema": {"allOf": [], "required": 5}}}}}}}},
    ],
    ids=str,
)
def test_an_odd_description_breaks_nothing(description: Any) -> None:
    with fake_whisperx(SERVICE) as server:
        server.description_behaviour = refuses(200, body=description)
        outcome = outcome_of(provider_of(server), job_with(AUDIO))
    assert isinstance(outcome, Result) or class_of(outcome) == UNHARMED


def test_an_address_may_have_a_path_and_the_version_at_its_end(server: FakeWhisperX) -> None:
    provider = WhisperX(server.environ | {"WHISPERX_URL": f"{server.base_url}/v1/"})
    assert isinstance(provider.run(job_with(AUDIO)), Result)
    behind = WhisperX({"WHISPERX_URL": "https://127.0.0.1:1/speech/v1"})
    assert behind.check().endpoint == "https://127.0.0.1:1/speech"


# ---------------------------------------------------------------- input


@pytest.mark.parametrize(
    ("input_", "said"),
    [
        ("text", "input must be an object"),
        ({}, "exactly one of audio_url, audio_base64, audio_path"),
        (AUDIO | {"audio_path": "a.wav"}, "exactly one of audio_url, audio_base64, audio_path"),
        ({"audio_base64": 5}, "audio_base64 must be a text"),
        ({"audio_base64": "a b c ?"}, "audio_base64 is not base64"),
        ({"audio_base64": "YQ==YQ=="}, "audio_base64 is not base64"),
        ({"audio_path": "a.wav"}, "AUDIO_FOLDER is not set"),
        (AUDIO | {"langauge": "en"}, "unknown member langauge"),
        (AUDIO | {"a secret of the caller": 1}, "input has an unknown member"),
        (AUDIO | {"language": "english"}, "language must be a language's code"),
        (AUDIO | {"language": "en\n"}, "language must be"),
        (AUDIO | {"language": "EN"}, "language must be"),
        (AUDIO | {"task": "sing"}, "task must be transcribe or translate"),
        (AUDIO | {"diarize": "yes"}, "diarize must be true or false"),
        (AUDIO | {"diarize": 1}, "diarize must be true or false"),
        (AUDIO | {"min_speakers": 2}, "min_speakers goes with diarize"),
        (AUDIO | {"diarize": True, "min_speakers": 3, "max_speakers": 2}, "min_speakers must not be more"),
        (AUDIO | {"diarize": True, "max_speakers": 0}, "max_speakers must be a whole number"),
        (AUDIO | {"prompt": "x" * 5_000}, "prompt must be a text of 1 to 4000"),
        (AUDIO | {"prompt": "half \ud83d"}, "prompt must be a text"),
        (AUDIO | {"model": "two words"}, "model must be"),
        (AUDIO | {"duration_seconds": -1}, "duration_seconds must be"),
        (AUDIO | {"duration_seconds": float("nan")}, "duration_seconds must be"),
        (AUDIO | {"filename": ""}, "filename must be"),
    ],
    ids=lambda value: str(value)[-60:],
)
def test_bad_input_is_final_and_never_sent(server: FakeWhisperX, input_: Any, said: str) -> None:
    outcome = failure_of(provider_of(server), job_with(input_))
    assert (class_of(outcome), outcome.category, outcome.usage) == (FINAL, INVALID_INPUT, None)
    assert said in outcome.message
    assert "secret" not in outcome.message
    assert not server.seen


def test_all_that_is_wrong_with_an_input_is_told_at_once(server: FakeWhisperX) -> None:
    outcome = failure_of(provider_of(server), job_with(AUDIO | {"x": 1, "task": 5, "diarize": 5}))
    assert [part.split()[0] for part in outcome.message.split("; ")] == ["input", "task", "diarize"]


def test_members_that_are_null_are_absent(server: FakeWhisperX) -> None:
    nothing = dict.fromkeys(["audio_url", "audio_path", "language", "task", "diarize", "word_timestamps", "prompt", "duration_seconds"])
    assert isinstance(provider_of(server).run(job_with(nothing | AUDIO)), Result)


@pytest.mark.parametrize(
    ("filename", "sent"),
    [
        (None, "audio.wav"),
        ("call 17.mp3", "call_17.mp3"),
        ('..\\../etc/"pass\r\nwd', "_.._etc_pass_wd"),
        ("...", "audio.wav"),
        ("Gespräch.wav", "Gespr_ch.wav"),
    ],
)
def test_a_file_name_is_made_harmless(server: FakeWhisperX, filename: str | None, sent: str) -> None:
    provider_of(server).run(job_with(AUDIO | {"filename": filename}))
    assert server.seen[0].file_name == sent


def test_a_file_from_the_folder_arrives_whole(server: FakeWhisperX, tmp_path: Path) -> None:
    audio = silence(400)  # 12.8 MB
    (tmp_path / "long.wav").write_bytes(audio)
    result = provider_of(server, AUDIO_FOLDER=str(tmp_path)).run(job_with({"audio_path": "long.wav"}))
    assert server.seen[0].file == audio
    assert result.value["duration_seconds"] == 400.0


def test_requests_carry_key_id_and_trace(server: FakeWhisperX) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    job = job_with(AUDIO, traceparent=trace)
    provider_of(server).run(job)
    sent = {name.lower(): value for name, value in server.seen[0].headers.items()}
    assert (sent["authorization"], sent["x-request-id"], sent["traceparent"]) == ("Bearer test-key", job.id, trace)


def test_where_an_id_cannot_be_looked_up_it_is_new_each_time() -> None:
    with fake_whisperx(SERVICE) as server:
        job = job_with(AUDIO)
        provider_of(server).run(job)
        provider_of(server).run(job)
        ids = [seen.headers["X-Request-ID"] for seen in server.seen]
    assert len(set(ids)) == 2
    assert all(one.startswith(f"{job.id}-1-") for one in ids)


# ---------------------------------------------------------------- time and cancellation


def limit_for(input_: Mapping[str, Any], **settings: str) -> int:
    """The limit that a run reports for this input."""
    reports: list[Mapping[str, Any]] = []
    with fake_whisperx() as server:
        provider_of(server, **settings).run(job_with(input_, report_progress=reports.append))
    return next(report["limit_seconds"] for report in reports if "limit_seconds" in report)


UNMEASURED = {"audio_base64": encoded(b"OggS" + bytes(99_996))}


@pytest.mark.parametrize(
    ("input_", "settings", "limit"),
    [
        ({"audio_base64": encoded(silence(30))}, {}, 180),
        ({"audio_base64": encoded(silence(30))}, {"WHISPERX_TIME_FACTOR": "10"}, 420),
        ({"audio_base64": encoded(silence(30))}, {"WHISPERX_TIMEOUT": "1s"}, 180),
        (UNMEASURED, {}, 320),
        (UNMEASURED, {"WHISPERX_TIMEOUT": "5m"}, 300),
        (UNMEASURED | {"duration_seconds": 6_000}, {}, 12_120),
        ({"audio_base64": encoded(silence(30)), "duration_seconds": 6_000}, {}, 180),
    ],
    ids=["known", "factor", "known beyond the timeout", "by its size", "unknown", "by the caller's word", "header before word"],
)
def test_the_limit_follows_from_the_length(input_: Mapping[str, Any], settings: Mapping[str, str], limit: int) -> None:
    assert limit_for(input_, **settings) == limit


@pytest.mark.parametrize("behaviour", [hangs(), trickles()], ids=["not a byte", "a byte at a time"])
def test_a_retry_after_a_time_out_comes_late(behaviour: Behaviour) -> None:
    with fake_whisperx(SERVICE) as server:
        server.always(behaviour)
        provider = provider_of(server, WHISPERX_TIMEOUT="0.5")
        outcome = failure_of(provider, job_with(UNMEASURED))
        server.wait_for_hang_ups(1)
        assert (class_of(outcome), outcome.category) == (BURNT, TIMEOUT)
        assert isinstance(outcome, NotNow)
        assert outcome.retry_in_seconds == 60.0
        again = failure_of(provider, job_with(AUDIO, attempt=2, deadline=time.monotonic() + 0.5))
        assert isinstance(again, NotNow)
        assert again.retry_in_seconds == 244.0


def test_the_jobs_deadline_counts_when_it_is_earlier(server: FakeWhisperX) -> None:
    server.always(hangs())
    outcome, seconds = timed(lambda: failure_of(provider_of(server), job_with(AUDIO, deadline=time.monotonic() + 1)))
    assert (class_of(outcome), outcome.category) == (BURNT, TIMEOUT)
    assert seconds < 10


def test_a_passed_deadline_sends_nothing_and_burns_nothing(server: FakeWhisperX) -> None:
    outcome = failure_of(provider_of(server), job_with(AUDIO, deadline=time.monotonic() - 1))
    assert (class_of(outcome), outcome.category) == (UNHARMED, TIMEOUT)
    assert not server.asked_for


@pytest.mark.parametrize("behaviour", [hangs(), trickles()], ids=["no byte", "trickling"])
def test_cancel_hangs_up_at_once(server: FakeWhisperX, behaviour: Behaviour) -> None:
    server.always(behaviour)
    cancelled = threading.Event()
    with ThreadPoolExecutor(1) as threads:
        run = threads.submit(failure_of, provider_of(server), job_with(AUDIO, cancelled=cancelled))
        server.wait_for_requests(1)
        cancelled.set()
        server.wait_for_hang_ups(1)
        outcome = run.result(5)
    assert (class_of(outcome), outcome.category) == (UNHARMED, CANCELLED)


def test_cancel_reaches_a_run_that_waits_for_another_ones_look(server: FakeWhisperX) -> None:
    server.description_behaviour = hangs()
    provider, cancelled = provider_of(server), threading.Event()
    with ThreadPoolExecutor(3) as threads:
        runs = [threads.submit(failure_of, provider, job_with(AUDIO, cancelled=cancelled)) for _ in range(3)]
        server.wait_until(lambda: server.looks == 1)
        cancelled.set()
        assert {run.result(5).category for run in runs} == {CANCELLED}


def test_a_look_that_takes_all_the_time_there_is_burns_nothing(server: FakeWhisperX) -> None:
    server.description_behaviour = hangs()
    outcome = failure_of(provider_of(server), job_with(AUDIO, deadline=time.monotonic() + 0.5))
    assert (class_of(outcome), outcome.category) == (UNHARMED, TIMEOUT)


# ---------------------------------------------------------------- retries on a server that keeps results

KEPT = captured(API, "verbose-json-aligned")["body"].encode()


def test_a_retry_takes_the_result_that_is_there(server: FakeWhisperX) -> None:
    job = job_with(AUDIO, attempt=2)
    server.keep(job.id, "completed", KEPT)
    result = provider_of(server).run(job)
    assert result.value["text"] == EN
    assert result.usage == {"audio_seconds": 1.0}
    assert not server.seen


def test_a_retry_waits_for_its_ghost_instead_of_sending_again(server: FakeWhisperX) -> None:
    server.always(works_on())
    provider, job = provider_of(server), job_with(AUDIO, deadline=time.monotonic() + 0.5)
    first = failure_of(provider, job)
    assert (class_of(first), first.category) == (BURNT, TIMEOUT)
    assert isinstance(first, NotNow)
    assert first.retry_in_seconds is None
    reports: list[Mapping[str, Any]] = []
    again = attrs.evolve(job, attempt=2, deadline=None, report_progress=reports.append)
    with ThreadPoolExecutor(1) as threads:
        run = threads.submit(provider.run, again)
        server.wait_until(lambda: sum(path.endswith("/status") for path in server.asked_for) >= 3)
        server.keep(job.id, "completed", KEPT)
        assert run.result(10).value["text"] == EN
    assert len(server.seen) == 1
    assert {"stage": "transcription", "server_stage": "transcribe"} in reports


def test_a_ghost_that_outlasts_the_retry_is_left_alone(server: FakeWhisperX) -> None:
    job = job_with(AUDIO, attempt=2, deadline=time.monotonic() + 0.5)
    server.keep(job.id, "queued")
    outcome = failure_of(provider_of(server), job)
    assert (class_of(outcome), outcome.category) == (BURNT, TIMEOUT)
    assert not server.seen


def test_cancel_reaches_a_retry_that_waits(server: FakeWhisperX) -> None:
    cancelled = threading.Event()
    job = job_with(AUDIO, attempt=2, cancelled=cancelled)
    server.keep(job.id, "in_progress")
    with ThreadPoolExecutor(1) as threads:
        run = threads.submit(failure_of, provider_of(server), job)
        server.wait_until(lambda: f"{TRANSCRIPTIONS}/{job.id}/status" in server.asked_for)
        cancelled.set()
        assert run.result(5).category == CANCELLED


@pytest.mark.parametrize(("state", "answer"), [("failed", b""), ("completed", b""), ("forgotten", b"")], ids=["failed", "expired", "odd"])
def test_what_the_server_has_not_kept_is_sent_again(server: FakeWhisperX, state: str, answer: bytes) -> None:
    job = job_with(AUDIO, attempt=2)
    server.keep(job.id, state, answer)
    assert provider_of(server).run(job).value["text"].startswith("I heard")
    assert [seen.headers["X-Request-ID"] for seen in server.seen] == [job.id]


def test_a_job_given_back_unharmed_looks_for_its_ghost_too(server: FakeWhisperX) -> None:
    job = job_with(AUDIO, attempt=1)
    server.keep(job.id, "completed", KEPT)
    assert provider_of(server).run(job).value["text"] == EN


def test_a_wrong_key_for_the_lookup_is_told(server: FakeWhisperX) -> None:
    outcome = failure_of(provider_of(server, WHISPERX_API_KEY="wrong-key"), job_with(AUDIO))
    assert (class_of(outcome), outcome.category) == (UNHARMED, UNAUTHORIZED)
    assert not server.seen


# ---------------------------------------------------------------- usage


def test_tokens_and_what_the_server_counted_are_kept() -> None:
    usage = {"type": "tokens", "input_tokens": 7, "output_tokens": 3, "total_tokens": 10}
    with fake_whisperx(OF_VLLM) as server:
        server.behave(answers({"text": "a", "usage": usage}), replays("json"))
        provider = provider_of(server)
        counted = provider.run(job_with(AUDIO)).usage
        rounded = provider.run(job_with(UNMEASURED)).usage
    assert counted == {"audio_seconds": 1.0, "prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10, "raw": usage}
    assert rounded == {"audio_seconds": 3, "raw": {"type": "duration", "seconds": 3}}


@pytest.mark.parametrize("usage", [5, None, {}, {"a": "x" * 4_000}, b'{"text": "a", "usage": {"a": 1e999}}'], ids=str)
def test_usage_that_says_nothing_or_too_much_is_left_out(server: FakeWhisperX, usage: Any) -> None:
    server.always(answers(usage if isinstance(usage, bytes) else {"text": "a", "usage": usage}))
    assert provider_of(server).run(job_with(AUDIO)).usage == {"audio_seconds": 1.0}


def test_what_is_not_known_is_absent(server: FakeWhisperX) -> None:
    server.always(replays("json"))
    assert provider_of(server).run(job_with(UNMEASURED)).usage is None


@pytest.mark.parametrize(
    ("behaviour", "usage"),
    [
        (drops_connection(), {"audio_seconds": 1.0}),
        (replays("srt"), {"audio_seconds": 1.0}),
        (refuses(500), {"audio_seconds": 1.0}),
        (refuses(503), None),
        (replays("422-not-audio"), None),
    ],
    ids=["killed", "no sense", "500", "refused", "not audio"],
)
def test_failed_attempts_tell_what_they_cost(server: FakeWhisperX, behaviour: Behaviour, usage: Any) -> None:
    server.always(behaviour)
    assert failure_of(provider_of(server), job_with(AUDIO)).usage == usage


# ---------------------------------------------------------------- check


@pytest.mark.parametrize("kind", KINDS)
def test_check_says_what_the_server_speaks(kind: str) -> None:
    with fake_whisperx(kind) as server:
        health = provider_of(server).check()
    spoken = {SERVICE: "openai and asr", WEBSERVICE: "asr"}.get(kind, "openai")
    assert (health.status, health.endpoint, health.detail) == ("ok", server.base_url, f"speaks {spoken}")
    assert (health.latency_ms or 0) > 0


@pytest.mark.parametrize(("settings", "status"), [({"WHISPERX_API_KEY": "wrong-key"}, 403), ({"WHISPERX_API_KEY": ""}, None)])
def test_check_says_that_the_key_is_wrong(server: FakeWhisperX, settings: Mapping[str, str], status: int | None) -> None:
    health = provider_of(server, **settings).check()
    assert health.status == ("unavailable" if status else "ok")
    assert not status or health.detail == f"the server answered {status}: Invalid API Key (look at WHISPERX_API_KEY)"
    assert not server.seen


def test_a_busy_server_that_does_not_answer_is_not_down() -> None:
    with fake_whisperx() as silent, fake_whisperx() as slow, ThreadPoolExecutor(2) as pool:
        silent.description_behaviour, slow.description_behaviour = hangs(), trickles()
        looks = list(pool.map(lambda server: timed(provider_of(server).check), (silent, slow)))
    for health, seconds in looks:
        assert (health.status, (health.detail or "")[:12]) == ("degraded", "busy or slow")
        assert seconds < 6


@pytest.mark.parametrize(
    ("behaviour", "detail"),
    [
        (refuses(503, body={"detail": "Server is shutting down."}), "Server is shutting down."),
        (refuses(502), "502"),
        (refuses(401), "WHISPERX_API_KEY"),
        (refuses(302, {"Location": "/login"}), "redirects are not followed"),
        (refuses(404), "WHISPERX_DIALECT"),
        (refuses(200, body={"paths": {"/v1/chat/completions": {"post": {}}}}), "/openapi.json does not tell"),
        (drops_connection(), "connection broke"),
    ],
    ids=["503", "502", "401", "302", "404", "another server", "reset"],
)
def test_check_of_a_server_that_takes_no_jobs_says_why(server: FakeWhisperX, behaviour: Behaviour, detail: str) -> None:
    server.description_behaviour = behaviour
    health = provider_of(server).check()
    assert health.status == "unavailable"
    assert detail in (health.detail or "")


def test_check_says_that_a_model_cannot_be_asked_for() -> None:
    with fake_whisperx(WEBSERVICE) as server:
        health = provider_of(server, WHISPERX_MODEL="large-v3").check()
    assert (health.status, health.detail) == ("degraded", "WHISPERX_MODEL is set, and the server takes no model")


def test_what_a_check_sees_serves_the_runs(server: FakeWhisperX) -> None:
    provider = provider_of(server)
    provider.check()
    provider.run(job_with(AUDIO))
    assert server.looks == 1


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize("environ", [{}, {"WHISPERX_URL": " "}, {"WHISPERX_API_KEY": "some-key"}])
def test_without_an_address_it_is_not_configured(environ: Mapping[str, str]) -> None:
    with pytest.raises(NotConfigured, match="WHISPERX_URL is not set"):
        WhisperX(environ)


def test_all_wrong_settings_are_named_at_once() -> None:
    wrong = {
        "AUDIO_FOLDER": "recordings",
        "AUDIO_PRIVATE_HOSTS": "10.0.0.0/33",
        "AUDIO_MAX_BYTES": "1 GB",
        "AUDIO_URL_TIMEOUT": "soon",
        "WHISPERX_URL": "host",
        "WHISPERX_API_KEY": "two words",
        "WHISPERX_DIALECT": "french",
        "WHISPERX_MODEL": "a b",
        "WHISPERX_PROFILES": "a b",
        "WHISPERX_TIMEOUT": "0",
        "WHISPERX_TIME_FACTOR": "0",
    }
    with pytest.raises(SettingsError) as refused:
        WhisperX(wrong)
    assert [problem.split(":")[0] for problem in refused.value.problems] == list(wrong)


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(SettingsError) as refused:
        WhisperX({"WHISPERX_URL": "http://me:secret-value@host", "WHISPERX_API_KEY": "some-key", "WHISPERX_PROFILES": ","})
    assert len(refused.value.problems) == 2
    assert "secret-value" not in str(refused.value)


def test_profiles_are_listed() -> None:
    assert WhisperX({"WHISPERX_URL": "http://host", "WHISPERX_PROFILES": "whisperx, large-v3,whisperx"}).model_profiles == (
        "whisperx",
        "large-v3",
    )


def test_the_model_of_the_settings_is_asked_for_unless_the_job_names_one() -> None:
    with fake_whisperx(SERVICE) as server:
        provider = provider_of(server, WHISPERX_MODEL="large-v3")
        provider.run(job_with(AUDIO))
        provider.run(job_with(AUDIO | {"model": "tiny"}))
        assert [seen.options["model"] for seen in server.seen] == ["large-v3", "tiny"]


def test_no_secret_in_repr(server: FakeWhisperX) -> None:
    environ = {"WHISPERX_URL": "http://me:hidden-password@127.0.0.1:1", "AUDIO_FOLDER": "/"}
    provider = WhisperX(environ)
    assert "hidden" not in f"{provider!r}{provider_settings(WhisperXSettings, environ)!r}{provider.check()!r}"
    assert "test-key" not in f"{provider_of(server)!r}{provider_settings(WhisperXSettings, server.environ)!r}"


def test_trouble_where_the_audio_is_says_nothing_about_the_server(server: FakeWhisperX) -> None:
    with closed_port() as nobody:
        provider = provider_of(server, AUDIO_PRIVATE_HOSTS="127.0.0.1")
        outcome = failure_of(provider, job_with({"audio_url": f"{nobody}/call.wav?signature=secret-value"}))
    assert (class_of(outcome), outcome.category, outcome.usage) == (BURNT, AUDIO_UNAVAILABLE, None)
    assert "secret-value" not in str(outcome)
    assert not server.seen


def test_no_thread_outlives_its_job_for_long(server: FakeWhisperX) -> None:
    provider = provider_of(server)
    for _ in range(10):
        provider.run(job_with(AUDIO))
    watchers = [thread for thread in threading.enumerate() if thread.name.startswith(("exchange", "audio"))]
    for thread in watchers:
        thread.join(2)
    assert not any(thread.is_alive() for thread in watchers)


# ---------------------------------------------------------------- against real servers

real = pytest.mark.real
SPOKEN = {"en.wav": EN, "de.wav": DE, "s3.wav": S3, "silence.wav": ""}


@pytest.fixture
def fixtures() -> Path:
    if "REAL_FIXTURES" not in os.environ:
        pytest.skip("REAL_FIXTURES names no folder of speech")
    return Path(os.environ["REAL_FIXTURES"])


@pytest.fixture(params=["openai", "asr"])
def real_whisperx(request: pytest.FixtureRequest, fixtures: Path) -> WhisperX:
    if "REAL_WHISPERX_URL" not in os.environ:
        pytest.skip("REAL_WHISPERX_URL names no server")
    provider = WhisperX(
        {
            "WHISPERX_URL": os.environ["REAL_WHISPERX_URL"],
            "WHISPERX_API_KEY": os.environ.get("REAL_WHISPERX_KEY", ""),
            "WHISPERX_DIALECT": request.param,
            "AUDIO_FOLDER": str(fixtures),
        }
    )
    health = provider.check()
    if "does not tell of" in (health.detail or ""):
        pytest.skip(f"the server does not speak {request.param}")
    assert health.status == "ok", health
    return provider


def assert_fixtures_give_their_texts(provider: WhisperX) -> None:
    for name, text in SPOKEN.items():
        language = {} if name == "de.wav" else {"language": "en"}
        result = provider.run(job_with({"audio_path": name, **language}))
        assert result.value["text"] == text
        assert text == "" or result.value["language"] == ("de" if name == "de.wav" else "en")
        assert all(segment["words"] for segment in result.value["segments"])
        assert result.usage is not None
        assert result.usage["audio_seconds"] == result.value["duration_seconds"] > 2


def outcome_on(provider: WhisperX, audio: bytes, **options: Any) -> NotCompleted:
    return failure_of(provider, job_with({"audio_base64": encoded(audio), **options}))


def assert_undecodable_is_final(provider: WhisperX, fixtures: Path) -> None:
    whole = (fixtures / "en.wav").read_bytes()
    for audio in ((fixtures / "notaudio.wav").read_bytes(), b"", whole[:30], whole[:44], NO_INDEX, b"OggS" + bytes(20)):
        outcome = outcome_on(provider, audio)
        assert (class_of(outcome), outcome.category) == (FINAL, INVALID_INPUT), (outcome, audio[:10])
        assert "/" not in outcome.message.replace("/asr", "")


@real
def test_real_fixtures_give_exactly_their_texts(real_whisperx: WhisperX) -> None:
    assert_fixtures_give_their_texts(real_whisperx)


@real
def test_real_undecodable_audio_is_final(real_whisperx: WhisperX, fixtures: Path) -> None:
    assert_undecodable_is_final(real_whisperx, fixtures)


@real
def test_real_audio_that_was_cut_off_is_transcribed_as_far_as_it_goes(real_whisperx: WhisperX, fixtures: Path) -> None:
    begun = (fixtures / "en.wav").read_bytes()[: 16_000 * 2 * 4]
    value = real_whisperx.run(job_with({"audio_base64": encoded(begun), "language": "en"})).value
    assert abs(value["duration_seconds"] - 4) < 0.01
    assert value["text"]


@real
def test_real_unknown_language_ends_at_the_second_attempt(real_whisperx: WhisperX, fixtures: Path) -> None:
    audio = {"audio_path": "s3.wav", "language": "xx"}
    first, second = (failure_of(real_whisperx, job_with(audio, attempt=attempt)) for attempt in (1, 2))
    assert class_of(second) == FINAL
    assert class_of(first) in (BURNT, FINAL)


@real
def test_real_jobs_side_by_side_do_not_mix(real_whisperx: WhisperX) -> None:
    names = [name for name in SPOKEN if name != "de.wav"] * 2
    with ThreadPoolExecutor(4) as threads:
        runs = threads.map(lambda name: real_whisperx.run(job_with({"audio_path": name, "language": "en"})), names)
        assert [run.value["text"] for run in runs] == [SPOKEN[name] for name in names]


@attrs.define
class Started:
    """A real server that a test has started."""

    process: subprocess.Popen[bytes]
    url: str
    blocking: bool

    def cpu_seconds(self) -> float:
        """What it has worked so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(20)


@contextlib.contextmanager
def started(dialect: str, shape: str, blocking: bool) -> Iterator[Started]:
    if sys.platform != "linux":
        pytest.skip("looks at /proc")
    with closed_port() as url:
        command = command_of("WHISPERX", int(url.rpartition(":")[2]))
    environ = os.environ | {"DIALECT": dialect, "SHAPE": shape, "BLOCKING": "1" if blocking else ""}
    process = subprocess.Popen(command, env=environ, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    server = Started(process, url, blocking)
    try:
        wait_for(lambda: WhisperX({"WHISPERX_URL": url}).check().status == "ok", 120)
        yield server
    finally:
        server.kill() if process.poll() is None else None


def wait_for(true: Callable[[], bool], within_seconds: float) -> None:
    until = time.monotonic() + within_seconds
    while not true():
        assert time.monotonic() < until, f"not within {within_seconds} s"
        threading.Event().wait(0.05)


def long_speech(fixtures: Path, folder: Path, times: int = 30) -> Path:
    """The English fixture so often that the server is busy with it for a while."""
    with wave.open(str(fixtures / "en.wav")) as source, wave.open(str(folder / "long.wav"), "wb") as target:
        target.setparams(source.getparams())
        target.writeframes(source.readframes(source.getnframes()) * times)
    return folder / "long.wav"


COMBINATIONS = list(itertools.product(["openai", "asr", "both"], ["openai", "nested"], [False, True]))


@real
@pytest.mark.parametrize(
    ("dialect", "shape", "blocking"), COMBINATIONS, ids=[f"{d}-{s}-{'blocking' if b else 'free'}" for d, s, b in COMBINATIONS]
)
def test_real_servers_of_every_kind(dialect: str, shape: str, blocking: bool, fixtures: Path, tmp_path: Path) -> None:
    with started(dialect, shape, blocking) as server:
        spoken = ["openai", "asr"] if dialect == "both" else [dialect]
        for one in ["auto", *spoken]:
            key = {"WHISPERX_API_KEY": os.environ.get("REAL_WHISPERX_KEY", "test-key")}
            provider = WhisperX({"WHISPERX_URL": server.url, "WHISPERX_DIALECT": one, "AUDIO_FOLDER": str(fixtures), **key})
            assert_fixtures_give_their_texts(provider)
            assert_undecodable_is_final(provider, fixtures)
        busy = WhisperX({"WHISPERX_URL": server.url, "AUDIO_FOLDER": str(tmp_path), **key})
        long_speech(fixtures, tmp_path)
        with ThreadPoolExecutor(1) as threads:
            before = server.cpu_seconds()
            run = threads.submit(failure_of, busy, job_with({"audio_path": "long.wav", "language": "en"}))
            wait_for(lambda: server.cpu_seconds() > before + 1, 30)
            assert busy.check().status == ("degraded" if blocking else "ok")
            server.kill()
            outcome = run.result(10)
        assert (class_of(outcome), outcome.category) == (BURNT, UNAVAILABLE)
        assert outcome.usage == {"audio_seconds": pytest.approx(306.06, abs=0.1)}
        assert busy.check().status == "unavailable"
        after = failure_of(busy, job_with({"audio_path": "long.wav"}))
        assert (class_of(after), after.category) == (UNHARMED, UNAVAILABLE)


@real
def test_real_cancelled_work_goes_on_and_the_next_job_waits_for_it(fixtures: Path, tmp_path: Path) -> None:
    with started("asr", "openai", blocking=False) as server:
        provider = WhisperX({"WHISPERX_URL": server.url, "AUDIO_FOLDER": str(tmp_path)})
        long_speech(fixtures, tmp_path, 15)
        (tmp_path / "s3.wav").write_bytes((fixtures / "s3.wav").read_bytes())
        cancelled, before = threading.Event(), server.cpu_seconds()
        with ThreadPoolExecutor(1) as threads:
            run = threads.submit(failure_of, provider, job_with({"audio_path": "long.wav"}, cancelled=cancelled))
            wait_for(lambda: server.cpu_seconds() > before + 1, 30)
            cancelled.set()
            assert run.result(2).category == CANCELLED
        result, seconds = timed(lambda: provider.run(job_with({"audio_path": "s3.wav", "language": "en"})))
        assert result.value["text"] == S3
        assert seconds > 1
