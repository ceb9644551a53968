"""Chunk likelihoods: sums over bytes and tokens against plain loops, a loss that is 0 where they agree."""

import numpy as np
import pytest
import torch

from bytecache.schemas.dataset.index import read_dataset
from bytecache.schemas.errors import ConfigError
from bytecache.schemas.settings import Student, Train
from bytecache.stages.student import student
from bytecache.stages.train.batches import packing
from bytecache.stages.train.batches.stream import Row, ShardReader, collate
from bytecache.stages.train.objective.chunks import byte_pairs, chunk_divergence
from bytecache.stages.train.objective.objective import Objective
from tests.support.student_data import make_dataset


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small student, its reader and its objective."""
    root = tmp_path_factory.mktemp("chunks")
    targets = make_dataset(root / "targets", documents=4, sentences=6)
    student.prepare(Student(tokenizer="bpe:300", hidden_size=32, layers=1, heads=2), targets, root / "s", seed=1)
    opened = student.load(root / "s")
    reader = ShardReader(targets, read_dataset(targets), "train", opened.vocabulary, opened.end_id)
    return opened, reader, Objective(Train(head="alm", lambda_kl=1.0), opened, 0)


def test_chunks_are_runs_of_tokens_that_join_and_their_likelihoods_are_sums_over_bytes(world):
    opened, reader, objective = world
    source = reader[0]
    last = int((source.row == source.row[0]).sum())
    micro = collate([Row(source, 0, last)], with_targets=True, limit=objective.term.slots)
    chunks = objective.term.chunks(micro)
    spelled = [opened.vocabulary.token_bytes[v] for v in source.ids[: last - 1]]
    joins = byte_pairs(opened.vocabulary)
    want: list[list[int]] = [[0]]
    for t in range(1, last - 1):
        if joins[spelled[t - 1][-1], spelled[t][0]]:
            want[-1].append(t)
        else:
            want.append([t])
    want.append([last - 1])  # the end of the document
    assert any(len(chunk) > 1 for chunk in want) and len(want) > 10
    rows = [chunks.row[chunks.chunk == c].tolist() for c in range(len(chunks.teacher))]
    assert rows == want
    dense = source.shard.dense(0, int(source.end[last - 1])).astype(np.float64)
    tail = source.shard.tails(0, len(dense))
    sums = []
    for chunk in want:
        total = 0.0
        for i in range(int(source.start[chunk[0]]), int(source.end[chunk[-1]])):
            p = dense[i, source.symbol[i]] or tail[i] / (257 - (dense[i] > 0).sum())
            total += np.log(max(p, 2.0**-24))
        sums.append(total)
    np.testing.assert_allclose(chunks.teacher.numpy(), sums, rtol=1e-5)


def test_the_loss_is_the_binary_divergence_and_is_least_where_likelihoods_agree():
    p, q = torch.tensor([-3.0, -0.1, -20.0]).double(), torch.tensor([-5.0, -0.1, -1.0]).double()
    a, b = (p / 100).exp(), (q / 100).exp()
    want = 100 * (a * (a / b).log() + (1 - a) * ((1 - a) / (1 - b)).log())
    torch.testing.assert_close(chunk_divergence(p, q), want)
    assert chunk_divergence(p, q)[1] == 0 and (chunk_divergence(p, q)[[0, 2]] > 0.4).all()
    assert torch.isfinite(chunk_divergence(torch.tensor([0.0, -400.0]), torch.tensor([0.0, -0.0]))).all()


def test_the_gradient_pulls_a_chunk_to_its_teachers_likelihood(world):
    opened, reader, objective = world
    micro = collate([Row(reader[0], 0, 40)], with_targets=True, limit=objective.term.slots)
    logits = torch.zeros(1, 40, opened.model.get_output_embeddings().weight.shape[0], requires_grad=True)
    hidden = torch.zeros(1, 40, 32)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    values = []
    for _ in range(150):
        parts = objective(logits, hidden, micro)
        optimizer.zero_grad()
        parts.kl.backward()
        optimizer.step()
        values.append(float(parts.kl.detach()))
    assert values[0] > 10 and values[-1] < 0.01 * values[0]
    packed = packing.pack(micro)
    assert float(objective(logits, hidden, packed).kl.detach()) == pytest.approx(
        float(objective(logits, hidden, micro).kl)
    )
    with pytest.raises(ConfigError, match=r"train\.chunk = 0"):
        Objective(Train(head="alm", chunk=8), opened, 0)
