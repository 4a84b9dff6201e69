"""Triton kernels: for GPUs of people who installed without nvcc. Each module is imported when it is first used."""
