"""Two processes that answer jobs: starting, asking and ending them."""

import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from shiq_lab.checks.distributed.scenario import RANKS, Scenario
from shiq_lab.checks.runner import SubjectError
from shiq_lab.errors import bad, is_real

GRACE = 0.3  # seconds that a second failure may come after the first
START_LIMIT = 120.0  # seconds for a process to import torch on a busy machine


class Processes:
    """Two processes that answer jobs: started on the first, kept for the next, killed when one of them hangs or dies.

    Use as a context manager, or call close(); they also end with this process, and when this object is collected. Starting
    costs two imports of torch, so let several checks share one.
    """

    def __init__(self, *, time_limit: float = 60.0) -> None:
        if not is_real(time_limit) or not 0 < time_limit < math.inf:
            raise bad("time_limit", "a finite number of seconds > 0", repr(time_limit))
        self.time_limit = float(time_limit)
        self.starts = 0  # how often processes had to be started
        self._silent = 0  # ranks that still owe an answer
        self._stop: Callable[[], Any] | None = None

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End both; a later job starts new ones."""
        if self._stop is not None:
            self._stop()
            self._stop = None

    def run(self, payload: bytes, scenario: Scenario, *, size: int = RANKS) -> list[dict[str, Any]]:
        """The answers of ranks 0 to size - 1; SubjectError where one raises, dies, or does not answer in time."""
        if self._stop is None:
            self._start()
        self._jobs += 1
        store = os.path.join(self._folder, f"store{self._jobs}")
        for connection in self._connections[:size]:
            connection.send((payload, scenario, store, size, self.time_limit))
        self._silent = size
        try:
            return self._collect(size, self.time_limit)
        finally:
            if self._silent:
                self.close()  # a rank that has not answered may wait in a collective for ever

    def _collect(self, size: int, limit: float) -> list[Any]:
        waiting: dict[Any, int] = {connection: rank for rank, connection in enumerate(self._connections[:size])}
        answers: dict[int, Any] = {}
        failures: list[tuple[float, str]] = []  # when, what
        end = time.monotonic() + limit
        while waiting:
            ready = wait(list(waiting), timeout=max(end - time.monotonic(), 0.0))
            if not ready and not failures:
                silent = " and ".join(str(rank) for rank in waiting.values())
                text = f"no answer from rank {silent} of {size} after {limit:g} s: a collective that not every rank calls?"
                raise SubjectError(text)
            for connection in ready:
                rank = waiting.pop(connection)
                try:
                    word, answers[rank] = connection.recv()  # type: ignore[union-attr, call-arg]
                except (EOFError, OSError):
                    raise SubjectError(f"rank {rank} of {size} died{self._last_words(rank)}") from None
                self._silent -= 1
                if word == "raised":
                    failures.append((answers[rank][0], f"rank {rank} of {size} raised {answers[rank][1]}"))
                    end = time.monotonic() + GRACE  # what the others say of a lost partner comes later and is not the cause
            if failures and not ready:
                break
        if failures:
            raise SubjectError(min(failures)[1])
        return [answers[rank] for rank in range(size)]

    def _last_words(self, rank: int) -> str:
        self._children[rank].wait(timeout=10)
        text = Path(self._folder, f"stderr{rank}").read_text(errors="replace").strip().splitlines()
        return f" with exit code {self._children[rank].returncode}" + (f": {text[-1][:300]}" if text else "")

    def _start(self) -> None:
        self.starts += 1
        self._jobs = 0
        self._folder = tempfile.mkdtemp(prefix="shiq_lab_")
        self._children: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []
        self._stop = weakref.finalize(self, _end, self._children, self._connections, self._folder)
        code = (
            "import sys; from shiq_lab.checks.distributed.worker import worker; worker(*map(int, sys.argv[1:3]), sys.argv[3])"
        )
        for rank in range(RANKS):
            here, there = Pipe()
            with open(os.path.join(self._folder, f"stderr{rank}"), "wb") as log:
                child = subprocess.Popen(
                    [sys.executable, "-c", code, str(rank), str(there.fileno()), self._folder],
                    pass_fds=[there.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=log,
                    env=_environment(),
                    start_new_session=True,
                )
            there.close()
            self._children.append(child)
            self._connections.append(here)
        self._collect(RANKS, START_LIMIT)


def _environment() -> dict[str, str]:
    """This process's, with its import path; loopback alone, and none of a launcher's settings."""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
    env["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    return {**env, "GLOO_SOCKET_IFNAME": loopback[0]} if loopback else env


def _end(children: list[subprocess.Popen[bytes]], connections: list[Connection], folder: str) -> None:
    """Kill what is there, with whatever it started; leave no folder."""
    for connection in connections:
        connection.close()
    for child in children:
        try:
            os.killpg(child.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        child.wait()
    shutil.rmtree(folder, ignore_errors=True)
