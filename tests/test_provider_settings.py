"""Settings of providers: declared, read, and rejected with sentences that name the setting."""

from __future__ import annotations

import base64
import contextlib
import re

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_providers import SAMPLE, Sample

from providers import (
    NotConfigured,
    SettingsError,
    parse_duration,
    provider_settings,
    setting,
)
from providers.settings import (
    authorization,
    declared,
    duration,
    flag,
    header_word,
    pairs,
    profile_name,
    read_settings,
    web_address,
    whole,
)

# ---------------------------------------------------------------- declaration and reading


class TwoProblems(ValueError):
    problems = ("one thing is wrong", "so is another")


def raises_two(_text: str) -> None:
    raise TwoProblems


def test_settings_are_declared_in_their_order_with_all_that_a_table_needs() -> None:
    assert [one.name for one in declared(Sample)] == ["SAMPLE_URL", "SAMPLE_OWNER", "SAMPLE_PIN", "SAMPLE_WAIT", "SAMPLE_MOST"]
    url, owner, pin, wait, _ = declared(Sample)
    assert (wait.about, wait.default, wait.secret, wait.required) == ("how long it waits", "1m", False, None)
    assert (url.required, owner.required) == ("SAMPLE_URL is not set; look into the manual", "SAMPLE_OWNER is not set")
    assert (pin.secret, pin.default, pin.required) == (True, None, None)


def test_settings_are_read_and_defaults_go_through_the_same_reader() -> None:
    read = read_settings(Sample, {**SAMPLE, "SAMPLE_PIN": " 1234 ", "SAMPLE_MOST": "7", "OTHER": "x"}, mark="mine")
    assert (read.url.url, read.owner, read.pin, read.most, read.mark) == ("http://host", "me", "1234", 7, "mine")
    assert read._wait_seconds == 60


@pytest.mark.parametrize("blank", ["", " ", "\t\n"])
def test_a_blank_variable_counts_as_not_set(blank: str) -> None:
    read = read_settings(Sample, {**SAMPLE, "SAMPLE_MOST": blank, "SAMPLE_PIN": blank})
    assert (read.most, read.pin) == (4, None)
    with pytest.raises(NotConfigured):
        provider_settings(Sample, {**SAMPLE, "SAMPLE_URL": blank})


def test_settings_made_by_hand_have_the_same_defaults_and_need_what_is_required() -> None:
    made = Sample(url=web_address("http://host"), owner="me")
    assert made == read_settings(Sample, SAMPLE)
    with pytest.raises(TypeError, match="owner"):
        Sample(url=made.url)  # type: ignore[call-arg]


def test_no_setting_shows_in_repr_for_an_address_may_hold_a_password() -> None:
    shown = repr(read_settings(Sample, {**SAMPLE, "SAMPLE_PIN": "hidden-value", "SAMPLE_URL": "http://me:pass-word@host"}))
    assert "hidden-value" not in shown
    assert "pass-word" not in shown


def test_all_wrong_settings_are_reported_at_once_in_their_order() -> None:
    with pytest.raises(SettingsError) as wrong:
        read_settings(Sample, {"SAMPLE_URL": "host", "SAMPLE_PIN": "two words", "SAMPLE_WAIT": "1h", "SAMPLE_MOST": "11"})
    assert wrong.value.problems == (
        "SAMPLE_URL: must be an address that begins with http:// or https:// and names a host",
        "SAMPLE_OWNER is not set",
        "SAMPLE_PIN: must be printable ASCII without spaces",
        "SAMPLE_WAIT: must be from 1 to 600 seconds",
        "SAMPLE_MOST: must be a whole number from 1 to 10",
    )


def test_a_reader_may_report_several_problems() -> None:
    kind = attrs.make_class("Kind", {"both": setting("SAMPLE_BOTH", "two things", read=raises_two)})
    with pytest.raises(SettingsError) as wrong:
        read_settings(kind, {"SAMPLE_BOTH": "x"})
    assert wrong.value.problems == ("SAMPLE_BOTH: one thing is wrong", "SAMPLE_BOTH: so is another")


def test_a_missing_setting_is_not_configured_and_its_hint_is_reported() -> None:
    with pytest.raises(NotConfigured) as absent:
        provider_settings(Sample, {"SAMPLE_MOST": "wrong"})
    assert str(absent.value) == "SAMPLE_URL is not set; look into the manual; SAMPLE_OWNER is not set"


