"""Tokenizer transfer on equal terms: rates of each arm's own, paired seeds, n-grams, baselines, equal seconds, curves.

    python -m benchmarks.transfer_texts CORPORA TEXTS --train 104 --validation 8 --test 36 --raw 90 --read 4
    bytecache plan --run-dir RUN --set corpus.source=TEXTS/read.jsonl --set corpus.heldout_fraction=0.5
        --set corpus.max_bytes=0 --set teacher.top_k=64 --set convert.precision=precise
    bytecache teacher --run-dir RUN; bytecache convert --run-dir RUN
    python -m benchmarks.transfer_study RUN --texts TEXTS --work WORK --out benchmarks/results/transfer_study.json
        --tokenizer GPT2FOLDER --table costs|sweep|defaults|test [--arms ce ours ...] [--seeds 0 1 2 3 4]
        [--steps 40] [--at 20 40 100] [--dtype bfloat16] [--seconds 600]

The teacher reads the training text once, for every arm. Each command goes on where it stopped and stops between two
runs once `--seconds` are over; `transfer_tables` makes the tables.

    costs     processor seconds of a step: arms take turns on the same steps of text, in one process
    sweep     rates and weights, measured on `validation` passages with a seed of its own (`choices_left`)
    defaults  arms at the rate where the search begins, measured as the sweep's are
    test      what the sweep chose, measured on `test` passages; seeds are paired: equal text in equal order

Arms, and the rule by which the sweep chooses, are in `transfer_arms`. Arms read the same windows of training text.
`ce-seconds` takes a twentieth more steps, of the text that follows, or as many as fit into the seconds of ours if they
are more. `ce-raw` has the seconds of the teacher as well, who read as much text as ours learns from; what it reads
beyond needs no teacher; `ce-half` is a cheaper `ce-raw`. `ce-text` never reads a text twice, for as many steps as arms
that do (`--epochs`): fresh text in the teacher's place. `ce-double` reads twice the text a step: what half of the noise
of the text would be worth.

`shared-beside` and `logits` are of `joint_terms` and `transfer_ceiling`, which says what `--forget` is for. `--targets
NAME=FOLDER` makes two arms of other targets of the same text, NAME and NAME-alone, without the tokens' cross-entropy.

With `--at` a run is measured at some of its steps too, on `--at-passages` of each kind. Its rate falls to the end
(`train.schedule`), so a point before the end is no substitute for a shorter run.
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path

import torch
from torch import nn

from benchmarks.count_targets import documents_of, write_counts, write_texts
from benchmarks.joint_terms import JointTerm
from benchmarks.transfer_arms import (
    ARMS,
    BESIDE,
    SWEEP_SEED,
    Found,
    Job,
    arms_of,
    best,
    choices_left,
    timed,
    validation,
)
from benchmarks.transfer_cause import divergences
from benchmarks.transfer_ceiling import LogitTerm, forget
from benchmarks.transfer_gain import refuse_mixed, wanted
from benchmarks.transfer_measures import bits_of, probed
from bytecache.schemas import settings as st
from bytecache.schemas.dataset.index import read_dataset
from bytecache.schemas.dump.parquet import read_meta
from bytecache.schemas.files import write_text
from bytecache.stages.student import student
from bytecache.stages.targets.order import Order
from bytecache.stages.teacher.identity import vocabulary_from
from bytecache.stages.train.batches import packing, stream
from bytecache.stages.train.batches.teacher_tokens import TokenDump
from bytecache.stages.train.batches.types import Step
from bytecache.stages.train.objective.objective import Objective
from bytecache.stages.train.run import Run, backward_step, learning_rate, set_rate, start_run
from bytecache.stages.train.train import CLIP

DEVICE = torch.device("cpu")


@dataclass
class Study:
    """What every run shares: texts, targets, the student before training."""

    args: argparse.Namespace
    before: student.Student
    dump: TokenDump
    readers: dict[str, stream.ShardReader] = field(default_factory=dict)
    whole: list[student.Student] = field(default_factory=list)

    @classmethod
    def open(cls, args: argparse.Namespace) -> "Study":
        """The run's parts; what is made of them goes to `--work`."""
        exact = args.run / "targets"
        refuse_mixed(exact)
        teacher = st.Teacher(model=read_meta(next((args.run / "teacher").glob("*.parquet")))["teacher"]["model"])
        dump = TokenDump(args.run / "teacher", vocabulary_from(teacher))
        args.work.mkdir(parents=True, exist_ok=True)
        if not (args.work / "counts").exists():
            write_counts(exact, args.work / "counts")
        if not (args.work / "plain").exists():
            held_out, raw = (
                {line["id"]: line["text"].encode() for line in map(json.loads, path.read_text().splitlines())}
                for path in (args.texts / "corpus.jsonl", args.texts / "raw.jsonl")
            )
            held_out = {name: text for name, text in held_out.items() if name.split(" ", 3)[1] != "train"}
            write_texts({"train": raw, "heldout": held_out}, args.work / "plain")
        before = student.load(prepared(args, args.tokenizer))
        packing.check(before)
        if args.forget:
            print(f"{forget(before, args.forget, seed=0)} tokens have the embeddings of their pieces", flush=True)
        return cls(args, before, dump)

    def original(self) -> student.Student:
        """The model before it got another tokenizer, not to be changed."""
        if not self.whole:
            self.whole.append(student.load(prepared(self.args, "")))
            self.whole[0].model.eval().requires_grad_(False)
            if self.args.dtype == "bfloat16":
                keep_as_cast(self.whole[0].model)
        return self.whole[0]

    def fresh(self) -> student.Student:
        """The student before training, to be changed."""
        return replace(self.before, model=copy.deepcopy(self.before.model))

    def reader(self, source: str, split: str, opened: student.Student, *, tokens: str = "") -> stream.ShardReader:
        """A split of the targets `source`; `tokens`: with the teacher's, as that kind of `settings.BASELINES` reads."""
        folder = self.args.run / "targets" if source == "exact" else self.args.work / source
        name = f"{source} {split} {tokens} {opened.identity}"
        if name not in self.readers:
            dump = self.dump.with_own_ids() if tokens == "mapped_topk" else self.dump if tokens else None
            self.readers[name] = stream.ShardReader(
                folder, read_dataset(folder), split, opened.vocabulary, opened.end_id, dump=dump
            )
        return self.readers[name]


