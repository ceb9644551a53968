"""The effort that a conversion asks for: more than the capture's cannot be had from its dump and is refused."""

from typing import Any, NamedTuple

from bytecache.schemas import settings as st
from bytecache.schemas.errors import ConfigError


class Effort(NamedTuple):
    """What `stages.teacher.teacher` evaluates; the meaning of each is that of its setting."""

    tau: float
    depth: int
    static: float


def coarser_effort(settings: st.Convert, captured: dict[str, Any]) -> Effort | None:
    """The effort that a conversion asks for, None where it asks for none or for the capture's own.

    `captured`: tau, depth and static of the teacher's identity. Raises ConfigError for more effort than the capture's.
    """
    asked = Effort(settings.tau, settings.depth, settings.static)  # -1: the capture's own
    if max(asked) < 0:
        return None
    try:
        own = Effort(float(captured["tau"]), int(captured["depth"]), float(captured["static"]))
    except (KeyError, TypeError, ValueError):
        raise ConfigError(
            "convert.tau, convert.depth and convert.static ask for less effort than the capture's, and the dump does "
            "not say what that was; leave them at -1, or run `bytecache teacher` again"
        ) from None
    asked = Effort(
        own.tau if asked.tau < 0 else asked.tau,
        own.depth if asked.depth < 0 else asked.depth,
        own.static if asked.static < 0 else asked.static,
    )
    too_much = {
        "tau": asked.tau < own.tau,
        "depth": asked.depth > own.depth,
        "static": asked.static > 0 and not 0 < own.static <= asked.static,
    }
    for name, refused in too_much.items():
        if refused:
            limit = f"at most {own.depth}" if name == "depth" else f"at least {getattr(own, name):g}"
            if name == "static":
                limit = "0, since the dump has no static rows" if not own.static else f"0 or {limit}"
            raise ConfigError(
                f"convert.{name} = {getattr(asked, name):g} asks for histories that the dump does not hold: it was "
                f"captured with teacher.{name} = {getattr(own, name):g}, so convert.{name} must be {limit}; "
                f"raise the effort of the teacher and run `bytecache teacher`, or leave convert.{name} at -1"
            )
    return None if asked == own else asked
