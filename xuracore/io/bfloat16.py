"""BF16, sixteen bits a number: the upper half of a float32, so 8 bits of precision and the same range.

NumPy has no such dtype; here the bits are a uint16 array.
"""

import numpy as np


def to_bfloat16(array):
    """The nearest BF16 numbers (ties to even) of a float32 array, as uint16 bits; NaN stays NaN."""
    bits = np.ascontiguousarray(array, np.float32).reshape(np.shape(array)).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)  # rounding could carry a NaN into infinity
    return np.where(np.isnan(array), quiet, rounded).astype(np.uint16)


def from_bfloat16(bits):
    """float32 of the same value and shape: BF16 is the upper half of a float32; bits is uint16."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
