"""Kill workers at random, for all stages, until enough have died; then compare with the undisturbed run.

This process imports what a run imports, then forks every worker from itself: the processes are real, and so are the
signals, but none pays for its imports. It works on nothing itself, because libraries that have started threads do not
survive a fork (an earlier version, which made the reference in this process, had all its workers hang after 800 kills);
the reference and every comparison are made by children too. In every round a new run folder goes through plan, teacher,
convert, train and export. Plan, teacher and convert have `workers` processes at a time on one store, train and export
one. A random one is killed after a random time, three in four with SIGKILL, else SIGTERM, and another one started in
its place, until the stage is done. A round has to end with the reference's hashes, every receipt sound, every unit
done, and no file left over; what was done twice is counted.

Price: every child loads its own engine and compiled code; `benchmarks/torture.py` reports the processor time.
"""

import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pipeline import commands_data, commands_student
from pipeline.context import Context, open_context
from pipeline.fleet import commands
from pipeline.fleet.ledger import CLAIM, DONE, LOST, RELEASED, STAGES, Layout
from pipeline.stores import TEMP_FOLDER, LocalStore
from pipeline.verification import verify
from schemas.errors import BytecacheError, IntegrityError
from schemas.settings import Settings

PATIENCE_S = 600.0
"""A stage that takes longer than this without its end is a failure: work was lost or workers wait for each other."""

