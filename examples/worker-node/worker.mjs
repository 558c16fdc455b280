// A worker for AI Service in Node 18 or newer, without packages: the claim loop, and what makes it safe.
//
//   AI_SERVICE_URL=http://127.0.0.1:8080 AI_SERVICE_TOKEN=… MODEL_PROFILES=shout node worker.mjs
//
// Put your own work into `work`. Results are kept in memory only: one that the service has not yet taken is lost when this process is
// killed, and its job is run again. JSON.parse rounds integers beyond 2^53; where an input may hold such, read its text another way.
import { randomUUID } from "node:crypto";
import { hostname } from "node:os";
import { setTimeout as sleep } from "node:timers/promises";

const { AI_SERVICE_URL = "http://127.0.0.1:8080", AI_SERVICE_TOKEN = "", MODEL_PROFILES = "shout" } = process.env;
const { CONCURRENCY, LEASE_SECONDS, WAIT_SECONDS } = { CONCURRENCY: 4, LEASE_SECONDS: 60, WAIT_SECONDS: 10, ...process.env };
const headers = { "Content-Type": "application/json", ...(AI_SERVICE_TOKEN && { Authorization: `Bearer ${AI_SERVICE_TOKEN}` }) };
const worker_id = `${hostname()}-${process.pid}-${randomUUID().slice(0, 8)}`;
const running = new Set(); // { job, stop }: all that this process holds
let stopBy = Infinity; // from SIGTERM on: when to give up what the service does not answer

// The work itself: its value is the job's result. It ends soon after `signal` is aborted. An error says whether a later attempt may succeed.
async function work({ input }, signal) {
  if (typeof input?.text !== "string") throw Object.assign(new Error("input.text must be a text"), { category: "invalid_input", never: true });
  await sleep(input.milliseconds ?? 0, null, { signal });
  return { text: input.text.toUpperCase() };
}

// One call. An error with a status below 500 is final; any other means that the answer was lost, or that the service cannot work now.
async function post(path, body, seconds = 30) {
  const options = { method: "POST", headers, body: JSON.stringify(body), signal: AbortSignal.timeout(Math.ceil(seconds * 1000)) };
  const response = await fetch(`${AI_SERVICE_URL}/api/v1/jobs${path}`, options);
  const answer = await response.json();
  if (response.ok) return answer;
  throw Object.assign(new Error(`${response.status} ${answer.code} ${JSON.stringify(answer.errors ?? [])}`), { status: response.status });
}

// The same call until it is answered. That is safe: the service knows a repeat by its claim_id.
async function insist(path, body, seconds) {
  for (let pause = 100; ; pause = Math.min(2 * pause, 5000)) {
    try {
      return await post(path, body, seconds);
    } catch (error) {
      if (error.status < 500 || Date.now() > stopBy) throw error;
      await sleep(pause * (0.5 + Math.random() / 2));
    }
  }
}

async function claim(limit) {
  const wish = { worker_id, claim_id: randomUUID(), limit, model_profiles: MODEL_PROFILES.split(","), lease_seconds: Number(LEASE_SECONDS) };
  const { jobs } = await insist("/claim", { ...wish, wait_seconds: Number(WAIT_SECONDS) }, Number(WAIT_SECONDS) + 30);
  if (!jobs.length) await sleep(200); // a service that is about to stop answers at once
  return jobs;
}

async function run(job) {
  const one = { job, stop: new AbortController() };
  const { signal } = one.stop;
  running.add(one);
  if (stopBy < Infinity) one.stop.abort("draining");
  const report = (verb, body) => insist(`/${job.id}/${verb}`, { claim_id: job.claim_id, ...body }).then(() => verb);
  const ended = work(job, signal).then(
    (result) => report("complete", { result }).catch((error) => {
      if (![413, 422].includes(error.status)) throw error;
      return report("fail", { category: "invalid_output", message: error.message });
    }),
    (error) => {
      if (signal.reason === "draining") return report("release", {}); // the attempt does not count
      if (signal.aborted) return signal.reason; // cancelled, or no longer ours: there is nothing to say
      return report("fail", { category: error.category ?? "internal", message: String(error.message), retryable: !error.never });
    },
  );
  console.error(`job ${job.id} attempt ${job.attempt}: ${await ended.catch((error) => `could not be reported: ${error.message}`)}`);
  running.delete(one);
}

// Extends all leases in one call. This is also how a worker hears that a job was cancelled, or taken from it.
async function beat() {
  const held = [...running];
  const jobs = held.map(({ job }) => ({ id: job.id, claim_id: job.claim_id, lease_seconds: Number(LEASE_SECONDS) }));
  try {
    const answers = held.length ? (await post("/heartbeat", { jobs }, LEASE_SECONDS / 3)).jobs : [];
    answers.forEach(({ status, code }, at) => [404, 409].includes(status) && held[at].stop.abort(code));
  } catch (error) {
    console.error(`no heartbeat: ${error.message}`); // the next one repeats it
  }
}

const beats = setInterval(beat, Math.min(LEASE_SECONDS / 3, 30) * 1000);
process.once("SIGTERM", () => {
  stopBy = Date.now() + 5000;
  running.forEach(({ stop }) => stop.abort("draining")); // work of seconds would better be let finish
});
try {
  while (stopBy === Infinity) {
    const free = CONCURRENCY - running.size;
    (free > 0 ? await claim(free) : await sleep(50, [])).forEach(run);
  }
} catch (error) {
  console.error(`no claim: ${error.message}`);
  process.exitCode = error.status < 500 ? 1 : 0; // 1: a wrong token or setting, which waiting does not mend
  stopBy = Math.min(stopBy, Date.now() + 5000);
}
while (running.size) await sleep(20);
clearInterval(beats);