def prepared(args: argparse.Namespace, tokenizer: str) -> Path:
    """The model under a tokenizer ('': its own), before training."""
    folder: Path = args.work / f"student-{Path(tokenizer).name.replace(':', '-') or 'original'}"
    if not folder.exists():
        student.prepare(st.Student(model=args.student, tokenizer=tokenizer), args.run / "targets", folder, seed=0)
    return folder


def settings_of(args: argparse.Namespace, job: Job) -> st.Train:
    """The `[train]` section of a job; the weight multiplies that of the arm's divergence."""
    changes = ARMS[job.arm][2]
    weight = changes.get("lambda_kl", 1.0) * job.weight
    given = {"lora_rank": args.lora, "lora_embeddings": True, **changes, "lambda_kl": weight}
    return st.Train(
        steps=job.steps, learning_rate=job.rate, embedding_rate=job.share, window_bytes=args.window,
        batch=args.batch * (2 if job.arm == "ce-double" else 1), warmup=args.warmup, dtype=args.dtype,
        tensorboard=False, **given,
    )  # fmt: skip


def begin(study: Study, job: Job) -> tuple[Run, st.Train, Iterator[Step]]:
    """A run at its first step and the text of its steps; beyond `--epochs` of the targets' text, raw text follows."""
    settings = settings_of(study.args, job)
    opened = study.fresh()
    source = ARMS[job.arm][0]
    tokens = BESIDE.get(job.arm, settings.head if settings.head in st.BASELINES and settings.lambda_kl > 0 else "")
    reader = study.reader(source, "train", opened, tokens=tokens)
    run = start_run(opened, settings, job.seed, DEVICE, reader=reader)
    if job.arm in BESIDE:
        run.objective.term = JointTerm(run.objective.term, BESIDE[job.arm], 0.5)
    if job.arm == "logits":
        run.objective.term = LogitTerm(study.original(), run.objective.term)
    if settings.dtype == "bfloat16":
        keep_as_cast(opened.model)
    batching = stream.Batching(
        settings.batch, opened.max_tokens, with_targets=run.objective.needs_targets,
        byte_reduction=settings.byte_reduction, limit=run.objective.term.slots,
    )  # fmt: skip
    # Order hangs on the data set's hash: counts of the same text are read as the exact targets are.
    content = read_dataset(study.args.run / "targets").content_sha256
    if reader.positions != study.reader("exact", "train", opened).positions:
        raise SystemExit(f"{source}: other shards than the targets have, so arms would read other text; use one shard")
    order = Order(content, reader.positions, settings.window_bytes, job.seed)
    epochs = 1 if job.arm == "ce-text" else study.args.epochs
    read = sum(order.epoch_length(epoch) for epoch in range(epochs)) // settings.batch
    raw = study.reader("plain", "train", opened)
    further = Order(content, raw.positions, settings.window_bytes, job.seed)
    texts = chain(islice(stream.steps(order, reader, batching), read), stream.steps(further, raw, batching))
    return run, settings, packing.packed(islice(texts, job.steps))


