"""The matrix check x bug, computed: which check catches which planted bug, and which would have passed a naive smoke test."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib import import_module
from multiprocessing import get_context
from typing import Any

from shiq_lab.checks.bugs.plant import Bug
from shiq_lab.errors import bad

LAYERS = {"L": "losses", "A": "components", "M": "trainers", "D": "processes", "R": "rollouts"}
FILES = tuple(LAYERS.values())
NAMES = {"L": "the loss itself", "A": "adapters", "M": "models and fused paths", "D": "processes", "R": "rollouts"}

# Rows of the survey that are not planted, each with its reason.
UNREACHED: dict[str, str] = {}


@dataclass(frozen=True)
class Row:
    """One planted bug: the checks that failed on it, whether its accepted twin passed, what a smoke test would have said."""

    id: str
    thread: str
    symptom: str
    mutation: str
    layer: str
    caught_by: tuple[str, ...]
    right_failed: tuple[str, ...]
    smoke_passed: bool | None
    seconds: float

    @property
    def caught(self) -> bool:
        """Some check fails on the bug, and none on the accepted thing: a suite that fails everything catches nothing."""
        return bool(self.caught_by) and not self.right_failed


@dataclass(frozen=True)
class Matrix:
    """All rows, with what follows from them."""

    rows: list[Row] = field(default_factory=list)

    def caught(self) -> list[Row]:
        return [row for row in self.rows if row.caught]

    def alone(self) -> dict[str, list[str]]:
        """The bugs that one check catches and no other: {check: bugs}."""
        out: dict[str, list[str]] = {}
        for row in self.caught():
            if len(row.caught_by) == 1:
                out.setdefault(row.caught_by[0], []).append(row.id)
        return out

    def catches(self) -> Counter[str]:
        """How many bugs each check catches."""
        return Counter(check for row in self.caught() for check in row.caught_by)

    def smoked(self) -> tuple[int, int]:
        """How many bugs pass the smoke test, of those that one can be run on."""
        seen = [row.smoke_passed for row in self.rows if row.smoke_passed is not None]
        return sum(seen), len(seen)

    def to_json(self) -> dict[str, Any]:
        passed, of = self.smoked()
        return {
            "bugs": len(self.rows),
            "caught": len(self.caught()),
            "missed": [row.id for row in self.rows if not row.caught],
            "unreached": UNREACHED,
            "pass_a_smoke_test": passed,
            "smoke_tested": of,
            "catches": dict(self.catches()),
            "caught_by_one_check_alone": self.alone(),
            "rows": [asdict(row) for row in self.rows],
        }


def totals(matrix: Matrix) -> list[str]:
    """What follows from the matrix, a sentence each."""
    surveyed = {row.id.partition("-")[0] for row in matrix.rows}
    missed = {row.id.partition("-")[0] for row in matrix.rows if not row.caught}
    passed, of = matrix.smoked()
    single = ", ".join(f"{len(bugs)} by {check}" for check, bugs in sorted(matrix.alone().items()))
    return [
        f"{len(surveyed - missed)} of {len(surveyed)} bugs of the survey are caught ({len(matrix.rows)} plantings), and their "
        "accepted twins pass",
        f"{passed} of the {of} plantings that a smoke test can watch pass it (finite, falling, gradient not zero)",
        f"caught by one check alone: {single}",
    ]


def to_markdown(matrix: Matrix) -> str:
    """The page docs/planted_bugs.md; `shiq-lab selftest --matrix` computes it."""
    head = [
        "# Real bugs, planted",
        "",
        "Each row is a silent bug from a public thread, planted as the smallest edit of something that the suite accepts: a",
        "loss, a component around it, a trainer or model, a pair of processes, a sampler. *Caught by* comes from running the",
        'suite; *smoke test* says whether the bug passes the usual one (finite, falling, gradient not zero; "-": there is no',
        "loss to watch). `shiq-lab selftest --matrix` computes it, with every number under `--json`; this file is generated.",
        "",
        *(f"- {line}" for line in totals(matrix)),
        "",
        "| bug | thread | layer | symptom | planted as | caught by | smoke test |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    said = {True: "passes", False: "fails", None: "-"}
    lines = [
        f"| {r.id} | {r.thread} | {NAMES[r.layer]} | {_cell(r.symptom)} | {_cell(r.mutation)} | "
        f"{', '.join(r.caught_by) or '**missed**'} | {said[r.smoke_passed]} |"
        for r in sorted(matrix.rows, key=lambda r: (r.id[0], int("".join(c for c in r.id.partition("-")[0] if c.isdigit()))))
    ]
    return "\n".join([*head, *lines, ""])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def load(layer: str) -> list[Bug]:
    """The planted bugs of one layer's file; models and trainers need the extra `hf` only where they say so."""
    return list(import_module(f"shiq_lab.checks.bugs.{layer}").BUGS)


def ids(layers: Iterable[str] = FILES) -> list[tuple[str, str]]:
    """(file, id) of every planted bug; the same id twice is a ValueError."""
    found = [(layer, bug.id) for layer in layers for bug in load(layer)]
    twice = [id_ for id_, n in Counter(id_ for _, id_ in found).items() if n > 1]
    if twice:
        raise bad("BUGS", "every id once", f"{', '.join(twice)} more than once")
    return found


def measure(layer: str, id_: str) -> Row:
    """One bug's row."""
    bug = next(b for b in load(layer) if b.id == id_)
    begin = time.perf_counter()
    wrong = bug.suite(bug.wrong)
    right = bug.suite(bug.right)
    smoke = None if bug.smoke is None else bool(bug.smoke(bug.wrong))
    names = lambda report: tuple(dict.fromkeys(report.failed))  # noqa: E731
    broken = () if right.passed else names(right) or ("nothing passed",)
    seconds = time.perf_counter() - begin
    return Row(bug.id, bug.thread, bug.symptom, bug.mutation, bug.layer, names(wrong), broken, smoke, seconds)


def compute(workers: int = 2, layers: Iterable[str] = FILES) -> Iterator[Row]:
    """Every row, in the order of the files; the work is spread over processes of one thread each."""
    jobs = ids(layers)
    if workers == 1:
        yield from (measure(*job) for job in jobs)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_one_thread) as pool:
        yield from pool.map(measure, *zip(*jobs, strict=True))


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
