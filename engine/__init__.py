"""The Tilewave inference engine."""
