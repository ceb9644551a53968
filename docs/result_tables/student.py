"""The student: the study of transfer, and what the objective costs."""

from collections.abc import Callable

from result_tables.results import RESULTS, result, table


def transfer_cause() -> str:
    """What is left to learn of the teacher, and how noisy both gradients are, as the benchmark writes it."""
    return (RESULTS / "transfer_cause.md").read_text(encoding="utf-8").strip()


def study(name: str, file: str = "transfer_study.md") -> Callable[[], str]:
    """A table of the study of transfer, as its benchmark writes it."""

    def section() -> str:
        text = (RESULTS / file).read_text(encoding="utf-8")
        return text.partition(f"## {name}\n\n")[2].partition("\n\n")[0].strip()

    return section


def transfer_short() -> str:
    """Bits per byte of the test text, by kind: before training, of both arms over paired seeds, of the original."""
    report = result("transfer_study.json")
    runs = [r for r in report["runs"] if r["use"] == "test" and r["steps"] == 40]
    by_arm = {arm: {r["seed"]: r["documents"] for r in runs if r["arm"] == arm} for arm in ("ce", "ours")}
    seeds = sorted(set(by_arm["ce"]) & set(by_arm["ours"]))
    of = "one seed" if len(seeds) == 1 else f"{len(seeds)} seeds"
    rows = [
        ("before training", [report["before"]]),
        (f"cross-entropy alone, {of}", [by_arm["ce"][seed] for seed in seeds]),
        (f"with the cache, {of}", [by_arm["ours"][seed] for seed in seeds]),
        ("the original", [report["original"]]),
    ]
    kinds = sorted({name.split()[0] for name in report["original"]})
    cells = [[title, *(_bits(measured, kind) for kind in kinds)] for title, measured in rows]
    return table(" | ".join(["bits/byte", *(f">{kind}" for kind in kinds)]), cells)


def _bits(measured: list[dict[str, dict[str, float]]], kind: str) -> str:
    chosen = [d for documents in measured for name, d in documents.items() if name.startswith(kind)]
    return f"{sum(d['bits'] for d in chosen) / sum(d['bytes'] for d in chosen):.3f}"


def objective_cost() -> str:
    """What each objective adds to a step, by the student's size."""
    students = result("objective_cost.json")["students"]
    rows = []
    for head in [objective["head"] for objective in students[0]["objectives"]]:
        cells = []
        for student in students:
            steps = [each for each in student["objectives"] if each["head"] == head]
            cells.append(f"{100 * steps[0]['overhead']:+.1f} %" if steps else "")
        rows.append([f"`{head}`", *cells])
    sizes = [f">{student['parameters'] / 1e6:.1f} M parameters" for student in students]
    return table("objective | " + " | ".join(sizes), rows)


def oracle_excess() -> str:
    """What the objective costs a student that reaches it, by its tokenizer."""
    rows = [
        [
            f"`{each['tokenizer']}`", f"{each['excess']:+.4f}", f"{each['certain']:.0%}", f"{each['corrected']:.0%}",
            f"{each['open']:.0%}", f"{each['average']:+.4f}", f"{each['closure']:+.4f}",
        ]
        for each in result("oracle_excess.json")["tokenizers"]
    ]  # fmt: skip
    titles = "student's tokenizer | >excess | >certain | >corrected | >open | >by average shares | >closure"
    return table(titles, rows)
