"""Sums of logarithms that come out alike on every machine, for statistics."""

import numpy as np
from numba import njit

from bytecache.schemas.arrays import F64, PLACE


@njit(cache=True, nogil=True, error_model="numpy")
def sum_logs(times: F64, x: F64, n: int, whole: F64) -> float:
    """Sum of times[k] * ln(x[k]) over k < n, normal numbers above zero; 1e-15 of the summands, alike on every machine.

    x = 2 ** e * m with m in sqrt(1/2)..sqrt(2); ln(m) = 2 artanh(s) with s = (m - 1) / (m + 1), by its series. Loops
    without branches, which a compiler turns into vector instructions. Overwrites x and `whole`; n is rounded up to 4,
    for which all three have room.
    """
    bits = x.view(np.int64)
    for k in range(n, (n + 3) // 4 * 4):
        times[k], x[k] = 0.0, 1.0
    n = (n + 3) // 4 * 4
    for k in range(PLACE(n)):
        e = (bits[k] - 0x3FE6A09E667F3BCD) >> 52
        bits[k] -= e << 52
        whole[k] = float(e)
    for k in range(PLACE(n)):
        s = (x[k] - 1.0) / (x[k] + 1.0)
        z = s * s
        series = 1 / 15 + z * (1 / 17)
        series = 1 / 9 + z * (1 / 11 + z * (1 / 13 + z * series))
        series = 1.0 + z * (1 / 3 + z * (1 / 5 + z * (1 / 7 + z * series)))
        whole[k] = times[k] * (whole[k] * 0.6931471805599453 + 2.0 * s * series)
    a = b = c = d = 0.0
    for k in range(PLACE(0), PLACE(n), PLACE(4)):
        a += whole[k]
        b += whole[k + PLACE(1)]
        c += whole[k + PLACE(2)]
        d += whole[k + PLACE(3)]
    return (a + b) + (c + d)
