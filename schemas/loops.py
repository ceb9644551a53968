"""How loops over rows are compiled, where functions hand structures of arrays to each other.

numba counts references to every array of a structure at every call; for structures of ten arrays that would cost as
much as the work on a row. So a public loop allocates what is needed and calls a `row_loop`, which borrows all that it
is given, as do the `inner_loop`s that it is made of. Such functions must not allocate.

After a change of an `inner_loop`, delete `__pycache__`: numba compiles a caller again only when its own file changes.
"""

from numba import njit

row_loop = njit(cache=True, nogil=True, error_model="numpy", _nrt=False)
"""A loop over rows, called from a compiled function."""
inner_loop = njit(cache=True, nogil=True, error_model="numpy", inline="always", _nrt=False)
"""What is done for one row, as a part of the loop that calls it."""
