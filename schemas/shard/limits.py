"""How much a shard may hold, given the size of its file: what it costs to read and to train on is bounded by its bytes.

A shard of nothing but one letter, of a teacher that is always certain, packs 800 positions into a byte of file; with
the noise of a real teacher it is three or four (measured on 16 MiB of text, each). So a small file can be honest and
long, and a hostile one can cost its reader gigabytes and minutes. What every default shard may hold is free (16 MiB of
text); beyond that a file must have the bytes for it. Prompts, which are read and not learned, pack better than text,
but an answer follows each of them.
"""

FREE_POSITIONS, POSITIONS_PER_BYTE = 20 << 20, 64
"""Positions that any shard may have, and those that a byte of file pays for."""
FREE_DOCUMENTS, BYTES_PER_DOCUMENT = 1 << 20, 8
"""Documents that any shard may have, and the bytes of file that pay for a further one."""


def most_positions(size: int) -> int:
    """Positions that a shard file of `size` bytes may have."""
    return FREE_POSITIONS + POSITIONS_PER_BYTE * size


def most_documents(size: int) -> int:
    """Documents that a shard file of `size` bytes may have."""
    return FREE_DOCUMENTS + size // BYTES_PER_DOCUMENT


def excess(size: int, n_positions: int, n_documents: int) -> str:
    """Which limit a shard of these counts is beyond, in words; "" if it keeps both."""
    for what, count, most in (
        ("positions", n_positions, most_positions(size)),
        ("documents", n_documents, most_documents(size)),
    ):
        if count > most:
            return f"{count} {what} in a file of {size} bytes, at most {most} are read"
    return ""
