"""Every private or version-dependent JAX name that the package uses, in one place.

Supported: JAX 0.10.2 (the last for Python 3.11) to JAX 0.12 (Python 3.12), whose tests run in CI on both.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax._src import config as _config
from jax._src import core as _core
from jax._src import dispatch as _dispatch
from jax._src import distributed as _distributed
from jax._src import monitoring as _monitoring
from jax._src import xla_bridge as _xla_bridge
from jax._src.interpreters import partial_eval as _partial_eval
from jax.extend.core import Primitive as Primitive
from jax.interpreters import ad as ad
from jax.interpreters import batching as batching
from jax.interpreters import mlir as mlir
from jax.sharding import Mesh

ShapedArray = _core.ShapedArray


def apply_primitive(primitive: Primitive, *args: Any, **params: Any) -> Any:
    """Run a primitive outside of any transformation, by compiling it alone."""
    return _dispatch.apply_primitive(primitive, *args, **params)


def keep_listeners(scalar: Callable[..., None], duration: Callable[..., None]) -> None:
    """Register listeners to scalar and duration events of JAX, unless they are registered."""
    if scalar not in _monitoring.get_scalar_listeners():
        _monitoring.register_scalar_listener(scalar)
    if duration not in _monitoring.get_event_duration_listeners():
        _monitoring.register_event_duration_secs_listener(duration)


@contextmanager
def without_cached_programs() -> Iterator[None]:
    """Let this thread compile every program itself: JAX's persistent cache neither gets nor gives one.

    With metadata in its key, no program is found that an older version wrote.
    """
    with (
        _config.compilation_cache_include_metadata_in_key(True),
        _config.persistent_cache_min_compile_time_secs(float("inf")),
        _config.share_binary_between_hosts(False),
    ):
        yield


def register_dce_rule(
    primitive: Primitive, rule: Callable[[list[bool], Any], tuple[list[bool], Any]]
) -> None:
    """Define what remains of an equation of which only some results are used.

    Args:
        primitive: of the equation.
        rule: (which results are used, the equation) → (which operands are used then, the equation that
            computes the used results from them).
    """
    _partial_eval.dce_rules[primitive] = lambda used, *others: rule(used, others[-1])


def backends_are_initialized() -> bool:
    """Return whether JAX has initialised its backends."""
    return _xla_bridge.backends_are_initialized()


def coordination_client() -> Any:
    """Return the client of JAX's coordination service: a key-value store between processes.

    Raises:
        RuntimeError: `jax.distributed.initialize()` was not called.
    """
    client = _distributed.global_state.client
    if client is None:
        raise RuntimeError("jax.distributed.initialize() must be called first, in every process")
    return client


def coordinator_address() -> str:
    """Return the address of JAX's coordination service, "host:port".

    Raises:
        RuntimeError: `jax.distributed.initialize()` was not called.
    """
    coordination_client()
    return str(_distributed.global_state.coordinator_address)


def is_tracing() -> bool:
    """Return whether a transformation such as jit traces the calling code."""
    return not _core.trace_state_clean()


def platform_of(device: jax.Device) -> str:
    """Return "cpu", "cuda", "rocm" or "tpu": JAX calls both kinds of GPU "gpu"."""
    if device.platform != "gpu":
        return device.platform
    return "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"


def manual_axes() -> tuple[str, ...]:
    """Return the mesh axes that are manual here, that is, inside `shard_map`."""
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def axis_sizes_here() -> dict[str, int]:
    """Return name and size of the mesh axes in scope; empty outside of any mesh."""
    return dict(jax.sharding.get_abstract_mesh().shape)


def mesh_of_lowering(ctx: Any) -> Mesh | None:
    """Return the mesh of the `shard_map` that a primitive is lowered in, or None if it has no devices."""
    mesh = getattr(ctx.module_context.axis_context, "mesh", None)
    return mesh if isinstance(mesh, Mesh) else None


def platforms_of_lowering(ctx: Any) -> tuple[str, ...]:
    """Return the platforms that a primitive is lowered for, such as ("cuda",)."""
    return tuple(ctx.platforms or ctx.module_context.platforms)


def is_for_export(ctx: Any) -> bool:
    """Return whether a primitive is lowered for `jax.export`."""
    return bool(ctx.module_context.lowering_parameters.for_export)


def is_partitioned(ctx: Any) -> bool:
    """Return whether XLA may divide what a primitive is lowered to among devices."""
    context = ctx.module_context.axis_context
    mesh = getattr(context, "mesh", None)
    if mesh is None:
        return getattr(context, "num_devices", 1) > 1
    return any(mesh.shape[axis] > 1 for axis in mesh.axis_names if axis not in context.manual_axes)


def index_in_program(ctx: Any, kind: str) -> int:
    """Return how many calls of a `kind` were lowered before this one in its program (an MLIR module)."""
    # The dictionary belongs to the module, whichever mesh axes are manual at the call.
    counters = ctx.module_context.cached_primitive_lowerings
    return next(counters.setdefault(("calls of", kind), itertools.count()))


def current_trace() -> Any:
    """Return what is equal wherever the same function is being traced."""
    return _core.get_opaque_trace_state()


def last_in_block(ctx: Any, key: Any) -> dict[str, Any]:
    """Return what lowering rules keep under `key` for the MLIR block in which they insert operations."""
    block = mlir.ir.InsertionPoint.current.block
    kept: dict[str, Any] = ctx.module_context.cached_primitive_lowerings.setdefault(
        ("last in block", block, key), {}
    )
    return kept


def varying_axes(value: Any) -> frozenset[str]:
    """Return the manual axes along which `value` may differ between devices."""
    return frozenset(jax.typeof(value).manual_axis_type.varying)


def as_varying(value: Any, axes: frozenset[str]) -> Any:
    """Mark `value` as differing along `axes` too; its gradient is then summed over the added ones.

    Without replication checks (`shard_map(..., check_vma=False)`) this changes nothing.
    """
    missing = axes - varying_axes(value)
    ordered = tuple(name for name in manual_axes() if name in missing)
    return jax.lax.pcast(value, ordered, to="varying") if ordered else value


def array_like(aval: ShapedArray, shape: tuple[int, ...], dtype: Any) -> ShapedArray:
    """Return the type of an array that varies over the mesh like `aval`."""
    return _like(aval, shape, dtype, (None,) * len(shape))


def with_last_axis(aval: ShapedArray, size: int, dtype: Any) -> ShapedArray:
    """Return the type of an array with another last axis, sharded and varying over the mesh like `aval`."""
    return _like(aval, (*aval.shape[:-1], size), dtype, (*aval.sharding.spec[:-1], None))


def _like(aval: ShapedArray, shape: tuple[int, ...], dtype: Any, spec: tuple[Any, ...]) -> ShapedArray:
    sharding = aval.sharding.update(spec=jax.sharding.PartitionSpec(*spec))
    return aval.update(shape=shape, dtype=jax.numpy.dtype(dtype), weak_type=False, sharding=sharding)


def shape_like(value: jax.Array, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """Return the type of a kernel's result that varies over the mesh like `value`, of its dtype."""
    return jax.ShapeDtypeStruct(shape, value.dtype, manual_axis_type=jax.typeof(value).manual_axis_type)


