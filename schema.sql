-- AI Service: everything it keeps in PostgreSQL 13 to 18, in one schema of its own.
--
-- A job's state is the one table it stands in; every move is a delete from one and an insert into the next, in one transaction.
--
--   create ──► ready ──claim──► held ──complete, fail, cancel──► ended
--       │       ▲  ▲             │                                 │
--       └► waiting  └─ release, fail with attempts left, lease ran out (through waiting where there is a delay)
--               ▲──────────────────────── retry ───────────────────┘
--
--   lane            what a claim can tell apart: owner, task type, profile, priority; first in, first out inside a lane
--   job             the facts of a job and its input, written once; partitioned by id, which is time
--   ready           pending, can be claimed now; ordered by seq, handed out when a job becomes ready
--   waiting         pending, scheduled or waiting for a retry; moves to ready when run_at has passed
--   held            running: which claim holds the job, and until when
--   ended           completed, failed, cancelled, with the result; partitioned like job
--   attempt_ended   attempts that did not complete: the error history, and the memory that repeats of a call need; partitioned like job
--   idempotency     owner and key → job
--   claim           which jobs a claim took, so that it can be repeated; partitioned by day
--   pause           what is not handed out
--   lane_count      jobs per lane and state, folded from tally
--   tally           insert-only ledger of moves, folded every few seconds
--   history         endings per five minutes, hour and six hours, durations per quarter of an hour, folded from tally
--   worker          who claimed lately, and what it said of itself
--   upkeep_state    when the ledger was folded last
--   schema_version  which of these files was applied
--
-- What is found by a list is asked for by `= any (array[one of it])`, which no order of an index serves: where a table was empty when it was
-- analysed, a plan with `=` may begin with its rows instead of the list, and would step over all that is dead while somebody holds a snapshot.
--
-- Each function that a statement calls carries the version of its signature. In the order of a
-- job's life: create_jobs, claim_jobs, claimed_texts, peek, heartbeat_jobs, complete_jobs,
-- fail_jobs, release_jobs, retry_jobs, cancel_job, delete_job, job_texts, pause_jobs, resume_jobs,
-- stats, upkeep, fold, add_partitions, retire_partition, clear_retired.
--
-- This file creates version 6, the first one, and then what came later. To make the next version while processes of the
-- previous release keep running:
--   - Raise SCHEMA_VERSION by one. On a database with an older version this whole file then runs
--     again, in one transaction.
--   - Leave the block of tables as it is. Put what changes them into a block of its own behind it:
--       do $v8$ begin
--       if to_regclass('what it makes') is not null then return; end if;
--       alter table job add column …;
--       end $v8$;
--     Only add: the previous release works on the same tables, and its inserts do not name a new
--     column. An `alter table` waits at most 5 seconds for other transactions on its table; if they
--     take longer, the whole file is tried again later.
--   - A function whose arguments or result change becomes _v2, and _v1 stays for the previous
--     release. A body that changes under the same name must serve both. What no supported release
--     calls any more is dropped with `drop function if exists`.
--   - tests/test_upgrade.py then runs the previous release and this one on one database.
--
-- Advisory locks: 1 claims, one at a time; 2 lanes, shared by whoever queues a job, alone by pause and idling; 3 upkeep, only tried;
-- 4 new lanes, after 2; 5 partitions, only tried. Rows of held are locked in the order of job_id and before lock 2, rows of idempotency in the order of their key.

-- Made once: applying this file again locks no table.
do $tables$ begin
if to_regclass('schema_version') is not null then return; end if;

create table schema_version (
  version int primary key,
  applied_at timestamptz not null default now()
);

create table lane (
  id int generated always as identity constraint lane_is_found_by_id primary key,
  owner_service text not null,
  task_type text not null,
  model_profile text not null,
  priority smallint not null constraint priority_is_within_ten check (priority between -10 and 10),
  paused boolean not null default false,
  idle boolean not null default false,
  constraint lane_is_unique unique (owner_service, task_type, model_profile, priority)
);

create table job (
  id uuid not null,
  lane_id int not null,
  owner_ref text not null,
  idempotency_key text,
  traceparent text,
  created_at timestamptz not null,
  run_at timestamptz not null,
  expires_at timestamptz,
  max_attempts smallint not null constraint max_attempts_is_positive check (max_attempts > 0),
  input_bytes int not null,
  input json not null,
  constraint job_is_found_by_id primary key (id)
) partition by range (id);
create table job_default partition of job default;
create index job_by_lane on job (lane_id, id);
create index job_by_owner_ref on job (owner_ref, id);

create sequence readiness;

create table ready (
  lane_id int not null,
  seq bigint not null default nextval('readiness'),
  job_id uuid not null,
  run_at timestamptz not null,
  expires_at timestamptz,
  attempt smallint not null,
  releases smallint not null,
  lapsed_claim_id uuid,
  input_bytes int not null,
  constraint ready_is_found_by_lane_in_order primary key (lane_id, seq)
) with (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 2000);
create unique index ready_by_job on ready (job_id);
create index ready_by_expiry on ready (expires_at) where expires_at is not null;

create table waiting (
  job_id uuid constraint waiting_is_found_by_job primary key,
  lane_id int not null,
  run_at timestamptz not null,
  expires_at timestamptz,
  attempt smallint not null,
  releases smallint not null,
  lapsed_claim_id uuid,
  input_bytes int not null
) with (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 2000);
create index waiting_by_run_at on waiting (run_at);
create index waiting_by_expiry on waiting (expires_at) where expires_at is not null;

-- The lease is not indexed and pages keep room: a heartbeat is a HOT update.
create table held (
  job_id uuid constraint held_is_found_by_job primary key,
  lane_id int not null,
  claim_id uuid not null,
  worker_id text not null,
  attempt smallint not null,
  releases smallint not null,
  run_at timestamptz not null,
  started_at timestamptz not null,
  lease_seconds float8 not null,
  lease_expires_at timestamptz not null,
  progress json
) with (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 2000);

create table ended (
  job_id uuid not null,
  status text not null constraint ending_is_known check (status in ('completed', 'failed', 'cancelled')),
  attempt smallint not null,
  claim_id uuid,
  worker_id text,
  run_at timestamptz,
  started_at timestamptz,
  finished_at timestamptz not null,
  error_category text,
  error_message text,
  progress json,
  usage json,
  result json,
  constraint ended_is_found_by_job primary key (job_id)
) partition by range (job_id);
create table ended_default partition of ended default;
create index ended_without_result on ended (status, job_id) where status <> 'completed';

create table attempt_ended (
  job_id uuid not null,
  claim_id uuid not null,
  how text not null constraint attempt_end_is_known check (how in ('fail', 'release', 'lapse', 'cancel', 'retry')),
  attempt smallint not null,
  started_at timestamptz,
  worker_id text not null,
  category text not null,
  message text not null,
  usage json,
  at timestamptz not null,
  constraint attempt_ended_is_found_by_job_and_claim primary key (job_id, claim_id)
) partition by range (job_id);
create table attempt_ended_default partition of attempt_ended default;

create table idempotency (
  owner_service text not null,
  key text not null,
  job_id uuid not null,
  constraint key_is_unique_within_its_owner primary key (owner_service, key)
);

create table claim (
  claim_id uuid not null,
  worker_id text not null,
  made_at timestamptz not null,
  job_ids uuid[] not null
) partition by range (made_at);
create table claim_default partition of claim default;
create index claim_by_id on claim (claim_id);

create table pause (
  owner_service text,
  task_type text,
  model_profile text,
  paused_at timestamptz not null default now(),
  constraint pause_names_something check (coalesce(owner_service, task_type, model_profile) is not null)
);

create table lane_count (
  lane_id int constraint lane_count_is_found_by_lane primary key,
  ready bigint not null default 0,
  scheduled bigint not null default 0,
  running bigint not null default 0,
  moved_at timestamptz not null,
  last_claimed_at timestamptz
) with (fillfactor = 50);

create table tally (
  at timestamptz not null default now(),
  lane_id int not null,
  event text not null,
  n int not null,
  ready int not null default 0,
  scheduled int not null default 0,
  running int not null default 0,
  category text,
  seconds_bucket smallint,
  prompt_tokens numeric,
  completion_tokens numeric,
  total_tokens numeric,
  audio_seconds float8
) with (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 2000);
create index tally_by_time on tally (at);

create table history (
  span_seconds int not null,
  start_at timestamptz not null,
  owner_service text not null,
  task_type text not null,
  model_profile text not null,
  event text not null,
  category text not null,
  seconds_bucket smallint not null,
  n bigint not null,
  last_at timestamptz not null,
  prompt_tokens numeric,
  completion_tokens numeric,
  total_tokens numeric,
  audio_seconds float8,
  constraint history_is_found_by_span
    primary key (span_seconds, start_at, owner_service, task_type, model_profile, event, category, seconds_bucket)
) with (fillfactor = 70);

create table worker (
  worker_id text constraint worker_is_found_by_id primary key,
  seen_at timestamptz not null,
  report json
) with (fillfactor = 50);

create table upkeep_state (
  only_row boolean primary key default true constraint there_is_one_row check (only_row),
  folded_at timestamptz not null,
  retiring_after uuid
);
insert into upkeep_state (folded_at) values (now());

end $tables$;

