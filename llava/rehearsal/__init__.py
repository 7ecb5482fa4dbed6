"""Rehearsals: torch's CUDA build on a machine without a GPU, to find out before a GPU is rented what would fail there.

A preloaded library stands in for CUDA: torch's dispatcher, argument checks and caching allocator run as on a device of
the memory, name and number given. `python -m llava.rehearsal SCRIPT` starts a script there; inside it,
`llava.rehearsal.mode.NullMode` computes the numbers that are needed and records every wait of the host for the device.
Speed, the numerics of kernels, NCCL, cuDNN, Triton and bitsandbytes cannot be rehearsed.
"""
