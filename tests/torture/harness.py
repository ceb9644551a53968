"""Kill workers at random, for all stages, until enough have died; then compare with the undisturbed run.

A process of its own imports what a run imports and forks every worker from itself (`tests.torture.children`): the
processes are real, and so are the signals, but none pays for its imports. That process works on nothing; the reference
and every comparison are made by children too. In every round a new run folder goes through all stages. Plan, teacher
and convert have `workers` processes at a time on one store, train, evaluate and export one. A random one is killed
after a random time, three in four with SIGKILL, else SIGTERM, and another one started in its place, until the stage is
done. A round has to end with the reference's hashes, every receipt sound, every unit done, and no file left over; what
was done twice is counted. Nothing waits for ever: a stage that is late ends the torture with the stacks of its workers.

Price: every child loads its own engine and compiled code; `benchmarks/torture.py` reports the processor time.
"""

import contextlib
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from bytecache.pipeline.commands import workers as commands
from bytecache.pipeline.commands.evaluate import evaluate
from bytecache.pipeline.commands.export import export
from bytecache.pipeline.commands.plan import plan
from bytecache.pipeline.commands.train import train
from bytecache.pipeline.commands.verify import verify
from bytecache.pipeline.context import Context, open_context
from bytecache.pipeline.fleet.ledger import CLAIM, DONE, LOST, RELEASED, STAGES, Layout
from bytecache.pipeline.stores import TEMP_FOLDER, LocalStore
from bytecache.pipeline.units.receipts import canonical_json
from bytecache.schemas.errors import BytecacheError, IntegrityError
from bytecache.schemas.settings import Settings
from tests.torture import children
from tests.torture.children import Child

PATIENCE_S = 300.0
"""A stage or a comparison that takes longer than this is a failure: work was lost, or processes wait for each other."""
_EXPECTED = (0, 75, -signal.SIGKILL, -signal.SIGTERM)
"""How a worker may leave here: done, drained, or killed by us (SIGTERM before its handler stands)."""
_TIMES = ("head_time_share",)
"""Figures of a report that are times."""

_STEPS: dict[str, tuple[Callable[[Context], Any], bool]] = {
    "plan": (plan, True),
    "teacher": (commands.teacher_worker, True),
    "convert": (commands.convert_worker, True),
    "train": (train, False),
    "evaluate": (evaluate, False),
    "export": (export, False),
}
"""Stage: what a worker does, and whether several may do it at a time."""


@dataclass
class Tally:
    """What happened over all rounds."""

    rounds: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    exits: Counter[str] = field(default_factory=Counter)
    started: int = 0
    units: Counter[str] = field(default_factory=Counter)
    attempts: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    released: Counter[str] = field(default_factory=Counter)
    twice: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


def outputs(store: LocalStore) -> dict[str, str]:
    """Hashes of everything whose bytes are promised: not logs, tables, receipts or configurations (times, paths)."""
    kept = [
        key for key in store.list("")
        if key.split("/")[0] in ("plan", "teacher", "targets", "train", "export", "report")
        and not key.endswith((".toml", "metrics.jsonl")) and "/tensorboard/" not in key
        and (key.endswith(".json") or not key.startswith("report/"))
    ]  # fmt: skip
    return {key: _report_hash(store, key) if key.startswith("report/") else store.sha256(key) for key in kept}


def _report_hash(store: LocalStore, key: str) -> str:
    """Of the figures of a report that are no times."""
    found = json.loads(store.read_bytes(key))
    for facts in found if isinstance(found, list) else [found]:
        for name in _TIMES:
            facts.pop(name, None)
    return hashlib.sha256(canonical_json(found)).hexdigest()


def torture(
    settings: Settings, folder: Path, *, kills: int, workers: int, seed: int = 0, patience_s: float = PATIENCE_S
) -> dict[str, Any]:
    """Rounds until `kills` processes have been killed; progress goes to stderr. Returns the facts.

    `folder` must be new; rounds without fault are removed again. Raises IntegrityError if any round is not as the
    undisturbed run, or something hangs or fails, with the reason that it left.

    The fleet's times are set short, and its limit of losses off: here units meet more deaths than they ever should.
    """
    folder.mkdir(parents=True)
    request = {
        "settings": settings.model_dump(mode="json"), "folder": str(folder), "kills": kills, "workers": workers,
        "seed": seed, "patience_s": patience_s,
    }  # fmt: skip
    # Apart from this process, which may have threads of all kinds.
    done = subprocess.run(
        [sys.executable, "-m", "tests.torture.harness"],
        input=json.dumps(request), stdout=subprocess.PIPE, text=True, env={**os.environ, **children.ENVIRONMENT},
        check=False,
    )  # fmt: skip
    try:
        report: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        raise IntegrityError(f"torture: its process ended with code {done.returncode} and no report") from None
    if report["faults"]:
        raise IntegrityError(
            f"torture: {len(report['faults'])} faults, the first: {report['faults'][0]}; the folders are kept in "
            f"{folder}"
        )
    return report


