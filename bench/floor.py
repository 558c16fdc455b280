"""What a create costs before the queue has anything to do: the service's own server reads, checks and answers, and keeps nothing.

    python bench/floor.py [DATABASE_URL]      serves on a free port, which it prints, until it is told to end

With a database each create waits for a commit, of the smallest row there can be, which it shares with those that come meanwhile, as the
service's do. What is left up to the rate of a real create is the queue's.
"""

import functools
import signal
import sys
from collections.abc import Sequence

import falcon
import ground  # noqa: F401  puts the source on the path

from ai_internal.server.database import Database
from ai_internal.server.database_url import read_database_url
from ai_internal.server.group_commit import GroupCommit
from ai_internal.server.listener import Server, listen
from ai_internal.server.requests import Body, NewJob
from ai_internal.server.web import SameSiteMiddleware, problem_of_server

# As long as the answer to a create.
ANSWER = b'{"id":"' + b"x" * 640 + b'"}'


def commit(database: Database, jobs: Sequence[NewJob]) -> Sequence[object]:
    """One row for all of them."""
    database.run("-- floor\ninsert into floor default values")
    return jobs


class Jobs:
    """POST reads and checks a job as the service does."""

    def __init__(self, database: Database | None) -> None:
        self.committing = GroupCommit(functools.partial(commit, database)) if database else None

    def on_post(self, request: falcon.Request, response: falcon.Response) -> None:
        """Forgets the job."""
        job = Body(NewJob).read(request.bounded_stream.read())
        if self.committing:
            self.committing.run(job, len(job.input))
        response.location = "/api/v1/jobs/0"
        response.status, response.data = falcon.HTTP_201, ANSWER


class Health:
    """GET answers as the service does."""

    def on_get(self, _request: falcon.Request, response: falcon.Response) -> None:
        """Asks nobody."""
        response.data = b'{"status":"ok","version":"0.0.0"}'


def main() -> None:
    """Serves until SIGTERM."""
    database = Database(read_database_url(sys.argv[1]), "public", 8) if sys.argv[1:] else None
    if database:
        database.script("create table if not exists floor (n int)")
    app = falcon.App(middleware=[SameSiteMiddleware()])
    app.add_route("/api/v1/jobs", Jobs(database))
    app.add_route("/healthz", Health())
    listener = listen("127.0.0.1", 0)
    server = Server(
        app,
        listener,
        threads=256,
        max_body_bytes=32 << 20,
        max_bodies_bytes=128 << 20,
        stall_seconds=30,
        separate=(),
        admits=lambda _: True,
        problem=problem_of_server,
        drain=lambda: None,
        drain_seconds=0,
        one_core=True,
    )
    signal.signal(signal.SIGTERM, server.end)
    print(listener.getsockname()[1], flush=True)
    server.run()


if __name__ == "__main__":
    main()
