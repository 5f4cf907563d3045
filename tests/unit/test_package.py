"""The package itself: its names, and that it imports JAX only when needed."""

import ast
import inspect
import subprocess
import sys

import jax_deepep as ep

# In a separate process, which has not imported JAX.
WITHOUT_JAX = """
import os, sys, warnings
os.sched_getaffinity = lambda pid: {0}
os.environ.pop("NPROC", None)
os.environ.update(XLA_FLAGS="", JAX_NUM_CPU_DEVICES="3")
import jax_deepep as ep
assert os.environ["NPROC"] == "6"
import jax_deepep.launch.__main__, jax_deepep.launch_variables
loaded = {"jax", "numpy", "flax"} & set(sys.modules)
assert not loaded, loaded
assert ep.group_limited_topk is ep.gating.group_limited_topk
warnings.simplefilter("error", DeprecationWarning)
assert ep.moe.moe and ep.balancing and ep.Communicator and ep.__version__
assert "jax" in sys.modules and "flax" not in sys.modules
assert "jax.experimental.pallas.triton" not in sys.modules  # JAX 0.12 deprecates it: only where it is used
warnings.resetwarnings()
assert ep.flax.MoE
"""


def test_the_launcher_imports_no_jax_and_names_are_loaded_when_used() -> None:
    run = subprocess.run([sys.executable, "-c", WITHOUT_JAX], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


def test_type_checkers_and_programs_see_the_same_names() -> None:
    [block] = [node for node in ast.parse(inspect.getsource(ep)).body if isinstance(node, ast.If)]
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    declared = {alias.asname: (node.module, alias.name) for node in imports for alias in node.names}
    assert {*declared, "__version__"} == set(dir(ep)) == {*ep.__all__, "flax", "__version__"}
    for name, (module, original) in declared.items():
        assert getattr(ep, name) is getattr(sys.modules[str(module)], original)
    assert not hasattr(ep, "no_such_name")
