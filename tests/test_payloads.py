"""Inputs and results come back as the same text: nothing on the way decodes, sorts, rounds or shortens them."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from service import Answer, Corner, encoded

TEXTS = {
    "a number too large for a double": "1e400",
    "a number that says it is no integer": "1.0",
    "minus nothing": "-0",
    "an exponent in capitals": "1E+2",
    "more digits than a double has": "3.14159265358979323846264338327950288",
    "an integer larger than 64 bits": "123456789012345678901234567890",
    "keys not in order": '{"b":1,"a":2,"B":3}',
    "a key twice": '{"a":1,"a":2}',
    "white space inside": '{ "a" :\n\t[ 1 ,\r\n 2 ] }',
    "an escaped NUL": r'"a\u0000b"',
    "an escaped NUL in a key": r'{"\u0000":1}',
    "escapes that need not be": r'"\u0041\/\u00e9"',
    "a surrogate pair as escapes": r'"\ud83d\ude00"',
    "a character beyond the basic plane": '"😀𝄞"',
    "line separators": '"\u2028\u2029\u007f"',
    "quotes and backslashes": r'"\" \\ \\\" \b\f\n\r\t"',
    "braces in a string": r'"}],\"input\":{[\""',
    "words that look like ours": '{"input":{"result":null},"claim_id":"x","id":7}',
    "SQL and percent signs": '"\'; drop table job; -- %s :name $1 {0}"',
    "null": "null",
    "an empty string": '""',
    "empty containers": '[{},[],"",{"":[]}]',
    "500 levels": "[" * 500 + "]" * 500,
    "500 levels of objects": '{"a":' * 499 + "{}" + "}" * 499,
}


def create_text(corner: Corner, text: str) -> Answer:
    """A create whose input is exactly this text."""
    fields = encoded({key: value for key, value in corner.job().items() if key != "input"})
    return corner.api.post("/api/v1/jobs", body=fields[:-1] + b', "input": ' + text.encode() + b" }")


def complete_text(corner: Corner, job: dict[str, Any], text: str) -> Answer:
    body = f'{{"result":{text},"claim_id":"{job["claim_id"]}"}}'
    return corner.api.post(f"/api/v1/jobs/{job['id']}/complete", body=body.encode())


def assert_carries(answer: Answer, name: str, text: str) -> None:
    assert answer.status < 300, answer
    assert re.search(rb'"%s"\s*:\s*%s\s*[,}]' % (name.encode(), re.escape(text.encode())), answer.body), answer.body[-2000:]


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_an_input_comes_back_as_the_same_text(corner: Corner, text: str) -> None:
    created = create_text(corner, text)
    assert created.status == 201, created
    path = f"/api/v1/jobs/{created.json['id']}"
    assert_carries(corner.api.request("GET", f"{path}?include=input"), "input", text)
    assert_carries(corner.api.post("/api/v1/jobs/claim", corner.claiming()), "input", text)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_result_comes_back_as_the_same_text(corner: Corner, text: str) -> None:
    job = corner.take()
    assert_carries(complete_text(corner, job, text), "result", text)
    assert_carries(corner.api.get(f"/api/v1/jobs/{job['id']}"), "result", text)


def test_the_inputs_of_a_batch_and_its_defaults_come_back_as_the_same_text(corner: Corner) -> None:
    texts = list(TEXTS.values())
    own = encoded({key: value for key, value in corner.job().items() if key not in ("input", "owner_ref")})
    jobs = b",".join(b'{"owner_ref":"%d","input":%s}' % (number, text.encode()) for number, text in enumerate(texts))
    body = b'{"jobs":[%s,{"owner_ref":"by default"}],"defaults":%s,"input":1e400}}' % (jobs, own[:-1])
    items = corner.api.post("/api/v1/jobs/batch", body=body).json["jobs"]
    for item, text in zip(items, [*texts, "1e400"], strict=True):
        assert_carries(corner.api.get(f"/api/v1/jobs/{item['id']}", include="input"), "input", text)


def test_many_inputs_in_one_claim_keep_their_text(corner: Corner) -> None:
    for text in TEXTS.values():
        assert create_text(corner, text).status == 201
    answer = corner.api.post("/api/v1/jobs/claim", corner.claiming(limit=100))
    for text in TEXTS.values():
        assert_carries(answer, "input", text)


def test_many_results_in_one_call_keep_their_text(corner: Corner) -> None:
    texts = list(TEXTS.values())
    corner.batch([{} for _ in texts])
    jobs = corner.claim(limit=len(texts))
    items = ",".join(
        f'{{"id":"{job["id"]}","claim_id":"{job["claim_id"]}","result":{text}}}' for job, text in zip(jobs, texts, strict=True)
    )
    answer = corner.api.post("/api/v1/jobs/complete", body=f'{{"jobs":[{items}]}}'.encode())
    assert {each["status"] for each in answer.json["jobs"]} == {200}
    for job, text in zip(jobs, texts, strict=True):
        assert_carries(corner.api.get(f"/api/v1/jobs/{job['id']}"), "result", text)


def test_a_repeated_claim_gives_the_same_text(corner: Corner) -> None:
    create_text(corner, TEXTS["an escaped NUL"])
    claim = corner.claiming(claim_id="01890a5d-ac96-774b-bcce-b302099a8057"[:-12] + corner.mark)
    for _ in range(2):
        assert_carries(corner.api.post("/api/v1/jobs/claim", claim), "input", TEXTS["an escaped NUL"])


@pytest.mark.parametrize("text", ["[" * 501 + "]" * 501, '{"a":' * 501 + "1" + "}" * 501], ids=["arrays", "objects"])
def test_501_levels_are_too_deep(corner: Corner, text: str) -> None:
    refused = create_text(corner, text)
    assert (refused.status, refused.code) == (422, "too_deep")
    job = corner.take()
    refused = complete_text(corner, job, text)
    assert (refused.status, refused.code) == (422, "too_deep")
    assert corner.look(job)["status"] == "running"


def test_16_mb_go_in_and_out(corner: Corner) -> None:
    text = '{"words":[' + ",".join(['"слово 😀 \\u0000"'] * 700_000) + "]}"
    assert len(text.encode()) > 16 << 20
    assert create_text(corner, text).status == 201
    claimed = corner.api.post("/api/v1/jobs/claim", corner.claiming())
    assert_holds(claimed, text)
    [job] = claimed.json["jobs"]
    assert_holds(complete_text(corner, job, text), text)
    assert_holds(corner.api.get(f"/api/v1/jobs/{job['id']}"), text)


def assert_holds(answer: Answer, text: str) -> None:
    assert answer.status == 200
    assert text.encode() in answer.body


numbers = st.from_regex(r"-?(0|[1-9][0-9]{0,30})(\.[0-9]{1,30})?([eE][+-]?[0-9]{1,4})?", fullmatch=True)
plain = st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters='"\\'), max_size=8)
escapes = st.sampled_from([r"\u0000", r"\ud83d\ude00", r"\n", r"\"", r"\\", r"\/"])
strings = st.lists(plain | escapes, max_size=4).map(lambda parts: f'"{"".join(parts)}"')
space = st.sampled_from(["", " ", "\n", "\t "])
leaves = numbers | strings | st.sampled_from(["null", "true", "false"])


def containers(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    arrays = st.tuples(st.lists(inner, max_size=4), space).map(lambda made: f"[{made[1]}{f',{made[1]}'.join(made[0])}{made[1]}]")
    pairs = st.lists(st.tuples(strings, inner), max_size=4)
    objects = st.tuples(pairs, space).map(
        lambda made: "{" + f",{made[1]}".join(f"{key}{made[1]}:{made[1]}{value}" for key, value in made[0]) + "}"
    )
    return arrays | objects


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(text=st.recursive(leaves, containers, max_leaves=12))
def test_whatever_json_goes_in_comes_out(corner: Corner, text: str) -> None:
    created = create_text(corner, text)
    assert created.status == 201, text
    assert_carries(corner.api.get(f"/api/v1/jobs/{created.json['id']}", include="input"), "input", text)
