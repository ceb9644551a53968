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


def probes() -> str:
    """What students of 300 steps make of the probes, all kinds of text together."""
    lines = study("probes-300", "transfer_long.md")().splitlines()
    return "\n".join(line for line in lines if ": " not in line.split("|")[1])


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


def two_teachers_levels() -> str:
    """Bits per byte of the test text, by kind: of the student's former self, and of the other teacher."""
    levels = {
        "SmolLM2-135M-Instruct": result("transfer_cross.json")["original"],
        "Gemma-3-270m": result("transfer_gemma.json")["original"],
    }
    kinds = ["", *sorted({name.split()[0] for name in levels["Gemma-3-270m"]})]
    rows = [[name, *(_bits([documents], kind) for kind in kinds)] for name, documents in levels.items()]
    return table(" | ".join(["bits/byte", ">all", *(f">{kind}" for kind in kinds[1:])]), rows)


def _bits(measured: list[dict[str, dict[str, float]]], kind: str) -> str:
    chosen = [d for documents in measured for name, d in documents.items() if name.startswith(kind)]
    return f"{sum(d['bits'] for d in chosen) / sum(d['bytes'] for d in chosen):.3f}"


def objective_cost() -> str:
    """What each objective adds to a step, and the most memory that one takes, by the student's size."""
    students = result("objective_cost.json")["students"]
    heads = [objective["head"] for objective in students[0]["objectives"]]
    rows = []
    for student in students:
        steps = {each["head"]: each for each in student["objectives"]}
        marginal = steps["marginal"]
        memory = [max(marginal[key], 0) / 2**20 for key in ("ce_peak_bytes", "peak_bytes")]
        rows.append([
            f"{student['parameters'] / 1e6:.1f} M", f"{student['vocabulary']:,}", f"{marginal['ce_seconds']:.2f}",
            *(f"{100 * steps[head]['overhead']:+.1f} %" for head in heads), f"{100 * marginal['loader']:+.1f} %",
            " / ".join(f"{size:.0f}" for size in memory),
        ])  # fmt: skip
    titles = ["parameters", ">vocabulary", ">s, cross-entropy", *(f">`{head}`" for head in heads)]
    return table(" | ".join([*titles, ">thread beside, `marginal`", ">MiB, cross-entropy / `marginal`"]), rows)


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
