"""The study of presets: stretches drawn by a seed, measured one by one, whenever there is time."""

import argparse
import json

import pytest

from benchmarks.exactness import Remembering, Study, documents_of, stretches_of
from bytecache.stages.teacher.teacher import Teacher
from bytecache.stages.tokens.vocab import load_vocabulary
from tests.support.writing_model import WritingEngine, write_tokenizer, writing_teacher

OPTIONS = argparse.Namespace(stretch=6, share=0.5, seed=3, deeper=1e-4)


@pytest.fixture
def teacher(tmp_path) -> Teacher:
    teacher = writing_teacher(load_vocabulary(write_tokenizer(tmp_path, "gpt2")))
    teacher.engine = Remembering(teacher.engine)
    return teacher


def text_of(teacher: Teacher) -> str:
    assert isinstance(teacher.engine, Remembering) and isinstance(teacher.engine.engine, WritingEngine)
    return "\n".join(teacher.engine.engine.write(20, seed).decode() for seed in range(3))


def test_stretches_cover_the_documents_in_a_drawn_order(teacher):
    documents = documents_of(teacher, text_of(teacher), 60)
    assert len(documents) > 1
    drawn = stretches_of(documents, 6, 1.0, seed=3)
    assert drawn != sorted(drawn) and drawn != stretches_of(documents, 6, 1.0, seed=4)
    assert stretches_of(documents, 6, 0.5, seed=3) == drawn[: round(len(drawn) / 2)]  # more of them goes on from less
    starts = {(number, int(start)) for number, document in enumerate(documents) for start in document.starts[:-1:6]}
    assert set(drawn) == starts and len(drawn) == len(starts)


def test_a_study_that_was_stopped_says_what_one_run_does(teacher):
    documents = documents_of(teacher, text_of(teacher), 60)
    whole = Study(teacher, documents, OPTIONS, None)
    assert len(whole.stretches) > 3
    while whole.measured < len(whole.stretches):
        whole.step()
    first = Study(teacher, documents, OPTIONS, None)
    first.step()
    first.step()
    second = Study(teacher, documents, OPTIONS, json.loads(json.dumps(first.result())))
    assert second.measured == 2
    while second.measured < len(second.stretches):
        second.step()
    found = second.result()
    assert found == whole.result()
    assert 0 < found["tokens"] <= found["positions"] < found["bytes"] + len(documents)
    kl = {name: figures["kl"] for name, figures in found["presets"].items()}
    assert kl["fast"] > kl["balanced"] > max(kl["exact"], kl["reference"])
    assert found["presets"]["fast"]["rows_per_token"] < found["presets"]["exact"]["rows_per_token"]


def test_a_whole_study_keeps_its_figures_alone(teacher):
    documents = documents_of(teacher, text_of(teacher), 60)
    whole = Study(teacher, documents, argparse.Namespace(**{**vars(OPTIONS), "share": 1.0}), None)
    whole.step(len(whole.stretches) - 1)
    assert "state" in whole.result()
    whole.step()
    found = whole.result()
    assert "state" not in found and found["measured"] == found["stretches"]
    again = Study(teacher, documents, OPTIONS, found)
    assert again.measured >= len(again.stretches)
