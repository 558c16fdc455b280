"""A provider as it should be, and one for each way to break the contract.

`BAD` lists them by the conformance test that has to fail for them.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import attrs
from urllib3.util import Url

from providers import (
    CANCELLED,
    INTERNAL,
    INVALID_INPUT,
    TIMEOUT,
    UNAVAILABLE,
    Health,
    Job,
    Never,
    NotCompleted,
    NotConfigured,
    NotNow,
    Provider,
    Result,
    SettingsError,
    Unsupported,
    provider_settings,
    setting,
)
from providers.conformance import ProviderConformance
from providers.settings import (
    duration,
    header_word,
    web_address,
)


@attrs.frozen(kw_only=True)
class WellSettings:
    url: Url = setting("WELL_URL", "where it is", read=web_address, required=True)
    key: str | None = setting("WELL_PIN", "what lets it in", read=header_word, secret=True)
    timeout_seconds: float = setting("WELL_TIMEOUT", "limit of one attempt", default="30s", read=duration())


class Well:
    """A provider as it should be; the host in its settings says how its model service does."""

    name = "well"
    model_profiles: tuple[str, ...] = ("a",)
    settings: Any = WellSettings

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.told = provider_settings(WellSettings, environ)
        self.host = self.told.url.host

    def check(self) -> Health:
        return Health("unavailable", "nobody there") if self.host == "away.test" else Health("ok")

    def run(self, job: Job) -> Result:
        if job.cancelled.is_set():
            raise self.cancelled()
        if job.seconds_left() == 0:
            raise self.late()
        return self.work(job)

    def work(self, job: Job) -> Result:
        if job.input == "unsupported":
            raise Unsupported("not here")
        if not isinstance(job.input, str):
            raise self.bad(job)
        if self.host == "away.test":
            raise self.away()
        if self.host == "hangs.test":
            raise self.hangs(job)
        job.report_progress({"done": 1})
        return Result({"content": job.input}, {"total_tokens": 1})

    def cancelled(self) -> NotCompleted:
        return NotNow(CANCELLED, "cancelled", burns_attempt=False)

    def late(self) -> NotCompleted:
        return NotNow(TIMEOUT, "too late", burns_attempt=False)

    def bad(self, job: Job) -> NotCompleted:
        return Never(INVALID_INPUT, "a text is wanted")

    def away(self) -> NotCompleted:
        return NotNow(UNAVAILABLE, "nobody there", burns_attempt=False)

    def hangs(self, job: Job) -> NotCompleted:
        return NotNow(CANCELLED, "ended") if job.cancelled.wait(job.seconds_left()) else NotNow(TIMEOUT, "ended")


class OfWell(ProviderConformance):
    good_input = "good"
    other_inputs = ("other",)
    bad_input = 5
    unsupported_input = "unsupported"
    check_seconds = prompt_seconds = 1.0
    soon_seconds = 0.02
    good: Mapping[str, str] = {"WELL_URL": "http://good.test", "WELL_PIN": "hidden-value"}
    unreachable: Mapping[str, str] | None = {"WELL_URL": "http://away.test", "WELL_OTHER": "hidden-too"}
    hanging: Mapping[str, str] | None = {"WELL_URL": "http://hangs.test"}
    misbehaves: type[Well] = Well

    def provider(self, environ: Mapping[str, str]) -> Provider:
        return self.misbehaves(environ)


class Nameless(Well):
    name = ""


class ServesTwoWords(Well):
    model_profiles = ("two words",)


class ServesAList(Well):
    model_profiles: Any = ["a"]  # noqa: RUF012 -- that is what is wrong with it


class SaysNothingOfWhatIsAbsent(Well):
    def __init__(self, environ: Mapping[str, str]) -> None:
        try:
            super().__init__(environ)
        except NotConfigured:
            raise NotConfigured from None


class NeedsNothing(Well):
    def __init__(self, environ: Mapping[str, str]) -> None:
        super().__init__({"WELL_URL": "http://good.test"} if not environ.get("WELL_URL", "").strip() else environ)


class TakesABlankForASetting(Well):
    def __init__(self, environ: Mapping[str, str]) -> None:
        super().__init__({"WELL_URL": "http://good.test"} if environ.get("WELL_URL") == " " else environ)


class DeclaresNothing(Well):
    settings = None


def declares(one: Any) -> type[Well]:
    """A provider that declares this as well."""
    return type("Declares", (Well,), {"settings": attrs.make_class("Declared", {"other": one}, bases=(WellSettings,), kw_only=True)})


class ReadsInSecret(Well):
    def __init__(self, environ: Mapping[str, str]) -> None:
        super().__init__(environ)
        self.hidden = environ.get("WELL_HIDDEN")


class TellsOneProblemAtATime(Well):
    def __init__(self, environ: Mapping[str, str]) -> None:
        try:
            super().__init__(environ)
        except SettingsError as wrong:
            raise SettingsError(wrong.problems[:1]) from None


class TellsTheWrongSecret(Well):
    def __init__(self, environ: Mapping[str, str]) -> None:
        try:
            super().__init__(environ)
        except SettingsError as wrong:
            raise SettingsError([*wrong.problems, f"not with {environ['WELL_PIN']}"]) from None


class AlwaysAway(Well):
    def check(self) -> Health:
        return Health("unavailable", "nobody there")


class AlwaysFine(Well):
    def check(self) -> Health:
        return Health("ok", "as ever")


class AwayInSilence(Well):
    def check(self) -> Health:
        return attrs.evolve(super().check(), detail=None)


class ChecksNothing(Well):
    def check(self) -> Health:
        return None if self.host == "hangs.test" else super().check()  # type: ignore[return-value]


class ChecksForEver(Well):
    def check(self) -> Health:
        if self.host == "hangs.test":
            threading.Event().wait(1.1)
        return super().check()


class ChecksAlone(Well):
    at_once = 0

    def check(self) -> Health:
        if self.at_once:
            raise RuntimeError("somebody else is looking")
        self.at_once += 1
        threading.Event().wait(0.02)
        self.at_once -= 1
        return super().check()


class ReturnsNoJson(Well):
    def work(self, job: Job) -> Result:
        return Result({**super().work(job).value, "score": float("inf")})


class CountsAtLength(Well):
    def work(self, job: Job) -> Result:
        # Well formed where the outcomes are looked at: those jobs have a deadline.
        return Result(super().work(job).value, {"words": ["x" * 5000] if job.deadline is None else []})


class RunsBeforeItsCheckOnly(Well):
    is_checked = False

    def check(self) -> Health:
        self.is_checked = True
        return super().check()

    def work(self, job: Job) -> Result:
        if self.is_checked:
            raise RuntimeError("closed")
        return super().work(job)


class ReportsAtLength(Well):
    def work(self, job: Job) -> Result:
        job.report_progress({"text": "x" * 5000})
        return super().work(job)


class ReportsAList(Well):
    def work(self, job: Job) -> Result:
        job.report_progress([1, 2])  # type: ignore[arg-type]
        return super().work(job)


class RunsAlone(Well):
    at_once = 0

    def work(self, job: Job) -> Result:
        if self.at_once:
            raise RuntimeError("somebody else runs")
        self.at_once += 1
        try:
            job.cancelled.wait(0.01)
            return super().work(job)
        finally:
            self.at_once -= 1


class MixesUp(Well):
    def work(self, job: Job) -> Result:
        self.input = job.input
        job.cancelled.wait(0.01)
        return super().work(attrs.evolve(job, input=self.input))


class TakesAnything(Well):
    def work(self, job: Job) -> Result:
        return super().work(job if isinstance(job.input, str) else attrs.evolve(job, input="anything"))


class NeverDoesIt(Well):
    def work(self, job: Job) -> Result:
        if job.input == "unsupported":
            raise Never(INVALID_INPUT, "not here")
        return super().work(job)


class BreaksOnAnObject(Well):
    def work(self, job: Job) -> Result:
        if isinstance(job.input, dict):
            raise KeyError("text")
        return super().work(job)


class QuotesItsInput(Well):
    def bad(self, job: Job) -> NotCompleted:
        return Never(INVALID_INPUT, f"{job.input} is no text")


class BurnsAlways(Well):
    def away(self) -> NotCompleted:
        return NotNow(UNAVAILABLE, "nobody there")


class CallsAnAbsenceInternal(Well):
    def away(self) -> NotCompleted:
        return NotNow(INTERNAL, "nobody there", burns_attempt=False)


class SpeaksInLines(Well):
    def bad(self, job: Job) -> NotCompleted:
        return Never(INVALID_INPUT, "a text\nis wanted")


class SaysNothing(Well):
    def bad(self, job: Job) -> NotCompleted:
        return Never(INVALID_INPUT, "")


class SaysTooMuch(Well):
    def bad(self, job: Job) -> NotCompleted:
        return Never(INVALID_INPUT, "x" * 5000)


class NamesNoCategory(Well):
    def bad(self, job: Job) -> NotCompleted:
        outcome = Never(INVALID_INPUT, "a text is wanted")
        outcome.category = "Invalid input"
        return outcome


class CountsTooMuch(Well):
    def bad(self, job: Job) -> NotCompleted:
        return Never(INVALID_INPUT, "a text is wanted", usage={"words": ["x" * 5000]})


class AsksForEver(Well):
    def away(self) -> NotCompleted:
        return NotNow(UNAVAILABLE, "nobody there", burns_attempt=False, retry_in_seconds=float("inf"))


class AsksForThePast(Well):
    def away(self) -> NotCompleted:
        return NotNow(UNAVAILABLE, "nobody there", burns_attempt=False, retry_in_seconds=-1)


class RaisesTheBaseClass(Well):
    def work(self, job: Job) -> Result:
        # The test of unsupported input alone gives no deadline.
        if job.input == "unsupported" and job.deadline is not None:
            raise NotCompleted(INVALID_INPUT, "not here")
        return super().work(job)


class IgnoresItsDeadline(Well):
    def hangs(self, job: Job) -> NotCompleted:
        return NotNow(CANCELLED if job.cancelled.wait(1.1) else TIMEOUT, "ended")


class CallsItsDeadlineInternal(Well):
    def hangs(self, job: Job) -> NotCompleted:
        return NotNow(CANCELLED if job.cancelled.wait(job.seconds_left()) else INTERNAL, "ended")


class IgnoresThePast(Well):
    def run(self, job: Job) -> Result:
        return super().run(attrs.evolve(job, deadline=None) if job.seconds_left() == 0 else job)


class CallsThePastInternal(Well):
    def late(self) -> NotCompleted:
        return NotNow(INTERNAL, "too late", burns_attempt=False)


class BurnsThePast(Well):
    def late(self) -> NotCompleted:
        return NotNow(TIMEOUT, "too late")


class IgnoresACancellation(Well):
    def hangs(self, job: Job) -> NotCompleted:
        left = job.seconds_left()
        threading.Event().wait(1.1 if left is None else left)
        return NotNow(CANCELLED if job.cancelled.is_set() else TIMEOUT, "ended")


class CallsACancellationInternal(Well):
    def hangs(self, job: Job) -> NotCompleted:
        return NotNow(INTERNAL if job.cancelled.wait(job.seconds_left()) else TIMEOUT, "ended")


class BeginsWhatWasCancelled(Well):
    def run(self, job: Job) -> Result:
        return self.work(job) if job.cancelled.is_set() else super().run(job)


class CallsAnEarlyCancellationInternal(Well):
    def cancelled(self) -> NotCompleted:
        return NotNow(INTERNAL, "cancelled", burns_attempt=False)


class ShowsItsSettings(Well):
    def __repr__(self) -> str:
        return f"ShowsItsSettings(key={self.told.key})"


class ChecksWithItsKey(Well):
    def check(self) -> Health:
        return attrs.evolve(super().check(), detail=f"asked with {self.told.key}")


class TellsItsKey(Well):
    def bad(self, job: Job) -> NotCompleted:
        return Never(INVALID_INPUT, f"not with {self.told.key}")


class ReturnsItsKey(Well):
    def work(self, job: Job) -> Result:
        return Result({**super().work(job).value, "headers": {"Authorization": f"Bearer {self.told.key}"}})


BAD: dict[str, list[type[Well]]] = {
    "test_it_has_a_name_and_profiles": [Nameless, ServesTwoWords, ServesAList],
    "test_without_settings_it_is_not_configured": [NeedsNothing, TakesABlankForASetting, SaysNothingOfWhatIsAbsent],
    "test_its_settings_are_declared": [
        DeclaresNothing,
        declares(setting("WELL_OTHER", "")),
        declares(setting("WELL_OTHER", "a\nb")),
        declares(setting("well_other", "something")),
        declares(setting("WELL_URL", "where it is, again", required=True)),
        declares(setting("WELL_OTHER", "lets others in", default="0000", secret=True)),
    ],
    "test_it_reads_no_setting_that_it_does_not_declare": [ReadsInSecret],
    "test_wrong_settings_are_told_all_at_once": [TellsOneProblemAtATime, TellsTheWrongSecret],
    "test_check_of_a_good_server_is_ok_and_quick": [AlwaysAway],
    "test_check_of_an_unreachable_server_says_so_and_raises_nothing": [AlwaysFine, AwayInSilence],
    "test_checks_of_a_hanging_server_go_side_by_side_and_end": [ChecksForEver, ChecksAlone, ChecksNothing],
    "test_run_returns_json_and_small_usage": [ReturnsNoJson, CountsAtLength],
    "test_a_run_after_a_check_is_as_good": [RunsBeforeItsCheckOnly],
    "test_progress_is_small_json_objects": [ReportsAtLength, ReportsAList],
    "test_runs_go_side_by_side_and_do_not_mix": [RunsAlone, MixesUp],
    "test_bad_input_is_never": [TakesAnything],
    "test_unsupported_input_is_left_to_another_provider": [NeverDoesIt],
    "test_strange_input_breaks_nothing_and_is_not_quoted": [BreaksOnAnObject, QuotesItsInput],
    "test_an_unreachable_server_burns_no_attempt": [BurnsAlways, CallsAnAbsenceInternal],
    "test_outcomes_are_well_formed": [
        SpeaksInLines,
        SaysNothing,
        SaysTooMuch,
        NamesNoCategory,
        CountsTooMuch,
        AsksForEver,
        AsksForThePast,
        RaisesTheBaseClass,
    ],
    "test_a_run_ends_at_its_deadline": [IgnoresItsDeadline, CallsItsDeadlineInternal],
    "test_a_job_whose_deadline_has_passed_does_not_run": [IgnoresThePast, CallsThePastInternal, BurnsThePast],
    "test_a_cancelled_run_ends_soon": [IgnoresACancellation, CallsACancellationInternal],
    "test_a_job_cancelled_before_it_runs_does_not_run": [BeginsWhatWasCancelled, CallsAnEarlyCancellationInternal],
    "test_secrets_do_not_show": [ShowsItsSettings, ChecksWithItsKey, TellsItsKey, ReturnsItsKey],
}
