"""A foreign cache as documents with a teacher's distributions: what stands where, what is trusted, what is left out.

Three things these files do not say are read off their content, or asked for:

* *alignment*: which token an entry speaks of. Entry j of a record of T tokens and P entries is about token j + offset;
  the offset under which the records' own tokens are by far the likeliest is taken, else the user is asked.
* *marked true tokens*: engines list the true token even where it is not among the top k. Where a position has one entry
  more than most, or where the true token is always listed, an entry that is the true token and the least likely of its
  position is there because it is true. It is taken off the list: it would tell the label.
* *renormalised lists*: log-probabilities that add up to 1 over k entries have lost the mass of all other tokens; they
  are refused unless the user takes them as they are.

A record is cut into documents at END tokens; control tokens at its ends are dropped; one inside sets the document
aside, and so does text that is no UTF-8; a record without any text counts as one that is set aside. The leading tokens
of a document about which nothing is listed (a prompt, or the first token without a start token) are its context: read,
not learned.
"""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from bytecache.schemas.dump.window import Window
from bytecache.schemas.errors import ConfigError, InputError
from bytecache.stages.engines.engine import Prompt
from bytecache.stages.engines.listing import CONTROL, END_TOKEN, Listing, ListingReducer, spell
from bytecache.stages.foreign.records import Cache, Record
from bytecache.stages.teacher.windows import WindowPlan, new_window
from bytecache.stages.tokens.vocab import Vocabulary

ALIGNMENTS = ("of", "after", "of-right", "after-right")
"""Entry j is about token j, j + 1, j + T - P, j + T - P + 1."""
SAMPLE = 64
"""Records that are looked at before anything is imported."""
RENORMALISED = 0.9999
PRIOR_SMOOTHING = 1e-3
"""Part of the prior that is spread evenly, so that no token is impossible."""


class Reading(NamedTuple):
    """How a cache is to be read."""

    alignment: str
    k: int
    """Entries of most positions."""
    always_true: bool
    """Whether the true token is listed everywhere."""
    listed_mass: float
    """Mean probability of what a position lists."""
    hit_rate: float
    """Share of positions that list the true token."""


class Document(NamedTuple):
    """A run of ordinary tokens. R = T + 1 rows."""

    tokens: np.ndarray
    """int64 [T]"""
    rows: np.ndarray
    """int64 [R]; entry of the record about each token and about what follows the last; -1 for none"""


class Aside(NamedTuple):
    """A document that is set aside."""

    reason: str


def offset_of(alignment: str, n_tokens: int, n_entries: int) -> int:
    """Token that entry 0 is about."""
    shift = 1 if alignment.startswith("after") else 0
    return shift + (n_tokens - n_entries if alignment.endswith("right") else 0)


def read_off(cache: Cache, alignment: str, renormalised: bool) -> Reading:
    """How to read a cache, from its first records.

    Raises:
        ConfigError: the alignment cannot be told, or lists add up to 1 and `renormalised` was not given.
        InputError: nothing is listed, or what is listed are no log-probabilities.
    """
    sample = [cache[number] for number in range(min(SAMPLE, len(cache)))]
    counts = Counter(int(count) for record in sample for count in record.counts if count)
    if not counts:
        raise InputError(f"{cache.place}: its first {len(sample)} records list no token at any position")
    k = counts.most_common(1)[0][0]
    sums = np.concatenate([_sums(record)[record.counts > 0] for record in sample])
    if sums.max() > 1.01:
        raise InputError(
            f"{cache.place}: probabilities of one position add up to {sums.max():.3f}; these are no natural "
            "log-probabilities of one distribution (logits, other logarithms, or another temperature than 1)"
        )
    scores = {name: _true_mass(sample, name) for name in ALIGNMENTS}
    chosen = alignment or _best(scores, sample, cache)
    hits = scores[chosen][1]
    if sums.mean() > RENORMALISED and not renormalised:
        raise ConfigError(
            f"{cache.place}: the {k} entries of a position add up to {sums.mean():.6f}: the lists were renormalised "
            "and the mass of all other tokens is lost; take a cache that was not, or give --renormalised and expect "
            "targets that are too sure of what is listed"
        )
    return Reading(chosen, k, hits == 1.0, float(sums.mean()), hits)


