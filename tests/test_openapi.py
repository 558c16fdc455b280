"""The document at /openapi.json says what the service does: its routes, the fields it reads, the answers it gives, and nothing else.

`FUZZ_EXAMPLES=300` has schemathesis try longer and in more ways: `make fuzz-api`.
"""

from __future__ import annotations

import copy
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import attrs
import falcon
import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator
from service import Answer, Api, Corner, Service, encoded, running_service, wait_until

from ai_internal.server import requests
from ai_internal.server.openapi import WORDS
from ai_internal.server.operations import OPERATIONS
from ai_internal.server.requests import Check, Refusal
from ai_service import Service as Application
from ai_service import Settings, create_app

HERE = Path(__file__).parent
UNKNOWN = "01890a5d-ac96-774b-bcce-b302099a8057"
BULK = [(method, path) for method, path in OPERATIONS if re.fullmatch("/api/v1/jobs/(complete|fail|heartbeat|release)", path)]


@pytest.fixture(scope="module")
def document(api: Api) -> dict[str, Any]:
    return dict(api.get("/openapi.json").json)


def operation_of(document: Mapping[str, Any], method: str, path: str) -> dict[str, Any]:
    return dict(document["paths"][path][method.lower()])


def parameters_of(document: Mapping[str, Any], operation: Mapping[str, Any]) -> list[dict[str, Any]]:
    common = document["components"]["parameters"]
    return [common[each["$ref"].rpartition("/")[2]] if "$ref" in each else each for each in operation["parameters"]]


def validator(document: Mapping[str, Any], schema: Mapping[str, Any]) -> Draft202012Validator:
    return Draft202012Validator({**schema, "components": document["components"]}, format_checker=Draft202012Validator.FORMAT_CHECKER)


def resolved(document: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    return dict(document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]) if "$ref" in schema else dict(schema)


def body_schema(document: Mapping[str, Any], method: str, path: str) -> dict[str, Any]:
    body = operation_of(document, method, path)["requestBody"]
    return resolved(document, body["content"]["application/json"]["schema"])


# ── The document by itself


