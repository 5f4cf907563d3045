"""The module for GPUs on machines that have none: built where possible, and with unsupported reasons."""

import os
import pathlib
import re
import shutil
import subprocess
from types import ModuleType

import jax
import jax.numpy as jnp
import pytest
from meshes import mesh_named

import jax_deepep as ep
from jax_deepep.communicator import native_module


def nvcc_version() -> tuple[int, int] | None:
    """Return the version of the nvcc that a build finds here first, or None."""
    home = os.environ.get("CUDA_HOME", "/nowhere")
    for name in (os.environ.get("CUDACXX"), f"{home}/bin/nvcc", "nvcc", "/usr/local/cuda/bin/nvcc"):
        if name and (found := shutil.which(name)):
            banner = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=60).stdout
            if version := re.search(r"release (\d+)\.(\d+)", banner):
                return int(version[1]), int(version[2])
    return None


@pytest.fixture
def module() -> ModuleType:
    version = nvcc_version()
    if native_module.unsupported_reason("cuda") and (version is None or version < (12, 3)):
        pytest.skip(
            "needs the module for GPUs; there is no nvcc of 12.3 or newer here that would have built it"
        )
    if os.environ.get("JAX_DEEPEP_BUILD_CUDA") == "0":
        pytest.skip("needs the module for GPUs; JAX_DEEPEP_BUILD_CUDA=0 keeps it from being built")
    return native_module.load("cuda")


def test_it_was_built_where_there_is_nvcc(module: ModuleType) -> None:
    assert pathlib.Path(module.__file__).name.startswith("_cuda")
    assert set(native_module.load("cpu").targets()) <= set(module.targets())


def test_ops_on_cpu_work_with_it_loaded(module: ModuleType) -> None:
    comm = ep.Communicator(
        mesh_named("one device"), num_experts=2, num_experts_per_tok=1, max_tokens=3, hidden_size=4
    )
    x, weights = jnp.ones((3, 4)), jnp.ones((3, 1))
    dispatched, _ = ep.dispatch(x, jnp.array([[0], [1], [1]]), weights, comm=comm)
    assert dispatched.num_rows.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"num_ranks": 73, "num_experts": 73}, "expected EP groups of at most 72 devices, got 73"),
        ({"num_experts": 66, "num_topk": 33}, "expected num_experts_per_tok of at most 32, got 33"),
    ],
    ids=["ranks", "experts per token"],
)
def test_sizes_that_kernels_do_not_support(module: ModuleType, sizes: dict, words: str) -> None:
    """Reported before any device is used, and again by the communicator."""
    sizes = {"num_ranks": 2, "num_experts": 8, "num_topk": 2, **sizes}
    limits = {"max_tokens": 1, "window": (0, 0)}
    assert re.search(words, module.unsupported_reason(**sizes, **limits, device=(0, 0), limit_bytes=1))
    with pytest.raises(RuntimeError, match=words):
        module.Communicator(
            id=-1, fingerprint=0, locations=[], process=0, num_groups=1, hidden_size=1,
            ranks_per_node=0, timeout_s=1.0, devices=[], num_sms=0, between_hosts=False, **sizes, **limits,
        )  # fmt: skip


@pytest.mark.skipif(
    any(device.platform == "gpu" for device in jax.devices()), reason="is about machines without a GPU"
)
def test_no_driver_is_an_unsupported_reason(module: ModuleType) -> None:
    sizes = {"num_ranks": 2, "num_experts": 8, "num_topk": 2, "max_tokens": 1}
    text = module.unsupported_reason(**sizes, device=(0, 0), limit_bytes=1, window=(1, 16))
    assert text.startswith("GPU 0 cannot be queried")
