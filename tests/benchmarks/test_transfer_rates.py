"""The study of transfer with rates of each arm's own: its search, and what its arms have in common."""

import argparse
from dataclasses import replace

import pytest
import torch

from benchmarks import transfer_arms, transfer_measures, transfer_study, transfer_tables
from benchmarks.count_targets import write_counts, write_texts
from benchmarks.transfer_arms import START, Job
from bytecache.stages.student import student
from bytecache.stages.train.batches.teacher_tokens import TokenDump
from tests.support.student_data import document, make_dataset


@pytest.mark.parametrize(
    ("best", "asked"),
    [
        (1, [1, 2, 0.5]),
        (4, [1, 2, 4, 8]),
        (0.25, [1, 2, 0.5, 0.25, 0.125]),
    ],
)
def test_a_rate_is_searched_until_its_neighbours_are_worse(best, asked):
    levels = {}
    while (rate := transfer_arms.next_rate(levels)) is not None:
        levels[rate] = abs(torch.tensor(rate / START / best).log2().item())
    assert [rate / START for rate in levels] == pytest.approx(asked)
    assert min(levels, key=levels.__getitem__) == pytest.approx(START * best)


def test_the_sweep_finds_each_arms_own_setting():
    """Bits that are a sum of what each choice costs: the rule's answer is the one that costs nothing."""
    wanted = {"ce": (4e-3, 0.5, 1.0), "ours": (4e-3, 0.5, 2.0)}
    found = {"runs": []}
    for job in transfer_arms.choices_left(found):
        assert len(found["runs"]) < 20
        bits = 100 + sum(
            abs(torch.tensor(a / b).log2().item())
            for a, b in zip((job.rate, job.share, job.weight), wanted[job.arm], strict=True)
        )
        found["runs"].append({**job.key(), "use": "validation", "documents": {"x": {"bytes": 100, "bits": bits}}})
    for arm, setting in wanted.items():
        chosen = transfer_arms.best(found, arm)
        assert (chosen.rate, chosen.share, chosen.weight) == pytest.approx(setting)
    ours = transfer_arms.best(found, "ours")
    assert transfer_arms.best(found, "alm") == replace(ours, arm="alm", weight=1.0)
    assert transfer_arms.best(found, "ngram") == replace(ours, arm="ngram")
    assert transfer_arms.best(found, "ce-double").rate == wanted["ce"][0]
    assert not list(transfer_arms.choices_left(found))


def test_without_a_sweep_arms_share_the_first_setting():
    found = {"runs": [{**Job("ce", 0).key(), "use": "test", "documents": {}}]}
    assert transfer_arms.best(found, "ce") == Job("ce", transfer_arms.SWEEP_SEED)
    for arm, weight in {"ours": 2.0, "ngram": 2.0, "alm": 1.0}.items():
        assert transfer_arms.best(found, arm) == Job(arm, transfer_arms.SWEEP_SEED, weight=weight)


def test_equal_seconds_are_more_steps_of_cross_entropy():
    """Of the teacher's seconds those count that the text of so many steps took, and no more than all of them."""
    costs = {"ours": [3.0, 3.0, 99.0], "ce": [2.0, 2.0, 1.0]}
    found = {"costs": {"float32": costs}, "teacher_seconds": 100.0, "training_bytes": 80_000}

    def steps(arm, step_bytes):
        return transfer_arms.timed(found, arm, Job(arm, 0), "float32", step_bytes).steps

    assert {arm: steps(arm, 1000) for arm in ("ours", "ce", "ce-seconds", "ce-raw")} == {
        "ours": 40, "ce": 40, "ce-seconds": 60, "ce-raw": 85,
    }  # fmt: skip
    assert steps("ce-raw", 9000) == 110
    assert steps("ce-half", 1000) == 60
    found["costs"]["float32"]["ours"] = [2.0, 2.0, 2.0]
    assert (steps("ce-seconds", 1000), steps("ce-raw", 1000)) == (42, 67)


