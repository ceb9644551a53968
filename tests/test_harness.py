"""lm-eval-harness on an exported checkpoint: the refusal without it, the real thing where it is installed."""

import importlib.util
import json
from pathlib import Path

import pytest
from tiny_models import make_checkpoint

from schemas import errors
from stages.training.harness import measure, table

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


@pytest.mark.skipif(INSTALLED, reason="lm-eval is installed")
def test_without_the_package_the_remedy_is_named(tmp_path):
    with pytest.raises(errors.ConfigError, match="pip install lm-eval"):
        measure(tmp_path, ["anything"])


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="lm-eval is not installed")
def test_a_task_from_a_file_is_measured(tmp_path: Path):
    checkpoint = make_checkpoint(tmp_path / "m")
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps({"text": f"the cache is a promise {i}"}) + "\n" for i in range(4)))
    (tmp_path / "tiny_text.yaml").write_text(TASK.format(data=data))
    found = measure(checkpoint, [str(tmp_path / "tiny_text.yaml")])
    assert found["tiny_text"]["bits_per_byte"] > 0
    with pytest.raises(errors.InputError, match="no task of that name"):
        measure(checkpoint, ["no_such_task"])


def test_table_has_a_column_a_run():
    text = table({"distilled": {"t": {"acc": 0.5, "bits": 1.25}}, "control": {"t": {"acc": 0.25}}})
    assert text.splitlines()[2:] == ["| t, acc | 0.5000 | 0.2500 |", "| t, bits | 1.2500 |  |"]
