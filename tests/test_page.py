"""The operator's page in a real Chromium: what it shows is what the API says, what it does is done, and nothing in a job becomes markup."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from browser import Browser, require_chromium, running_browser
from fake_service import FakeService, Seen, answers, forwards, loses, problem
from postgres import fresh_schema
from service import Corner, Service, encoded, running_service, wait_until

MARKUP = '<img src=x onerror="window.ran=1"><script>window.ran=1</script>'
CLIPPED = """
    const parts = [document.documentElement, ...document.querySelectorAll(".card")];
    return parts.filter((one) => one.scrollWidth > one.clientWidth).map((one) => one.innerText.slice(0, 60))"""
VIEWS = ("#/", "#/jobs", "#/failures", "#/fleet")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    require_chromium()
    with running_browser() as started:
        yield started


@pytest.fixture(scope="module")
def own_service(postgres_url: str) -> Iterator[Service]:
    """A service whose counters nobody else moves."""
    with fresh_schema(postgres_url) as schema, running_service(postgres_url, schema) as started:
        yield started


@pytest.fixture
def corner(own_service: Service) -> Corner:
    return Corner(own_service.api)


@pytest.fixture
def page(browser: Browser, own_service: Service) -> Iterator[Page]:
    """The page of the test's own service; at the end it must have asked nobody else and complained of nothing."""
    shown = Page(browser, f"http://127.0.0.1:{own_service.api.port}/")
    shown.forget()
    yield shown
    assert shown.complaints() == []
    assert shown.strangers() == []


class Page:
    """The page at one address."""

    def __init__(self, browser: Browser, url: str) -> None:
        self.browser, self.url = browser, url

    def open(self, view: str = "#/") -> Browser:
        """Load it anew at a view and wait until it shows what the service said."""
        self.browser.open(self.url + view)
        self.browser.sees("#pulse", "live")
        return self.browser

    def go(self, view: str) -> Browser:
        """Change the view without loading the page; anything drawn before is gone at once."""
        self.browser.run("location.hash = arguments[0]", view)
        return self.browser

    def forget(self) -> None:
        """Drop what was logged so far."""
        self.browser.console(), self.browser.requests()

    def complaints(self) -> list[str]:
        """What the console said, but for the browser's own line about each answer with an error status."""
        return [line for line in self.browser.console() if "Failed to load resource" not in line]

    def strangers(self) -> list[str]:
        """Addresses asked that are not this service's."""
        asked = [str(request["url"]) for request in self.browser.requests()]
        return [url for url in asked if not url.startswith((self.url, "data:image/svg+xml", "about:blank", "blob:" + self.url))]


def failed(corner: Corner, number: int, category: str) -> list[dict[str, Any]]:
    """Jobs that failed for good."""
    created = corner.batch([{}] * number)
    for job in corner.claim(limit=number):
        corner.done(job, "fail", category=category)
    return created


# ── The file and its headers


def test_page_is_served_with_a_policy_that_names_its_own_script_and_style(own_service: Service) -> None:
    answer = own_service.api.get("/")
    assert (answer.status, answer.headers["Content-Type"].split(";")[0]) == (200, "text/html")
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["Content-Security-Policy"].split(";"))
    for name in ("style", "script"):
        [text] = re.findall(rf"<{name}>(.*?)</{name}>".encode(), answer.body, re.DOTALL)
        assert policy[f"{name}-src"] == f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'"
    assert {policy[name] for name in ("default-src", "base-uri", "form-action", "frame-ancestors")} == {"'none'"}
    assert policy["connect-src"] == "'self'"


def test_page_refuses_what_it_does_not_do(own_service: Service) -> None:
    assert own_service.api.post("/", {}).status == 405


def test_page_never_makes_markup_of_text(own_service: Service) -> None:
    page = own_service.api.get("/").body.decode()
    assert not re.findall(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|\son\w+=|style=|https?://(?!www\.w3\.org)", page
    )


def test_policy_is_in_force(page: Page) -> None:
    browser = page.open()
    with FakeService() as elsewhere:
        assert browser.run("try { document.body.innerHTML = '<b>x</b>' } catch (error) { return error.name }") == "TypeError"
        refused = "return fetch(arguments[0]).then(() => 'answered', (error) => error.name)"
        assert browser.run(refused, elsewhere.url) == "TypeError"
        assert elsewhere.seen == []
    assert any("Content Security Policy" in line for line in page.complaints())


# ── What it shows


