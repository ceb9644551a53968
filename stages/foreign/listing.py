"""What is listed at each position, reduced to path masses: the sparse twin of `stages.engines.paths`.

A row lists k tokens of a distribution; the rest of its mass, T, is unlisted, and nobody knows how it is spread. A prior
pi over tokens, the mean of what the cache lists anywhere, says how much of T a prefix w may hold:

    U(w) = T * sum of pi over unlisted tokens that start with w / sum of pi over all unlisted tokens

With L(w) the listed mass of tokens that start with w, an entry is L(w + b) + U(w + b) for every byte b that some listed
token goes on with, and for the text's own byte. All other mass is unlisted and becomes the position's tail. The value
of an entry depends on the row's list and the prefix alone, never on which byte the text has: were U added to the text's
own byte only, it would tell the label. The true token is a stop with its listed mass, or its share of T if unlisted.

Price: one comparison with the text for each listed token, and one look-up in the trie for each entry.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from bytecache.stages.engines.paths import RowMasses, plan_paths
from bytecache.stages.tokens.byte_trie import find_child
from bytecache.stages.tokens.vocab import Vocabulary

ORDINARY, END_TOKEN, CONTROL = 0, 1, 2


class Listing(NamedTuple):
    """Rows of listed tokens; R rows, N entries."""

    counts: np.ndarray
    """int64 [R]; entries of each row"""
    ids: np.ndarray
    """int64 [N]"""
    masses: np.ndarray
    """float64 [N]; probabilities"""


class Spelling(NamedTuple):
    """A vocabulary as arrays: what the loops below read."""

    kind: np.ndarray
    """uint8 [size]; ORDINARY, END_TOKEN or CONTROL"""
    begin: np.ndarray
    """int64 [size + 1]; where a token's bytes begin in `data`"""
    data: np.ndarray
    """uint8; the bytes of all tokens"""


def spell(vocabulary: Vocabulary) -> Spelling:
    """The arrays of a vocabulary."""
    pieces = [piece or b"" for piece in vocabulary.token_bytes]
    kind = np.array([ORDINARY if piece else CONTROL for piece in pieces], np.uint8)
    kind[vocabulary.end_ids] = END_TOKEN
    begin = np.zeros(len(pieces) + 1, np.int64)
    np.cumsum([len(piece) for piece in pieces], out=begin[1:])
    return Spelling(kind, begin, np.frombuffer(b"".join(pieces), np.uint8))


class ListingReducer:
    """Reduces listed tokens to path masses.

    Args:
        vocabulary: the teacher's.
        prior: float64 [size]; weight of every token where nothing is listed, above 0 for tokens with bytes.
    """

    def __init__(self, vocabulary: Vocabulary, prior: np.ndarray) -> None:
        self.vocabulary = vocabulary
        self.spelling = spell(vocabulary)
        self.prior = np.where(self.spelling.kind == CONTROL, 0.0, prior)
        self._running = np.append(0.0, np.cumsum(self.prior[vocabulary.order]))

    def reduce(self, text: np.ndarray, starts: np.ndarray, tokens: np.ndarray, listing: Listing) -> RowMasses:
        """Path masses of a row before every token of a text and one after the last.

        Args:
            text: uint8 [n]. starts: int64 [R], where the rows' histories end. tokens: int64 [R - 1], the text's own.
            listing: R rows.

        Returns:
            R rows without a top k; `next_logp` is that of the text's own tokens, nats, and NaN for the last row.
        """
        trie = self.vocabulary.trie
        plan = plan_paths(self.vocabulary, text, starts)
        n_levels = np.diff(plan.level_offset)
        room = int((n_levels * (listing.counts + 1)).sum())
        rows = len(starts)
        entry_byte, entry_mass = np.zeros(room, np.uint8), np.zeros(room, np.float32)
        fanout = np.zeros(len(plan.node), np.uint16)
        most_stops = int(listing.counts.sum()) + rows
        stop_depth, stop_token = np.zeros(most_stops, np.uint16), np.zeros(most_stops, np.int32)
        stop_mass = np.zeros(most_stops, np.float32)
        n_stops = np.zeros(rows, np.int32)
        end, control = np.zeros(rows, np.float32), np.zeros(rows, np.float32)
        following = np.append(tokens, -1)
        n_entries, total_stops = _reduce(
            text, starts, following, listing.counts, listing.ids, listing.masses,
            self.spelling.kind, self.spelling.begin, self.spelling.data, self.prior, self._running,
            float(self.prior[self.spelling.kind != ORDINARY].sum()), plan.level_offset, plan.node, trie.lo, trie.hi,
            trie.first_child, trie.byte, fanout, entry_byte, entry_mass, n_stops, stop_depth, stop_token, stop_mass,
            end, control,
        )  # fmt: skip
        next_logp = np.full(rows, np.nan, np.float32)
        first = np.cumsum(n_stops) - n_stops
        for row in range(rows - 1):
            stops = slice(first[row], first[row] + n_stops[row])
            mass = stop_mass[stops][stop_token[stops] == following[row]].sum(dtype=np.float64)
            next_logp[row] = np.log(mass) if mass > 0.0 else -np.inf
        return RowMasses(
            np.zeros(rows, np.float32), next_logp, end, control, n_levels.astype(np.int32), fanout,
            entry_byte[:n_entries], entry_mass[:n_entries], n_stops, stop_depth[:total_stops],
            stop_token[:total_stops], stop_mass[:total_stops], np.zeros((rows, 0), np.int32),
            np.zeros((rows, 0), np.float32),
        )  # fmt: skip


