"""A telephony backend switches the analysis of its calls to AI Service while it keeps running.

    make run                                        in one terminal
    .venv/bin/python examples/caller/handover.py    in another

The backend has a local function, `analyse`. This program mirrors a few calls and compares the
results, then switches to the service, and back. Settings, from the environment:

    AI_SERVICE_URL      the service: http://127.0.0.1:8080
    AI_SERVICE_TOKEN    its token, if it needs one
    AI_SERVICE_MODES    the first modes: call_analysis=mirror
    LLM_MODEL           the model profile of the remote analysis: qwen2.5-14b
"""

import logging
import os
import threading
from collections.abc import Sequence
from typing import Any

from attrs import asdict, frozen

from ai_client import AIService, Job, NewJob
from ai_handover import Comparison, Handover, read_modes

TOPICS = ("invoice", "fault", "contract", "other")
ANALYSIS_SCHEMA = {
    "type": "object",
    "properties": {"topic": {"enum": TOPICS}},
    "required": ["topic"],
    "additionalProperties": False,
}
COMPARED_SECONDS = 60.0
CALLS = (
    "I would like to know why the invoice of last month is so high.",
    "Since yesterday nobody can call us, there is no tone at all.",
    "We move in May. Can the contract go along?",
    "Hello? Hello? I think they have hung up.",
)


@frozen
class Analysis:
    """The analysis of a call."""

    topic: str


def analyse(transcript: str) -> Analysis:
    """The local analysis."""
    return Analysis(next((topic for topic in TOPICS if topic in transcript), "other"))


def prompt_for(transcript: str) -> dict[str, Any]:
    """The input for the same analysis by a model."""
    return {
        "system": "Name the topic of the call.",
        "prompt": transcript,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "analysis", "schema": ANALYSIS_SCHEMA},
        },
    }


def analysis_of(job: Job) -> Analysis:
    """The remote result, as the type that `analyse` returns."""
    return Analysis(job.result["json"]["topic"])


class Backend:
    """The part of the backend that analyses calls."""

    def __init__(self, service: AIService, environ: dict[str, str]) -> None:
        modes = read_modes({"AI_SERVICE_MODES": "call_analysis=mirror", **environ})
        self.handover = Handover(service, modes, compare=self.compare, timeout_seconds=30)
        self.profile = environ.get("LLM_MODEL") or "qwen2.5-14b"
        self.compared = threading.Semaphore(0)

    def analyse(self, number: int, transcript: str) -> Analysis:
        """The analysis of one call, local or remote by the mode of its task type."""
        job = NewJob(
            "telephony",
            f"beeline/{number}",
            "call_analysis",
            self.profile,
            input=prompt_for(transcript),
        )
        return self.handover.run(job, local=lambda: analyse(transcript), read=analysis_of)

    def compare(self, comparison: Comparison) -> None:
        """Called with both results of a mirrored call, in the mirror thread."""
        verdict = "agree" if comparison.remote == comparison.local else "differ"
        remote = comparison.remote or comparison.remote_error
        owner_ref = comparison.job.owner_ref
        print(f"  {owner_ref}: {verdict}, local {comparison.local}, remote {remote}", flush=True)
        self.compared.release()


def show(backend: Backend, calls: Sequence[str]) -> None:
    """Analyse some calls."""
    print(f"modes: {backend.handover.modes}")
    for number, transcript in enumerate(calls, start=1):
        print(f"  beeline/{number}: {backend.analyse(number, transcript)}", flush=True)


def main(environ: dict[str, str]) -> None:
    """Mirror, then run remotely, then locally."""
    url = environ.get("AI_SERVICE_URL") or "http://127.0.0.1:8080"
    with AIService(url, environ.get("AI_SERVICE_TOKEN"), retry_seconds=5) as service:
        backend = Backend(service, environ)
        with backend.handover:
            show(backend, CALLS)
            print("comparisons:", flush=True)
            if not all(backend.compared.acquire(timeout=COMPARED_SECONDS) for _ in CALLS):
                print(f"  not all of them within {COMPARED_SECONDS:g} s")
            for mode in ("remote", "off"):
                backend.handover.set_mode("call_analysis", mode)
                show(backend, CALLS[:2])
    print("counters:")
    for name, value in asdict(backend.handover.stats()).items():
        print(f"  {name}: {dict(value) if isinstance(value, dict) else value}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    main(dict(os.environ))
