"""Sizes that Python computes without a native module match those of the native modules."""

import pytest

from jax_deepep import capacity
from jax_deepep.communicator import native_module
from jax_deepep.ops import checks
from jax_deepep.quantization.formats import FORMATS
from jax_deepep.quantization.packed_rows import packed_size


@pytest.mark.parametrize("layout", ["expert", "token"])
def test_groups(layout: str) -> None:
    numbers = native_module.numbers()
    for num_local_experts in (1, 2, 33):
        assert capacity.num_groups(layout, num_local_experts) == numbers.num_groups(
            layout=numbers.layouts[layout], num_local_experts=num_local_experts
        )


@pytest.mark.parametrize("hidden_size", [1, 7, 8, 128])
def test_the_longest_rows_of_integers(hidden_size: int) -> None:
    """Padded to whole words, the longest rows of `dispatch` are exactly the native limit."""
    numbers = native_module.numbers()
    filled = capacity.round_up(checks.widest_integers(hidden_size, 1), numbers.payload_alignment)
    assert filled == numbers.max_row_bytes(hidden_size=hidden_size)


@pytest.mark.parametrize("format", FORMATS)
def test_rows_on_links(format: str) -> None:
    numbers = native_module.numbers()
    for hidden_size in (2, 38, 128, 1000, 7168):
        assert packed_size(format, hidden_size) == numbers.wire_row_bytes(
            wire=numbers.wires[format], size=hidden_size
        )


def test_all_modules_have_the_same() -> None:
    """Whichever is imported first."""
    built = [platform for platform in ("cpu", "cuda") if not native_module.unsupported_reason(platform)]
    modules = [native_module.load(platform) for platform in built]
    sizes = {"num_ranks": 4, "num_experts": 32, "num_topk": 6, "num_tokens": 10}
    of_rows = {
        "ranks_per_node": 4, "layout": 0, "capacity": 33, "row_size": 128, "element_bytes": 2, "wire": 0
    }  # fmt: skip
    seen = [
        (module.layouts, module.no_limit, module.payload_alignment, module.pair_table_shape(**sizes),
         module.dispatch_scratch_ints(**sizes), module.wires, module.combine_sums(**sizes, **of_rows),
         [module.wire_row_bytes(wire=wire, size=200) for wire in range(1, 5)])
        for module in modules
    ]  # fmt: skip
    assert seen == [seen[0]] * len(modules)
    layouts, no_limit, _, table, scratch, wires, sums, row_bytes = seen[0]
    assert set(layouts) == {"expert", "token"}
    assert no_limit < 0
    # A line for the count and each of R · T pairs: its source and up to min(K, L) rows, in whole 16 bytes.
    assert table == (1 + 40, 8)
    assert scratch == 10 * (4 * 6 + 4)  # a record for each entry, a list for each rank
    assert sums == (40, 40 * 256)
    # Elements, scales of blocks and nvfp4's row scale, each rounded up to 16 bytes.
    assert row_bytes == [208 + 16, 208 + 16, 208 + 16, 112 + 16 + 16]
    assert wires == {"None": 0, **{name: code for code, name in enumerate(FORMATS, 1)}}
    one_each = {**sizes, "num_topk": 1}
    numbers = modules[0]
    assert numbers.combine_sums(**one_each, **of_rows) == (0, 0)  # no token has several rows on a device
    of_rows["wire"] = wires["mxfp8"]
    encoded = 128 + 16
    assert numbers.combine_sums(**one_each, **of_rows) == (40, 40 * encoded)
    assert numbers.combine_sums(**sizes, **of_rows) == (40, 40 * encoded + 10 * 256)  # and the own ones
    # Of two nodes, own ones of each, and for every token the own node's sum and K gradients.
    of_nodes = 20 * 256 + 10 * (256 + 4 * 6)
    assert numbers.combine_sums(**sizes, **of_rows | {"ranks_per_node": 2}) == (40, 40 * encoded + of_nodes)
    of_rows["layout"] = layouts["token"]
    assert numbers.combine_sums(**sizes, **of_rows) == (33, 33 * encoded)  # by received row