def keep_as_cast(model: nn.Module) -> None:
    """Keep frozen matrices in bfloat16, which autocast would make of them anew in every pass: the same numbers."""
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)


def learn(run: Run, step: Step, number: int, settings: st.Train, seed: int) -> Found:
    """One step of the optimiser, as `train` takes it; its loss and processor seconds."""
    tick = time.process_time()
    run.seed_step(seed, number)
    set_rate(run, learning_rate(number, settings))
    run.optimizer.zero_grad(set_to_none=True)
    step = run.objective.prepare(step)
    terms = backward_step(run, step, step.n_tokens, step.n_byte_tokens, len(step.micro))
    nn.utils.clip_grad_norm_([p for _, p in run.parameters() if p.grad is not None], CLIP)
    run.optimizer.step()
    bits = terms["token_nll"] * step.n_tokens / max(step.n_bytes, 1) / math.log(2)
    return {"bits": bits, "bytes": step.n_bytes, "seconds": time.process_time() - tick}


def run_job(study: Study, job: Job, use: str) -> Found:
    """Train, and measure on the passages of a use; of one seed also by choices, where the teacher has read them."""
    args = study.args
    run, settings, steps = begin(study, job)
    opened = run.student
    reader = study.reader("plain", "heldout", opened)
    curve, on_the_way = [], {}
    for number, step in enumerate(steps):
        curve.append(learn(run, step, number, settings, job.seed))
        if number + 1 in args.at and number + 1 < job.steps:
            on_the_way[number + 1] = bits_of(opened, reader, use, args.at_passages, args.dtype)
            opened.model.train()
    documents = bits_of(opened, reader, use, args.passages, args.dtype)
    record: Found = {
        **job.key(), "use": use, "text_bytes": sum(x["bytes"] for x in curve),
        "seconds": round(sum(x["seconds"] for x in curve), 2), "documents": documents,
        "curve_bits": [round(x["bits"], 4) for x in curve], "curve_bytes": [x["bytes"] for x in curve],
        "curve_seconds": [round(x["seconds"], 3) for x in curve],
        **({"on_the_way": on_the_way} if on_the_way else {}),
    }  # fmt: skip
    if use == "test" and job.seed == args.seeds[0] and job.arm in ("ce", "ours"):
        record["choices"] = choices_of(study, opened)
    if use == "test" and args.probes:
        record["probes"] = probed(args.texts, opened, args.dtype)
    return record


def choices_of(study: Study, opened: student.Student) -> dict[str, dict[str, float]]:
    """What `transfer_cause.divergences` says of the test passages that the teacher has read."""
    judge = Objective(st.Train(head="marginal"), opened, 0)
    judge.observe(study.reader("exact", "train", opened))
    reader = study.reader("exact", "heldout", opened)
    rows = []
    for number in range(len(reader.positions)):
        source = reader[number]
        for row, name in enumerate(source.shard.doc_id):
            if wanted(name, ["test"], 0):
                first, last = (int(x) for x in source.row.searchsorted([row, row + 1]))
                rows.append(stream.Row(source, first, last - 1))
    micro = [
        stream.collate(members, with_targets=True, byte_reduction="sum", limit=judge.term.slots)
        for members in stream.group(rows)
    ]
    return divergences(opened, judge.term, [Step(0, micro, {})], getattr(torch, study.args.dtype))


def measure_costs(study: Study, found: Found, arms: list[str], rounds: int) -> None:
    """Seconds of a step of every arm, in turns, on the same text; the first round warms up and is not kept."""
    begun = {arm: begin(study, Job(arm, 0)) for arm in arms}
    costs: dict[str, list[float]] = {arm: [] for arm in arms}
    for number in range(rounds + 1):
        for arm, (run, settings, steps) in begun.items():
            tick = time.process_time()
            learn(run, next(steps), number, settings, 0)
            if number:
                costs[arm].append(round(time.process_time() - tick, 3))
    found["costs"] = {**found.get("costs", {}), study.args.dtype: costs}


def twin(found: Found, job: Job, use: str) -> Found | None:
    """The line of cross-entropy that is the same run under another name: the same steps of the same text."""
    same = ("ce", "ce-seconds", "ce-raw")
    if job.arm in same:
        asked = {name: value for name, value in job.key().items() if name != "arm"}
        for run in found["runs"]:
            if run["arm"] in same and run["use"] == use and asked.items() <= run.items():
                return {**run, "arm": job.arm}
    return None


def results(out: Path) -> Found:
    """The file of results so far."""
    empty: Found = {"machine": "2 cores, x86-64, one thread, other programs beside it", "runs": []}
    return json.loads(out.read_text()) if out.is_file() else empty


