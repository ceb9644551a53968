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

from bytecache.schemas.loops import inner_loop, row_loop
from bytecache.stages.engines.paths import PathPlan, plan_paths
from bytecache.stages.engines.rows import RowMasses
from bytecache.stages.tokens.byte_trie import Trie, find_child
from bytecache.stages.tokens.vocab import Vocabulary

ORDINARY, END_TOKEN, CONTROL = 0, 1, 2
ROUNDING = 1e-9
"""part of the whole prior below which what is left of it is the rounding of its sums: then nothing is unlisted"""


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


class _Teacher(NamedTuple):
    """A vocabulary and its prior: what is the same for every text."""

    spelling: Spelling
    trie: Trie
    prior: np.ndarray
    """float64 [size]; 0 for CONTROL"""
    running: np.ndarray
    """float64 [M + 1]; sums of the prior over the tokens in byte order"""
    special: float
    """prior of the tokens that are not ORDINARY"""


class _Text(NamedTuple):
    """A text and where its tokens begin."""

    data: np.ndarray
    """uint8 [n]"""
    starts: np.ndarray
    """int64 [R]"""
    following: np.ndarray
    """int64 [R]; the token that begins there, -1 for the last row"""


class _Masses(NamedTuple):
    """Room for what `RowMasses` says of R rows."""

    fanout: np.ndarray
    entry_byte: np.ndarray
    entry_mass: np.ndarray
    n_stops: np.ndarray
    stop_depth: np.ndarray
    stop_token: np.ndarray
    stop_mass: np.ndarray
    end: np.ndarray
    control: np.ndarray

    @classmethod
    def empty(cls, rows: int, levels: int, entries: int, stops: int) -> "_Masses":
        """With room for so many levels, entries and stops."""
        return cls(
            np.zeros(levels, np.uint16),
            np.zeros(entries, np.uint8),
            np.zeros(entries, np.float32),
            np.zeros(rows, np.int32),
            np.zeros(stops, np.uint16),
            np.zeros(stops, np.int32),
            np.zeros(stops, np.float32),
            np.zeros(rows, np.float32),
            np.zeros(rows, np.float32),
        )


class _Sums(NamedTuple):
    """What is known of the row and the level at hand."""

    shared: np.ndarray
    """int64 [longest row]; bytes that each listed token has in common with the text, -1 for those without bytes"""
    byte_mass: np.ndarray
    """float64 [256]; listed mass by next byte, 0 before and after a level"""
    byte_prior: np.ndarray
    """float64 [256]; prior of the same tokens"""


class ListingReducer:
    """Reduces listed tokens to path masses.

    Args:
        vocabulary: the teacher's.
        prior: float64 [size]; weight of every token where nothing is listed, above 0 for tokens with bytes.
    """

    def __init__(self, vocabulary: Vocabulary, prior: np.ndarray) -> None:
        self.vocabulary = vocabulary
        self.spelling = spelling = spell(vocabulary)
        self.prior = np.where(spelling.kind == CONTROL, 0.0, prior)
        running = np.append(0.0, np.cumsum(self.prior[vocabulary.order]))
        special = float(self.prior[spelling.kind != ORDINARY].sum())
        self._teacher = _Teacher(spelling, vocabulary.trie, self.prior, running, special)

    def reduce(self, text: np.ndarray, starts: np.ndarray, tokens: np.ndarray, listing: Listing) -> RowMasses:
        """Path masses of a row before every token of a text and one after the last.

        Args:
            text: uint8 [n]. starts: int64 [R], where the rows' histories end. tokens: int64 [R - 1], the text's own.
            listing: R rows.

        Returns:
            R rows without a top k; `next_logp` is that of the text's own tokens, nats, and NaN for the last row.
        """
        plan = plan_paths(self.vocabulary, text, starts)
        n_levels, rows = np.diff(plan.level_offset), len(starts)
        most_entries = int((n_levels * (listing.counts + 1)).sum())
        masses = _Masses.empty(rows, len(plan.node), most_entries, int(listing.counts.sum()) + rows)
        following = np.append(tokens, -1)
        n_entries, n_stops = _reduce(_Text(text, starts, following), listing, self._teacher, plan, masses)
        return RowMasses(
            log_norm=np.zeros(rows, np.float32), end=masses.end, control=masses.control,
            n_levels=n_levels.astype(np.int32), fanout=masses.fanout,
            entry_byte=masses.entry_byte[:n_entries], entry_mass=masses.entry_mass[:n_entries],
            n_stops=masses.n_stops, stop_depth=masses.stop_depth[:n_stops],
            stop_token=masses.stop_token[:n_stops], stop_mass=masses.stop_mass[:n_stops],
            topk_id=np.zeros((rows, 0), np.int32), topk_logp=np.zeros((rows, 0), np.float32),
            next_logp=_next_logp(masses, following),
        )  # fmt: skip


def _next_logp(masses: _Masses, following: np.ndarray) -> np.ndarray:
    """float32 [R]: log-probability of the token that follows each row, NaN for the last."""
    next_logp = np.full(len(following), np.nan, np.float32)
    first = np.cumsum(masses.n_stops) - masses.n_stops
    for row in range(len(following) - 1):
        stops = slice(first[row], first[row] + masses.n_stops[row])
        mass = masses.stop_mass[stops][masses.stop_token[stops] == following[row]].sum(dtype=np.float64)
        next_logp[row] = np.log(mass) if mass > 0.0 else -np.inf
    return next_logp


