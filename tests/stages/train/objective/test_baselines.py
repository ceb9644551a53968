"""The baselines: distances against dense references, and the teacher's tokens as the dump has them."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from bytecache.pipeline.commands.convert import convert
from bytecache.pipeline.commands.plan import plan
from bytecache.pipeline.commands.report.table import as_table, summary_rows
from bytecache.pipeline.commands.teacher import teacher
from bytecache.pipeline.commands.train import _token_dump, open_targets
from bytecache.pipeline.commands.train import train as train_command
from bytecache.pipeline.context import Context, open_context
from bytecache.schemas.dataset.index import read_dataset
from bytecache.schemas.dump.likely import STEPS_PER_NAT
from bytecache.schemas.errors import ConfigError, IntegrityError
from bytecache.schemas.settings import BASELINES, Settings, Train
from bytecache.stages.evaluate.evaluate import evaluate, report_table
from bytecache.stages.student import student
from bytecache.stages.targets.source import load_shard
from bytecache.stages.teacher.identity import vocabulary_of
from bytecache.stages.train.batches import packing, stream
from bytecache.stages.train.batches.teacher_tokens import ABSENT, TeacherTokens, TokenDump, _merged
from bytecache.stages.train.batches.types import TokenTargets
from bytecache.stages.train.objective.baselines import shared_distance, sorted_distance
from bytecache.stages.train.objective.objective import Objective
from bytecache.stages.train.train import train
from tests.support.small_run import small_settings


def distributions(rows: int, mine: int, theirs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Student logits [rows, mine] and the teacher's whole distribution [rows, theirs], descending; float64."""
    generator = torch.Generator().manual_seed(5)
    z = torch.randn(rows, mine, generator=generator, dtype=torch.float64) * 2
    p = torch.softmax(torch.randn(rows, theirs, generator=generator, dtype=torch.float64) * 2, 1)
    return z.requires_grad_(), p.sort(dim=1, descending=True).values


@pytest.mark.parametrize(("mine", "theirs"), [(9, 14), (14, 9), (11, 11)])
def test_sorted_distance_is_the_papers_where_the_whole_teacher_is_listed(mine, theirs):
    z, p = distributions(6, mine, theirs)
    width = max(mine, theirs)
    q = functional.pad(torch.softmax(z, 1).sort(dim=1, descending=True).values, (0, width - mine))
    dense = (functional.pad(p, (0, width - theirs)) - q).abs().sum(1)
    torch.testing.assert_close(sorted_distance(z, p), dense)
    want = torch.autograd.grad(dense.sum(), z)[0]
    torch.testing.assert_close(torch.autograd.grad(sorted_distance(z, p).sum(), z)[0], want)
    # The teacher's top k alone: a lower bound, by no more than both sides' mass beyond it.
    for k in (1, 3, 6):
        short = sorted_distance(z, p[:, :k])
        beyond = p[:, k:].sum(1) + q[:, k:].sum(1)
        assert (short <= dense + 1e-12).all() and (dense <= short + beyond + 1e-12).all()


@pytest.mark.parametrize("divergence", ["forward", "reverse", "js"])
def test_shared_distance_is_the_dense_divergence_of_the_partition(divergence):
    z, p = distributions(4, 10, 6)
    ids = torch.tensor([[3, -1, 7, 0, -1, 2], [1, 2, 3, 4, 5, 6], [-1] * 6, [9, 8, -1, -1, -1, -1]])
    p = p * 0.9  # the teacher's mass beyond its top k
    got = shared_distance(z, ids, p, divergence)
    for row in range(4):
        listed = ids[row] >= 0
        q = torch.softmax(z[row], 0)
        mine = q[ids[row][listed]]
        theirs = p[row][listed]
        a = torch.cat([theirs, (1 - theirs.sum())[None]])
        b = torch.cat([mine, (1 - mine.sum())[None]])
        m = (a + b) / 2
        kl = {"forward": (a * (a / b).log()).sum(), "reverse": (b * (b / a).log()).sum()}
        js = ((a * (a / m).log()).sum() + (b * (b / m).log()).sum()) / 2
        dense = kl.get(divergence, js)
        torch.testing.assert_close(got[row], dense)
        want = torch.autograd.grad(dense, z, retain_graph=True)[0]
        torch.testing.assert_close(torch.autograd.grad(got[row], z, retain_graph=True)[0], want, atol=1e-10, rtol=1e-6)


