"""`teacher.start = "auto"`: which token documents start with, measured, by a fixed rule, once a run."""

import json

import numpy as np
import pytest
import torch

from bytecache.pipeline.commands import teacher as command
from bytecache.pipeline.context import Context
from bytecache.pipeline.stores.local import LocalStore
from bytecache.schemas import settings as st
from bytecache.schemas.errors import IntegrityError
from bytecache.stages.teacher import start
from bytecache.stages.teacher.teacher import open_teacher


@pytest.mark.parametrize(
    ("bits", "taken"),
    [
        ({"<s>": 1.0, "</s>": 1.2, "": 1.3}, "<s>"),
        ({"<s>": 1.0, "</s>": 0.996, "": 1.3}, "<s>"),  # within the margin: the configured one
        ({"<s>": 0.710, "<|endoftext|>": 0.684, "": 0.8}, "<|endoftext|>"),
        ({"<s>": 1.66, "<bos>": 0.92, "</s>": 0.93, "": 1.66}, "<bos>"),
        ({"<s>": 1.0, "</s>": 1.2, "": 0.5}, "<s>"),  # no start at all is never taken
    ],
)
def test_the_rule(bits, taken):
    assert start.choose(bits) == taken


def test_the_record_is_what_a_plain_forward_pass_says(tiny_checkpoint):
    """Bits per byte after every candidate and after none, the first token aside; the best one by the rule."""
    folder = tiny_checkpoint("bytelevel")
    settings = st.Teacher(model=str(folder), backend="hf", context=120, top_k=2)
    record = start.measured_start(settings)
    assert record == start.measured_start(settings) == json.loads(json.dumps(record))
    teacher = open_teacher(settings)
    vocabulary, model = teacher.vocabulary, teacher.engine.model  # type: ignore[attr-defined]
    ids = {**start.candidates(vocabulary), start.NONE: None}
    assert len(ids) > 2 and next(iter(ids.values())) == vocabulary.start_id
    for text, first in ids.items():
        nats = size = 0.0
        for document in start.SAMPLE:
            tokens = vocabulary.encode(document).ids[:118].tolist()
            whole = tokens if first is None else [first, *tokens]
            with torch.inference_mode():
                logp = torch.log_softmax(model(torch.tensor([whole])).logits[0].double(), -1)
            places = range(len(whole) - len(tokens) + 1, len(whole))
            nats -= sum(float(logp[at - 1, whole[at]]) for at in places)
            size += sum(len(vocabulary.token_bytes[token] or b"") for token in tokens[1:])
        assert record["bits_per_byte"][text] == pytest.approx(nats / np.log(2) / size, abs=2e-3)
    assert record["start"] == start.choose(record["bits_per_byte"])
    settled, again = start.with_start(settings)
    assert again == record and open_teacher(settled).vocabulary.start_id == ids[record["start"]]
    assert open_teacher(settled).identity()["start"] == record["start"]
    chosen = settings.model_copy(update={"start": "<|endoftext|>"})
    assert start.with_start(chosen) == (chosen, None)


def test_a_run_measures_once_and_keeps_what_it_found(tmp_path, monkeypatch):
    said: list[str] = []
    settings = st.Settings(teacher=st.Teacher(model="somebody/model", backend="hf"))
    context = Context(settings, LocalStore(tmp_path), say=said.append)
    assert command.settle_start(context, "chat").start == "auto" and command.known_start(context, "text") is None
    monkeypatch.setattr("bytecache.stages.teacher.check.check_teacher", lambda settings: tmp_path)
    record = {"start": "<bos>", "bits_per_byte": {"<s>": 1.66, "<bos>": 0.92, "": 1.7}}
    monkeypatch.setattr("bytecache.stages.teacher.start.measured_start", lambda settings: record)
    assert command.settle_start(context, "text").start == "<bos>"
    assert said == ["teacher: documents start with <bos>: 0.920 bits/byte on a sample (<s> 1.660, none 1.700)"]
    # Another worker, whose machine would measure otherwise.
    other = {"start": "<s>", "bits_per_byte": {"<s>": 0.9, "<bos>": 0.92, "": 1.7}}
    monkeypatch.setattr("bytecache.stages.teacher.start.measured_start", lambda settings: other)
    assert command.settle_start(context, "text").start == "<bos>" and len(said) == 1
    assert (command.known_start(context, "text") or {})["start"] == "<bos>"
    named = settings.model_copy(update={"teacher": settings.teacher.model_copy(update={"start": "<s>"})})
    assert command.settle_start(Context(named, LocalStore(tmp_path)), "text").start == "<s>"
    (kept,) = (tmp_path / command.START_FOLDER).iterdir()
    kept.write_text("[]")
    with pytest.raises(IntegrityError, match="delete it"):
        command.settle_start(context, "text")
