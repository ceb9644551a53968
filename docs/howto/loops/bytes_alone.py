"""Look at the targets alone, a document at a time: what a model of bytes, or a loss of your own, would learn from.

python docs/howto/loops/bytes_alone.py TARGETS
"""

import argparse
from itertools import islice

import numpy as np

from bytecache import ByteTargets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets")
    parser.add_argument("--documents", type=int, default=3)
    options = parser.parse_args()
    for window in islice(ByteTargets(options.targets, by="documents", epochs=1), options.documents):
        # One row a position: -log2 of what the teacher gave to the byte that followed; the tail counts as one symbol.
        hit = window.symbol == window.true[window.row]
        given_to_true = window.tail.astype(np.float64)
        given_to_true[window.row[hit]] = window.prob[hit]
        bits = -np.log2(np.maximum(given_to_true, 1e-12)) * window.mask
        print(
            f"{window.doc_id[0]}: {bits.sum():.1f} bits for {int(window.mask.sum())} supervised positions", flush=True
        )


if __name__ == "__main__":
    main()