def test_a_wrong_setting_is_a_settings_error() -> None:
    with pytest.raises(SettingsError, match=r"^SAMPLE_MOST: must be"):
        provider_settings(Sample, {**SAMPLE, "SAMPLE_MOST": "wrong"})
    assert provider_settings(Sample, SAMPLE).most == 4


def test_contradicting_settings_are_reported_once_each_is_valid() -> None:
    at_odds = {**SAMPLE, "SAMPLE_OWNER": "nobody", "SAMPLE_PIN": "1234"}
    with pytest.raises(SettingsError) as wrong:
        read_settings(Sample, at_odds)
    assert wrong.value.problems == ("SAMPLE_OWNER is nobody, and SAMPLE_PIN is set", "nobody needs no pin")
    with pytest.raises(SettingsError, match=r"^SAMPLE_MOST: must be") as wrong:
        read_settings(Sample, {**at_odds, "SAMPLE_MOST": "0"})
    assert len(wrong.value.problems) == 1


def test_settings_errors_hold_every_problem() -> None:
    error = SettingsError(["A is wrong", "B is wrong"])
    assert (error.problems, str(error)) == (("A is wrong", "B is wrong"), "A is wrong; B is wrong")


@given(st.dictionaries(st.sampled_from([one.name for one in declared(Sample)]), st.text(max_size=20)))
def test_any_environment_is_read_or_rejected_with_the_name_of_the_setting(environ: dict[str, str]) -> None:
    problems: tuple[str, ...] = ()
    try:
        read_settings(Sample, environ)
    except SettingsError as wrong:
        problems = wrong.problems
    untold = [problem for problem in problems if not re.match(r"SAMPLE_[A-Z]+( |: )", problem)]
    assert untold in ([], ["nobody needs no pin"])
    assert problems or {"SAMPLE_URL", "SAMPLE_OWNER"} <= set(environ)


# ---------------------------------------------------------------- readers


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("5m", 300),
        ("90s", 90),
        ("1h30m", 5_400),
        ("2d", 172_800),
        ("1d2h3m4s", 93_784),
        ("30", 30),
        ("0.5", 0.5),
        ("1.5h", 5_400),
        (" 5m ", 300),
        ("0", 0),
    ],
)
def test_durations_are_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text",
    ["", " ", "m5", "5 m", "5M", "-5", "5m1h", "1h30", "1e3", "nan", "inf", "forever", "5ms", "٥m", "5m\n5m", "1_0", ".5", "9" * 400],
)
def test_text_that_is_no_duration_is_rejected(text: str) -> None:
    with pytest.raises(ValueError, match="duration"):
        parse_duration(text)


@given(st.integers(0, 999), st.integers(0, 99), st.integers(0, 99), st.integers(0, 99))
def test_durations_add_up(days: int, hours: int, minutes: int, seconds: int) -> None:
    assert parse_duration(f"{days}d{hours}h{minutes}m{seconds}s") == ((days * 24 + hours) * 60 + minutes) * 60 + seconds


@given(st.text(max_size=12))
def test_any_text_is_a_duration_or_a_value_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert parse_duration(text) >= 0


@pytest.mark.parametrize(("text", "fits"), [("1s", True), ("10m", True), ("0.999", False), ("601", False), ("0", False)])
def test_durations_have_bounds_that_belong_to_them(text: str, fits: bool) -> None:
    with contextlib.nullcontext() if fits else pytest.raises(ValueError, match="must be from 1 to 600 seconds"):
        assert duration(1, 600)(text) == parse_duration(text)


@pytest.mark.parametrize("text", ["0", "25h"])
def test_a_duration_is_positive_and_at_most_a_day_by_default(text: str) -> None:
    with pytest.raises(ValueError, match=r"must be from 0\.001 to 86400 seconds"):
        duration()(text)


@pytest.mark.parametrize("text", ["true", "TRUE", "1", "yes", "on", "On"])
def test_flags_that_are_set(text: str) -> None:
    assert flag(text) is True


@pytest.mark.parametrize("text", ["false", "False", "0", "no", "off"])
def test_flags_that_are_not_set(text: str) -> None:
    assert flag(text) is False


@pytest.mark.parametrize("text", ["perhaps", "2", "", "y", "none"])
def test_text_that_is_no_flag_is_rejected(text: str) -> None:
    with pytest.raises(ValueError, match="must be true or false"):
        flag(text)


@given(st.integers(0, 10**20), st.integers(0, 1000), st.integers(0, 1000))
def test_a_whole_number_is_read_within_its_bounds_and_rejected_outside(number: int, low: int, width: int) -> None:
    reader, high = whole(low, low + width), low + width
    with contextlib.nullcontext() if low <= number <= high else pytest.raises(ValueError, match=f"from {low} to {high}$"):
        assert reader(str(number)) == number


