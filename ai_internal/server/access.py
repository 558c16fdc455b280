"""Who may do what: tokens with a role, what each role may call, and how much of the queue it sees.

    API_TOKENS='telephony=caller:telephony=<secret>; gpu=worker:whisperx,vision=<secret>; desk=operator=<secret>'

An entry is `name=role=secret`; a caller names its owner_services behind a colon, a worker its model profiles where it may not claim any.
Entries are parted by semicolons or line ends; a line of a file that begins with # is a comment. They are read once, at the start.

Sections: tokens, reading them, the middleware.
"""

import hmac
import logging
import re
import secrets
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import attrs
import falcon

from ai_internal.server.requests import (
    ClaimRequest,
    Forbidden,
    JobFilter,
    JobNotFound,
    NewJob,
    NotFound,
    Unauthorized,
)
from providers.settings import is_profile_name

audit = logging.getLogger("ai_service.audit")
# Whatever LOG_LEVEL says: what operators did must be found.
audit.setLevel(logging.INFO)

Filter = TypeVar("Filter", bound=JobFilter)

# ── Tokens ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

Role = Literal["caller", "worker", "monitor", "operator"]
CALLER: Role = "caller"
WORKER: Role = "worker"
MONITOR: Role = "monitor"
OPERATOR: Role = "operator"
_ROLES: Mapping[str, Role] = {"caller": CALLER, "worker": WORKER, "monitor": MONITOR, "operator": OPERATOR}

SHORTEST_SECRET, LONGEST_SECRET = 16, 512
_SECRET = r"[A-Za-z0-9._~+/-]+=*"  # noqa: S105  the characters of RFC 6750
# Drawn by each process for itself: what it looks up is no function of the secret that anybody outside can compute, so how long the
# search in a dict takes says nothing about it; and a dump of the digests alone is no help in guessing.
_KEY = secrets.token_bytes(32)


def digest_of(secret: str) -> bytes:
    """What is kept of a token."""
    return hmac.digest(_KEY, secret.encode(), "sha256")


@attrs.frozen
class Token:
    """Who calls: a name for the log, a role, and what it is limited to; None is everything."""

    name: str
    role: Role
    owner_services: tuple[str, ...] | None = None
    model_profiles: tuple[str, ...] | None = None
    digest: bytes = attrs.field(default=b"", repr=False)

    def __str__(self) -> str:
        limits = self.owner_services or self.model_profiles
        return f"{self.name} ({self.role}{' of ' + ', '.join(limits) if limits else ''})"

    def owns(self, owner_service: str) -> bool:
        """Whether jobs of this owner exist for it."""
        return self.owner_services is None or owner_service in self.owner_services

    def assert_owns(self, owner_service: str | None) -> None:
        """Raises JobNotFound for a job of another owner, as for None, which is no job."""
        if owner_service is None or not self.owns(owner_service):
            raise JobNotFound

    def assert_may_create(self, jobs: Sequence[NewJob], at: str = "") -> None:
        """Raises Forbidden that names every job of another owner; `at` is the list they stand in."""
        foreign = [position for position, job in enumerate(jobs) if not self.owns(job.owner_service)]
        if foreign:
            message = "is none that this token may create jobs for"
            raise Forbidden(
                errors=[{"path": f"{at}/{position}/owner_service" if at else "/owner_service", "message": message} for position in foreign]
            )

    def limited_to_owners(self, wanted: Filter) -> Filter:
        """A filter that finds nothing of other owners."""
        if self.owner_services is None:
            return wanted
        return attrs.evolve(wanted, owner_service=_both(wanted.owner_service, self.owner_services))

    def limited_to_profiles(self, request: ClaimRequest) -> ClaimRequest:
        """A claim that takes no job of other profiles.

        Cut and not refused: a worker asks for a made-up profile to hear what a claim_id still holds, or to report while it takes nothing.
        """
        if self.model_profiles is None:
            return request
        return attrs.evolve(request, model_profiles=_both(request.model_profiles, self.model_profiles))


def _both(asked: Collection[str] | None, allowed: Sequence[str]) -> list[str]:
    return [name for name in allowed if asked is None or name in asked]


# Who calls where no tokens are configured.
ANYBODY = Token("open", OPERATOR)


# ── Reading them ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