def test_counters_are_those_of_the_service(page: Page, corner: Corner) -> None:
    corner.batch([{}] * 3 + [{"run_at": "2099-01-01T00:00:00Z"}])
    corner.claim()
    failed_before = corner.api.get("/api/v1/stats").json["jobs"]["failed"]
    jobs = wait_until(lambda: (now := corner.api.get("/api/v1/stats").json["jobs"])["running"] and now)
    browser = page.open()
    for name in ("pending", "scheduled", "running", "completed", "failed", "cancelled"):
        browser.sees(f'[data-counter="{name}"] b', str(jobs[name]))
    assert jobs["scheduled"] >= 1
    failed(Corner(corner.api), 2, "timeout")
    browser.sees('[data-counter="failed"] b', str(failed_before + 2))
    browser.sees("#view", "timeout")


def test_backlog_is_shown_by_profile_owner_and_task_type(page: Page, corner: Corner) -> None:
    corner.batch([{}] * 4)
    browser = page.open()
    for label, name in (("Profile", corner.model_profile), ("Owner", corner.owner_service), ("Task type", corner.task_type)):
        browser.click_text(label, "#view")
        browser.sees("#view", name)


def test_curves_are_drawn_from_successive_samples(page: Page, corner: Corner) -> None:
    corner.create()
    browser = page.open()
    browser.click_text("1 h", "#tools")
    drawn = "return [...document.querySelectorAll('.curve')].filter((path) => path.getAttribute('d').includes('L')).length"
    wait_until(lambda: browser.run(drawn) >= 2, what="two curves of more than a point")


def test_throughput_has_a_gap_where_the_window_lost_its_oldest_part(page: Page) -> None:
    browser = page.open()
    sample = "const at = (seconds, completed, window = 3600) => ({at: 1000 * seconds, window, jobs: {completed}, waits: {}});"
    rates = "state.samples = [at(0, 10), at(15, 25), at(30, 20), at(45, 40, 86400), at(60, 70, 86400)];"
    told = browser.run(sample + rates + "return state.samples.map((_, index) => rate(index, 'completed'))")
    assert told == [None, 60, None, None, 120]


def test_workers_and_their_circuits_are_shown(page: Page, corner: Corner) -> None:
    provider = {"name": "vllm", "status": "unavailable", "circuit": "half_open", "model_profiles": ["p"], "detail": MARKUP}
    corner.claim(worker={"version": "9.9", "capacity": 4, "running": 1, "providers": [provider]})
    Corner(corner.api).claim(worker={"version": "bare"})
    browser = page.open("#/fleet")
    row = browser.sees("#view", corner.worker_id)
    assert "1 of 4" in row
    assert "circuit half open" in row
    assert MARKUP in row
    assert "whisperx" in row


def test_search_finds_a_job_by_id_owner_and_reference(page: Page, corner: Corner) -> None:
    job = corner.create(owner_ref=f"call {corner.mark}")
    corner.create(owner_ref="another")
    browser = page.open()
    texts = {
        job["id"].upper(): False,
        corner.owner_service: True,
        f"{corner.owner_service} {job['owner_ref']}": False,
        job["owner_ref"]: False,
    }
    for text, finds_both in texts.items():
        browser.press("/", text, "Enter")
        shown = browser.sees("#view", job["owner_ref"])
        assert ("another" in shown) == finds_both, text
        page.go("#/fleet").sees("#view", "Providers")


def test_search_offers_to_look_for_an_owner_that_has_been_quiet(page: Page, corner: Corner) -> None:
    job = corner.create()
    browser = page.open()
    browser.run("state.stats.by_owner_service = []")
    browser.press("/", corner.owner_service, "Enter")
    browser.click_text(f"Look for the owner {corner.owner_service}")
    browser.sees("#view", job["id"][-8:])


def test_list_shows_a_page_at_a_time_and_goes_both_ways(page: Page, corner: Corner) -> None:
    corner.batch([{}] * 60)
    browser = page.open(f"#/jobs?owner_service={corner.owner_service}")
    browser.sees("#view", "1–50")
    assert browser.run("return document.querySelectorAll('#view tbody tr').length") == 50
    browser.click_text("Older ›")
    browser.sees("#view", "51–60")
    assert "call/0" in browser.sees("#view")
    browser.click_text("‹ Newer")
    browser.sees("#view", "1–50")
    limits = {int(found[1]) for request in browser.requests() if (found := re.search(r"[?&]limit=(\d+)", str(request["url"])))}
    assert limits == {50}


