"""awa on the work of the benchmark: jobs of 1 KB in batches of 100, then one worker, 50 at a time, that does nothing with them.

Environment: PGHOST, PGUSER, PGDATABASE, JOBS. Prints {"create", "drain", "life"} in jobs per second.
"""

import asyncio
import json
import os
import time
from dataclasses import dataclass

import awa

JOBS = int(os.environ["JOBS"])
PAYLOAD = {"messages": [{"role": "user", "content": "x" * 950}]}
URL = f"postgres://{os.environ['PGUSER']}@localhost/{os.environ['PGDATABASE']}?host={os.environ['PGHOST']}"


@dataclass
class Nothing:
    """A job; awa names its kind after the class."""

    payload: dict


async def create(client: awa.AsyncClient) -> None:
    """All jobs, in batches of 100."""
    for _ in range(0, JOBS, 100):
        await client.insert_many_copy([Nothing(PAYLOAD)] * 100, queue="bench")


async def drain(client: awa.AsyncClient) -> None:
    """One worker until nothing is left."""
    left, done = JOBS, asyncio.Event()

    @client.task(Nothing, queue="bench")
    async def nothing(_job: object) -> None:
        nonlocal left
        left -= 1
        if not left:
            done.set()

    await client.start([("bench", 50)])
    await asyncio.wait_for(done.wait(), 600)


async def main() -> None:
    """Installs its tables, creates, drains, prints."""
    client = awa.AsyncClient(URL, max_connections=12)
    await client.migrate()
    begun = time.perf_counter()
    await create(client)
    created = time.perf_counter()
    await drain(client)
    drained = time.perf_counter()
    await client.shutdown()
    rates = {"create": created - begun, "drain": drained - created, "life": drained - begun}
    print(json.dumps({name: round(JOBS / seconds) for name, seconds in rates.items()}))


asyncio.run(main())
