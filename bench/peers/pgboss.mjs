// pg-boss on the work of the benchmark: jobs of 1 KB in batches of 100, then taken and completed, 100 at a time, with a result of 2 KB.
// Environment: PGHOST, PGUSER, PGDATABASE, JOBS. Prints {"create", "drain", "life"} in jobs per second.
import { PgBoss } from 'pg-boss';

const { PGHOST: host, PGUSER: user, PGDATABASE: database, JOBS } = process.env;
const jobs = Number(JOBS);
const data = { messages: [{ role: 'user', content: 'x'.repeat(950) }] };
const result = { content: 'y'.repeat(1900) };
// Neither its upkeep nor its clock runs meanwhile: both would only take from it.
const boss = new PgBoss({ host, user, database, max: 12, supervise: false, schedule: false });
boss.on('error', (error) => { throw error; });
await boss.start();
await boss.createQueue('bench');

const begun = performance.now();
for (let sent = 0; sent < jobs; sent += 100) await boss.insert('bench', Array(100).fill({ data }));
const created = performance.now();
for (let done = 0; done < jobs;) {
  const taken = await boss.fetch('bench', { batchSize: 100 });
  if (!taken.length) throw new Error(`of ${jobs} jobs ${done} were there`);
  await boss.complete('bench', taken.map((job) => job.id), result);
  done += taken.length;
}
const drained = performance.now();
const rate = (from, to) => Math.round(jobs / (to - from) * 1000);
console.log(JSON.stringify({ create: rate(begun, created), drain: rate(created, drained), life: rate(begun, drained) }));
process.exit(0);
