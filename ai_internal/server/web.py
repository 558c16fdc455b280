"""What every route has in common: reading a request, rendering an answer or a refusal, and the middleware.

Sections: answers, routes, middleware.
"""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import falcon
import msgspec

from ai_internal.server.access import Token
from ai_internal.server.metrics import Metrics
from ai_internal.server.operations import OPERATIONS, Operation
from ai_internal.server.requests import (
    BodyTooLarge,
    Forbidden,
    MalformedRequest,
    MethodNotAllowed,
    NotFound,
    Refusal,
    ServiceFull,
    Unauthorized,
    UnsupportedMediaType,
    known_id,
    read_query,
)
from ai_internal.telemetry import log_crash

log = logging.getLogger("ai_service")

PROBLEM = "application/problem+json"

# ── Answers ──────────────────────────────────────────────────────────────────────────────────────


def problem(refusal: Refusal) -> dict[str, Any]:
    """A refusal as RFC 9457 problem details."""
    body = {
        "type": f"urn:ai-service:problem:{refusal.code}",
        "title": refusal.title(),
        "status": refusal.status,
        "detail": refusal.detail,
        "code": refusal.code,
        "retryable": refusal.retry_after is not None,
    }
    return body | ({"errors": refusal.errors} if refusal.errors else {})


def problem_of_server(status: int, reason: str) -> dict[str, Any]:
    """Problem details for what the server refuses before routing."""
    known: dict[int, Refusal] = {401: Unauthorized(), 413: BodyTooLarge(), 503: ServiceFull()}
    return problem(known.get(status) or MalformedRequest(reason)) | {"status": status}


def problem_of_item(refusal: Refusal) -> dict[str, Any]:
    """What an item of a bulk call answers when it was refused."""
    body = problem(refusal)
    return {name: body[name] for name in ("status", "code", "detail", "errors") if name in body}


def answer_refusal(_request: falcon.Request, response: falcon.Response, refusal: Refusal, _params: Any) -> None:
    """Renders a refusal."""
    response.status = falcon.code_to_http_status(refusal.status)
    response.content_type, response.context.code = PROBLEM, refusal.code
    response.data = msgspec.json.encode(problem(refusal))
    if refusal.retry_after:
        response.set_header("Retry-After", str(refusal.retry_after))
    if isinstance(refusal, Unauthorized):
        response.set_header("WWW-Authenticate", "Bearer")


def answer_falcon_error(request: falcon.Request, response: falcon.Response, error: falcon.HTTPError, params: Any) -> None:
    """What Falcon refuses before a responder runs."""
    kinds = (NotFound, MethodNotAllowed, BodyTooLarge, UnsupportedMediaType)
    known: Mapping[int, type[Refusal]] = {kind.status: kind for kind in kinds}
    if error.status_code == MalformedRequest.status:
        answer_refusal(request, response, MalformedRequest(error.description), params)
        return
    answer_refusal(request, response, known.get(error.status_code, Refusal)(), params)
    response.set_headers(error.headers or {})


def answer_crash(request: falcon.Request, response: falcon.Response, error: Exception, params: Any) -> None:
    """Our own mistake: the log has it, the caller does not."""
    log_crash(log, "request_failed method=%s path=%r", error, request.method, request.path)
    answer_refusal(request, response, Refusal(), params)


# ── Routes ───────────────────────────────────────────────────────────────────────────────────────


@attrs.define(eq=False)
class Call:
    """A request as its responder gets it: `body` and `query` are what the operation reads them as."""

    operation: Operation
    request: falcon.Request
    response: falcon.Response
    query: Any
    body: Any
    job_id: str = ""

    @property
    def token(self) -> Token:
        """Who calls; public operations have nobody to act for."""
        token: Token = self.request.context.token
        return token

    def answer(self, text: str | bytes, status: int = 200) -> None:
        """Sends a JSON text."""
        self.response.status = falcon.code_to_http_status(status)
        self.response.content_type = falcon.MEDIA_JSON
        self.response.data = text.encode() if isinstance(text, str) else text


