"""Products of tiles by Pallas Mosaic GPU, for Hopper GPUs (H100, H200): wgmma and TMA.

Every SM runs one block, which computes one tile of the result after the other. One warpgroup of the block
copies operands to a ring of shared memory, as many steps ahead as it has stages and across the ends of tiles;
each of the others multiplies 64 rows of a tile, and stores them while the first copies for the next tile.
Every element of a result is summed by one warpgroup in one order: results are the same in every run.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jax_deepep import jax_compat

WARPGROUP_ROWS = 64  # of a tile per warpgroup, as many as one wgmma instruction has
LARGEST_ROWS = 128  # of a tile: the registers of an SM hold the sums of two warpgroups
SWIZZLE = 128  # bytes that one row of a matrix has in a swizzled part of shared memory
OPERAND_BYTES = 192 * 1024  # of shared memory, of 227 KiB: results take 16 KiB per warpgroup
REGISTERS = 512  # of an SM per lane of a warpgroup
COPYING_REGISTERS = 40  # of those, of the warpgroup that copies


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How a product is computed.

    Attributes:
        columns: of a tile, at most; a multiple of 64 up to 256.
        depth: products per element and step, at most; 64 or 128.
        stages: steps that are copied ahead, at most: fewer where shared memory is full.
        panel: how many tiles one below the other are computed before those beside them, which share operands
            in the second-level cache.
        rounds: blocks per SM, one after the other. More than one delay a product less where another kernel
            occupies SMs, but each begins with empty shared memory.
    """

    columns: int = 256
    depth: int = 64
    stages: int = 4
    panel: int = 8
    rounds: int = 1


@dataclasses.dataclass(frozen=True)
class Tile:
    """A tile of a result, in the kernel.

    Attributes:
        num_steps: returns the number of products to be summed.
        left, right: return the operands of a step in global memory.
        result: the tile in global memory, [rows, columns].
    """

    num_steps: Callable[[], Any]
    left: Callable[[Any], Any]
    right: Callable[[Any], Any]
    result: Any


@dataclasses.dataclass(frozen=True)
class Product:
    """What a kernel computes.

    Attributes:
        rows, columns, depth: of a tile of the result, and of a step of its sum.
        transposed_left, transposed_right: the operands are [depth, rows] and [columns, depth] in memory
            instead of [rows, depth] and [depth, columns].
        num_tiles: (references to operands and result) → their number.
        tile: (these references, the index of a tile) → the tile.
    """

    rows: int
    columns: int
    depth: int
    transposed_left: bool
    transposed_right: bool
    num_tiles: Callable[..., Any]
    tile: Callable[..., Tile]


def largest_tile(size: int, largest: int) -> int:
    """Return the largest multiple of 64 that divides `size`, up to `largest`."""
    return max(tile for tile in range(SMALLEST, largest + 1, SMALLEST) if size % tile == 0)


SMALLEST = 64


def in_panels(index: Any, down: Any, across: int, panel: int) -> tuple[Any, Any]:
    """Return row and column of a tile: in panels of `panel` rows, one column of a panel after the other."""
    of_panel = panel * across
    first = lax.div(index, jnp.int32(of_panel)) * panel
    within, height = lax.rem(index, jnp.int32(of_panel)), lax.min(jnp.int32(panel), down - first)
    return first + lax.rem(within, height), lax.div(within, height)