def test_cross_entropy_of_equal_steps_is_one_run():
    run = {**Job("ce", 0, steps=90).key(), "use": "test", "documents": {"x": 1}}
    found = {"runs": [run]}
    assert transfer_study.twin(found, Job("ce-raw", 0, steps=90), "test") == {**run, "arm": "ce-raw"}
    for other in (Job("ours", 0, steps=90), Job("ce-raw", 1, steps=90), Job("ce-raw", 0, steps=91)):
        assert transfer_study.twin(found, other, "test") is None
    assert transfer_study.twin(found, Job("ce-raw", 0, steps=90), "validation") is None


@pytest.fixture
def study(tmp_path):
    """A tiny student, an invented teacher, and passages of two kinds."""
    exact = make_dataset(tmp_path / "run" / "targets", sentences=8, per_shard=99)
    write_counts(exact, tmp_path / "work" / "counts")
    texts = {
        "train": {f"prose raw {i} x": document(500 + i, 8).encode() for i in range(6)},
        "heldout": {f"{kind} test {i} x": document(900 + i, 4).encode() for kind in ("prose", "code") for i in (0, 1)},
    }
    write_texts(texts, tmp_path / "work" / "plain")
    args = argparse.Namespace(
        run=tmp_path / "run", work=tmp_path / "work", student="", tokenizer="bpe:300", lora=2, batch=2, window=128,
        warmup=1, dtype="float32", passages=0, probes=False, at=[], at_passages=1, seeds=[0], epochs=1,
    )  # fmt: skip
    return transfer_study.Study(
        args, student.load(transfer_study.prepared(args, args.tokenizer)), TokenDump(tmp_path / "run" / "teacher")
    )


def test_arms_read_the_same_text_and_start_from_the_same_student(study):
    texts = {}
    for arm in ("ce", "ours", "ngram"):
        run, _, steps = transfer_study.begin(study, Job(arm, 3, steps=40))
        texts[arm] = [torch.cat([m.labels.flatten() for m in step.micro]).tolist() for step in steps]
        assert len(texts[arm]) == 40  # more than the targets' text has: raw text follows
        start = torch.cat([p.detach().flatten() for p in run.student.model.parameters()])
        assert torch.equal(start, texts.setdefault("start", start))
    assert texts["ce"] == texts["ours"] == texts["ngram"]


def test_text_is_read_again_before_raw_text_follows(study):
    """Two readings of the teacher's text, or one: the arms agree for one reading and no longer."""
    study.args.epochs = 2
    texts = {}
    for arm in ("ours", "ce-text"):
        _, _, steps = transfer_study.begin(study, Job(arm, 3, steps=100))
        texts[arm] = [torch.cat([m.labels.flatten() for m in step.micro]).tolist() for step in steps]
    once = sum(a == b for a, b in zip(*texts.values(), strict=True))
    assert 0 < once < 50
    assert texts["ours"][:once] == texts["ce-text"][:once]


def test_a_run_is_measured_on_its_way(study):
    """Of one run: after its last step as without, and at each asked step as a run of constant rate that ends there."""
    study.args.at, study.args.at_passages = [1, 3], 0
    study.args.seeds = [9]
    found = transfer_study.run_job(study, Job("ce", 0, steps=3), "test")
    assert list(found["on_the_way"]) == [1]
    study.args.at = []
    alone = transfer_study.run_job(study, Job("ce", 0, steps=3), "test")
    assert alone["documents"] == found["documents"] and "on_the_way" not in alone
    first = transfer_study.run_job(study, Job("ce", 0, steps=1), "test")  # the one step is of the warm-up in both
    assert first["documents"] == found["on_the_way"][1]


