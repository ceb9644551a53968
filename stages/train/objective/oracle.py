"""What an objective costs a student that reaches it: bits per byte above its teacher, without any training.

Tokens are a function of the text, so the teacher's restriction to them is a distribution p* over tokens, and a student
that equals p* has the teacher's own bits per byte. A choice that is learned from a target has

    excess = -log target(true choice) + log p*(true choice),

which is summed over the choices that the objective takes from the teacher alone; those that the text decides or
corrects have their minimum at p* already (`projection.py`). The sum says how far above its teacher a student ends that
hits every target.

*p\\* along the text.* Between two *certain ends* (byte pairs that no token of the vocabulary holds, so that some token
ends between them whatever follows) the tokens of a chunk depend on its bytes alone. The teacher's rows along the text
give every turn the text could have taken: at byte i to b instead of the text's own, with probability P(x[..i]) P(b).
Of the chunk as it was, tokens are known; of a turn, `segmentation` knows the shares of where each token would have
ended. So there is one measure over chunks, and each choice is a ratio of two of its sums: the product of a chunk's
choices telescopes to the teacher's probability of the chunk, exactly, whatever the shares are (`closure` says how
exactly). What the shares decide is only how the chunk's bits fall to its choices, and of that only what was left open.
Price: for every token, the listed entries from its start to its chunk's end: about 1 MB of text/s.
"""

import math
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from bytecache.schemas.arrays import END, F64, I64
from bytecache.stages.tokens.byte_trie import find_child
from bytecache.stages.tokens.vocab import Vocabulary
from bytecache.stages.train.batches import stream
from bytecache.stages.train.batches.token_shard import TokenShard
from bytecache.stages.train.objective.chunks import byte_pairs
from bytecache.stages.train.objective.marginal import Choices, Marginal

REACH = 64
"""Bytes of a token that are looked at."""
HORIZON = 48
"""Bytes after a token's end in which the text may turn; further on it went as it did."""
FLOOR = 2.0**-24
"""Least probability of a symbol that the teacher does not list."""


@dataclass(frozen=True)
class OracleExcess:
    """Sums over a split, in nats where not said otherwise."""

    text_bytes: int
    choices: int
    certain: int
    """Choices that the objective takes from the teacher alone."""
    nats: float
    """Excess over those."""
    closure: float
    """p*'s nats over all choices, less the teacher's: 0 but for tails and the horizon."""
    skipped: dict[str, int]

    @property
    def bits_per_byte(self) -> float:
        """How far above its teacher a student ends that hits every target."""
        return self.nats / max(self.text_bytes, 1) / math.log(2)

    @property
    def certain_share(self) -> float:
        """Of choices, how many the teacher decides."""
        return self.certain / max(self.choices, 1)

    @property
    def closure_bits_per_byte(self) -> float:
        """`closure` per byte of text, in bits."""
        return self.closure / max(self.text_bytes, 1) / math.log(2)


class _Cuts(NamedTuple):
    """The vocabulary's trie and the shares on it, as arrays (`NodeTables`, `Segmentation`); joins bool [256, 256]: byte
    pairs that some token holds."""

    first_child: I64
    byte: I64
    n_equal: I64
    base: I64
    depth: I64
    on: F64
    off: F64
    rare: F64
    joins: npt.NDArray[np.bool_]


class _Document(NamedTuple):
    """One document of n bytes in K tokens, the END token last.

    text int64 [n + 1], END last. start, end int64 [K]. entry int64 [n + 2]: a position's first entry; symbol int64,
    prob float64 [E]; tail float64 [n + 1]. true float64 [n + 1]: probability of the text's own symbol. forced bool
    [n + 1]: a token ends in front, for certain. node int64 [K, REACH + 1]: where the trie leads from each token's start
    along the text; leave int64 [K]: the position at which it leads nowhere any more.
    """

    text: I64
    start: I64
    end: I64
    entry: I64
    symbol: I64
    prob: F64
    tail: F64
    true: F64
    forced: npt.NDArray[np.bool_]
    node: I64
    leave: I64


@njit(cache=True)
def _walks(text, start, first_child, byte, node, leave):  # type: ignore[no-untyped-def]
    """Fill `node` and `leave` of a document."""
    for k in range(len(start)):
        at, i = 0, start[k]
        node[k, 0] = 0
        while i < len(text) - 1 and i - start[k] < REACH:
            child = find_child(first_child, byte, at, text[i])
            if child < 0:
                break
            at, i = child, i + 1
            node[k, i - start[k]] = at
        leave[k] = i