def product(
    what: Product, operands: Sequence[jax.Array], shape: tuple[int, ...], dtype: Any, tiles: Tiles
) -> jax.Array:
    """Compute all tiles of a result of this shape and dtype; the last two operands are multiplied."""
    gpu = jax_compat.pallas_mosaic_gpu()
    workers = what.rows // WARPGROUP_ROWS
    element = operands[-1].dtype
    left_block = (what.depth, what.rows) if what.transposed_left else (what.rows, what.depth)
    right_block = (what.columns, what.depth) if what.transposed_right else (what.depth, what.columns)
    per_stage = what.depth * (what.rows + what.columns) * element.itemsize
    stages = min(tiles.stages, OPERAND_BYTES // per_stage)
    stored = SWIZZLE // jnp.dtype(dtype).itemsize  # columns that are stored together
    slots = min(2, what.columns // stored)

    def shared(shape, dtype):
        swizzled = (gpu.TilingTransform((8, SWIZZLE // jnp.dtype(dtype).itemsize)), gpu.SwizzleTransform(SWIZZLE))
        return gpu.SMEM(shape, dtype, transforms=swizzled)

    def body(*refs, left, right, result, full, free):
        warpgroup = lax.axis_index("warpgroup")
        first, stride = lax.axis_index("block"), num_blocks
        count = lax.div(what.num_tiles(*refs) - first + jnp.int32(stride - 1), jnp.int32(stride))

        def slot_of(step):
            return lax.rem(step, jnp.int32(stages))

        @pl.when(warpgroup == workers)
        def _():
            gpu.set_max_registers(COPYING_REGISTERS, action="decrease")

            def copy_tile(number, step):
                tile = what.tile(refs, first + number * stride)

                def copy(index, step):
                    slot = slot_of(step)

                    @pl.when(step >= stages)
                    def _():
                        gpu.barrier_wait(free.at[slot])

                    gpu.copy_gmem_to_smem(tile.left(index), left.at[slot], full.at[slot])
                    gpu.copy_gmem_to_smem(tile.right(index), right.at[slot], full.at[slot])
                    return step + 1

                return lax.fori_loop(0, tile.num_steps(), copy, step)

            step = lax.fori_loop(0, count, copy_tile, jnp.int32(0))

            @pl.loop(lax.max(step - stages, jnp.int32(0)), step)
            def _(step):
                gpu.barrier_wait(free.at[slot_of(step)])

        @pl.when(warpgroup < workers)
        def _():
            gpu.set_max_registers(min(256, (REGISTERS - COPYING_REGISTERS) // workers // 8 * 8), action="increase")
            own_rows = pl.ds(warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)

            def multiply_tile(number, step):
                tile = what.tile(refs, first + number * stride)
                num_steps = tile.num_steps()

                def sums(total):
                    def multiply(index, step):
                        slot = slot_of(step)
                        gpu.barrier_wait(full.at[slot])
                        if what.transposed_left:
                            own_left = gpu.transpose_ref(left.at[slot, :, own_rows], (1, 0))
                        else:
                            own_left = left.at[slot, own_rows]
                        all_right = right.at[slot]
                        if what.transposed_right:
                            all_right = gpu.transpose_ref(all_right, (1, 0))
                        gpu.wgmma(total, own_left, all_right)
                        gpu.wgmma_wait(1)

                        @pl.when(index > 0)
                        def _():
                            gpu.barrier_arrive(free.at[slot_of(step - 1)])

                        return step + 1

                    lax.fori_loop(0, num_steps, multiply, step)
                    return total[...]

                total = pl.run_scoped(sums, gpu.ACC((WARPGROUP_ROWS, what.columns), jnp.float32))
                step += num_steps

                @pl.when(num_steps > 0)
                def _():
                    gpu.barrier_arrive(free.at[slot_of(step - 1)])

                for number, column in enumerate(range(0, what.columns, stored)):
                    slot = number % slots
                    gpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
                    result[warpgroup, slot] = total[:, column : column + stored].astype(dtype)
                    gpu.commit_smem()
                    own = tile.result.at[own_rows, pl.ds(column, stored)]
                    gpu.copy_smem_to_gmem(result.at[warpgroup, slot], own)
                return step

            lax.fori_loop(0, count, multiply_tile, jnp.int32(0))
            gpu.wait_smem_to_gmem(0)

    num_blocks = jax_compat.num_sms() * tiles.rounds
    kernel = gpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(shape, dtype),
        grid=(num_blocks,),
        grid_names=("block",),
        num_threads=workers + 1,
        thread_name="warpgroup",
        scratch_types={
            "left": shared((stages, *left_block), element),
            "right": shared((stages, *right_block), element),
            "result": shared((workers, slots, WARPGROUP_ROWS, stored), dtype),
            "full": gpu.Barrier(num_arrivals=2, num_barriers=stages),
            "free": gpu.Barrier(num_arrivals=workers, num_barriers=stages),
        },
        compiler_params=gpu.CompilerParams(lowering_semantics=gpu.LoweringSemantics.Warpgroup),
        interpret=jax_compat.mosaic_gpu_interpreter() if jax_compat.platform_of(jax.devices()[0]) == "cpu" else None,
    )
    return kernel(*operands)
