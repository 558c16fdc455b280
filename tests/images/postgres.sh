# What is used here of the official image: a database, made at the first start with the user and password it is given, served on all
# addresses; `postgres -c …` passes settings.
set -eu
user=${POSTGRES_USER:-postgres}
bin=$(dirname "$(find /usr/lib/postgresql -name initdb)")
if [ ! -e "$PGDATA/PG_VERSION" ]; then
  password=$(mktemp)
  printf %s "$POSTGRES_PASSWORD" > "$password"
  "$bin/initdb" --auth-host=scram-sha-256 --auth-local=trust --encoding=UTF8 --username="$user" --pwfile="$password" -D "$PGDATA"
  rm "$password"
  echo "host all all all scram-sha-256" >> "$PGDATA/pg_hba.conf"
  [ "${POSTGRES_DB:-postgres}" = postgres ] || echo "create database $POSTGRES_DB" | "$bin/postgres" --single -D "$PGDATA" postgres
fi
shift
exec "$bin/postgres" -D "$PGDATA" -c listen_addresses='*' -c unix_socket_directories=/tmp "$@"
