"""The probes as task files of EleutherAI's lm-eval, so that others' code measures an export on them, without network.

    python -m benchmarks.probe_tasks TEXTS/corpus.jsonl TASKS [--use test] [--each 50] [--seed 0]

TASKS gets, of the last words and of the pairs (`probe_items`), a JSONL file with the strings of each item, the true one
first, and a YAML file that names it: multiple choice between whole strings after nothing, which is what
`probes.measure` scores. What the texts say ends up in these files; they are for those who have the texts.
"""

import argparse
import json
from pathlib import Path

from benchmarks.probe_items import Item, Probes, make_probes
from benchmarks.probes import texts_of

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: ""
target_delimiter: ""
doc_to_choice: strings
doc_to_target: 0
metric_list:
  - metric: acc
"""
"""`target_delimiter`: else the harness puts a space before every string."""


def write_tasks(probes: Probes, folder: Path) -> list[str]:
    """Write both tasks; returns their names. A task's file has its name, and names its data by the whole path."""
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, tuple[Item, ...]] = {"probes_cloze": probes.cloze, "probes_pairs": probes.pairs}
    for name, items in parts.items():
        data = folder.resolve() / f"{name}.jsonl"
        lines = [json.dumps({"kind": item.kind, "rule": item.rule, "strings": item.strings}) for item in items]
        data.write_text("\n".join(lines) + "\n", encoding="utf-8")
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=json.dumps(str(data))), encoding="utf-8")
    return list(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--use", default="test", help="of the texts")
    parser.add_argument("--each", type=int, default=50, help="items of a kind")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    probes = make_probes(texts_of(args.texts, args.use), args.seed, each=args.each)
    print(*write_tasks(probes, args.out))


if __name__ == "__main__":
    main()
