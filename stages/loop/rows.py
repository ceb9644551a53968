"""Rows of the student's tokens with the teacher's targets: datasets for any DataLoader, of one data set or several.

`StudentRows` reads a data set in the order of `stages.targets.order` and yields one row after another: a run of tokens
of one document, or an answer with everything before it. `MixedRows` takes turns between several of them (`turns`).
The windows of either are one sequence, numbered from 0, of which ranks and the workers of a DataLoader each read every
so manieth; a window gives several rows, or none. So the state of a process is the number of windows it has finished and
of the rows of the next that it has handed out.
"""

import hashlib
import json
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from typing import Any

from torch.utils.data import IterableDataset

from bytecache.schemas.dataset.index import Dataset
from bytecache.schemas.errors import ConfigError
from bytecache.stages.loop.batches import ROW
from bytecache.stages.loop.vocabulary import student_template, student_vocabulary
from bytecache.stages.targets.order import Order, Window
from bytecache.stages.targets.share import Share
from bytecache.stages.targets.source import open_dataset
from bytecache.stages.targets.turns import Turns, turns_of
from bytecache.stages.train.batches import stream
from bytecache.stages.train.batches.types import MicroBatch
from bytecache.stages.train.objective.marginal import MarginalTerm

STATE_VERSION = 1


