#!/usr/bin/env bash
# Submits one job, waits for it, and prints its result: caller.py with curl and jq.
#
#   export AI_SERVICE_URL=http://127.0.0.1:8080 AI_SERVICE_TOKEN=…
#   ./caller.sh beeline/17 "Summarise: the caller asks for the invoice."
#
# Exit codes: 0 the job completed, its result is on the output; 1 it failed or was cancelled; 2 the
# request was rejected; 3 the service could not be reached for RETRY_SECONDS (30); 4 the job has not
# finished within TIMEOUT_SECONDS (600).
set -euo pipefail
[ $# = 2 ] || { echo "usage: caller.sh REFERENCE PROMPT" >&2; exit 2; }

jobs=${AI_SERVICE_URL:-http://127.0.0.1:8080}/api/v1/jobs
deadline=$((SECONDS + ${TIMEOUT_SECONDS:-600}))
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

# call CURL-ARGUMENTS…: the answer's body on the output. The token goes in by a file descriptor, so that `ps` does not show it.
# A lost answer, 429 and 5xx are met by the same call again: it has an idempotency key, or reads only.
call() {
  local status give_up=$((SECONDS + ${RETRY_SECONDS:-30}))
  while :; do
    status=$(curl -sS --max-time 90 -o "$folder/answer" -w '%{http_code}' -K <(printf 'header = "Authorization: Bearer %s"\n' "${AI_SERVICE_TOKEN:-none}") \
      -H 'Content-Type: application/json' "$@") || status=000
    case $status in
      2??) cat "$folder/answer"; return 0 ;;
      000 | 429 | 5??) [ $SECONDS -lt $give_up ] || { echo "no answer from $jobs (status $status)" >&2; return 3; }; sleep 1 ;;
      *) jq -r '"\(.status) \(.code): \(.detail // .title) \(.errors // "")"' "$folder/answer" >&2 || echo "refused with $status" >&2; return 2 ;;
    esac
  done
}

# jq makes JSON of any text: quotes, line ends and backslashes in it are no trouble.
jq -n --arg reference "$1" --arg prompt "$2" --arg profile "${LLM_MODEL:-qwen2.5-14b}" '{
  owner_service: "telephony", owner_ref: $reference, task_type: "call_analysis", model_profile: $profile,
  input: {prompt: $prompt}, idempotency_key: "\($reference)/summary/1"}' >"$folder/request"
job=$(call "$jobs" --data-binary @"$folder/request")
id=$(jq -r .id <<<"$job")

until jq -e '.status | IN("completed", "failed", "cancelled")' <<<"$job" >/dev/null; do
  left=$((deadline - SECONDS))
  [ $left -gt 0 ] || { echo "job $id has not finished; ask again later" >&2; exit 4; }
  sleep 0.2 # a service that is about to stop answers at once
  job=$(call "$jobs/$id?wait_seconds=$((left < 60 ? left : 60))")
done

if [ "$(jq -r .status <<<"$job")" = completed ]; then
  jq -c .result <<<"$job"
else
  jq -r '"job \(.id) \(.status): \(.error.category // "-"), \(.error.message // "")"' <<<"$job" >&2
  exit 1
fi
