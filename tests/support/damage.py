"""One damaged file in a finished run: is it found, is it named, does following the commands lead out?

Damages: a flipped bit, a file cut short, a missing one, one that has changed places with its neighbour; and a folder or
a named pipe in its place. For each the harness asks `verify`, then the command that reads the file, and follows what it
is told: first `verify --repair` and the commands that it leaves, then (in another copy) the commands that the reading
stage names. Whoever follows must end with a whole run of the same outputs, without being sent in a circle.
"""

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bytecache.pipeline.config_text import render_template
from tests.support.command_line import bytecache
from tests.support.run_outputs import outputs
from tests.support.small_run import small_settings

DAMAGES = ("flipped", "truncated", "missing", "swapped")
STRANGERS = ("folder", "pipe")
"""What stands in a file's place and is none; damages too, where they are asked for."""
_PATIENCE = 6
"""Commands that a user is sent to before the harness calls it a circle."""
_READERS = (
    (r"(plan|receipts/plan)/.*", "plan"),
    (r"teacher/start/.*", "teacher"),
    (r"(teacher|receipts/teacher|receipts/convert)/.*", "convert"),
    (r"targets/(README\.md|config\.toml|heldout-.*)", "convert"),
    (r"targets/.*", "train --set train.learning_rate=0.001 --only distilled"),
    (r"(train|receipts/(train|student))/.*", "train"),
    (r"(report|receipts/evaluate)/.*", "evaluate"),
    (r"(export|receipts/export)/.*", "export"),
)
_UNREAD = re.compile(
    r"config\.toml|.*/config\.toml|export/[^/]+\.config\.toml|report/summary\.md|receipts/document/.*"
    r"|train/(distilled|control)-[^/]+/(metrics\.jsonl|tensorboard/.*|step-0*2\.(json|safetensors))"
)
"""What no stage of a finished run reads: `verify` alone looks at it."""
LOGS = re.compile(r"train/[^/]+/(metrics\.jsonl|tensorboard/.*|step-0*2\.(json|safetensors))")
"""What only a new training run could make again: forgotten, not repaired."""


@dataclass
class Verdict:
    """What became of one damage; `ends`: how the run came to be whole again, or why it did not."""

    key: str
    damage: str
    found: bool
    named: str
    ends: str
    direct: str

    @property
    def good(self) -> bool:
        return self.found and self.named != "no" and not self.ends.startswith("!") and not self.direct.startswith("!")


def files(run: Path) -> list[str]:
    """Keys of every file of a run, sorted."""
    return sorted(path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file())


def kind(key: str) -> str:
    """The kind of a file: its key without what tells it from its siblings."""
    key = re.sub(r"\b(train|heldout)-\d{5}-[0-9a-f]{12}", "SHARD", key)
    key = re.sub(r"\d{5}-(train|heldout)-[0-9a-f]{12}|(?<=slices/)(train|heldout)-[0-9a-f]+", "UNIT", key)
    key = re.sub(r"[0-9a-f]{64}", "KEY", key)
    key = re.sub(r"\d{5}-[0-9a-f]{12}\.json", "PAGE.json", key)
    key = re.sub(r"(distilled|control)-[0-9a-f]{12}", "RUN", key)
    key = re.sub(r"-[0-9a-f]{12}", "", key)
    key = re.sub(r"start/[0-9a-f]{12}", "start/RECORD", key)
    return re.sub(r"events\.out.*", "EVENTS", key)


def neighbour(keys: list[str], key: str) -> str:
    """The next file of the same folder, else the next of all."""
    folder = [other for other in keys if other.rpartition("/")[0] == key.rpartition("/")[0]]
    ring = folder if len(folder) > 1 else keys
    return ring[(ring.index(key) + 1) % len(ring)]


