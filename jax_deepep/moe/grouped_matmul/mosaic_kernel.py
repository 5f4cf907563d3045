"""The kernel of `mosaic`: products of tiles by wgmma and TMA, in Pallas Mosaic GPU.

Every SM runs one block, which computes one tile of the result after the other. One warpgroup of the block
copies operands to a ring in shared memory, as many steps ahead as the ring has stages, also across the end of
a tile; each of the others multiplies 64 rows of the tile, and stores them: at once, or in the first steps of
the next tile, beside its products. An element of the result is summed by one warpgroup in a fixed order:
results are the same in every run.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
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
DEPTH = 64  # terms of a sum per step: one swizzled row
SWIZZLE = 128  # bytes of a row in shared memory
SHARED_BYTES = 226 * 1024  # of a block, for operands and results; barriers have the last KiB
STORED = 64  # columns that are stored at once
SLOTS = 2  # stores in flight per warpgroup
REGISTERS = 512  # of an SM, per thread of a warpgroup
COPYING_REGISTERS = 40  # of these, of the warpgroup that copies
H200_SMS = 132  # also of an H100: where programs are lowered without a GPU
SIMULATED_SMS = 2

Stores = Iterator[tuple[jax.Array, Any]]  # values [64, STORED], and where they go in global memory
Copies = Sequence[Any]  # in global memory: the left operand, and the right ones


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How a product is divided.

    Attributes:
        columns: of a tile, at most; a multiple of 64 up to 256.
        stages: steps in shared memory, at most: fewer where it is full.
        panel: tiles that are computed from top to bottom before those to their right, so that blocks share
            operands in the second-level cache.
        phases: blocks per SM, one after the other. Each but the last has half of the tiles that are left, so
            that SMs that are late, because sums differ in length or another kernel occupied them, get less of
            the last tiles. But each block begins with an empty ring.
        deferred: whether sums are stored beside the products of the next tile, where nothing else is computed
            from them. They take registers until then.
    """

    columns: int = 256
    stages: int = 4
    panel: int = 8
    phases: int = 1
    deferred: bool = True


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the sum of a tile.

    Attributes:
        num_steps: how many terms, in units of DEPTH.
        begin: begins to copy; returns a function of a step that returns what is copied for it.
    """

    num_steps: Any
    begin: Callable[[], Callable[[Any], Copies]]


@dataclasses.dataclass(frozen=True)
class Tile:
    """One tile, inside of the kernel.

    Attributes:
        parts: of its sum.
        stores: (the sums of 64 rows, which of the rows of the tile these are, a function that returns these
            rows of the next few of `further`, at most two) → what is stored of it.
        further: what else is copied after the steps of the only sum, [rows, DEPTH] each.
    """

    parts: Sequence[Part]
    stores: Callable[[Sequence[jax.Array], Any, Callable[[int], list[jax.Array]]], Stores]
    further: Sequence[Any] = ()

    @property
    def num_steps(self) -> Any:
        """Return the number of steps of the sum."""
        first, *others = (part.num_steps for part in self.parts)
        return sum(others, first)


@dataclasses.dataclass(frozen=True)
class Product:
    """What a kernel computes.

    Attributes:
        name: of the kernel.
        rows, columns: of the sum of a tile, which has terms [rows, DEPTH] · [DEPTH, columns].
        sums: of a tile, with the same left operands.
        transposed: whether the left and right operands of a step are the transposes of these in memory.
        num_tiles: (references to all operands and results) → how many tiles there are.
        tile: (these references, its index) → a tile; those with the longest sums first.
        plain: whether a tile stores its only sum, and nothing else.
    """

    name: str
    rows: int
    columns: int
    sums: int
    transposed: tuple[bool, bool]
    num_tiles: Callable[[Sequence[Any]], Any]
    tile: Callable[[Sequence[Any], Any], Tile]
    plain: bool = True


def largest_tile(size: int, largest: int) -> int:
    """Return the largest multiple of 64 that divides `size`, up to `largest`."""
    return max(tile for tile in range(SMALLEST_TILE, largest + 1, SMALLEST_TILE) if size % tile == 0)


def in_panels(index: Any, down: Any, across: int, panel: int) -> tuple[Any, Any]:
    """Return row and column of a tile in a grid of `down` by `across` tiles: see `Tiles.panel`."""
    size = np.int32(panel * across)
    above = lax.div(index, size) * np.int32(panel)
    index, height = lax.rem(index, size), lax.min(np.int32(panel), down - above)
    return above + lax.rem(index, height), lax.div(index, height)


def own_tiles(block: Any, num_blocks: int, num_tiles: Any, phases: int) -> tuple[Any, Callable[[Any], Any]]:
    """Return how many tiles a block has, and a function that returns the index of each.

    In every round each SM has one tile. There and back: a block with the largest tile of a round has the
    smallest of the next.
    """
    sms = np.int32(num_blocks // phases)
    phase, place = lax.div(block, sms), lax.rem(block, sms)
    rounds = lax.div(num_tiles + (sms - np.int32(1)), sms)

    def first_of(phase: Any) -> Any:
        left = lax.shift_right_logical(rounds, phase)
        return rounds - lax.select(phase < np.int32(phases), left, np.int32(0) * left)

    first, end = first_of(phase), first_of(phase + np.int32(1))

    def in_round(number: Any) -> Any:
        there = lax.rem(number, np.int32(2)) == 0
        return number * sms + lax.select(there, place, sms - np.int32(1) - place)

    none_in_last = (first < end) & (in_round(end - np.int32(1)) >= num_tiles)
    return end - first - none_in_last.astype(jnp.int32), lambda number: in_round(first + number)


def multiply(
    product: Product,
    operands: Sequence[jax.Array],
    types: Sequence[jax.ShapeDtypeStruct],
    tiles: Tiles,
) -> list[jax.Array]:
    """Compute all tiles of a product.

    Args:
        product: what is computed.
        operands: of the kernel; all that are copied have the dtype of the last one.
        types: of the results; they are not written where there is no tile.
        tiles: what `product` does not say.

    Returns:
        The results.

    Raises:
        ValueError: shared memory has no room for two stages.
    """
    gpu = jax_compat.pallas_mosaic_gpu()
    dtype = operands[-1].dtype
    workers = product.rows // SMALLEST_TILE
    results = (workers, SLOTS, SMALLEST_TILE, STORED)
    stage_bytes = DEPTH * (product.rows + product.sums * product.columns) * dtype.itemsize
    room = SHARED_BYTES - int(np.prod(results)) * dtype.itemsize
    stages = max(0, min(tiles.stages, room // stage_bytes))
    if stages < 2:  # the ring has a step that is multiplied and one that is being copied
        raise ValueError(f"tiles: expected two stages in shared memory, got {stages}; divide {tiles}.")

    def shared(shape: tuple[int, ...]) -> Any:
        tiling = gpu.TilingTransform((8, SWIZZLE // dtype.itemsize))
        return gpu.SMEM(shape, dtype, transforms=(tiling, gpu.SwizzleTransform(SWIZZLE)))

    def in_memory(block: tuple[int, int], transposed: bool) -> tuple[int, int]:
        return block[::-1] if transposed else block

    left = in_memory((product.rows, DEPTH), product.transposed[0])
    right = in_memory((DEPTH, product.columns), product.transposed[1])
    simulated = jax_compat.platform_of(jax.devices()[0]) == "cpu"
    sms = SIMULATED_SMS if simulated else getattr(jax.devices()[0], "core_count", None) or H200_SMS
    kernel = gpu.kernel(
        partial(_kernel, product, gpu, tiles),
        out_type=types,
        grid=(sms * tiles.phases,),
        grid_names=("block",),
        num_threads=workers + 1,
        thread_name="warpgroup",
        kernel_name=product.name,
        scratch_types={
            "left": shared((stages, *left)),
            "right": shared((stages, product.sums, *right)),
            "results": shared(results),
            "full": gpu.Barrier(num_arrivals=1 + product.sums, num_barriers=stages),
            "free": gpu.Barrier(num_arrivals=workers, num_barriers=stages),
        },
        compiler_params=gpu.CompilerParams(lowering_semantics=gpu.LoweringSemantics.Warpgroup),
        interpret=jax_compat.mosaic_gpu_interpreter() if simulated else None,
    )
    # They have lost along which mesh axes they vary.
    axes = jax_compat.varying_axes(operands[-1])
    return [jax_compat.as_varying(result, axes) for result in kernel(*operands)]


def _kernel(
    product: Product, gpu: Any, tiles: Tiles, *refs: Any,
    left: Any, right: Any, results: Any, full: Any, free: Any,
) -> None:  # fmt: skip
    """Compute the tiles of a block, as one warpgroup of it.

    A step of a tile waits for stage `step % stages` to be `full`, and `free`s it afterwards. Steps are
    counted over all tiles of the block.
    """
    stages, workers = left.shape[0], results.shape[0]
    warpgroup, block = lax.axis_index("warpgroup"), lax.axis_index("block")
    num_tiles, index_of = own_tiles(
        block, lax.axis_size("block"), product.num_tiles(refs), tiles.phases
    )  # fmt: skip
    own_rows = pl.ds(warpgroup * SMALLEST_TILE, SMALLEST_TILE)

    def tile_of(number: Any) -> Tile:
        return product.tile(refs, index_of(number))

    def stage_of(step: Any) -> Any:
        return lax.rem(step, np.int32(stages))

    def copy_tile(number: Any, first: Any) -> Any:
        tile = tile_of(number)

        def copy(sources: Sequence[Any], destinations: Sequence[Any], step: Any) -> Any:
            stage = stage_of(step)

            @pl.when(step >= stages)
            def _() -> None:
                gpu.barrier_wait(free.at[stage])

            for source, destination in zip(sources, destinations, strict=True):
                gpu.copy_gmem_to_smem(source, destination.at[stage], full.at[stage])
            return step + 1

        rights = [right.at[:, number] for number in range(product.sums)]

        def copy_of(of_step: Callable[[Any], Copies]) -> Callable[[Any, Any], Any]:
            return lambda index, step: copy(of_step(index), (left, *rights), step)

        step = first
        for part in tile.parts:
            step = _loop(part.num_steps, copy_of(part.begin()), step)
        half = product.rows // 2  # two copies, as a step with one sum has
        parts = [pl.ds(0, half), pl.ds(half, half)]
        for rows in tile.further:
            step = copy([rows.at[part] for part in parts], [left.at[:, part] for part in parts], step)
        return step

    def store(number: int, values: jax.Array, destination: Any) -> None:
        slot = results.at[warpgroup, number % SLOTS]
        if number == 0:  # the stores of the tile before
            gpu.wait_smem_to_gmem(0, wait_read_only=True)
        elif number >= SLOTS:
            gpu.wait_smem_to_gmem(SLOTS - 1, wait_read_only=True)
        slot[...] = values
        gpu.commit_smem()
        gpu.copy_smem_to_gmem(slot, destination)

    def multiply_tile(
        tile: Tile, first: Any, store_beside: Callable[[Any], None] = lambda index: None
    ) -> tuple[Any, list[jax.Array]]:
        """Return the step after the sums, and the sums."""

        def sums_of(*totals: Any) -> Any:
            def add(index: Any, step: Any) -> Any:
                stage = stage_of(step)
                gpu.barrier_wait(full.at[stage])
                if product.transposed[0]:
                    own_left = left.at[stage, :, own_rows].transpose((1, 0))
                else:
                    own_left = left.at[stage, own_rows]
                for number, total in enumerate(totals):
                    whole_right = right.at[stage, number]
                    if product.transposed[1]:
                        whole_right = whole_right.transpose((1, 0))
                    gpu.wgmma(total, own_left, whole_right)
                store_beside(index)
                gpu.wgmma_wait(product.sums)  # the step before has been multiplied

                @pl.when(index > 0)
                def _() -> None:
                    gpu.barrier_arrive(free.at[stage_of(step - 1)])

                return step + 1

            _loop(tile.num_steps, add, first)
            return [total[...] for total in totals]

        zero = gpu.ACC((SMALLEST_TILE, product.columns), jnp.float32)
        totals = pl.run_scoped(sums_of, *[zero] * product.sums)
        after = first + tile.num_steps

        @pl.when(tile.num_steps > 0)
        def _() -> None:
            gpu.barrier_arrive(free.at[stage_of(after - 1)])

        return after, totals

    def multiply_and_store(number: Any, first: Any) -> Any:
        tile = tile_of(number)
        after, totals = multiply_tile(tile, first)
        steps = iter(range(len(tile.further)))

        def further(count: int) -> list[jax.Array]:
            own = [stage_of(after + next(steps)) for _ in range(count)]
            for stage in own:
                gpu.barrier_wait(full.at[stage])
            rows = [left[stage, own_rows] for stage in own]
            gpu.commit_smem()  # TMA writes there next
            for stage in own:
                gpu.barrier_arrive(free.at[stage])
            return rows

        for index, stored in enumerate(tile.stores(totals, own_rows, further)):
            store(index, *stored)
        return after + len(tile.further)

    num_stores = product.columns // STORED

    def store_one(index: int, number: Any, total: jax.Array) -> None:
        stores = tile_of(number).stores([total], own_rows, lambda count: [])
        store(index, *next(itertools.islice(stores, index, None)))

    def multiply_and_defer(number: Any, state: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
        """Store the sum before in the steps of this one, or, where there are too few, after them."""
        (first, before), tile = state, tile_of(number)

        def store_before(index: int, now: Any) -> None:
            @pl.when(now & (number > 0))
            def _() -> None:
                store_one(index, number - 1, before)

        def store_beside(step: Any) -> None:
            for index in range(num_stores):
                store_before(index, step == index)

        after, (total,) = multiply_tile(tile, first, store_beside)
        for index in range(num_stores):
            store_before(index, tile.num_steps <= index)
        return after, total.astype(before.dtype)

    @pl.when(warpgroup == workers)
    def _() -> None:
        gpu.set_max_registers(COPYING_REGISTERS, action="decrease")
        num_steps = _loop(num_tiles, copy_tile, jnp.int32(0))

        def await_free(index: Any, step: Any) -> Any:
            gpu.barrier_wait(free.at[stage_of(step)])
            return step + 1

        last = lax.min(num_steps, np.int32(stages))
        _loop(last, await_free, num_steps - last)

    @pl.when(warpgroup < workers)
    def _() -> None:
        own = min((REGISTERS - COPYING_REGISTERS) // workers, 256) // 8 * 8
        gpu.set_max_registers(own, action="increase")
        if product.plain and tiles.deferred:
            zero = jnp.zeros((SMALLEST_TILE, product.columns), results.dtype)
            _, total = _loop(num_tiles, multiply_and_defer, (jnp.int32(0), zero))

            @pl.when(num_tiles > 0)
            def _() -> None:
                for index in range(num_stores):
                    store_one(index, num_tiles - 1, total)
        else:
            _loop(num_tiles, multiply_and_store, jnp.int32(0))
        gpu.wait_smem_to_gmem(0)


def _loop(count: Any, body: Callable[[Any, Any], Any], first: Any) -> Any:
    """Run body(index, value) → value for each index below `count`; return the last value."""
    count = np.int32(count) if isinstance(count, int) else count
    return lax.fori_loop(np.int32(0), count, body, first)
