"""Block-scaled formats of low precision: rows of 8 or 4 bits per element, with a scale per block.

`formats` has their sizes, `rounding` their numbers as bits, `block_scaled` the conversions of rows.
"""