-- Labels. The index holds jobs that have any.
do $v7$ begin
if to_regclass('job_by_label') is not null then return; end if;
alter table job add column labels jsonb;
create index job_by_label on job using gin (labels jsonb_path_ops) where labels is not null;
end $v7$;


-- ── Words that the functions share ──────────────────────────────────────────────────────────────────────────────────────────────────

-- Advisory locks are the database's, not the schema's: the lane table's oid keeps two schemas apart.
create or replace function lock_key(n int) returns bigint language sql stable as $$
  select 'lane'::regclass::oid::bigint * 8 + n
$$;

create or replace function rfc3339(at timestamptz) returns text language sql stable as $$
  select to_char(at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')
$$;

-- RFC 9562 version 7: 48 bits of milliseconds, 12 bits of the fraction below (method 3), 62 bits of a hash of the microseconds and something
-- random: builds of PostgreSQL without OpenSSL take 4 µs for a random UUID, so that it is made once for many. uuidv7() exists from 18 on.
-- Without a FROM it becomes a part of the statement that calls it.
create or replace function uuid_v7_at(us bigint, seed uuid) returns uuid language sql immutable as $$
  select encode(int8send((us / 1000 << 16) | 28672 | (us % 1000 * 4096 / 1000))
    || int8send((uuid_hash_extended(seed, us) & 4611686018427387903) | (1::bigint << 63)), 'hex')::uuid
$$;

create or replace function uuid_v7(at timestamptz) returns uuid language sql volatile as $$
  select uuid_v7_at((extract(epoch from at) * 1000000)::bigint, gen_random_uuid())
$$;

-- The lowest id that a job created at that time can have: a border between partitions.
create or replace function uuid_v7_floor(at timestamptz) returns uuid language sql immutable as $$
  select (encode(int8send((extract(epoch from at) * 1000)::bigint << 16), 'hex') || '0000000000000000')::uuid
$$;

-- Durations are counted in buckets 1.2 times as wide as the one before, from a millisecond up: a middle is within 10 % of what it stands for.
create or replace function seconds_bucket(duration interval) returns smallint language sql immutable as $$
  select floor(ln(greatest(extract(epoch from duration)::float8 * 1000, 1)) / ln(1.2::float8))::smallint
$$;

create or replace function bucket_seconds(bucket int) returns float8 language sql immutable as $$
  select round((power(1.2::float8, bucket + 0.5) / 1000)::numeric, 6)::float8
$$;

create or replace function backoff(attempt int) returns interval language sql volatile as $$
  select least(3600, 10 * power(2, least(attempt, 20) - 1)) * (0.8 + 0.4 * random()) * interval '1 second'
$$;

-- Ids of lanes, made where missing. At most 2,000 combinations of owner, type and profile are in use at a time (AIS02).
create or replace function lanes_for(owners text[], types text[], profiles text[], priorities int[]) returns int[]
language plpgsql as $$
declare ids int[]; missing boolean; asleep boolean;
begin
  select array_agg(l.id order by u.n), bool_or(l.id is null), bool_or(l.idle) into ids, missing, asleep
  from unnest(owners, types, profiles, priorities) with ordinality u (o, t, p, priority, n)
  left join lane l on l.owner_service = u.o and l.task_type = u.t and l.model_profile = u.p and l.priority = u.priority;
  if not missing and not asleep then return ids; end if;
  perform pg_advisory_xact_lock(lock_key(4));
  update lane set idle = false where id = any (ids) and idle;
  insert into lane (owner_service, task_type, model_profile, priority, paused)
  select distinct u.o, u.t, u.p, u.priority, exists (
    select from pause where u.o = coalesce(owner_service, u.o) and u.t = coalesce(task_type, u.t) and u.p = coalesce(model_profile, u.p))
  from unnest(owners, types, profiles, priorities) u (o, t, p, priority)
  where not exists (select from lane l where l.owner_service = u.o and l.task_type = u.t and l.model_profile = u.p and l.priority = u.priority);
  if (select count(*) from (select distinct owner_service, task_type, model_profile from lane where not idle) c) > 2000 then
    raise exception 'too many combinations' using errcode = 'AIS02';
  end if;
  return (
    select array_agg(l.id order by u.n)
    from unnest(owners, types, profiles, priorities) with ordinality u (o, t, p, priority, n)
    join lane l on l.owner_service = u.o and l.task_type = u.t and l.model_profile = u.p and l.priority = u.priority);
end $$;

-- Back in the queue, at the end of the lane: after a retry, a release, a failed attempt, a lapsed lease.
create or replace function enqueue(job_ids uuid[], run_ats timestamptz[], attempts int[], releases_ int[], lapsed_claim_ids uuid[]) returns void
language plpgsql as $$
begin
  perform pg_advisory_xact_lock_shared(lock_key(2));
  with again as (
    select u.*, j.lane_id, j.expires_at, j.input_bytes
    from unnest(job_ids, run_ats, attempts, releases_, lapsed_claim_ids) with ordinality u (job_id, run_at, attempt, releases, lapsed_claim_id, n)
    join job j on j.id = u.job_id
  ), now_ready as (
    insert into ready (lane_id, job_id, run_at, expires_at, attempt, releases, lapsed_claim_id, input_bytes)
    select lane_id, job_id, run_at, expires_at, attempt, releases, lapsed_claim_id, input_bytes from again where run_at <= now() order by n
  ), later as (
    insert into waiting (lane_id, job_id, run_at, expires_at, attempt, releases, lapsed_claim_id, input_bytes)
    select lane_id, job_id, run_at, expires_at, attempt, releases, lapsed_claim_id, input_bytes from again where run_at > now()
  ), awake as (
    update lane set idle = false where idle and id in (select lane_id from again)
  )
  insert into tally (lane_id, event, n, ready, scheduled)
  select lane_id, 'queued', count(*), count(*) filter (where run_at <= now()), count(*) filter (where run_at > now()) from again group by lane_id;
end $$;


-- ── Create ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

-- Writes down which job each key stands for, and gives the id of that job: the new one, or the one that exists. Keys go in and are locked in
-- their order, so that two batches that share some wait for each other instead of deadlocking. The lock keeps a key from being freed meanwhile,
-- and what is read after it is newer than what was waited for. A key whose job has left by retention is free again.
create or replace function ids_by_key(owners text[], lane_nos int[], keys text[], ids uuid[])
returns uuid[] language plpgsql as $$
declare final_ids uuid[]; complete boolean;
begin
  for try in 1 .. 20 loop
    insert into idempotency (owner_service, key, job_id)
    select distinct on (owners[u.lane_no], u.key) owners[u.lane_no], u.key, u.id
    from unnest(ids, keys, lane_nos) with ordinality u (id, key, lane_no, n) where u.key is not null
    order by owners[u.lane_no], u.key, u.n
    on conflict do nothing;
    perform from idempotency i
    join (select distinct owners[u.lane_no] as owner, u.key from unnest(keys, lane_nos) u (key, lane_no) where u.key is not null) u
      on i.owner_service = u.owner and i.key = u.key
    order by i.owner_service, i.key for update of i;
    update idempotency i set job_id = u.id
    from (select distinct on (owners[u.lane_no], u.key) owners[u.lane_no] as owner, u.key, u.id
          from unnest(ids, keys, lane_nos) with ordinality u (id, key, lane_no, n) where u.key is not null
          order by owners[u.lane_no], u.key, u.n) u
    where i.owner_service = u.owner and i.key = u.key and i.job_id <> all (ids) and not exists (select from job j where j.id = i.job_id);
    select array_agg(case when u.key is null then u.id else i.job_id end order by u.n), bool_and(u.key is null or i.job_id is not null)
    into final_ids, complete
    from unnest(ids, keys, lane_nos) with ordinality u (id, key, lane_no, n)
    left join idempotency i on i.owner_service = owners[u.lane_no] and i.key = u.key;
    if complete then return final_ids; end if;
  end loop;
  raise exception 'keys kept being freed' using errcode = 'serialization_failure';
end $$;

-- One row per job in order: its id, its status, and whether this call made it. A key that exists gives the job it stands for, or AIS01
-- where owner_ref, task_type or model_profile differ. lane_nos point into the distinct lanes, from 1.
create or replace function create_jobs_v2(
  owners text[], types text[], profiles text[], priorities int[], lane_nos int[], owner_refs text[], inputs text[], input_sizes int[],
  max_attempts_ int[], run_ats timestamptz[], expires_ats timestamptz[], keys text[], traceparents text[], labels_ text[]
) returns table (n bigint, id uuid, status text, created boolean) language plpgsql as $$
#variable_conflict use_column
declare
  first_us bigint; seed uuid := gen_random_uuid(); lane_ids int[]; ids uuid[]; final_ids uuid[]; keyed int := cardinality(array_remove(keys, null)); differs text;
begin
  perform pg_advisory_xact_lock_shared(lock_key(2));
  lane_ids := lanes_for(owners, types, profiles, priorities);
  first_us := extract(epoch from now()) * 1000000;
  ids := array(select uuid_v7_at(us, seed) from generate_series(first_us, first_us + cardinality(owner_refs) - 1) us);
  final_ids := ids;
  if keyed > 0 then
    final_ids := ids_by_key(owners, lane_nos, keys, ids);
  end if;

  with fresh as (
    select u.*, lane_ids[u.lane_no] as lane_id, coalesce(u.run_at, now()) as start_at
    from unnest(ids, final_ids, lane_nos, owner_refs, inputs, input_sizes, max_attempts_, run_ats, expires_ats, keys, traceparents, labels_)
      with ordinality u (id, final_id, lane_no, owner_ref, input, input_bytes, max_attempts, run_at, expires_at, key, traceparent, labels, n)
    where u.id = u.final_id
  ), facts as (
    insert into job (id, lane_id, owner_ref, idempotency_key, traceparent, labels, created_at, run_at, expires_at, max_attempts, input_bytes, input)
    select id, lane_id, owner_ref, key, traceparent, labels::jsonb, now(), start_at, expires_at, max_attempts, input_bytes, input::json from fresh
  ), now_ready as (
    insert into ready (lane_id, job_id, run_at, expires_at, attempt, releases, input_bytes)
    select lane_id, id, greatest(start_at, now()), expires_at, 0, 0, input_bytes from fresh where start_at <= now() order by n
  ), later as (
    insert into waiting (lane_id, job_id, run_at, expires_at, attempt, releases, input_bytes)
    select lane_id, id, start_at, expires_at, 0, 0, input_bytes from fresh where start_at > now()
  )
  insert into tally (lane_id, event, n, ready, scheduled)
  select lane_id, 'created', count(*), count(*) filter (where start_at <= now()), count(*) filter (where start_at > now())
  from fresh group by lane_id;

  if final_ids <> ids then
    select u.key into differs
    from unnest(ids, final_ids, keys, owner_refs, lane_nos) u (id, final_id, key, owner_ref, lane_no)
    join job j on j.id = u.final_id join lane l on l.id = j.lane_id
    where u.id <> u.final_id and (j.owner_ref, l.task_type, l.model_profile) <> (u.owner_ref, types[u.lane_no], profiles[u.lane_no])
    limit 1;
    if found then
      raise exception 'idempotency key stands for another job' using errcode = 'AIS01', detail = differs;
    end if;
  end if;

  return query
  select u.n, u.final_id, case when u.id = u.final_id then 'pending' else job_status(u.final_id) end, u.id = u.final_id
  from unnest(ids, final_ids) with ordinality u (id, final_id, n) order by u.n;
end $$;

-- For processes of the release before version 7, which knows no labels.
create or replace function create_jobs_v1(
  owners text[], types text[], profiles text[], priorities int[], lane_nos int[], owner_refs text[], inputs text[], input_sizes int[],
  max_attempts_ int[], run_ats timestamptz[], expires_ats timestamptz[], keys text[], traceparents text[]
) returns table (n bigint, id uuid, status text, created boolean) language sql as $$
  select * from create_jobs_v2(owners, types, profiles, priorities, lane_nos, owner_refs, inputs, input_sizes, max_attempts_,
    run_ats, expires_ats, keys, traceparents, array_fill(null::text, array[cardinality(keys)]))
$$;

create or replace function job_status(of_job uuid) returns text language sql volatile as $$
  select coalesce(
    (select status from ended where job_id = of_job),
    (select 'running' from held where job_id = of_job),
    (select 'pending' from job where id = of_job))
$$;


-- ── Claim ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

-- Scheduled jobs whose time has come join the end of their lanes, earliest first, at most so many.
create or replace function promote(at_most int) returns int language plpgsql as $$
declare moved int;
begin
  with due as (
    delete from waiting where job_id = any (array(
      select job_id from waiting where run_at <= now() order by run_at limit at_most for update skip locked)) returning *
  ), now_ready as (
    insert into ready (lane_id, job_id, run_at, expires_at, attempt, releases, lapsed_claim_id, input_bytes)
    select lane_id, job_id, run_at, expires_at, attempt, releases, lapsed_claim_id, input_bytes from due order by run_at, job_id
  ), awake as (
    update lane set idle = false where idle and id in (select lane_id from due)
  ), counted as (
    insert into tally (lane_id, event, n, ready, scheduled)
    select lane_id, 'promoted', count(*), count(*), -count(*) from due group by lane_id
  )
  select count(*) into moved from due;
  return moved;
end $$;

-- Takes jobs for several requests that have the same filters; null as a filter is any. A request is (claim_id, worker_id, lease, limit);
-- of its jobs the second and later ones stop before 16 MB of input, of all requests together before 64 MB. `served` lists owners, the least
-- recently served first; `floors` gives by lane id a seq below which nothing is left, so that a probe need not step over what was consumed.
-- One row per request: 'ok' with its jobs, or 'claim_id_reused'; the first row that is no repeat also tells what was taken: lanes with their
-- highest seq, and owners in the order of their last turn. The jobs' texts are read by claimed_texts in a statement of its own: whoever reads
-- the answer slowly must not hold up the other claims.
create or replace function claim_jobs_v1(
  profiles text[], types text[], owners text[], served text[], floors bigint[],
  claim_ids uuid[], worker_ids text[], lease_seconds_ float8[], limits int[]
)
returns table (n int, outcome text, job_ids uuid[], lane_ids int[], seqs bigint[], owner_order text[])
language plpgsql as $$
#variable_conflict use_column
declare
  open_requests int[] := '{}'; request int := 1; room int; bytes bigint := 0; all_bytes bigint := 0;
  want int := 0; got int; share int; owner_count int; level int; claimed_at timestamptz; pick record; earlier record;
  requests_of int[]; lanes_of int[]; seqs_of bigint[]; owners_of text[];
  all_jobs uuid[] := '{}'; all_requests int[] := '{}'; all_lanes int[] := '{}'; all_seqs bigint[] := '{}';
  turn_order text[] := '{}'; outcomes text[] := '{}';
begin
  perform pg_advisory_xact_lock(lock_key(1));
  -- Not now(): that was before the wait for the lock, and a lease begins when it is given.
  claimed_at := clock_timestamp();
  if exists (select from waiting where run_at <= now()) then perform promote(1000); end if;

  -- A claim_id that was used already gets what it still holds.
  for i in 1 .. cardinality(claim_ids) loop
    select c.worker_id, c.job_ids into earlier from claim c where c.claim_id = claim_ids[i] and c.made_at > now() - interval '1 day';
    if not found then
      open_requests := open_requests || i; want := want + limits[i];
    elsif earlier.worker_id <> worker_ids[i] then
      outcomes[i] := 'claim_id_reused';
    else
      n := i; outcome := 'ok'; job_ids := earlier.job_ids; outcomes[i] := 'repeated';
      return next;
    end if;
  end loop;
  room := limits[open_requests[1]];

  <<levels>>
  for level in
    select distinct priority from lane where not paused and not idle and (profiles is null or model_profile = any (profiles))
      and (types is null or task_type = any (types)) and (owners is null or owner_service = any (owners)) order by priority desc
  loop
    exit when want <= 0 or request > cardinality(open_requests);
    select count(distinct owner_service) into owner_count from lane where priority = level and not paused and not idle
      and (profiles is null or model_profile = any (profiles)) and (types is null or task_type = any (types))
      and (owners is null or owner_service = any (owners));
    continue when owner_count = 0;
    loop
      share := ceil(want::numeric / owner_count);
      requests_of := '{}'; lanes_of := '{}'; seqs_of := '{}';
      for pick in
        select t.* from (
          select h.*, row_number() over (partition by h.owner_service order by h.seq) as turn from (
            select l.owner_service, r.lane_id, r.seq, r.input_bytes
            from lane l cross join lateral (
              select r.lane_id, r.seq, r.input_bytes from ready r
              where r.lane_id = l.id and r.seq > coalesce(floors[l.id], 0) and (r.expires_at is null or r.expires_at > claimed_at)
              order by r.seq limit share) r
            where l.priority = level and not l.paused and not l.idle and (profiles is null or l.model_profile = any (profiles))
              and (types is null or l.task_type = any (types)) and (owners is null or l.owner_service = any (owners))) h) t
        where t.turn <= share
        order by t.turn, coalesce(array_position(served, t.owner_service), 0), t.owner_service, t.seq limit want
      loop
        if room = 0 or (room < limits[open_requests[request]] and bytes + pick.input_bytes > 16 * 1024 * 1024) then
          request := request + 1; bytes := 0;
          exit when request > cardinality(open_requests);
          room := limits[open_requests[request]];
        end if;
        if all_bytes > 0 and all_bytes + pick.input_bytes > 64 * 1024 * 1024 then
          request := cardinality(open_requests) + 1;
          exit;
        end if;
        requests_of := requests_of || open_requests[request]; lanes_of := lanes_of || pick.lane_id; seqs_of := seqs_of || pick.seq;
        room := room - 1; bytes := bytes + pick.input_bytes; all_bytes := all_bytes + pick.input_bytes;
      end loop;
      exit when cardinality(seqs_of) = 0;

      with chosen as (
        select * from unnest(lanes_of, seqs_of, requests_of) with ordinality u (lane_id, seq, request, turn)
      ), taken as (
        delete from ready r using chosen u
        where r.lane_id = any (array[u.lane_id]) and r.seq = any (array[u.seq]) returning r.*, u.request, u.turn
      ), now_held as (
        insert into held (job_id, lane_id, claim_id, worker_id, attempt, releases, run_at, started_at, lease_seconds, lease_expires_at)
        select job_id, lane_id, claim_ids[t.request], worker_ids[t.request], attempt + 1, releases, run_at, claimed_at,
          lease_seconds_[t.request], claimed_at + lease_seconds_[t.request] * interval '1 second' from taken t
      ), counted as (
        insert into tally (lane_id, event, n, ready, running, seconds_bucket)
        select lane_id, 'claimed', count(*), -count(*), count(*), seconds_bucket(claimed_at - run_at) from taken
        group by lane_id, seconds_bucket(claimed_at - run_at)
      )
      select all_jobs || array_agg(t.job_id order by t.turn), all_requests || array_agg(t.request order by t.turn),
        all_lanes || array_agg(t.lane_id order by t.turn), all_seqs || array_agg(t.seq order by t.turn), count(*)
      into all_jobs, all_requests, all_lanes, all_seqs, got from taken t;
      select array_agg(o order by last_turn), count(*) into owners_of, owner_count
      from (select l.owner_service as o, max(u.i) as last_turn
            from (select lane_id, max(i) as i from unnest(lanes_of) with ordinality u (lane_id, i) group by lane_id) u
            join lane l on l.id = u.lane_id group by l.owner_service) x;
      served := array(select o from unnest(served) o where o <> all (owners_of)) || owners_of;
      turn_order := array(select o from unnest(turn_order) o where o <> all (owners_of)) || owners_of;
      want := want - got;
      -- Some were cancelled under our hands: whose turn it was asks for more.
      if got < cardinality(seqs_of) and all_bytes < 48 * 1024 * 1024 then
        request := least(request, cardinality(open_requests));
        room := limits[open_requests[request]] - cardinality(array_positions(all_requests, open_requests[request]));
      end if;
      exit levels when want <= 0 or request > cardinality(open_requests);
    end loop;
  end loop;

  insert into claim (claim_id, worker_id, made_at, job_ids)
  select claim_ids[u.request], worker_ids[u.request], now(), array_agg(u.job_id order by u.i)
  from unnest(all_requests, all_jobs) with ordinality u (request, job_id, i) group by u.request;

  select array_agg(x.lane_id), array_agg(x.seq) into lane_ids, seqs
  from (select u.lane_id, max(u.seq) as seq from unnest(all_lanes, all_seqs) u (lane_id, seq) group by u.lane_id) x;
  owner_order := turn_order;
  for i in 1 .. cardinality(claim_ids) loop
    continue when outcomes[i] = 'repeated';
    n := i; outcome := coalesce(outcomes[i], 'ok');
    job_ids := array(select u.job_id from unnest(all_requests, all_jobs) with ordinality u (request, job_id, k) where u.request = i order by u.k);
    return next;
    lane_ids := null; seqs := null; owner_order := null;
  end loop;
end $$;

-- Of these jobs those that their claim holds: one row per claim that holds any, its jobs as the text of a JSON array's inside.
create or replace function claimed_texts_v1(claim_ids uuid[], job_ids uuid[])
returns table (claim_id uuid, jobs text) language plpgsql as $$
#variable_conflict use_column
begin
  return query
  select t.claim_id, string_agg(t.text, ',') from (
    select h.claim_id, concat(
      '{"id":"', h.job_id, '","owner_service":', to_json(l.owner_service), ',"owner_ref":', to_json(j.owner_ref), ',"task_type":', to_json(l.task_type),
      ',"model_profile":', to_json(l.model_profile), ',"priority":', l.priority, ',"claim_id":"', h.claim_id, '","attempt":', h.attempt,
      ',"max_attempts":', j.max_attempts, ',"created_at":"', rfc3339(j.created_at), '","run_at":"', rfc3339(h.run_at),
      '","expires_at":', coalesce('"' || rfc3339(j.expires_at) || '"', 'null'), ',"lease_expires_at":"', rfc3339(h.lease_expires_at),
      '","lease_seconds":', h.lease_seconds, ',"traceparent":', coalesce(to_json(j.traceparent)::text, 'null'),
      ',"labels":', coalesce(j.labels, '{}'), ',"input":', j.input, '}') as text
    from unnest(claim_ids, job_ids) with ordinality c (claim_id, job_id, n)
    join held h on h.job_id = any (array[c.job_id]) and h.claim_id = c.claim_id
    join job j on j.id = c.job_id
    join lane l on l.id = h.lane_id
    order by c.n) t
  group by t.claim_id;
end $$;

-- What a process with parked requests asks a few times a second: has anything become ready, and which of these jobs have finished.
create or replace function peek_v1(job_ids uuid[])
returns table (seq bigint, due boolean, ended uuid[]) language sql volatile as $$
  select last_value, exists (select from waiting where run_at <= now()), array(select job_id from ended where job_id = any (job_ids))
  from readiness
$$;

create or replace function heartbeat_jobs_v1(job_ids uuid[], claim_ids uuid[], lease_seconds_ float8[], progresses text[])
returns table (n bigint, outcome text, lease_expires_at text, lease_seconds float8, worker_id text)
language plpgsql as $$
#variable_conflict use_column
begin
  return query
  with beat as (
    update held h set lease_seconds = coalesce(u.lease, h.lease_seconds),
      lease_expires_at = now() + coalesce(u.lease, h.lease_seconds) * interval '1 second', progress = coalesce(u.progress::json, h.progress)
    from (select * from unnest(job_ids, claim_ids, lease_seconds_, progresses) with ordinality u (job_id, claim_id, lease, progress, n)
          order by u.job_id) u
    where h.job_id = any (array[u.job_id]) and h.claim_id = u.claim_id
    returning h.job_id, h.claim_id, rfc3339(h.lease_expires_at) as until, h.lease_seconds, h.worker_id)
  select u.n, case when b.job_id is null then late_outcome(u.job_id, u.claim_id, 'heartbeat') else 'ok' end, b.until, b.lease_seconds, b.worker_id
  from unnest(job_ids, claim_ids) with ordinality u (job_id, claim_id, n)
  left join beat b on b.job_id = u.job_id and b.claim_id = u.claim_id order by u.n;
end $$;


-- ── Finish ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

-- What a call gets whose claim does not hold the job: 'ok' where it is a repeat of the call that ended it.
create or replace function late_outcome(of_job uuid, of_claim uuid, verb text) returns text language plpgsql as $$
declare ending record; before text;
begin
  select status, claim_id into ending from ended where job_id = of_job;
  select how into before from attempt_ended where job_id = of_job and claim_id = of_claim;
  if before = verb or (verb = 'complete' and ending.status = 'completed' and ending.claim_id = of_claim) then return 'ok'; end if;
  if ending.status = 'cancelled' then return 'job_cancelled'; end if;
  if not exists (select from job where id = of_job) then return 'job_not_found'; end if;
  return 'claim_lost';
end $$;

-- A completion after the lease ran out counts while nobody has claimed the job since. Where the job moves while this looks, it looks again.
create or replace function complete_late(
  of_job uuid, of_claim uuid, its_result text, its_usage text, prompt numeric, completion numeric, total numeric, audio float8
) returns text language plpgsql as $$
declare lapsed attempt_ended; back record; was text;
begin
  select * into lapsed from attempt_ended where job_id = of_job and claim_id = of_claim and how = 'lapse';
  if not found then return late_outcome(of_job, of_claim, 'complete'); end if;
  for try in 1 .. 5 loop
    was := 'ready';
    delete from ready where job_id = of_job and lapsed_claim_id = of_claim returning lane_id, run_at into back;
    if not found then
      was := 'waiting';
      delete from waiting where job_id = of_job and lapsed_claim_id = of_claim returning lane_id, run_at into back;
    end if;
    if not found then
      was := 'ended';
      delete from ended e using job j where e.job_id = of_job and e.claim_id = of_claim and e.status = 'failed' and j.id = of_job
      returning j.lane_id, e.run_at into back;
    end if;
    if found then
      delete from attempt_ended where job_id = of_job and claim_id = of_claim;
      insert into ended (job_id, status, attempt, claim_id, worker_id, run_at, started_at, finished_at, usage, result)
      values (of_job, 'completed', lapsed.attempt, of_claim, lapsed.worker_id, back.run_at, lapsed.started_at, now(), its_usage::json, its_result::json);
      insert into tally (lane_id, event, n, ready, scheduled, prompt_tokens, completion_tokens, total_tokens, audio_seconds)
      values (back.lane_id, 'completed', 1, -(was = 'ready')::int, -(was = 'waiting')::int, prompt, completion, total, audio);
      return 'ok';
    end if;
    exit when exists (select from held where job_id = of_job) or exists (select from ended where job_id = of_job and status <> 'failed')
      or not exists (select from job where id = of_job);
  end loop;
  return late_outcome(of_job, of_claim, 'complete');
end $$;

create or replace function complete_jobs_v1(
  job_ids uuid[], claim_ids uuid[], results text[], usages text[], prompts numeric[], completions numeric[], totals numeric[], audios float8[]
) returns table (n bigint, outcome text) language plpgsql as $$
#variable_conflict use_column
declare done bigint[];
begin
  with taken as (
    delete from held h
    using (select * from unnest(job_ids, claim_ids, results, usages, prompts, completions, totals, audios)
             with ordinality u (job_id, claim_id, result, usage, prompt, completion, total, audio, n) order by u.job_id) u
    where h.job_id = any (array[u.job_id]) and h.claim_id = u.claim_id
    returning h.*, u.result, u.usage, u.prompt, u.completion, u.total, u.audio, u.n
  ), endings as (
    insert into ended (job_id, status, attempt, claim_id, worker_id, run_at, started_at, finished_at, progress, usage, result)
    select job_id, 'completed', attempt, claim_id, worker_id, run_at, started_at, now(), progress, usage::json, result::json from taken
  ), counted as (
    insert into tally (lane_id, event, n, running, seconds_bucket, prompt_tokens, completion_tokens, total_tokens, audio_seconds)
    select lane_id, 'completed', count(*), -count(*), seconds_bucket(now() - started_at), sum(prompt), sum(completion), sum(total), sum(audio)
    from taken group by lane_id, seconds_bucket(now() - started_at)
  )
  select array_agg(n) into done from taken;
  if cardinality(done) = cardinality(job_ids) then
    return query select i::bigint, 'ok'::text from generate_series(1, cardinality(job_ids)) i;
    return;
  end if;
  return query
  with outcomes as materialized (
    select u.n, case when u.n = any (done) then 'ok'
      else complete_late(u.job_id, u.claim_id, u.result, u.usage, u.prompt, u.completion, u.total, u.audio) end as outcome
    from (select * from unnest(job_ids, claim_ids, results, usages, prompts, completions, totals, audios)
            with ordinality u (job_id, claim_id, result, usage, prompt, completion, total, audio, n) order by u.job_id, u.n) u)
  select o.n, o.outcome from outcomes o order by o.n;
end $$;

-- Ends attempts that did not complete: how is fail, release or lapse. With attempts left the job goes back, else it has failed.
-- Returns the positions of those that their claim still held.
create or replace function end_attempts(
  how_ text, job_ids uuid[], claim_ids uuid[], categories text[], messages text[], retryables boolean[], delays float8[],
  usages text[], prompts numeric[], completions numeric[], totals numeric[], audios float8[]
) returns bigint[] language plpgsql as $$
#variable_conflict use_column
declare done bigint[]; back_jobs uuid[]; back_at timestamptz[]; back_attempts int[]; back_releases int[]; back_claims uuid[];
begin
  with taken as (
    delete from held h
    using (select * from unnest(job_ids, claim_ids, categories, messages, retryables, delays, usages, prompts, completions, totals, audios)
             with ordinality u (job_id, claim_id, category, message, retryable, delay, usage, prompt, completion, total, audio, n)
           order by u.job_id) u
    where h.job_id = any (array[u.job_id]) and h.claim_id = u.claim_id
    returning h.*, u.category, u.message, u.retryable, u.delay, u.usage, u.prompt, u.completion, u.total, u.audio, u.n
  ), judged as (
    select t.*,
      case how_ when 'release' then t.releases < 100 when 'fail' then t.retryable and t.attempt < j.max_attempts else t.attempt < j.max_attempts end as again,
      now() + coalesce(t.delay * interval '1 second', case how_ when 'fail' then backoff(t.attempt) else interval '0' end) as next_at
    from taken t join job j on j.id = t.job_id
  ), remembered as (
    insert into attempt_ended (job_id, claim_id, how, attempt, started_at, worker_id, category, message, usage, at)
    select job_id, claim_id, how_, attempt, started_at, worker_id, category, left(message, 4000), usage::json, now() from judged
    on conflict do nothing
  ), endings as (
    insert into ended (job_id, status, attempt, claim_id, worker_id, run_at, started_at, finished_at, error_category, error_message, progress, usage)
    select job_id, 'failed', attempt, claim_id, worker_id, run_at, started_at, now(),
      case how_ when 'release' then 'released_too_often' else category end, left(message, 4000), progress, usage::json
    from judged where not again
  ), counted as (
    insert into tally (lane_id, event, n, running, category, seconds_bucket, prompt_tokens, completion_tokens, total_tokens, audio_seconds)
    select lane_id, case when not again then 'failed' when how_ = 'release' then 'released' else 'attempt_failed' end, count(*), -count(*),
      case when how_ <> 'release' then category when not again then 'released_too_often' end, seconds_bucket(now() - started_at),
      sum(prompt), sum(completion), sum(total), sum(audio)
    from judged group by lane_id, 2, 5, 6
  )
  select array_agg(n), array_agg(job_id order by n) filter (where again), array_agg(next_at order by n) filter (where again),
    array_agg(attempt - (how_ = 'release')::int order by n) filter (where again),
    array_agg(releases + (how_ = 'release')::int order by n) filter (where again),
    array_agg(case how_ when 'lapse' then claim_id end order by n) filter (where again)
  into done, back_jobs, back_at, back_attempts, back_releases, back_claims from judged;
  if back_jobs is not null then perform enqueue(back_jobs, back_at, back_attempts, back_releases, back_claims); end if;
  return done;
end $$;

create or replace function fail_jobs_v1(
  job_ids uuid[], claim_ids uuid[], categories text[], messages text[], retryables boolean[], delays float8[],
  usages text[], prompts numeric[], completions numeric[], totals numeric[], audios float8[]
) returns table (n bigint, outcome text) language plpgsql as $$
declare done bigint[] := end_attempts('fail', job_ids, claim_ids, categories, messages, retryables, delays, usages, prompts, completions, totals, audios);
begin
  return query select u.i, case when u.i = any (done) then 'ok' else late_outcome(u.job_id, u.claim_id, 'fail') end
  from unnest(job_ids, claim_ids) with ordinality u (job_id, claim_id, i) order by u.i;
end $$;

create or replace function release_jobs_v1(job_ids uuid[], claim_ids uuid[], delays float8[])
returns table (n bigint, outcome text) language plpgsql as $$
declare
  said text[] := array_fill('released'::text, array[cardinality(job_ids)]);
  done bigint[] := end_attempts('release', job_ids, claim_ids, said, array_fill('given back by its worker'::text, array[cardinality(job_ids)]), null, delays, null, null, null, null, null);
begin
  return query select u.i, case when u.i = any (done) then 'ok' else late_outcome(u.job_id, u.claim_id, 'release') end
  from unnest(job_ids, claim_ids) with ordinality u (job_id, claim_id, i) order by u.i;
end $$;


-- ── The owner's and the operator's verbs ────────────────────────────────────────────────────────────────────────────────────────────

-- Attempt 0, run now; the job's errors stay. Where the job moves between tables while this looks, it looks again.
create or replace function retry_job(of_job uuid, from_ text[]) returns text language plpgsql as $$
declare gone record; state text;
begin
  for try in 1 .. 20 loop
    state := job_status(of_job);
    if state is null then return 'job_not_found'; end if;
    if state = 'pending' then return 'ok'; end if;
    if state = 'completed' or state <> all (from_) then return 'invalid_state'; end if;
    if state = 'running' then
      delete from held where job_id = of_job returning *, null::uuid as lapsed into gone;
      if found then
        insert into attempt_ended (job_id, claim_id, how, attempt, worker_id, category, message, at)
        values (of_job, gone.claim_id, 'retry', gone.attempt, gone.worker_id, 'aborted', 'taken back by a retry', now()) on conflict do nothing;
        insert into tally (lane_id, event, n, running) values (gone.lane_id, 'aborted', 1, -1);
      end if;
    else
      delete from ended e where e.job_id = of_job and e.status = state returning *, (
        select a.claim_id from attempt_ended a where a.job_id = of_job and a.claim_id = e.claim_id and a.how = 'lapse') as lapsed into gone;
    end if;
    if found then
      update job set run_at = now(), expires_at = case when expires_at > now() then expires_at end where id = of_job;
      perform enqueue(array[of_job], array[now()], array[0], array[0], array[gone.lapsed]);
      return 'ok';
    end if;
  end loop;
  raise exception 'the job kept moving' using errcode = 'serialization_failure';
end $$;

create or replace function retry_jobs_v1(job_ids uuid[], from_ text[])
returns table (n bigint, outcome text) language sql volatile as $$
  select u.n, retry_job(u.job_id, from_) from (select * from unnest(job_ids) with ordinality u (job_id, n) order by u.job_id) u
$$;

create or replace function cancel_job_v1(of_job uuid, reason text) returns text
language plpgsql as $$
declare gone record; state text;
begin
  for try in 1 .. 20 loop
    delete from ready where job_id = of_job
      returning lane_id, attempt, run_at, null::timestamptz as started_at, lapsed_claim_id as claim_id, null::text as worker_id, null::json as progress,
        1 as ready, 0 as scheduled, 0 as running into gone;
    if not found then
      delete from waiting where job_id = of_job
        returning lane_id, attempt, run_at, null::timestamptz as started_at, lapsed_claim_id as claim_id, null::text as worker_id, null::json as progress,
          0 as ready, 1 as scheduled, 0 as running into gone;
    end if;
    if not found then
      delete from held where job_id = of_job
        returning lane_id, attempt, run_at, started_at, claim_id, worker_id, progress, 0 as ready, 0 as scheduled, 1 as running into gone;
    end if;
    if found then
      insert into ended (job_id, status, attempt, claim_id, worker_id, run_at, started_at, finished_at, error_category, error_message, progress)
      values (of_job, 'cancelled', gone.attempt, gone.claim_id, gone.worker_id, gone.run_at, gone.started_at, now(), 'cancelled', left(reason, 4000), gone.progress);
      insert into attempt_ended (job_id, claim_id, how, attempt, worker_id, category, message, at)
      select of_job, gone.claim_id, 'cancel', gone.attempt, gone.worker_id, 'cancelled', left(reason, 4000), now()
      where gone.running = 1 on conflict do nothing;
      insert into tally (lane_id, event, n, ready, scheduled, running) values (gone.lane_id, 'cancelled', 1, -gone.ready, -gone.scheduled, -gone.running);
      return 'ok';
    end if;
    state := job_status(of_job);
    if state is null then return 'job_not_found'; end if;
    if state = 'cancelled' then return 'ok'; end if;
    if state in ('completed', 'failed') then return 'invalid_state'; end if;
  end loop;
  raise exception 'the job kept moving' using errcode = 'serialization_failure';
end $$;

create or replace function delete_job_v1(of_job uuid) returns text language plpgsql as $$
begin
  delete from ended where job_id = of_job;
  if not found then
    return case when exists (select from job where id = of_job) then 'invalid_state' else 'job_not_found' end;
  end if;
  delete from attempt_ended where job_id = of_job;
  delete from idempotency i using job j, lane l
  where j.id = of_job and l.id = j.lane_id and i.owner_service = l.owner_service and i.key = j.idempotency_key and i.job_id = of_job;
  delete from job where id = of_job;
  return 'ok';
end $$;

-- One row per job that exists, in the order asked for: its facts as the text of a JSON object, and its payloads as they were sent.
create or replace function job_texts_v1(ids uuid[], with_result boolean, with_input boolean)
returns table (n bigint, facts text, result text, input text) language plpgsql as $$
#variable_conflict use_column
begin
  return query
  select u.n, row_to_json(f)::text, case when with_result then e.result::text end, case when with_input then j.input::text end
  from unnest(ids) with ordinality u (id, n)
  join job j on j.id = u.id
  join lane l on l.id = j.lane_id
  left join ready r on r.job_id = u.id
  left join waiting w on w.job_id = u.id
  left join held h on h.job_id = u.id
  left join ended e on e.job_id = u.id
  cross join lateral (
    select j.id, case when e.job_id is not null then e.status when h.job_id is not null then 'running' else 'pending' end as status,
      l.owner_service, j.owner_ref, l.task_type, l.model_profile, l.priority,
      coalesce(e.attempt, h.attempt, r.attempt, w.attempt) as attempt, j.max_attempts,
      rfc3339(j.created_at) as created_at, rfc3339(case when coalesce(e.attempt, h.attempt, r.attempt + 1, 2) <= 1 then j.run_at else coalesce(w.run_at, r.run_at, h.run_at, e.run_at, j.run_at) end) as run_at,
      rfc3339(j.expires_at) as expires_at, rfc3339(coalesce(e.started_at, h.started_at)) as started_at, rfc3339(e.finished_at) as finished_at,
      coalesce(e.worker_id, h.worker_id) as worker_id, rfc3339(h.lease_expires_at) as lease_expires_at,
      j.idempotency_key, j.traceparent, coalesce(j.labels, '{}') as labels, coalesce(e.progress, h.progress) as progress, e.usage,
      case when e.error_category is not null then json_build_object('category', e.error_category, 'message', e.error_message) end as error,
      coalesce((
        select json_agg(json_build_object('attempt', a.attempt, 'worker_id', a.worker_id, 'category', a.category, 'message', a.message,
          'usage', a.usage, 'at', rfc3339(a.at)) order by a.at, a.attempt)
        from attempt_ended a where a.job_id = u.id and a.how <> 'release'), '[]'::json) as errors) f
  order by u.n;
end $$;


-- ── Pause and stats ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────

-- Pauses every combination of what is named; a part that is not named is any. Lanes made later are paused by the same rules.
-- Who queues a job waits behind this: so it does not wait long itself.
create or replace function pause_jobs_v1(owners text[], types text[], profiles text[]) returns text language plpgsql
set lock_timeout = '500ms' as $$
begin
  perform pg_advisory_xact_lock(lock_key(2));
  insert into pause (owner_service, task_type, model_profile)
  select o, t, p from unnest(coalesce(owners, array[null])) o, unnest(coalesce(types, array[null])) t, unnest(coalesce(profiles, array[null])) p
  where not exists (select from pause where (owner_service, task_type, model_profile) is not distinct from (o, t, p));
  return apply_pauses();
end $$;

-- Lifts every rule that lies within what is named.
create or replace function resume_jobs_v1(owners text[], types text[], profiles text[]) returns text language plpgsql
set lock_timeout = '500ms' as $$
begin
  perform pg_advisory_xact_lock(lock_key(2));
  delete from pause where (owners is null or owner_service = any (owners)) and (types is null or task_type = any (types))
    and (profiles is null or model_profile = any (profiles));
  perform nextval('readiness');
  return apply_pauses();
end $$;

create or replace function apply_pauses() returns text language plpgsql as $$
begin
  update lane l set paused = not paused where paused <> exists (
    select from pause p where l.owner_service = coalesce(p.owner_service, l.owner_service)
      and l.task_type = coalesce(p.task_type, l.task_type) and l.model_profile = coalesce(p.model_profile, l.model_profile));
  return coalesce((select json_agg(json_build_object('owner_service', owner_service, 'task_type', task_type, 'model_profile', model_profile,
    'paused_at', rfc3339(paused_at)) order by owner_service, task_type, model_profile) from pause), '[]');
end $$;

-- The counters are summed before they are dealt out to profiles, types and owners, and by hashing: with a day of 200 combinations that is 15 ms
-- instead of 105. Durations are those of the last hour or up to a quarter more.
create or replace function stats_v1(window_seconds int, only_owners text[]) returns text language sql volatile
set enable_sort = off set enable_seqscan = off set enable_mergejoin = off as $$
  with span as (
    select case window_seconds when 3600 then 300 when 86400 then 3600 else 21600 end as seconds
  ), past as materialized (
    select owner_service, task_type, model_profile, event, category, sum(n) as n, max(last_at) as last_at, sum(prompt_tokens) as prompt_tokens,
      sum(completion_tokens) as completion_tokens, sum(total_tokens) as total_tokens, sum(audio_seconds) as audio_seconds
    from history h, span s where h.span_seconds = s.seconds and (only_owners is null or h.owner_service = any (only_owners))
      and h.start_at > now() - (window_seconds + s.seconds) * interval '1 second' and h.event <> 'claimed'
    group by owner_service, task_type, model_profile, event, category
  ), live as materialized (
    select l.owner_service, l.task_type, l.model_profile, l.paused, coalesce(c.ready, 0) as pending, coalesce(c.scheduled, 0) as scheduled,
      coalesce(c.running, 0) as running, c.last_claimed_at,
      (select extract(epoch from now() - r.run_at)::float8 from ready r where c.ready > 0 and r.lane_id = l.id order by r.seq limit 1) as oldest_pending_seconds
    from lane l left join lane_count c on c.lane_id = l.id where not l.idle and (only_owners is null or l.owner_service = any (only_owners))
  ), lasted as materialized (
    select owner_service, task_type, model_profile, event = 'claimed' as waits, seconds_bucket, sum(n) as n from history h
    where span_seconds = 900 and start_at > now() - interval '75 minutes' and (only_owners is null or owner_service = any (only_owners))
    group by owner_service, task_type, model_profile, event = 'claimed', seconds_bucket
  ), cells as (
    select d.kind, d.name, waits, seconds_bucket, sum(n) as n
    from lasted cross join lateral (values ('by_model_profile', model_profile), ('by_task_type', task_type), ('by_owner_service', owner_service)) d (kind, name)
    group by d.kind, d.name, waits, seconds_bucket
  ), climbed as (
    select kind, name, waits, seconds_bucket, sum(n) over (partition by kind, name, waits order by seconds_bucket) as up_to,
      sum(n) over (partition by kind, name, waits) as total from cells
  ), durations as (
    select kind, name,
      bucket_seconds(min(seconds_bucket) filter (where waits and up_to >= 0.5 * total)) as waiting_p50,
      bucket_seconds(min(seconds_bucket) filter (where waits and up_to >= 0.95 * total)) as waiting_p95,
      bucket_seconds(min(seconds_bucket) filter (where not waits and up_to >= 0.5 * total)) as running_p50,
      bucket_seconds(min(seconds_bucket) filter (where not waits and up_to >= 0.95 * total)) as running_p95
    from climbed group by kind, name
  ), now_by as (
    select d.kind, d.name, sum(pending) as pending, sum(scheduled) as scheduled, sum(running) as running,
      round(max(oldest_pending_seconds)::numeric, 3) as oldest_pending_seconds, bool_and(paused) as paused, max(last_claimed_at) as last_claimed_at
    from live cross join lateral (values ('by_model_profile', model_profile), ('by_task_type', task_type), ('by_owner_service', owner_service)) d (kind, name)
    group by d.kind, d.name
  ), past_by as (
    select d.kind, d.name, sum(n) filter (where event = 'completed') as completed, sum(n) filter (where event = 'failed') as failed,
      sum(n) filter (where event = 'cancelled') as cancelled
    from past cross join lateral (values ('by_model_profile', model_profile), ('by_task_type', task_type), ('by_owner_service', owner_service)) d (kind, name)
    group by d.kind, d.name
  ), groups as (
    select kind, json_agg(json_build_object(case kind when 'by_model_profile' then 'model_profile' when 'by_task_type' then 'task_type' else 'owner_service' end, name,
      'pending', coalesce(pending, 0), 'scheduled', coalesce(scheduled, 0), 'running', coalesce(running, 0), 'completed', coalesce(completed, 0),
      'failed', coalesce(failed, 0), 'cancelled', coalesce(cancelled, 0), 'oldest_pending_seconds', oldest_pending_seconds,
      'paused', coalesce(paused, false), 'last_claimed_at', rfc3339(last_claimed_at),
      'waiting_seconds', json_build_object('p50', waiting_p50, 'p95', waiting_p95),
      'running_seconds', json_build_object('p50', running_p50, 'p95', running_p95)) order by name) as rows
    from now_by full join past_by using (kind, name) left join durations using (kind, name) group by kind
  ), problems as (
    select event, json_agg(json_build_object('category', category, 'count', n, 'last_at', rfc3339(last_at)) order by n desc, category) as rows
    from (select event, category, sum(n) as n, max(last_at) as last_at from past where event in ('failed', 'attempt_failed') group by event, category) x group by event
  ), used as (
    select json_agg(json_build_object('owner_service', owner_service, 'model_profile', model_profile, 'prompt_tokens', prompt_tokens,
      'completion_tokens', completion_tokens, 'total_tokens', total_tokens, 'audio_seconds', audio_seconds) order by owner_service, model_profile) as rows
    from (select owner_service, model_profile, sum(prompt_tokens) as prompt_tokens, sum(completion_tokens) as completion_tokens,
            sum(total_tokens) as total_tokens, sum(audio_seconds) as audio_seconds from past group by 1, 2
          having num_nonnulls(sum(prompt_tokens), sum(completion_tokens), sum(total_tokens), sum(audio_seconds)) > 0) x
  )
  select json_build_object('window_seconds', window_seconds,
    'jobs', (select json_build_object('pending', coalesce(sum(pending), 0), 'scheduled', coalesce(sum(scheduled), 0), 'running', coalesce(sum(running), 0),
      'completed', (select coalesce(sum(n), 0) from past where event = 'completed'), 'failed', (select coalesce(sum(n), 0) from past where event = 'failed'),
      'cancelled', (select coalesce(sum(n), 0) from past where event = 'cancelled')) from live),
    'errors', coalesce((select rows from problems where event = 'failed'), '[]'),
    'attempt_errors', coalesce((select rows from problems where event = 'attempt_failed'), '[]'),
    'oldest_pending_seconds', (select round(max(oldest_pending_seconds)::numeric, 3) from live),
    'by_model_profile', coalesce((select rows from groups where kind = 'by_model_profile'), '[]'),
    'by_task_type', coalesce((select rows from groups where kind = 'by_task_type'), '[]'),
    'by_owner_service', coalesce((select rows from groups where kind = 'by_owner_service'), '[]'),
    'usage', coalesce((select rows from used), '[]'))::text
$$;


-- ── Upkeep ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

create or replace function rescue(at_most int) returns int language plpgsql as $$
declare jobs uuid[]; claims uuid[]; done bigint[];
begin
  select array_agg(job_id), array_agg(claim_id) into jobs, claims from (
    select job_id, claim_id from held where lease_expires_at < now() order by job_id limit at_most for update skip locked) h;
  if jobs is null then return 0; end if;
  done := end_attempts('lapse', jobs, claims, array_fill('lease_expired'::text, array[cardinality(jobs)]),
    array_fill('the lease ran out without a heartbeat'::text, array[cardinality(jobs)]), null, null, null, null, null, null, null);
  return cardinality(done);
end $$;

create or replace function expire(at_most int) returns int language plpgsql as $$
declare ended_now int;
begin
  with from_ready as (
    delete from ready where job_id = any (array(
      select job_id from ready where expires_at <= now() order by expires_at limit at_most for update skip locked)) returning *
  ), from_waiting as (
    delete from waiting where job_id = any (array(
      select job_id from waiting where expires_at <= now() order by expires_at limit at_most for update skip locked)) returning *
  ), due as (
    select job_id, lane_id, attempt, run_at, lapsed_claim_id, 1 as ready from from_ready
    union all select job_id, lane_id, attempt, run_at, lapsed_claim_id, 0 from from_waiting
  ), endings as (
    insert into ended (job_id, status, attempt, claim_id, run_at, finished_at, error_category, error_message)
    select job_id, 'failed', attempt, lapsed_claim_id, run_at, now(), 'expired', 'not claimed before expires_at' from due
  ), counted as (
    insert into tally (lane_id, event, n, ready, scheduled, category)
    select lane_id, 'failed', count(*), -sum(ready), sum(ready) - count(*), 'expired' from due group by lane_id
  )
  select count(*) into ended_now from due;
  return ended_now;
end $$;

-- Moves the ledger into the counters. A row becomes visible at its commit but carries the time of its start: the search begins a minute
-- before the last fold, which is more than a statement may take, and steps over nothing older. Tells whether more is left, and what was moved, as
-- a JSON array of [event, owner, profile, category, bucket, n, prompt, completion and total tokens, audio seconds]: each move is told to one process.
create or replace function fold_v1(at_most int, out more boolean, out moves text) language plpgsql
set enable_seqscan = off as $$
declare rows_folded int; last_at timestamptz;
begin
  more := false;
  if not pg_try_advisory_xact_lock(lock_key(3)) then return; end if;
  with gone as (
    delete from tally where ctid = any (array(
      select ctid from tally where at > (select folded_at from upkeep_state) - interval '1 minute' order by at limit at_most)) returning *
  ), counts as (
    insert into lane_count as c (lane_id, ready, scheduled, running, moved_at, last_claimed_at)
    select lane_id, sum(ready), sum(scheduled), sum(running), max(at), max(at) filter (where event = 'claimed') from gone group by lane_id
    on conflict (lane_id) do update set ready = c.ready + excluded.ready, scheduled = c.scheduled + excluded.scheduled,
      running = c.running + excluded.running, moved_at = excluded.moved_at, last_claimed_at = coalesce(excluded.last_claimed_at, c.last_claimed_at)
  ), buckets as (
  insert into history as h (span_seconds, start_at, owner_service, task_type, model_profile, event, category, seconds_bucket, n, last_at,
    prompt_tokens, completion_tokens, total_tokens, audio_seconds)
  select s, to_timestamp(floor(extract(epoch from g.at) / s) * s), l.owner_service, l.task_type, l.model_profile, g.event, coalesce(g.category, ''),
    case when s = 900 then g.seconds_bucket else -1 end, sum(g.n), max(g.at),
    sum(g.prompt_tokens), sum(g.completion_tokens), sum(g.total_tokens), sum(g.audio_seconds)
  from gone g join lane l on l.id = g.lane_id cross join unnest(array[300, 900, 3600, 21600]) s
  where g.event in ('completed', 'failed', 'attempt_failed', 'cancelled', 'claimed')
    and case when s = 900 then g.event <> 'cancelled' and g.seconds_bucket is not null else g.event <> 'claimed' end
  group by 1, 2, 3, 4, 5, 6, 7, 8
  on conflict (span_seconds, start_at, owner_service, task_type, model_profile, event, category, seconds_bucket) do update set
    n = h.n + excluded.n, last_at = greatest(h.last_at, excluded.last_at),
    prompt_tokens = coalesce(h.prompt_tokens + excluded.prompt_tokens, h.prompt_tokens, excluded.prompt_tokens),
    completion_tokens = coalesce(h.completion_tokens + excluded.completion_tokens, h.completion_tokens, excluded.completion_tokens),
    total_tokens = coalesce(h.total_tokens + excluded.total_tokens, h.total_tokens, excluded.total_tokens),
    audio_seconds = coalesce(h.audio_seconds + excluded.audio_seconds, h.audio_seconds, excluded.audio_seconds)
  )
  select count(*), max(at), (
    select json_agg(json_build_array(event, owner_service, model_profile, category, seconds_bucket, n, prompt, completion, total, audio))::text from (
      select g.event, l.owner_service, l.model_profile, g.category, g.seconds_bucket, sum(g.n) as n, sum(g.prompt_tokens) as prompt,
        sum(g.completion_tokens) as completion, sum(g.total_tokens) as total, sum(g.audio_seconds) as audio
      from gone g join lane l on l.id = g.lane_id group by 1, 2, 3, 4, 5) m)
  into rows_folded, last_at, moves from gone;
  update upkeep_state set folded_at = case when rows_folded < at_most then now() else last_at end;
  delete from history where (span_seconds in (300, 900) and start_at < now() - interval '2 hours')
    or (span_seconds = 3600 and start_at < now() - interval '26 hours') or (span_seconds = 21600 and start_at < now() - interval '8 days');
  more := rows_folded = at_most;
end $$;

-- Lanes without a job for ten minutes are left out of claims and of the cap on combinations until they are used again.
create or replace function idle_lanes() returns void language plpgsql as $$
begin
  if not exists (select from lane l join lane_count c on c.lane_id = l.id
                 where not l.idle and c.moved_at < now() - interval '10 minutes' and (c.ready, c.scheduled, c.running) = (0, 0, 0)) then return; end if;
  if not pg_try_advisory_xact_lock(lock_key(2)) then return; end if;
  update lane l set idle = true from lane_count c
  where c.lane_id = l.id and not l.idle and c.moved_at < now() - interval '10 minutes' and (c.ready, c.scheduled, c.running) = (0, 0, 0)
    and not exists (select from ready r where r.lane_id = l.id) and not exists (select from tally t where t.lane_id = l.id)
    and not exists (select from held h where h.lane_id = l.id) and not exists (select from waiting w where w.lane_id = l.id);
end $$;

-- What every process calls every two seconds; one of them does the work. Bounded: what is left over waits for the next call.
create or replace function upkeep_v1(worker_ids text[], reports text[], ages float8[])
returns table (rescued int, expired int, promoted int) language plpgsql as $$
begin
  insert into worker as w (worker_id, seen_at, report)
  select u.id, now() - u.age * interval '1 second', u.report::json from unnest(worker_ids, reports, ages) u (id, report, age) order by u.id
  on conflict (worker_id) do update set seen_at = greatest(w.seen_at, excluded.seen_at), report = coalesce(excluded.report, w.report);
  if not pg_try_advisory_xact_lock(lock_key(3)) then return; end if;
  rescued := rescue(1000); expired := expire(1000); promoted := promote(1000);
  perform idle_lanes();
  delete from worker where seen_at < now() - interval '5 minutes';
  return next;
end $$;

-- Partitions for what comes: job, ended and attempt_ended by id with the same borders, claim by day; the name ends with the border in seconds.
-- Made while half of the last one is still to come. Where rows lie in a default partition beyond the last border (the service was away, or the
-- clock went back), the next partition begins a minute after them and they stay. The caller sets a short lock_timeout.
create or replace function add_partition(parents text[], width interval) returns void language plpgsql as $$
declare last_end timestamptz; first_at timestamptz; stray timestamptz; by_id boolean := parents <> array['claim']; parent text;
begin
  select max(b.border) into last_end from partition_borders(parents[1]) b;
  if last_end > now() + width / 2 then return; end if;
  first_at := coalesce(last_end, date_trunc('second', now()));
  execute format('select %s from %I where %I >= %L order by %3$I desc limit 1',
    case when by_id then $e$to_timestamp(('x' || substr(replace(id::text, '-', ''), 1, 12))::bit(48)::bigint / 1000.0)$e$ else 'made_at' end,
    parents[1] || '_default', case when by_id then 'id' else 'made_at' end,
    case when by_id then uuid_v7_floor(first_at)::text else first_at::text end) into stray;
  if stray is not null then first_at := date_trunc('second', greatest(first_at, stray, now())) + interval '1 minute'; end if;
  last_end := date_trunc('second', greatest(first_at, now()) + width);
  foreach parent in array parents loop
    execute format('create table %I partition of %I for values from (%L) to (%L)', parent || '_' || extract(epoch from last_end)::bigint, parent,
      case when by_id then uuid_v7_floor(first_at)::text else first_at::text end,
      case when by_id then uuid_v7_floor(last_end)::text else last_end::text end);
  end loop;
end $$;

create or replace function partition_borders(parent text) returns table (name text, border timestamptz) language sql stable as $$
  select c.relname::text, to_timestamp(substring(c.relname from '_(\d+)$')::bigint)
  from pg_inherits i join pg_class c on c.oid = i.inhrelid where i.inhparent = parent::regclass and c.relname ~ '_\d+$'
$$;

create or replace function add_partitions_v1(width interval) returns void language plpgsql as $$
begin
  if not pg_try_advisory_xact_lock(lock_key(5)) then return; end if;
  perform add_partition(array['job', 'ended', 'attempt_ended'], width);
  perform add_partition(array['claim'], interval '1 day');
end $$;

-- Detaches the oldest partition that lies wholly before the cutoff, and puts back (into the default partition) what must stay: jobs that live
-- or finished after it. Tells which it was, and which ones had to be left since too much in them must stay: more than 5,000 jobs or 64 MB. The
-- caller sets a short lock_timeout: nobody waits behind this for long. First nothing may end in that partition any more, then it is searched,
-- and only then the parents are locked: what has moved by then stands in ready, waiting or held.
create or replace function retire_partition_v1(retention interval) returns table (retired text, left_alone text[]) language plpgsql as $$
#variable_conflict use_column
declare old text; border_ timestamptz; cutoff timestamptz := now() - retention; keep uuid[]; part text; bytes bigint;
begin
  left_alone := '{}';
  if not pg_try_advisory_xact_lock(lock_key(5)) then return; end if;
  select b.name into retired from partition_borders('claim') b where b.border < now() - interval '2 days' order by b.border limit 1;
  if found then
    execute format('drop table %I', retired);
    return next;
    return;
  end if;
  for old, border_ in
    select substring(b.name from '_(\d+)$'), b.border from partition_borders('job') b where b.border < cutoff order by b.border
  loop
    execute format('lock table %I in share mode', 'ended_' || old);
    keep := living_in('job_' || old, border_, 5001);
    if cardinality(keep) <= 5000 then
      execute format('select $1 || array(select job_id from %I where finished_at > $2 limit 5001)', 'ended_' || old) into keep using keep, cutoff;
      execute format('select coalesce(sum(j.input_bytes), 0) + coalesce(sum(pg_column_size(e.result)), 0) from %I j left join %I e on e.job_id = j.id
        where j.id = any ($1)', 'job_' || old, 'ended_' || old) into bytes using keep;
    end if;
    if cardinality(keep) > 5000 or bytes > 64 * 1024 * 1024 then
      left_alone := left_alone || ('job_' || old);
      continue;
    end if;
    lock table job, ended, attempt_ended in access exclusive mode;
    keep := keep || living_in('job_' || old, border_, 10000);
    foreach part in array array['job', 'ended', 'attempt_ended'] loop
      execute format('alter table %I detach partition %I', part, part || '_' || old);
      execute format('insert into %I select * from %I where %I = any ($1)', part, part || '_' || old, case part when 'job' then 'id' else 'job_id' end) using keep;
      execute format('alter table %I rename to %I', part || '_' || old, 'retired_' || part || '_' || old);
    end loop;
    retired := 'job_' || old;
    exit;
  end loop;
  return next;
end $$;

-- Jobs of a partition that have not ended, at most so many.
create or replace function living_in(part text, border timestamptz, at_most int) returns uuid[] language plpgsql as $$
declare found_ids uuid[];
begin
  execute format('select array(
    select l.job_id from (
      select job_id from ready where job_id < $1 union all select job_id from waiting where job_id < $1
      union all select job_id from held where job_id < $1) l
    where exists (select from %I j where j.id = l.job_id) limit $2)', part) into found_ids using uuid_v7_floor(border), at_most;
  return found_ids;
end $$;

-- Frees the keys of a detached partition, so many at a time, and drops it when none is left; then clears what is past the cutoff in the default
-- partitions. Returns false when there was nothing to do.
create or replace function clear_retired_v1(retention interval, at_most int) returns boolean language plpgsql as $$
declare old text; batch record; gone uuid[];
begin
  if not pg_try_advisory_xact_lock(lock_key(5)) then return false; end if;
  select substring(tablename from '_(\d+)$') into old from pg_tables
  where schemaname = current_schema() and tablename ~ '^retired_job_\d+$' order by tablename limit 1;
  if found then
    execute format('select array_agg(id) as ids, max(id::text)::uuid as last from (select id from %I where id > coalesce((select retiring_after from upkeep_state), $1) order by id limit $2) x',
      'retired_job_' || old) into batch using '00000000-0000-0000-0000-000000000000'::uuid, at_most;
    if batch.ids is null then
      execute format('drop table %I, %I, %I', 'retired_job_' || old, 'retired_ended_' || old, 'retired_attempt_ended_' || old);
      update upkeep_state set retiring_after = null;
    else
      execute format('delete from idempotency i using %I j, lane l where j.id = any ($1) and l.id = j.lane_id and i.owner_service = l.owner_service
        and i.key = j.idempotency_key and i.job_id = j.id and not exists (select from job where id = j.id)', 'retired_job_' || old) using batch.ids;
      update upkeep_state set retiring_after = batch.last;
    end if;
    return true;
  end if;
  gone := array(select job_id from ended_default where finished_at < now() - retention limit at_most);
  delete from idempotency i using job_default j, lane l
  where j.id = any (gone) and l.id = j.lane_id and i.owner_service = l.owner_service and i.key = j.idempotency_key and i.job_id = j.id;
  delete from attempt_ended where job_id = any (gone);
  delete from ended where job_id = any (gone);
  delete from job where id = any (gone);
  return cardinality(gone) = at_most;
end $$;


-- ── Plans ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

-- These functions do not leave their plans to statistics, which are always out of date on tables
-- that fill and empty all the time.
-- The loop comes last, because `create or replace function` removes the settings of a function.
do $plans$
declare f regprocedure;
begin
  for f in
    select oid from pg_proc
    where pronamespace = current_schema()::regnamespace and proname = any (array[
      'ids_by_key', 'create_jobs_v1', 'create_jobs_v2', 'claim_jobs_v1', 'claimed_texts_v1',
      'peek_v1', 'heartbeat_jobs_v1', 'complete_jobs_v1', 'end_attempts',
      'fail_jobs_v1', 'release_jobs_v1', 'retry_jobs_v1', 'cancel_job_v1',
      'delete_job_v1', 'job_texts_v1', 'upkeep_v1'])
  loop
    execute format('alter function %s set enable_seqscan = off set enable_hashjoin = off
      set enable_mergejoin = off set plan_cache_mode = force_generic_plan', f);
  end loop;
end $plans$;
