"""Tests of the HTTP service, against a small engine of our own (fakes.py) and, where models are built, the real one."""
