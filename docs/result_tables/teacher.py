"""The teacher: what its presets cost and how exact they are, its speed, its dump and the shards made of it."""

from typing import Any

from result_tables.results import KINDS, PRESETS, TEXTS, constant, result, table

TEACHERS = ("smollm2", "gemma")
"""Of benchmarks/two_teachers.py."""


def presets(name: str = "exactness.json") -> str:
    """Every preset on every kind of text, of one teacher."""
    rows = []
    for preset in PRESETS:
        for number, (kind, measured) in enumerate(kinds(name)):
            f = measured["presets"][preset]
            figures = [f"{f['rows_per_token']:.2f}", f"{f['kl']:.5f} ± {f['kl_stderr']:.5f}", f"{f['kl_p99']:.3f}"]
            figures += [f"{f['jsd']:.5f} ± {f['jsd_stderr']:.5f}", f"{f['leak_bits']:+.4f} ± {f['leak_stderr']:.4f}"]
            text = f"{KINDS[kind]}, {measured['positions']} B"
            rows.append(["" if number else f"`{preset}`", text, *figures, f"{f['bound_jsd']:.3f}"])
    return table(
        "`teacher.preset` | text | >rows per token | >KL | >p99 | >JSD | >leak, bits | >JSD bound", rows
    ) + changed_presets(name)


def presets_short() -> str:
    """KL, JSD and rows of every preset on every kind of text, a line each."""
    rows = []
    for kind, measured in kinds():
        cells = [measured["presets"][preset] for preset in PRESETS]
        figures = [f"{c['kl']:.5f} / {c['jsd']:.5f} ({c['rows_per_token']:.2f})" for c in cells]
        rows.append([KINDS[kind], *figures])
    return table("text | " + " | ".join(f">`{preset}`" for preset in PRESETS), rows) + changed_presets()


def presets_of_gemma() -> str:
    """The same of the other teacher."""
    return presets("exactness_gemma.json")


def kinds(name: str = "exactness.json") -> list[tuple[str, dict[str, Any]]]:
    """(kind of text, what was measured) of the study of presets."""
    return list(result(name)["kinds"].items())


def changed_presets(name: str = "exactness.json") -> str:
    """A note where presets, or the rule that spends them, are no longer what they were when they were measured."""
    measured, today = result(name), constant("schemas/settings/cache.py", "PRESETS")
    presets = measured["presets"]
    notes = ""
    if presets != {name: today[name] for name in presets}:
        spelled = "; ".join(
            f"`{name}` " + ", ".join(f"{key} {number:g}" for key, number in keys.items())
            for name, keys in presets.items()
        )
        notes += f"\n\nMeasured with other values than the presets have today: {spelled}."
    if measured.get("effort", 3) != constant("stages/lattice/effort.py", "RULE"):
        notes += f"\n\nMeasured by version {measured.get('effort', 3)} of the rule of effort, which is not today's."
    return notes


def judge() -> str:
    """The presets, and narrower beams, against the widest beam of genlm-bytes."""
    measured = result("independent_judge.json")["table"]
    rows = []
    for judged, of_all in measured["all"].items():
        each = [f"{of_kind[judged]['kl']:.5f}" for kind, of_kind in measured.items() if kind != "all"]
        figures = [f"{of_all['kl']:.5f} ± {of_all['kl_stderr']:.5f}", f"{of_all['jsd']:.6f}", f"{of_all['leak']:+.4f}"]
        rows.append([f"`{judged}`" if judged in PRESETS else judged, *figures, *each])
    kinds = " | ".join(f">{KINDS[kind]}" for kind in measured if kind != "all")
    return table(f"judged | >KL | >JSD | >leak, bits | {kinds}", rows)


