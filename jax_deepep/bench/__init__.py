"""`python -m jax_deepep.bench ops | moe | routing`: how fast ops and layers are, beside baselines.

__main__    the commands                       problem      what is measured: shape and inputs
ops         ops, with op_cases                 trials       interleaved trials, and how they become seconds
moe         layers, with layers, kernel_trace  report       results as tables, JSON and a plot
routing     where rows go                      environment  the machine, and what numbers depend on
baselines/  memcpy, plain kernels that move the same rows, limits of links, XLA's own collective
"""
