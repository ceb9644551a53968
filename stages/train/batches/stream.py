"""From target shards to micro-batches: verify, read, tokenise, cut, collate; in a background thread, in bounded memory.

Algorithm. A shard's file must hash to the manifest's sha256 before a byte of it is parsed. Its documents are tokenised
with the student's tokenizer and flattened into arrays of tokens (id, predecessor, first position, ...), each document
followed by its EOS whose "byte" is the END position. A window of `order` is then two binary searches: the tokens that
start inside it; every token of an epoch belongs to exactly one window. Rows never cross documents; a row's first input
is the token before it (the start token at a document's head), so nothing is predicted from a false start.
The rows of one step are sorted by length and packed into micro-batches of similar length: padding is small (measured in
`train`), and right padding needs no attention mask in a causal model, since every padded position comes last.
Documents that the tokenizer cannot map to their own bytes are skipped and counted by reason, never misaligned.
Price: a shard is resident as decoded plus about 9 bytes per text byte of token arrays; at most two pools of shards and
`prefetch` steps are. Tokenising dominates the first reading (1-3 MB of text/s/core).
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from bytecache.schemas.arrays import I64
from bytecache.schemas.dataset.index import Dataset, ShardEntry
from bytecache.schemas.errors import InputError
from bytecache.schemas.shard.reader import TAIL_MASS
from bytecache.stages.targets.order import POOL, Order, Window
from bytecache.stages.targets.shelf import Shelf
from bytecache.stages.targets.source import fetch_ahead, load_shard
from bytecache.stages.tokens import misfits
from bytecache.stages.tokens.vocab import Vocabulary
from bytecache.stages.train.batches import slots
from bytecache.stages.train.batches.answers import TemplateSource
from bytecache.stages.train.batches.slots import ListedColumns, SlotColumns
from bytecache.stages.train.batches.teacher_tokens import TokenDump
from bytecache.stages.train.batches.token_shard import TokenShard, tokenise
from bytecache.stages.train.batches.types import IGNORE, SLOTS, MicroBatch, SlotTargets, Step, TokenTargets

MICRO_TOKENS = {"cpu": 768, "cuda": 16384}
"""Most padded tokens in one micro-batch (a single longer row excepted), by device type: bounds memory and padding.

