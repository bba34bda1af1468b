"""What runs on an NVIDIA GPU. Needs the extra `cuda`, and for the peers PyTorch, timm and transformers."""