_STEPS: dict[str, tuple[Callable[[Context], Any], bool]] = {
    "plan": (commands_data.plan, True),
    "teacher": (commands.teacher_worker, True),
    "convert": (commands.convert_worker, True),
    "train": (commands_student.train, False),
    "export": (commands_student.export, False),
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
    """Hashes of everything whose bytes are promised: not reports, logs, receipts or configurations (times, paths)."""
    kept = [
        key for key in store.list("")
        if key.split("/")[0] in ("plan", "teacher", "targets", "train", "export")
        and not key.endswith((".toml", "metrics.jsonl")) and "/tensorboard/" not in key
    ]  # fmt: skip
    return {key: store.sha256(key) for key in kept}


def torture(
    settings: Settings, folder: Path, *, kills: int, workers: int, seed: int = 0, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Rounds until `kills` processes have been killed. Returns the facts; raises IntegrityError if any round is not
    as the undisturbed run. `folder` must be new; rounds without fault are removed again.

    The fleet's times are set short, and its limit of losses off: here units meet more deaths than they ever should.
    """
    folder.mkdir(parents=True)
    generator = random.Random(seed)
    began = time.monotonic()
    reference = LocalStore(folder / "reference")
    log = folder / "log.txt"
    seconds = _reference(settings, reference.root, log)
    expected: dict[str, str] = _in_child(lambda: outputs(reference), log)
    say(f"torture: undisturbed run made, {len(expected)} files, {sum(seconds.values()):.1f} s")
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
            _disturb(here, stage, step, at_a_time, mean_s, generator, tally, log, limit)
        found = _in_child(partial(_compare, store, expected), log)
        faults = found.pop("faults")
        for name, counts in found.items():
            getattr(tally, name).update(counts)
        tally.faults += [f"round {tally.rounds}: {fault}" for fault in faults]
        say(f"torture: round {tally.rounds}, {sum(tally.kills.values())} of {kills} killed, {len(faults)} faults")
        if not faults:
            shutil.rmtree(store.root)
    report = {
        "kills": dict(tally.kills), "killed": sum(tally.kills.values()), "workers": workers, "seed": seed,
        "rounds": tally.rounds, "processes": tally.started, "exits": dict(tally.exits), "files": len(expected),
        "units": dict(tally.units), "attempts": dict(tally.attempts), "attempts_lost": dict(tally.lost),
        "attempts_given_back": dict(tally.released),
        "finished_twice": dict(tally.twice), "faults": tally.faults, "undisturbed_s": seconds,
        "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip
    if tally.faults:
        raise IntegrityError(
            f"torture: {len(tally.faults)} faults, the first: {tally.faults[0]}; the folders are kept in {folder}"
        )
    return report


def _at(settings: Settings, root: Path) -> Settings:
    fleet = settings.fleet.model_copy(update={"heartbeat_s": 0.5, "lease_s": 3.0, "max_losses": 0, "notice_s": 1.0})
    run = settings.run.model_copy(update={"dir": str(root)})
    train = settings.train.model_copy(update={"control": False})
    return settings.model_copy(update={"run": run, "fleet": fleet, "train": train})


def _reference(settings: Settings, root: Path, log: Path) -> dict[str, float]:
    """Run every stage undisturbed; returns the seconds of each when everything is compiled, cached and imported."""

    def run(place: Path) -> dict[str, Any]:
        context = open_context(_at(settings, place), lambda line: None)
        seconds = {}
        for stage, (step, _) in _STEPS.items():
            started = time.monotonic()
            step(context)
            seconds[stage] = round(time.monotonic() - started, 3)
        return {"seconds": seconds, "modules": sorted(sys.modules)}

    warm = root.with_name("warm")
    for module in _in_child(lambda: run(warm), log)["modules"]:
        if module not in sys.modules and not module.startswith(("_", "torch.", "transformers.models.")):
            with contextlib.suppress(Exception):
                importlib.import_module(module)
    shutil.rmtree(warm)
    seconds: dict[str, float] = _in_child(lambda: run(root), log)["seconds"]
    return seconds


def _in_child(function: Callable[[], Any], log: Path) -> Any:
    """What `function` returns (JSON), worked out in a fork. Raises IntegrityError if it failed there."""
    answer = log.with_name("answer.json")
    answer.unlink(missing_ok=True)
    pid = _fork(lambda: answer.write_text(json.dumps(function())), log)
    _, status = os.waitpid(pid, 0)
    if status:
        raise IntegrityError(f"torture: an undisturbed run or a comparison failed; see {log}")
    return json.loads(answer.read_text())


def _disturb(
    settings: Settings, stage: str, step: Callable[[Context], Any], n: int, mean_s: float, generator: random.Random,
    tally: Tally, log: Path, limit: int,
) -> None:  # fmt: skip
    """Run a stage by `n` processes at a time and kill them at random, until one of them finds the stage done.

    Not more than `limit` kills in all; the time between two grows, so that a stage ends even where nobody lives long
    enough at first.
    """
    running: set[int] = set()
    finished = False
    stage_began = time.monotonic()
    strike = time.monotonic() + generator.uniform(0, mean_s)
    while running or not finished:
        while not finished and len(running) < n:
            running.add(_fork(partial(_run_step, settings, step), log))
            tally.started += 1
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                running.remove(pid)
                code = os.waitstatus_to_exitcode(status)
                tally.exits[str(code)] += 1
                finished = finished or code == 0
                if code not in (0, 75, -signal.SIGKILL, -signal.SIGTERM):
                    tally.faults.append(f"a worker of {stage} ended with code {code}, see {log}")
                    finished = True
        now = time.monotonic()
        if running and now >= strike and sum(tally.kills.values()) < limit:
            number = signal.SIGKILL if generator.random() < 0.75 else signal.SIGTERM
            os.kill(generator.choice(sorted(running)), number)
            tally.kills[f"{stage} {number.name}"] += 1
            strike = now + generator.uniform(0, 2 * mean_s)
            mean_s *= 1.03
        if now - stage_began > PATIENCE_S:
            for pid in running:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            tally.faults.append(f"{stage} was not done after {PATIENCE_S:.0f} s")
            return
        time.sleep(0.002)


def _run_step(settings: Settings, step: Callable[[Context], Any]) -> None:
    context = open_context(settings, lambda line: None)
    with context.stop.installed():
        step(context)


def _fork(function: Callable[[], Any], log: Path) -> int:
    """A child that does one thing and leaves with the exit code of the command line."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        sink = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        import torch

        torch.set_num_threads(1)  # many processes share the cores, and threads that spin would starve them all
        function()
        code = 0
    except BytecacheError as error:
        code = error.exit_code
        os.write(2, f"{os.getpid()}: {error}\n".encode())
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


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
