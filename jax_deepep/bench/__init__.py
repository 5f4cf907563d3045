"""`python -m jax_deepep.bench`: how fast the ops are, natively, in JAX collectives, and against memcpy.

The modules, in the order of a run: `__main__` (the command line), `problems` (what is measured),
`ops_under_test` (the jitted programs), `memcpy_rate` (the floor), `timing` (rounds and percentiles),
`measurement` (one problem from programs to results), `report` (table, Markdown, JSON, plot) with `tables` and
`surroundings` (machine and versions). `gpu` has the bench on GPUs, which runs in several processes.
"""
