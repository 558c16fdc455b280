"""Submits one job, waits for it, and prints its result.

    export AI_SERVICE_URL=http://127.0.0.1:8080 AI_SERVICE_TOKEN=…
    python caller.py beeline/17 "Summarise: the caller asks for the invoice."

The idempotency key is made from the reference: running it again, after a crash too, finds the same
job. Exit codes: 0 the job completed, its result is on the output; 1 it failed or was cancelled; 2 the
request was rejected; 3 the service could not be reached for RETRY_SECONDS (30); 4 the job has not
finished within TIMEOUT_SECONDS (600).
"""

import json
import os
import sys

from ai_client import AIService, NewJob, NotJSON, ServiceError, ServiceUnavailable

COMPLETED, NOT_COMPLETED, REFUSED, UNREACHABLE, NOT_YET = range(5)


def main(reference: str, prompt: str, environ: dict[str, str]) -> int:
    """The exit status."""
    job = NewJob(
        owner_service="telephony",
        owner_ref=reference,
        task_type="call_analysis",
        model_profile=environ.get("LLM_MODEL") or "qwen2.5-14b",
        input={"prompt": prompt},
        idempotency_key=f"{reference}/summary/1",
    )
    url, token = environ.get("AI_SERVICE_URL") or "http://127.0.0.1:8080", environ.get("AI_SERVICE_TOKEN") or None
    with AIService(url, token, retry_seconds=float(environ.get("RETRY_SECONDS") or 30)) as service:
        try:
            ended = service.wait_for_job(service.create_job(job).id, float(environ.get("TIMEOUT_SECONDS") or 600))
        except TimeoutError as error:
            print(f"{error}; ask again later", file=sys.stderr)
            return NOT_YET
        except (ServiceError, NotJSON) as error:
            print(error, file=sys.stderr)
            return UNREACHABLE if isinstance(error, ServiceUnavailable) else REFUSED
    if ended.status != "completed":
        # The category is for programs, the message for people; `ended.errors` has every attempt.
        why = f": {ended.error.category}, {ended.error.message}" if ended.error else ""
        print(f"job {ended.id} {ended.status}{why}", file=sys.stderr)
        return NOT_COMPLETED
    print(json.dumps(ended.result, ensure_ascii=False))
    return COMPLETED


if __name__ == "__main__":
    if len(sys.argv) != 3:
        print("usage: caller.py REFERENCE PROMPT", file=sys.stderr)
        sys.exit(REFUSED)
    sys.exit(main(sys.argv[1], sys.argv[2], dict(os.environ)))