def _sums(record: Record) -> np.ndarray:
    """float64 [P]; what every position lists in all."""
    position = np.repeat(np.arange(len(record.counts)), record.counts)
    return np.bincount(position, weights=np.exp(record.logps), minlength=len(record.counts))


def _true_mass(sample: list[Record], alignment: str) -> tuple[float, float]:
    """(mean listed probability of the tokens themselves, how often they are listed) under an alignment."""
    masses: list[np.ndarray] = []
    for record in sample:
        about = np.arange(len(record.counts)) + offset_of(alignment, len(record.tokens), len(record.counts))
        known = (record.counts > 0) & (about < len(record.tokens))
        position = np.repeat(np.arange(len(record.counts)), record.counts)
        token = record.tokens[np.minimum(about, len(record.tokens) - 1)] if len(record.tokens) else about
        is_true = record.ids == token[position]
        mass = np.bincount(position[is_true], weights=np.exp(record.logps[is_true]), minlength=len(record.counts))
        masses.append(mass[known])
    every = np.concatenate(masses)
    return (float(every.mean()), float((every > 0).mean())) if every.size else (0.0, 0.0)


def _best(scores: dict[str, tuple[float, float]], sample: list[Record], cache: Cache) -> str:
    """The alignment under which the tokens are likeliest; those with the same offsets count as one."""
    offsets = {
        name: tuple(offset_of(name, len(record.tokens), len(record.counts)) for record in sample) for name in scores
    }
    ranked = sorted(scores, key=lambda name: -scores[name][0])
    best = ranked[0]
    others = [name for name in ranked if offsets[name] != offsets[best]]
    second = scores[others[0]][0] if others else 0.0
    if scores[best][0] < 0.05 or scores[best][0] < 2 * second:
        said = ", ".join(f"{name} {mass:.3f}" for name, (mass, _) in scores.items())
        raise ConfigError(
            f"{cache.place}: which token an entry is about cannot be told (mean probability of the record's own "
            f"tokens: {said}); give --alignment {' | '.join(ALIGNMENTS)}, or check that the ids are this tokenizer's"
        )
    return best


