"""Windows to micro-batches: every token once, every slot aligned with its byte and its teacher row."""

from collections import Counter
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest

from bytecache.schemas.arrays import END
from bytecache.schemas.dataset.index import read_dataset, write_dataset
from bytecache.schemas.errors import InputError, IntegrityError
from bytecache.schemas.shard.reader import read_shard
from bytecache.stages.targets.order import Order, sequential
from bytecache.stages.targets.prefetch import prefetch
from bytecache.stages.tokens.vocab import Encoded, Misfit
from bytecache.stages.train.batches import stream
from bytecache.stages.train.batches.types import IGNORE, SLOTS
from tests.support.student_data import document, make_dataset, write_split

START, EOS = 1000, 1001


class Words:
    """A vocabulary that cuts after spaces; ids are made up per token text, so that bytes can be recovered."""

    start_id = START

    def __init__(self, synthetic: bytes = b"", refuse: str = "\0") -> None:
        self.synthetic, self.refuse, self.spelled = synthetic, refuse, []

    def encode_batch(self, texts):
        return [self.encode(t) for t in texts]

    def encode(self, text):
        if self.refuse in text:
            return Misfit("refused")
        data = self.synthetic + text.encode()
        pieces = [w + b" " for w in data.split(b" ")]
        pieces[-1] = pieces[-1][:-1]
        pieces = [p for p in pieces if p]
        ids = []
        for p in pieces:
            if p not in self.spelled:
                self.spelled.append(p)
            ids.append(self.spelled.index(p))
        starts = np.cumsum([0] + [len(p) for p in pieces]).astype(np.int64)
        return Encoded(np.array(ids, np.int32), starts, data, len(self.synthetic))


def reader_of(folder, words, split="train", **kwargs):
    return stream.ShardReader(folder, read_dataset(folder), split, words, EOS, **kwargs)


@pytest.mark.parametrize("synthetic", [b"", b" "])
def test_every_token_once_and_every_slot_in_place(tmp_path, synthetic):
    folder = make_dataset(tmp_path / "d")
    words = Words(synthetic)
    reader = reader_of(folder, words)
    tokens, covered = Counter(), Counter()
    for w in sequential(reader.positions, 100):
        source = reader[w.shard]
        dense = source.shard.dense(0, len(source.shard.text))
        for members in stream.group(stream.cut(source, w.lo, w.hi, 4096)):
            micro = stream.collate(members, with_targets=True)
            width = micro.input_ids.shape[1]
            for r, row in enumerate(members):
                for i in range(row.first, row.last):
                    tokens[w.shard, i] += 1
                    assert micro.labels[r, i - row.first] == source.ids[i]
                    follows = micro.input_ids[r, i - row.first]
                    same_doc = i > 0 and source.row[i] == source.row[i - 1]
                    assert follows == (source.ids[i - 1] if same_doc else START)
            # Rebuild each slot's byte from the spelling of its token, its teacher row from the dense table.
            k = np.repeat(np.arange(SLOTS), micro.slot_counts)
            targets = micro.targets
            table = np.zeros((k.size, 257), np.float32)
            table[targets.slot, targets.symbol] = targets.prob
            for s, place in enumerate(micro.slot_token.tolist()):
                r, t = divmod(place, width)
                i = members[r].first + t
                spelled = words.spelled[source.ids[i]] if source.ids[i] != EOS else None
                want = END if spelled is None else spelled[k[s]]
                assert micro.slot_symbol[s] == want
                position = int(source.start[i]) + int(k[s]) - int(source.skip[i])
                assert covered[w.shard, position] == 0
                covered[w.shard, position] += 1
                np.testing.assert_array_equal(table[s], dense[position])
                assert targets.tail[s] == source.shard.tail[position]
            per_token = Counter(micro.slot_token.tolist())
            np.testing.assert_allclose(micro.slot_weight, [1 / per_token[p] for p in micro.slot_token.tolist()])
    assert set(tokens.values()) == {1}
    assert len(tokens) == sum(reader[s].ids.size for s in range(len(reader.entries)))
    starts = {(s, int(p)) for s in range(len(reader.entries)) for p in reader[s].start}
    assert starts <= set(covered)  # every token's first byte, END included, is a slot