def test_a_filter_is_set_by_hand_and_a_wrong_one_is_explained(page: Page, corner: Corner) -> None:
    failed(corner, 1, "truncated")
    job = corner.create(owner_ref="left out")
    browser = page.open("#/jobs")
    browser.sees("#view", job["owner_ref"])
    browser.click("input[name=error_category]")
    browser.press("truncated", "Enter")
    browser.sees("#view", "truncated")
    assert "left out" not in browser.sees("#view")
    browser.click("input[name=model_profile]")
    browser.press("no such name!", "Enter")
    browser.sees("#view .banner", "model_profile")


def test_a_job_is_shown_with_its_whole_story_and_never_as_markup(page: Page, corner: Corner) -> None:
    job = corner.take(owner_ref=MARKUP, input={"text": MARKUP, "number": 1.10, "big": 12345678901234567890}, max_attempts=2)
    corner.done(job, "heartbeat", progress={"step": MARKUP})
    corner.done(job, "fail", category="timeout", message=f"first {MARKUP}", retryable=True, retry_in_seconds=0, usage={"prompt_tokens": 7})
    [job] = wait_until(lambda: corner.claim())
    corner.done(job, "complete", result=[MARKUP], usage={"total_tokens": 4321, "model": MARKUP})
    browser = page.open(f"#/job/{job['id']}")
    browser.sees("#view", "Completed")
    shown = browser.sees("#view", MARKUP)
    for part in ("Attempt 1: timeout\n", f"first {MARKUP}", '{"prompt_tokens":7}', "Attempt 2 began", "4,321", "2 of 2", corner.worker_id):
        assert part in shown
    browser.click("[data-payload=input]")
    assert "12345678901234567890" in browser.sees("[data-shown=input]", "onerror")
    browser.click("[data-payload=result]")
    assert "onerror" in browser.sees("[data-shown=result]")
    assert browser.run("return window.ran ?? document.querySelectorAll('main img, main script').length") == 0


def test_payloads_are_read_only_on_demand(page: Page, corner: Corner) -> None:
    job = corner.create(input="precious")
    browser = page.open(f"#/job/{job['id']}")
    browser.sees("#view", "Created")
    assert not [request for request in browser.requests() if f"/api/v1/jobs/{job['id']}" in str(request["url"])]
    browser.click("[data-payload=input]")
    browser.sees("[data-shown=input]", '"precious"')


def test_a_large_payload_is_cut_and_downloaded_as_it_was_sent(page: Page, corner: Corner) -> None:
    sent = b'{"n": 1.10, "text": "' + b'\\"x\\\\ ' * 100_000 + b'"}'
    body = encoded(corner.job(input=0)).replace(b'"input": 0', b'"input": ' + sent)
    job = corner.api.post("/api/v1/jobs", body=body).json
    browser = page.open(f"#/job/{job['id']}")
    browser.click("[data-payload=input]")
    browser.sees("[data-shown=input]", '"n": 1.10')
    assert browser.run("return document.querySelector('[data-shown=input]').textContent.length") == 100_000
    browser.click("a[download]")
    file = browser.downloads / f"{job['id']}.input.json"
    wait_until(lambda: file.is_file() and file.read_bytes() == sent, what="the downloaded payload")


def test_a_job_that_is_not_there_is_said_to_be_gone(page: Page) -> None:
    for job_id in ("01a2044e-1ac3-776c-a127-d7fd86f56c6f", "nonsense"):
        page.open(f"#/job/{job_id}").sees("#view", f"There is no job {job_id}")


# ── What it does


def test_a_profile_is_paused_and_resumed(page: Page, corner: Corner) -> None:
    corner.create()
    browser = page.open()
    browser.click(f'[aria-label="Pause {corner.model_profile}"]')
    browser.sees(f'[aria-label="Resume {corner.model_profile}"]')
    assert corner.claim() == []
    browser.sees("#notes", "is paused")
    browser.click(f'[aria-label="Resume {corner.model_profile}"]')
    browser.sees(f'[aria-label="Pause {corner.model_profile}"]')
    assert len(corner.claim()) == 1


def test_a_failed_job_is_retried(page: Page, corner: Corner) -> None:
    [job] = failed(corner, 1, "timeout")
    browser = page.open(f"#/job/{job['id']}")
    browser.click_text("Retry", "#view")
    browser.sees("#view .pill.pending")
    assert corner.look(job)["status"] == "pending"


def test_a_running_job_is_taken_from_its_worker_only_after_a_question(page: Page, corner: Corner) -> None:
    job = corner.take()
    browser = page.open(f"#/job/{job['id']}")
    browser.click_text("Retry", "#view")
    browser.sees("dialog", corner.worker_id)
    browser.press("Escape")
    browser.gone("dialog")
    assert corner.look(job)["status"] == "running"
    browser.click_text("Retry", "#view")
    browser.click_text("Retry", "dialog")
    browser.sees("#view .pill.pending")
    assert corner.call(job, "complete").code == "claim_lost"


