"""The benchmarks, one module per benchmark: load, prompt, parse, score."""