@njit(cache=True)
def _share(doc, cuts, k, i, b, ended):  # type: ignore[no-untyped-def]
    """Of places where token k starts and the text goes as it did up to i and then to b, those where the token ends
    after `ended` bytes; 0: where it passes b. Once the text has left the trie, what it did is what it does."""
    if i > doc.leave[k]:
        return 1.0 if ended == doc.end[k] - doc.start[k] else 0.0
    at = doc.node[k, i - doc.start[k]]
    child = find_child(cuts.first_child, cuts.byte, at, b) if 0 <= b < 256 else -1
    if ended > cuts.depth[at]:
        return 0.0
    if child >= 0:
        return cuts.on[cuts.base[child] + ended]
    return cuts.off[cuts.base[at] + ended] if ended > 0 else 0.0


@njit(cache=True)
def _certainly_ends(doc, cuts, i, b):  # type: ignore[no-untyped-def]
    """Whether a token ends before position i where b follows."""
    return i == 0 or b >= 256 or not cuts.joins[doc.text[i - 1], b]


@njit(cache=True)
def _turn(doc, cuts, token, i, b, mass, stop, go, aside):  # type: ignore[no-untyped-def]
    """Give the mass of a turn at i to b to the choices of `token` at its nodes d: `stop`, `go` along the text, or
    another child than the text's (`aside`)."""
    length = min(doc.end[token] - doc.start[token], REACH)
    read = i - doc.start[token]
    ended = 0.0
    for d in range(min(length, read) + 1):
        here = _share(doc, cuts, token, i, b, d) if d > 0 else 0.0
        stop[d] += mass * here
        if read > d:
            ended += here
            go[d] += mass * max(1 - ended, 0.0)
        elif d == 0 and b >= 256:
            aside[d] += mass
        else:
            aside[d] += mass * _share(doc, cuts, token, i, b, 0)


@njit(cache=True)
def _unlisted(doc, cuts, token, i, mass, stop, go, aside):  # type: ignore[no-untyped-def]
    """The same for the tail at i: at i's own node it stops as often as bytes at large do; elsewhere it goes on."""
    length = min(doc.end[token] - doc.start[token], REACH)
    read = i - doc.start[token]
    for d in range(min(length, read)):
        go[d] += mass
    if read > length or i > doc.leave[token]:
        stop[length] += mass
        return
    at = doc.node[token, read]
    halts = cuts.rare[at] if read > 0 and cuts.n_equal[at] > 0 else 0.0
    if read > 0 and cuts.first_child[at] == cuts.first_child[at + 1]:
        halts = 1.0
    stop[read] += mass * halts
    aside[read] += mass * (1 - halts)


@njit(cache=True)
def _as_it_was(doc, token, i, mass, stop, go):  # type: ignore[no-untyped-def]
    """The same where the text went as it did up to i, and its tokens are its own."""
    length = min(doc.end[token] - doc.start[token], REACH)
    for d in range(min(length, i - doc.start[token])):
        go[d] += mass
    if i >= doc.start[token] + length:
        stop[length] += mass


@njit(cache=True)
def _nats(doc, cuts, nats):  # type: ignore[no-untyped-def]
    """Fill nats [K, REACH + 1]: -log p* of what each token chose at each node, its end after its bytes."""
    stop, go, aside = np.zeros(REACH + 1), np.zeros(REACH + 1), np.zeros(REACH + 1)
    first = first_before = 0
    last = len(doc.start) - 1
    for token in range(len(doc.start)):
        begin = doc.start[token]
        if doc.forced[begin]:
            first_before, first = first, token
        stop[:], go[:], aside[:] = 0.0, 0.0, 0.0
        length = 0 if token == last else min(doc.end[token] - begin, REACH)
        reached, i = 1.0, begin
        while True:
            over = i > begin and doc.forced[i]
            for e in range(doc.entry[i], doc.entry[i + 1]):
                b = doc.symbol[e]
                if over and _certainly_ends(doc, cuts, i, b):
                    _as_it_was(doc, token, i, reached * doc.prob[e], stop, go)
                    continue
                if b == doc.text[i] and not over:
                    continue
                # Had the text turned here, the tokens before this one might have been others.
                mass = reached * doc.prob[e]
                earliest = first
                if i == begin and doc.forced[i]:
                    earliest = token if _certainly_ends(doc, cuts, i, b) else first_before
                for k in range(earliest, token):
                    if doc.leave[k] >= i:
                        mass *= _share(doc, cuts, k, i, b, doc.end[k] - doc.start[k])
                _turn(doc, cuts, token, i, b, mass, stop, go, aside)
            _unlisted(doc, cuts, token, i, reached * doc.tail[i], stop, go, aside)
            if over or i == len(doc.text) - 1:
                break
            reached *= doc.true[i]
            i += 1
            if i > begin + length + HORIZON:
                _as_it_was(doc, token, i, reached, stop, go)
                break
        if token == last:
            nats[token, 0] = -math.log(doc.true[begin] / (aside[0] + doc.true[begin]))
            continue
        for d in range(length + 1):
            chosen = go[d] if d < length else stop[d]
            nats[token, d] = -math.log(max(chosen, 1e-30) / max(stop[d] + go[d] + aside[d], 1e-30))


