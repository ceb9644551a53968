"""A vocabulary of fourteen tokens whose trie can be asked token by token."""

import torch

from bytecache.stages.tokens.vocab import Vocabulary
from bytecache.stages.train.objective.node_sums import NodeTables

WORDS = [
    b"a",
    b"b",
    b"c",
    b"ab",
    b"abc",
    b"abd",
    b"ba",
    b"cab",
    b"ab",
    b"bcca",
    b"\xe6\x97\xa5",
    b"\xe6",
    b"\x97",
    b"\xa5",
]
END_ID, START_ID, ROWS = len(WORDS), len(WORDS) + 1, len(WORDS) + 4


def vocabulary() -> Vocabulary:
    """14 tokens, one spelt twice, an end, a start, and two rows of padding beyond the tokenizer."""
    return Vocabulary([*WORDS, None, None], start_id=START_ID, end_ids=[END_ID], encoder=None)  # type: ignore[arg-type]


def prefixes() -> list[bytes]:
    return sorted({w[:d] for w in WORDS for d in range(len(w) + 1)})


def node_number(tables: NodeTables, prefix: bytes) -> int:
    node = torch.tensor([0])
    for value in prefix:
        node = tables.child_of(node, torch.tensor([value]))
        assert int(node) > 0
    return int(node)
