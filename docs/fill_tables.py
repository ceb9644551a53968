"""Write the tables of README.md, docs/results.md and docs/quickstart.md from committed results and a committed run.

    python docs/fill_tables.py

A table stands between `<!-- table NAME -->` and `<!-- end -->`; NAME is a key of TABLES. A test compares the documents
with what this would write, so that no figure drifts from the file it comes from. docs/default-run.txt is what a run
printed: `make run > docs/default-run.txt 2>&1`, whose first line says on what machine.
"""

import re
from collections.abc import Callable

from result_tables import run, student, teacher
from result_tables.results import ROOT

DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "results.md", ROOT / "docs" / "quickstart.md")
TABLES: dict[str, Callable[[], str]] = {
    "presets": teacher.presets,
    "presets-gemma": teacher.presets_of_gemma,
    "presets-short": teacher.presets_short,
    "dump-sizes": teacher.dump_sizes,
    "judge": teacher.judge,
    "genlm": teacher.genlm,
    "teacher-presets": teacher.teacher_presets,
    "teacher-host": teacher.teacher_host,
    "teacher-before": teacher.teacher_before,
    "teacher-first": teacher.teacher_first,
    "transfer-short": student.transfer_short,
    "transfer-cause": student.transfer_cause,
    "study-costs": student.study("costs"),
    "study-test": student.study("test-40"),
    "study-long": student.study("test-300", "transfer_long.md"),
    "study-once": student.study("test-150", "transfer_long.md"),
    "study-way": student.study("way-300", "transfer_long.md"),
    "study-probes": student.probes,
    "study-ceiling": student.study("test-40", "transfer_ceiling.md"),
    "study-beside": student.study("sweep", "transfer_beside.md"),
    "study-mapped": student.study("test-40", "transfer_mapped.md"),
    "study-bytes": student.study("test-40", "transfer_bytes.md"),
    "study-gemma": student.two_teachers_levels,
    "study-cross": student.study("test-40", "transfer_cross.md"),
    "study-cross-gpt": student.study("test-40", "transfer_cross_gpt2.md"),
    "study-fidelity": student.study("fidelity-20", "transfer_fidelity.md"),
    "study-choices": student.study("choices-40"),
    "study-bpe": student.study("test-20", "transfer_study_bpe.md"),
    "study-rates": student.study("sweep", "transfer_study_bpe.md"),
    "foreign-lists": teacher.foreign_lists,
    "two-teachers": teacher.two_teachers,
    "objective-cost": student.objective_cost,
    "oracle-excess": student.oracle_excess,
    "many-students": student.study("totals", "many_students.md"),
    "many-students-parts": student.study("parts", "many_students.md"),
    "many-students-once": student.study("once", "many_students.md"),
    "damage": run.damage,
    "rate-distortion": teacher.rate_distortion,
    "run-output": run.run_output,
    "run-table": run.run_table,
    "run-short": run.run_short,
    "run-machine": run.run_machine,
}


def filled(text: str) -> str:
    """A document with its tables as the results have them."""

    def fill(match: re.Match[str]) -> str:
        return f"<!-- table {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table ([a-z-]+) -->\n.*?<!-- end -->", fill, text, flags=re.S)


def main() -> None:
    """Fill every document."""
    for path in DOCUMENTS:
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"{path.relative_to(ROOT)}: tables filled")


if __name__ == "__main__":
    main()
