"""What `status` says of workers: progress, rate, time left, who lives, who died, what is set aside."""

import time
from typing import Any, TypeGuard

from bytecache.pipeline.context import Context
from bytecache.pipeline.fleet.ledger import STAGES, Layout, block_size, n_blocks, read_json, read_names
from bytecache.pipeline.fleet.quarantine import facts_of, quarantined
from bytecache.pipeline.stores import overlapped
from bytecache.pipeline.stores.processes import has_ended
from bytecache.pipeline.units.progress import human_bytes
from bytecache.schemas.errors import IntegrityError
from bytecache.schemas.settings import Fleet


def fleet_status(context: Context, edition: int = 1) -> list[dict[str, Any]]:
    """One entry per stage that workers have begun on this edition of the plan; see `fleet_table` for what is in it.

    Price: the marks of done blocks, a listing of each unfinished one, a read per living worker. Whether a worker lives
    is judged by its heartbeat's age on this machine's clock, for display only.
    """
    store, settings = context.store, context.settings.fleet
    jobs = []
    for stage in STAGES:
        layout = Layout(stage, edition)
        begun = read_json(store, layout.job)
        if begun is None:
            continue
        n_units, n_bytes = begun.get("units"), begun.get("bytes")
        if type(n_units) is not int or not _is_amount(n_units) or not _is_amount(n_bytes):
            raise IntegrityError(
                f"{store.name}/{layout.job} is no record of a job; run `bytecache retry {stage} --new-job`, and the "
                "next worker begins one"
            )
        done, held, attempts = _progress(context, layout, n_units)
        workers = [_worker(record, settings) for record in _heartbeats(context, layout) if _is_heartbeat(record)]
        rate = sum(worker["bytes_per_s"] for worker in workers if worker["alive"])
        left = n_bytes * (1 - done / max(n_units, 1))
        entries = quarantined(store, layout)
        lost = sorted(key.rpartition("/")[2].removesuffix(".json") for key in store.list(f"{layout.root}/lost"))
        jobs.append({
            "stage": stage, "units": n_units, "done": done, "held": held, "attempts": attempts,
            "bytes_per_s": round(rate, 3), "eta_s": round(left / rate, 1) if rate else None,
            "workers": workers, "lost": lost, "quarantine": [facts_of(entry) for entry in entries],
        })  # fmt: skip
    return jobs


def fleet_table(jobs: list[dict[str, Any]]) -> str:
    """`fleet_status` for a person."""
    lines = []
    for job in jobs:
        alive = [worker for worker in job["workers"] if worker["alive"]]
        dead = len(job["workers"]) - len(alive) + len(job["lost"])
        eta = f", about {job['eta_s']:.0f} s left" if job["eta_s"] is not None and job["done"] < job["units"] else ""
        lines.append(
            f"  {job['stage']} by workers: {job['done']}/{job['units']} units done, {job['held']} held, "
            f"{job['attempts']} attempts; {len(alive)} workers live, {dead} dead; "
            f"{human_bytes(job['bytes_per_s'])}/s of text{eta}"
        )
        for worker in job["workers"]:
            what = f"at unit {worker['unit']}" if worker["unit"] >= 0 else "between units"
            life = what if worker["alive"] else "dead"
            counts = f"{worker['made']} made, {worker['failed']} failed, heard of {worker['age_s']:.0f} s ago"
            lines.append(f"    {worker['worker']} on {worker['host']}: {life}, {counts}")
        for entry in job["quarantine"]:
            lines.append(f"    set aside: unit {entry['unit']} after {entry['attempts']} attempts")
            lines += [f"      {reason}" for reason in entry["reasons"]]
    return "\n".join(lines)


def _progress(context: Context, layout: Layout, n_units: int) -> tuple[int, int, int]:
    """(done, held, attempts begun in unfinished blocks plus one for each unit of a done one)."""
    whole = {int(key.rpartition("/")[2]) for key in context.store.list(layout.blocks)}
    done = attempts = sum(block_size(block, n_units) for block in whole)
    held = 0
    unfinished = [block for block in range(n_blocks(n_units)) if block not in whole]
    for states_by_name in overlapped(lambda block: read_names(context.store.list(layout.units(block))), unfinished):
        states = states_by_name.values()
        done += sum(state.done for state in states)
        held += sum(state.held for state in states)
        attempts += sum(state.epoch for state in states)
    return done, held, attempts


def _heartbeats(context: Context, layout: Layout) -> list[dict[str, Any]]:
    keys = list(context.store.list(f"{layout.root}/workers"))
    return [record for record in overlapped(lambda key: read_json(context.store, key), keys) if record is not None]


MOST = 1 << 48
"""Units, bytes, seconds that a record may state."""


def _is_amount(value: Any) -> TypeGuard[int]:
    return type(value) in (int, float) and 0 <= value < MOST


def _is_heartbeat(record: dict[str, Any]) -> bool:
    """Whether a file among the heartbeats is one: who writes to a run's store is not always a worker of ours."""
    unit = record.get("unit")
    return (
        all(_is_amount(record.get(name)) for name in ("time", "seconds", "bytes", "made", "failed"))
        and type(unit) is int
        and -1 <= unit < MOST
        and all(isinstance(record.get(name), str) for name in ("worker", "host"))
    )


def _worker(record: dict[str, Any], settings: Fleet) -> dict[str, Any]:
    age = max(time.time() - float(record["time"]), 0.0)
    seconds = float(record["seconds"])
    return {
        "worker": record["worker"], "host": record["host"], "unit": record["unit"], "made": record["made"],
        "failed": record["failed"], "age_s": round(age, 1),
        "alive": age < settings.lease_s and not has_ended(record["worker"]),
        "bytes_per_s": round(record["bytes"] / seconds, 3) if seconds else 0.0,
    }  # fmt: skip
