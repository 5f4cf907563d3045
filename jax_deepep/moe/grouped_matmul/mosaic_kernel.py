"""The kernel of `mosaic_matmul`: products of tiles by wgmma and TMA, in Pallas Mosaic GPU.

Every SM runs one block, which computes one tile of the result after the other. One warpgroup of the block
copies operands to a ring in shared memory, as many steps ahead as the ring has stages, also across the end of
a tile; each of the others multiplies 64 rows of the tile, and stores them while operands of the next arrive.
An element of the result is summed by one warpgroup in a fixed order: results are the same in every run.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from jax_deepep import jax_compat

SMALLEST_TILE = 64  # in every dimension: rows of a wgmma instruction, elements of a swizzled row
LARGEST_ROWS = 128  # of a tile: the registers of an SM hold the sums of two warpgroups
SWIZZLE = 128  # bytes of a row in shared memory
SHARED_BYTES = 226 * 1024  # of a block, for operands and results; barriers have the last KiB
REGISTERS = 512  # of an SM, per thread of a warpgroup
COPYING_REGISTERS = 40  # of these, of the warpgroup that copies
H200_SMS = 132  # also of an H100: where programs are lowered without a GPU
SIMULATED_SMS = 2


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How a product is divided.

    Attributes:
        columns: of a tile, at most; a multiple of 64 up to 256.
        depth: terms of the sum per step, at most; 64 or 128.
        stages: steps in shared memory, at most: fewer where it is full.
        stored: columns of a tile that are stored at once, at most; a multiple of 64.
        slots: stores in flight per warpgroup.
        panel: tiles that are computed from top to bottom before those to their right, so that blocks share
            operands in the second-level cache.
        rounds: blocks per SM, one after the other. With more than one, a kernel beside this one that occupies
            SMs delays it less, but each block begins with an empty ring.
    """

    columns: int = 256
    depth: int = 64
    stages: int = 4
    stored: int = 64
    slots: int = 2
    panel: int = 8
    rounds: int = 1


@dataclasses.dataclass(frozen=True)
class Tile:
    """One tile, inside of the kernel.

    Attributes:
        num_steps: of its sum.
        operands: begins to copy; returns a function of a step that returns both operands in global memory.
        result: in global memory, [rows, columns].
    """

    num_steps: Any
    operands: Callable[[], Callable[[Any], tuple[Any, Any]]]
    result: Any


@dataclasses.dataclass(frozen=True)
class Product:
    """What a kernel computes.

    Attributes:
        name: of the kernel.
        rows, columns, depth: of a tile: its sum has terms [rows, depth] · [depth, columns].
        transposed: whether the left and right operands of a step are the transposes of these in memory.
        num_tiles: (references to all operands and the result) → how many tiles there are.
        tile: (these references, its index) → a tile; those with the longest sums first.
    """

    name: str
    rows: int
    columns: int
    depth: int
    transposed: tuple[bool, bool]
    num_tiles: Callable[[Sequence[Any]], Any]
    tile: Callable[[Sequence[Any], Any], Tile]


def largest_tile(size: int, largest: int) -> int:
    """Return the largest multiple of 64 that divides `size`, up to `largest`."""
    return max(tile for tile in range(SMALLEST_TILE, largest + 1, SMALLEST_TILE) if size % tile == 0)


def in_panels(index: Any, down: Any, across: int, panel: int) -> tuple[Any, Any]:
    """Return row and column of a tile in a grid of `down` by `across` tiles: see `Tiles.panel`."""
    size = np.int32(panel * across)
    above = lax.div(index, size) * np.int32(panel)
    index, height = lax.rem(index, size), lax.min(np.int32(panel), down - above)
    return above + lax.rem(index, height), lax.div(index, height)


