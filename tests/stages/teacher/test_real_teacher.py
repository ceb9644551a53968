"""The built-in teacher itself, a real model: its sums beside brute force, its presets beside their promises."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bytecache.schemas import settings as st
from bytecache.schemas.errors import InputError
from bytecache.stages.fidelity.divergence import divergence
from bytecache.stages.fidelity.measuring import true_symbols
from bytecache.stages.lattice.effort import DROPPED, REFERENCE
from bytecache.stages.lattice.lattice import Lattice
from bytecache.stages.models.locate import resolve_model
from bytecache.stages.teacher.teacher import Teacher, open_teacher
from bytecache.stages.tokens.chat import Template, encode_answer
from bytecache.stages.tokens.vocab import load_vocabulary
from tests.support.oracle import exact_distributions

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TEXTS = {
    "prose": "Most rivers rise in hills and end in the sea. On their way they carry sand, which settles where the "
    "water is slow; in a thousand years a bank of it can close a harbour that ships used every day.",
    "code": "def mean(values: list[float]) -> float:\n    total = 0.0\n    for value in values:\n"
    "        total += value\n"
    '    if not values:\n        raise ValueError("mean of nothing")\n    return total / len(values)\n',
    "chinese": "大多数河流发源于山地，流入大海。河水带着泥沙，水流慢的地方泥沙就沉积下来。",
}


@pytest.fixture(scope="module")
def folder() -> Path:
    pytest.importorskip("gguf")
    try:
        return resolve_model(st.Teacher(model="builtin:smollm2-135m-instruct"))
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Teacher:
    return open_teacher(st.Teacher(model=str(folder), backend="hf", top_k=0, floor=1e-6, start="<|endoftext|>"))


def at_effort(teacher: Teacher, text: str, **effort: float):
    teacher.settings = teacher.settings.model_copy(update=effort)
    ((window,),) = teacher.windows([("d", 0, teacher.vocabulary.encode(text))])
    return window, Lattice(window).targets()


@pytest.mark.parametrize("text", ["a river", "né 7"])
def test_every_cover_evaluated_equals_brute_force_with_plain_transformers(teacher, folder, text):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @cache
    def next_token(history: tuple[int, ...]) -> np.ndarray:
        with torch.inference_mode():
            logits = model(torch.tensor([history])).logits[0, -1].double()
        return torch.softmax(logits, -1)[: teacher.vocabulary.size].numpy()

    encoded = teacher.vocabulary.encode(text)
    wanted = exact_distributions(teacher.vocabulary, next_token, encoded.data, encoded.synthetic)
    teacher.settings = teacher.settings.model_copy(update={"floor": 0.0})
    try:
        _, found = at_effort(teacher, text, tau=0.0, depth=64, static=0.0)
    finally:
        teacher.settings = teacher.settings.model_copy(update={"floor": 1e-6})
    np.testing.assert_allclose(found.probs, wanted, atol=2e-5)
    np.testing.assert_allclose(found.tail, 1 - wanted.sum(1), atol=2e-5)


@pytest.mark.parametrize("name", TEXTS)
def test_the_presets_keep_their_promises(teacher, name):
    """Mean nats per byte against the reference of every certificate; a text's start, as here, asks for most rows."""
    text = TEXTS[name]
    window, _ = at_effort(teacher, text, **(REFERENCE | {"static": 0.0}))
    reference = Lattice(window, drop=DROPPED).targets()
    symbol = true_symbols(window)
    most = {"exact": (1e-3, 1e-4, 0.002, 3.0), "balanced": (1e-2, 1e-3, 0.002, 2.3)}
    for preset, (kl, jsd, leak, rows) in most.items():
        asked, targets = at_effort(teacher, text, **st.PRESETS[preset])
        found = divergence(reference.probs, reference.tail, targets.probs, targets.tail, symbol)
        assert found.kl.mean() < kl and found.jsd.mean() < jsd and abs(found.leak.mean()) < leak, preset
        assert (asked.row_static == 0).sum() < rows * (asked.row_depth == 0).sum(), preset


def test_its_chat_template_aligns(folder):
    vocabulary = load_vocabulary(folder)
    template = Template.open(folder, vocabulary, setting="teacher.model")
    template.require_end(vocabulary)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    talk = [("user", "What is 2+2?"), ("assistant", "4"), ("user", "Thanks.\nAnd 3+3?")]
    messages = [{"role": role, "content": content} for role, content in talk]
    encoded = encode_answer(vocabulary, template, json.dumps(messages), "6, of course.")
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    ours = [*encoded.prefix.tolist(), *encoded.ids.tolist()]
    assert ours[: len(ids)] == ids and encoded.data == b"assistant\n6, of course."
    assert tokenizer.decode(ours[len(ids) :]) == "6, of course."
