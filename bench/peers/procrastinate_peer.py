"""Procrastinate on the work of the benchmark: jobs of 1 KB in batches of 100, then one worker, 20 at a time, that does nothing with them.

Environment: PGHOST, PGUSER, PGDATABASE, JOBS. Prints {"create", "drain", "life"} in jobs per second.
"""

import asyncio
import json
import os
import time

import procrastinate

JOBS = int(os.environ["JOBS"])
PAYLOAD = {"messages": [{"role": "user", "content": "x" * 950}]}
app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=""))


@app.task(queue="bench", name="nothing")
async def nothing(payload: dict) -> None:
    """Does nothing."""


async def main() -> None:
    async with app.open_async():
        await app.schema_manager.apply_schema_async()
        begun = time.perf_counter()
        for _ in range(0, JOBS, 100):
            await nothing.batch_defer_async(*[{"payload": PAYLOAD}] * 100)
        created = time.perf_counter()
        await app.run_worker_async(queues=["bench"], concurrency=20, wait=False, listen_notify=False)
        drained = time.perf_counter()
    rates = {"create": created - begun, "drain": drained - created, "life": drained - begun}
    print(json.dumps({name: round(JOBS / seconds) for name, seconds in rates.items()}))


asyncio.run(main())
