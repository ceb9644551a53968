"""Arms, rates and the search of `transfer_study`: what is compared, at which settings, for how many steps.

The rule, written before any test passage was looked at: of an arm that setting is taken whose bits/byte of the
validation passages are lowest, of those that a search tries. For cross-entropy: the embeddings' rate as two shares of
the adapters' default; at the better of these the adapters' rate in powers of two, upwards first, until the next is
worse. Ours takes the rates of cross-entropy, which may not be its own best, and the better of two weights of the
divergence. Last, the other share of the embeddings at the best rate of cross-entropy. Other arms take the setting of
ours, or with `ce-...` that of cross-entropy. Without a sweep the search's first setting stands.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.student_gain import ARMS as OBJECTIVES
from benchmarks.student_gain import MARGINAL

Found = dict[str, Any]
Arm = tuple[str, str, dict[str, Any]]
ARMS: dict[str, Arm] = {
    "ce": ("exact", "cross-entropy", OBJECTIVES["ce"][2]),
    "ours": ("exact", "ours", MARGINAL),
    "ngram": ("counts", "ours, taught by a byte 6-gram of the training text", MARGINAL),
    "strict": ("exact", "strict one-to-one, top 16", OBJECTIVES["strict_topk"][2]),
    "alm": ("exact", "ALM", OBJECTIVES["alm"][2]),
    "bld": ("exact", "BLD as published", OBJECTIVES["bld"][2]),
    "uld": ("exact", "ULD, weight 0.1", OBJECTIVES["uld-0.1"][2]),
    "shared-beside": ("exact", "ours, and the shared of the top 64 tokens beside it", MARGINAL),
    "shared": ("exact", "the shared of the top 64 tokens, weight 2", {"head": "shared_topk", "lambda_kl": 2.0}),
    "mapped": ("exact", "the teacher's top 64 tokens as the student's", {"head": "mapped_topk", "lambda_kl": 1.0}),
    "logits": ("exact", "all logits of the teacher", MARGINAL),
    "ours-alone": ("exact", "ours without the tokens' cross-entropy", {**MARGINAL, "lambda_token": 0.0}),
    "ce-seconds": ("exact", "cross-entropy, a twentieth more steps", OBJECTIVES["ce"][2]),
    "ce-raw": ("exact", "cross-entropy in the seconds of ours and of its teacher", OBJECTIVES["ce"][2]),
    "ce-half": ("exact", "cross-entropy, half as many steps again", OBJECTIVES["ce"][2]),
    "ce-text": ("exact", "cross-entropy, fresh text in the place of repeated", OBJECTIVES["ce"][2]),
    "ce-double": ("exact", "cross-entropy, twice the text a step", OBJECTIVES["ce"][2]),
}
"""Targets, title and settings of training."""
BESIDE = {"shared-beside": "shared_topk"}
"""Arms of ours with a baseline's divergence, at half the weight, beside it (`joint_terms`)."""
START = 2e-3
"""Rate at which the search begins: the default."""
SHARES = (0.15, 0.5)
"""Of the adapters' rate, for the embeddings."""
WEIGHTS = (1.0, 2.0)
"""Of the divergence, that the sweep tries; without a sweep ours takes the last."""
SWEEP_SEED = 100
SWEEP_STEPS = 20


@dataclass(frozen=True)
class Job:
    """One run: an arm, its seed, the rate of the adapters, the embeddings' share of it, the divergence's weight."""

    arm: str
    seed: int
    rate: float = START
    share: float = SHARES[0]
    weight: float = 1.0
    steps: int = 40

    def key(self) -> Found:
        """What a line of results says of its job."""
        return {name: getattr(self, name) for name in ("arm", "seed", "rate", "share", "weight", "steps")}


def validation(record: Found) -> float:
    """Bits/byte of a run's passages."""
    each = record["documents"].values()
    return float(sum(d["bits"] for d in each) / sum(d["bytes"] for d in each))


def sweep_runs(found: Found) -> list[Found]:
    """The runs that settings are chosen by."""
    return [r for r in found["runs"] if r["use"] == "validation" and r["steps"] == SWEEP_STEPS]


