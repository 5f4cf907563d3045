"""The bench on GPUs, a process per rank: time on the device, against floors in the same run.

    python -m jax_deepep.launch -n N --share-gpu -- python -m jax_deepep.bench

The modules, in the order of a run: `command_line`, `routed_inputs` (what is measured), `ops_under_test`
(our ops as functions of one device), `floors` (plain kernels that move the same rows), `rounds` (how a
program becomes seconds), `measurement` (one problem with one number of SMs), `rival` (XLA's own
collective), `report`.
"""
