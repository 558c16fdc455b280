"""Limits of the API that the service enforces and the worker keeps to.

Those that a provider has to know are in `providers`.
"""

MAX_ITEMS = 1_000
"""How many jobs a claim, a bulk call or one round of a bulk retry may have."""
MAX_REPORT_BYTES = 8_192
"""How long the JSON of a worker's report may be."""
MIN_LEASE_SECONDS, MAX_LEASE_SECONDS = 5, 86_400
