"""One-sided transports between GPUs: NVSHMEM and PyTorch symmetric memory."""
