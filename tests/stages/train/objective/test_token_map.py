"""The map from the teacher's tokens to the student's: shares counted by hand, and distances of the right student."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bytecache.stages.tokens.vocab import Encoded, Misfit
from bytecache.stages.train.batches.teacher_tokens import ABSENT, TeacherTokens
from bytecache.stages.train.objective.baselines import bucket_distance
from bytecache.stages.train.objective.token_map import TokenMap, common_tokens, first_tokens


def vocabulary(*tokens: str, end: int = 0) -> SimpleNamespace:
    """Ids whose bytes are `tokens`, '' for none; encodes by the longest token that fits."""
    spelled = [token.encode("latin-1") or None for token in tokens]

    def encode(text: str) -> Encoded | Misfit:
        data, ids, starts = text.encode(), [], [0]
        while starts[-1] < len(data):
            fits = [t for t in spelled if t and data.startswith(t, starts[-1])]
            if not fits:
                return Misfit("unspelt")
            ids.append(spelled.index(max(fits, key=len)))
            starts.append(starts[-1] + len(max(fits, key=len)))
        return Encoded(np.array(ids, np.int32), np.array(starts), data, 0)

    return SimpleNamespace(
        token_bytes=spelled, size=len(spelled), end_ids=np.array([end]), encode=encode,
        encode_batch=lambda texts: [encode(text) for text in texts],
    )  # fmt: skip


TEACHER = vocabulary("", "a", "b", "ab", "abb", "\xff")
STUDENT = vocabulary("", "a", "b", "bb", "abba")


def shard(text: str) -> SimpleNamespace:
    """One document of both vocabularies, its END included."""
    theirs, mine = TEACHER.encode(text), STUDENT.encode(text)
    size = len(text)
    tokens = TeacherTokens(
        np.append(theirs.starts[:-1], size), np.zeros((len(theirs.ids) + 1, 1), np.int32),
        np.zeros((len(theirs.ids) + 1, 1), np.float32), np.append(theirs.ids, ABSENT).astype(np.int32),
    )  # fmt: skip
    return SimpleNamespace(
        teacher=tokens, ids=np.append(mine.ids, 0).astype(np.int32), start=np.append(mine.starts[:-1], size),
        end=np.append(mine.starts[1:], size + 1),
    )  # fmt: skip


class Reader:
    """Shards of `texts`, as the map reads them."""

    def __init__(self, *texts: str) -> None:
        self.shards = [shard(text) for text in texts]
        self.positions = [len(text) + 1 for text in texts]
        self.vocabulary, self.end_id, self.dump = STUDENT, 0, SimpleNamespace(vocabulary=TEACHER)

    def __getitem__(self, number: int) -> SimpleNamespace:
        return self.shards[number]


def shares(made: TokenMap, token: int) -> dict[int, float]:
    row = slice(int(made.first[token]), int(made.first[token + 1]))
    return dict(zip(made.token[row].tolist(), made.share[row].tolist(), strict=True))


def test_a_token_begins_as_the_students_tokenizer_cuts_it():
    assert first_tokens(TEACHER, STUDENT) == [-1, 1, 2, 1, 1, -1]


def test_pairs_are_of_places_where_both_begin_a_token():
    # abba|a: the teacher has abb, a, a and the student abba, a; b|bb has b, b, b beside bb, b.
    pairs = Counter(zip(*(side.tolist() for side in common_tokens(shard("abbaa"))), strict=True))
    assert pairs == Counter({(4, 4): 1, (1, 1): 1})
    pairs = Counter(zip(*(side.tolist() for side in common_tokens(shard("bbb"))), strict=True))
    assert pairs == Counter({(2, 3): 1, (2, 2): 1})


def test_shares_are_those_of_the_text_and_one_spelling():
    made = TokenMap()
    made.observe(Reader("abbaabbaabb", "ab"), 1 << 20)
    # abb stands for abba twice, for a (a, bb) once, and is spelt a, bb.
    assert shares(made, 4) == pytest.approx({4: 2 / 4, 1: 2 / 4})
    assert shares(made, 3) == pytest.approx({1: 1.0})
    assert shares(made, 0) == {0: 1.0}, "the END is the END"
    assert shares(made, 5) == {}, "no token of the student begins so"
    few = TokenMap()
    few.observe(Reader("abbaabbaabb", "abba" * 9), 12)
    assert shares(few, 4) == shares(made, 4), "a shard too many is not counted"


def test_masses_are_put_together_and_the_rest_is_the_bucket():
    made = TokenMap()
    made.observe(Reader("abbaabbaabb"), 1 << 20)
    ids = torch.tensor([[4, 1, 3], [5, 0, 2]])
    prob = torch.tensor([[0.5, 0.2, 0.1], [0.6, 0.25, 0.05]])
    targets = made.project(ids, prob, 5)
    dense = torch.zeros(2, 5)
    dense[targets.slot, targets.symbol] = targets.prob
    want = torch.tensor([[0.0, 0.25 + 0.2 + 0.1, 0, 0, 0.25], [0.25, 0, 0.05, 0, 0]])
    torch.testing.assert_close(dense, want)
    torch.testing.assert_close(targets.tail, torch.tensor([0.2, 0.7]))
    keys = targets.slot * 5 + targets.symbol
    assert (keys[1:] > keys[:-1]).all(), "entries are unique and in order"


def test_the_right_student_is_at_no_distance_and_no_other_is():
    """Where every text is one of the corpus, the student's own shares of its next token are the map's."""
    texts = ["abbaabbaabb", "abbaa", "bbb", "aabb"]
    made = TokenMap()
    made.observe(Reader(*texts), 1 << 20)
    p = torch.tensor([[0.05, 0.15, 0.3, 0.2, 0.3]], dtype=torch.float64)
    dense = torch.zeros(1, 5, dtype=torch.float64)
    for token, mass in enumerate(p[0].tolist()):
        for mine, share in shares(made, token).items():
            dense[0, mine] += mass * share
    targets = made.project(torch.arange(5)[None], p, 5)
    assert float(bucket_distance(dense.log(), targets, "forward", 1.0)) == pytest.approx(0, abs=1e-7)
    alike = torch.tensor([[0.05, 0.15, 0.3, 0.2, 0.3]], dtype=torch.float64)
    assert float(bucket_distance(alike.log(), targets, "forward", 1.0)) > 0.1