def inflict(run: Path, key: str, damage: str) -> bool:
    """Damage one file; False where that changes nothing (two files of one content)."""
    victim = run / key
    raw = victim.read_bytes()
    if damage == "flipped":
        at = len(raw) // 2
        victim.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
    elif damage == "truncated":
        victim.write_bytes(raw[: len(raw) // 2])
    elif damage == "missing":
        victim.unlink()
    elif damage == "folder":
        victim.unlink()
        victim.mkdir()
        (victim / "something").write_text("of somebody's own")
    elif damage == "pipe":
        victim.unlink()
        os.mkfifo(victim)
    else:
        other = run / neighbour(files(run), key)
        if other.read_bytes() == raw:
            return False
        victim.write_bytes(other.read_bytes())
        other.write_bytes(raw)
    return True


def reader(key: str) -> str:
    """The command whose work reads a file; "" where none does once the run is finished."""
    if _UNREAD.fullmatch(key):
        return ""
    return next((command for pattern, command in _READERS if re.fullmatch(pattern, key)), "")


def commands_in(text: str) -> list[str]:
    """Commands in backticks, without the program's name, in the order of the text."""
    return [command.split("bytecache ", 1)[1] for command in re.findall(r"`(bytecache [^`]+)`", text)]


def call(command: str) -> tuple[int, str]:
    """Exit code and all output of a command."""
    result = bytecache(*command.split())
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return 99, f"{result.output}\ntraceback: {type(result.exception).__name__}: {result.exception}"
    return result.exit_code, result.output


def examine(finished: Path, work: Path, key: str, damage: str, *, follow: bool = True) -> Verdict | None:
    """Damage one file in copies of a finished run; None where the damage changes nothing.

    The current directory holds the configuration, whose run.dir is `work`. `follow` off: only ask `verify`.
    """
    before = {k: v for k, v in outputs(finished).items() if not LOGS.fullmatch(k)}
    _copy(finished, work)
    if not inflict(work, key, damage):
        return None
    code, text = call("verify")
    found = code == 4
    if not follow:
        return Verdict(key, damage, found, "-", "-", "-")
    ends = _repair(work, before)
    command = reader(key)
    if not command:
        return Verdict(key, damage, found, "-", ends, "-")
    _copy(finished, work)
    inflict(work, key, damage)
    _, text = call(command)
    told = [line for line in text.splitlines() if not line.startswith("{")]
    # A unit whose receipt is gone was never done: that it is made again is all that can be said.
    remade = damage == "missing" and key.startswith("receipts/") and re.search(r"\b(made?|make|measured)\b", text)
    named = (
        "yes"
        if remade or _names("\n".join(told), key) or _names("\n".join(told), neighbour(files(finished), key))
        else "no"
    )
    _copy(finished, work)
    inflict(work, key, damage)
    return Verdict(key, damage, found, named, ends, _obey(command))


def _copy(finished: Path, work: Path) -> None:
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(finished, work)


def _names(text: str, key: str) -> bool:
    """Whether words name a file: by its name, the beginning of its key, or its folder's."""
    parts = Path(key)
    names = [
        parts.name,
        parts.stem.partition(".")[0][:12],
        *(["plan"] if key.startswith(("plan/", "receipts/plan")) else []),
    ]
    names += [part for part in parts.parts[:-1] if "-" in part]
    return any(name and name in text for name in names)


def _repair(work: Path, before: dict[str, str]) -> str:
    """Follow `verify --repair` and what it leaves; says how that ended, "!" in front where badly."""
    code, text = call("verify --repair")
    left = [command for line in text.splitlines() if line.startswith("left:") for command in commands_in(line)]
    for command in left:
        status, said = call(command)
        if status:
            return f"! {command}: exit {status}: {said.strip().splitlines()[-1][:200]}"
    if code and not left:
        return f"! repair: exit {code}: {text.strip().splitlines()[-1][:200]}"
    status, said = call("verify")
    if status:
        return f"! still: {next(line for line in said.splitlines() if not line.startswith('error'))[:200]}"
    after = {k: v for k, v in outputs(work).items() if not LOGS.fullmatch(k)}
    other = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
    if other:
        return f"! other outputs: {', '.join(other[:3])}"
    return f"repaired, then {', '.join(left)}" if left else "repaired"


def _obey(command: str) -> str:
    """Run a command; where it refuses, what it says, and it again; "!" in front where that does not end."""
    trail = []
    for _ in range(_PATIENCE):
        code, text = call(command)
        if code == 0:
            return " > ".join([*trail, command.split()[0]])
        refusal = next((line for line in text.splitlines() if line.startswith("error: ")), text[-200:])
        told = commands_in(refusal)
        if not told:
            return f"! {command}: exit {code}, no command: {refusal[:200]}"
        trail.append(told[0])
        status, said = call(told[0])
        refusal = next((line for line in said.splitlines() if line.startswith("error: ")), "")
        if status and (further := commands_in(refusal)):
            trail.append(further[0])
            call(further[0])
        for line in text.splitlines():
            if line.startswith("left:"):
                trail += commands_in(line)
    return f"! circle: {' > '.join(trail)}"


def table(verdicts: list[Verdict]) -> str:
    """Kinds of files x damages as Markdown: found, named, whole again."""
    lines = [
        "| file | damage | cases | found | named | whole again | by the reader's word |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for group in sorted({(kind(v.key), (*DAMAGES, *STRANGERS).index(v.damage)) for v in verdicts}):
        name, damage = group[0], (*DAMAGES, *STRANGERS)[group[1]]
        cases = [v for v in verdicts if kind(v.key) == name and v.damage == damage]
        lines.append(
            f"| {name} | {damage} | {len(cases)} | {sum(v.found for v in cases)} | {_share(cases, 'named', 'no')} | "
            f"{_share(cases, 'ends', '!')} | {_share(cases, 'direct', '!')} |"
        )
    return "\n".join(lines) + "\n"


def _share(cases: list[Verdict], field: str, bad: str) -> str:
    asked = [getattr(v, field) for v in cases if getattr(v, field) != "-"]
    return f"{sum(not value.startswith(bad) for value in asked)} of {len(asked)}" if asked else "-"


def cases(keys: list[str], *, every: bool, damages: tuple[str, ...] = DAMAGES) -> Iterator[tuple[str, str, bool]]:
    """(file, damage, whether to follow): every file is looked for, one of each kind is followed unless `every`."""
    seen: set[str] = set()
    for key in keys:
        for damage in damages:
            yield key, damage, every or kind(key) not in seen
        seen.add(kind(key))


def make_finished_run(folder: Path) -> Path:
    """A corpus, a tiny teacher, `pipeline.toml` for `folder/run`, and the finished run of it as `folder/finished`."""
    settings = small_settings(folder, documents=60)
    changes = {
        "corpus": {"unit_bytes": 2500, "heldout_fraction": 0.3},
        "teacher": {"sample_tokens": 16},
        "convert": {"shard_bytes": 3000},
        "train": {"steps": 4, "control": True},
    }
    for section, values in changes.items():
        settings = settings.model_copy(update={section: getattr(settings, section).model_copy(update=values)})
    (folder / "pipeline.toml").write_text(render_template(settings))
    before = Path.cwd()
    os.chdir(folder)
    try:
        code, text = call("run")
    finally:
        os.chdir(before)
    assert code == 0, text
    (folder / "run").rename(folder / "finished")
    return folder / "finished"