On a CPU small is fast: padding was 6 % of tokens at 768, 10 % at 1024, 18 % at 2048, and caches hold the logits.
"""


class Row(NamedTuple):
    """Tokens [first, last) of one document, one row of a batch, after `lead` tokens that are only read."""

    source: TokenShard
    first: int
    last: int
    lead: int = 0

    @property
    def length(self) -> int:
        """Tokens of the row."""
        return self.last - self.first + self.lead


def cut(source: TokenShard, lo: int, hi: int, max_tokens: int, context_bytes: int = 0) -> list[Row]:
    """Rows of the tokens that start in positions [lo, hi): one per document, split where longer than `max_tokens`.

    A row is led by the tokens of its document that start at most `context_bytes` before it, at most half of a row.
    Documents that answer something are not cut by windows; one of them that is too long for a row leads its rest.
    """
    where = source.start if source.place is None else source.place
    if source.place is not None:
        context_bytes = max(context_bytes, hi)
    a, b = (int(x) for x in np.searchsorted(where, [lo, hi]))
    if a == b:
        return []
    edges = np.concatenate([[a], a + 1 + np.flatnonzero(np.diff(source.row[a:b])), [b]])
    rows: list[Row] = []
    for x, y in pairwise(edges.tolist()):
        head = int(np.searchsorted(source.row, source.row[x])) if context_bytes else x
        while x < y:
            reach = int(np.searchsorted(source.start, source.start[x] - context_bytes)) if context_bytes else x
            lead = min(x - max(head, reach), max_tokens // 2)
            rows.append(Row(source, x, min(x + max_tokens - lead, y), lead))
            x = rows[-1].last
    return rows


def group(rows: Sequence[Row], micro_tokens: int = MICRO_TOKENS["cpu"]) -> list[list[Row]]:
    """Sort rows by length (stable, longest first) and pack them so that rows * longest <= `micro_tokens`."""
    groups: list[list[Row]] = []
    for row in sorted(rows, key=lambda r: -r.length):
        if groups and (len(groups[-1]) + 1) * groups[-1][0].length <= micro_tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def collate(rows: Sequence[Row], *, with_targets: bool, byte_reduction: str = "mean", limit: int = SLOTS) -> MicroBatch:
    """One micro-batch from rows; all arithmetic is per byte, nothing is [tokens, 10, 260].

    limit: bytes of a token that get slots.
    """
    width = max(row.length for row in rows)
    input_ids, labels = _padded_tokens(rows, width)
    columns, edges, n_byte_tokens, n_bytes = _row_slots(rows, width, limit, byte_reduction == "mean")
    order, place, counts = slots.by_number(columns.number, limit)
    return MicroBatch(
        torch.from_numpy(input_ids),
        torch.from_numpy(labels),
        torch.from_numpy(columns.token[order]),
        counts.tolist(),
        torch.from_numpy(columns.true[order]),
        torch.from_numpy(columns.weight[order]),
        _slot_targets(rows, columns, edges, order, place) if with_targets else None,
        sum(int(row.source.supervised[row.first : row.last].sum()) for row in rows),
        n_byte_tokens,
        n_bytes,
        [row.length for row in rows],
        teacher=_token_targets(rows, width),
    )


def _padded_tokens(rows: Sequence[Row], width: int) -> tuple[I64, I64]:
    """Input ids and labels, int64 [rows, width] each."""
    input_ids = np.zeros((len(rows), width), np.int64)
    labels = np.full((len(rows), width), IGNORE, np.int64)
    for number, (source, first, last, lead) in enumerate(rows):
        predicted = slice(first, last)
        input_ids[number, : lead + last - first] = source.before[first - lead : last]
        labels[number, lead : lead + last - first] = np.where(
            source.supervised[predicted], source.ids[predicted], IGNORE
        )
    return input_ids, labels


def _row_slots(rows: Sequence[Row], width: int, limit: int, mean: bool) -> tuple[SlotColumns, list[int], int, int]:
    """The slots row by row, where each row's begin (and the last one's end), tokens with a slot, supervised bytes."""
    room = 0
    for source, first, last, _ in rows:
        lengths = source.end[first:last] - source.start[first:last]
        room += int(np.minimum(limit - source.skip[first:last], lengths).clip(0).sum())
    columns = SlotColumns.empty(room)
    # Plain tuples where numba is called for every row: it takes a microsecond more to know a named one.
    out = tuple(columns)
    edges, n_tokens, n_bytes = [0], 0, 0
    for number, (source, first, last, lead) in enumerate(rows):
        tokens = source.start[first:last], source.end[first:last], source.skip[first:last]
        positions = source.shard.mask, source.symbol, source.shard.codes["tail"], TAIL_MASS
        n_slots, row_tokens, row_bytes = slots.row_slots(
            tokens, positions, out, edges[-1], number * width + lead, limit, mean
        )
        edges.append(n_slots)
        n_tokens, n_bytes = n_tokens + row_tokens, n_bytes + row_bytes
    return columns.first(edges[-1]), edges, n_tokens, n_bytes


def _slot_targets(rows: Sequence[Row], columns: SlotColumns, edges: list[int], order: I64, place: I64) -> SlotTargets:
    """The teacher's entries at the slots; `order`, `place`: see `slots.by_number`."""
    spans = [(int(row.source.start[row.first]), int(row.source.end[row.last - 1])) for row in rows]
    triples = [row.source.shard.triples(lo, hi) for row, (lo, hi) in zip(rows, spans, strict=True)]
    room = sum(len(some.row) for some in triples)
    listed = ListedColumns(np.empty(room, np.int64), np.empty(room, np.int64), np.empty(room, np.float32))
    out, n_entries = tuple(listed), 0
    for some, span, (a, b) in zip(triples, spans, pairwise(edges), strict=True):
        n_entries = slots.row_targets(tuple(some), span, columns.position[a:b], place[a:b], out, n_entries)
    slot, symbol, prob = (torch.from_numpy(column[:n_entries]) for column in listed)
    return SlotTargets(slot, symbol, prob, torch.from_numpy(columns.rest[order]))


def _token_targets(rows: Sequence[Row], width: int) -> TokenTargets | None:
    """What the teacher says of its own tokens, where shards have them; else None."""
    parts: list[tuple[Any, ...]] = []
    for number, (source, first, last, lead) in enumerate(rows):
        teacher = source.teacher
        if teacher is None:
            continue
        # The student's token begins where one of the teacher's does; of an answer's context nothing is asked.
        start, end = source.start[first:last], source.end[first:last]
        at = np.searchsorted(teacher.position, start).clip(max=len(teacher.position) - 1)
        is_common = (teacher.position[at] == start) & (end > start)
        is_common &= (source.skip[first:last] == 0) & source.supervised[first:last]
        common = np.flatnonzero(is_common)
        following = np.append(teacher.position[1:], source.symbol.size)[at[common]]
        cells = number * width + lead + common
        parts.append((cells, teacher.ids[at[common]], teacher.prob[at[common]], following == end[common]))
    if not parts:
        return None
    cells, ids, masses, whole = (np.concatenate(column) for column in zip(*parts, strict=True))
    return TokenTargets(*(torch.from_numpy(column) for column in (cells, ids.astype(np.int64), masses, whole)))


def blank() -> MicroBatch:
    """One token that predicts nothing: a micro-batch for a rank that has no other (`parallel`)."""
    none, nothing = torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    return MicroBatch(
        torch.zeros(1, 1, dtype=torch.int64), torch.full((1, 1), IGNORE), none, [0] * SLOTS, none, nothing,
        SlotTargets(none, none, nothing, nothing), 0, 0, 0, [1],
    )  # fmt: skip


