"""The static end-of-token table: what a teacher says after a lone token, one row per token, built once.

When the text could have been cut after a token u where neither the canonical tokens nor an evaluated branch break,
the lattice needs p(next byte | ... u) and has no row for it. The table answers with p(next byte | start, u): wrong
about the context, right about what a token that ends with these bytes is followed by. It covers the tokens that are
proper prefixes of the most other tokens, because those are the cuts a text can have inside its canonical tokens.

Price: one prompt of two tokens per row, at every start of the teacher stage.
"""

import numpy as np

from schemas.quantise import SYMBOLS
from schemas.token_dump import EndTable
from stages.engines.engine import Engine, Prompt
from stages.engines.paths import RowMasses
from stages.tokens.vocab import Vocabulary


def table_tokens(vocabulary: Vocabulary, count: int) -> np.ndarray:
    """The `count` ordinary tokens with the most proper extensions, ties to the smaller id; int32, ascending."""
    trie = vocabulary.trie
    extensions = trie.hi - trie.lo - trie.n_equal
    node = np.flatnonzero((trie.n_equal > 0) & (extensions > 0))
    token = vocabulary.order[trie.lo[node]]
    best = np.lexsort((token, -extensions[node]))[:count]
    return np.sort(token[best]).astype(np.int32)


def build_table(engine: Engine, vocabulary: Vocabulary, tokens: np.ndarray) -> EndTable:
    """Ask the engine for the rows of `tokens`; the same prompts in the same order give the same table."""
    if not len(tokens):
        return EndTable.empty()
    nothing, start = np.zeros(0, np.uint8), np.zeros(1, np.int64)
    prompts = [
        Prompt(f"end-of-token table, token {t}", np.array([vocabulary.start_id, t], np.int32), 1, nothing, start)
        for t in tokens
    ]
    return EndTable(tokens, np.stack([_first_symbols(rows) for rows in engine.score(prompts)]))


def _first_symbols(rows: RowMasses) -> np.ndarray:
    mass = np.zeros(SYMBOLS, np.float32)
    mass[rows.entry_byte] = rows.entry_mass
    mass[256] = rows.end[0]
    return mass
