"""With which token a document starts, measured: `teacher.start = "auto"`.

A configuration often says it wrong. Converted tokenizers lose a BOS that training used (Gemma without it: 1.66 bits per
byte in place of 0.92), chat models name the token that opens a message (SmolLM2-Instruct on Python source: 0.710 with
its configured `<|im_start|>`, 0.684 with `<|endoftext|>`). So a few documents, the same for everyone (`SAMPLE`), are
evaluated under every plausible start: the configured one, the end tokens, and control tokens of the usual names. Their
first token is not counted, whose bits under no start at all nobody knows.

The rule: the configured start, unless another saves more than `MARGIN` bits per byte; then the one that saves most.
What was found is remembered by checkpoint and machine, and a run keeps it (pipeline/commands/teacher.py), so that all
of its workers start alike. In conversations the chat template decides, and nothing is measured.
Price: one start of the engine, and `SAMPLE` once for each start.
"""

from typing import Any

import numpy as np

from bytecache.schemas import settings as st
from bytecache.stages.engines.engine import Prompt
from bytecache.stages.models.locate import resolve_model
from bytecache.stages.models.remembered import remembered
from bytecache.stages.teacher.teacher import Teacher, open_teacher
from bytecache.stages.tokens.vocab import Encoded, Misfit, Vocabulary

NAMES = (
    "<|endoftext|>", "<|begin_of_text|>", "<|startoftext|>", "<|end_of_text|>", "<bos>", "<s>", "<eos>", "</s>",
    "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "[BOS]", "<|bos|>",
)  # fmt: skip
"""Control tokens that documents of other models start with."""
MARGIN = 0.005
"""Bits per byte that another start must save; differences between engines and precisions are below a tenth of it."""
NONE = ""
"""How the record names no start at all. It is measured and never taken: the first byte needs a history."""
SAMPLE = (
    "The harbour was built for forty ships and now holds three. In the mornings the keeper walks to the end of the "
    "mole, reads the gauge, and writes the number into a book that nobody has asked to see for eleven years. When the "
    "wind is from the west the sea comes over the wall, and he waits in the old signal house until it has turned.\n",
    "def moving_average(values: list[float], width: int) -> list[float]:\n    total = 0.0\n    averages = []\n"
    "    for index, value in enumerate(values):\n        total += value\n        if index >= width:\n"
    "            total -= values[index - width]\n        if index >= width - 1:\n"
    "            averages.append(total / width)\n    return averages\n",
    "# Opening hours\n\n| day | from | to |\n|---|---:|---:|\n| Monday | 9:00 | 17:30 |\n"
    "| Saturday | 10:00 | 14:00 |\n\n"
    "The office is closed on 24 and 31 December. Letters that arrive by noon are answered within two days; for all "
    "others, please allow a week. Call 555 0143 if it can't wait.\n",
    "Le train part \u00e0 huit heures. Der Zug f\u00e4hrt um acht Uhr ab. El tren sale a las ocho. "
    "\u041f\u043e\u0435\u0437\u0434 \u043e\u0442\u043f\u0440\u0430\u0432\u043b\u044f\u0435\u0442\u0441\u044f "
    "\u0432 \u0432\u043e\u0441\u0435\u043c\u044c. \u706b\u8eca\u516b\u9ede\u958b\u51fa\u3002\n",
)


def with_start(settings: st.Teacher) -> tuple[st.Teacher, dict[str, Any] | None]:
    """`settings` with "auto" replaced by the measured start, and the record (see `measured_start`), None if not asked.

    Raises what `open_teacher` raises.
    """
    if settings.start != "auto" or settings.is_remote:
        return settings, None
    record = measured_start(settings)
    return settings.model_copy(update={"start": record["start"]}), record


def measured_start(settings: st.Teacher) -> dict[str, Any]:
    """The record, JSON: `start` and `bits_per_byte`.

    `start` is the text of the token to take; "auto", the configured one, which has no text or no rival.
    `bits_per_byte` has every start by its text.
    """
    folder = resolve_model(settings)
    depends_on = {
        "what": "start", "sample": SAMPLE, "backend": settings.backend, "dtype": settings.dtype, "end": settings.end,
        "context": settings.context,  # a short one cuts the sample
    }  # fmt: skip
    record: dict[str, Any] = remembered(folder, depends_on, lambda: _measure(settings))
    return record


def candidates(vocabulary: Vocabulary) -> dict[str, int]:
    """Text and id of plausible starts, the configured one first; empty where that has no text."""
    by_id = {i: text for text, i in vocabulary.control_names.items()}
    ids = [vocabulary.start_id, *vocabulary.end_ids.tolist()]
    ids += [vocabulary.control_names[name] for name in NAMES if name in vocabulary.control_names]
    if vocabulary.start_id not in by_id:
        return {}
    return {by_id[i]: i for i in dict.fromkeys(ids) if i in by_id}


def choose(bits: dict[str, float]) -> str:
    """The start to take, given bits per byte by its text, the configured one first."""
    taken = {text: value for text, value in bits.items() if text != NONE}
    configured, best = next(iter(taken)), min(taken, key=taken.__getitem__)
    return best if taken[configured] - taken[best] > MARGIN else configured


def _measure(settings: st.Teacher) -> dict[str, Any]:
    least = {"tau": 1.0, "depth": 0, "static": 0.0, "top_k": 0, "sample_tokens": 0}
    teacher = open_teacher(settings.model_copy(update=least))
    try:
        starts = candidates(teacher.vocabulary)
        if len(starts) < 2:
            return {"start": "auto", "bits_per_byte": {}}
        bits = bits_per_byte(teacher, {**starts, NONE: -1})
    finally:
        teacher.close()
    return {"start": choose(bits), "bits_per_byte": {text: round(value, 4) for text, value in bits.items()}}


def bits_per_byte(teacher: Teacher, starts: dict[str, int]) -> dict[str, float]:
    """Of the canonical tokens of `SAMPLE`, but for each document's first, after every start; id -1: none."""
    encoded = teacher.vocabulary.encode_batch(list(SAMPLE))
    documents = [document for document in encoded if not isinstance(document, Misfit) and len(document.ids) > 1]
    bits = {}
    for text, start in starts.items():
        prompts = [_prompt(document, start, teacher.settings.context - 2) for document in documents]
        nats = size = 0.0
        for prompt, rows in zip(prompts, teacher.engine.score(prompts), strict=True):
            logp = rows.next_logp[:-1] if start < 0 else rows.next_logp[1:-1]  # the last row has no next token
            nats -= float(logp.astype(np.float64).sum())
            size += float(prompt.starts[-1] - prompt.starts[0 if start < 0 else 1])
        teacher.engine.forget()
        bits[text] = nats / np.log(2) / size if size else 0.0
    return bits


def _prompt(document: Encoded, start: int, most: int) -> Prompt:
    ids, starts = document.ids[:most], document.starts[: most + 1]
    head = [] if start < 0 else [start]
    tokens = np.concatenate([np.array(head, np.int32), ids]).astype(np.int32)
    text = np.frombuffer(document.data, np.uint8)[: int(starts[-1])]
    return Prompt(f"sample after {start}", tokens, 0, text, starts[1 - len(head) :])
