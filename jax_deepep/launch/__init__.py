"""Start one JAX program as many processes: `python -m jax_deepep.launch -n 8 -- python train.py`.

The launcher itself is `__main__`, which does not import JAX; a program that runs under it needs nothing from
here, since a bare `jax.distributed.initialize()` finds its rank. `launched_rank()` returns it before JAX
looks for devices. `hosts/` is for jobs of several hosts, `inside_rank/` runs in ranks.
"""

from jax_deepep.launch.rank_identity import LaunchedRank as LaunchedRank
from jax_deepep.launch.rank_identity import launched_rank as launched_rank
