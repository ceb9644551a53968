"""The process as its user meets it: closed pipes and streams, a Ctrl-C at any moment, strange names, faults of ours."""

import logging
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from bytecache.pipeline import cli
from bytecache.pipeline.cli import terminal
from tests.support.places import ROOT


def start(*arguments: str | bytes, folder: Path, **more: object) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "BYTECACHE_CACHE": str(folder / "cache")}
    return subprocess.Popen([sys.executable, "-m", "bytecache", *arguments], cwd=folder, env=environment, **more)  # type: ignore[call-overload, no-any-return]


def run(*arguments: str | bytes, folder: Path, **more: object) -> tuple[int, str, str]:
    child = start(*arguments, folder=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)
    out, err = child.communicate(timeout=120)
    return child.returncode, out.decode(), err.decode()


def shell(line: str, folder: Path) -> tuple[str, str]:
    """What a line of bash says on stdout and stderr, `bytecache` being this one."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "BYTECACHE_CACHE": str(folder / "cache")}
    text = f'bytecache() {{ "{sys.executable}" -m bytecache "$@"; }}\n{line}'
    done = subprocess.run(["bash", "-c", text], cwd=folder, env=environment, capture_output=True, timeout=120)
    return done.stdout.decode(), done.stderr.decode()


# ---- streams


@pytest.mark.parametrize(("line", "code"), [
    ("bytecache config --defaults >&-; echo $?", "0"),
    ("bytecache config 2>&- >/dev/null; echo $?", "0"),
    ("bytecache config <&- >/dev/null; echo $?", "0"),
    ("bytecache status --run-dir none/such <&- 2>&- >&-; echo $?", "0"),
    ("bytecache config > /dev/full; echo $?", "6"),
])  # fmt: skip
def test_closed_and_full_streams(line: str, code: str, tmp_path: Path) -> None:
    out, err = shell(line, tmp_path)
    assert out.splitlines()[-1] == code, (out[-300:], err)
    assert "Traceback" not in err and len(err.splitlines()) <= 1, err


def test_a_reader_that_leaves(tmp_path: Path) -> None:
    out, err = shell("bytecache config | head -1", tmp_path)
    assert len(out.splitlines()) == 1 and err == ""
    reading, writing = os.pipe()
    os.close(reading)
    child = start("config", folder=tmp_path, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert child.communicate(timeout=60)[1] == b"" and child.returncode == 141


def test_a_closed_stdout_is_not_the_next_file_that_is_opened(tmp_path: Path) -> None:
    """Descriptor 1 would be the corpus or a shard, and what a library prints would be written into it."""
    (tmp_path / "corpus.jsonl").write_text('{"text": "one"}\n{"text": "two and more"}\n' * 40)
    plan = "bytecache plan --source corpus.jsonl --run-dir run"
    _, err = shell(f"{plan} >&- 2>&-; {plan} >/dev/null; bytecache verify run >/dev/null", tmp_path)
    assert err == ""


# ---- signals


@pytest.mark.parametrize("wait", [0.0, 0.02, 0.05, 0.1, 0.2, 0.4])
def test_ctrl_c_while_it_is_loading(wait: float, tmp_path: Path) -> None:
    """Python itself needs some time before any code of ours runs; what it prints then is its own."""
    child = start("config", folder=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while (
        b"bytecache" not in Path(f"/proc/{child.pid}/maps").read_bytes()
        and child.poll() is None
        and not _running(child.pid)
    ):
        time.sleep(0.001)
    time.sleep(wait)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode in (-signal.SIGINT, 130, 0)
    assert b"Traceback" not in err and len(err.splitlines()) <= 1, err


def _running(pid: int) -> bool:
    """Whether the interpreter has come to our code: it ends at SIGINT from then on (bit 1 of SigCgt is off)."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True
    caught = re.search(r"SigCgt:\s*([0-9a-f]+)", status)
    started = re.search(r"VmRSS:\s*(\d+)", status)
    return bool(caught and started and not int(caught[1], 16) & 2 and int(started[1]) > 9000)


def test_a_ctrl_c_that_the_starter_ignores_stays_ignored(tmp_path: Path) -> None:
    out, _ = shell(
        "trap '' INT; bytecache config & child=$!; sleep 0.2; kill -INT $child; wait $child; echo $?", tmp_path
    )
    assert out.splitlines()[-1] == "0"


# ---- names


@pytest.mark.slow
def test_names_that_are_not_utf_8_or_command_the_terminal(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path)
    (tmp_path / "a").mkdir()
    for name in (b"\xff\xfe.parquet", b"\x1b[2Jx.parquet", b"\xff.zarr.zip"):
        Path(os.fsdecode(folder + b"/" + name)).write_bytes(b"no such thing")
        code, out, err = run(b"inspect", name, folder=tmp_path)
        assert code in (3, 4) and len(err.splitlines()) == 1 and err.startswith("error: "), err
        assert "\x1b" not in err + out
    for arguments in ((b"status", b"--run-dir", b"\xff\xfe"), (b"verify", b"\xff\xfe"), (b"verify", b"\x1b[2J")):
        code, out, err = run(*arguments, folder=tmp_path)
        assert code in (2, 3) and len(err.splitlines()) == 1 and err.startswith("error: "), err
    code, _, err = run("status", "--set", 'run.dir="a\\u0000b"', folder=tmp_path)
    assert code == 2 and "NUL" in err and len(err.splitlines()) == 1