def test_a_job_is_cancelled_with_a_reason(page: Page, corner: Corner) -> None:
    job = corner.create()
    browser = page.open(f"#/job/{job['id']}")
    browser.click_text("Cancel", "#view")
    browser.sees("dialog", corner.owner_service)
    browser.click("dialog input")
    browser.press("asked for twice", "Enter")
    browser.sees("#view", "asked for twice")
    assert corner.look(job)["status"] == "cancelled"


def test_a_finished_job_is_deleted_only_after_a_question(page: Page, corner: Corner) -> None:
    [job] = failed(corner, 1, "timeout")
    browser = page.open(f"#/job/{job['id']}")
    browser.click_text("Delete", "#view")
    browser.sees("dialog", "erased")
    browser.click_text("Back", "dialog")
    browser.gone("dialog")
    assert corner.look(job)["status"] == "failed"
    browser.click_text("Delete", "#view")
    browser.click_text("Delete", "dialog")
    browser.sees("#tools", "Jobs")
    assert corner.api.get(f"/api/v1/jobs/{job['id']}").code == "job_not_found"


def test_bulk_retry_tells_how_many_first_and_then_retries_those(page: Page, corner: Corner) -> None:
    wanted, others = failed(corner, 3, "timeout"), failed(corner, 2, "truncated")
    browser = page.open(f"#/jobs?owner_service={corner.owner_service}&error_category=timeout")
    browser.click_text("Retry all that fit…")
    browser.sees('[data-preview="3"]', "3 jobs fit")
    browser.press("Escape")
    browser.gone("dialog")
    assert {corner.look(job)["status"] for job in wanted} == {"failed"}
    browser.click_text("Retry all that fit…")
    browser.click_text("Retry", "dialog")
    browser.sees("#notes", "3 jobs are pending again")
    assert [corner.look(job)["status"] for job in wanted + others] == ["pending"] * 3 + ["failed"] * 2


def test_bulk_retry_of_more_than_it_counts_takes_the_newest_thousand(page: Page, corner: Corner) -> None:
    corner.batch([{}] * 1001)
    claimed = corner.claim(limit=1000) + corner.claim()
    reports = [{"id": job["id"], "claim_id": job["claim_id"], "category": "timeout", "message": "too slow"} for job in claimed]
    for part in (reports[:1000], reports[1000:]):
        assert corner.api.post("/api/v1/jobs/fail", {"jobs": part}).status == 200
    browser = page.open(f"#/jobs?owner_service={corner.owner_service}&status=failed")
    browser.click_text("Retry all that fit…")
    browser.sees('[data-preview="1001"]', "1,001 jobs fit. The newest 1,000 are put back")
    browser.click_text("Retry", "dialog")
    browser.sees("#notes", "1,000 jobs are pending again. More fit this filter.")
    browser.sees("#view", "1–1")


def test_bulk_retry_asks_for_a_filter_first(page: Page, corner: Corner) -> None:
    disabled = "return [...document.querySelectorAll('#tools button')].find((one) => one.innerText.startsWith('Retry all')).disabled"
    assert page.open("#/jobs").run(disabled)
    assert page.open("#/jobs?status=completed").run(disabled)
    assert not page.open("#/jobs?status=failed").run(disabled)


# ── Tokens, keys, clock, sizes


def guarded(token: str, refused: str) -> Callable[[Any, Seen], None]:
    """The real service behind a guard: the page for everybody, the API with the token, one path not even so."""

    def behave(handler: Any, seen: Seen) -> None:
        if seen.path != "/" and seen.headers.get("Authorization") != f"Bearer {token}":
            problem(401, "unauthorized", detail="a token is needed")(handler, seen)
        elif seen.path.endswith(refused):
            problem(403, "forbidden", detail="callers may not pause")(handler, seen)
        else:
            forwards()(handler, seen)

    return behave


