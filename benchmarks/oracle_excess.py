"""What the `marginal` objective costs a perfect student, by the student's tokenizer: held-out, without any training.

    python -m benchmarks.oracle_excess runs/default --out benchmarks/results/oracle_excess.json
        [--tokenizers bytes bpe:2048 bpe:8192 builtin:smollm2-135m-instruct builtin:gemma-3-270m FOLDER ...]

For every tokenizer, shares counted on the training split and judged on the held-out one (`objective/oracle.py`):

    excess    bits/byte above the teacher of a student that hits every target, with the objective as it is
    certain   choices that the teacher alone decides; of the others the text corrects (`corrected`) or decides (`open`)
    average   the same excess if every choice were taken from the teacher by average shares, as if cuts were certain
    closure   how far the reference is from the teacher's own bits: what tails and the horizon cost the measure

The table is written beside the JSON.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from bytecache.schemas import settings as st
from bytecache.schemas.dataset.index import Dataset, read_dataset
from bytecache.stages.models.locate import resolve_model
from bytecache.stages.student import student
from bytecache.stages.tokens.vocab import Vocabulary, load_vocabulary
from bytecache.stages.train.batches.stream import Row, ShardReader, collate
from bytecache.stages.train.objective.loss import Divergence
from bytecache.stages.train.objective.marginal import MarginalTerm
from bytecache.stages.train.objective.oracle import REACH, oracle_excess

TOKENIZERS = ("bytes", "bpe:2048", "bpe:8192", "builtin:smollm2-135m-instruct")


def vocabulary_of(name: str, targets: Path) -> Vocabulary:
    """`bytes` and `bpe:N` are made as for a student, of the training split; else a folder or a builtin."""
    if name == "bytes" or name.startswith("bpe:"):
        with tempfile.TemporaryDirectory() as folder:
            student.write_student_tokenizer(st.Student(tokenizer=name), None, targets, Path(folder))
            return load_vocabulary(folder)
    return load_vocabulary(str(resolve_model(st.Teacher(model=name))))


def measure(name: str, targets: Path, dataset: Dataset) -> dict[str, Any]:
    """One line of the table."""
    vocabulary = vocabulary_of(name, targets)
    end = int(vocabulary.end_ids[0])
    term = MarginalTerm(vocabulary, vocabulary.size, Divergence())
    train, heldout = (ShardReader(targets, dataset, split, vocabulary, end) for split in ("train", "heldout"))
    term.observe(train)
    excess = oracle_excess(term.marginal, heldout)
    choices = open_choices = 0
    for number in range(len(heldout.positions)):
        source = heldout[number]
        if len(source.ids):
            micro = collate([Row(source, 0, len(source.ids))], with_targets=True, byte_reduction="sum", limit=REACH)
            is_open = term.marginal.choices(micro, "sum").open
            assert is_open is not None
            choices, open_choices = choices + len(is_open), open_choices + int(is_open.sum())
    term.marginal.trust = float("inf")
    average = oracle_excess(term.marginal, heldout)
    open_share = open_choices / max(choices, 1)
    return {
        "tokenizer": Path(name).name, "vocabulary": vocabulary.size, "excess": excess.bits_per_byte,
        "certain": excess.certain_share, "open": open_share, "corrected": 1 - excess.certain_share - open_share,
        "average": average.bits_per_byte, "closure": excess.closure_bits_per_byte, "text_bytes": excess.text_bytes,
        "training_bytes": sum(e.n_bytes for e in dataset.split("train")),
    }  # fmt: skip


def report(measured: dict[str, Any]) -> str:
    """The table."""
    lines = [
        "| student's tokenizer | excess, bits/byte | certain | corrected | open | by average shares | closure |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for x in measured["tokenizers"]:
        lines.append(
            f"| {x['tokenizer']} | {x['excess']:+.4f} | {x['certain']:.1%} | {x['corrected']:.1%} | {x['open']:.1%} | "
            f"{x['average']:+.4f} | {x['closure']:+.4f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder with targets/")
    parser.add_argument("--tokenizers", nargs="+", default=list(TOKENIZERS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    targets = args.run / "targets"
    measured: dict[str, Any] = {"machine": "2 cores, x86-64", "tokenizers": []}
    for name in args.tokenizers:
        measured["tokenizers"].append(measure(name, targets, read_dataset(targets)))
        print(report({"tokenizers": measured["tokenizers"][-1:]}), flush=True)
    if args.out:
        args.out.write_text(json.dumps(measured, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(report(measured))


if __name__ == "__main__":
    main()
