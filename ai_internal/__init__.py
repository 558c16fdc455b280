"""What the service, the worker and the command line are built from. Everything in it may change with any release.

To run: `ai_service`. To import: `ai_client`, `ai_handover`. To extend: `providers`.
"""
