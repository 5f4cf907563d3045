"""What ops are compared with in the same run.

memcpy               CPU: a copy of as many bytes by all cores
rows                 GPUs: plain kernels that move, or sum, the same rows with as many SMs; not a limit
links                GPUs with a link between them: rows pushed or pulled by nothing but the link's means
ragged_all_to_all    XLA's own collective, with what a user needs around it
cuda_module          loads the kernels of `rows` and `links`, which are in a module of their own
"""
