"""Ends what hangs in the user's code: an alarm for Python code, and a watcher for what never comes back to Python.

`time_limit` raises TimedOut out of a loop in Python, a sleep or anything that lets signals through. A long operation in C does
not: so the command line calls `guard`, which on Linux does the work in a forked child while the parent watches the clock, and
elsewhere watches from a thread. Then a deadlock, a crash (SIGSEGV), the kernel's out-of-memory killer and `os._exit` in the
user's code all end in one sentence and exit code 2.
"""

import functools
import mmap
import os
import signal
import struct
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

DEFAULT = 60.0  # seconds a call: torch.compile's first call takes tens of them
GRACE = 1.0  # seconds from the alarm, which unwinds properly, to the end of the process
IDLE = 10.0  # time limits without any sign of life between two calls (a backward pass, the suite's own arithmetic) ...
LEAST_IDLE = 120.0  # ... but never less than this many seconds
TICK = 0.02  # seconds between two looks of the watcher
FAILED_TO_RUN = 2  # the contract's exit code for a loss that could not be loaded or run
SIZE = 4096  # bytes of the board, a page


class TimedOut(BaseException):
    """The call took too long. No Exception, so that `except Exception` in the user's loop does not swallow it."""


class Board:
    """What the worker writes and the watcher reads, across a fork: a deadline, an exit code, and what is going on."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, SIZE)
        self.code = None
        self.expect(float("inf"), "")

    def expect(self, deadline: float, what: str) -> None:
        """Writes down what runs now and until when it may."""
        text = what.encode("utf-8", "replace")[: SIZE - 32]
        self.memory[16 : 20 + len(text)] = struct.pack("=i", len(text)) + text
        self.memory[:8] = struct.pack("=d", deadline)  # last: who sees the new deadline sees the new text

    @property
    def deadline(self) -> float:
        """Until when what runs now may run."""
        return struct.unpack("=d", self.memory[:8])[0]

    @property
    def what(self) -> str:
        """What runs now, in words."""
        (length,) = struct.unpack("=i", self.memory[16:20])
        return self.memory[20 : 20 + length].decode("utf-8", "replace")

    @property
    def code(self) -> int | None:
        """The exit code that the worker means to give, once it is through; None before."""
        (value,) = struct.unpack("=i", self.memory[8:12])
        return None if value < 0 else value

    @code.setter
    def code(self, value: int | None) -> None:
        self.memory[8:12] = struct.pack("=i", -1 if value is None else value)


_board: Board | None = None  # the one of this process, while it is guarded
_limit: float | None = None  # seconds, of a guarded process


@contextmanager
def time_limit(what: str, seconds: float | None = None) -> Iterator[None]:
    """TimedOut("WHAT took longer than S s") where the block does. Without seconds: the guarded process's own, else none.

    The alarm needs the main thread of a system with signals; anywhere else only a guard ends the block. Blocks nest.
    """
    seconds = _limit if seconds is None else seconds
    if not seconds:
        yield
        return
    _sign_of_life(seconds, what)
    try:
        with _alarm(what, seconds):
            yield
    finally:
        _sign_of_life(max(IDLE * (_limit or seconds), LEAST_IDLE), f"what followed {what}")


def limited(loss: Callable[..., Any], seconds: float | None, what: str = "a call of the loss") -> Callable[..., Any]:
    """The same loss (name, signature, declared traits) with a limit on each call. sys.exit in it becomes a RuntimeError."""

    @functools.wraps(loss)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            with time_limit(what, seconds):
                return loss(*args, **kwargs)
        except SystemExit as stop:
            raise RuntimeError(f"it called sys.exit({stop.code!r})").with_traceback(stop.__traceback__) from None

    return call


def _sign_of_life(seconds: float, what: str) -> None:
    if _board is not None:
        _board.expect(time.monotonic() + seconds, what)


@contextmanager
def _alarm(what: str, seconds: float) -> Iterator[None]:
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return
    outer, _ = signal.getitimer(signal.ITIMER_REAL)
    if 0 < outer <= seconds:  # the block around this one ends first
        yield
        return
    begun, late = time.monotonic(), TimedOut(f"{what} took longer than {seconds:g} s")
    rang = []

    def ring(number: int, frame: object) -> NoReturn:
        rang.append(number)
        raise late

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if outer:
            signal.setitimer(signal.ITIMER_REAL, max(outer - (time.monotonic() - begun), 1e-3))
    if rang:  # the block swallowed it
        raise late


# -------------------------------------------------------------------------------------------------------------- guard
def guard(seconds: float, say: Callable[[str], None], *, fork: bool | None = None) -> None:
    """Watch this process from here on: what neither ends nor obeys the alarm is ended, `say` gets the verdict, exit code 2.

    Returns in the process that is to do the work, which calls `finish(code)` when it is through. Where it forked (Linux), the
    parent never returns: it leaves with the worker's exit code. Call it before any thread or accelerator is started.
    """
    global _board, _limit
    _board, _limit = Board(), seconds
    _sign_of_life(max(IDLE * seconds, LEAST_IDLE), "the start")
    if sys.platform == "linux" if fork is None else fork:
        _fork(_board, say)
    else:
        threading.Thread(target=_watch, args=(_board, say), daemon=True).start()


def finish(code: int) -> int:
    """The work is done, and this is its exit code; returns it."""
    if _board is not None:
        _board.code = code
    return code


def unguarded() -> None:
    """Forget the guard (tests, which share a process)."""
    global _board, _limit
    _board = _limit = None


def _watch(board: Board, say: Callable[[str], None]) -> None:
    """The watcher as a thread: sees what lets go of Python's lock, as torch's operations do."""
    while board.code is None:
        if time.monotonic() > board.deadline + GRACE:
            say(f"{board.what} hangs: it was ended")
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(FAILED_TO_RUN)
        time.sleep(TICK)


def _fork(board: Board, say: Callable[[str], None]) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():  # Python 3.12 warns of numpy's idle threads, which the child does without
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        _die_with_parent()
        return

    def pass_on(number: int, frame: object) -> NoReturn:
        os.kill(child, signal.SIGKILL)
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, pass_on)
    try:
        status, ended = _wait(child, board)
    except KeyboardInterrupt:
        time.sleep(GRACE)  # the child got it too
        os.kill(child, signal.SIGKILL)
        raise SystemExit(128 + signal.SIGINT) from None
    verdict = _verdict(status, ended, board)
    if verdict:
        say(verdict)
    raise SystemExit(FAILED_TO_RUN if verdict else os.waitstatus_to_exitcode(status))


def _wait(child: int, board: Board) -> tuple[int, bool]:
    """(wait status, whether we ended it)."""
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status, False
        if board.code is None and time.monotonic() > board.deadline + GRACE:
            os.kill(child, signal.SIGKILL)
            return os.waitpid(child, 0)[1], True
        time.sleep(TICK)


def _verdict(status: int, ended: bool, board: Board) -> str:
    """What went wrong, or "" where the worker came to its own end."""
    if ended:
        return f"{board.what} hangs: it was ended"
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        often = {"SIGKILL": ", often for want of memory", "SIGSEGV": ", a crash in compiled code"}.get(name, "")
        return f"Python was ended by {name}{often}, in {board.what}"
    if board.code is None and code != 128 + signal.SIGINT:
        return f"Python was left with exit code {code} before the checks were through, in {board.what}"
    return ""


def _die_with_parent() -> None:
    """A worker whose watcher was killed must not go on alone (Linux)."""
    import ctypes

    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
