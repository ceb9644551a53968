"""From the teacher's next token to the student's: which one a text begins with for the student, given the teacher's.

    P(u) = sum over t of p(t) C(u | t)

p: the teacher's next token at a place where a token of both begins. C(u | t): of the training text's places where the
teacher's token is t and one of the student begins, too, the share whose token of the student is u, with one more count
for the token that begins the student's own spelling of t's bytes. So a longer token of the teacher teaches the first of
the student's shorter ones, and a shorter one shares its mass among the student's longer ones as the text did. Tokens
spelt alike stand for different texts in two vocabularies (" token" also begins " tokens" where only one has both);
the counts tell them apart, on average over what comes before.
Price: the vocabulary encoded once (1 s for 50 thousand tokens), and C in memory, a few entries for every token.
"""

import numpy as np
import torch
from torch import Tensor, nn

from bytecache.schemas.arrays import I64
from bytecache.stages.tokens.vocab import Misfit, Vocabulary
from bytecache.stages.train.batches.stream import ShardReader
from bytecache.stages.train.batches.token_shard import TokenShard
from bytecache.stages.train.batches.types import SlotTargets


class TokenMap(nn.Module):
    """C as rows of the teacher's tokens; empty until `observe`."""

    first: Tensor
    """int64 [teacher's tokens + 1]: where a token's row begins"""
    token: Tensor
    """int64 [E]: the student's, ascending in a row"""
    share: Tensor
    """float32 [E], a row sums to 1"""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("first", torch.zeros(1, dtype=torch.int64), persistent=False)
        self.register_buffer("token", torch.zeros(0, dtype=torch.int64), persistent=False)
        self.register_buffer("share", torch.zeros(0), persistent=False)

    def observe(self, reader: ShardReader, positions: int) -> None:
        """Count on the first shards, at most `positions` of them after the first; same data, same shares."""
        pairs: list[tuple[I64, I64]] = []
        seen = 0
        for number, size in enumerate(reader.positions):
            if seen and seen + size > positions:
                break
            pairs.append(common_tokens(reader[number]))
            seen += size
        assert reader.dump is not None, "the map is made from the run's dump"
        teacher, end = reader.dump.vocabulary, reader.end_id
        spelt = np.array(first_tokens(teacher, reader.vocabulary), np.int64)
        spelt[teacher.end_ids] = end
        known = np.flatnonzero(spelt >= 0)
        theirs, mine = (np.concatenate(side) for side in zip((known, spelt[known]), *pairs, strict=True))
        width = max(int(mine.max()), end) + 1
        key, count = np.unique(theirs * width + mine, return_counts=True)
        theirs, mine = key // width, key % width
        total = np.bincount(theirs, count, teacher.size)
        device = self.first.device
        self.first = torch.from_numpy(np.searchsorted(theirs, np.arange(teacher.size + 1))).to(device)
        self.token = torch.from_numpy(mine).to(device)
        self.share = torch.from_numpy((count / total[theirs]).astype(np.float32)).to(device)

    def project(self, ids: Tensor, prob: Tensor, rows: int) -> SlotTargets:
        """The teacher's listed tokens as the student's.

        Args:
            ids int64 or int32 [A, K], the teacher's. prob float [A, K]. rows: width of the student's logits.

        Returns:
            Targets of A slots; a slot's tail is what its entries leave of 1.
        """
        ids = ids.long().flatten()
        size = self.first[ids + 1] - self.first[ids]
        listed = torch.repeat_interleave(torch.arange(ids.numel(), device=ids.device), size)
        begun = torch.cumsum(size, 0) - size
        entry = self.first[ids][listed] + torch.arange(listed.numel(), device=ids.device) - begun[listed]
        mass = prob.flatten()[listed] * self.share[entry].to(prob.dtype)
        key, place = torch.unique(listed // prob.shape[1] * rows + self.token[entry], return_inverse=True)
        mass = torch.zeros(key.numel(), dtype=prob.dtype, device=prob.device).index_add_(0, place, mass)
        slot = key // rows
        tail = (1 - torch.zeros_like(prob[:, 0]).index_add_(0, slot, mass)).clamp_min(0)
        return SlotTargets(slot, key % rows, mass, tail)


def common_tokens(source: TokenShard) -> tuple[I64, I64]:
    """The teacher's and the student's token, int64 [A] each, at every place where one of both begins."""
    assert source.teacher is not None, "the shard was read without the dump"
    position, token = source.teacher.position, source.teacher.token
    begins = np.flatnonzero(source.end > source.start)
    at = np.searchsorted(position, source.start[begins]).clip(max=len(position) - 1)
    common = (position[at] == source.start[begins]) & (token[at] >= 0)
    return token[at[common]].astype(np.int64), source.ids[begins[common]].astype(np.int64)


def first_tokens(teacher: Vocabulary, student: Vocabulary) -> list[int]:
    """Of every token of the teacher, the student's that begins its bytes as the student's tokenizer cuts them.

    Bytes that are no text by themselves, or that the tokenizer puts a space before, begin with the longest token of the
    student that they begin with; -1: no token does, or the id has no bytes.
    """
    spelled: dict[bytes, int] = {}
    for i, token in enumerate(student.token_bytes):
        if token:
            spelled.setdefault(token, i)
    first, texts = [-1] * teacher.size, {}
    for i, token in enumerate(teacher.token_bytes):
        if not token:
            continue
        longest = next((token[:n] for n in range(len(token), 0, -1) if token[:n] in spelled), None)
        first[i] = -1 if longest is None else spelled[longest]
        try:
            texts[i] = token.decode()
        except UnicodeDecodeError:
            continue
    for i, encoded in zip(texts, student.encode_batch(list(texts.values())), strict=True):
        if not isinstance(encoded, Misfit) and not encoded.synthetic and len(encoded.ids):
            first[i] = int(encoded.ids[0])
    return first
