"""Terms that only studies use: two divergences at once, and all logits of a teacher of the same tokenizer."""

from dataclasses import replace

import pytest
import torch

from benchmarks.joint_terms import JointTerm
from benchmarks.transfer_ceiling import LogitTerm, forget, pieces
from bytecache.schemas.dataset.index import read_dataset
from bytecache.schemas.settings import Student, Train
from bytecache.stages.student import student
from bytecache.stages.train.batches import stream
from bytecache.stages.train.batches.types import IGNORE, MicroBatch, TokenTargets
from bytecache.stages.train.objective.baselines import TokenTerm
from bytecache.stages.train.objective.objective import Objective
from tests.support.student_data import make_dataset


@pytest.fixture
def opened(tmp_path) -> tuple[student.Student, MicroBatch, Objective]:
    """A tiny student, a micro-batch with the teacher's bytes and invented tokens of it, the objective of bytes."""
    targets = make_dataset(tmp_path / "targets", sentences=8)
    student.prepare(Student(tokenizer="bpe:300", hidden_size=32, layers=2, heads=2), targets, tmp_path / "s", seed=0)
    opened = student.load(tmp_path / "s")
    reader = stream.ShardReader(targets, read_dataset(targets), "train", opened.vocabulary, opened.end_id)
    objective = Objective(Train(head="marginal", lambda_kl=2.0), opened, 0)
    objective.observe(reader)
    micro = stream.collate(
        stream.cut(reader[0], 0, 200, opened.max_tokens), with_targets=True, byte_reduction="sum",
        limit=objective.term.slots,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    places = torch.nonzero(micro.labels.flatten() != IGNORE)[::2, 0]
    ids = torch.stack([torch.randperm(opened.vocabulary.size, generator=generator)[:5] for _ in places])
    prob = torch.softmax(torch.randn(len(places), 5, generator=generator), 1) * 0.9
    whole = torch.arange(len(places)) % 3 > 0
    return opened, replace(micro, teacher=TokenTargets(places, ids, prob, whole)), objective


@pytest.mark.parametrize("kind", ["strict_topk", "shared_topk"])
def test_two_divergences_are_summed_in_pieces_too(opened, kind):
    one, micro, objective = opened
    logits, hidden = one.forward(micro.input_ids)
    alone = objective(logits, hidden, micro)
    tokens = TokenTerm(kind, objective.term)
    of_tokens = tokens.of_logits(logits.flatten(0, 1), micro.labels.flatten(), micro.teacher).kl
    objective.term = JointTerm(objective.term, kind, 0.5)
    assert objective.needs_targets
    joint = objective(logits, hidden, micro)
    assert float(of_tokens.detach()) > 1
    for name in ("token", "byte", "open"):
        torch.testing.assert_close(getattr(joint, name), getattr(alone, name))
    torch.testing.assert_close(joint.kl, alone.kl + 0.5 * of_tokens)
    objective.chunk = 16
    in_pieces = objective(one.model.get_output_embeddings(), hidden, micro)
    torch.testing.assert_close(in_pieces.kl, joint.kl, rtol=1e-4, atol=1e-4)
    measured = objective(logits, hidden, micro, measure=True)
    assert measured.kl < joint.kl


def test_all_logits_are_compared_where_tokens_are_predicted(opened):
    one, micro, objective = opened
    logits, hidden = one.forward(micro.input_ids)
    objective.term = LogitTerm(one, objective.term)
    assert not objective.needs_targets
    assert float(objective(logits, hidden, micro).kl) == pytest.approx(0, abs=1e-5)
    other = logits.detach() + torch.linspace(-1, 1, logits.shape[-1])
    p, q = (each.flatten(0, 1).double().softmax(-1) for each in (logits, other))
    dense = (p * (p / q).log()).sum(-1)[micro.labels.flatten() != IGNORE].sum()
    assert float(objective(other, hidden, micro).kl) == pytest.approx(float(dense), rel=1e-4)
    assert objective.n_parameters == 0, "the teacher is not trained"


def test_forgotten_tokens_have_the_mean_embedding_of_their_pieces(opened):
    one = opened[0]
    before = one.model.get_input_embeddings().weight.detach().clone()
    lost = forget(one, 0.5, seed=3)
    after = one.model.get_input_embeddings().weight.detach()
    spelled = one.vocabulary.token_bytes
    changed = [i for i in range(len(spelled)) if not torch.equal(after[i], before[i])]
    kept = {b: i for i, b in enumerate(spelled) if b and i not in changed}
    assert len(changed) == lost > 10 and all(len(spelled[i]) > 1 for i in changed)
    for token in changed:
        parts = pieces(spelled[token], kept)
        assert b"".join(spelled[i] for i in parts) == spelled[token] and len(parts) > 1
        torch.testing.assert_close(after[token], before[parts].mean(0))
    assert pieces(b"abcd", {b"a": 0, b"ab": 1, b"b": 2, b"c": 3, b"d": 4, b"bcd": 5}) == [1, 3, 4]
