"""lm-eval-harness on an exported checkpoint: the refusal without it, the real thing where it is installed."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bytecache.schemas import errors
from bytecache.stages.evaluate.harness import measure, table
from tests.support.tiny_models import make_checkpoint

INSTALLED = importlib.util.find_spec("lm_eval") is not None
TASK = """\
task: tiny_text
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
"""
TEXTS = [f"the cache is a promise {i}" for i in range(4)]


def bits_per_byte(checkpoint: Path, texts: list[str]) -> float:
    """By hand: every token after the start token, which is the tokenizer's BOS or EOS."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    nats = 0.0
    for text in texts:
        ids = torch.tensor([[start, *tokenizer.encode(text, add_special_tokens=False)]])
        logp = model(ids).logits[0, :-1].detach().log_softmax(-1)
        nats -= float(logp.gather(1, ids[0, 1:, None]).sum())
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


@pytest.mark.skipif(INSTALLED, reason="lm-eval is installed")
def test_without_the_package_the_remedy_is_named(tmp_path):
    with pytest.raises(errors.ConfigError, match="pip install lm-eval"):
        measure(tmp_path, ["anything"])


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="lm-eval is not installed")
def test_a_task_from_a_file_is_measured(tmp_path: Path):
    checkpoint = make_checkpoint(tmp_path / "m")
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (tmp_path / "tiny_text.yaml").write_text(TASK.format(data=data))
    found = measure(checkpoint, [str(tmp_path / "tiny_text.yaml")])
    assert found["tiny_text"]["bits_per_byte"] == pytest.approx(bits_per_byte(checkpoint, TEXTS), rel=1e-4)
    with pytest.raises(errors.InputError, match="no task of that name"):
        measure(checkpoint, ["no_such_task"])


def test_table_has_a_column_a_run():
    text = table({"distilled": {"t": {"acc": 0.5, "bits": 1.25}}, "control": {"t": {"acc": 0.25}}})
    assert text.splitlines()[2:] == ["| t, acc | 0.5000 | 0.2500 |", "| t, bits | 1.2500 |  |"]
