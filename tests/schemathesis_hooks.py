"""What schemathesis cannot draw: ids of jobs that are there, claims that hold them; and it waits as long as a test may."""

from __future__ import annotations

import itertools
import json
import re
import urllib.request
from typing import Any

import schemathesis

UUID = re.compile("[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
LANE = {"owner_service": "fuzz", "task_type": "fuzz", "model_profile": "fuzz"}
turn = itertools.count()


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    _shorten(case.query)
    _shorten(case.body)
    if next(turn) % 2 and UUID.fullmatch(str((case.path_parameters or {}).get("job_id", ""))):
        claim = _claimed(case.operation.base_url)
        case.path_parameters["job_id"] = claim["jobs"][0]["id"]
        if isinstance(case.body, dict) and UUID.fullmatch(str(case.body.get("claim_id", ""))):
            case.body["claim_id"] = claim["claim_id"]


def _shorten(fields: Any) -> None:
    """Only what is right: a wait of -1 or 61 is to be refused. In a query it may be a text."""
    waits = fields.get("wait_seconds") if isinstance(fields, dict) else None
    if re.fullmatch(r"\d{1,2}(\.\d+)?", str(waits)) and 0 < float(waits) <= 60:
        fields["wait_seconds"] = "0.01" if isinstance(waits, str) else 0.01


def _claimed(base_url: str) -> Any:
    # Nothing else is in its lane; a pause that was drawn may cover it.
    _post(base_url, "resume", {"owner_services": ["fuzz"]})
    _post(base_url, "jobs", {**LANE, "owner_ref": "fuzz", "input": {}})
    return _post(base_url, "jobs/claim", {"worker_id": "fuzz", "owner_services": ["fuzz"]})


def _post(base_url: str, path: str, body: Any) -> Any:
    address, media_type = f"{base_url.rstrip('/')}/api/v1/{path}", {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(address, json.dumps(body).encode(), media_type), timeout=30) as answer:
        return json.load(answer)
