"""Names of the arrays that the format's loops pass around, and numbers that all who read rows agree on."""

import math

import numpy as np
from numpy.typing import NDArray

U8 = NDArray[np.uint8]
U16 = NDArray[np.uint16]
U64 = NDArray[np.uint64]
I16 = NDArray[np.int16]
I32 = NDArray[np.int32]
I64 = NDArray[np.int64]
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

END = 256
"""The symbol after a document's last byte."""
SYMBOLS = 257
"""256 bytes and END."""
PLACE = np.uint64
"""Type of an index in compiled loops: unsigned ones spare numba the question whether they are negative."""
NEVER = -149 * math.log(2)
"""Nats that sums of log-probabilities count for a probability of zero: the smallest float32 above it."""