class _Rows(IterableDataset[MicroBatch]):
    """Rows of `sources` by turns, from any place in the order.

    Args:
        share: this process's. windows: how many there are in all; 0 = as many as the sources have.
    """

    def __init__(self, turns: Turns, share: Share, windows: int = 0) -> None:
        self._turns, self._windows, self._share = turns, windows, share
        self._start = 0  # windows of the whole sequence that were read before
        self._finished = 0  # windows of this process's share since
        self._row = 0  # rows handed out of the next one
        self._loaded: list[int] | None = None

    @property
    def sources(self) -> "Sequence[StudentRows]":
        """The data sets."""
        raise NotImplementedError

    @property
    def readers(self) -> list[stream.ShardReader]:
        """Their tokenised shards, in this process."""
        return [source.reader for source in self.sources]

    @property
    def fingerprint(self) -> str:
        """sha256 of what defines the sequence of rows."""
        what = [[source.identity for source in self.sources], self._turns.weights]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()

    def dealt_by_trainer(self) -> None:
        """Give every process all rows: accelerate and transformers.Trainer deal batches out themselves."""
        self._share = Share(0, 1)

    def layout(self) -> list[int]:
        """[rank, ranks, worker, workers] of the calling process."""
        return list(self._share.layout())

    def __iter__(self) -> Iterator[MicroBatch]:
        """From the loaded state, or the start; a second call starts again unless a state was loaded since."""
        layout = self.layout()
        rank, ranks, worker, workers = layout
        if self._loaded is None:
            self._start = self._finished = self._row = 0
        elif (self._finished or self._row) and self._loaded != layout:
            raise ConfigError(
                f"this state is that of [rank, ranks, worker, workers] = {self._loaded}, now {layout}; to change the "
                "layout load {'position': StudentRows.position(state)}"
            )
        self._loaded = None
        shares = ranks * workers
        first = self._start + (rank * workers + worker - self._start) % shares + shares * self._finished
        for source, window in self._dealt(first, shares):
            for number, row in enumerate(source.rows_of(window)):
                if number < self._row:
                    continue
                self._row = number + 1
                yield row
            self._finished, self._row = self._finished + 1, 0

    def _dealt(self, first: int, stride: int) -> "Iterator[tuple[StudentRows, Window]]":
        """Windows `first`, `first` + `stride`, ... of the sequence, and whose they are."""
        with ExitStack() as stack:
            windows = [
                stack.enter_context(closing(source.windows(count)))
                for source, count in zip(self.sources, self._turns.before(first), strict=True)
            ]
            for number, (source, _) in enumerate(self._turns(first), first):
                window = next(windows[source], None)
                if window is None or (self._windows and number >= self._windows):
                    return
                if (number - first) % stride == 0:
                    yield self.sources[source], window

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` continues from: after the last row that this process handed out."""
        return {
            "version": STATE_VERSION, "fingerprint": self.fingerprint, "start": self._start,
            "finished": self._finished, "row": self._row, "layout": self._loaded or self.layout(),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where a state was taken; {"position": n} alone goes on from window n, in any layout.

        Raises ConfigError for the state of other data, another window, seed, tokenizer or mixture.
        """
        if state.get("version", STATE_VERSION) != STATE_VERSION:
            raise ConfigError(f"rows' state version {state['version']}, this software knows {STATE_VERSION}")
        if state.get("fingerprint", self.fingerprint) != self.fingerprint:
            raise ConfigError(
                "the state belongs to rows of another data set, split, window, seed, tokenizer or mixture (fingerprint "
                f"{str(state['fingerprint'])[:12]}, now {self.fingerprint[:12]}); restore those"
            )
        self._start = int(state.get("position", state.get("start", 0)))
        self._finished, self._row = int(state.get("finished", 0)), int(state.get("row", 0))
        self._loaded = list(state.get("layout", [0, 1, 0, 1]))

    @staticmethod
    def position(state: Mapping[str, Any]) -> int:
        """The window from which to go on in another layout, given the state of one process of several in step.

        Rows of a window that was under way are repeated; none is left out where the processes were in step.
        """
        _, ranks, _, workers = state["layout"]
        return int(state["start"]) + int(state["finished"]) * int(ranks) * int(workers)

    def skipped_documents(self) -> dict[str, int]:
        """Documents that the tokenizer cannot spell, by reason, in the shards that this process has used so far."""
        total: dict[str, int] = {}
        for reader in self.readers:
            for reason, count in reader.skipped_documents().items():
                total[reason] = total.get(reason, 0) + count
        return total

    def as_hub_dataset(self) -> Any:
        """The same rows as a `datasets.IterableDataset` of records {"row": row}, for trainers that take nothing else.

        `collate_rows` takes those records as well. Needs the package `datasets` (`bytecache[trl]`).
        """
        from datasets import IterableDataset as HubDataset

        self.dealt_by_trainer()
        return HubDataset.from_generator(_records, gen_kwargs={"rows": self})


def _records(rows: _Rows) -> Iterator[dict[str, MicroBatch]]:
    for row in rows:
        yield {ROW: row}


class StudentRows(_Rows):
    """Rows of a data set in training order.

    Args:
        place: a folder, an fsspec URL, or a Dataset from `open_dataset`.
        tokenizer: the student's: a fast tokenizer or its folder. rows: width of the student's logits.
        window: bytes of text that a row covers at most. max_tokens: of a row; longer ones are split.
        seed: of the order. epochs: readings of the split; 0 = never ends. split: "train" or "heldout".
        rank, ranks: this process's share; by default that of torch.distributed, if it is initialised. accelerate and
            transformers.Trainer deal batches out themselves: give 0 and 1 there.

    A data set of conversations is rendered with the tokenizer's own chat template; an answer and what comes before it
    are one row.

    Raises:
        InputError: a tokenizer without exact bytes, an empty split. ConfigError: impossible arguments, a chat template
            that cannot be used.
        IntegrityError, StorageError: while iterating, a shard that is damaged or out of reach.
    """

    def __init__(
        self, place: str | os.PathLike[str] | Dataset, tokenizer: Any, rows: int, *, window: int = 2048,
        max_tokens: int = 2048, seed: int = 0, epochs: int = 0, split: str = "train", rank: int | None = None,
        ranks: int | None = None,
    ) -> None:  # fmt: skip
        if window < 1 or max_tokens < 2 or epochs < 0:
            raise ConfigError(f"window {window}, max_tokens {max_tokens}, epochs {epochs}: too small")
        super().__init__(Turns([1.0]), Share(rank, ranks))
        self.dataset = open_dataset(place)
        self.vocabulary, self.end_id = student_vocabulary(tokenizer, rows)
        self._template = student_template(tokenizer, self.vocabulary)
        self.window, self.max_tokens, self.seed, self.epochs, self.split = window, max_tokens, seed, epochs, split
        self._reader: stream.ShardReader | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What a worker process gets: everything but the shards in memory, which it loads itself."""
        return {**self.__dict__, "_reader": None}

    @property
    def sources(self) -> "Sequence[StudentRows]":
        """Itself alone."""
        return (self,)

    @property
    def identity(self) -> list[Any]:
        """What defines its sequence of rows."""
        content, vocabulary = self.dataset.content_sha256, self.vocabulary.fingerprint
        return [content, self.split, self.window, self.max_tokens, self.seed, vocabulary, self.end_id]

    @property
    def reader(self) -> stream.ShardReader:
        """The tokenised shards, in this process."""
        if self._reader is None:
            self._reader = stream.ShardReader(
                self.dataset.where, self.dataset, self.split, self.vocabulary, self.end_id,
                template=self._template, max_tokens=self.max_tokens,
            )  # fmt: skip
        return self._reader

    def windows(self, start: int) -> Generator[Window, None, None]:
        """Windows number `start`, `start` + 1, ... of its order, their shards loaded in time."""
        reader = self.reader
        reader.require_text()
        order = Order(self.dataset.content_sha256, reader.positions, self.window, self.seed)
        return reader.shelf.follow(order.pools(start, self.epochs))

    def rows_of(self, window: Window) -> Iterator[MicroBatch]:
        """The rows of one window."""
        for row in stream.cut(self.reader[window.shard], window.lo, window.hi, self.max_tokens):
            yield stream.collate([row], with_targets=True, byte_reduction="sum", limit=MarginalTerm.slots)


class MixedRows(_Rows):
    """Rows of several data sets by turns, in shares of their text.

    Args:
        sources: rows without end (`epochs=0`) of one window size and one tokenizer. weights: share of each, in windows,
            so in bytes of text; their sum does not matter. windows: how many there are in all; 0 = no end.
        rank, ranks: as in `StudentRows`; those of the sources are not asked.

    Raises:
        ConfigError: not as many weights as sources, one that is not above 0, or sources that do not go together.
    """

    def __init__(
        self, sources: Sequence[StudentRows], weights: Sequence[float], *, windows: int = 0, rank: int | None = None,
        ranks: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(turns_of(sources, weights), Share(rank, ranks), windows)
        first = sources[0]
        for source in sources:
            if source.window != first.window:
                raise ConfigError(
                    f"{source.dataset.where}: windows of {source.window} bytes beside {first.window}; weights are "
                    "shares of windows, so give all sources one size"
                )
            if source.vocabulary.fingerprint != first.vocabulary.fingerprint or source.end_id != first.end_id:
                raise ConfigError(
                    f"{source.dataset.where}: other tokens than those of {first.dataset.where}; a student has one "
                    "tokenizer, and one width of logits"
                )
        self._sources = tuple(sources)
        self.vocabulary, self.end_id = first.vocabulary, first.end_id

    @property
    def sources(self) -> Sequence[StudentRows]:
        """The data sets, in the order of the weights."""
        return self._sources