def pallas_triton() -> Any:
    """Return the Triton backend of Pallas, which JAX 0.12 deprecates; None where JAX has none."""
    try:
        from jax.experimental.pallas import triton
    except ImportError:
        return None
    return triton


def pallas_mosaic_gpu() -> Any:
    """Return the Mosaic backend of Pallas for NVIDIA GPUs; None where JAX has none."""
    try:
        from jax.experimental.pallas import mosaic_gpu
    except ImportError:
        return None
    return mosaic_gpu


def let_mosaic_add_tangents() -> None:
    """Let kernels of Mosaic GPU compute derivatives: JAX lowers there all that silu needs but `add_any`."""
    from jax._src.ad_util import add_any_p
    from jax._src.pallas.mosaic_gpu import core, lowering

    rules = lowering.mosaic_lowering_rules[core.WGxWG_SEMANTICS]
    rules.setdefault(add_any_p, rules[jax.lax.add_p])


def load_in_rows(ref: Any) -> jax.Array:
    """Load a value for each row of a wgmma accumulator from global memory, in a kernel of Mosaic GPU."""
    gpu = pallas_mosaic_gpu()
    if jax.__version_info__ < (0, 11):
        return gpu.load(ref, (), optimized=False)
    return gpu.load(ref, optimized=False)


def mosaic_gpu_interpreter() -> Any:
    """Return what simulates kernels of Mosaic GPU on a CPU, their argument `interpret`; races are errors."""
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams(detect_races=True)
