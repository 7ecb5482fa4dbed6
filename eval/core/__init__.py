"""What the benchmarks share: the types, the files, the statistics."""
