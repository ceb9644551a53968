"""A real `vllm serve` on loopback: a process group that is started, killed as machines die, and started again."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from tests.support.places import ROOT

EXTENSION = "bytecache.stages.engines.vllm_serve"
PATIENCE = 400.0
"""Seconds for a start: three libraries are loaded twice, on a machine that may be busy."""


class VllmServer:
    """Serves `folder` as `name`; `exact`: with our extension. A context, which leaves no process behind.

    `python -m vllm...` and not `vllm serve`, which refuses the name of the wheel for CPUs.
    """

    def __init__(self, folder: Path, log: Path, *, name: str = "tiny", exact: bool = True, key: str = "") -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.url, self.api = f"http://127.0.0.1:{self.port}", f"http://127.0.0.1:{self.port}/v1"
        self.log = log
        ours = ["--worker-extension-cls", f"{EXTENSION}.ServedPaths", "--middleware", f"{EXTENSION}.Paths"]
        self._command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder),
            "--served-model-name", name, "--host", "127.0.0.1", "--port", str(self.port), "--enforce-eager",
            "--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "16", "--max-logprobs", "400",
            "--block-size", "32", "--distributed-executor-backend", "uni", *(ours if exact else []),
            *(["--api-key", key] if key else []),
        ]  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Begin; `wait` says when it answers."""
        assert self._process is None, "it runs already"
        # A worker of its own would load the libraries a third time.
        here = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, env={**os.environ, **here}, stdout=log, stderr=log, start_new_session=True, cwd="/"
            )

    def wait(self) -> None:
        """Until it answers. Raises AssertionError, with its log, where it ends instead."""
        assert self._process is not None
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until and self._process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return
            except (OSError, urllib.error.URLError):
                time.sleep(0.2)
        raise AssertionError(self.log.read_text(errors="replace")[-3000:])

    def kill(self) -> None:
        """SIGKILL to all of its processes, as a machine that is taken away."""
        if self._process is None:
            return
        group = self._process.pid
        os.killpg(group, signal.SIGKILL)
        self._process.wait()
        until = time.monotonic() + 30
        while time.monotonic() < until and self.is_there(group):
            time.sleep(0.02)
        assert not self.is_there(group), "processes of the server outlived it"
        self._process = None

    @staticmethod
    def is_there(group: int) -> bool:
        """Whether any process of a group runs, corpses that nobody fetches aside."""
        for status in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = status.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[2]) == group and fields[0] != "Z":
                return True
        return False

    def __enter__(self) -> "VllmServer":
        self.start()
        self.wait()
        return self

    def __exit__(self, *reason: object) -> None:
        self.kill()