@inner_loop
def _shared(data: np.ndarray, begin: int, end: int, text: np.ndarray, start: int) -> int:
    """How many bytes of a token are those of the text from `start` on."""
    length = 0
    while begin + length < end and start + length < len(text) and data[begin + length] == text[start + length]:
        length += 1
    return length


@njit(cache=True)
def _reduce(text: _Text, listing: Listing, teacher: _Teacher, plan: PathPlan, masses: _Masses) -> tuple[int, int]:
    """Write every row's levels, entries and stops; returns how many entries and stops there are."""
    longest = 0
    for row in range(len(listing.counts)):
        longest = max(longest, listing.counts[row])
    sums = _Sums(np.zeros(longest, np.int64), np.zeros(256), np.zeros(256))
    written: tuple[int, int] = _reduce_rows(text, listing, teacher, plan, masses, sums)
    return written


@row_loop
def _reduce_rows(
    text: _Text, listing: Listing, teacher: _Teacher, plan: PathPlan, masses: _Masses, sums: _Sums
) -> tuple[int, int]:
    first = n_entries = n_stops = 0
    for row in range(len(listing.counts)):
        ids = listing.ids[first : first + listing.counts[row]]
        listed = listing.masses[first : first + listing.counts[row]]
        scale = _compare(row, ids, listed, text, teacher, masses, sums.shared)
        n_levels = plan.level_offset[row + 1] - plan.level_offset[row]
        before = n_stops
        for depth in range(n_levels):
            level = plan.level_offset[row] + depth
            n_stops = _note_listed(depth, ids, listed, teacher, masses, n_stops, sums)
            if depth > 0 and text.following[row] >= 0:
                n_stops = _note_unlisted(depth, text.following[row], ids, scale, teacher, masses, n_stops)
            follows = np.int64(text.data[text.starts[row] + depth]) if depth + 1 < n_levels else -1
            n_here = _note_entries(plan.node[level], follows, scale, teacher, masses, n_entries, sums)
            masses.fanout[level] = n_here
            n_entries += n_here
        masses.n_stops[row] = n_stops - before
        first += listing.counts[row]
    return n_entries, n_stops


@inner_loop
def _compare(
    row: int, ids: np.ndarray, listed: np.ndarray, text: _Text, teacher: _Teacher, masses: _Masses, shared: np.ndarray
) -> float:
    """How far each listed token is the text, in `shared`, -1 for those without bytes, whose mass is END or control.

    Returns the unlisted mass over its prior.
    """
    kind, begin, data = teacher.spelling
    whole_prior = teacher.running[len(teacher.running) - 1] + teacher.special
    unlisted, unlisted_prior = 1.0, whole_prior
    for k in range(len(ids)):
        token, mass = ids[k], listed[k]
        unlisted -= mass
        shared[k] = -1
        if token >= len(kind) or kind[token] == CONTROL:
            masses.control[row] += mass
            continue
        unlisted_prior -= teacher.prior[token]
        if kind[token] == END_TOKEN:
            masses.end[row] += mass
            continue
        shared[k] = _shared(data, begin[token], begin[token + 1], text.data, text.starts[row])
    return max(unlisted, 0.0) / unlisted_prior if unlisted_prior > ROUNDING * whole_prior else 0.0


@inner_loop
def _note_listed(
    depth: int, ids: np.ndarray, listed: np.ndarray, teacher: _Teacher, masses: _Masses, n_stops: int, sums: _Sums
) -> int:
    """Sum the listed tokens that reach `depth` by their next byte; those that end there are stops. Returns stops."""
    begin, data = teacher.spelling.begin, teacher.spelling.data
    shared, byte_mass, byte_prior = sums
    for k in range(len(ids)):
        if shared[k] < depth:
            continue
        token = ids[k]
        if begin[token + 1] - begin[token] > depth:
            b = data[begin[token] + depth]
            byte_mass[b] += listed[k]
            byte_prior[b] += teacher.prior[token]
        elif depth > 0:
            n_stops = _stop(masses, n_stops, depth, token, listed[k])
    return n_stops


@inner_loop
def _note_unlisted(
    depth: int, token: int, ids: np.ndarray, scale: float, teacher: _Teacher, masses: _Masses, n_stops: int
) -> int:
    """The text's own token is a stop where it ends, with its share of the tail, if it is not listed."""
    is_listed = False
    for k in range(len(ids)):
        is_listed |= ids[k] == token
    begin = teacher.spelling.begin
    if not is_listed and begin[token + 1] - begin[token] == depth:
        n_stops = _stop(masses, n_stops, depth, token, scale * teacher.prior[token])
    return n_stops


@inner_loop
def _stop(masses: _Masses, at: int, depth: int, token: int, mass: float) -> int:
    masses.stop_depth[at], masses.stop_token[at], masses.stop_mass[at] = depth, token, mass
    return at + 1


@inner_loop
def _note_entries(
    node: int, follows: int, scale: float, teacher: _Teacher, masses: _Masses, at: int, sums: _Sums
) -> int:
    """Write a level's entries, for every byte that is listed and the one that follows; empties the sums. How many."""
    trie, running, byte_mass, byte_prior = teacher.trie, teacher.running, sums.byte_mass, sums.byte_prior
    n = 0
    for b in range(256):
        if byte_mass[b] == 0.0 and byte_prior[b] == 0.0 and b != follows:
            continue
        child = find_child(trie.first_child, trie.byte, node, b)
        weight = running[trie.hi[child]] - running[trie.lo[child]] - byte_prior[b]
        masses.entry_byte[at + n] = b
        masses.entry_mass[at + n] = min(byte_mass[b] + scale * max(weight, 0.0), 1.0)
        byte_mass[b] = byte_prior[b] = 0.0
        n += 1
    return n
