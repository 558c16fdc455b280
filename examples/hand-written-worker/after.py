"""The worker of before.py with a claim. `diff before.py after.py` is the whole change.

    AI_SERVICE_URL=http://127.0.0.1:8080 AI_SERVICE_TOKEN=… python after.py embed

It claims a job, keeps the lease alive from a thread of its own while it works, and finishes the job by its claim_id. Now any number of
these share the work, what one of them held when it died is done by another, and a job that was cancelled is not reported.
"""

import json
import os
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid

URL = os.environ.get("AI_SERVICE_URL", "http://127.0.0.1:8080") + "/api/v1/jobs"
HEADERS = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('AI_SERVICE_TOKEN') or 'none'}"}
LEASE_SECONDS = int(os.environ.get("LEASE_SECONDS", "60"))
WORKER_ID = f"hand-written-{uuid.uuid4()}"


def call(path: str, body: object) -> dict:
    """POST until there is an answer; every call here may be repeated. Raises urllib.error.HTTPError for a refusal that stays one."""
    while True:
        try:
            with urllib.request.urlopen(urllib.request.Request(URL + path, json.dumps(body).encode(), HEADERS), timeout=60) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code < 500:
                raise
        except OSError:
            pass
        time.sleep(1)


def work(job_input: dict) -> dict:
    """What this worker is for."""
    time.sleep(job_input.get("seconds", 0))
    return {"length": len(job_input["text"])}


def keep(job: dict, done: threading.Event) -> None:
    """Extends the lease each third of it. Ends when the claim no longer holds the job: what `work` does then is in vain."""
    while not done.wait(LEASE_SECONDS / 3):
        try:
            call(f"/{job['id']}/heartbeat", {"claim_id": job["claim_id"], "lease_seconds": LEASE_SECONDS})
        except urllib.error.HTTPError as error:
            print(f"job {job['id']}: {json.load(error)['code']}", file=sys.stderr)
            return


def run(job: dict) -> None:
    """Does one job and reports what became of it."""
    done = threading.Event()
    threading.Thread(target=keep, args=(job, done), daemon=True).start()
    try:
        verb, report = "complete", {"result": work(job["input"])}
    except Exception as error:  # noqa: BLE001 -- one bad job must not end the worker
        verb, report = "fail", {"category": "internal", "message": f"{type(error).__name__}: {error}", "retryable": True}
    try:
        call(f"/{job['id']}/{verb}", {"claim_id": job["claim_id"], **report})
    except urllib.error.HTTPError as error:
        print(f"job {job['id']}: {json.load(error)['code']}", file=sys.stderr)
    finally:
        done.set()


def main(profile: str) -> None:
    """Goes on until SIGTERM, and then ends with the job it has in hand."""
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    while not stopping.is_set():
        wish = {"worker_id": WORKER_ID, "claim_id": str(uuid.uuid4()), "model_profiles": [profile], "lease_seconds": LEASE_SECONDS}
        for job in call("/claim", {**wish, "wait_seconds": 5})["jobs"]:
            run(job)


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except urllib.error.HTTPError as error:
        sys.exit(f"{error.code}: {error.read().decode()}")