def test_a_token_is_asked_for_kept_in_the_tab_and_sent(browser: Browser, start_service: Callable[..., Service]) -> None:
    # Of its own: the page shows the first twelve profiles.
    corner = Corner(start_service().api)
    corner.create()
    with FakeService(forward_to=corner.api.port) as front:
        front.always("", guarded("s3cret", refused="/pause"))
        browser.open(front.url + "/")
        browser.sees("dialog", "token")
        browser.click("dialog input")
        browser.press("wrong", "Enter")
        browser.sees("#pulse", "refused 401")
        browser.sees("dialog", "token")
        browser.run("document.querySelector('dialog input').value = ''")
        browser.click("dialog input")
        browser.press("s3cret", "Enter")
        browser.sees("#pulse", "live")
        kept = browser.run("return [sessionStorage.token, localStorage.length, document.cookie, location.href.includes('s3cret')]")
        assert kept == ["s3cret", 0, "", False]
        browser.click(f'[aria-label="Pause {corner.model_profile}"]')
        browser.sees("#notes", "This token may not do that: callers may not pause")
        assert {seen.headers["Authorization"] for seen in front.seen[-2:] if seen.path != "/"} == {"Bearer s3cret"}


def test_a_service_that_does_not_answer_is_told_and_found_again(browser: Browser, corner: Corner) -> None:
    with FakeService(forward_to=corner.api.port) as front:
        browser.open(front.url + "/")
        browser.sees("#pulse", "live")
        front.always("/stats", loses())
        browser.click_text("1 h", "#tools")
        browser.sees(".banner", "does not answer")
        browser.sees("#view", "Throughput")
        front.always("/stats", answers(503, {"detail": "draining", "code": "draining"}))
        browser.click_text("7 d", "#tools")
        browser.sees(".banner", "draining")
        front.always("/stats", forwards())
        browser.click_text("1 h", "#tools")
        browser.sees("#pulse", "live")
        browser.gone(".banner")


def test_keys_move_open_and_go_back(page: Page, corner: Corner) -> None:
    first, second = corner.create(owner_ref="first"), corner.create(owner_ref="second")
    focus = "return document.activeElement.innerText"
    browser = page.open(f"#/jobs?owner_service={corner.owner_service}")
    browser.sees("#view", second["owner_ref"])
    browser.press("j")
    assert browser.run(focus) == "second"
    browser.press("j", "j")
    assert browser.run(focus) == "first"
    assert browser.run("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    browser.press("k", "j", "Enter")
    browser.sees("#view", first["id"])
    browser.press("Escape")
    browser.sees("#tools", "Filter")
    browser.press("?")
    browser.sees("dialog", "next and previous row")
    browser.press("Escape")
    browser.gone("dialog")
    browser.press("/", "j1?")
    assert browser.run("return document.activeElement.value") == "j1?"
    browser.press("Escape", "4")
    browser.sees("#tools", "Fleet")


def test_nothing_is_asked_while_the_page_is_hidden_and_seldom_else(page: Page) -> None:
    browser = page.open()
    watch = """
        window.waits = new Map();
        const [begin, end] = [window.setTimeout, window.clearTimeout];
        window.setTimeout = (act, wait) => { const id = begin(act, wait); window.waits.set(id, wait); return id; };
        window.clearTimeout = (id) => { window.waits.delete(id); end(id); };
        window.turn = (hidden) => {
          Object.defineProperty(document, "hidden", {value: hidden, configurable: true});
          document.dispatchEvent(new Event("visibilitychange"));
        };
        return refresh().then(() => [...window.waits.values()])"""
    assert [wait for wait in browser.run(watch) if wait >= 4000]
    assert browser.run("state.took = 1000; plan(); return [...window.waits.values()]") == [20_000]
    assert browser.run("turn(true); return window.waits.size") == 0
    asked = "return performance.getEntriesByType('resource').length"
    before = browser.run(asked)
    assert browser.run("return refresh(true).then(() => window.waits.size)") == 0
    browser.run("turn(false)")
    wait_until(lambda: browser.run("return window.waits.size") == 1)
    assert browser.run(asked) > before


@pytest.mark.parametrize("width", [360, 1280])
def test_every_view_fits_its_window_in_light_and_dark(page: Page, corner: Corner, width: int) -> None:
    long = "x" * 100
    other = Corner(corner.api)
    other.owner_service = other.task_type = other.model_profile = long
    [job] = failed(other, 1, "a" * 64)
    browser = page.browser
    browser.devtools("Emulation.setDeviceMetricsOverride", width=width, height=700, deviceScaleFactor=1, mobile=False)
    backs = set()
    try:
        for scheme in ("light", "dark"):
            browser.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            page.open()
            for view in (*VIEWS, f"#/job/{job['id']}") if scheme == "light" else ():
                page.go(view).sees("#view section")
                assert browser.run(CLIPPED) == [], view
            backs.add(browser.run("return getComputedStyle(document.body).backgroundColor"))
    finally:
        browser.devtools("Emulation.clearDeviceMetricsOverride")
        browser.devtools("Emulation.setEmulatedMedia", features=[])
    assert len(backs) == 2
