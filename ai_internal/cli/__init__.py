"""The commands that a person types: those that ask a running service, and the demo."""