def test_a_page_into_a_folder_that_is_not_there(tmp_path: Path) -> None:
    shard = ROOT / "tests" / "schemas" / "data" / "golden-shard.zarr.zip"
    code, _, err = run("inspect", str(shard), "--html", "none/such/page.html", folder=tmp_path)
    assert code == 6 and len(err.splitlines()) == 1 and "none/such/page.html" in err


@pytest.mark.slow
def test_secrets_in_arguments_are_not_repeated(tmp_path: Path) -> None:
    place = "https://me:hunter22@127.0.0.1:9/d?token=t0ken-value"
    for arguments in (
        ("verify", place),
        ("train", "--set", f"dataset.source={place}", "--set", "run.dir=run"),
        ("run", "--set", f"dataset.source={place}"),
        ("status", "--run-dir", place),
        ("status", "--set", f"dataset.sorce={place}"),
        ("teacher", "--worker", "--set", "fleet.notice_header=hunter22 t0ken-value"),
        ("inspect", place),
        ("merge", place),
    ):
        code, out, err = run(*arguments, folder=tmp_path)
        assert code not in (0, 1) or arguments[0] == "inspect", (arguments, err)
        assert "hunter22" not in out + err and "t0ken" not in out + err, (arguments, err)
        assert len(err.splitlines()) == 1, err


# ---- faults of ours


def crash(error: BaseException) -> int:
    def command() -> None:
        raise error

    return cli._status(command)


def test_a_fault_is_one_line_with_a_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BYTECACHE_CACHE", str(tmp_path))
    error = KeyError("no\nsuch \x1b[2J https://me:hunter22@host/x")
    assert crash(error) == 1
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and said.startswith("error: KeyError: ") and "\x1b" not in said
    (log,) = (tmp_path / "logs").iterdir()
    assert str(log) in said and "report it" in said
    text = log.read_text()
    assert "Traceback" in text and "in command" in text
    assert "hunter22" not in text + said


def test_a_build_for_another_machine_is_no_fault_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BYTECACHE_CACHE", str(tmp_path))
    missing = "cannot open shared object file: No such file or directory"
    assert crash(ImportError(f"libcudnn.so.9: {missing}")) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: libcudnn.so.9 is not on this machine") and "CPU build of torch" in said
    crash(ImportError(f"libmine.so: {missing}"))
    assert "a fault of bytecache" in capsys.readouterr().err


def test_a_log_that_cannot_be_written_costs_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BYTECACHE_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(terminal.tempfile, "gettempdir", lambda: str(tmp_path / "file"))
    assert crash(ValueError("x")) == 1
    assert "could not be written anywhere" in capsys.readouterr().err


def test_old_logs_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BYTECACHE_CACHE", str(tmp_path))
    (tmp_path / "logs").mkdir()
    for number in range(terminal.KEPT_LOGS + 5):
        (tmp_path / "logs" / f"2000-{number:03d}.log").write_text("")
    crash(ValueError("new"))
    kept = sorted(path.name for path in (tmp_path / "logs").iterdir())
    assert len(kept) == terminal.KEPT_LOGS and not kept[-1].startswith("2000")


@pytest.mark.parametrize(("error", "code", "lines"), [
    (KeyboardInterrupt(), 130, 1), (MemoryError(), 1, 1), (BrokenPipeError(), 141, 0), (SystemExit(7), 7, 0),
    (SystemExit("x"), 1, 0), (RecursionError("deep"), 1, 1),
])  # fmt: skip
def test_every_way_to_end(
    error: BaseException, code: int, lines: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("BYTECACHE_CACHE", str(tmp_path))
    assert crash(error) == code
    assert len(capsys.readouterr().err.splitlines()) == lines


def test_what_a_library_logs_has_no_control_either(capfd: pytest.CaptureFixture[str]) -> None:
    """transformers repeats the names of a stranger's weights."""
    factory, form = logging.getLogRecordFactory(), warnings.formatwarning
    other = logging.getLogger("somebody.else")
    handler = logging.StreamHandler()
    other.addHandler(handler)
    try:
        terminal.show_warnings()
        other.warning("\x1b[1mREPORT\x1b[0m of %s, https://me:hunter22@host/x", "\x1b]0;evil\x07\u202e")
        other.warning("MISSING | %s | %r", "a.weight\nerror: run this\r\nerror: or this\x0berror: or that", "b\n")
        said_of_a_token = "\x1b[2Jof\nerror: a token\u2028error: of it"
        sys.stderr.write(warnings.formatwarning(said_of_a_token, UserWarning, "file.py", 7))
        try:
            raise ValueError("\x1b[2J\nerror: what a library says")
        except ValueError:
            other.exception("failed")
    finally:
        other.removeHandler(handler)
        logging.setLogRecordFactory(factory)
        warnings.formatwarning = form
    said = capfd.readouterr().err
    assert "\x1b" not in said and "\u202e" not in said and "hunter22" not in said
    assert "REPORT of \\x1b]0;evil\\x07" in said
    # Lines as any reader of a log has them, also those that take more than \n for an end.
    lines = said.splitlines()
    assert not [line for line in lines if line.startswith(("error", "warning: "))]
    assert sum(line.startswith("  | error: ") for line in lines) == 4
    assert "UserWarning: \\x1b[2Jof" in said and "ValueError: \\x1b[2J" in said
