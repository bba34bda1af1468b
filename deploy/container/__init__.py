"""The Dockerfile walked through without Docker: `python -m deploy.container` (docs/operations.md)."""