def test_tokens_longer_than_ten_bytes_are_covered_to_ten(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    write_dataset(folder, write_split(folder, "train", ["abcdefghijklmnop qr"], 1), {})
    source = reader_of(folder, Words())[0]
    micro = stream.collate(stream.cut(source, 0, 100, 99), with_targets=False)
    assert micro.slot_counts == [3, 2] + [1] * 8 and micro.targets is None
    assert bytes(micro.slot_symbol[micro.slot_token == 0].tolist()) == b"abcdefghij"


def test_mask_removes_bytes_and_unsupervised_tokens(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    text = "one two three"
    prompt = 5  # "one t" is the prompt: "two " straddles its end

    def mask(n):
        return (np.arange(n) >= prompt).astype(np.uint8)

    write_dataset(folder, write_split(folder, "train", [text], 1, mask), {})
    source = reader_of(folder, Words())[0]
    micro = stream.collate(stream.cut(source, 0, 100, 99), with_targets=True)
    assert micro.labels[0, 0] == IGNORE and (micro.labels[0, 1:] != IGNORE).all()
    k = np.repeat(np.arange(SLOTS), micro.slot_counts)
    straddling = micro.slot_token.numpy() == 1
    assert k[straddling].tolist() == [1, 2, 3]
    np.testing.assert_allclose(micro.slot_weight[straddling], 1 / 3)
    assert micro.n_tokens == 3 and micro.n_bytes == len(text) - prompt
    assert micro.targets.slot.max() < k.size == len(text) - prompt + 1


def test_misfits_are_counted_and_left_out(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    write_dataset(folder, write_split(folder, "train", ["good one", "bad\0one", "good two"], 3), {})
    reader = reader_of(folder, Words())
    source = reader[0]
    assert set(source.row.tolist()) == {0, 2} and reader.skipped_documents() == {"refused": 1}
    rows = stream.cut(source, 0, 1000, 99)
    assert len(rows) == 2
    micro = stream.collate(rows, with_targets=True)
    assert micro.n_bytes == 16 and micro.targets.slot.max() < micro.slot_token.numel()


def test_nothing_alignable_is_refused(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    write_dataset(folder, write_split(folder, "train", ["a\0", "b\0"], 3), {})
    reader = reader_of(folder, Words())
    with pytest.raises(InputError, match="refused"):
        list(islice(stream.steps(Order("x", reader.positions, 64, 0), reader, stream.Batching(2, 99)), 50))


def test_corrupt_and_missing_shards_are_refused_by_name(tmp_path):
    folder = make_dataset(tmp_path / "d")
    path = sorted(folder.glob("train-*"))[1]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    reader = reader_of(folder, Words())
    reader[0]
    with pytest.raises(IntegrityError, match=path.name):
        reader[1]
    path.unlink()
    with pytest.raises(IntegrityError, match="missing"):
        reader[1]
    with pytest.raises(InputError, match="validation"):
        reader_of(folder, Words(), "validation")


def rows_of(step):
    return sorted(tuple(m.labels[r][m.labels[r] != IGNORE].tolist()) for m in step.micro for r in range(len(m.labels)))


def test_start_ranks_and_residency_do_not_change_the_data(tmp_path):
    folder = make_dataset(tmp_path / "d")
    words = Words()

    def run(start=0, rank=0, ranks=1, resident=16):
        reader = reader_of(folder, words, resident=resident)
        order = Order("x", reader.positions, 80, 1)
        return stream.steps(order, reader, stream.Batching(6, 99), start=start, rank=rank, ranks=ranks)

    whole = [rows_of(s) for s in islice(run(), 12)]
    assert [rows_of(s) for s in islice(run(start=5), 7)] == whole[5:]
    assert [rows_of(s) for s in islice(run(resident=1), 12)] == whole
    parts = [list(islice(run(rank=r, ranks=3), 12)) for r in range(3)]
    assert [sorted(row for p in parts for row in rows_of(p[i])) for i in range(12)] == whole
    assert len({str(w) for w in whole}) > 6


def test_groups_are_alike_in_length_and_bounded():
    rng = np.random.default_rng(0)
    rows = [stream.Row(None, 0, int(n)) for n in rng.integers(1, 300, size=60)]
    groups = stream.group(rows, 1000)
    assert sorted(r for g in groups for r in g) == sorted(rows)
    assert all(len(g) * max(r.last for r in g) <= 1000 for g in groups)
    padded = sum(len(g) * max(r.last for r in g) for g in groups)
    assert sum(r.last for r in rows) / padded > 0.9


def test_prefetch_hands_on_items_errors_and_stops():
    def source():
        yield from (SimpleNamespace(number=i) for i in range(5))
        raise IntegrityError("torn")

    items = prefetch(source())
    assert [next(items).number for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(IntegrityError, match="torn"):
        next(items)
    endless = prefetch(SimpleNamespace(number=i) for i in range(10**9))
    assert next(endless).number == 0
    endless.close()  # joins its thread, or this test hangs


def test_shards_decode_as_written(tmp_path):
    """The invented teacher survives the format well enough for the tests above to mean something."""
    folder = make_dataset(tmp_path / "d")
    shard = read_shard(sorted(folder.glob("train-*"))[0])
    text = np.frombuffer(document(0, 1).encode(), np.uint8)
    np.testing.assert_array_equal(shard.text[: text.size], text)
    assert shard.dense(0, text.size + 1).argmax(1).tolist() == [*text.tolist(), END]
