"""The benchmark of sepconv_ext: ``python -m benchmarks`` (see README.md in this folder)."""
