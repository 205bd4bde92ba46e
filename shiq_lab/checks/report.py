"""What a check returns and what a suite reports: measurements, results, the report.

A check is a generator function of its subject that yields a `Measured` for everything it compared. The worst of them is the
check's result; a check that compared nothing has failed, and one that does not apply raises `Skip` with its reason.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

PASSED, FAILED, WARNED, SKIPPED, EXPECTED = "passed", "failed", "warned", "skipped", "expected failure"


class Skip(Exception):
    """Raised by a check that does not apply to its subject; the argument is the reason."""


@dataclass(frozen=True)
class Measured:
    """One comparison: `value` is the largest deviation among `compared` numbers, in the place where the worst one sits.

    at_least turns the bound round: something must differ by that much. warn_only makes a miss a warning (a failure under
    strict). NaN misses every bound. `detail` says what was seen in the worst place; `hint` replaces the check's own.
    """

    what: str
    value: float
    tolerance: float
    compared: int
    environment: str = ""
    where: str = ""
    at_least: bool = False
    warn_only: bool = False
    detail: str = ""
    hint: str = ""

    @property
    def holds(self) -> bool:
        """The value keeps its tolerance; False where nothing was compared."""
        if self.compared < 1:
            return False
        return self.value >= self.tolerance if self.at_least else self.value <= self.tolerance

    @property
    def badness(self) -> float:
        """How far past its bound, as a ratio: above 1 misses; inf for NaN and for nothing compared."""
        if self.compared < 1 or math.isnan(self.value):
            return math.inf
        over, under = (self.tolerance, self.value) if self.at_least else (self.value, self.tolerance)
        if under <= 0:
            return math.inf if over > under else 0.0
        return over / under

    def sentence(self) -> str:
        """The whole finding in one sentence that stands alone."""
        if self.compared < 1:
            return f"{self.what}: nothing was compared" + (f" on {self.environment}" if self.environment else "")
        sign = "at least" if self.at_least else "at most"
        place = ", ".join(part for part in (self.environment, self.where) if part)
        text = f"{self.what}: {self.value:.3g}, expected {sign} {self.tolerance:.3g}, over {count(self.compared)}"
        return text + (f" ({place})" if place else "") + (f"; {self.detail}" if self.detail else "")


def count(numbers: int) -> str:
    """A count in words: 1 number, 2 numbers."""
    return f"{numbers} number" + ("" if numbers == 1 else "s")


@dataclass(frozen=True)
class Check:
    """A line of a suite: the code and title of a check, the plain function that runs it, and what a failure usually means."""

    name: str
    title: str
    run: Callable[[Any], Iterator[Measured]]
    hint: str


@dataclass(frozen=True)
class Result:
    """A check's verdict: its worst measurement, and what such a failure usually means."""

    name: str
    title: str
    status: str
    measured: float | None = None
    tolerance: float | None = None
    at_least: bool = False  # the bound is a lower one: something had to change
    environment: str = ""
    where: str = ""
    compared: int = 0
    message: str = ""
    hint: str = ""
    reason: str = ""  # of a skip or an expected failure
    seconds: float = 0.0
    measurements: tuple[Measured, ...] = ()

    @property
    def ok(self) -> bool:
        """True unless the check failed."""
        return self.status != FAILED


@dataclass(frozen=True)
class Report:
    """Every result of a suite on one subject. `notes` hold what was inferred, such as the loss's reduction."""

    subject: str
    kind: str
    results: list[Result] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """No check failed, and at least one ran to a pass."""
        return all(r.ok for r in self.results) and any(r.status == PASSED for r in self.results)

    @property
    def failed(self) -> list[str]:
        """The names of the checks that failed, in order."""
        return [r.name for r in self.results if r.status == FAILED]

    def __str__(self) -> str:
        """A line a check, then what failed and what it usually means."""
        lines = [f"{self.subject} ({self.kind}): {'passed' if self.passed else 'failed ' + ', '.join(self.failed)}"]
        lines += [f"  {r.status:16} {r.name:8} {r.title}" + (f" ({r.reason})" if r.reason else "") for r in self.results]
        lines += [f"note: {note}" for note in self.notes]
        bad_ones = [r for r in self.results if r.status in (FAILED, WARNED)]
        lines += [f"{r.name}: {r.message}" + (f"\n  usually: {r.hint}" if r.hint else "") for r in bad_ones]
        return "\n".join(lines)

    def __getitem__(self, name: str) -> Result:
        return next(r for r in self.results if r.name == name)

    def to_json(self) -> str:
        """Everything as a JSON text; numbers that JSON cannot hold are strings ("nan", "inf")."""
        data = {"passed": self.passed, **asdict(self)}
        return json.dumps(_plain(data), indent=1)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