def test_the_document_is_valid_openapi(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1.")
    assert list(OpenAPIV31SpecValidator(document).iter_errors()) == []


def test_the_document_has_the_routes_and_methods_of_the_application_and_no_others(document: dict[str, Any]) -> None:
    app = create_app(Application(Settings.read({"DATABASE_URL": "postgresql://user@127.0.0.1:1/none"})))
    assert {(method.upper(), path) for path, methods in document["paths"].items() for method in methods} == set(routes(app._router._roots))


def routes(nodes: Iterable[Any]) -> Iterator[tuple[str, str]]:
    """The methods and paths below nodes of Falcon's router. Its own `inspect` reads the source of each responder: nine seconds."""
    for node in nodes:
        yield from ((method, node.uri_template) for method in falcon.HTTP_METHODS if hasattr(node.resource, f"on_{method.lower()}"))
        yield from routes(node.children)


def test_every_refusal_is_told_with_its_title_and_status(document: dict[str, Any]) -> None:
    codes = document["components"]["schemas"]["Problem"]["properties"]["code"]["oneOf"]
    told = {each["const"]: (each["title"], each["description"]) for each in codes}
    assert told == {kind.code: (kind.title(), str(kind.status)) for kind in (Refusal, *Refusal.__subclasses__())}


def test_every_field_is_described_and_no_word_is_left_over(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    fields = {(name, field): each for name, schema in schemas.items() for field, each in schema.get("properties", {}).items()}
    operations = [operation for methods in document["paths"].values() for operation in methods.values()]
    parameters = [each for operation in operations for each in parameters_of(document, operation)]
    assert [field for field, each in fields.items() if not each.get("description")] == []
    assert [each["name"] for each in parameters if not each.get("description")] == []
    told = {each["description"] for each in (*fields.values(), *parameters)}
    assert [word for word, text in WORDS.items() if text not in told] == []


def test_every_example_is_what_its_schema_says(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    examples = [(name, example) for name, schema in schemas.items() for example in schema.get("examples", ())]
    media = list(media_types(document))
    given = [(each["schema"], each["example"]) for each in media if "example" in each]
    assert len(examples) > 20
    assert len(given) == 1
    for schema, example in [*(({"$ref": f"#/components/schemas/{name}"}, example) for name, example in examples), *given]:
        assert [error.message for error in validator(document, schema).iter_errors(example)] == [], schema
    assert {each["schema"]["$ref"].rpartition("/")[2] for each in media if "$ref" in each["schema"]} <= {name for name, _ in examples}


def media_types(document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for operation in (each for methods in document["paths"].values() for each in methods.values()):
        for part in (operation.get("requestBody", {}), *operation["responses"].values()):
            yield from part.get("content", {}).values()


# ── What is read


def checks() -> list[Check]:
    """Every check of a field, however deep it stands in the type."""

    def within(kind: Any) -> Iterator[Check]:
        if get_origin(kind) is Annotated and isinstance(get_args(kind)[1], Check):
            yield get_args(kind)[1]
        for part in get_args(kind):
            yield from within(part)

    kinds = [kind for kind in vars(requests).values() if isinstance(kind, type) and attrs.has(kind)]
    return list({id(check): check for kind in kinds for field in attrs.fields(kind) for check in within(field.type)}.values())


TEXTS = ["", "a", "running", "failed", "input", "\0", "a b", UNKNOWN, UNKNOWN.upper(), UNKNOWN[:-1], "A_1", "a_1", "é" * 100]
TEXTS += ["a" * length for length in (63, 64, 65, 100, 101, 200, 201, 500, 501, 2000, 2001)] + [f"00-{'a' * 32}-{'b' * 16}-01"]
NUMBERS = [-11, -10, -1, 0, 1, 4.999, 5, 10, 11, 60, 60.001, 100, 101, 500, 501, 1000, 1001, 3600, 86_400, 86_401, 604_800, 31_622_400]
NUMBERS += [31_622_401, 10**12, 10**12 + 1, 10**15, 10**15 + 1]
TEXTS += ["a:b", "a:", ":b", "a b:c", "a:b\0", f"{'k' * 63}:{'v' * 200}", f"{'k' * 64}:v", f"k:{'v' * 201}"]
LABELS = [{"a": "b"}, {"a/b.c-D_9": ""}, {"a": 1}, {"a": None}, {"": "b"}, {"a b": "c"}, {"a": "\0"}, {"k" * 63: "v" * 200}]
LABELS += [{"k" * 64: "v"}, {"k": "v" * 201}, *({str(n): "v" for n in range(count)} for count in (16, 17))]


def test_a_schema_allows_what_its_check_accepts_and_nothing_else() -> None:
    # What the schema of a time cannot say, years, is left to the tests of bad input; so is that 5.0 is not whole.
    found = [check for check in checks() if check.schema.get("format") != "date-time"]
    values: list[Any] = [*TEXTS, *NUMBERS, True, None, [], {}, *LABELS]
    probes = [(number, check, value) for number, check in enumerate(found) for value in values]
    allowed = {(number, repr(value)) for number, check, value in probes if Draft202012Validator(check.schema).is_valid(value)}
    accepted = {(number, repr(value)) for number, check, value in probes if is_accepted(check, value)}
    assert len(found) > 15
    assert allowed == accepted
    assert {number for number, _ in accepted} == set(range(len(found)))


def is_accepted(check: Check, value: Any) -> bool:
    return type(value) in check.types and check.accept(value) is None


FIELDS = sorted(
    {
        field.name.rstrip("_")
        for kind in vars(requests).values()
        if isinstance(kind, type) and attrs.has(kind)
        for field in attrs.fields(kind)
    }
    | {"defaults", "jobs", "colour"}
)
FILLED: dict[str, Any] = {name: {} for name in FIELDS}
NO_FIELD = "is not a field of this request"
BODIES = [key for key, operation in OPERATIONS.items() if operation.request]


def told_of(problems: list[dict[str, str]], message: str) -> set[str]:
    return {each["path"].rpartition("/")[2].rpartition("?")[2] for each in problems if each["message"] == message}


@pytest.mark.parametrize(("method", "path"), BODIES, ids=lambda part: part)
def test_the_service_reads_the_documented_fields_and_no_others(api: Api, document: dict[str, Any], method: str, path: str) -> None:
    answer = api.request(method, path.format(job_id=UNKNOWN), encoded(FILLED), {"Content-Type": "application/json"})
    assert answer.status == 422, answer
    schema = body_schema(document, method, path)
    assert set(FIELDS) - told_of(answer.json["errors"], NO_FIELD) == set(schema["properties"])


@pytest.mark.parametrize(("method", "path"), [key for key in BODIES if key not in BULK], ids=lambda part: part)
def test_the_service_requires_the_documented_fields_and_no_others(api: Api, document: dict[str, Any], method: str, path: str) -> None:
    answer = api.request(method, path.format(job_id=UNKNOWN), b"{}", {"Content-Type": "application/json"})
    required = set(body_schema(document, method, path).get("required", ()))
    assert (told_of(answer.json["errors"], "is required") if answer.status == 422 else set()) == required


@pytest.mark.parametrize(("method", "path"), [*BULK, ("POST", "/api/v1/jobs/batch")], ids=lambda part: part)
def test_the_service_reads_the_documented_fields_of_an_item(api: Api, document: dict[str, Any], method: str, path: str) -> None:
    item = resolved(document, body_schema(document, method, path)["properties"]["jobs"]["items"])
    filled, empty = (problems_of_item(api, path, fields) for fields in (FILLED, {}))
    assert set(FIELDS) - told_of(filled, NO_FIELD) - {"id"} == set(item["properties"]) - {"id"}
    defaults = requests.JobDefaults if path.endswith("batch") else requests.Nothing
    common = {field.name for field in attrs.fields(defaults)}
    assert told_of(empty, "is required") - common == set(item["required"]) - {"id"}


def problems_of_item(api: Api, path: str, fields: dict[str, Any]) -> list[dict[str, str]]:
    """What is wrong with an item; a batch is wrong as a whole, of the others each item by itself."""
    known = {} if path.endswith("batch") else {"id": UNKNOWN}
    answer = api.post(path, {"jobs": [{**fields, **known}]}).json
    return list(answer["errors"] if path.endswith("batch") else answer["jobs"][0]["errors"])


@pytest.mark.parametrize(("method", "path"), OPERATIONS, ids=lambda part: part)
def test_the_service_reads_the_documented_query_parameters_and_no_others(
    api: Api, document: dict[str, Any], method: str, path: str
) -> None:
    answer = api.request(method, f"{path.format(job_id=UNKNOWN)}?{'&'.join(f'{name}=' for name in FIELDS)}")
    parameters = parameters_of(document, operation_of(document, method, path))
    documented = {each["name"] for each in parameters if each["in"] == "query"}
    if method == "HEAD":
        assert (answer.status, documented) == (422, set())
    else:
        assert set(FIELDS) - told_of(answer.json["errors"], NO_FIELD) == documented


# ── What is answered


class Told:
    """Calls the service and holds every answer to the document; fields that the document does not have are not let pass either."""

    def __init__(self, api: Api, document: Mapping[str, Any]) -> None:
        self._api, self._document = api, closed(document)
        self.seen: set[tuple[str, str, int]] = set()

    def __call__(self, method: str, path: str, json: Any = None, job_id: str = UNKNOWN, query: str = "") -> Answer:
        sent = json if isinstance(json, bytes) else encoded(json) if json is not None else b""
        answer = self._api.request(method, path.format(job_id=job_id) + query, sent, {"Content-Type": "application/json"})
        told = operation_of(self._document, method, path)["responses"]
        assert str(answer.status) in told, answer
        self.check(told[str(answer.status)], answer, method)
        self.seen.add((method, path, answer.status))
        return answer

    def check(self, told: Mapping[str, Any], answer: Answer, method: str) -> None:
        common = self._document["components"]["headers"]
        headers = {name: common[each["$ref"].rpartition("/")[2]] if "$ref" in each else each for name, each in told["headers"].items()}
        assert {name for name, each in headers.items() if each["required"]} <= set(answer.headers), answer
        if method == "HEAD" or "content" not in told:
            assert answer.body == b""
            return
        [(media_type, media)] = told["content"].items()
        assert answer.headers["Content-Type"].split(";")[0] == media_type
        value = answer.body.decode() if media_type.startswith("text/") else answer.json
        assert [f"{error.json_path}: {error.message}" for error in validator(self._document, media["schema"]).iter_errors(value)] == []


def closed(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document with answers that have no field beside those it names; what workers say of themselves stays open."""
    strict: dict[str, Any] = copy.deepcopy(dict(document))
    for name, schema in strict["components"]["schemas"].items():
        if name not in ("Usage", "Worker", "WorkerReport", "ProviderReport"):
            schema.setdefault("additionalProperties", False)
    return strict


@pytest.fixture
def told(api: Api, document: dict[str, Any]) -> Told:
    return Told(api, document)


JOBS = "/api/v1/jobs"
ONE = "/api/v1/jobs/{job_id}"
USAGE = {"prompt_tokens": 1, "audio_seconds": 0.5, "model": "m"}
REPORT = {"version": "1", "capacity": 4, "providers": [{"name": "vllm", "status": "ok", "circuit": "closed", "model_profiles": ["m"]}]}


def test_every_answer_of_a_running_service_is_as_documented(told: Told, corner: Corner) -> None:
    follow_jobs(told, corner)
    follow_many(told, corner)
    look_around(told, corner)
    successes = {(method, path, status) for (method, path), each in OPERATIONS.items() for status in each.answers}
    assert {seen for seen in told.seen if seen[2] < 300} == successes


def follow_jobs(told: Told, corner: Corner) -> None:
    """Jobs to each of their ends, with everything that an answer may have."""
    filled = {"idempotency_key": "k", "expires_at": "2999-01-01T00:00:00Z", "traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
    first = told("POST", JOBS, corner.job(**filled))
    assert told("POST", JOBS, corner.job(idempotency_key="k")).json["id"] == first.json["id"]
    failed = taken(told, corner, limit=1, worker=REPORT)
    told("POST", f"{ONE}/heartbeat", {"claim_id": failed["claim_id"], "progress": {"percent": 5}}, failed["id"])
    told("GET", ONE, job_id=failed["id"], query="?include=input")
    told("POST", f"{ONE}/fail", {"claim_id": failed["claim_id"], "category": "timeout", "message": "late", "usage": USAGE}, failed["id"])
    told("POST", f"{ONE}/retry", {}, failed["id"])
    done = taken(told, corner)
    told("POST", f"{ONE}/complete", {"claim_id": done["claim_id"], "result": [1], "usage": USAGE}, done["id"])
    assert told("GET", ONE, job_id=done["id"], query="?include=input&wait_seconds=1").json["errors"]
    told("DELETE", ONE, job_id=done["id"])
    told("POST", JOBS, corner.job())
    released = taken(told, corner)
    told("POST", f"{ONE}/release", {"claim_id": released["claim_id"], "delay_seconds": 60}, released["id"])
    assert told("POST", f"{ONE}/cancel", {"reason": "enough"}, released["id"]).json["error"]


def taken(told: Told, corner: Corner, **fields: Any) -> Any:
    [job] = told("POST", f"{JOBS}/claim", corner.claiming(**fields)).json["jobs"]
    return job


def follow_many(told: Told, corner: Corner) -> None:
    """The bulk calls, each with an item that is right, one that is late and one that is ill."""
    told("POST", f"{JOBS}/batch", {"jobs": [corner.job(owner_ref=f"many/{number}", idempotency_key=str(number)) for number in range(6)]})
    told("POST", f"{JOBS}/batch", {"jobs": [corner.job(owner_ref="many/0", idempotency_key="0")]})
    jobs = told("POST", f"{JOBS}/claim", corner.claiming(limit=4)).json["jobs"]
    needed = {"complete": {"result": None}, "fail": {"category": "bad_input", "message": "no"}, "heartbeat": {}, "release": {}}
    for (verb, fields), job in zip(needed.items(), jobs, strict=True):
        right, late = ({"id": job["id"], "claim_id": claim_id, **fields} for claim_id in (job["claim_id"], UNKNOWN))
        beside = {"worker": REPORT} if verb == "heartbeat" else {}
        answer = told("POST", f"{JOBS}/{verb}", {"jobs": [right, late, {"id": 5}], **beside})
        assert [item["status"] for item in answer.json["jobs"]] == [200, 409, 422]
    told("POST", f"{JOBS}/get", {"ids": [UNKNOWN, *(job["id"] for job in jobs)]})
    assert told("GET", JOBS, query=f"?owner_service={corner.owner_service}&limit=1").json["next_cursor"]
    dry = {"filter": {"owner_service": corner.owner_service, "status": "failed"}, "dry_run": True}
    assert told("POST", f"{JOBS}/retry", dry).json["matched"] == 1
    assert told("POST", f"{JOBS}/retry", {"filter": {"owner_service": corner.owner_service, "status": "failed"}}).json["retried"] == 1


def look_around(told: Told, corner: Corner) -> None:
    """What operators ask, while there is something of everything."""
    assert told("POST", "/api/v1/pause", {"model_profiles": [corner.model_profile]}).json["paused"]
    assert told("GET", "/api/v1/pause").json["paused"]
    told("POST", "/api/v1/resume", {"model_profiles": [corner.model_profile]})
    stats = wait_until(lambda: (seen := told("GET", "/api/v1/stats", query="?window_seconds=604800").json)["errors"] and seen)
    assert stats["usage"]
    wait_until(lambda: [each for each in told("GET", "/api/v1/workers").json["workers"] if each["worker_id"] == corner.worker_id])
    assert told("GET", "/api/v1/providers/status").json["providers"]
    for method, path in itertools.product(("GET", "HEAD", "OPTIONS"), ("/healthz", "/readyz")):
        told(method, path)
    told("GET", "/openapi.json")
    told("GET", "/docs")
    told("GET", "/metrics")
    told("GET", "/")


def test_every_refusal_of_a_running_service_is_as_documented(told: Told, corner: Corner) -> None:
    job = corner.take(idempotency_key="taken")
    claim, complete = {"claim_id": UNKNOWN}, f"{ONE}/complete"
    refused = [
        told("POST", JOBS, b"{"),
        told("POST", JOBS, {}),
        told("POST", JOBS, corner.job(owner_ref="another", idempotency_key="taken")),
        told("POST", JOBS, encoded(corner.job(input="deep")).replace(b'"deep"', b"[" * 501 + b"]" * 501)),
        told("GET", ONE),
        told("GET", ONE, query="?colour=red"),
        told("DELETE", ONE, job_id=job["id"]),
        told("POST", complete, {**claim, "result": 1}, job["id"]),
        told("POST", complete, {**claim, "result": 1}),
        told("POST", f"{JOBS}/claim", {"worker_id": "somebody else", "claim_id": job["claim_id"]}),
    ]
    assert [answer.code for answer in refused] == [
        "malformed_json",
        "validation_failed",
        "idempotency_key_reused",
        "too_deep",
        "job_not_found",
        "validation_failed",
        "invalid_state",
        "claim_lost",
        "job_not_found",
        "claim_id_reused",
    ]


def test_an_unready_service_answers_as_documented(document: dict[str, Any]) -> None:
    with running_service("postgresql://user@127.0.0.1:1/none", "tests_none") as away:
        told = Told(away.api, document)
        asked = (("GET", "/readyz"), ("GET", JOBS), ("GET", "/healthz"))
        assert [told(method, path).status for method, path in asked] == [503, 503, 200]


# ── Strangers' requests


@pytest.mark.long
def test_schemathesis_finds_nothing(start_service: Callable[..., Service], tmp_path: Path) -> None:
    service = start_service()
    examples = os.environ.get("FUZZ_EXAMPLES")
    phases = "examples,coverage,fuzzing,stateful" if examples else "fuzzing"
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(HERE / "schemathesis.toml"), "run"]
    options = ["--phases", phases, "--max-examples", examples or "3", "--no-color"]
    environment = {**os.environ, "SCHEMATHESIS_HOOKS": "schemathesis_hooks", "PYTHONPATH": str(HERE)}
    address = f"http://127.0.0.1:{service.api.port}/openapi.json"
    done = subprocess.run([*command, address, *options], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    # All but the one that gave it the document.
    assert re.search(rf"Tested: +{len(OPERATIONS) - 1}\b", done.stdout), done.stdout
