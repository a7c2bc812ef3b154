"""Compilation for tests: most of their time is XLA optimising programs that run once on nine rows."""

import functools

import jax

__all__ = ["quick_jit"]

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