def _document(source: TokenShard, first: int, last: int, lo: int, hi: int, cuts: _Cuts) -> _Document:
    """Tokens [first, last) of the document at positions [lo, hi)."""
    text = source.symbol[lo:hi].astype(np.int64)
    triples = source.shard.triples(lo, hi)
    row, symbol = np.asarray(triples.row, np.int64), np.asarray(triples.symbol, np.int64)
    prob, tail = triples.prob.astype(np.float64), np.asarray(source.shard.tails(lo, hi), np.float64)
    count = np.bincount(row, minlength=len(text))
    true = np.maximum(tail / np.maximum(END + 1 - count, 1), FLOOR)
    hit = symbol == text[row]
    true[row[hit]] = prob[hit]
    forced = np.ones(len(text), np.bool_)
    forced[1:-1] = ~cuts.joins[text[:-2], text[1:-1]]
    start, end = source.start[first:last] - lo, source.end[first:last] - lo
    node, leave = np.zeros((last - first, REACH + 1), np.int64), np.zeros(last - first, np.int64)
    _walks(text, start, cuts.first_child, cuts.byte, node, leave)
    entry = np.concatenate([[0], np.cumsum(count)])
    return _Document(text, start, end, entry, symbol, prob, tail, true, forced, node, leave)


def _target_nats(choices: Choices, marginal: Marginal) -> F64:
    """-log of each choice's target of what was chosen, float64 [S]; an unlisted one has its share of the bucket."""
    assert choices.targets is not None
    slot, symbol, prob, tail = (c.numpy() for c in choices.targets)
    listed = np.bincount(slot, minlength=len(tail))
    target = tail.astype(np.float64) / np.maximum(marginal.tables.offered(choices.node).numpy() - listed, 1)
    hit = symbol == choices.true.numpy()[slot]
    target[slot[hit]] = prob[hit]
    nats: F64 = -np.log(np.maximum(target, FLOOR))
    return nats


def _cuts(marginal: Marginal, vocabulary: Vocabulary) -> _Cuts:
    first_child, byte = marginal.tables.walk()
    cut = marginal.segmentation
    on, off, rare = (table.detach().double().cpu().numpy() for table in (cut.on, cut.off, cut.rare))
    n_equal, base = marginal.tables.table("n_equal").numpy(), cut.get_buffer("base").cpu().numpy()
    return _Cuts(first_child, byte, n_equal, base, cut.depth, on, off, rare, byte_pairs(vocabulary))


def oracle_excess(marginal: Marginal, reader: stream.ShardReader, *, limit: int = 0) -> OracleExcess:
    """The oracle excess of `marginal`, with what it has observed, on the split of `reader`.

    Args:
        limit: stop after about so many bytes of text; 0 = all of it.
    """
    cuts, cut = _cuts(marginal, reader.vocabulary), marginal.segmentation
    sums: Counter[str] = Counter()
    nats = closure = 0.0
    for number in range(len(reader.positions)):
        source = reader[number]
        edges = np.concatenate([[0], 1 + np.flatnonzero(np.diff(source.row)), [len(source.row)]])
        for first, last in pairwise(edges.tolist()):
            lo, hi = (int(x) for x in np.asarray(source.shard.doc_start)[source.row[first] : source.row[first] + 2])
            plain = source.start[first] == lo and source.place is None and not source.skip[first:last].any()
            if not plain or first == last:
                sums["skipped"] += 1
                continue
            micro = stream.collate(
                [stream.Row(source, first, last)], with_targets=True, byte_reduction="sum", limit=REACH
            )
            choices = marginal.choices(micro, "sum")
            document = _document(source, first, last, lo, hi, cuts)
            best = np.zeros((last - first, REACH + 1))
            _nats(document, cuts, best)
            depth = cut.depth[choices.node.numpy()]
            assert choices.certain is not None
            certain = choices.certain.numpy()
            excess = _target_nats(choices, marginal) - best[choices.row.numpy(), depth]
            nats += float(excess[certain].sum())
            closure += float(best.sum() + np.log(document.true).sum())
            sums.update(choices=len(depth), certain=int(certain.sum()), bytes=hi - lo - 1)
        if limit and sums["bytes"] >= limit:
            break
    skipped = {"a prompt, or a space that the tokenizer puts in front": sums["skipped"]} if sums["skipped"] else {}
    return OracleExcess(sums["bytes"], sums["choices"], sums["certain"], nats, closure, skipped)
