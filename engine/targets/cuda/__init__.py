"""The CUDA target: plans run on NVIDIA GPUs (Ampere and newer) in kernels of our own, compiled at run time by NVRTC."""