def test_heat_flattens_both_sides_alike():
    """At the same logits the distance is 0 at every temperature, and it is not where temperatures differ."""
    z, _ = distributions(5, 8, 8)
    p = torch.softmax(z.detach(), 1)
    order = p.argsort(1, descending=True)
    for temperature in (0.5, 1.0, 3.0):
        assert shared_distance(z, order, p.gather(1, order), "forward", temperature).abs().max() < 1e-9
        assert sorted_distance(z, p.gather(1, order), temperature).abs().max() < 1e-9
    assert sorted_distance(z / 2, p.gather(1, order)).max() > 0.05


def test_teacher_tokens_of_equal_bytes_are_put_together():
    tokens = TeacherTokens(
        np.arange(2),
        np.array([[4, 7, 4, ABSENT, 4], [1, 2, 3, ABSENT, ABSENT]], np.int32),
        np.array([[0.4, 0.3, 0.1, 0.05, 0.02], [0.5, 0.2, 0.1, 0.1, 0.05]], np.float32),
        np.array([4, 1], np.int32),
    )
    merged = _merged(tokens)
    assert merged.ids.tolist() == [[4, 7, ABSENT, ABSENT, ABSENT], [1, 2, 3, ABSENT, ABSENT]]
    np.testing.assert_allclose(merged.prob[0], [0.52, 0.3, 0, 0.05, 0], atol=1e-6)
    np.testing.assert_array_equal(merged.prob[1], tokens.prob[1])


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Settings, Context]:
    """A run up to its targets; the teacher's top 16 of some 330 tokens."""
    settings = small_settings(tmp_path_factory.mktemp("baselines"), documents=24)
    context = open_context(settings, lambda line: None)
    for stage in (plan, teacher, convert):
        stage(context)
    return settings, context


def teacher_as_student(run: tuple[Settings, Context], folder: Path) -> student.Student:
    settings, context = run
    shape = settings.student.model_copy(update={"model": settings.teacher.model, "tokenizer": ""})
    student.prepare(shape, open_targets(context), folder, seed=0)
    return student.load(folder)


def reader_of(run, opened: student.Student, dump: TokenDump) -> stream.ShardReader:
    dataset = open_targets(run[1])
    return stream.ShardReader(dataset.where, dataset, "train", opened.vocabulary, opened.end_id, dump=dump)


def first_steps(reader: stream.ShardReader, opened: student.Student, number: int = 1) -> list[stream.MicroBatch]:
    rows = stream.cut(reader[0], 0, reader.positions[0], opened.max_tokens)
    return [stream.collate(members, with_targets=True) for members in stream.group(rows)][:number]


def dump_of(run: tuple[Settings, Context], *, own: bool = False) -> TokenDump:
    teacher = run[0].teacher
    return TokenDump(run[1].store.folder("teacher"), lambda _: vocabulary_of(teacher, Path(teacher.model)), own=own)