def genlm() -> str:
    """Speed and KL beside genlm-bytes: the better of its plain and tuned runs."""
    rows = []
    runs = result("genlm_bytes.json")["results"]
    for text, streams in dict.fromkeys((run["text"], run["streams"]) for run in runs):
        of_text = [run for run in runs if (run["text"], run["streams"]) == (text, streams)]
        other = [run for run in of_text if run["system"].startswith("genlm")]
        if not other:
            continue
        n_bytes, n_documents = of_text[0]["bytes"], of_text[0]["documents"]
        what = "one stream" if n_documents == 1 else f"{n_documents} documents"
        ours = [run for preset in PRESETS for run in of_text if run["system"] == f"bytecache {preset}"]
        best = max(other, key=lambda run: float(run["bytes_per_cpu_s"]))
        cells = [f"{run['bytes_per_cpu_s']:.{0 if run in ours else 1}f} ({run['kl']:.5f})" for run in [*ours, best]]
        rows.append([f"{TEXTS.get(text, text)}, {what}, {n_bytes} bytes", *cells])
    return table("text | " + " | ".join(f">`{preset}`" for preset in PRESETS) + " | >genlm-bytes", rows)


def teacher_presets() -> str:
    """What every preset costs of the engine, beside prefill."""
    measured = result("teacher_presets.json")
    titles = {"prefill": "prefill, the last row of a window", "all_rows": "prefill, all rows"}
    rows = []
    for name, f in measured.items():
        if not isinstance(f, dict):
            continue
        evaluated = [f"{f[key]:.0f}" if key in f else "" for key in ("branches", "static_rows")]
        each = f"{f['tokens_per_branch']:.1f}" if "tokens_per_branch" in f else ""
        ratios = [f"{f[key]:.2f}" for key in ("of_prefill_per_row", "of_all_rows_per_row")]
        preset, comma, how = name.partition(",")
        called = titles.get(name) or f"`{preset}`{comma}{how}"
        rows.append([called, *evaluated, each, *ratios, f"{f['text_bytes_per_s']:.0f}", f"{f['host_us_per_row']:.0f}"])
    return table(
        "pass | >branches | >static rows | >tokens per branch | >of prefill, per row | >of all rows, per row | "
        ">bytes of text/s | >host, µs per row",
        rows,
    )


def teacher_host() -> str:
    """Where the engine's thread spends the time that no GPU would take, per row."""
    measured = {
        name: f["host_parts_us_per_row"] for name, f in result("teacher_presets.json").items() if isinstance(f, dict)
    }
    titles = {"prefill": "prefill", "all_rows": "all rows"}
    parts = sorted({part for of_pass in measured.values() for part in of_pass} - {"else"})
    rows = [[part, *(f"{of_pass.get(part, 0.0):.1f}" for of_pass in measured.values())] for part in [*parts, "else"]]
    return table("part, µs per row | " + " | ".join(f">{titles.get(name, f'`{name}`')}" for name in measured), rows)


def teacher_before() -> str:
    """The teacher's speed beside that of a commit before."""
    figures = result("teacher_before.json")["figures"]
    titles = {"prefill": "prefill, the last row of a window", "all_rows": "prefill, all rows"}
    rows = []
    for figure, f in figures.items():
        name = figure.split(", ")[1]
        rows.append([titles.get(name, f"`{name}`"), f"{f['before']:.0f}", f"{f['now']:.0f}", f"{f['ratio']:.2f}"])
    return table("pass | >before, bytes/s | >now | >ratio", rows)


def teacher_first() -> str:
    """The teacher's speed beside that of its first form, which evaluated fewer branches."""
    found = result("teacher_first.json")
    titles = {
        "prefill": ("prefill", "prefill"), "fast": ("`fast`", "`fast`"), "balanced": ("`balanced`", "`balanced`"),
        "given effort": ("`balanced`", "tau 0.09, depth 1"),
    }  # fmt: skip
    rows = []
    for name, (then, today) in titles.items():
        old, new = found["before"]["balanced" if name == "given effort" else name], found["now"][name]
        cells = [
            [f"{f.get('branches', 0):,.0f}", f"{f['text_bytes_per_s']:.0f}", f"{f['of_prefill_per_row']:.2f}"]
            for f in (old, new)
        ]
        rows.append([then, *cells[0], today, *cells[1]])
    side = ">branches | >bytes/s | >of prefill, per row"
    return table(f"first form | {side} | now | {side}", rows)


