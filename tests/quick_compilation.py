"""Flags of XLA for quick compilation: most programs run only once here.

LLVM's optimisation would take most of the time, and on GPUs the timing of candidates for every matmul. XLA's
own passes are unchanged, and so are our own ops, which are already compiled. Splitting a program for several
threads of LLVM costs more than it saves. Most of the rest is MLIR, unless XLA can emit
fusions without it: that of JAX 0.10 can. A flag that XLA does not know ends the process.
"""

from importlib.metadata import version

QUICK_COMPILATION = " ".join(
    [
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_gpu_autotune_level=0",
        "--xla_cpu_parallel_codegen_split_count=1",
        *(["--xla_cpu_use_fusion_emitters=false"] if version("jaxlib").startswith("0.10.") else []),
    ]
)
