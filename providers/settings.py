"""Settings from the environment: declared once as the fields of an attrs class, then read, listed and kept out of sight by that.

    @attrs.frozen(kw_only=True)
    class EchoSettings:
        url: Url = setting("ECHO_URL", "where the echo server is", read=web_address, required=True)
        key: str | None = setting("ECHO_KEY", "its key", read=header_word, secret=True)
        timeout_seconds: float = setting("ECHO_TIMEOUT", "limit of one attempt", default="30s", read=duration())

A provider names the class in a member `settings` and reads it with `provider_settings(EchoSettings, environ)`. Service and worker read
their own with `read_settings`, so that one wrong setting reads like another.

Sections: declaration, reading, readers, what is shown.
"""

import base64
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import quote, unquote

import attrs
from urllib3.exceptions import LocationParseError
from urllib3.util import Url, parse_url

__all__ = [
    "DAY_SECONDS",
    "NotConfigured",
    "Setting",
    "SettingsError",
    "authorization",
    "declared",
    "duration",
    "flag",
    "header_word",
    "is_profile_name",
    "pairs",
    "parse_duration",
    "profile_name",
    "provider_settings",
    "read_settings",
    "redact",
    "secrets_in",
    "setting",
    "shown_settings",
    "web_address",
    "whole",
]

T = TypeVar("T")


# ---------------------------------------------------------------- declaration


@attrs.frozen(kw_only=True)
class Setting:
    """One variable of the environment: what it is called, what it does, and what counts where it is not set."""

    name: str
    about: str
    """What it does, in a few words for a table."""
    default: str | None = None
    """As it would be written in the environment; None = nothing."""
    read: Callable[[str], Any] = attrs.field(default=str, repr=False)
    """Text → value. Raises `ValueError` with a sentence that follows `NAME: ` and does not repeat a secret."""
    secret: bool = False
    """Whether its value must never be shown."""
    required: str | None = None
    """What to tell somebody who has not set it; None = it may be absent."""


def setting(
    name: str,
    about: str,
    *,
    default: str | None = None,
    read: Callable[[str], Any] = str,
    secret: bool = False,
    required: bool | str = False,
) -> Any:
    """A field of a settings class (`kw_only`). `required` may be a hint that follows `NAME is not set`. None shows in `repr`: a URL may
    hold a password as well."""
    missing = f"{name} is not set{f'; {required}' if isinstance(required, str) else ''}" if required else None
    one = Setting(name=name, about=about, default=default, read=read, secret=secret, required=missing)
    default_value = attrs.NOTHING if required else None if default is None else attrs.Factory(lambda: read(default))
    return attrs.field(default=default_value, repr=False, metadata={"setting": one})


def declared(kind: type) -> tuple[Setting, ...]:
    """The settings that a class declares, in its order."""
    return tuple(field.metadata["setting"] for field in attrs.fields(kind) if "setting" in field.metadata)


# ---------------------------------------------------------------- reading


class NotConfigured(Exception):
    """Raised by an entry point whose settings are absent; the argument says which, as a sentence."""


class SettingsError(Exception):
    """Settings that cannot be used: all the problems at once, a plain sentence each, without secret values."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)


def provider_settings(kind: type[T], environ: Mapping[str, str]) -> T:
    """A provider's settings. Raises `NotConfigured` when a required one is absent, else `SettingsError` with all that is wrong."""
    absent = [one.required for one in declared(kind) if one.required and not _text(one, environ)]
    if absent:
        raise NotConfigured("; ".join(absent))
    return read_settings(kind, environ)


def read_settings(kind: type[T], environ: Mapping[str, str], /, **others: Any) -> T:
    """An object of the settings class; an empty variable counts as not set. `others` are fields that are no settings.

    Raises `SettingsError` with all problems at once: those of the fields, then those the class finds itself in a method `problems()`.
    """
    values: dict[str, Any] = dict(others)
    problems: list[str] = []
    for field in attrs.fields(kind):  # type: ignore[arg-type]
        if "setting" in field.metadata:
            values[field.alias or field.name] = _value(field.metadata["setting"], environ, problems)
    if problems:
        # A sentence quotes what it is about, and an address with a password may stand where a duration should.
        secrets = secrets_in(environ, declared(kind))
        raise SettingsError([redact(problem, secrets) for problem in problems])
    settings = kind(**values)
    if problems := list(getattr(settings, "problems", list)()):
        raise SettingsError(problems)
    return settings


def _value(one: Setting, environ: Mapping[str, str], problems: list[str]) -> Any:
    text = _text(one, environ) or one.default
    if text is None:
        problems += [one.required] if one.required else []
        return None
    try:
        return one.read(text)
    except ValueError as error:
        # A reader of something bigger, such as a URL with options, may have several sentences to say.
        problems += [f"{one.name}: {problem}" for problem in getattr(error, "problems", (error,))]
        return None


def _text(one: Setting, environ: Mapping[str, str]) -> str:
    return environ.get(one.name, "").strip()


# ---------------------------------------------------------------- readers

_NUMBER = r"[0-9]+(?:\.[0-9]+)?"
_SECONDS = re.compile(_NUMBER)
_UNITS = re.compile(rf"(?=.)(?:({_NUMBER})d)?(?:({_NUMBER})h)?(?:({_NUMBER})m)?(?:({_NUMBER})s)?")
DAY_SECONDS = 86_400
_UNIT_SECONDS = (DAY_SECONDS, 3_600, 60, 1)
_FLAGS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


def flag(text: str) -> bool:
    """`true` or `false`, also as 1, yes, on, 0, no, off."""
    if text.lower() not in _FLAGS:
        raise ValueError("must be true or false")
    return _FLAGS[text.lower()]


