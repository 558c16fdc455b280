"""Secrets: recognisable ones are planted in every setting that holds one, error paths are driven, and what comes out is searched.

Answers, logs and terminals are searched for each secret as it is, percent-encoded, as in JSON, and in base64 at each of its alignments.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import attrs
import pytest
from fake_service import FakeService, Seen, answers
from postgres import PASSWORD, connect, free_port, fresh_schema
from service import MAIN, Answer, Api, Corner, running_service, wait_until, worker_process

from ai_internal.server.database_url import read_database_url
from ai_internal.worker.worker import Settings as WorkerSettings
from ai_service import Settings
from providers.openclaw import OpenClawSettings
from providers.settings import declared
from providers.vllm import VLLMSettings
from providers.whisperx import WhisperXSettings


def secret(what: str) -> str:
    """One that changes its looks in each encoding, and is good as token, key and password."""
    return f"{what}+hush/hush~{what}="


_names = "caller worker operator wrong service database llm llmurl whisperx whisperxurl openclaw"
PLANTED = {name: secret(name) for name in _names.split()}


def forms(text: str) -> Iterator[str]:
    """How a secret may look in a text."""
    yield from (text, quote(text), quote(text, safe=""), json.dumps(text)[1:-1], json.dumps(text).replace("/", "\\/")[1:-1])
    for before in range(3):
        encoded = b64encode(b"x" * before + text.encode()).decode()
        # Without the characters that its neighbours have a part in.
        core = encoded[4 if before else 0 : -4]
        yield from (core, core.replace("+", "-").replace("/", "_"))


def shown(texts: Iterable[str], secrets: Mapping[str, str] = PLANTED) -> list[str]:
    """Which secrets can be read in these texts, and around what."""
    whole = "\n".join(texts)
    found = {
        f"{name}: …{whole[max(0, at - 80) : at + 80]}…"
        for name, value in secrets.items()
        for form in forms(value)
        if (at := whole.find(form)) >= 0
    }
    return sorted(found)


@pytest.mark.parametrize("wrapped", ["Bearer {}", "http://user:{}@host/", '{{"key": "{}"}}'])
@pytest.mark.parametrize("change", [str, quote, lambda text: quote(text, safe=""), lambda text: b64encode(text.encode()).decode()])
def test_the_search_finds_a_secret_in_every_form(wrapped: str, change: Callable[[str], str]) -> None:
    text = PLANTED["llm"]
    for planted in (wrapped.format(change(text)), change(wrapped.format(text))):
        assert [each.partition(":")[0] for each in shown(["before", planted, "after"])] == ["llm"] or "{" in planted[:1]


@attrs.define
class Heard:
    """All that came out: bodies and heads of answers, logs, terminals."""

    texts: list[str] = attrs.field(factory=list)

    def of(self, answer: Answer) -> Answer:
        """An answer, noted."""
        self.texts += [str(answer.status), str(dict(answer.headers)), answer.body.decode(errors="replace")]
        return answer


@pytest.fixture
def heard() -> Iterator[Heard]:
    """Fails the test that lets a secret out."""
    heard = Heard()
    yield heard
    assert heard.texts
    assert shown(heard.texts) == []


def echo(handler: Any, seen: Seen) -> None:
    """A model service that repeats the key it was given, as some do."""
    shown = seen.headers.get("Authorization")
    answers(401, {"error": {"message": f"wrong key {shown}"}, "detail": shown})(handler, seen)


@contextmanager
def model_settings(*, keys: bool) -> Iterator[dict[str, str]]:
    """The providers' settings with a secret in each, in keys or in URLs: one service repeats it, one refuses connections."""
    with FakeService() as rude:
        rude.always("", echo)
        llm, whisperx = (quote(PLANTED[name], safe="") for name in ("llmurl", "whisperxurl"))
        port, closed = rude.url.rpartition(":")[2], free_port()
        openclaw = {"OPENCLAW_URL": rude.url, "OPENCLAW_TOKEN": PLANTED["openclaw"]}
        if keys:
            llm_settings = {"LLM_BASE_URL": rude.url, "LLM_API_KEY": PLANTED["llm"]}
            yield (
                openclaw | llm_settings | {"WHISPERX_URL": rude.url, "WHISPERX_API_KEY": PLANTED["whisperx"], "WHISPERX_DIALECT": "openai"}
            )
        else:
            urls = {"LLM_BASE_URL": f"http://user:{llm}@127.0.0.1:{port}", "WHISPERX_URL": f"http://user:{whisperx}@127.0.0.1:{closed}"}
            yield openclaw | urls


