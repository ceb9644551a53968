"""Leaving before the machine does: SIGTERM and cloud notices, and what a worker does with the time that is left.

After a request to stop, no unit is claimed. The one in flight goes on if it is expected to finish inside
`fleet.notice_s` (by its own progress so far, else by the mean of the worker's units) and is given back at once if not,
so that another worker can start it before this machine is gone. The engine is asked at its next poll and never killed
in the middle of a write; only where it does not answer by the deadline, the claim is given back and the process ends,
which is as safe as kill -9 (`pipeline.units.runner`).

Notices, all off by default (settings [fleet]):
- `notice_file`: a file that appears, for termination handlers that write one;
- `notice_url`: polled every `notice_poll_s`; status 200 and a body that contains `notice_match` is a notice:
    AWS    notice_url = "http://169.254.169.254/latest/meta-data/spot/instance-action"
           notice_token_url = "http://169.254.169.254/latest/api/token"        notice_s = 110
    GCP    notice_url = "http://metadata.google.internal/computeMetadata/v1/instance/preempted"
           notice_header = "Metadata-Flavor: Google"   notice_match = "TRUE"   notice_s = 25
    Azure  notice_url = "http://169.254.169.254/metadata/scheduledevents?api-version=2020-07-01"
           notice_header = "Metadata: true"   notice_match = "Preempt"         notice_s = 25

Why no checkpoint inside a unit: a preemption wastes half a unit and one start of the engine. With units of 3 minutes
and a start of 90 s, one preemption an hour costs 2.5 % for the half units and 2.5 % for the starts; groups of
documents kept in between could only win part of the first, and cost a second kind of object with its own identity,
hashes and merging. Smaller units win the same (`corpus.unit_bytes`). Measured: `benchmarks/torture.py`, and
`benchmarks/queue_simulation.py` over rates of preemption.
"""

import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from bytecache.schemas.errors import ConfigError
from bytecache.schemas.secrets import SecretAddress
from bytecache.schemas.settings import Fleet
from bytecache.schemas.web import staying_opener

MARGIN_S = 2.0
"""Kept for giving back the claim before the kill, where the notice is long enough."""
_TIMEOUT_S = 2.0
_OPENER = staying_opener()


class Drain:
    """Knows whether to stop, and until when. `stop`: set by SIGTERM; `clock`: seconds, monotonic."""

    def __init__(self, settings: Fleet, stop: Callable[[], bool], clock: Callable[[], float] = time.monotonic) -> None:
        self.settings, self._stop, self._clock = settings, stop, clock
        self.reason = ""
        self.deadline: float | None = None
        self._polled = -float("inf")
        self._began = 0.0
        self._measure = 0
        self._done = 0.0
        self._mean: float | None = None
        self._n = 0
        self._header = notice_header(settings)
        try:
            self._match = re.compile(settings.notice_match)
        except re.error as error:
            raise ConfigError(
                f"fleet.notice_match = {settings.notice_match!r}: {error}; write a regular expression"
            ) from None

    # ---- the request

    def requested(self) -> bool:
        """Whether to stop; looks at the signal's flag only, notices are found by `poll`."""
        if self.deadline is None and self._stop():
            self._set("signal")
        return self.deadline is not None

    def poll(self) -> None:
        """Look for a notice, if it is time to; called from the heartbeat's thread."""
        if self.requested() or self._clock() - self._polled < self.settings.notice_poll_s:
            return
        self._polled = self._clock()
        if self.settings.notice_file and Path(self.settings.notice_file).exists():
            self._set(f"{self.settings.notice_file} appeared")
        elif self.settings.notice_url and self._announced():
            self._set(f"{self.settings.notice_url} announced it")

    def _set(self, reason: str) -> None:
        self.reason = reason
        margin = min(MARGIN_S, self.settings.notice_s / 4)
        self.deadline = self._clock() + self.settings.notice_s - margin

    def _announced(self) -> bool:
        headers = dict([self._header]) if self._header else {}
        try:
            if self.settings.notice_token_url:
                ask = urllib.request.Request(
                    self.settings.notice_token_url.reveal(),
                    method="PUT",
                    headers={"X-aws-ec2-metadata-token-ttl-seconds": "60"},
                )
                with _OPENER.open(ask, timeout=_TIMEOUT_S) as answer:
                    headers["X-aws-ec2-metadata-token"] = answer.read(4096).decode("ascii", "replace")
            ask = urllib.request.Request(self.settings.notice_url.reveal(), headers=headers)
            with _OPENER.open(ask, timeout=_TIMEOUT_S) as answer:
                body = answer.read(65536).decode("utf-8", "replace")
        except (OSError, urllib.error.URLError, ValueError):
            return False  # no notice (404), or no metadata service: not our machine's way
        return self._match.search(body) is not None

    # ---- the unit in flight

    def unit_begins(self, measure: int) -> None:
        """A unit of `measure` (bytes of text) is started."""
        self._began, self._measure, self._done = self._clock(), measure, 0.0

    def tick(self, done: float) -> None:
        """`done` more of it."""
        self._done += done

    def unit_ends(self) -> None:
        """It was finished; its duration counts for those to come."""
        seconds = self._clock() - self._began
        self._n += 1
        self._mean = seconds if self._mean is None else self._mean + (seconds - self._mean) / self._n

    def remaining_s(self) -> float | None:
        """Seconds that the unit in flight still needs; None: nothing to tell by."""
        elapsed = self._clock() - self._began
        if self._done > 0:
            return elapsed * max(self._measure - self._done, 0.0) / self._done
        return None if self._mean is None else max(self._mean - elapsed, 0.0)

    def abandon(self) -> bool:
        """Passed to the work as `stop`: whether the unit in flight is to be given back."""
        if not self.requested() or self.deadline is None:
            return False
        left = self.deadline - self._clock()
        remaining = self.remaining_s()
        return left <= 0 or (remaining is not None and remaining > left)


def notice_header(settings: Fleet) -> tuple[str, str] | None:
    """The header of notice_url, or None. Raises ConfigError for one that is none, or an address that is no http."""
    for name in ("notice_url", "notice_token_url"):
        url: SecretAddress = getattr(settings, name)
        if url and not url.reveal().startswith(("http://", "https://")):
            raise ConfigError(
                f"fleet.{name} = {url!r} is no http:// or https:// address; for a file use fleet.notice_file"
            )
    if not settings.notice_header:
        return None
    header = settings.notice_header.reveal()
    name, colon, value = header.partition(":")
    if not colon or not name.strip() or "\n" in header:
        raise ConfigError("fleet.notice_header: write `Name: value`")
    return name.strip(), value.strip()
