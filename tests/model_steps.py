"""What the model-based test draws: jobs to ask for, filters, bodies of calls, and the steps that an example is made of."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from model import FINISHED, LATER, PASSED, Asked

# Which of many, counted from the last: shrinks to the last.
back = st.integers(0, 60)
owners, types, profiles = st.sampled_from(["ann", "ben"]), st.sampled_from(["talk", "sum"]), st.sampled_from(["big", "small"])
workers = st.sampled_from(["w1", "w2", "w3"])
usages = st.none() | st.builds(lambda tokens: {"total_tokens": tokens}, st.integers(0, 9))
payloads = st.sampled_from([None, 1, "text", {"a": [1, {"b": None}]}])
categories = st.sampled_from(["timeout", "internal"])
asked = st.builds(
    Asked, owners, types, profiles, st.sampled_from(["ref/1", "ref/2"]), payloads,
    priority=st.sampled_from([0, 0, 5, -10]), max_attempts=st.integers(1, 3),
    idempotency_key=st.sampled_from([*[None] * 9, "k1", "k2", "k3"]),
    run_at=st.sampled_from([*[None] * 9, PASSED, LATER]), expires_at=st.sampled_from([*[None] * 9, LATER, LATER, PASSED]),
    labels=st.sampled_from([{}, {"a": "1"}, {"a": "2", "b": "é"}]),
)  # fmt: skip
# What a caller may ask differently of a key it used: the first three are refused.
changes = st.sampled_from([{"owner_ref": "ref/3"}, {"task_type": "other"}, {"model_profile": "other"}, {"priority": 7, "input": 7}])


def some(strategy: st.SearchStrategy[str]) -> st.SearchStrategy[list[str]]:
    return st.lists(strategy, min_size=1, max_size=2, unique=True)


named = {"owner_services": some(owners), "task_types": some(types), "model_profiles": some(profiles)}
claim_filters = st.just({}) | st.just({}) | st.fixed_dictionaries({}, optional=named)
pauses = st.fixed_dictionaries({}, optional=named).filter(bool) | st.builds(lambda names: {"model_profiles": names}, some(profiles))
facts = {"owner_service": some(owners), "task_type": some(types), "model_profile": some(profiles), "owner_ref": some(st.just("ref/1"))}
error_categories = some(st.sampled_from(["timeout", "internal", "lease_expired", "expired", "cancelled"]))
statuses = some(st.sampled_from(["pending", "running", *FINISHED]))
list_filters = st.fixed_dictionaries({}, optional={**facts, "status": statuses, "error_category": error_categories})
retry_filters = st.fixed_dictionaries(
    {"status": some(st.sampled_from(["failed", "cancelled"]))}, optional={**facts, "error_category": error_categories}
) | st.fixed_dictionaries({}, optional={"owner_service": some(owners), "error_category": error_categories})
reasons = st.sampled_from([None, "why"])
retry_from = st.none() | some(st.sampled_from(["failed", "cancelled", "running"]))
bodies = {
    "complete": st.fixed_dictionaries({"result": payloads}, optional={"usage": usages}),
    "fail": st.fixed_dictionaries(
        {"category": categories, "message": st.just("m")},
        optional={"retryable": st.booleans(), "retry_in_seconds": st.sampled_from([0, 1000]), "usage": usages},
    ),
    "heartbeat": st.fixed_dictionaries({}, optional={"lease_seconds": st.sampled_from([600, 1200]), "progress": st.just({"at": 1})}),
    "release": st.fixed_dictionaries({}, optional={"delay_seconds": st.sampled_from([0, 1000])}),
}
calls = st.sampled_from(sorted(bodies)).flatmap(lambda verb: st.tuples(st.just(verb), bodies[verb]))
completions = st.tuples(st.just("complete"), bodies["complete"])
calls_for_many = st.sampled_from(sorted(bodies)).flatmap(
    lambda verb: st.tuples(st.just(verb), st.lists(st.tuples(back, bodies[verb]), min_size=1, max_size=4))
)
# One step by name, and how it is drawn; as often as its weight says. The first is what examples shrink to.
STEPS_DRAWN: dict[str, tuple[int, st.SearchStrategy[tuple[Any, ...]]]] = {
    "look_after": (1, st.tuples(st.sampled_from(["/healthz", "/readyz", "/api/v1/providers/status", "/api/v1/stats"]))),
    "send_again": (4, st.tuples(back)),
    "create": (4, st.tuples(asked)),
    "create_with_a_used_key": (2, st.tuples(back, changes)),
    "create_many": (1, st.tuples(st.lists(asked, min_size=1, max_size=5), st.sampled_from([None, 5]))),
    "claim": (8, st.tuples(workers, st.integers(1, 4), claim_filters, st.sampled_from([None, 0, 0.01]))),
    "claim_without_an_id_or_with_a_used_one": (3, st.tuples(workers, st.integers(1, 4), st.none() | back)),
    "finish": (8, st.tuples(calls, back)),
    "finish_late": (4, st.tuples(completions | completions | calls, back)),
    "finish_with_any_claim": (6, st.tuples(calls, back, st.none() | st.none() | back)),
    "finish_many": (4, st.tuples(calls_for_many, st.booleans(), st.booleans())),
    "decide": (
        5,
        st.tuples(back, st.just("retry"), retry_from) | st.tuples(back, st.just("cancel"), reasons) | st.tuples(back, st.just("delete")),
    ),
    "retry_many": (1, st.tuples(retry_filters, st.integers(1, 4))),
    "pause_or_resume": (2, st.tuples(st.sampled_from(["pause", "resume", "resume"]), pauses)),
    "read": (1, st.tuples(back, st.sampled_from([None, 0.01]))),
    "list_pages": (1, st.tuples(list_filters, st.integers(1, 4))),
    "time_passes": (
        6,
        st.tuples(back, st.sampled_from([*["lease"] * 4, "due", "expiry", "released"]), st.integers(0, 2).map(bool)),
    ),
}
steps = st.sampled_from([name for name, (weight, _) in STEPS_DRAWN.items() for _ in range(weight)]).flatmap(
    lambda name: st.tuples(st.just(name), STEPS_DRAWN[name][1]).map(lambda drawn: (drawn[0], *drawn[1]))
)
