// graphile-worker on the work of the benchmark: jobs of 1 KB in batches of 100, then one worker that does nothing with them.
// Environment: PGHOST, PGUSER, PGDATABASE, JOBS. Prints {"create", "drain", "life"} in jobs per second.
import pg from 'pg';
import { Logger, makeWorkerUtils, run } from 'graphile-worker';

const jobs = Number(process.env.JOBS);
const payload = { messages: [{ role: 'user', content: 'x'.repeat(950) }] };
const silent = new Logger(() => () => {});
const pgPool = new pg.Pool({ max: 12 });
pgPool.on('error', () => {});

const utils = await makeWorkerUtils({ pgPool, logger: silent });
await utils.migrate();
const begun = performance.now();
for (let sent = 0; sent < jobs; sent += 100) await utils.addJobs(Array(100).fill({ identifier: 'nothing', payload }));
const created = performance.now();

let left = jobs;
const runner = await new Promise(async (resolve) => {
  const started = await run({
    pgPool, logger: silent, concurrency: 20, noHandleSignals: true, pollInterval: 50,
    preset: { worker: { localQueue: { size: 200 }, completeJobBatchDelay: 0, failJobBatchDelay: 0 } },
    taskList: { nothing: async () => { if (--left === 0) resolve(started); } },
  });
});
await runner.stop();
const drained = performance.now();
const rate = (from, to) => Math.round(jobs / (to - from) * 1000);
console.log(JSON.stringify({ create: rate(begun, created), drain: rate(created, drained), life: rate(begun, drained) }));
process.exit(0);
