"""The release before the last change of the schema and this one on one database: side by side, up, down and up again.

The old release is taken out of git and migrates a fresh schema itself. No release has an older
schema than the first one: these tests are skipped until its version is raised.
"""

import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path

import pytest
from load import Load
from postgres import connect, fresh_schema
from service import Corner, Service, wait_until

from ai_internal.server.database import FIRST_SCHEMA_VERSION, SCHEMA_VERSION

ROOT = Path(__file__).parent.parent
# Long enough for a call that was about to be sent when its side was taken away.
DRAIN_SECONDS = "1"


def git(*arguments: str) -> bytes:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=True).stdout


# Where the commit before a version of the schema does not start: the last one that did.
LAST_THAT_STARTED = {7: "42824f5db349dbda27bc5ae76992eecc464b6c62"}


def commit_before_this_schema() -> str:
    """The last commit with the previous version of the schema that starts: HEAD if the present version is new."""
    if SCHEMA_VERSION in LAST_THAT_STARTED:
        return LAST_THAT_STARTED[SCHEMA_VERSION]
    found = git("log", "--format=%H", f"-SSCHEMA_VERSION = {SCHEMA_VERSION}", "--", "*database.py").decode().split()
    return f"{found[-1]}^" if found else "HEAD"


@pytest.fixture(scope="module")
def old_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the previous release."""
    if SCHEMA_VERSION == FIRST_SCHEMA_VERSION:
        pytest.skip(f"schema version {SCHEMA_VERSION} is the first: no release came before it")
    if not (ROOT / ".git").exists() and os.environ.get("CI") != "true":
        pytest.skip("there is no git history to take the previous release from")
    folder = tmp_path_factory.mktemp("old-release")
    with tarfile.open(fileobj=BytesIO(git("archive", commit_before_this_schema()))) as archive:
        archive.extractall(folder, filter="data")
    assert version_in(folder) == SCHEMA_VERSION - 1, "git has no commit with the previous version"
    return folder


def version_in(release: Path) -> int:
    """The version of the schema that a release applies."""
    source = "".join(path.read_text() for path in release.rglob("*database.py"))
    [version] = re.findall(r"^SCHEMA_VERSION = (\d+)$", source, re.MULTILINE)
    return int(version)


class Releases:
    """Starts processes of either release on one schema."""

    def __init__(self, postgres_url: str, schema: str, old_release: Path, stack: ExitStack) -> None:
        self.schema = schema
        self._postgres_url, self._stack = postgres_url, stack
        self._old_main = old_release / "ai_service.py"

    def start_old(self) -> Service:
        return self._start(self._old_main)

    def start_new(self) -> Service:
        return self._start(ROOT / "ai_service.py")

    def version(self) -> int:
        """Of the schema, as the database has it."""
        connection = connect(self._postgres_url, self.schema)
        [[version]] = connection.run("select max(version) from schema_version")
        connection.close()
        return int(version)

    def _start(self, main: Path) -> Service:
        service = Service(self._postgres_url, self.schema, DRAIN_SECONDS=DRAIN_SECONDS)
        service.command = (sys.executable, str(main), "serve")
        self._stack.callback(service.stop)
        service.start()
        wait_until(lambda: service.api.get("/readyz").status == 200, what="readiness")
        return service


@pytest.fixture
def releases(postgres_url: str, old_release: Path) -> Iterator[Releases]:
    with fresh_schema(postgres_url) as schema, ExitStack() as stack:
        yield Releases(postgres_url, schema, old_release, stack)


def end(load: Load, service: Service) -> None:
    """Takes a side away from the clients and ends it in good order."""
    load.sides = [api for api in load.sides if api is not service.api]
    service.terminate()
    assert service.wait() == 0
    assert " 500 " not in service.log
    assert "Traceback" not in service.log


def assert_goes_on(load: Load) -> None:
    """Some more jobs get through whatever serves now."""
    enough = len(load.seen) + 30
    wait_until(lambda: len(load.seen) >= enough or load.failures, 30, "the end of thirty more jobs")
    assert load.failures == []


@pytest.mark.long
def test_up_down_and_up_again_under_load_loses_nothing(releases: Releases) -> None:
    old = releases.start_old()
    assert releases.version() == SCHEMA_VERSION - 1
    with Load([old.api]) as load:
        assert_goes_on(load)
        new = releases.start_new()
        assert releases.version() == SCHEMA_VERSION
        # The old release does not mind a newer schema.
        assert old.api.get("/readyz").json["schema_version"] == SCHEMA_VERSION - 1
        assert new.api.get("/readyz").json["schema_version"] == SCHEMA_VERSION
        load.sides.append(new.api)
        assert_goes_on(load)
        end(load, new)
        assert_goes_on(load)
        # The old release starts on the newer schema too.
        again = releases.start_old()
        load.sides.append(again.api)
        end(load, old)
        assert_goes_on(load)
        last = releases.start_new()
        load.sides.append(last.api)
        end(load, again)
        assert_goes_on(load)
    print(f"\n{load.ledger()}")
    load.assert_whole()


def crossed(one: Corner, other: Corner) -> None:
    """Every call, with what it needs done by one release and its effect seen by the other."""
    for verb, status in (("complete", "completed"), ("fail", "failed"), ("release", "pending"), ("cancel", "cancelled")):
        created = one.create()
        [job] = other.claim(limit=1)
        assert job["id"] == created["id"]
        assert other.call(job, "heartbeat").status == 200
        assert one.call(job, "heartbeat").status == 200
        assert one.done(job, verb)["status"] == status
        # A repeat, as after a lost answer, of the release that does not know the first one.
        assert other.done(job, verb)["status"] == status
        assert other.look(job)["status"] == status
        if status == "pending":
            assert one.claim() != []
            assert other.done(job, "cancel")["status"] == "cancelled"
        assert one.api.delete(f"/api/v1/jobs/{job['id']}").status == 204
        assert other.api.get(f"/api/v1/jobs/{job['id']}").status == 404


def crossed_in_bulk(one: Corner, other: Corner) -> None:
    """The calls for many jobs."""
    keys = [{"idempotency_key": f"key-{number}-{one.mark}"} for number in range(6)]
    ids = [job["id"] for job in one.batch(keys)]
    assert [job["id"] for job in other.batch(keys, status=200)] == ids
    jobs = other.claim(limit=6)
    items = [{"id": job["id"], "claim_id": job["claim_id"]} for job in jobs]
    assert sorted(item["id"] for item in items) == sorted(ids)
    claim_id = items[0]["claim_id"]
    assert len(one.claim(limit=6, claim_id=claim_id)) == 6
    assert statuses(one, "heartbeat", items) == {200}
    assert statuses(one, "complete", [{**item, "result": 1} for item in items[:2]]) == {200}
    assert statuses(one, "fail", [{**item, "category": "timeout", "message": "late"} for item in items[2:4]]) == {200}
    assert statuses(one, "release", items[4:]) == {200}
    retried = other.api.post("/api/v1/jobs/retry", {"filter": {"owner_service": one.owner_service}, "limit": 10})
    assert retried.json["retried"] == 2
    looked = one.api.post("/api/v1/jobs/get", {"ids": ids}).json["jobs"]
    listed = other.api.get("/api/v1/jobs", owner_service=one.owner_service, limit=6).json["jobs"]
    assert sorted(job["status"] for job in looked) == sorted(job["status"] for job in listed) == ["completed"] * 2 + ["pending"] * 4
    assert one.api.post("/api/v1/pause", {"owner_services": [one.owner_service]}).status == 200
    assert other.claim() == []
    assert other.api.post("/api/v1/resume", {"owner_services": [one.owner_service]}).status == 200
    assert len(one.claim(limit=6)) == 4


def statuses(corner: Corner, verb: str, items: list[dict[str, object]]) -> set[int]:
    return {item["status"] for item in corner.api.post(f"/api/v1/jobs/{verb}", {"jobs": items}).json["jobs"]}


def counted(corner: Corner) -> bool:
    """Whether the statistics have all of the corner."""
    groups = corner.api.get("/api/v1/stats").json["by_owner_service"]
    return any(group["owner_service"] == corner.owner_service and group["completed"] == 2 and group["running"] == 4 for group in groups)


@pytest.mark.long
@pytest.mark.parametrize("story", [crossed, crossed_in_bulk])
def test_each_release_goes_on_with_what_the_other_did(releases: Releases, story: Callable[[Corner, Corner], None]) -> None:
    # On a schema that this release made.
    new, old = Corner(releases.start_new().api), Corner(releases.start_old().api)
    story(old, old.through(new.api))
    story(new, new.through(old.api))
    if story is crossed_in_bulk:
        for corner in (old, new, old.through(new.api), new.through(old.api)):
            wait_until(lambda corner=corner: counted(corner), what="the statistics")
