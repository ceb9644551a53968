"""What a run asks of a shared store: bytes it holds at its peak, bytes that cross the network, requests.

By the way of the dump every part is written, read once more by whoever converts, and kept until then; straight to
targets (`teacher.keep`) nothing but slices is read and nothing but shards is written. With D and T bytes of dump and
targets for each byte of text, per byte of text:

                peak            network
    dump        1 + D + T       1 + 2 D + T
    targets     1 + T           1 + T

(1: the slices, packed in fact to less.) A unit of work costs the store `UNIT` requests, data and ledger together, and
every worker a heartbeat each `fleet.heartbeat_s`: benchmarks/queue_simulation.py counts them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from bytecache.pipeline.commands.estimate.prediction import Predicted
from bytecache.pipeline.units.progress import human_bytes

UNIT = 16.0
"""Requests of a unit beside the reading of its inputs: 3 heads and 2 puts of its data; 5 puts, 2 gets and 2 listings of
the ledger, and 2 claims that another worker was faster at."""
READ = 1.0
"""Requests to read one slice or part."""


@dataclass(frozen=True)
class Traffic:
    """Of the whole corpus, in one mode: `keep` as in `[teacher]`; bytes, and how many requests."""

    keep: str
    peak_bytes: Predicted
    network_bytes: Predicted
    requests: float


@dataclass(frozen=True)
class Amounts:
    """What a run makes: bytes of text, units and shards, hours of workers, seconds between heartbeats."""

    text_bytes: int
    units: int
    shards: int
    hours: float
    heartbeat_s: float


def both_modes(amounts: Amounts, dump: Predicted, targets: Predicted) -> tuple[Traffic, Traffic]:
    """By way of the dump, and straight to targets."""
    text, beats = float(amounts.text_bytes), 3600.0 * amounts.hours / amounts.heartbeat_s
    by_dump = Traffic(
        "dump",
        targets.plus(dump).times(1.0, text),
        targets.plus(dump).plus(dump).times(1.0, text),
        UNIT * (amounts.units + amounts.shards) + READ * 2 * amounts.units + beats,
    )
    straight = Traffic(
        "targets",
        targets.times(1.0, text),
        targets.times(1.0, text),
        UNIT * amounts.shards + READ * amounts.units + beats,
    )
    return by_dump, straight


def traffic_lines(traffic: Sequence[Traffic], text_bytes: int, keep: str) -> list[str]:
    """For a person: one line a mode, per GB of text too; `keep`: the mode that is configured."""
    lines = []
    for one in traffic:
        per_gb = one.requests / max(text_bytes / 1e9, 1e-12)
        configured = " (as configured)" if one.keep == keep else ""
        lines.append(
            f'store, teacher.keep = "{one.keep}"{configured}: {human_bytes(one.peak_bytes.value)} at the peak, '
            f"{human_bytes(one.network_bytes.value)} over the network, {one.requests:,.0f} requests "
            f"({one.peak_bytes.value / text_bytes:.1f} and {one.network_bytes.value / text_bytes:.1f} bytes per byte "
            f"of text, {per_gb:,.0f} requests per GB)"
        )
    return lines