class ShardReader:
    """Tokenised shards of one split by number, the last `resident` kept (`steps` keeps two pools, see `shelf`).

    Args:
        folder: the data set's name for messages. dataset: from `open_dataset`. split: "train" or "heldout".
        template, max_tokens: see `tokenise`. dump: the teacher's tokens, if they are asked for.

    Raises:
        InputError: the split has no shards.
    """

    def __init__(
        self, folder: Path | str, dataset: Dataset, split: str, vocabulary: Vocabulary, end_id: int, *,
        resident: int = POOL, template: TemplateSource | None = None, max_tokens: int = 1 << 40,
        dump: TokenDump | None = None,
    ) -> None:  # fmt: skip
        self.dataset, self.dump = dataset, dump
        self.folder, self.vocabulary, self.end_id = folder, vocabulary, end_id
        self.template, self.max_tokens = template, max_tokens
        self.entries: list[ShardEntry] = [e for e in dataset.entries if e.split == split]
        if not self.entries:
            raise InputError(f"{folder}: no shards of split {split!r}; convert documents of that split first")
        self.skipped: dict[int, Counter[str]] = {}
        self.shelf: Shelf[TokenShard] = Shelf(
            self._load, lambda number: fetch_ahead(self.dataset, self.entries[number]), keep=resident
        )

    def __getitem__(self, number: int) -> TokenShard:
        shard = self.shelf[number]
        self.skipped[number] = shard.skipped
        return shard

    def _load(self, number: int) -> TokenShard:
        shard = tokenise(
            load_shard(self.dataset, self.entries[number]), self.vocabulary, self.end_id,
            template=self.template, max_tokens=self.max_tokens,
        )  # fmt: skip
        if self.dump is not None:
            shard = replace(shard, teacher=self.dump.of(shard.shard, self.vocabulary, self.end_id))
        return shard

    @property
    def positions(self) -> list[int]:
        """Positions per shard of the split, from the manifest."""
        return [e.n_positions for e in self.entries]

    def require_text(self) -> None:
        """Tokenise shards up to the first that has something to learn.

        Raises:
            InputError: none has, with the reasons for which documents were skipped.
        """
        if not any(self[number].supervised.any() for number in range(len(self.entries))):
            raise barren_split(self.folder, self.skipped_documents())

    def skipped_documents(self) -> dict[str, int]:
        """Documents set aside in the shards used so far, by reason."""
        return dict(sum(self.skipped.values(), Counter[str]()))


def barren_split(folder: Path | str, skipped: dict[str, int]) -> InputError:
    """What to say of a split without anything to learn; `skipped`: documents by reason."""
    if not skipped:
        return InputError(f"{folder}: nothing to train on, no position of its text is supervised; choose other targets")
    return InputError(
        f"{folder}: no document can be trained on because of the student: {misfits.words(skipped)}; "
        f"{misfits.remedy(skipped, 'student')}"
    )


@dataclass(frozen=True)
class Batching:
    """How windows of text become the micro-batches of a step."""

    batch: int
    """windows of a step, over all ranks"""
    max_tokens: int
    """of a row"""
    with_targets: bool = True
    byte_reduction: str = "mean"
    micro_tokens: int = MICRO_TOKENS["cpu"]
    context_bytes: int = 0
    limit: int = SLOTS
    """bytes of a token that get slots"""


def make_step(number: int, windows: Sequence[Window], reader: ShardReader, how: Batching) -> Step:
    """Read the windows of one step and collate them."""
    rows = [row for w in windows for row in cut(reader[w.shard], w.lo, w.hi, how.max_tokens, how.context_bytes)]
    micro = [
        collate(members, with_targets=how.with_targets, byte_reduction=how.byte_reduction, limit=how.limit)
        for members in group(rows, how.micro_tokens)
    ]
    return Step(number, micro, reader.skipped_documents())


def steps(
    order: Order, reader: ShardReader, how: Batching, *, start: int = 0, rank: int = 0, ranks: int = 1
) -> Iterator[Step]:
    """Steps `start`, `start` + 1, ... without end; step s owns windows [s * batch, (s + 1) * batch).

    Rank r of `ranks` gets every ranks-th of them, from the r-th on.

    Raises:
        IntegrityError: a shard is corrupt or missing. InputError: a whole epoch has nothing to train on.
    """
    barren = 0
    with closing(reader.shelf.follow(order.pools(start * how.batch))) as windows:
        for number in range(start, 2**62):
            step = make_step(number, list(islice(windows, how.batch))[rank::ranks], reader, how)
            barren = 0 if step.micro else barren + how.batch
            if barren > order.epoch_length(0) + 2 * how.batch:
                raise barren_split(reader.folder, step.skipped)
            yield step