def test_a_run_changes_a_copy_and_reads_what_it_is_measured_by(study):
    before = study.before.model.get_input_embeddings().weight.detach().clone()
    run, settings, steps = transfer_study.begin(study, Job("ours", 0, share=0.5, steps=2))
    for number, step in enumerate(steps):
        assert transfer_study.learn(run, step, number, settings, 0)["bits"] > 0
    assert not torch.equal(run.student.model.get_input_embeddings().weight, before)
    assert torch.equal(study.before.model.get_input_embeddings().weight, before)
    # The test passages that the teacher has read: every choice of their tokens is in one group.
    renamed = {"train": {}, "heldout": {f"prose test {i} x": document(900 + i, 4).encode() for i in (0, 1)}}
    write_texts(renamed, study.args.work / "read")
    study.readers[f"exact heldout  {run.student.identity}"] = study.reader("read", "heldout", run.student)
    groups = transfer_study.choices_of(study, run.student)
    bits = transfer_measures.bits_of(run.student, study.reader("plain", "heldout", run.student), "test", 0)
    two = [each for name, each in bits.items() if name.startswith("prose")]
    per_byte = sum(each["bits"] for each in two) / sum(each["bytes"] for each in two)
    assert sum(group["ce"] for group in groups.values()) == pytest.approx(per_byte, abs=1e-3)


def test_bits_are_those_of_the_passages_one_by_one(study):
    opened = study.fresh()
    found = transfer_measures.bits_of(opened, study.reader("plain", "heldout", opened), "test", 0)
    assert len(found) == 4
    for name, measured in found.items():
        number = int(name.split()[2])
        text = document(900 + number, 4)
        assert measured["bytes"] == len(text.encode())
        ids = torch.tensor([[opened.vocabulary.start_id, *opened.vocabulary.encode_batch([text])[0].ids.tolist()]])
        with torch.no_grad():
            logp = opened.forward(ids)[0][0, :-1].log_softmax(-1)
        bits = -float(logp.gather(1, ids[0, 1:, None]).sum()) / torch.tensor(2.0).log().item()
        assert measured["bits"] == pytest.approx(bits, rel=1e-3)


def test_tables_pair_seeds_and_measure_from_before_to_the_original():
    def documents(bits):
        return {f"prose test {d} x": {"bytes": 100, "bits": bits + d} for d in range(2)}

    def run(arm, seed, bits, steps=4):
        return {
            **Job(arm, seed, steps=steps).key(), "use": "test", "documents": documents(bits), "seconds": 8.0,
            "curve_bits": [2.0, 2.0, 1.0, bits / 100], "curve_bytes": [100, 300, 100, 100],
        }  # fmt: skip

    found = {
        "before": documents(200), "original": documents(100),
        "costs": {"float32": {"ce": [2.0, 4.0], "ours": [3.0, 4.0]}},
        "runs": [run("ce", 0, 160), run("ce", 1, 170), run("ours", 0, 150), run("ours", 1, 158), run("ours", 7, 90),
                 run("ce-seconds", 0, 155, steps=5)],
    }  # fmt: skip
    lines = {line.split(" | ")[0].strip("| "): line for line in transfer_tables.tests(found, 4).splitlines()}
    half = 12.71 * 0.02 / 2  # of two gaps, 0.10 and 0.12
    assert f"-0.1100 ± {half:.4f} [-0.1100, -0.1100]" in lines["ours"]
    assert "| 0.67 | 8 |" in lines["ours"]  # the mean of all three is 132.7 of the way from 200 to 100
    assert "| 5 | 1 |" in lines["cross-entropy, a twentieth more steps"]
    assert "-0.0500 [" in lines["ours, to cross-entropy, a twentieth more steps"]
    assert "+50%, +0%" in transfer_tables.costs(found)
    half = run("ce-half", 0, 140, steps=6)
    half["documents"] = {name: each for name, each in half["documents"].items() if " 0 " in name}
    some = transfer_tables.tests({**found, "runs": [*found["runs"], half]}, 4)
    line = next(line for line in some.splitlines() if line.startswith("| cross-entropy, half"))
    assert "| 6 | 1 |  | -0.2000 [" in line and line.endswith("|  | 8 |")
    curves = transfer_tables.curves(found, 4, parts=2).splitlines()
    assert curves[-1].startswith("| ours | 2 | +0.0000 | -0.0550 |")
    points = {"2": {"prose test 1 x": {"bytes": 100, "bits": 180.0}}}
    found["runs"] = [{**run("ours", 0, 150), "on_the_way": points, "curve_seconds": [1.0, 2.0, 3.0, 4.0]}]
    assert transfer_tables.way(found, 4).splitlines()[-1] == "| ours | 0 | 1.8000 (3 s) | 1.5100 (10 s) |"
