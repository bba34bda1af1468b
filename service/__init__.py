"""The Tilewave HTTP service."""