class WrongTokens(ValueError):
    """Tokens that cannot be used: `problems` are sentences that show nothing of an entry, in which anything may be the secret."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)


def read_tokens(text: str) -> tuple[Token, ...]:
    """The tokens of API_TOKENS. Raises WrongTokens with everything that is wrong."""
    lines = (line for line in text.splitlines() if not line.lstrip().startswith("#"))
    entries = [entry.strip() for line in lines for entry in line.split(";") if entry.strip()]
    problems: list[str] = []
    tokens: list[Token] = []
    for number, entry in enumerate(entries, 1):
        try:
            tokens.append(_read_token(entry))
        except ValueError as error:
            problems.append(f"entry {number} {error}")
    problems += [] if entries else ["names no token"]
    if problems := problems or clashes(tokens):
        raise WrongTokens(problems)
    return tuple(tokens)


def read_token_file(path: str) -> tuple[Token, ...]:
    """The tokens of a file. Raises WrongTokens."""
    try:
        text = Path(path).read_text(encoding="ascii")
    except OSError as error:
        raise WrongTokens([f"the file cannot be read: {error.strerror}"]) from None
    except UnicodeDecodeError:
        raise WrongTokens(["the file holds other characters than ASCII"]) from None
    return read_tokens(text)


def clashes(tokens: Sequence[Token]) -> list[str]:
    """Which tokens have the name or the secret of an earlier one, as sentences."""
    names, digests = ([token.name for token in tokens], [token.digest for token in tokens])
    twice = [f"two tokens are called {name}" for name in dict.fromkeys(names) if names.count(name) > 1]
    same = {digest: [token.name for token in tokens if token.digest == digest] for digest in digests}
    return twice + [f"the tokens {' and '.join(shared)} have the same secret" for shared in same.values() if len(set(shared)) > 1]


def _read_token(entry: str) -> Token:
    """One entry. Raises ValueError with a sentence that follows `entry N`."""
    # From the left: a secret may end in equals signs, as base64 does.
    name, _, rest = entry.partition("=")
    kind, _, secret = rest.partition("=")
    role, colon, listed = kind.strip().partition(":")
    limits = tuple(dict.fromkeys(each.strip() for each in listed.split(","))) if colon else None
    problem = _problem(name.strip(), role, limits, secret.strip())
    if problem:
        raise ValueError(problem)
    return Token(
        name=name.strip(),
        role=_ROLES[role],
        owner_services=limits if role == CALLER else None,
        model_profiles=limits if role == WORKER else None,
        digest=digest_of(secret.strip()),
    )


def _problem(name: str, role: str, limits: Sequence[str] | None, secret: str) -> str | None:
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name):
        return "must be name=role=secret, the name of 1 to 64 letters, digits or . _ -"
    if (role, limits is None) not in {(CALLER, False), (WORKER, True), (WORKER, False), (MONITOR, True), (OPERATOR, True)}:
        return "must have one of the roles caller:OWNER_SERVICE,… worker worker:MODEL_PROFILE,… monitor operator"
    if not all(map(is_profile_name, limits or ())):
        return "names an owner_service or a model profile that is not 1 to 100 letters, digits or . _ : / @ + -"
    if not SHORTEST_SECRET <= len(secret) <= LONGEST_SECRET or not re.fullmatch(_SECRET, secret):
        return f"must have a secret of {SHORTEST_SECRET} to {LONGEST_SECRET} letters, digits or - . _ ~ + / with = at its end"
    return None


# ── The middleware ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────

API = re.compile(r"/+api(?:/|$)")
_BEARER = re.compile(rf"bearer +({_SECRET})", re.IGNORECASE)


class AccessMiddleware:
    """Falcon middleware: asks for a token, compares its role with the operation's, and logs what operators do.

    It comes before the query and the body are read. Without tokens every caller is an operator.
    """

    def __init__(self, tokens: Sequence[Token]) -> None:
        self._tokens = {token.digest: token for token in tokens}

    def process_resource(self, request: falcon.Request, _response: falcon.Response, resource: object, _params: Any) -> None:
        """Called by Falcon before each responder. Raises Unauthorized or Forbidden."""
        operations: Mapping[str, Any] = getattr(resource, "operations", {})
        operation = operations.get(request.method)
        if operation and not operation.roles:
            return
        token = request.context.token = self.admitted(request)
        # A method that the route does not have is refused to everybody alike.
        if operation and token.role not in operation.roles:
            raise Forbidden
        request.context.audited = operation is not None and operation.audited

    def admitted(self, request: falcon.Request) -> Token:
        """Whose token came with a request. Raises Unauthorized."""
        token = self._holder(request.get_header("Authorization"))
        if token is None:
            raise Unauthorized
        return token

    def admits(self, authorization: str | None) -> bool:
        """Whether who shows this, or nothing, may come in at all: before the body is there, the server asks."""
        return self._holder(authorization) is not None

    def _holder(self, authorization: str | None) -> Token | None:
        if not self._tokens:
            return ANYBODY
        shown = _BEARER.fullmatch(authorization or "")
        return self._tokens.get(digest_of(shown[1])) if shown else None

    def refuse_unknown(self, req: falcon.Request, resp: falcon.Response, **_groups: Any) -> None:
        """Answers for paths without a route: who has no token does not learn which there are."""
        self.admitted(req)
        raise NotFound

    def process_response(self, request: falcon.Request, response: falcon.Response, _resource: object, _succeeded: bool) -> None:  # noqa: FBT001
        """Called by Falcon after each responder: one line for what an operator changed, or tried to."""
        token = getattr(request.context, "token", None)
        if self._tokens and token and token.role == OPERATOR and request.context.audited:
            audit.info(
                "operator_action token=%s client=%s method=%s path=%r status=%d",
                token.name,
                request.remote_addr,
                request.method,
                request.path[:200],
                response.status_code,
            )
