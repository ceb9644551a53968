"""The teacher's own tokens, from the dump: its top k wherever one of its tokens begins, for the baselines.

Byte targets have forgotten the tokens, so these heads read the run's dump parts, shard by shard: the parts that a shard
was made from are named in it, must be of the same teacher, and must hold the same text. Kept per shard are the places
where a canonical token of the teacher begins (and every document's END), with k probabilities each.
Price: 8 k bytes for every token of the teacher while the shard is in memory, and one reading of its dump parts.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bytecache.schemas.dump.parquet import read_meta, read_windows
from bytecache.schemas.dump.window import Window
from bytecache.schemas.errors import ConfigError, IntegrityError
from bytecache.schemas.identity import TeacherIdentity
from bytecache.schemas.settings import BASELINES
from bytecache.schemas.shard.reader import ByteShard
from bytecache.stages.tokens.vocab import Vocabulary

ABSENT = -1
"""A token of the teacher that no token of the student spells."""


class TeacherTokens(NamedTuple):
    """R places of one shard where a token of the teacher begins.

    position int64 [R], ascending: in the shard. ids int32 [R, K]: student tokens of the same bytes, ABSENT where there
    is none; or the teacher's own, see `TokenDump`. prob float32 [R, K]: the teacher's, descending; a row sums to at
    most 1. token int32 [R]: the teacher's token of the text there, ABSENT at an END.
    """

    position: npt.NDArray[np.int64]
    ids: npt.NDArray[np.int32]
    prob: npt.NDArray[np.float32]
    token: npt.NDArray[np.int32]


class TokenDump:
    """Dump parts of a run, read beside its shards.

    Args:
        folder: where the parts are. teacher: opens the teacher's vocabulary, given the start token that the dump
            names, if tokens are to be compared by bytes; without it every id is ABSENT. own: ids are the teacher's
            own (for a term that maps them itself), not the student's.
    """

    def __init__(self, folder: Path, teacher: Callable[[str], Vocabulary] | None = None, *, own: bool = False) -> None:
        self.folder, self.own, self._open = folder, own, teacher
        self._shared: npt.NDArray[np.int32] | None = None
        self._vocabulary: Vocabulary | None = None

    @property
    def spells(self) -> bool:
        """Whether the teacher's tokens can be compared by their bytes."""
        return self._open is not None

    def with_own_ids(self) -> "TokenDump":
        """The same parts, read with the teacher's own ids."""
        return TokenDump(self.folder, self._open, own=True)

    @property
    def vocabulary(self) -> Vocabulary:
        """The teacher's, once a shard was read."""
        assert self._vocabulary is not None, "no shard was read"
        return self._vocabulary

    @property
    def fingerprint(self) -> str:
        """Names of the parts, which carry the hashes of what they were made from."""
        return " ".join(sorted(path.name for path in self.folder.glob("*.parquet")))

    def of(self, shard: ByteShard, student: Vocabulary, end_id: int) -> TeacherTokens:
        """The teacher's tokens of a shard.

        Raises:
            ConfigError: a part is missing, or holds no top k. IntegrityError: it holds other text than the shard, or
            the teacher's vocabulary is not the one it was made with.
        """
        start = {doc: int(at) for doc, at in zip(shard.doc_id, shard.doc_start[:-1], strict=True)}
        places: list[npt.NDArray[np.int64]] = []
        tokens: list[npt.NDArray[np.int32]] = []
        ids: list[npt.NDArray[np.int32]] = []
        probs: list[npt.NDArray[np.float32]] = []
        for name in shard.attrs.get("units", [""]):
            part = self._part(name, shard)
            shared = self._student_ids(part, student, end_id) if self._open is not None else None
            for window in read_windows(part):
                if window.reference:
                    continue
                at = start.get(window.doc_id, len(shard.text))
                first = at + len(window.context)
                text = window.text[window.score_start :]
                if not np.array_equal(shard.text[first : first + len(text)], text):
                    raise IntegrityError(
                        f"{part}: document {window.doc_id!r} is not that of {shard.path}; convert again"
                    )
                start[window.doc_id] = first + len(text)
                row, token = _rows(window)
                tokens.append(token)
                k = len(window.topk_id) // len(window.row_start)
                if not k:
                    raise ConfigError(f"{part}: holds no top k; run `bytecache teacher` with teacher.top_k above 0")
                places.append(first - window.score_start + window.row_start[row].astype(np.int64))
                p = np.exp(window.topk_logp.reshape(-1, k)[row])
                by_size = np.argsort(-p, axis=1, kind="stable")
                probs.append(np.take_along_axis(p, by_size, 1))
                top_ids = np.take_along_axis(window.topk_id.reshape(-1, k)[row], by_size, 1)
                ids.append(np.full_like(top_ids, ABSENT) if shared is None else shared[top_ids])
        found = TeacherTokens(
            np.concatenate(places), np.concatenate(ids), np.concatenate(probs), np.concatenate(tokens)
        )  # fmt: skip
        return found if self.own else _merged(found)

    def _part(self, name: str, shard: ByteShard) -> Path:
        for path in sorted(self.folder.glob(f"*-{name}.parquet")) if name else []:
            if read_meta(path)["teacher"] == shard.attrs.get("teacher"):
                return path
        raise ConfigError(
            f"{shard.path}: its dump part {name or '(unnamed)'} is not in {self.folder}; train.head = "
            f"{', '.join(BASELINES)} read the teacher's tokens, which byte targets do not hold: run "
            "`bytecache teacher` again with convert.delete_dump = false, or choose another head"
        )

    def _student_ids(self, part: Path, student: Vocabulary, end_id: int) -> npt.NDArray[np.int32]:
        """Student token of every teacher id, ABSENT where there is none; END kinds are the student's end token."""
        if self._shared is not None:
            return self._shared
        assert self._open is not None
        identity = TeacherIdentity.of(read_meta(part)["teacher"], part)
        teacher = self._open(identity.start)
        if identity.vocabulary != teacher.fingerprint:
            raise IntegrityError(
                f"{part}: made with vocabulary {identity.vocabulary[:12]}, teacher.model has "
                f"{teacher.fingerprint[:12]}; "
                "name the teacher that made it"
            )
        self._vocabulary = teacher
        if self.own:
            self._shared = np.arange(teacher.size, dtype=np.int32)
            return self._shared
        spelled: dict[bytes, int] = {}
        for i, token in enumerate(student.token_bytes):
            if token is not None:
                spelled.setdefault(token, i)
        shared = [ABSENT if token is None else spelled.get(token, ABSENT) for token in teacher.token_bytes]
        self._shared = np.array(shared, np.int32)
        self._shared[teacher.end_ids] = end_id
        return self._shared


def _rows(window: Window) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """Canonical rows whose next token this window scores, and that token; the last one of a document says END."""
    row = np.flatnonzero((window.row_depth == 0) & (window.row_static == 0) & (window.row_start >= window.score_start))
    token = np.append(window.row_token[row[1:]], ABSENT).astype(np.int32)
    scored = window.is_last | (window.row_start[row] < len(window.text))
    return row[scored], token[scored]


def _merged(tokens: TeacherTokens) -> TeacherTokens:
    """Teacher tokens of equal bytes are one token of the student: their mass is put together, one id stays."""
    ids, prob = tokens.ids.copy(), tokens.prob
    ordered = np.sort(ids, axis=1)
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != ABSENT)).any(axis=1)
    extra = np.zeros_like(prob)
    for r in np.flatnonzero(twice):
        first: dict[int, int] = {}
        for i, token in enumerate(ids[r].tolist()):
            if token != ABSENT and first.setdefault(token, i) != i:
                extra[r, first[token]] += prob[r, i]
                ids[r, i] = ABSENT
                extra[r, i] -= prob[r, i]
    return tokens._replace(ids=ids, prob=prob + extra if twice.any() else prob)
