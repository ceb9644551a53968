"""Ways to train that must not change what is learned: micro-batches, packing, checkpointing, processes, precision."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import warnings
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import nn

from bytecache.schemas import errors
from bytecache.schemas.dataset.index import read_dataset
from bytecache.schemas.settings import NEUTRAL, Student, Train
from bytecache.stages.evaluate.evaluate import load_trained
from bytecache.stages.student import student
from bytecache.stages.targets.order import Order
from bytecache.stages.train import compiled
from bytecache.stages.train.batches import packing, stream
from bytecache.stages.train.run import Run, backward_step, learning_rate, set_rate, start_run
from bytecache.stages.train.train import train
from tests.support.student_data import make_dataset

SETTINGS = Train(
    head="parallel",
    byte_reduction="mean",
    steps=6,
    batch=4,
    window_bytes=96,
    warmup=2,
    checkpoint_every=2,
    learning_rate=3e-3,
    lambda_kl=0.5,
    tensorboard=False,
)
SMALL = Student(tokenizer="bpe:300", hidden_size=32, layers=2, heads=2)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(targets, student folder, result of an undisturbed run in one process)."""
    root = tmp_path_factory.mktemp("modes")
    targets = make_dataset(root / "targets")
    student.prepare(SMALL, targets, root / "student", seed=1)
    return targets, root / "student", train(SETTINGS, root / "student", targets, root / "one", name="r", device="cpu")


def steps_of(targets: Path, opened: student.Student, n: int = 3, **options: object) -> list[stream.Step]:
    dataset = read_dataset(targets)
    reader = stream.ShardReader(targets, dataset, "train", opened.vocabulary, opened.end_id)
    order = Order(dataset.content_sha256, reader.positions, 96, 0)
    return list(islice(stream.steps(order, reader, stream.Batching(8, opened.max_tokens, **options)), n))


def gradients(run: Run, step: stream.Step) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    run.optimizer.zero_grad(set_to_none=True)
    terms = backward_step(run, step, step.n_tokens, step.n_byte_tokens, len(step.micro))
    return terms, {name: p.grad.clone() for name, p in run.parameters() if p.grad is not None}


def assert_same(a, b, rtol=2e-4):
    assert a[0] == pytest.approx(b[0], rel=1e-4)
    assert a[1].keys() == b[1].keys() and len(a[1]) > 10
    for name in a[1]:
        scale = float(a[1][name].abs().max())
        torch.testing.assert_close(a[1][name], b[1][name], rtol=0, atol=rtol * scale + 1e-9, msg=name)


@pytest.mark.parametrize("mode", ["one micro-batch", "a row each", "packed", "packed by row", "checkpointing"])
def test_the_gradient_of_a_step_is_the_same(world, mode):
    targets, folder, _ = world
    opened = student.load(folder)
    plain = start_run(opened, SETTINGS, 0, CPU)
    step = steps_of(targets, opened)[2]
    assert len(step.micro) >= 1 and sum(len(m.lengths) for m in step.micro) > 6
    want = gradients(plain, step)
    if mode == "checkpointing":
        again = student.load(folder)
        other = start_run(again, SETTINGS.model_copy(update={"activation_checkpointing": True}), 0, CPU)
        assert again.model.is_gradient_checkpointing
        return assert_same(want, gradients(other, step))
    tokens = {"one micro-batch": 10**6, "a row each": 1, "packed": 10**6, "packed by row": 150}[mode]
    cut = steps_of(targets, opened, micro_tokens=tokens)[2]
    assert (len(cut.micro) == 1) == (tokens == 10**6) or mode == "packed by row"
    if mode.startswith("packed"):
        (cut,) = packing.packed(iter([cut]))
        assert max(len(m.input_ids) for m in cut.micro) == 1 and all(m.n_real == m.input_ids.numel() for m in cut.micro)
    assert_same(want, gradients(plain, cut))


