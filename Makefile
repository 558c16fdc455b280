# Every target does its own set-up; a machine needs Python 3.11 or newer and make, nothing else.
#
#   make demo     everything once, on sample jobs: embedded PostgreSQL, service, worker; a table of results
#   make run      the same, kept running on http://127.0.0.1:8080; the data stays in DATA
#   make test     the tests
#   make long     the tests that take many seconds each: kills, restarts, releases side by side, the examples, every case of the benchmark
#   make check    lint, types and tests: what CI runs
#   make pyz      all commands in one file, dist/ai-service.pyz (PYZ), with the packages in PLUGINS;
#                 EXTRAS=embedded adds PostgreSQL
#   make .env     random secrets for compose.yaml, once: then `docker compose up --build --detach --wait`
#   make image    the image `ai-service`, by docker or podman (ENGINE), from BASE_IMAGE
#   make test-image  the image and compose.yaml in real containers (Docker, or root to start it; minutes)
#   make lock     pins the packages of the image anew, by version and hash
#   make fuzz     many random settings, model answers and requests: FUZZ_EXAMPLES=2000 of each kind, twelve times as many requests
#   make chaos    20,000 jobs while service processes are killed again and again
#   make rolling  60 restarts behind HAProxy under load; no client may notice (needs haproxy)
#   make model    random sequences of all calls against a model of the contract; MODEL_EXAMPLES, MODEL_STEPS, MODEL_SEED
#   make pgbouncer   the contract's tests through PgBouncer in transaction pooling (needs pgbouncer)
#   make failover    20 times under load the primary is killed and its standby promoted; how long that took
#   make trouble     no connections, a full disk, strangers' locks, wrong clocks (needs root for the disk, and faketime)
#   make fuzz-api   schemathesis against a service with the document at /openapi.json: minutes
#   make bench    how fast the service is over HTTP and how flat as it grows, beside other queues and the database by itself (needs npm)
#   make bench-full   the same with the numbers of jobs that the targets name: an hour
#
# Settings are read from the environment: `LLM_BASE_URL=http://127.0.0.1:8000 make demo` uses a real model server.

PYTHON ?= python3
VENV   ?= .venv
DATA   ?= .data
TESTS  ?= -n 3
PYZ    ?= dist/ai-service.pyz

.DEFAULT_GOAL := help
.PHONY: FORCE help demo run test long lint format types check pyz fuzz lock chaos image test-image
.PHONY: fuzz-api pgbouncer failover trouble model rolling bench bench-full clean

help:
	@sed -n 's/^#   //p' Makefile

demo: $(VENV)/.embedded
	@$(VENV)/bin/ai-service demo

run: $(VENV)/.embedded
	@exec $(VENV)/bin/python -m ai_internal.cli.demo run $(DATA)

test: $(VENV)/.ready
	$(VENV)/bin/python -m pytest $(TESTS) -m "not long"

long: $(VENV)/.ready
	BENCH_ALL=1 $(VENV)/bin/python -m pytest $(TESTS) -m long

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports --no-cache

format: $(VENV)/.ready
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

types: $(VENV)/.ready
	$(VENV)/bin/mypy

check: lint types test

pyz: $(VENV)/.pyz
	$(VENV)/bin/python .ci/pyz $(PYZ) '.$(EXTRAS:%=[%])' $(PLUGINS)

# For every platform and Python at once, newest releases; review what changes. The project's own requirements stay in pyproject.toml.
LOCK = $(VENV)/bin/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-header --no-annotate
lock: $(VENV)/.ready
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check 'uv>=0.9,<1'
	$(LOCK) pyproject.toml --output-file requirements.lock
	$(VENV)/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' \
	  | $(LOCK) - --output-file requirements-build.lock

fuzz: $(VENV)/.ready
	FUZZ_EXAMPLES=$${FUZZ_EXAMPLES:-2000} $(VENV)/bin/python -m pytest -s $(TESTS) tests/test_fuzz.py

chaos: $(VENV)/.ready
	CHAOS_JOBS=20000 $(VENV)/bin/python -m pytest -s tests/test_chaos.py

rolling: $(VENV)/.ready
	ROLLING_RESTARTS=$${ROLLING_RESTARTS:-60} $(VENV)/bin/python -m pytest -s tests/test_rolling.py

model: $(VENV)/.ready
	MODEL_EXAMPLES=$${MODEL_EXAMPLES:-400} MODEL_STEPS=$${MODEL_STEPS:-60} $(VENV)/bin/python -m pytest -s tests/test_model.py

# What the contract says of one job and many; the other tests look at the database or at processes.
POOLED = states claim finish repeats create listing payloads stats waiting group_commit bad_input pgbouncer

pgbouncer: $(VENV)/.ready
	TEST_POOL_MODE=transaction $(VENV)/bin/python -m pytest $(TESTS) $(POOLED:%=tests/test_%.py)