def test_a_student_that_is_the_teacher_is_at_no_distance(run, tmp_path):
    """Positions, ids and probabilities of the dump are those of the student's own forward pass."""
    opened = teacher_as_student(run, tmp_path / "student")
    for micro in first_steps(reader_of(run, opened, dump_of(run)), opened, 3):
        assert micro.teacher is not None
        # One tokenizer: every token that is learned begins where one of the teacher's does, the END included.
        assert sorted(micro.teacher.row.tolist()) == np.flatnonzero(micro.labels.flatten() >= 0).tolist()
        assert micro.teacher.whole.all()
        with torch.inference_mode():
            logits = opened.forward(micro.input_ids)[0].flatten(0, 1)[micro.teacher.row]
        listed = micro.teacher.ids >= 0
        mine = torch.log_softmax(logits, 1).gather(1, micro.teacher.ids.clamp(min=0).long())
        # A dump keeps log p in steps, so no value is farther off than half of one, nor any distance than one.
        assert (micro.teacher.prob.log() - mine)[listed].abs().max() < 0.5 / STEPS_PER_NAT + 1e-4
        assert shared_distance(logits, micro.teacher.ids, micro.teacher.prob).abs().max() < 1 / STEPS_PER_NAT
        assert sorted_distance(logits, micro.teacher.prob).abs().max() < 1 / STEPS_PER_NAT
        moved = logits.roll(1, 0)
        assert shared_distance(moved, micro.teacher.ids, micro.teacher.prob).mean() > 0.5


@pytest.mark.parametrize("head", BASELINES)
def test_pieces_and_packing_change_nothing(run, tmp_path, head):
    settings, context = run
    shape = settings.student.model_copy(update={"tokenizer": "bytes"})
    student.prepare(shape, open_targets(context), tmp_path / "s", seed=0)
    opened = student.load(tmp_path / "s")
    reader = reader_of(run, opened, dump_of(run, own=head == "mapped_topk"))
    micro = first_steps(reader, opened)[0]
    assert micro.teacher is not None and 0 < len(micro.teacher.row) < micro.n_tokens
    objective = Objective(Train(head=head), opened, 0)
    objective.observe(reader)
    opened.model.requires_grad_(False)
    logits, hidden = opened.forward(micro.input_ids)
    whole = objective(logits, hidden, micro)
    assert float(whole.kl) > 0 and float(whole.byte) == 0
    objective.chunk = 7
    lm_head = opened.model.get_output_embeddings()
    pieces = objective(lm_head, hidden, micro)
    together = packing.pack(micro)
    objective.chunk = 0
    packed = objective(*opened.forward(together.input_ids, together.position_ids), together)
    for name in ("token", "kl"):
        assert float(getattr(pieces, name)) == pytest.approx(float(getattr(whole, name)), rel=1e-5)
        assert float(getattr(packed, name)) == pytest.approx(float(getattr(whole, name)), rel=1e-4)
    assert isinstance(together.teacher, TokenTargets) and objective.n_parameters == 0


def test_strict_places_are_those_where_both_have_the_same_token(run, tmp_path):
    settings, context = run
    shape = settings.student.model_copy(update={"tokenizer": "bytes"})
    student.prepare(shape, open_targets(context), tmp_path / "s", seed=0)
    opened = student.load(tmp_path / "s")
    reader = reader_of(run, opened, dump_of(run))
    source = reader[0]
    rows = stream.cut(source, 0, reader.positions[0], opened.max_tokens)[:1]
    micro = stream.collate(rows, with_targets=True)
    places = source.teacher.position
    spans = set(zip(places.tolist(), np.append(places[1:], len(source.shard.text)).tolist(), strict=True))
    start, end = source.start[micro.teacher.row.numpy()], source.end[micro.teacher.row.numpy()]
    want = [(a, b) in spans for a, b in zip(start.tolist(), end.tolist(), strict=True)]
    assert micro.teacher.whole.tolist() == want and 0 < sum(want) < len(want)