def multiply(
    product: Product, operands: Sequence[jax.Array], shape: tuple[int, ...], dtype: Any, tiles: Tiles
) -> jax.Array:
    """Compute all tiles of a product.

    Args:
        product: what is computed.
        operands: of the kernel; the last two are multiplied.
        shape, dtype: of the result, which is not written where there is no tile.
        tiles: what `product` does not say.

    Returns:
        The result.

    Raises:
        ValueError: shared memory has no room for two stages.
    """
    gpu = jax_compat.pallas_mosaic_gpu()
    element, dtype = operands[-1].dtype, jnp.dtype(dtype)
    workers = product.rows // SMALLEST_TILE
    results = (workers, tiles.slots, SMALLEST_TILE, largest_tile(product.columns, tiles.stored))
    stage_bytes = product.depth * (product.rows + product.columns) * element.itemsize
    room = SHARED_BYTES - int(np.prod(results)) * dtype.itemsize
    stages = max(0, min(tiles.stages, room // stage_bytes))
    if stages < 2:  # the ring has a step that is multiplied and one that is being copied
        raise ValueError(f"tiles: expected two stages in shared memory, got {stages}; divide {tiles}.")

    def shared(shape: tuple[int, ...], dtype: Any) -> Any:
        tiling = gpu.TilingTransform((8, SWIZZLE // dtype.itemsize))
        return gpu.SMEM(shape, dtype, transforms=(tiling, gpu.SwizzleTransform(SWIZZLE)))

    def in_memory(block: tuple[int, int], transposed: bool) -> tuple[int, int]:
        return block[::-1] if transposed else block

    left = in_memory((product.rows, product.depth), product.transposed[0])
    right = in_memory((product.depth, product.columns), product.transposed[1])
    simulated = jax_compat.platform_of(jax.devices()[0]) == "cpu"
    sms = SIMULATED_SMS if simulated else getattr(jax.devices()[0], "core_count", None) or H200_SMS
    kernel = gpu.kernel(
        partial(_kernel, product, gpu, dtype),
        out_type=jax.ShapeDtypeStruct(shape, dtype),
        grid=(sms * tiles.rounds,),
        grid_names=("block",),
        num_threads=workers + 1,
        thread_name="warpgroup",
        kernel_name=product.name,
        scratch_types={
            "left": shared((stages, *left), element),
            "right": shared((stages, *right), element),
            "results": shared(results, dtype),
            "full": gpu.Barrier(num_arrivals=2, num_barriers=stages),
            "free": gpu.Barrier(num_arrivals=workers, num_barriers=stages),
        },
        compiler_params=gpu.CompilerParams(lowering_semantics=gpu.LoweringSemantics.Warpgroup),
        interpret=jax_compat.mosaic_gpu_interpreter() if simulated else None,
    )
    # The kernel's result has lost along which mesh axes it varies.
    return jax_compat.as_varying(kernel(*operands), jax_compat.varying_axes(operands[-1]))


def _kernel(
    product: Product, gpu: Any, dtype: Any, *refs: Any,
    left: Any, right: Any, results: Any, full: Any, free: Any,
) -> None:  # fmt: skip
    """Compute one tile in each round of the blocks, as one warpgroup of one block.

    A step of a tile waits for stage `step % stages` to be `full`, and `free`s it afterwards. Steps are
    counted over all tiles of the block.
    """
    stages, (workers, slots, *_rows, stored) = left.shape[0], results.shape
    warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")
    num_blocks = np.int32(lax.axis_size("block"))

    def place_in(round_index: Any) -> Any:
        """There and back: a block with the largest tile of a round has the smallest of the next."""
        there = lax.rem(round_index, np.int32(2)) == 0
        return lax.select(there, block, num_blocks - 1 - block)

    def tile_of(round_index: Any) -> Tile:
        return product.tile(refs, round_index * num_blocks + place_in(round_index))

    whole_rounds = lax.div(product.num_tiles(refs), num_blocks)
    rest = product.num_tiles(refs) - whole_rounds * num_blocks
    num_tiles = whole_rounds + (place_in(whole_rounds) < rest).astype(jnp.int32)

    def stage_of(step: Any) -> Any:
        return lax.rem(step, np.int32(stages))

    def copy_tile(round_index: Any, first: Any) -> Any:
        tile = tile_of(round_index)
        operands = tile.operands()

        def copy(index: Any, step: Any) -> Any:
            stage = stage_of(step)

            @pl.when(step >= stages)
            def _() -> None:
                gpu.barrier_wait(free.at[stage])

            for operand, ring in zip(operands(index), (left, right), strict=True):
                gpu.copy_gmem_to_smem(operand, ring.at[stage], full.at[stage])
            return step + 1

        return _loop(tile.num_steps, copy, first)

    def multiply_tile(round_index: Any, first: Any) -> Any:
        tile = tile_of(round_index)
        own_rows = pl.ds(warpgroup * SMALLEST_TILE, SMALLEST_TILE)

        def sum_of(total: Any) -> Any:
            def add(index: Any, step: Any) -> Any:
                stage = stage_of(step)
                gpu.barrier_wait(full.at[stage])
                if product.transposed[0]:
                    own_left = left.at[stage, :, own_rows].transpose((1, 0))
                else:
                    own_left = left.at[stage, own_rows]
                whole_right = right.at[stage]
                if product.transposed[1]:
                    whole_right = whole_right.transpose((1, 0))
                gpu.wgmma(total, own_left, whole_right)
                gpu.wgmma_wait(1)  # the step before has been multiplied

                @pl.when(index > 0)
                def _() -> None:
                    gpu.barrier_arrive(free.at[stage_of(step - 1)])

                return step + 1

            _loop(tile.num_steps, add, first)
            return total[...]

        total = pl.run_scoped(sum_of, gpu.ACC((SMALLEST_TILE, product.columns), jnp.float32))
        after = first + tile.num_steps

        @pl.when(tile.num_steps > 0)
        def _() -> None:
            gpu.barrier_arrive(free.at[stage_of(after - 1)])

        for number, column in enumerate(range(0, product.columns, stored)):
            slot = results.at[warpgroup, number % slots]
            if number == 0:  # the stores of the tile before
                gpu.wait_smem_to_gmem(0, wait_read_only=True)
            elif number >= slots:
                gpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
            slot[...] = total[:, column : column + stored].astype(dtype)
            gpu.commit_smem()
            gpu.copy_smem_to_gmem(slot, tile.result.at[own_rows, pl.ds(column, stored)])
        return after

    @pl.when(warpgroup == workers)
    def _() -> None:
        gpu.set_max_registers(COPYING_REGISTERS, action="decrease")
        num_steps = _loop(num_tiles, copy_tile, np.int32(0))

        def await_free(index: Any, step: Any) -> Any:
            gpu.barrier_wait(free.at[stage_of(step)])
            return step + 1

        last = lax.min(num_steps, np.int32(stages))
        _loop(last, await_free, num_steps - last)

    @pl.when(warpgroup < workers)
    def _() -> None:
        own = min((REGISTERS - COPYING_REGISTERS) // workers, 256) // 8 * 8
        gpu.set_max_registers(own, action="increase")
        _loop(num_tiles, multiply_tile, np.int32(0))
        gpu.wait_smem_to_gmem(0)


def _loop(count: Any, body: Callable[[Any, Any], Any], first: Any) -> Any:
    """Run body(index, value) → value for each index below `count`; return the last value."""
    count = np.int32(count) if isinstance(count, int) else count
    return lax.fori_loop(np.int32(0), count, body, jnp.int32(first))
