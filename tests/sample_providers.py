"""Shared by the tests of providers: a configurable plugin, a job, and a setting of each kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import attrs
from urllib3.util import Url

from providers import (
    Health,
    InstalledProvider,
    Job,
    Result,
    setting,
)
from providers.settings import (
    duration,
    header_word,
    web_address,
    whole,
)


@attrs.frozen
class Plugin:
    """A provider whose check does what a test wants."""

    name: str = "plugin"
    model_profiles: tuple[str, ...] = ("a",)
    looks: Callable[[], Any] = lambda: Health("ok")

    def check(self) -> Health:
        return self.looks()  # type: ignore[no-any-return]

    def run(self, job: Job) -> Result:
        return Result(job.input)


def listed(
    *profiles: str, name: str = "plugin", looks: Callable[[], Any] | None = None, secrets: tuple[str, ...] = ()
) -> InstalledProvider:
    plugin = Plugin(name, profiles, looks or (lambda: Health("ok")))
    return InstalledProvider(name=name, origin=f"{name}:Plugin", provider=plugin, secrets=secrets)


def a_job(**changes: Any) -> Job:
    return Job(id="1", owner_service="o", owner_ref="r", task_type="t", model_profile="a", input="payload", **changes)


@attrs.frozen(kw_only=True)
class Sample:
    """A setting of each kind, and a field that is none."""

    url: Url = setting("SAMPLE_URL", "where it is", read=web_address, required="look into the manual")
    owner: str = setting("SAMPLE_OWNER", "whose it is", required=True)
    pin: str | None = setting("SAMPLE_PIN", "what lets it in", read=header_word, secret=True)
    _wait_seconds: float = setting("SAMPLE_WAIT", "how long it waits", default="1m", read=duration(1, 600))
    most: int = setting("SAMPLE_MOST", "how many", default="4", read=whole(1, 10))
    mark: str = "no setting"

    def problems(self) -> Iterator[str]:
        if self.owner == "nobody" and self.pin:
            yield "SAMPLE_OWNER is nobody, and SAMPLE_PIN is set"
            yield "nobody needs no pin"


SAMPLE = {"SAMPLE_URL": "http://host", "SAMPLE_OWNER": "me"}
