"""Baselines, measured in the same run as the ops.

memcpy               CPU: a copy of the same number of bytes by all cores
rows                 GPUs: plain kernels that move, or sum, the same rows with as many SMs; not a limit
links                GPUs with a link between them: rows pushed or pulled, and nothing else
ragged_all_to_all    XLA's own collective, with what a user needs around it
clock                the clock of a GPU, in a program: by it chains of ops are timed
cuda_module          loads the kernels of `rows`, `links` and `clock`, which are in a separate module
"""