def _main() -> None:
    request = json.loads(sys.stdin.read())
    settings, folder = Settings.model_validate(request.pop("settings")), Path(request.pop("folder"))
    try:
        report = _rounds(settings, folder, **request)
    except BytecacheError as error:
        report = {"faults": [str(error)]}
    sys.stdout.write(json.dumps(report))
    sys.stdout.flush()
    os._exit(0)  # the libraries' threads may abort the interpreter's end


def _say(line: str) -> None:
    print(f"torture: {line}", file=sys.stderr, flush=True)


def _rounds(
    settings: Settings, folder: Path, *, kills: int, workers: int, seed: int, patience_s: float
) -> dict[str, Any]:
    generator = random.Random(seed)
    began = time.monotonic()
    reference = LocalStore(folder / "reference")
    logs = folder / "logs"
    logs.mkdir()
    seconds = _reference(settings, reference.root, logs, patience_s)
    expected: dict[str, str] = children.answer(lambda: outputs(reference), "hashing", logs / "hashing.txt", patience_s)
    _say(f"undisturbed run made, {len(expected)} files, {sum(seconds.values()):.1f} s")
    tally = Tally()
    while sum(tally.kills.values()) < kills:
        tally.rounds += 1
        store = LocalStore(folder / f"round-{tally.rounds:03d}")
        here = _at(settings, store.root)
        for stage, (step, shared) in _STEPS.items():
            at_a_time = workers if shared else 1
            # Often enough to strike a unit in flight, not so often that none ever ends.
            mean_s = min(max(0.25 * seconds[stage], 0.03), 0.3)
            most = kills if stage in STAGES else at_a_time * 3
            limit = min(kills, sum(tally.kills.values()) + most)
            _disturb(here, stage, step, at_a_time, mean_s, generator, tally, logs, limit, patience_s)
        found = children.answer(partial(_compare, store, expected), "comparison", logs / "comparison.txt", patience_s)
        faults = found.pop("faults")
        for name, counts in found.items():
            getattr(tally, name).update(counts)
        tally.faults += [f"round {tally.rounds}: {fault}" for fault in faults]
        _say(f"round {tally.rounds}, {sum(tally.kills.values())} of {kills} killed, {len(faults)} faults")
        if not faults:
            shutil.rmtree(store.root)
    return {
        "kills": dict(sorted(tally.kills.items())), "killed": sum(tally.kills.values()), "workers": workers,
        "seed": seed, "rounds": tally.rounds, "processes": tally.started, "exits": dict(tally.exits),
        "files": len(expected), "units": dict(tally.units), "attempts": dict(tally.attempts),
        "attempts_lost": dict(tally.lost), "attempts_given_back": dict(tally.released),
        "finished_twice": dict(tally.twice), "faults": tally.faults, "undisturbed_s": seconds,
        "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip


def _at(settings: Settings, root: Path) -> Settings:
    fleet = settings.fleet.model_copy(update={"heartbeat_s": 0.5, "lease_s": 3.0, "max_losses": 0, "notice_s": 1.0})
    run = settings.run.model_copy(update={"dir": str(root)})
    train = settings.train.model_copy(update={"control": False})
    return settings.model_copy(update={"run": run, "fleet": fleet, "train": train})


def _reference(settings: Settings, root: Path, logs: Path, patience_s: float) -> dict[str, float]:
    """Run every stage undisturbed; returns the seconds of each when everything is compiled, cached and imported."""

    def run(place: Path) -> dict[str, Any]:
        context = open_context(_at(settings, place), lambda line: None)
        seconds = {}
        for stage, (step, _) in _STEPS.items():
            started = time.monotonic()
            step(context)
            seconds[stage] = round(time.monotonic() - started, 3)
        return {"seconds": seconds, "modules": sorted(sys.modules)}

    def made(place: Path) -> dict[str, Any]:
        found: dict[str, Any] = children.answer(
            lambda: run(place), "the undisturbed run", logs / f"{place.name}.txt", patience_s
        )
        return found

    warm = root.with_name("warm")
    for module in made(warm)["modules"]:
        if module not in sys.modules and not module.startswith(("_", "torch.", "transformers.models.")):
            with contextlib.suppress(Exception):
                importlib.import_module(module)
    shutil.rmtree(warm)
    seconds: dict[str, float] = made(root)["seconds"]
    return seconds


def _disturb(
    settings: Settings, stage: str, step: Callable[[Context], Any], n: int, mean_s: float, generator: random.Random,
    tally: Tally, logs: Path, limit: int, patience_s: float,
) -> None:  # fmt: skip
    """Run a stage by `n` processes at a time and kill them at random, until one of them finds the stage done.

    Not more than `limit` kills in all; the time between two grows, so that a stage ends even where nobody lives long
    enough at first. Raises IntegrityError if a worker leaves as none should, or the stage is not done in time.
    """
    running: list[Child] = []
    finished = False
    late = time.monotonic() + patience_s
    strike = time.monotonic() + generator.uniform(0, mean_s)
    while running or not finished:
        while not finished and len(running) < n:
            tally.started += 1
            name = f"{tally.started:05d}-{stage}"
            running.append(children.start(partial(_run_step, settings, step), name, logs / f"{name}.txt"))
        for child in list(running):
            code = child.poll()
            if code is None:
                continue
            running.remove(child)
            tally.exits[str(code)] += 1
            finished = finished or code == 0
            if code not in _EXPECTED:
                reason = f"a worker of {stage} ended with code {code}; it said: {child.said()}"
                _end(running)
                raise IntegrityError(f"torture: round {tally.rounds}: {reason}")
            child.log.unlink()
        now = time.monotonic()
        if running and now >= strike and sum(tally.kills.values()) < limit:
            number = signal.SIGKILL if generator.random() < 0.75 else signal.SIGTERM
            os.kill(generator.choice(running).pid, number)
            tally.kills[f"{stage} {number.name}"] += 1
            strike = now + generator.uniform(0, 2 * mean_s)
            mean_s *= 1.03
        if now > late:
            reasons = "; ".join(f"{child.name}: {child.give_up()}" for child in running)
            raise IntegrityError(
                f"torture: round {tally.rounds}: {stage} was not done after {patience_s:.0f} s; they said: {reasons}"
            )
        time.sleep(0.002)


def _end(running: list[Child]) -> None:
    for child in running:
        child.give_up()


def _run_step(settings: Settings, step: Callable[[Context], Any]) -> None:
    context = open_context(settings, lambda line: None)
    with context.stop.installed():
        step(context)


def _compare(store: LocalStore, expected: dict[str, str]) -> dict[str, Any]:
    """What differs from the undisturbed run ("faults"), and what was done twice, by stage."""
    faults = []
    found = outputs(store)
    for key in sorted(expected.keys() | found.keys()):
        if expected.get(key) != found.get(key):
            faults.append(f"{key}: {'missing' if key not in found else 'extra' if key not in expected else 'differs'}")
    faults += verify(store)[0]
    store.sweep()
    left = [path.name for path in (store.root / TEMP_FOLDER).iterdir()] if (store.root / TEMP_FOLDER).is_dir() else []
    faults += [f"left over: {name}" for name in left]
    counts: dict[str, dict[str, int]] = {name: {} for name in ("units", "attempts", "lost", "released", "twice")}
    for stage in STAGES:
        names = [key.rpartition("/units/")[2].partition(".") for key in store.list(f"{Layout(stage).root}/units")]
        units = {unit for unit, _, _ in names}
        marks = Counter(mark[0] for _, _, mark in names)
        done = {unit for unit, _, mark in names if mark[0] == DONE}
        faults += [f"{stage}: unit {unit} was claimed and never done" for unit in sorted(units - done)]
        counts["units"][stage] = len(units)
        counts["attempts"][stage] = marks[CLAIM]
        counts["lost"][stage] = marks[LOST]
        counts["released"][stage] = marks[RELEASED]
        counts["twice"][stage] = marks[DONE] - len(done)
    return {"faults": faults, **counts}


if __name__ == "__main__":
    _main()