def test_a_packed_row_has_the_logits_it_has_alone(world):
    targets, folder, _ = world
    opened = student.load(folder)
    (micro,) = steps_of(targets, opened, n=1, micro_tokens=10**6)[0].micro
    packed = packing.pack(micro)
    with torch.no_grad():
        together = opened.forward(packed.input_ids, packed.position_ids)[0][0]
        at = 0
        for row, length in enumerate(micro.lengths):
            alone = opened.forward(micro.input_ids[row : row + 1, :length])[0][0]
            torch.testing.assert_close(together[at : at + length], alone, rtol=0, atol=1e-5)
            assert torch.equal(packed.labels[0, at : at + length], micro.labels[row, :length])
            at += length
    # Every slot still points at the token before its own.
    shown = packed.input_ids.flatten()[packed.slot_token]
    assert torch.equal(shown, micro.input_ids.flatten()[micro.slot_token])


def test_a_model_that_ignores_packing_is_refused(world):
    opened = student.load(world[1])
    packing.check(opened)
    forward = opened.model.forward
    opened.model.forward = lambda input_ids, position_ids=None, **rest: forward(input_ids=input_ids, **rest)
    with pytest.raises(errors.ConfigError, match="packing = false"):
        packing.check(opened)


def test_context_is_read_and_never_trained_on(world):
    """Every token is predicted once however long the rows' leads are, and a lead does change what is predicted."""
    targets, folder, _ = world
    opened = student.load(folder)
    (reader,) = [stream.ShardReader(targets, read_dataset(targets), "train", opened.vocabulary, opened.end_id)]
    source = reader[0]
    n = int(source.end[-1])
    for limit, context in ((8, 0), (8, 40), (9, 40), (4000, 25)):
        rows = [row for lo in range(0, n, 30) for row in stream.cut(source, lo, lo + 30, limit, context)]
        assert [i for r in rows for i in range(r.first, r.last)] == list(range(len(source.ids)))
        assert max(r.length for r in rows) <= limit and all(
            source.row[r.first - r.lead] == source.row[r.first] for r in rows
        )
        assert (max(r.lead for r in rows) > 0) == (context > 0)
        led = stream.collate(rows, with_targets=True)
        bare = stream.collate([r._replace(lead=0) for r in rows], with_targets=True)
        assert (led.n_tokens, led.n_bytes, led.n_byte_tokens) == (bare.n_tokens, bare.n_bytes, bare.n_byte_tokens)
        assert torch.equal(led.slot_symbol, bare.slot_symbol)
        assert torch.equal(led.targets.prob, bare.targets.prob)
        assert torch.equal(led.input_ids.flatten()[led.slot_token], bare.input_ids.flatten()[bare.slot_token])
        for row, r in enumerate(rows):
            assert (led.labels[row, : r.lead] == stream.IGNORE).all()
            before = source.before[r.first - r.lead : r.last].tolist()
            assert led.input_ids[row, : r.length].tolist() == before


def test_schedules():
    flat = {s: Train(steps=10, warmup=2, learning_rate=1.0, schedule=s, final_rate=0.2) for s in ("cosine", "linear")}
    for settings in flat.values():
        rates = [learning_rate(i, settings) for i in range(11)]
        assert rates[:2] == [0.5, 1.0] and rates[2] == 1.0 and rates[10] == pytest.approx(0.2)
        assert rates[2:] == sorted(rates[2:], reverse=True) and rates[6] == pytest.approx(0.6)
    constant = Train(steps=10, warmup=2, learning_rate=1.0, schedule="constant")
    assert [learning_rate(i, constant) for i in range(3, 11)] == [1.0] * 8


def test_the_weight_of_the_divergence_moves_as_its_schedule_says(world, tmp_path):
    from bytecache.stages.train.run import kl_share

    for kind, want in (("constant", [1, 1, 1]), ("decay", [1, 0.5, 0]), ("rise", [0, 0.5, 1])):
        settings = SETTINGS.model_copy(update={"kl_schedule": kind, "steps": 3, "lambda_byte": 0.0})
        assert [kl_share(step, settings) for step in range(3)] == want
        lines: list[dict] = []
        train(settings, world[1], world[0], tmp_path / kind, name="r", device="cpu", report=lines.append)
        for line, share in zip(lines, want, strict=True):
            assert line["loss"] == pytest.approx(line["token_nll"] + 0.5 * share * line["byte_kl"], rel=1e-4)


