"""The Tilewave HTTP service: HTTP, batching and models. It knows nothing of kernels."""

__version__ = "0.1.0"