def save(out: Path, found: Found) -> None:
    """Replace the file."""
    write_text(out, json.dumps(found) + "\n")


def add_ends(study: Study, found: Found) -> None:
    """Bits of the student before training and of the original, each of its own tokens."""
    if "before" in found or study.args.table != "test":
        return
    for name, opened in (("before", study.before), ("original", study.original())):
        reader = study.reader("plain", "heldout", opened)
        found[name] = bits_of(opened, reader, "test", study.args.passages, study.args.dtype)
        if study.args.probes:
            found[f"{name} probes"] = probed(study.args.texts, opened, study.args.dtype)
    found["training_bytes"] = sum(len(text) for _, text in documents_of(study.args.run / "targets", "train"))
    found["settings"] = {k: getattr(study.args, k) for k in ("student", "dtype", "batch", "window", "warmup", "lora")}
    found["settings"]["tokenizer"] = Path(study.args.tokenizer).name
    found["teacher_seconds"] = study.args.teacher_seconds


def jobs(found: Found, args: argparse.Namespace) -> Iterator[tuple[Job, str]]:
    """What the asked table lacks."""
    if args.table == "sweep":
        yield from ((job, "validation") for job in choices_left(found))
    for arm in args.arms if args.table == "defaults" else []:
        job = Job(arm, SWEEP_SEED, steps=args.steps)
        if not any(r["use"] == "validation" and job.key().items() <= r.items() for r in found["runs"]):
            yield job, "validation"
    for seed in args.seeds if args.table == "test" else []:
        for arm in args.arms:
            chosen = replace(best(found, arm), seed=seed, steps=args.steps)
            job = timed(found, arm, chosen, args.dtype, args.batch * args.window)
            if not any(r["use"] == "test" and job.key().items() <= r.items() for r in found["runs"]):
                yield job, "test"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder with teacher/ and targets/")
    parser.add_argument("--texts", type=Path, required=True, help="folder of `transfer_texts`")
    parser.add_argument("--work", type=Path, required=True, help="scratch folder for students and other targets")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", choices=("costs", "sweep", "defaults", "test"), required=True)
    parser.add_argument("--arms", nargs="+", default=["ce", "ours", "ngram"], help=", ".join(ARMS))
    parser.add_argument(
        "--targets", nargs="*", default=[], metavar="NAME=FOLDER", help="arms of ours with other targets"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--passages", type=int, default=0, help="that are measured of each kind; 0 = all")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which no further run begins")
    parser.add_argument("--teacher-seconds", type=float, default=0.0, help="that the teacher read the training text")
    parser.add_argument("--steps", type=int, default=40, help="of the tables `defaults` and `test`")
    parser.add_argument("--at", type=int, nargs="*", default=[], help="steps at which a run is measured on its way")
    parser.add_argument("--at-passages", type=int, default=8, help="of each kind that are measured there")
    parser.add_argument("--epochs", type=int, default=1, help="readings of the teacher's text before raw text follows")
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=4, help="steps of each arm that are timed")
    parser.add_argument("--batch", type=int, default=2, help="windows a step")
    parser.add_argument("--window", type=int, default=512, help="bytes a window")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--student", default="builtin:smollm2-135m-instruct")
    parser.add_argument("--tokenizer", default="bpe:2048", help="see student.tokenizer")
    parser.add_argument(
        "--forget", type=float, default=0.0, help="share of tokens that lose their embedding, with --tokenizer ''"
    )
    parser.add_argument("--probes", action="store_true", help="see `probes`; made of the test texts")
    parser.add_argument("--lora", type=int, default=16)
    args = parser.parse_args()
    ARMS.update(arms_of(args.targets))
    if unknown := sorted(set(args.arms) - set(ARMS)):
        parser.error(f"--arms {' '.join(unknown)}: not one of {', '.join(ARMS)}")
    until = time.monotonic() + args.seconds
    study, found = Study.open(args), results(args.out)
    found["targets"] = sorted({*found.get("targets", []), *(given.partition("=")[0] for given in args.targets)})
    add_ends(study, found)
    if args.table == "costs":
        measure_costs(study, found, args.arms, args.rounds)
    save(args.out, found)
    for job, use in jobs(found, args):
        if time.monotonic() > until:
            print("stopped by --seconds; the same command goes on", flush=True)
            return
        record = twin(found, job, use) or run_job(study, job, use)
        found["runs"].append(record)
        save(args.out, found)
        print(json.dumps({**job.key(), "seconds": record["seconds"], "bits": round(validation(record), 4)}), flush=True)


if __name__ == "__main__":
    main()