def test_without_a_compiler_a_run_goes_on_as_before(world, monkeypatch):
    """What fails, at the first forward or backward, leaves the student as it was."""
    opened, again = student.load(world[1]), student.load(world[1])

    def refuse(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no C++ compiler\nfound")

    monkeypatch.setattr(compiled, "_try", refuse)
    with pytest.warns(RuntimeWarning, match=r"train\.compile: RuntimeError: no C\+\+ compiler found; .* without"):
        assert not compiled.compile_trunk(opened)
    ids = torch.arange(10)[None]
    assert opened.model.base_model._compiled_call_impl is None
    torch.testing.assert_close(opened.forward(ids)[0], again.forward(ids)[0])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_student_learns_the_same(world):
    targets, folder, _ = world
    opened = student.load(folder)
    step = steps_of(targets, opened)[2]
    want = gradients(start_run(opened, SETTINGS, 0, CPU), step)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="train.compile")
        other = start_run(student.load(folder), SETTINGS.model_copy(update={"compile": True}), 0, CPU)
    assert other.student.model.base_model._compiled_call_impl is not None
    assert not any(p.grad is not None for _, p in other.parameters())
    assert_same(want, gradients(other, step))


def test_bfloat16_computes_in_half_and_keeps_whole_weights(world, tmp_path):
    targets, folder, whole = world
    half = SETTINGS.model_copy(update={"dtype": "bfloat16"})
    seen = set()
    opened = student.load(folder)
    run = start_run(opened, half, 0, CPU)
    opened.model.lm_head.register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    gradients(run, steps_of(targets, opened)[0])
    assert seen == {torch.bfloat16} and {p.grad.dtype for _, p in run.parameters()} == {torch.float32}
    result = train(half, folder, targets, tmp_path, name="half", device="cpu")
    assert result["terms"]["loss"] == pytest.approx(whole["terms"]["loss"], rel=2e-2)
    assert result["terms"]["loss"] != whole["terms"]["loss"]


