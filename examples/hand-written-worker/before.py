"""A worker as one writes it at first: it looks which jobs are pending, does them, and posts the results. It does not work. See after.py.

    AI_SERVICE_URL=http://127.0.0.1:8080 AI_SERVICE_TOKEN=… python before.py embed

What is wrong with it: two of these do every job twice, one that dies leaves no trace, a job that was cancelled meanwhile is done all the
same, and a result that comes too late would overwrite a better one. So the service takes no result without a claim: this one gets 422.
"""

import json
import os
import sys
import time
import urllib.error
import urllib.request

URL = os.environ.get("AI_SERVICE_URL", "http://127.0.0.1:8080") + "/api/v1/jobs"
HEADERS = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('AI_SERVICE_TOKEN') or 'none'}"}


def call(path: str, body: object = None) -> dict:
    """POST where there is a body, else GET. Raises urllib.error.HTTPError for a refusal."""
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(URL + path, data, HEADERS)) as answer:
        return json.load(answer)


def work(job_input: dict) -> dict:
    """What this worker is for."""
    time.sleep(job_input.get("seconds", 0))
    return {"length": len(job_input["text"])}


def main(profile: str) -> None:
    """Goes on for ever."""
    while True:
        for listed in call(f"?status=pending&model_profile={profile}&limit=10")["jobs"]:
            job = call(f"/{listed['id']}?include=input")
            result = work(job["input"])
            call(f"/{job['id']}/complete", {"result": result})
        time.sleep(5)


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except urllib.error.HTTPError as error:
        sys.exit(f"{error.code}: {error.read().decode()}")