@njit(cache=True)
def _shared(data: np.ndarray, begin: int, end: int, text: np.ndarray, start: int) -> int:
    """How many bytes of a token are those of the text from `start` on."""
    length = 0
    while begin + length < end and start + length < len(text) and data[begin + length] == text[start + length]:
        length += 1
    return length


@njit(cache=True)
def _reduce(
    text: np.ndarray, starts: np.ndarray, following: np.ndarray, counts: np.ndarray, ids: np.ndarray,
    masses: np.ndarray, kind: np.ndarray, begin: np.ndarray, data: np.ndarray, prior: np.ndarray,
    running: np.ndarray, special: float, level_offset: np.ndarray, node: np.ndarray, lo: np.ndarray, hi: np.ndarray,
    first_child: np.ndarray, byte: np.ndarray, fanout: np.ndarray, entry_byte: np.ndarray, entry_mass: np.ndarray,
    n_stops: np.ndarray, stop_depth: np.ndarray, stop_token: np.ndarray, stop_mass: np.ndarray, end: np.ndarray,
    control: np.ndarray,
) -> tuple[int, int]:  # fmt: skip
    """Write every row's levels, entries and stops; returns how many entries and stops there are."""
    longest = 0
    for row in range(len(counts)):
        longest = max(longest, counts[row])
    shared = np.zeros(longest, np.int64)
    acc, acc_prior = np.zeros(256), np.zeros(256)
    first = written = stops = 0
    for row in range(len(counts)):
        start = starts[row]
        unlisted, unlisted_prior = 1.0, running[len(running) - 1] + special
        for k in range(counts[row]):
            token, mass = ids[first + k], masses[first + k]
            unlisted -= mass
            shared[k] = -1
            if token >= len(kind) or kind[token] == 2:
                control[row] += mass
                continue
            unlisted_prior -= prior[token]
            if kind[token] == 1:
                end[row] += mass
                continue
            shared[k] = _shared(data, begin[token], begin[token + 1], text, start)
        unlisted = max(unlisted, 0.0)
        scale = unlisted / unlisted_prior if unlisted_prior > 0.0 else 0.0
        n_levels = level_offset[row + 1] - level_offset[row]
        for depth in range(n_levels):
            level = level_offset[row] + depth
            before = written
            for k in range(counts[row]):
                if shared[k] < depth:
                    continue
                token = ids[first + k]
                if begin[token + 1] - begin[token] > depth:
                    b = data[begin[token] + depth]
                    acc[b] += masses[first + k]
                    acc_prior[b] += prior[token]
                elif depth > 0:
                    stop_depth[stops], stop_token[stops], stop_mass[stops] = depth, token, masses[first + k]
                    stops += 1
                    n_stops[row] += 1
            if depth > 0 and following[row] >= 0:
                token, is_listed = following[row], False
                for k in range(counts[row]):
                    is_listed |= ids[first + k] == token
                if not is_listed and begin[token + 1] - begin[token] == depth:
                    stop_depth[stops], stop_token[stops], stop_mass[stops] = depth, token, scale * prior[token]
                    stops += 1
                    n_stops[row] += 1
            follows = text[start + depth] if depth + 1 < n_levels else -1
            for b in range(256):
                if acc[b] == 0.0 and acc_prior[b] == 0.0 and b != follows:
                    continue
                child = find_child(first_child, byte, node[level], b)
                weight = running[hi[child]] - running[lo[child]] - acc_prior[b]
                entry_byte[written] = b
                entry_mass[written] = min(acc[b] + scale * max(weight, 0.0), 1.0)
                written += 1
                acc[b] = acc_prior[b] = 0.0
            fanout[level] = written - before
        first += counts[row]
    return written, stops