class ForeignTeacher:
    """Windows of a foreign cache's documents.

    Args:
        cache: the records. vocabulary: of the teacher that made them. reading: see `read_off`.
    """

    def __init__(self, cache: Cache, vocabulary: Vocabulary, reading: Reading) -> None:
        self.cache, self.vocabulary, self.reading = cache, vocabulary, reading
        self._kind = spell(vocabulary).kind
        self.reducer = ListingReducer(vocabulary, self._prior())

    def _prior(self) -> np.ndarray:
        """float64 [size]: mean of what the first records list, a little of it spread evenly.

        Without entries that are listed because they are true: of a short cache the prior would know the text.
        """
        weight = np.zeros(self.vocabulary.size)
        for number in range(min(SAMPLE, len(self.cache))):
            record = self.cache[number]
            mass = np.exp(record.logps)
            inside = (record.ids < self.vocabulary.size) & ~self._marked_of(record, mass)
            np.add.at(weight, record.ids[inside], mass[inside])
        total = weight.sum()
        if total <= 0:
            raise InputError(f"{self.cache.place}: no listed id is one of this tokenizer's {self.vocabulary.size}")
        weight = (1 - PRIOR_SMOOTHING) * weight / total + PRIOR_SMOOTHING / self.vocabulary.size
        return np.asarray(weight, np.float64)

    def documents(self, record: Record) -> Iterator[Document | Aside]:
        """The documents of a record, in order."""
        if (record.tokens >= self.vocabulary.size).any():
            yield Aside("ids beyond the tokenizer")
            return
        kinds = self._kind[record.tokens]
        about = np.full(len(record.tokens) + 1, -1, np.int64)
        offset = offset_of(self.reading.alignment, len(record.tokens), len(record.counts))
        for entry in range(len(record.counts)):
            if entry + offset <= len(record.tokens) and record.counts[entry]:
                about[entry + offset] = entry
        begin, n_documents = 0, 0
        for stop in [*np.flatnonzero(kinds == END_TOKEN).tolist(), len(record.tokens)]:
            lo, hi = begin, stop
            while lo < hi and kinds[lo] == CONTROL:
                lo += 1
            while lo < hi and kinds[hi - 1] == CONTROL:
                hi -= 1
            begin = stop + 1
            if lo == hi:
                continue
            n_documents += 1
            if (kinds[lo:hi] == CONTROL).any():
                yield Aside("control token inside")
                continue
            yield Document(record.tokens[lo:hi], about[lo : hi + 1])
        if not n_documents:
            yield Aside("control tokens alone" if len(record.tokens) else "empty record")

    def text(self, document: Document) -> bytes:
        """A document's bytes."""
        return b"".join(self.vocabulary.token_bytes[token] or b"" for token in document.tokens.tolist())

    def window(self, doc_id: str, doc_index: int, record: Record, document: Document) -> Window:
        """The dump window of a document; the canonical tokens are its only histories."""
        data = np.frombuffer(self.text(document), np.uint8)
        lengths = [len(self.vocabulary.token_bytes[token] or b"") for token in document.tokens.tolist()]
        starts = np.append(0, np.cumsum(lengths)).astype(np.int64)
        known = document.rows >= 0
        lead = int(np.argmax(known)) if known.any() else len(document.tokens)
        tokens = np.append(self.vocabulary.start_id, document.tokens).astype(np.int32)
        prompt = Prompt(f"document {doc_id!r}", tokens, 0, data, starts)
        context = data[: starts[lead]].tobytes()
        plan = WindowPlan(doc_id, doc_index, prompt, int(starts[lead]), True, context)
        rows = self.reducer.reduce(data, starts, document.tokens, self._listing(record, document))
        return new_window(plan, rows)

    def _listing(self, record: Record, document: Document) -> Listing:
        """What each row lists, without entries that are listed because they are true."""
        first = np.cumsum(record.counts) - record.counts
        counts = np.zeros(len(document.rows), np.int64)
        ids: list[np.ndarray] = []
        masses: list[np.ndarray] = []
        following = np.append(document.tokens, -1)
        for row, entry in enumerate(document.rows.tolist()):
            if entry < 0:
                continue
            span = slice(first[entry], first[entry] + record.counts[entry])
            listed, mass = record.ids[span], np.exp(record.logps[span])
            keep = ~self._marked(listed, mass, int(following[row]))
            counts[row] = keep.sum()
            ids.append(listed[keep])
            masses.append(mass[keep])
        empty = np.zeros(0)
        return Listing(
            counts,
            np.concatenate([empty.astype(np.int64), *ids]),
            np.concatenate([empty, *masses]),
        )

    def _marked_of(self, record: Record, mass: np.ndarray) -> np.ndarray:
        """bool [N]: the entries of a record that are listed because they are true; mass float64 [N]."""
        marked = np.zeros(len(mass), bool)
        offset = offset_of(self.reading.alignment, len(record.tokens), len(record.counts))
        first = np.cumsum(record.counts) - record.counts
        for entry in range(max(-offset, 0), min(len(record.counts), len(record.tokens) - offset)):
            span = slice(first[entry], first[entry] + record.counts[entry])
            marked[span] = self._marked(record.ids[span], mass[span], int(record.tokens[entry + offset]))
        return marked

    def _marked(self, listed: np.ndarray, mass: np.ndarray, true: int) -> np.ndarray:
        """bool [k]: the entry that is listed because it is true."""
        suspicious = len(listed) > self.reading.k or self.reading.always_true
        if not suspicious or not len(listed):
            return np.zeros(len(listed), bool)
        return np.asarray((listed == true) & (mass <= mass.min()))
