"""How fast `bytecache plan` is: one process and several, JSONL files of 4 kB documents, units of 4 MB.

Plans the same corpus with every number of processes, checks that the plans are equal, and reports MB of text a second
by the clock and by the processor's own time (all processes, their start included). Beside it, in the same rounds, what
so many processes gain on this machine at work that shares nothing (hashing): others use it too, and no plan can gain
more.

    python -m benchmarks.planning [--megabytes 240] [--jobs 1 2] [--rounds 3]
"""

import argparse
import hashlib
import json
import random
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

from bytecache.pipeline.plan.make import make_plan
from bytecache.pipeline.plan.parts import Cutter, cut_corpus
from bytecache.pipeline.stores import LocalStore
from bytecache.schemas.settings import Settings
from bytecache.stages.corpus.files import corpus_files

RESULT = Path(__file__).parent / "results" / "planning.json"
FILE_MB = 20


def write_corpus(folder: Path, megabytes: int) -> None:
    """Files of random words, about `FILE_MB` each; every document different."""
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghijklmnop", k=generator.randrange(2, 9))) for _ in range(5000)]
    for number in range(megabytes // FILE_MB):
        with (folder / f"{number:04d}.jsonl").open("w") as stream:
            written = 0
            while written < FILE_MB * 1_000_000:
                written += stream.write(json.dumps({"text": " ".join(generator.choices(words, k=700))}) + "\n")


def processor_seconds() -> float:
    """Of this process and its children that have ended."""
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in spent)


def plan_once(source: Path, jobs: int) -> tuple[str, dict[str, float]]:
    """The plan's hash; MB a second."""
    settings = settings_of(source, jobs)
    with tempfile.TemporaryDirectory() as place:
        clock, processor = time.perf_counter(), processor_seconds()
        plan, _ = make_plan(LocalStore(Path(place) / "run"), settings)
        clock, processor = time.perf_counter() - clock, processor_seconds() - processor
    return plan.hash, {
        "mb_per_s": plan.n_bytes / 1e6 / clock, "mb_per_processor_s": plan.n_bytes / 1e6 / processor,
    }  # fmt: skip


def settings_of(source: Path, jobs: int) -> Settings:
    corpus = {"source": str(source), "max_bytes": 0, "unit_bytes": 4_000_000, "jobs": jobs}
    return Settings.model_validate({"corpus": corpus})


def hash_a_while(task: int) -> None:
    """Work of a second or so that needs nothing but a core."""
    raw = bytes(1_000_000)
    for _ in range(300):
        hashlib.sha256(raw).digest()


def gain(jobs: int) -> float:
    """How much faster so many processes hash than one does, their start left out."""
    seconds = []
    for n in (1, jobs):
        with ProcessPoolExecutor(n) as processes:
            list(processes.map(hash_a_while, range(n)))
            began = time.perf_counter()
            list(processes.map(hash_a_while, range(4 * jobs)))
            seconds.append(time.perf_counter() - began)
    return seconds[0] / seconds[1]


def counting_speed(source: Path) -> float:
    """MB a processor second of reading and hashing alone, which is all of a second plan."""
    corpus = settings_of(source, 1).corpus
    began = time.process_time()
    cut, _ = cut_corpus(Cutter(corpus, 0), corpus_files(corpus)[0], lambda: False)
    return cut.tally.n_bytes / 1e6 / (time.process_time() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=240)
    parser.add_argument("--jobs", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    speeds_of: dict[int, list[dict[str, float]]] = {jobs: [] for jobs in arguments.jobs}
    hashes = set()
    with tempfile.TemporaryDirectory() as place:
        write_corpus(Path(place), arguments.megabytes)
        for _ in range(arguments.rounds):
            for jobs in arguments.jobs:
                plan, speeds = plan_once(Path(place), jobs)
                hashes.add(plan)
                speeds_of[jobs].append(speeds | ({"machine_gains": gain(jobs)} if jobs > 1 else {}))
        counting = counting_speed(Path(place))
    assert len(hashes) == 1, "plans differ"
    report: dict[str, Any] = {"machine": "2 cores, x86-64", "megabytes": arguments.megabytes, "processes": {}}
    for jobs, every in speeds_of.items():
        medians = {name: round(median(one[name] for one in every), 2) for name in every[0]}
        hours = round(10e6 / medians["mb_per_processor_s"] / 3600, 1)
        report["processes"][str(jobs)] = medians | {"processor_hours_for_10_tb": hours}
    report["counting_mb_per_processor_s"] = round(counting, 1)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