@pytest.mark.parametrize("embeddings", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_lora_trains_adapters_alone_and_resumes(world, tmp_path, embeddings):
    targets, folder, _ = world
    lora = SETTINGS.model_copy(update={"lora_rank": 4, "lora_embeddings": embeddings, "learning_rate": 2e-2})
    start = student.load(folder).model.state_dict()
    whole = train(lora, folder, targets, tmp_path / "a", name="lora", device="cpu")
    run = load_trained(folder, Path(whole["checkpoint"]))
    changed = {n for n, p in run.student.model.named_parameters() if p.requires_grad}
    assert all(("lora_" in n) or ("embed_tokens" in n and embeddings) for n in changed) and len(changed) >= 28
    for name, value in start.items():
        found = run.student.model.state_dict()[f"base_model.model.{name}".replace("_proj.", "_proj.base_layer.")]
        assert torch.equal(value, found) or (embeddings and ("embed_tokens" in name or "lm_head" in name)), name
    assert max(float(p.detach().abs().max()) for n, p in run.student.model.named_parameters() if "lora_B" in n) > 0
    count: list[int] = []
    with pytest.raises(errors.Interrupted):
        train(
            lora, folder, targets, tmp_path / "b", name="lora", device="cpu",
            stop=lambda: count[-1] >= 3, report=lambda r: count.append(r["step"]),
        )  # fmt: skip
    assert train(lora, folder, targets, tmp_path / "b", name="lora", device="cpu")["sha256"] == whole["sha256"]
    bad = lora.model_copy(update={"lora_targets": "no_such_projection"})
    with pytest.raises(errors.ConfigError, match="lora_targets"):
        train(bad, folder, targets, tmp_path / "c", name="lora", device="cpu")


@pytest.mark.parametrize("rank", [0, 4])
def test_embeddings_have_a_rate_of_their_own(world, rank):
    """After one step at a share of 1/4 they have moved a quarter as far, and all else as far as without it."""
    targets, folder, _ = world
    moved = {}
    for share in (1.0, 0.25):
        settings = SETTINGS.model_copy(
            update={"lora_rank": rank, "lora_embeddings": True, "embedding_rate": share, "weight_decay": 0.0}
        )
        opened = student.load(folder)
        run = start_run(opened, settings, 0, CPU)
        before = {name: p.detach().clone() for name, p in run.parameters()}
        gradients(run, steps_of(targets, opened)[0])
        set_rate(run, 1e-2)
        run.optimizer.step()
        moved[share] = {name: p.detach() - before[name] for name, p in run.parameters()}
    for name, step in moved[1.0].items():
        share = 0.25 if "embed_tokens" in name else 1.0
        torch.testing.assert_close(moved[0.25][name], step * share, rtol=1e-3, atol=1e-6)
    assert sum("embed_tokens" in name for name in moved[1.0]) == 1


def test_logs(world, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    targets, folder, _ = world
    settings = SETTINGS.model_copy(update={"tensorboard": True})
    train(settings, folder, targets, tmp_path, name="r", device="cpu")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    plotted = events.Scalars("train/loss")
    assert [e.step for e in plotted] == [1, 2, 3, 4, 5, 6]
    assert [e.value for e in plotted] == pytest.approx([line["loss"] for line in lines], rel=1e-6)


def test_wandb(world, tmp_path, monkeypatch):
    """The refusal without it; where it is installed, a run and its continuation, offline."""
    targets, folder, _ = world
    settings = SETTINGS.model_copy(update={"wandb": "project"})
    place = tmp_path / "distilled-abc"
    if importlib.util.find_spec("wandb") is None:
        with pytest.raises(errors.ConfigError, match="pip install wandb"):
            train(settings, folder, targets, place, name="distilled", device="cpu")
        return
    monkeypatch.setenv("WANDB_MODE", "offline")
    count: list[int] = []
    with pytest.raises(errors.Interrupted):
        train(
            settings, folder, targets, place, name="distilled", device="cpu",
            stop=lambda: bool(count) and count[-1] >= 3, report=lambda r: count.append(r["step"]),
        )  # fmt: skip
    train(settings, folder, targets, place, name="distilled", device="cpu")
    logs = [path.read_bytes() for path in sorted(place.glob("wandb/offline-run-*/run-distilled-abc.wandb"))]
    assert len(logs) == 2
    steps = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    assert [one["step"] for one in steps] == [1, 2, 3, 4, 5, 6]
    for one in steps:
        assert str(one["loss"]).encode() in logs[one["step"] > 3]


PROCESS = """
import sys
sys.path[:0] = {path!r}
import json, os, torch
from pathlib import Path
from bytecache.schemas import errors
from bytecache.schemas.settings import Train
from bytecache.stages.train.parallel import joined
from bytecache.stages.train.train import train
torch.set_num_threads(1)
settings, out = Train(**{settings!r}), Path({out!r})
last = []
with joined(device="cpu") as world:
    for name, changes, stop in {jobs!r}:
        try:
            result = train(
                settings.model_copy(update=changes), Path({folder!r}), Path({targets!r}), out / name, name=name,
                device="cpu", stop=lambda: world.main and bool(stop) and last[-1] >= stop,
                report=lambda record: last.append(record["step"]),
            )
        except errors.Interrupted:
            result = {{}}
        (out / f"{{name}}-{{world.rank}}.json").write_text(json.dumps(result))
"""


@pytest.mark.slow
def test_two_processes_are_one(world, tmp_path):
    """DDP and FSDP over gloo: the same data and losses; a run may change its number of processes at any checkpoint."""
    targets, folder, one = world
    jobs = [
        ("ddp", {}, 0), ("marginal", {"parallel": "fsdp", "head": "marginal", "chunk": 50}, 0),
        ("ddp-3", {"batch": 3}, 0), ("fsdp", {"parallel": "fsdp"}, 0),
        ("lora", {"parallel": "fsdp", "lora_rank": 4}, 0), ("packed", {"packing": True, "micro_tokens": 64}, 0),
        ("fsdp-cut", {"parallel": "fsdp", "micro_tokens": 64, "activation_checkpointing": True}, 3),
    ]  # fmt: skip
    seen: list[int] = []
    with pytest.raises(errors.Interrupted):
        train(
            SETTINGS, folder, targets, tmp_path / "alone-cut", name="alone-cut", device="cpu",
            stop=lambda: seen[-1] >= 3, report=lambda r: seen.append(r["step"]),
        )  # fmt: skip
    jobs.append(("alone-cut", {"parallel": "fsdp"}, 0))
    code = PROCESS.format(
        path=[p for p in sys.path if p], settings=SETTINGS.model_dump(), jobs=jobs, out=str(tmp_path),
        folder=str(folder), targets=str(targets),
    )  # fmt: skip
    (tmp_path / "job.py").write_text(code)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, str(tmp_path / "job.py")], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]

    def log(name: str) -> list[dict]:
        return [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    def same(name: str, want: list[dict]) -> None:
        found = log(name)
        assert [(r["step"], r["tokens"], r["text_bytes"]) for r in found] == [
            (r["step"], r["tokens"], r["text_bytes"]) for r in want
        ]
        for term in ("loss", "token_nll", "byte_ce", "byte_kl", "grad_norm"):
            assert [r[term] for r in found] == pytest.approx([r[term] for r in want], rel=2e-4), (name, term)

    lines = (Path(one["checkpoint"]).parent / "metrics.jsonl").read_text().splitlines()
    undisturbed = [json.loads(line) for line in lines]
    for name in ("ddp", "fsdp", "packed", "alone-cut"):
        same(name, undisturbed)
        results = [json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]
        assert results[0]["sha256"] == results[1]["sha256"] and results[0]["processes"] == 2
    assert results[0]["resumed_from"] == 3
    alone = (("ddp-3", {"batch": 3}), ("lora", {"lora_rank": 4}), ("marginal", {"head": "marginal"}))
    for name, changes in alone:
        train(SETTINGS.model_copy(update=changes), folder, targets, tmp_path / "alone" / name, name=name, device="cpu")
        same(name, log(f"alone/{name}"))
    assert len(log("fsdp-cut")) == 3
    continued = train(SETTINGS, folder, targets, tmp_path / "fsdp-cut", name="fsdp-cut", device="cpu")
    assert continued["resumed_from"] == 3 and continued["processes"] == 1
    same("fsdp-cut", undisturbed)


@pytest.mark.slow
def test_torchrun_of_the_command_line(tmp_path):
    """Distilled and control by two processes: one receipt each, which a single process then accepts as done."""
    make_dataset(tmp_path / "run/targets")
    keys = {
        "run.dir": tmp_path / "run", "student.model": "", "student.tokenizer": "bpe:300", "student.hidden_size": 32,
        "student.layers": 1, "student.heads": 2, "train.steps": 3, "train.batch": 4, "train.warmup": 1,
        "train.window_bytes": 96,
    }  # fmt: skip
    command = ["bytecache", "train", *(part for key, value in keys.items() for part in ("--set", f"{key}={value}"))]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("train distilled:") == 1 and done.stdout.count("train control:") == 1
    receipts = [json.loads(path.read_text()) for path in (tmp_path / "run/receipts/train").rglob("*.json")]
    assert sorted(r["name"] for r in receipts) == ["control", "distilled"]
    assert all(r["counts"]["processes"] == 2 for r in receipts)
    again = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, env=environment)
    assert again.returncode == 0 and again.stdout.count("nothing to do") == 2, again.stderr[-2000:]


