"""GPU kernels for language-model inference: arrays in, arrays out.

This package knows JAX and nothing of `dsjax`. A kernel is a folder with its semantics in plain `jnp`, one file a
backend, and one test suite that every backend passes. `pallas_kernels.targets` compiles for a GPU on a machine that has
none.
"""
