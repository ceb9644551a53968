"""What a step of training allocates: never dense targets, and logits no more than a piece at a time."""

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bytecache.schemas.dataset.index import read_dataset
from bytecache.schemas.settings import BASELINES, Student, Train
from bytecache.stages.student import student
from bytecache.stages.train.batches.stream import ShardReader, collate, cut
from bytecache.stages.train.batches.types import SLOTS, MicroBatch, TokenTargets
from bytecache.stages.train.objective.objective import Objective
from bytecache.stages.train.objective.symbols import HEAD_SYMBOLS
from tests.support.student_data import make_dataset

CHUNK = 8


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation made, backward included."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[student.Student, ShardReader, MicroBatch]:
    root: Path = tmp_path_factory.mktemp("memory")
    targets = make_dataset(root / "targets", documents=6, sentences=12)
    student.prepare(Student(tokenizer="bpe:400", hidden_size=16, layers=1, heads=2), targets, root / "s", seed=1)
    opened = student.load(root / "s")
    reader = ShardReader(targets, read_dataset(targets), "train", opened.vocabulary, opened.end_id)
    micro = collate(cut(reader[0], 0, reader.positions[0], 4096), with_targets=True)
    n = len(micro.labels.flatten())
    some = TokenTargets(
        torch.arange(0, n, 3),
        torch.arange(4).expand(len(range(0, n, 3)), 4),
        torch.full((len(range(0, n, 3)), 4), 0.2),
        torch.ones(len(range(0, n, 3)), dtype=torch.bool),
    )
    object.__setattr__(micro, "teacher", some)
    return opened, reader, micro


@pytest.mark.parametrize("head", ["parallel", "autoregressive", "marginal", *BASELINES])
def test_no_dense_targets_and_a_piece_of_logits_at_a_time(world, head):
    opened, reader, micro = world
    tokens, vocabulary = micro.labels.numel(), opened.model.get_output_embeddings().weight.shape[0]
    objective = Objective(Train(head=head, chunk=CHUNK, head_width=16), opened, 0)
    objective.observe(reader)
    if head == "mapped_topk":  # this reader has no dump, from which the map is made
        same = objective.term.map
        same.first, same.token, same.share = torch.arange(5), torch.arange(4), torch.ones(4)
    _, to_logits = student.split_model(opened)
    hidden = torch.randn(*micro.labels.shape, 16, requires_grad=True)
    with Largest() as seen:
        parts = objective(to_logits, hidden, micro)
        objective.total(parts, 1, 1).backward()
    opened.model.zero_grad()
    slots = micro.slot_token.numel()
    assert float(parts.kl.detach()) > 0 and slots < tokens * 6
    inherent = max(tokens * 16, vocabulary * 16, CHUNK * vocabulary, len(micro.targets.slot) * 2)
    inherent = max(inherent, sum(p.numel() for p in objective.parameters() if p.requires_grad))
    if objective.term.own_bytes:
        inherent = max(inherent, slots * HEAD_SYMBOLS, tokens * SLOTS * 3 * 16)
    assert seen.elements <= inherent < tokens * SLOTS * HEAD_SYMBOLS
    if not objective.term.own_bytes:
        assert inherent < tokens * vocabulary / 4
