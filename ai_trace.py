"""W3C trace context, level 2: a trace spans the caller, the queue, each attempt and the model server by one `traceparent` after the other.

A traceparent is `00-<trace id>-<span id>-<flags>`. The caller's is kept with its job. Each attempt is a span of its own under it, which the
model server is told of. `tracestate`, which only makers of tracing systems read, is not kept: the standard lets anybody drop it.
"""

import random
import re

# No version ff, and no id of zeros.
TRACEPARENT = "(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
_HEADER = re.compile(f"({TRACEPARENT})(-.*)?")
_KNOWN_FLAGS = 0x03  # sampled, and a random trace id


def read_traceparent(header: str | None) -> str | None:
    """A traceparent header as a job keeps it; None for one that the standard has one ignore."""
    match = _HEADER.fullmatch(header) if header else None
    # A later version may say more behind it; of any this much is known, and known as version 00.
    return f"00{match[1][2:]}" if match and not (match[2] and match[1].startswith("00")) else None


def child_of(traceparent: str | None) -> str | None:
    """A new span of the same trace below this one; None without a trace."""
    parent = read_traceparent(traceparent)
    if not parent:
        return None
    flags = int(parent[-2:], 16) & _KNOWN_FLAGS
    return f"{parent[:36]}{random.getrandbits(64) or 1:016x}-{flags:02x}"


def trace_id(traceparent: str | None) -> str | None:
    """The id of the trace, for the log."""
    parent = read_traceparent(traceparent)
    return parent and parent[3:35]


def span_id(traceparent: str | None) -> str | None:
    """The id of the span, for the log."""
    parent = read_traceparent(traceparent)
    return parent and parent[36:52]
