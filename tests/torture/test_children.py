"""Children of the torture leave their reason, have locks of their own, and cannot make anybody wait for ever."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.places import ROOT
from tests.torture.children import ENVIRONMENT

SCRIPT = """
import json, os, signal, sys, threading, time
from pathlib import Path
from tqdm import tqdm
from tests.torture import children
from bytecache.schemas.errors import ConfigError, IntegrityError

logs, found = Path(sys.argv[1]), {}

def reason(function, seconds=30.0):
    try:
        return children.answer(function, "it", logs / "it.txt", seconds)
    except IntegrityError as error:
        return str(error)
    finally:
        (logs / "it.txt").unlink(missing_ok=True)

def stuck_here():
    time.sleep(60)

def refuse():
    raise ConfigError("no such key")

found["answer"] = reason(lambda: {"made": 3})
found["hang"] = reason(stuck_here, 0.3)
found["error"] = reason(lambda: 1 / 0)
found["refusal"] = reason(refuse)
found["crash"] = reason(lambda: os.kill(os.getpid(), signal.SIGSEGV))

def hold():
    tqdm.get_lock().acquire()
    (logs / "held").touch()
    time.sleep(60)

tqdm.get_lock()  # a semaphore that forks would share
child = children.start(hold, "holder", logs / "holder.txt")
while not (logs / "held").exists():
    time.sleep(0.01)
child.give_up()
found["after a holder was killed"] = reason(lambda: len(list(tqdm(range(3)))))
thread = threading.Thread(target=time.sleep, args=(5,), name="the other one", daemon=True)
thread.start()
found["thread"] = reason(lambda: None)
print(json.dumps(found), flush=True)
os._exit(0)
"""


@pytest.mark.slow
def test_children_answer_or_say_why_not(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        cwd=ROOT, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert found["answer"] == {"made": 3}
    assert "not done after 0 s" in found["hang"] and "in stuck_here" in found["hang"]
    assert "code 99" in found["error"] and "ZeroDivisionError" in found["error"]
    assert "code 2" in found["refusal"] and "no such key" in found["refusal"]
    assert "code -11" in found["crash"] and "Segmentation fault" in found["crash"]
    assert found["after a holder was killed"] == 3
    assert "the other one" in found["thread"]
