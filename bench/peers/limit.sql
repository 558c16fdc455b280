-- What the database alone can do here: one table, and a function that creates, takes and finishes 100 jobs in one transaction.
create table job (
  id uuid primary key default gen_random_uuid(), state int not null default 0, profile text not null, run_at timestamptz not null default now(),
  worker text, attempt int not null default 0, lease_until timestamptz, input json not null, result json, finished_at timestamptz);
create index job_to_take on job (profile, run_at, id) where state = 0;
create index job_by_lease on job (lease_until) where state = 1;
create function cycle() returns void language plpgsql as $$
declare taken uuid[];
begin
  insert into job (profile, input) select 'p', json_build_object('text', repeat('x', 970)) from generate_series(1, 100);
  with mine as (
    update job set state = 1, worker = 'w', attempt = attempt + 1, lease_until = now() + interval '15 minutes'
    where id = any (array(select id from job where state = 0 and profile = 'p' order by run_at, id limit 100 for update skip locked)) returning id)
  select array_agg(id) into taken from mine;
  update job set state = 2, lease_until = null, finished_at = now(), result = json_build_object('text', repeat('y', 1900)) where id = any (taken);
end $$;
