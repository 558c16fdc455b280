"""PgQueuer on the work of the benchmark: jobs of 1 KB in batches of 100, then one worker, 100 at a time, that does nothing with them.

Environment: PGHOST, PGUSER, PGDATABASE, JOBS. Prints {"create", "drain", "life"} in jobs per second.
"""

import asyncio
import json
import os
import time
from datetime import timedelta

import asyncpg
from pgqueuer import PgQueuer
from pgqueuer.db import AsyncpgPoolDriver
from pgqueuer.queries import Queries

JOBS = int(os.environ["JOBS"])
PAYLOAD = json.dumps({"messages": [{"role": "user", "content": "x" * 950}]}).encode()


async def create(queries: Queries) -> None:
    """All jobs, in batches of 100."""
    for _ in range(0, JOBS, 100):
        await queries.enqueue(["nothing"] * 100, [PAYLOAD] * 100, [0] * 100)


async def drain(driver: AsyncpgPoolDriver) -> None:
    """One worker until nothing is left."""
    queuer, left = PgQueuer(driver), JOBS

    @queuer.entrypoint("nothing")
    async def nothing(_job: object) -> None:
        nonlocal left
        left -= 1
        if not left:
            queuer.shutdown.set()

    await queuer.run(batch_size=100, dequeue_timeout=timedelta(seconds=1))


async def main() -> None:
    """Installs its tables, creates, drains, prints."""
    driver = AsyncpgPoolDriver(await asyncpg.create_pool(host=os.environ["PGHOST"], min_size=4, max_size=20))
    await Queries(driver).install()
    begun = time.perf_counter()
    await create(Queries(driver))
    created = time.perf_counter()
    await drain(driver)
    drained = time.perf_counter()
    rates = {"create": created - begun, "drain": drained - created, "life": drained - begun}
    print(json.dumps({name: round(JOBS / seconds) for name, seconds in rates.items()}))


asyncio.run(main())