class Route:
    """The operations of one path, as a resource of Falcon.

    A responder is the method of a surface that has the operation's name. It gets a `Call`.
    """

    def __init__(
        self,
        operations: Mapping[str, Operation],
        surfaces: Sequence[object],
        max_body_bytes: int,
        owner_of: Callable[[str], str | None],
    ) -> None:
        self.operations = operations
        self._max_body_bytes, self._owner_of = max_body_bytes, owner_of
        for method, operation in operations.items():
            responders = (getattr(surface, operation.responder, None) for surface in surfaces)
            [responder] = filter(None, responders)
            setattr(self, f"on_{method.lower()}", self._responding(operation, responder))

    def _responding(self, operation: Operation, responder: Callable[[Call], None]) -> Callable[..., None]:
        without_any = read_query({}, operation.query)

        def respond(request: falcon.Request, response: falcon.Response, job_id: str | None = None) -> None:
            query = read_query(request.params, operation.query) if request.params else without_any
            body = operation.request and operation.request.read(self._body(request))
            call = Call(operation, request, response, query, body)
            if job_id is not None:
                call.job_id = self._visible_id(call.token, job_id)
            responder(call)

        return respond

    def _body(self, request: falcon.Request) -> bytes:
        """The whole body. Raises BodyTooLarge or UnsupportedMediaType."""
        limit = self._max_body_bytes
        if (request.content_length or 0) > limit:
            raise BodyTooLarge
        media_type = (request.content_type or falcon.MEDIA_JSON).split(";")[0].strip().lower()
        body: bytes = request.bounded_stream.read(limit + 1)
        if len(body) > limit:
            raise BodyTooLarge
        is_json = media_type == falcon.MEDIA_JSON or re.fullmatch(r"application/[\w.+-]+\+json", media_type)
        if body and not is_json:
            raise UnsupportedMediaType
        return body

    def _visible_id(self, token: Token, job_id: str) -> str:
        """The id of a job that exists for who calls; its owner never changes. Raises JobNotFound."""
        job_id = known_id(job_id)
        if token.owner_services is not None:
            token.assert_owns(self._owner_of(job_id))
        return job_id


def add_routes(
    app: "falcon.App[Any, Any]",
    surfaces: Sequence[object],
    max_body_bytes: int,
    owner_of: Callable[[str], str | None],
) -> None:
    """Routes every operation to the one surface that has a method of its name."""
    paths: dict[str, dict[str, Operation]] = {}
    for (method, path), operation in OPERATIONS.items():
        paths.setdefault(path, {})[method] = operation
    for path, operations in paths.items():
        app.add_route(path, Route(operations, surfaces, max_body_bytes, owner_of))


# ── Middleware ───────────────────────────────────────────────────────────────────────────────────


class CountingMiddleware:
    """Counts what was answered, by route and status."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def process_response(self, request: falcon.Request, response: falcon.Response, _resource: Any, _succeeded: Any) -> None:
        """Called by Falcon after each responder, and after a refusal."""
        method = request.method if request.method in falcon.HTTP_METHODS else "other"
        status = str(response.status)[:3]
        self._metrics.count_request(method, request.uri_template or "", status)
        if response.content_type == PROBLEM:
            self._metrics.count_refusal(response.context.code)


class SameSiteMiddleware:
    """Refuses calls that a browser makes for a page of another site.

    They need no token where the service is open, and a browser lets any page send them.
    """

    def process_request(self, request: falcon.Request, _response: falcon.Response) -> None:
        """Called by Falcon before it looks for a route."""
        reads = request.method in ("GET", "HEAD", "OPTIONS")
        site = request.get_header("Sec-Fetch-Site")
        if not reads and site in ("cross-site", "same-site"):
            raise Forbidden("a page of another site may not call this")
