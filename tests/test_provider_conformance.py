"""The conformance suite passes a correct provider; each of its tests fails for one fault."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable

import pytest
from misbehaving_providers import BAD, OfWell, RunsAlone, Well

from providers.conformance import ProviderConformance, closed_port, silent_server


class TestConformanceOfWell(OfWell):
    """The suite passes what is as it should be."""


ROWS = [(misbehaves, check) for check, kinds in BAD.items() for misbehaves in kinds]
EVERY_CHECK = [name for name in dir(ProviderConformance) if name.startswith("test_")]


def ending_of(test: Callable[[], None]) -> BaseException | None:
    """What a test of the suite ended with, None when it passed."""
    try:
        test()
    except (Exception, pytest.skip.Exception, pytest.fail.Exception) as ending:  # noqa: BLE001 -- whatever a bad provider raises
        return ending
    return None


def endings(suite: ProviderConformance) -> dict[str, BaseException]:
    """The tests of the suite that did not pass."""
    ended = {name: ending_of(getattr(suite, name)) for name in EVERY_CHECK}
    return {name: ending for name, ending in ended.items() if ending is not None}


def caught_by(suite: ProviderConformance) -> list[str]:
    """The tests of the suite that fail."""
    return [name for name, ending in endings(suite).items() if not isinstance(ending, pytest.skip.Exception)]


@pytest.mark.parametrize(("misbehaves", "check"), ROWS, ids=[misbehaves.__name__ for misbehaves, _ in ROWS])
def test_each_fault_of_a_provider_fails_its_own_test_and_no_other(misbehaves: type[Well], check: str) -> None:
    suite = OfWell()
    suite.misbehaves = misbehaves
    assert caught_by(suite) == [check]


def test_every_test_of_the_conformance_suite_is_proven_to_fail() -> None:
    assert set(BAD) == set(EVERY_CHECK)


def test_a_provider_that_serves_no_profile_is_caught() -> None:
    suite = OfWell()
    suite.misbehaves = type("ServesNothing", (Well,), {"model_profiles": ()})
    with pytest.raises(AssertionError, match="a provider serves a profile"):
        suite.test_it_has_a_name_and_profiles()


def test_a_check_that_takes_too_long_fails() -> None:
    suite, ever = OfWell(), threading.Event()
    suite.misbehaves = type("ChecksLong", (Well,), {"check": lambda self: ever.wait(10) and Well.check(self)})
    suite.check_seconds = 0.05
    for check in (check for check in EVERY_CHECK if check.startswith("test_check")):
        with pytest.raises(pytest.fail.Exception, match=r"it went on for more than 0\.05 s"):
            getattr(suite, check)()
    ever.set()


def test_a_secret_that_no_environment_sets_is_not_taken_for_hidden() -> None:
    suite = OfWell()
    suite.good = {"WELL_URL": "http://good.test", "WELL_PIN": "short"}
    with pytest.raises(AssertionError, match="set WELL_PIN to 6 characters or more"):
        suite.test_secrets_do_not_show()


@pytest.mark.parametrize(
    ("left_out", "skipped"),
    [("unreachable", 2), ("hanging", 3), ("bad_input", 1), ("unsupported_input", 1)],
)
def test_tests_without_their_server_or_input_are_skipped_and_no_others(left_out: str, skipped: int) -> None:
    suite = OfWell()
    setattr(suite, left_out, None)
    assert [str(ending) for ending in endings(suite).values()] == [f"nothing is declared as {left_out}"] * skipped


def test_a_suite_without_other_inputs_still_runs_jobs_side_by_side() -> None:
    suite = OfWell()
    suite.other_inputs, suite.misbehaves = (), RunsAlone
    assert caught_by(suite) == ["test_runs_go_side_by_side_and_do_not_mix"]


def test_other_inputs_with_equal_results_are_rejected() -> None:
    suite = OfWell()
    suite.other_inputs = ("other", "other")
    with pytest.raises(AssertionError, match="need results that differ"):
        suite.test_runs_go_side_by_side_and_do_not_mix()


def test_a_silent_server_takes_a_connection_and_a_closed_port_does_not() -> None:
    with silent_server() as silent, closed_port() as closed:
        with socket.create_connection(address_of(silent), timeout=5) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
            connection.settimeout(0.05)
            with pytest.raises(TimeoutError):
                connection.recv(1)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address_of(closed), timeout=5)


def address_of(url: str) -> tuple[str, int]:
    host, port = url.removeprefix("http://").split(":")
    return host, int(port)
