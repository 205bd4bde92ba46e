"""How a bug is planted: by editing the source of an accepted function in one place, so that the diff is the bug."""

import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from shiq_lab.checks.report import Report
from shiq_lab.errors import bad


@dataclass(frozen=True)
class Bug:
    """A row of the matrix: a public thread's bug, the accepted thing, the same thing with the bug in, and the suite to run.

    `suite(subject)` returns the Report; `right` and `wrong` are its subjects. `smoke(subject)` is the naive test (finite,
    falling, gradient not zero) where there is a loss to watch; None where there is none.
    """

    id: str  # as in the survey: a letter for the family, a number
    thread: str  # the public thread, "owner/repository#number" or the repository's short name
    symptom: str
    mutation: str  # the diff in words
    layer: str  # L loss, A adapter, M model or fused path, D processes, R rollout and tokeniser
    right: Any
    wrong: Any
    suite: Callable[[Any], Report]
    smoke: Callable[[Any], bool] | None = None


def plant(function: Callable[..., Any], *edits: tuple[str, str], **names: Any) -> Callable[..., Any]:
    """The function with each `old` in its source replaced by `new`; every `old` must stand there exactly once.

    `names` are added to what the source sees. The globals are the function's own module's, so helpers are shared.
    """
    source = textwrap.dedent(inspect.getsource(function))
    for old, new in edits:
        if source.count(old) != 1:
            raise bad("edits", f"text that stands once in {function.__name__}", f"{old!r}, {source.count(old)} times")
        source = source.replace(old, new)
    space = {**function.__globals__, **names}
    exec(compile(source, f"<{function.__name__} with a bug>", "exec"), space)
    return space[function.__name__]
