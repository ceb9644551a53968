"""The log of a run: `metrics.jsonl` always, TensorBoard events by default, wandb where asked for.

Lines of steps that a resume repeats are dropped first, so the file always is one line per step, in order.
"""

import json
from pathlib import Path
from typing import Any

from bytecache.schemas import settings as st
from bytecache.schemas import strict_json
from bytecache.schemas.errors import ConfigError
from bytecache.schemas.files import put_in_place, scratch_folder

UNPLOTTED = ("name", "step", "steps")


class Metrics:
    """Where every step's record goes; use `close()`.

    Args:
        folder: of the run. resume_step: steps already done. settings: the `[train]` section. name: of the run.

    Raises:
        ConfigError: `train.wandb` names a project and wandb is not installed.
    """

    def __init__(self, folder: Path, resume_step: int, settings: st.Train, name: str) -> None:
        self.wandb = _wandb(folder, settings, name) if settings.wandb else None
        path = folder / "metrics.jsonl"
        lines = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
            try:
                if strict_json.loads(line)["step"] <= resume_step:
                    lines.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue  # the line a kill cut short, or a damaged one
        with scratch_folder(path.parent) as scratch:
            (scratch / path.name).write_text("".join(lines))
            put_in_place(scratch / path.name, path)
        self.file = path.open("a", buffering=1)
        self.board: Any = None
        if settings.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)

    def write(self, record: dict[str, Any]) -> None:
        """One step's record."""
        self.file.write(json.dumps(record) + "\n")
        plotted = {k: v for k, v in record.items() if k not in UNPLOTTED and isinstance(v, int | float)}
        if self.board is not None:
            for key, value in plotted.items():
                self.board.add_scalar(f"train/{key}", value, record["step"])
        if self.wandb is not None:
            self.wandb.log(plotted, step=record["step"])

    def close(self) -> None:
        """Flush everything."""
        self.file.close()
        if self.board is not None:
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish()


def _wandb(folder: Path, settings: st.Train, name: str) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            f"train.wandb = {settings.wandb!r} needs the package wandb; pip install wandb, or leave it empty"
        ) from error
    return wandb.init(
        project=settings.wandb, name=folder.name, group=name, id=folder.name, resume="allow", dir=str(folder),
        config=settings.model_dump(),
    )  # fmt: skip