def test_a_baseline_trains_resumes_and_is_measured_by_its_bytes(run, tmp_path):
    settings, context = run
    dataset = open_targets(context)
    student.prepare(settings.student, dataset, tmp_path / "s", seed=0)
    shape = settings.train.model_copy(update={"head": "shared_topk", "steps": 4, "tensorboard": False})
    lines: list[dict] = []
    common = {"name": "r", "device": "cpu", "dump": dump_of(run)}
    one = train(shape, tmp_path / "s", dataset, tmp_path / "one", report=lines.append, **common)
    assert all(line["byte_kl"] > 0 for line in lines) and one["head_parameters"] == one["head_flops"] == 0
    lines.clear()
    for last in (2, 4):
        short = [i == last for i in range(1, 5)]
        done = iter(short)
        with pytest.raises(Exception, match="stopped") if last == 2 else nullcontext():
            two = train(
                shape, tmp_path / "s", dataset, tmp_path / "two",
                stop=lambda done=done, last=last: last == 2 and next(done), **common,
            )  # fmt: skip
    assert two["resumed_from"] == 2 and two["sha256"] == one["sha256"]
    result = evaluate(shape, tmp_path / "s", dataset, Path(one["checkpoint"]), name="r")
    assert result["head_time_share"] is None and result["kl_nats_per_byte"] > 0
    assert "not measured" in report_table([result])
    assert "| not measured |" in as_table(summary_rows(1, [], [], [], [result]))  # what `run` ends with


def test_a_start_that_was_measured_is_the_dumps(tmp_path):
    """A teacher whose documents start with another token than its checkpoint names is still the teacher of the dump."""
    settings = small_settings(tmp_path, documents=24)
    context = open_context(with_teacher(settings, start="<|end|>"), lambda line: None)
    for stage in (plan, teacher, convert):
        stage(context)
    dataset = open_targets(context)
    shard = load_shard(dataset, dataset.split("train")[0])
    vocabulary = vocabulary_of(settings.teacher, Path(settings.teacher.model))
    end = int(vocabulary.end_ids[0])
    asked = settings.model_copy(update={"train": settings.train.model_copy(update={"head": "strict_topk"})})
    dump = _token_dump(open_context(asked, lambda line: None))
    assert dump is not None and (dump.of(shard, vocabulary, end).ids >= 0).any()
    # A start that is set is meant.
    other = _token_dump(open_context(with_teacher(asked, start="<|begin|>"), lambda line: None))
    with pytest.raises(IntegrityError, match="name the teacher that made it"):
        other.of(shard, vocabulary, end)


def with_teacher(settings: Settings, **changes: str) -> Settings:
    return settings.model_copy(update={"teacher": settings.teacher.model_copy(update=changes)})


def test_what_the_dump_must_be(run, tmp_path):
    settings, context = run
    dataset = read_dataset(context.store.folder("targets"))
    shard = load_shard(dataset, dataset.split("train")[0])
    vocabulary = vocabulary_of(settings.teacher, Path(settings.teacher.model))
    end = int(vocabulary.end_ids[0])
    with pytest.raises(ConfigError, match=r"dump part .* is not in .*delete_dump"):
        TokenDump(tmp_path).of(shard, vocabulary, end)
    with pytest.raises(IntegrityError, match="is not that of"):
        TokenDump(context.store.folder("teacher")).of(replace(shard, text=shard.text[::-1]), vocabulary, end)
    other = settings.teacher.model_copy(update={"end": "<|begin|>"})
    wrong = TokenDump(context.store.folder("teacher"), lambda _: vocabulary_of(other, Path(settings.teacher.model)))
    with pytest.raises(IntegrityError, match="name the teacher that made it"):
        wrong.of(shard, vocabulary, end)
    shape = Train(head="uld", steps=1)
    student.prepare(settings.student, dataset, tmp_path / "s", seed=0)
    mute = TokenDump(context.store.folder("teacher"))
    for head, given in (("uld", None), ("shared_topk", None), ("shared_topk", mute), ("mapped_topk", mute)):
        with pytest.raises(ConfigError, match="pass the run's token dump"):
            train(
                shape.model_copy(update={"head": head}), tmp_path / "s", dataset, tmp_path / "out",
                name="r", device="cpu", dump=given,
            )  # fmt: skip


def test_the_command_line_reads_the_runs_own_dump(run):
    settings, context = run
    for head in ("uld", "shared_topk", "mapped_topk"):
        changed = settings.model_copy(update={"train": settings.train.model_copy(update={"head": head, "steps": 2})})
        assert train_command(replace(context, settings=changed)) == 1