def test_what_may_change_between_kills_is_what_changes_no_result():
    assert set(Train.model_fields) >= NEUTRAL
    assert not NEUTRAL & {"dtype", "lora_rank", "packing", "context_bytes", "batch", "schedule", "seed"}


def test_more_processes_than_windows_are_refused(world, tmp_path, monkeypatch):
    from bytecache.stages.train import train as module
    from bytecache.stages.train.parallel import World

    few = SETTINGS.model_copy(update={"batch": 1})
    with pytest.raises(errors.ConfigError, match=r"train\.batch = 1 windows for 2"):
        module._train(
            module.Request(few, world[1], world[0], tmp_path, "x", 0, 1.0, lambda: False, lambda r: None, None),
            World(0, 2),
        )
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(errors.ConfigError, match="torchrun"):
        train(SETTINGS, world[1], world[0], tmp_path, name="x")


def test_blank_micro_batches_change_nothing(world):
    """What a rank without windows runs: no loss, but a gradient (of zero) for every parameter."""
    opened = student.load(world[1])
    run = start_run(opened, SETTINGS, 0, CPU)
    parts = run.scored(stream.blank())
    run.objective.total(parts, 1, 1).backward()
    assert [float(p.detach()) for p in parts] == [0.0] * len(parts)
    assert all(isinstance(p, nn.Parameter) and p.grad is not None and not p.grad.any() for _, p in run.parameters())