ROLES = {"caller": "caller:lab", "worker": "worker", "operator": "operator"}
TOKENS = "; ".join(f"{name}={role}={PLANTED[name]}" for name, role in ROLES.items())


def check(environ: Mapping[str, str]) -> list[str]:
    """What `ai-service check` prints."""
    told = subprocess.run([sys.executable, str(MAIN), "check"], env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert "provider" in told.stdout
    return [told.stdout, told.stderr]


def with_password(url: str, password: str) -> str:
    """The test database's URL with this password, which a trusting server ignores; unchanged where its own may be a real one."""
    parts = urlsplit(url)
    if parts.password != PASSWORD or parts.username == "postgres":
        return url
    return parts._replace(netloc=f"{parts.username}:{quote(password, safe='')}@{parts.netloc.rpartition('@')[2]}").geturl()


def test_every_setting_that_holds_a_secret_is_planted_here() -> None:
    kinds = (Settings, WorkerSettings, VLLMSettings, WhisperXSettings, OpenClawSettings)
    secret_ones = {one.name for kind in kinds for one in declared(kind) if one.secret}
    assert secret_ones == {"API_TOKENS", "AI_SERVICE_TOKEN", "LLM_API_KEY", "WHISPERX_API_KEY", "OPENCLAW_TOKEN"}


# ---------------------------------------------------------------- the service


def test_no_answer_and_no_line_of_the_service_shows_a_secret(postgres_url: str, heard: Heard) -> None:
    with ExitStack() as stack:
        schema, models = stack.enter_context(fresh_schema(postgres_url)), stack.enter_context(model_settings(keys=False))
        url = with_password(postgres_url, PLANTED["database"])
        service = stack.enter_context(running_service(url, schema, API_TOKENS=TOKENS, LOG_LEVEL="DEBUG", **models))
        apis = {who: stack.enter_context(api_of(service.api.port, PLANTED[who])) for who in ("caller", "worker", "operator", "wrong")}
        for api in apis.values():
            ask_everything(api, heard)
        for header in ("Basic {}", "Bearer {} ", "{}", "Bearer {},{}"):
            shown = header.format(PLANTED["operator"], PLANTED["wrong"])
            heard.of(service.api.request("GET", "/api/v1/stats", headers={"Authorization": shown}))
        heard.texts.append(service.api.raw(f"GET / HTTP/9.9\r\nAuthorization: Bearer {PLANTED['operator']}\r\n\r\n".encode()).decode())
        status = apis["operator"].get("/api/v1/providers/status").json["providers"]
        assert [each["status"] for each in status] == ["unavailable"] * 3
        break_functions(postgres_url, schema)
        ask_everything(apis["operator"], heard)
        heard.texts += check(service.environment)
        with model_settings(keys=True) as others:
            heard.texts += check({**service.environment, **others})
        service.terminate()
        service.wait()
        heard.texts.append(service.log)
    assert "claims_failed" in service.log
    assert "request_failed" in service.log


@contextmanager
def api_of(port: int, token: str) -> Iterator[Api]:
    api = Api(port, token)
    yield api
    api.close()


def ask_everything(api: Api, heard: Heard) -> None:
    """Calls good and bad on many routes."""
    corner = Corner(api)
    corner.owner_service = "lab"
    for path in ("jobs", "stats", "workers", "providers/status", "nothing", "jobs/00000000-0000-7000-8000-000000000000?include=input"):
        heard.of(api.get(f"/api/v1/{path}"))
    for path in ("/healthz", "/readyz", "/"):
        heard.of(api.get(path))
    for body in (b'{"owner_service": 7', json.dumps(corner.job()).encode()):
        for path in ("jobs", "jobs/batch", "jobs/claim", "pause"):
            heard.of(api.post(f"/api/v1/{path}", body=body))
    heard.of(api.post("/api/v1/jobs/claim", corner.claiming()))
    heard.of(api.post("/api/v1/jobs/00000000-0000-7000-8000-000000000000/cancel", {}))


def break_functions(url: str, schema: str) -> None:
    """From now on claims, heartbeats and cancels fail in PostgreSQL, with a claim_id in the error's details."""
    database = connect(url, schema)
    asked = "select pg_get_functiondef(oid) from pg_proc where proname = 'claim_jobs_v1' and pronamespace = to_regnamespace(:name)"
    [[claim]] = database.run(asked, name=schema)
    broken = "raise exception 'broken' using detail = claim_ids::text; perform pg_advisory_xact_lock"
    database.run(claim.replace("perform pg_advisory_xact_lock", broken))
    database.run(
        "create or replace function cancel_job_v1(of_job uuid, reason text) returns text language plpgsql as "
        "$$ begin raise exception 'broken' using detail = of_job::text; end $$"
    )
    database.close()


def test_a_claim_id_is_told_to_its_claim_only(postgres_url: str) -> None:
    heard = Heard()
    with ExitStack() as stack:
        schema = stack.enter_context(fresh_schema(postgres_url))
        service = stack.enter_context(running_service(postgres_url, schema, LOG_LEVEL="DEBUG"))
        corner = Corner(service.api)
        held = [corner.take(input=number) for number in range(5)]
        claim_ids = {str(number): job["claim_id"] for number, job in enumerate(held)}
        for job, verb in zip(held, ("complete", "fail", "heartbeat", "release", "cancel"), strict=True):
            heard.of(corner.call(job, verb))
            heard.of(corner.call(job, verb))
            heard.of(service.api.get(f"/api/v1/jobs/{job['id']}", include="input"))
            item = {"id": job["id"], "claim_id": job["claim_id"], "result": 1}
            items = [item, {**item, "claim_id": f"{job['claim_id']}x"}, item["claim_id"]]
            heard.of(service.api.post("/api/v1/jobs/complete", {"jobs": items}))
            heard.of(service.api.post(f"/api/v1/jobs/{job['id']}/complete", {"claim_id": f"{job['claim_id']}!", "result": 1}))
        heard.of(service.api.post("/api/v1/jobs/claim", {"worker_id": "another", "claim_id": held[2]["claim_id"]}))
        heard.of(service.api.post("/api/v1/jobs/get", {"ids": [job["id"] for job in held]}))
        for path in ("jobs", "stats", "workers"):
            heard.of(service.api.get(f"/api/v1/{path}"))
        break_functions(postgres_url, schema)
        claim_ids["broken"] = "c1a1c1a1-0000-4000-8000-000000000000"
        heard.of(service.api.post("/api/v1/jobs/claim", {"worker_id": "another", "claim_id": claim_ids["broken"]}))
        service.terminate()
        service.wait()
        heard.texts.append(service.log)
    assert "claims_failed" in service.log
    assert shown(heard.texts, claim_ids) == []


@contextmanager
def refusing_postgres() -> Iterator[int]:
    """A PostgreSQL that asks for the password and refuses it; gives its port."""
    fatal = b'SFATAL\0C28P01\0Mpassword authentication failed for user "someone"\0\0'
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    refuse(connection)

        def refuse(connection: socket.socket) -> None:
            while True:
                asked = connection.recv(4096)
                if asked[4:8] == b"\x04\xd2\x16\x2f":  # whether there is TLS
                    connection.sendall(b"N")
                elif asked[:1] == b"\0":
                    connection.sendall(b"R\0\0\0\x08\0\0\0\x03")
                else:
                    connection.sendall(b"E" + (len(fatal) + 4).to_bytes(4, "big") + fatal)
                    return

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield int(listener.getsockname()[1])
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(5)


def test_a_database_that_is_away_or_refuses_the_password_shows_no_secret(heard: Heard) -> None:
    with refusing_postgres() as port:
        hosts = f"127.0.0.1:{free_port()},127.0.0.1:{port}"
        url = f"postgresql://someone:{quote(PLANTED['database'], safe='')}@{hosts}/some"
        with running_service(url, "none", API_TOKENS=TOKENS, LOG_LEVEL="DEBUG") as service:
            with api_of(service.api.port, PLANTED["operator"]) as api:
                for path in ("/readyz", "/api/v1/stats", "/api/v1/jobs"):
                    assert heard.of(api.get(path)).code == "database_unavailable"
                assert heard.of(api.post("/api/v1/jobs/claim", {"worker_id": "w"})).code == "database_unavailable"
            heard.texts += check(service.environment)
    heard.texts.append(service.log)
    assert "28P01" in service.log


# ---------------------------------------------------------------- the worker


def test_no_line_of_a_worker_and_no_failure_it_reports_shows_a_secret(postgres_url: str, tmp_path: Path, heard: Heard) -> None:
    with ExitStack() as stack:
        schema, models = stack.enter_context(fresh_schema(postgres_url)), stack.enter_context(model_settings(keys=True))
        service = stack.enter_context(running_service(postgres_url, schema, API_TOKENS=TOKENS, LOG_LEVEL="DEBUG"))
        corner = Corner(stack.enter_context(api_of(service.api.port, PLANTED["operator"])))
        jobs = [corner.create(model_profile=profile, input={"prompt": "hello"}) for profile in ("qwen2.5-14b", "openclaw")]
        with worker_process(service.api.port, tmp_path, AI_SERVICE_TOKEN=PLANTED["worker"], **models) as log:
            wait_until(lambda: log.read_text().count("circuit_opened") >= 2, 20)
            wait_until(lambda: "wrong key Bearer [secret]" in corner.api.get("/api/v1/workers").body.decode(), 20)
            for path in ("workers", "jobs", *(f"jobs/{job['id']}" for job in jobs)):
                heard.of(corner.api.get(f"/api/v1/{path}"))
            heard.texts.append(log.read_text())
        with worker_process(service.api.port, tmp_path, AI_SERVICE_TOKEN=PLANTED["service"], **models) as log:
            wait_until(lambda: "service_went_away error=401" in log.read_text(), 20)
        heard.texts += [log.read_text(), service.log]


# ---------------------------------------------------------------- settings that cannot be used


def wrong_settings() -> dict[str, str]:
    """Every setting with a secret in it, each wrong in some other way."""
    hushed = {name: f"{value} {value}" for name, value in PLANTED.items()}
    return {
        "DATABASE_URL": f"postgresql://user:{PLANTED['database']}@host:port:5432/db?nothing=1",
        "API_TOKENS": f"{hushed['caller']}; operator={PLANTED['operator']}; worker={hushed['worker']}",
        "LLM_BASE_URL": f"ftp://user:{PLANTED['llmurl']}@host?key={PLANTED['llmurl']}",
        "LLM_API_KEY": hushed["llm"],
        "WHISPERX_URL": f"http://user:{PLANTED['whisperxurl']}@ho st/",
        "WHISPERX_API_KEY": hushed["whisperx"],
        "OPENCLAW_URL": f"http://user:{PLANTED['openclaw']}@:0:0",
        "OPENCLAW_TOKEN": hushed["openclaw"],
        "AI_SERVICE_URL": f"http://user:{PLANTED['service']}@host",
        "AI_SERVICE_TOKEN": hushed["service"],
    }


@pytest.mark.parametrize("command", ["serve", "check", "worker"])
def test_settings_that_cannot_be_used_are_told_without_their_secrets(tmp_path: Path, heard: Heard, command: str) -> None:
    environ = {"WORKER_SPOOL_DIR": str(tmp_path), **wrong_settings()}
    told = subprocess.run([sys.executable, str(MAIN), command], env=environ, capture_output=True, text=True, timeout=60, check=False)
    heard.texts += [told.stdout, told.stderr]
    assert told.returncode == 2
    names = ("AI_SERVICE_URL", "AI_SERVICE_TOKEN", "LLM_API_KEY") if command == "worker" else ("DATABASE_URL", "API_TOKENS")
    assert [name for name in names if name not in told.stderr] == []


ILL_URLS = [
    "postgresql://user:{}@host:99999/db", "postgresql://user:{}@[::1/db", "postgresql://user:{}@host/db?sslmode=maybe",
    "postgresql://user:{}@host/db?sslmode", "postgres//user:{}@host/db", "user:{}@host", "postgresql://us%er:{}@host/db",
    "postgresql://user:{}%zz@host/db", "postgresql://host/db?password={}&password=%zz", "postgresql://host/db?passwort={}",
    "host=host password={}", "postgresql://user:{}\n@host/db",
]  # fmt: skip


@pytest.mark.parametrize("text", ILL_URLS)
def test_a_database_url_that_cannot_be_read_is_told_without_its_password(heard: Heard, text: str) -> None:
    with pytest.raises(ValueError, match=r"[a-z]") as refused:
        read_database_url(text.format(PLANTED["database"]))
    heard.texts += [str(refused.value), repr(refused.value), *getattr(refused.value, "problems", ())]
