"""A teacher's own noise: how far a half-precision or quantised teacher is from its weights in float32.

The certificate says what conversion loses of what the teacher said. What the teacher lost before is another figure: KL
from the same stretch of text as the float32 model sees it, at the effort of a reference, so that neither presets nor
storing are in it. The float32 model runs on transformers. For quantised weights name the ones that they were made of.
A `teacher.adapter` is merged into either model, so the weights to name are those without it.

Price: a second model in memory, in float32, and the reference's stretch of every unit once more.
"""

from typing import Any

import numpy as np

from bytecache.schemas.errors import ConfigError
from bytecache.schemas.identity import TeacherIdentity
from bytecache.stages.fidelity.measure import Measure


class Noise:
    """KL of the float32 model's rows from the teacher's, per position; mergeable."""

    def __init__(self, states: Any = ()) -> None:
        self.kl = Measure()
        self.positions = self.windows = 0
        self.squared_positions = 0.0
        self.against: dict[str, Any] = {}
        for state in states:
            if state is not None:
                self.merge(state)

    def add(self, values: np.ndarray) -> None:
        """Count in one stretch, as `stages.fidelity.measuring.noise_between` measures it; nats, float64 [m]."""
        self.kl.add(values)
        self.positions += len(values)
        self.windows += 1
        self.squared_positions += float(len(values)) ** 2

    def state(self) -> dict[str, Any]:
        """JSON for `merge`."""
        return {
            "kl": self.kl.state(), "positions": self.positions, "windows": self.windows,
            "squared_positions": self.squared_positions, "against": self.against,
        }  # fmt: skip

    def merge(self, state: dict[str, Any]) -> None:
        """Add what another one measured. Raises ConfigError where that was against another model."""
        if self.against and state["against"] != self.against:
            raise ConfigError(
                "the teacher's noise was measured against different models of one name (teacher.noise); give the "
                "folder of the right one another name and run `bytecache teacher` again"
            )
        self.kl.merge(state["kl"])
        self.positions += state["positions"]
        self.windows += state["windows"]
        self.squared_positions += state["squared_positions"]
        self.against = state["against"]

    def summary(self) -> dict[str, Any] | None:
        """For the certificate: `kl` in nats per position, and against what; None if nothing was measured."""
        if not self.positions:
            return None
        kl = self.kl.summary(self.positions, self.windows, self.squared_positions)
        return {"kl": kl, "positions": self.positions, "against": self.against}


def described(identity: dict[str, Any]) -> dict[str, Any]:
    """What a certificate says of the float32 model."""
    exact = TeacherIdentity.of(identity, "teacher.noise")
    merged = {"adapter": identity["adapter"]} if identity.get("adapter") else {}
    return {"model": exact.model, **merged, "dtype": exact.dtype, "teacher_sha256": exact.sha256}