def whole(low: int, high: int) -> Callable[[str], int]:
    """A reader of whole numbers within these bounds."""

    def read(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,18}", text) or not low <= int(text) <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return int(text)

    return read


def duration(low: float = 0.001, high: float = DAY_SECONDS) -> Callable[[str], float]:
    """A reader of durations within these bounds, in seconds."""

    def read(text: str) -> float:
        seconds = parse_duration(text)
        if not low <= seconds <= high:
            raise ValueError(f"must be from {low:g} to {high:g} seconds")
        return seconds

    return read


def parse_duration(text: str) -> float:
    """The seconds of `5m`, `90s`, `1h30m`, `2d`, or of a plain number of seconds. Raises `ValueError` with a sentence that says so."""
    written = text.strip()
    units = _UNITS.fullmatch(written)
    if _SECONDS.fullmatch(written):
        seconds = float(written)
    elif units:
        seconds = sum(float(number) * unit for number, unit in zip(units.groups(), _UNIT_SECONDS, strict=True) if number)
    else:
        raise ValueError(f"{text!r} is no duration: write it like 5m, 90s or 1h30m, or as a number of seconds")
    if not math.isfinite(seconds):
        raise ValueError("the duration is longer than a number can hold")
    return seconds


def header_word(text: str) -> str:
    """A key or token as it can stand in an HTTP header."""
    if not re.fullmatch(r"[\x21-\x7e]+", text):
        raise ValueError("must be printable ASCII without spaces")
    return text


def is_profile_name(text: str) -> bool:
    """Whether a model profile can be called so."""
    return re.fullmatch(r"[A-Za-z0-9._:/@+-]{1,100}", text) is not None


def profile_name(text: str) -> str:
    """A name that can be a model profile."""
    if not is_profile_name(text):
        raise ValueError("must be 1 to 100 letters, digits or . _ : / @ + -, because it is a model profile too")
    return text


def pairs(text: str, separator: str = ",") -> dict[str, str]:
    """`profile=value, profile=value`: what stands for each profile."""
    found: dict[str, str] = {}
    for item in filter(None, map(str.strip, text.split(separator))):
        name, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not value:
            raise ValueError(f"{item!r} is not of the form profile=value")
        if profile_name(name) in found:
            raise ValueError(f"{name!r} is named twice")
        found[name] = value
    return found


def web_address(text: str) -> Url:
    """An http(s) URL without a closing slash. Messages leave the text out: it may hold a password."""
    try:
        url = parse_url(text)
    except LocationParseError:
        url = Url()
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError("must be an address that begins with http:// or https:// and names a host")
    if url.query or url.fragment:
        raise ValueError("must have neither ? nor #")
    return url._replace(path=(url.path or "").rstrip("/"))


def authorization(key: str | None, url: Url) -> str | None:
    """The Authorization header for a key, or else for the user info of the URL; None for neither."""
    if key:
        return f"Bearer {key}"
    return f"Basic {base64.b64encode(unquote(url.auth).encode()).decode()}" if url.auth else None


# ---------------------------------------------------------------- what is shown

_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
_USER_INFO = re.compile(r"(?<=://)[^/\s]*@")
SHORTEST_SECRET = 6
"""Shorter values are not taken out of texts: doing so would mostly hit words that are no secret."""


def shown_settings(kind: type, environ: Mapping[str, str]) -> dict[str, str]:
    """What each declared setting stands at, as text for an operator: secrets only as `(set)`, absent ones as `(not set)`."""
    secrets = secrets_in(environ, declared(kind))
    return {one.name: _shown(one, environ, secrets) for one in declared(kind)}


def _shown(one: Setting, environ: Mapping[str, str], secrets: Iterable[str]) -> str:
    text = _text(one, environ)
    if one.secret and text:
        return "(set)"
    return redact(text, secrets) if text else "(not set)" if one.default is None else f"{one.default} (default)"


def secrets_in(environ: Mapping[str, str], settings: Iterable[Setting] = ()) -> tuple[str, ...]:
    """The secret values of an environment in every form they may be met, longest first.

    Secret are the values of these settings that say so, of all variables whose names do (`…KEY`, `…TOKEN`, `…PASSWORD`…; but no numbers, as
    in MAX_TOKENS), and the passwords in URLs. The forms are the text itself, percent-encoded, as in JSON, and in base64 as basic
    authentication sends it.
    """
    secret_names = {one.name for one in settings if one.secret}
    values = {
        value.strip()
        for name, value in environ.items()
        if name in secret_names or (_SECRET_NAME.search(name) and not value.strip().isdigit())
    }
    forms = {form for value in values for form in _encodings(value)}
    forms |= {form for value in environ.values() for info in _USER_INFO.findall(value) for form in _user_info_encodings(info[:-1])}
    return tuple(sorted((form for form in forms if len(form) >= SHORTEST_SECRET), key=lambda form: (-len(form), form)))


def _encodings(secret: str) -> Iterator[str]:
    encoded = secret.encode(errors="replace")
    yield from (secret, quote(encoded, safe=""), json.dumps(secret)[1:-1], base64.b64encode(encoded).decode())


def _user_info_encodings(info: str) -> Iterator[str]:
    yield from (info, base64.b64encode(unquote(info).encode(errors="replace")).decode())
    password = info.partition(":")[2]
    yield from _encodings(unquote(password))
    yield password


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """The text without these secrets, without user info in any URL, and as any JSON reader takes it: no half surrogates, no NUL."""
    text = text.encode("utf-8", "replace").decode().replace("\0", "")
    for secret in secrets:
        text = text.replace(secret, "[secret]")
    return _USER_INFO.sub("", text)