def test_a_whole_number_may_be_long() -> None:
    assert whole(0, 1 << 50)(str(1 << 50)) == 1 << 50
    assert whole(0, 1 << 50)("007") == 7


@pytest.mark.parametrize("text", ["", "-1", "+1", "1.0", "1e1", "0x1", "1_0", "١", "1 ", "1\n", "9" * 5_000])
def test_text_that_is_no_whole_number_is_rejected(text: str) -> None:
    with pytest.raises(ValueError, match="must be a whole number from 0 to 99"):
        whole(0, 99)(text)


@given(st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1))
def test_a_key_may_hold_all_that_a_header_can(text: str) -> None:
    assert header_word(text) == text


@pytest.mark.parametrize("text", ["", "two words", "line\nbreak", "line\n", "tab\t", "ключ", "nul\0"])
def test_a_key_that_no_header_can_hold_is_rejected_and_not_shown(text: str) -> None:
    with pytest.raises(ValueError, match=r"^must be printable ASCII without spaces$"):
        header_word(text)


@given(st.from_regex(r"[A-Za-z0-9._:/@+-]{1,100}", fullmatch=True))
def test_a_profile_name_is_what_the_service_takes(text: str) -> None:
    assert profile_name(text) == text


@pytest.mark.parametrize("text", ["", "two words", "a" * 101, "a,b", "a;b", "a=b", "профиль", "a\n"])
def test_text_that_is_no_profile_name_is_rejected(text: str) -> None:
    with pytest.raises(ValueError, match="must be 1 to 100 letters"):
        profile_name(text)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("", {}),
        ("a=1", {"a": "1"}),
        (" a = 1 , b=x=y,", {"a": "1", "b": "x=y"}),
        ("qwen/2.5:14b=http://host/v1", {"qwen/2.5:14b": "http://host/v1"}),
    ],
)
def test_pairs_are_read(text: str, read: dict[str, str]) -> None:
    assert pairs(text) == read


def test_pairs_may_be_separated_by_something_else() -> None:
    assert pairs("a=1,2; b=3", ";") == {"a": "1,2", "b": "3"}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a", "'a' is not of the form profile=value"),
        ("a=", "'a=' is not of the form"),
        ("=1", "must be 1 to 100 letters"),
        ("two words=1", "must be 1 to 100 letters"),
        ("a=1,a=2", "'a' is named twice"),
    ],
)
def test_text_that_is_no_list_of_pairs_is_rejected(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)):
        pairs(text)


NAMES = st.from_regex(r"[A-Za-z0-9._:/@+-]{1,20}", fullmatch=True)


@given(st.dictionaries(NAMES, st.from_regex(r"[a-z=/.]{1,20}", fullmatch=True), max_size=5))
def test_pairs_come_back_as_they_were_written(written: dict[str, str]) -> None:
    assert pairs(", ".join(f"{name}={value}" for name, value in written.items())) == written


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("http://host", "http://host"),
        ("https://host:8443/", "https://host:8443"),
        ("HTTP://Host/v1//", "http://host/v1"),
        ("http://me:pw@host/a/b", "http://me:pw@host/a/b"),
        ("http://[::1]:80/v1", "http://[::1]:80/v1"),
    ],
)
def test_addresses_are_read_without_a_closing_slash(text: str, read: str) -> None:
    assert web_address(text).url == read


@pytest.mark.parametrize(
    "text",
    ["host", "host:80", "/v1", "ftp://host", "http://", "http:///v1", "http://host:port", "http://host?a=1", "http://host/#a", "//h"],
)
def test_text_that_is_no_address_is_rejected(text: str) -> None:
    with pytest.raises(ValueError, match=r"^must "):
        web_address(text)


@given(st.text(max_size=20))
def test_any_text_is_an_address_or_rejected_without_being_shown(text: str) -> None:
    try:
        said = web_address(f"http://user:hidden-value@{text}")._replace(auth=None).url
    except ValueError as error:
        said = str(error)
    assert "hidden-value" not in said


def test_a_key_is_sent_as_a_bearer_token_and_user_info_as_basic_authentication() -> None:
    plain, with_user = web_address("http://host"), web_address("http://me:p%40ss@host")
    assert authorization(None, plain) is None
    assert authorization("", plain) is None
    assert authorization("key", plain) == authorization("key", with_user) == "Bearer key"
    assert authorization(None, with_user) == f"Basic {base64.b64encode(b'me:p@ss').decode()}"
