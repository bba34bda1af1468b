"""What runs on the CPU beside ONNX Runtime, both with the same number of threads."""
