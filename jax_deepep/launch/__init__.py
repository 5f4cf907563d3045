"""Start one JAX program as many processes: `python -m jax_deepep.launch -n 8 -- python train.py`.

The launcher itself is `__main__`; a program that runs under it needs nothing from here, since a bare
`jax.distributed.initialize()` finds its place. A program that wants to know its rank before
JAX looks for devices asks `launched_rank()`.
"""

from jax_deepep.launch.rank_environment import LaunchedRank as LaunchedRank
from jax_deepep.launch.rank_environment import launched_rank as launched_rank
