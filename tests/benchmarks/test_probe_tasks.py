"""Probes as tasks of lm-eval: the files, and where it is installed its figures beside ours."""

import importlib.util
import json
from pathlib import Path

import pytest
import yaml

from benchmarks import probe_tasks, probes
from bytecache.stages.evaluate.harness import measure
from bytecache.stages.student import student
from tests.benchmarks.test_probes import TEXTS
from tests.support.tiny_models import make_checkpoint

INSTALLED = importlib.util.find_spec("lm_eval") is not None


def test_a_task_names_its_data_and_has_every_string(tmp_path, monkeypatch, capsys):
    lines = [json.dumps({"id": name, "text": text}) for name, text in TEXTS]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr("sys.argv", ["x", str(tmp_path / "corpus.jsonl"), str(tmp_path / "tasks"), "--each", "4"])
    probe_tasks.main()
    assert capsys.readouterr().out == "probes_cloze probes_pairs\n"
    made = probes.make_probes(TEXTS, each=4)
    for name, items in {"probes_cloze": made.cloze, "probes_pairs": made.pairs}.items():
        task = yaml.safe_load((tmp_path / "tasks" / f"{name}.yaml").read_text())
        assert task["task"] == name and task["target_delimiter"] == task["doc_to_text"] == ""
        rows = Path(task["dataset_kwargs"]["data_files"]["test"]).read_text().splitlines()
        assert [tuple(json.loads(row)["strings"]) for row in rows] == [item.strings for item in items]


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="lm-eval is not installed")
def test_the_harness_finds_right_what_we_do(tmp_path):
    made = probes.make_probes(TEXTS, each=8)
    probe_tasks.write_tasks(made, tmp_path / "tasks")
    folder = make_checkpoint(tmp_path / "model")
    theirs = measure(folder, [str(tmp_path / "tasks" / f"probes_{part}.yaml") for part in ("cloze", "pairs")])
    ours = probes.measure(student.load(folder), made, sample=0)
    for part in ("cloze", "pairs"):
        assert theirs[f"probes_{part}"]["acc"] == pytest.approx(probes.values(ours, part).mean())
