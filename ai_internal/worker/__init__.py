"""What `ai-service worker` is built from. It imports nothing of the server: a worker needs no PostgreSQL."""