failover: $(VENV)/.ready
	FAILOVER_ROUNDS=$${FAILOVER_ROUNDS:-20} $(VENV)/bin/python -m pytest -s tests/test_failover.py

trouble: $(VENV)/.ready
	TROUBLE_ALL=1 $(VENV)/bin/python -m pytest $(TESTS) tests/test_trouble.py

fuzz-api: $(VENV)/.ready
	FUZZ_EXAMPLES=100 $(VENV)/bin/python -m pytest -s tests/test_openapi.py -k schemathesis

# Procrastinate first, beside the workers it is compared with: its rate doubles while anything else keeps the machine awake.
PEERS = procrastinate,graphile,pgbench,pgqueuer,pgboss,awa

bench: $(VENV)/.ready
	$(VENV)/bin/python bench/run.py --scale 0.1 --seconds 4 --jobs 10000 --peers $(PEERS) --json bench.json

bench-full: $(VENV)/.ready
	$(VENV)/bin/python bench/run.py --scale 1 --seconds 15 --jobs 50000 --peers $(PEERS) --json bench-full.json

ENGINE ?= $(or $(shell command -v docker),podman)
VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)

# As Docker's format: the other one has no HEALTHCHECK, and podman would drop it.
image:
	$(ENGINE) build $(if $(findstring podman,$(ENGINE)),--format docker) $(BUILD_OPTIONS) $(BASE_IMAGE:%=--build-arg BASE_IMAGE=%) \
	  --label org.opencontainers.image.version=$(VERSION) -f Containerfile -t ai-service .

test-image: $(VENV)/.ready
	.ci/containers $(VENV)/bin/python

# The file of tokens is read by the user of the container, who is somebody else: what protects it is its folder.
.env:
	@umask 077; secret() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }; operator=$$(secret); worker=$$(secret); \
	mkdir -p secrets && rm -f secrets/api_tokens \
	&& printf 'operator=operator=%s\nworker=worker=%s\n' "$$operator" "$$worker" > secrets/api_tokens && chmod 444 secrets/api_tokens \
	&& printf '%s\n' "POSTGRES_PASSWORD=$$(secret)" "OPERATOR_TOKEN=$$operator" "WORKER_TOKEN=$$worker" \
	  '# A stand-in answers in the place of a model, and says so. With a model server: its address here, and no profile demo.' \
	  'COMPOSE_PROFILES=demo' 'LLM_BASE_URL=http://models:8000' > .env

# The environment. Each stamp stands for an extra of pyproject.toml: a demo needs far less than the
# tests, and the tests need all. Modules are compiled when they are first imported: most never are.
INSTALL = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile
SETTING_UP = @echo "Setting up $(VENV) (once, and again when pyproject.toml changes) …"

$(VENV)/.embedded $(VENV)/.pyz: $(VENV)/.%: pyproject.toml $(VENV)/.python
	$(SETTING_UP)
	@$(INSTALL) --editable '.[$*]'
	@touch $@

$(VENV)/.ready: pyproject.toml $(VENV)/.python
	$(SETTING_UP)
	@$(INSTALL) --editable '.[test]'
	@touch $(VENV)/.embedded $(VENV)/.pyz $@

# Made anew when its Python is gone or was replaced by another release, or is not the PYTHON given.
$(VENV)/.python: FORCE
	@has=$$($(VENV)/bin/python -c 'import pip, sys; print(sys.version)' 2>/dev/null) || has=; \
	if [ -z "$$has" ] || [ '$(origin PYTHON)' != file ]; then \
	  wanted=$$($(PYTHON) -c 'import sys; print(sys.version_info >= (3, 11) and sys.version)') \
	    || { echo "$(PYTHON) does not run (its error is above): $(NAME_ANOTHER)" >&2; exit 1; }; \
	  [ "$$wanted" != False ] \
	    || { echo "AI Service needs Python 3.11 or newer; $(PYTHON) is not: $(NAME_ANOTHER)" >&2; \
	         exit 1; }; \
	  [ "$$has" = "$$wanted" ] || { $(NEW_ENVIRONMENT); } || exit 1; \
	fi; \
	test -e $@ || touch $@

NAME_ANOTHER = make PYTHON=/path/to/python3.11 …
# The pip of PYTHON, where it has one, takes a third of the time of ensurepip, which compiles all.
NEW_ENVIRONMENT = $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
  || { echo "$(PYTHON) cannot make virtual environments;" \
            "on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }; \
  $(PYTHON) -m venv --clear --without-pip $(VENV) || exit 1; \
  $(PYTHON) -m pip --python $(VENV)/bin/python install --quiet --no-compile 'pip>=23,<27' \
    >/dev/null 2>&1 || $(VENV)/bin/python -m ensurepip --default-pip >/dev/null

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