def is_ours(arm: str) -> bool:
    """Whether an arm's divergence has the weight of ours."""
    return ARMS[arm][2].get("head") == MARGINAL["head"]


def arms_of(targets: list[str]) -> dict[str, Arm]:
    """Arms that learn from other targets of the same text, from NAME=FOLDER: with and without the tokens' own term."""
    arms: dict[str, Arm] = {}
    for given in targets:
        name, _, folder = given.partition("=")
        source = str(Path(folder).resolve())
        arms[name] = (source, f"ours, targets: {name}", MARGINAL)
        arms[f"{name}-alone"] = (source, f"ours alone, targets: {name}", {**MARGINAL, "lambda_token": 0.0})
    return arms


def best(found: Found, arm: str) -> Job:
    """The job of the sweep with the lowest bits/byte; of an arm without any, that of ours."""
    runs = [r for r in sweep_runs(found) if r["arm"] == arm]
    if not sweep_runs(found):
        return Job(arm, SWEEP_SEED, weight=WEIGHTS[-1] if is_ours(arm) else 1.0)
    if not runs:
        chosen = best(found, "ce" if arm.startswith("ce-") else "ours")
        return replace(chosen, arm=arm, weight=chosen.weight if is_ours(arm) else 1.0)
    lowest = min(runs, key=validation)
    return Job(*(lowest[name] for name in ("arm", "seed", "rate", "share", "weight", "steps")))


def choices_left(found: Found) -> Iterator[Job]:
    """The next run that the rule of the sweep asks for, while there is one; the caller adds each to `found`."""

    def levels(key: str, **fixed: Any) -> dict[float, float]:
        runs = [r for r in sweep_runs(found) if fixed.items() <= r.items()]
        return {r[key]: validation(r) for r in runs}

    first = Job("ce", SWEEP_SEED, steps=SWEEP_STEPS)
    for share in SHARES:
        if share not in levels("share", arm="ce", rate=START):
            yield replace(first, share=share)
    by_share = levels("share", arm="ce", rate=START)
    share = min(by_share, key=by_share.__getitem__)
    while (rate := next_rate(levels("rate", arm="ce", share=share))) is not None:
        yield replace(first, share=share, rate=rate)
    rates = {"rate": best(found, "ce").rate, "share": share}
    for weight in WEIGHTS:
        if weight not in levels("weight", arm="ours", **rates):
            yield replace(first, arm="ours", weight=weight, **rates)
    for other in set(SHARES) - set(levels("share", arm="ce", rate=rates["rate"])):
        yield replace(first, share=other, rate=rates["rate"])


def next_rate(levels: dict[float, float]) -> float | None:
    """The rate to try, given bits/byte by rate: from `START` in powers of two, first upwards, until one is worse."""
    for step in (2.0, 0.5):
        rate = START
        while rate in levels and (rate == START or levels[rate] <= levels[rate / step]):
            rate *= step
        if rate not in levels:
            return rate
        if rate > 2 * START:
            return None  # twice the first rate was better than it, so half of it is not asked for
    return None


def timed(found: Found, arm: str, job: Job, dtype: str, step_bytes: int) -> Job:
    """`ce-seconds` and `ce-raw` take as many steps as fit into their time, `ce-half` half as many again as the others.

    step_bytes: of text in a step of ours.

    A step of ours counts as a twentieth more than one of cross-entropy, or as what was measured where that is more.
    """
    if arm == "ce-half":
        return replace(job, steps=math.ceil(1.5 * job.steps))
    if arm not in ("ce-seconds", "ce-raw"):
        return job
    ours, ce = (float(np.median(found["costs"][dtype][name])) for name in ("ours", "ce"))
    read = min(job.steps * step_bytes / found["training_bytes"], 1.0)
    teacher = found["teacher_seconds"] * read if arm == "ce-raw" else 0.0
    return replace(job, steps=math.ceil(round(job.steps * max(ours / ce, 1.05) + teacher / ce, 6)))
