"""Settings as they are shown, and secrets redacted in every text."""

from __future__ import annotations

import base64
from collections.abc import Callable
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_providers import Sample

from providers import (
    redact,
    secrets_in,
)
from providers.settings import (
    SHORTEST_SECRET,
    declared,
    shown_settings,
)


def test_settings_are_shown_with_their_effective_values_and_without_secrets() -> None:
    assert shown_settings(Sample, {}) == {
        "SAMPLE_URL": "(not set)",
        "SAMPLE_OWNER": "(not set)",
        "SAMPLE_PIN": "(not set)",
        "SAMPLE_WAIT": "1m (default)",
        "SAMPLE_MOST": "4 (default)",
    }
    environ = {
        "SAMPLE_URL": "http://me:hidden-value@host",
        "SAMPLE_OWNER": "me with 0000-0000",
        "SAMPLE_PIN": "0000-0000",
        "SAMPLE_WAIT": " 90s ",
        "SAMPLE_MOST": "not a number",
        "OTHER_KEY": "90s",
    }
    assert shown_settings(Sample, environ) == {
        "SAMPLE_URL": "http://host",
        "SAMPLE_OWNER": "me with [secret]",
        "SAMPLE_PIN": "(set)",
        "SAMPLE_WAIT": "90s",
        "SAMPLE_MOST": "not a number",
    }


def test_a_secret_is_shown_as_set_however_short_it_is() -> None:
    assert shown_settings(Sample, {"SAMPLE_PIN": "1"})["SAMPLE_PIN"] == "(set)"


def test_secrets_are_known_by_the_names_of_their_settings() -> None:
    environ = {"LLM_API_KEY": "long-secret", "a_token": "other-secret", "DB_PASSWORD": "short", "LLM_MODEL": "qwen2.5-14b", "X_SECRET": ""}
    assert {"other-secret", "long-secret"} <= set(secrets_in(environ))
    assert not [form for form in secrets_in(environ) if "qwen" in form or form == "short"]


def test_a_declared_secret_is_known_whatever_its_name() -> None:
    environ = {"SAMPLE_PIN": "0000-0000", "SAMPLE_OWNER": "somebody"}
    assert "0000-0000" not in secrets_in(environ)
    assert "0000-0000" in secrets_in(environ, declared(Sample))
    assert "somebody" not in secrets_in(environ, declared(Sample))


FORMS: list[tuple[str, Callable[[str], str]]] = [
    ("as it is", str),
    ("percent-encoded", lambda secret: quote(secret, safe="")),
    ("in base64", lambda secret: base64.b64encode(secret.encode()).decode()),
]


@pytest.mark.parametrize("form", [form for _, form in FORMS], ids=[name for name, _ in FORMS])
@pytest.mark.parametrize("secret", ["hidden-value", "sl/ash+plus=", "p@ss:wörd"])
def test_a_secret_is_taken_out_in_every_form(secret: str, form: Callable[[str], str]) -> None:
    found = secrets_in({"SAMPLE_PIN": secret}, declared(Sample))
    assert redact(f"refused <{form(secret)}>", found) == "refused <[secret]>"


USER_INFO: list[tuple[str, str]] = [
    ("the password", "p@ss:word"),
    ("the password as in the URL", "p%40ss:word"),
    ("both as in the URL", "me:p%40ss:word"),
    ("as basic authentication sends it", base64.b64encode(b"me:p@ss:word").decode()),
    ("the password in base64", base64.b64encode(b"p@ss:word").decode()),
]


@pytest.mark.parametrize("form", [form for _, form in USER_INFO], ids=[name for name, _ in USER_INFO])
def test_the_password_in_an_address_is_taken_out_in_every_form(form: str) -> None:
    found = secrets_in({"SAMPLE_URL": "http://me:p%40ss:word@host/v1"})
    assert redact(f"refused <{form}>", found) == "refused <[secret]>"


def test_secrets_come_longest_first_so_that_none_hides_in_another() -> None:
    found = secrets_in({"A_KEY": "abcdef", "B_KEY": "abcdef-and-more"})
    assert [len(form) for form in found] == sorted(map(len, found), reverse=True)
    assert redact("abcdef-and-more, abcdef", found) == "[secret], [secret]"


def test_a_value_too_short_for_a_secret_is_not_redacted() -> None:
    assert all(len(form) >= SHORTEST_SECRET for form in secrets_in({"A_KEY": "a", "SAMPLE_URL": "http://a:b@host"}))
    assert redact("a cat", secrets_in({"A_KEY": "cat"})) == "a cat"


@given(st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8")), st.from_regex(r"[A-Z0-9+/%:@=]{6,20}", fullmatch=True))
def test_no_secret_is_left_in_any_text(before: str, after: str, secret: str) -> None:
    found = secrets_in({"SAMPLE_PIN": secret}, declared(Sample))
    for _, form in FORMS:
        assert secret not in redact(f"{before}{form(secret)}{after}", found)


@given(st.dictionaries(st.sampled_from(["A_KEY", "SAMPLE_URL", "SAMPLE_PIN"]), st.text(max_size=30)))
def test_any_environment_has_secrets_that_can_be_taken_out(environ: dict[str, str]) -> None:
    found = secrets_in(environ, declared(Sample))
    assert all(form and form in f"<{form}>" for form in found)
    assert redact("a text", ()) == "a text"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:pw@host/v1", "http://host/v1"),
        ("see postgres://me:p@ss@host:5/x and https://k@h", "see postgres://host:5/x and https://h"),
        ("mail me@host", "mail me@host"),
        ("key abc-secret, abc-secret-long", "key [secret], [secret]"),
    ],
)
def test_redacted_text_has_no_secrets_and_no_user_info(text: str, shown: str) -> None:
    assert redact(text, ("abc-secret-long", "abc-secret")) == shown