def foreign_lists() -> str:
    """What a cache of the k likeliest tokens costs, beside path masses."""
    rows = []
    for kind, measured in result("foreign_lists.json")["kinds"].items():
        lists = measured["lists"]
        for name in sorted(lists, key=lambda name: (name in PRESETS, int(name[1:]) if name[1:].isdigit() else 0)):
            one = lists[name]
            if name in PRESETS:
                rows.append([KINDS[kind], f"path masses, `{name}`", "", *_foreign(one), ""])
            else:
                told = f"{one['told']['leak_bits']:+.3f}"
                rows.append([KINDS[kind], f"top {name[1:]}", f"{one['listed']:.3f}", *_foreign(one["top"]), told])
    return table("text | list | >mass listed | >KL | >JSD | >leak, bits | >tail | >leak, taken at its word", rows)


def _foreign(one: dict[str, float]) -> list[str]:
    return [f"{one['kl']:.4f}", f"{one['jsd']:.4f}", f"{one['leak_bits']:+.4f}", f"{one['tail']:.4f}"]


def two_teachers() -> str:
    """Bits per byte of two teachers, of their mixtures to the better one, and of the controls."""
    report = result("two_teachers.json")
    kinds = list(report["kinds"].values())
    every = [report["all"], *kinds]
    rows = [[f"{name}, alone", *(f"{one['teachers'][name]:.4f}" for one in every)] for name in TEACHERS]
    for name in report["all"]["mixtures"]:
        mixtures = [one["mixtures"][name] for one in every]
        rows.append([name, *(f"{one['bits_per_byte']:.4f}" for one in mixtures)])
        cells = ["{:+.4f} [{:+.4f}, {:+.4f}]".format(one["to_the_better"], *one["interval"]) for one in mixtures]
        rows.append(["– to the better teacher", *cells])
    tempered = [min(one["tempered"].values(), key=lambda each: float(each["bits_per_byte"])) for one in kinds]
    cells = [f"{one['bits_per_byte']:.4f} ({one['temperature']:g})" for one in tempered]
    rows.append(["the better teacher at its best temperature", "", *cells])
    rows.append(["the better teacher of each passage", *(f"{one['oracle']:.4f}" for one in every)])
    for name in TEACHERS:
        rows.append([f"{name} in its own tokens", "", *(f"{one['own'][name]['canonical']:.4f}" for one in kinds)])
    rows.append(["how far they differ, JSD in nats", "", *(f"{one['jsd']:.4f}" for one in kinds)])
    titles = [f">{name}: {one['passages']} passages, {one['bytes']:,} B" for name, one in
              zip(["all", *report["kinds"]], every, strict=True)]  # fmt: skip
    return table(" | ".join(["", *titles]), rows)


def rate_distortion() -> str:
    """Size and divergence of each precision on each capture."""
    captures = result("rate_distortion.json")
    rows = []
    for precision in ("small", "default", "precise"):
        for number, (capture, measured) in enumerate(captures.items()):
            shard = next(each for each in measured["shards"] if each.get("preset") == precision)
            figures = [f"{shard['size']:.1f}", f"{shard['kl']:.3f}"]
            rows.append(["" if number else f"`{precision}`", *capture.rsplit(" ", 1), *figures])
    return table("`convert.precision` | teacher | text | >bytes per byte of text | >KL", rows)


def dump_sizes() -> str:
    """Bytes and divergence of the dump's versions on every capture, and the sizes of other layouts."""
    rows = []
    for name, measured in result("dump_rate_distortion.json").items():
        teacher, preset, text = name.split(" ")
        divergence = {"balanced": 1e-4, "exact": 2e-5}[preset]
        (ours,) = [point for point in measured["version 3"] if point["divergence"] == divergence]
        others = measured["others"]
        cells = [f"{measured['version 2']['size']:.0f}", f"{ours['size']:.1f}", f"{ours['without_top_k']:.1f}"]
        cells += [f"{ours[name]:.1e}" for name in ("targets", "added default", "added precise")]
        cells += [f"{others[f'DistillKit, k = {k}']['size']:.0f}" for k in (128, 32)]
        cells += [f"{others[f'Megatron-LM, {kind}']['size']:.0f}" for kind in ("k = 128", "top p = 0.95")]
        rows.append([teacher, f"`{preset}`", f"{TEXTS.get(text, text)}, {measured['n_bytes']} B", *cells])
    return table(
        "teacher | preset | text | >version 2 | >version 3 | >without top 16 | >targets | >added | >`precise` | "
        ">DistillKit, 128 | >32 | >Megatron-LM, 128 | >top p",
        rows,
    )
