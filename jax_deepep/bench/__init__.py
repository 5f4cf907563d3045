"""`python -m jax_deepep.bench ops | moe | routing`: times of ops and layers, compared with baselines.

__main__    the commands                       problem      shape and inputs of a measurement
ops         ops, with op_cases                 trials       interleaved trials and timers
moe         layers, with layers, kernel_trace  report       results as tables, JSON and a plot
routing     where rows go                      environment  machine, versions, command
baselines/  memcpy, plain kernels that move the same rows, limits of links, XLA's own collective
"""
