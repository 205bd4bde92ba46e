"""What a study is, and how it runs: case by case and seed by seed, each kept as soon as it is done.

A study is a list of cases, a function that measures one case at one seed, and functions that sum up, claim and draw. Every
measurement is a file named by the hash of all that it depends on; a study that was killed goes on where it stopped,
with the same numbers, since each measurement depends on nothing but its case, its seed and the settings.
"""

import ast
import hashlib
import inspect
import json
import os
import platform
import signal
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from shiq_lab.errors import at_least, bad
from shiq_lab.progress import progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Settings = dict[str, Any]
Case = dict[str, Any]
CACHE = Path(".shiq_lab") / "studies"


@dataclass(frozen=True)
class Claim:
    """A sentence about the numbers, what was measured for it, and whether it holds."""

    text: str
    measured: str
    holds: bool


@dataclass(frozen=True)
class Record:
    """One case at one seed, and its numbers (anything that JSON holds; floats keep every bit)."""

    case: Case
    seed: int
    numbers: dict[str, Any]


def numbers_of(records: list[Record], **wanted: Any) -> list[dict[str, Any]]:
    """The numbers of all records whose case has these values, seed by seed."""
    return [r.numbers for r in records if all(r.case.get(key) == value for key, value in wanted.items())]


@dataclass(frozen=True)
class Study:
    """An experiment.

    name       what the command line calls it
    title      the figure's heading; `question` is one sentence, what is asked
    settings   plain JSON values, "seeds" (how many) among them; `fast` overrides some for a quick look
    cases      settings -> the cases, JSON values; each is measured at seeds 0, 1, ..., seeds - 1
    measure    (settings, case, seed) -> numbers; a module's function, as other processes call it; all chance from the seed
    summarise  (settings, records) -> the numbers that the figure and the page show, with bootstrap intervals
    claims     (settings, summary) -> what the caption says, each with what was measured; must hold at the full settings
    draw       Result -> Figure
    """

    name: str
    title: str
    question: str
    settings: Mapping[str, Any]
    fast: Mapping[str, Any]
    cases: Callable[[Settings], list[Case]]
    measure: Callable[[Settings, Case, int], dict[str, Any]]
    summarise: Callable[[Settings, list[Record]], dict[str, Any]]
    claims: Callable[[Settings, dict[str, Any]], list[Claim]]
    draw: Callable[["Result"], "Figure"]


@dataclass(frozen=True)
class Result:
    """A study that ran: settings, versions, every record, the summary and the claims."""

    study: str
    title: str
    question: str
    settings: Settings
    versions: dict[str, str]
    records: list[Record] = field(repr=False)
    summary: dict[str, Any] = field(repr=False)
    claims: list[Claim]

    @property
    def passed(self) -> bool:
        """True where there are records and claims, and every claim holds."""
        return bool(self.records and self.claims) and all(c.holds for c in self.claims)

    def to_json(self) -> dict[str, Any]:
        """All of it, for programs; from_json gives the same Result."""
        return {"passed": self.passed, **asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Result":
        """The result that `to_json` wrote. Raises ValueError for anything else."""
        try:
            parts = {key: value for key, value in data.items() if key != "passed"}
            parts["records"] = [Record(**r) for r in parts["records"]]
            parts["claims"] = [Claim(**c) for c in parts["claims"]]
            return cls(**parts)
        except (AttributeError, KeyError, TypeError) as error:
            raise bad("data", "a result that Result.to_json made", f"something else ({error})") from error

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "Result":
        """The result in a file. Raises ValueError, naming it, for a damaged or foreign one; OSError where there is none."""
        text = Path(path).read_text(encoding="utf-8")
        try:
            return cls.from_json(json.loads(text))
        except ValueError as error:
            raise bad("path", "a file that `shiq-lab study` or `shiq-lab figures` wrote", f"{str(path)!r}: {error}") from error


def run(
    study: Study, *, seeds: int | None = None, fast: bool = False, jobs: int = 1,
    cache: str | os.PathLike[str] | None = CACHE, fresh: bool = False,
) -> Result:  # fmt: skip
    """Run a study, or the rest of one. seeds overrides how many; jobs: processes; cache=None keeps nothing.

    fresh: what is kept is measured again, and replaced. The result does not depend on jobs, on the cache, or on being
    interrupted.
    """
    settings: Settings = {**study.settings, **(study.fast if fast else {})}
    if seeds is not None:
        settings["seeds"] = at_least("seeds", seeds, 1)
    jobs = at_least("jobs", jobs, 1)
    work = [(case, seed) for case in study.cases(settings) for seed in range(settings["seeds"])]
    folder = None if cache is None else Path(cache) / study.name
    paths = [None if folder is None else folder / f"{_key(study, settings, case, seed)}.json" for case, seed in work]
    kept = {} if fresh else {i: _kept(path) for i, path in enumerate(paths) if path}
    found = {i: numbers for i, numbers in kept.items() if numbers is not None}
    todo = [(i, *work[i]) for i in range(len(work)) if i not in found]
    for i, numbers in progress(_measured(study, settings, todo, jobs), f"study {study.name}", total=len(todo)):
        found[i] = numbers
        path = paths[i]
        if path is not None:
            write_json(path, numbers)
    records = [Record(case, seed, found[i]) for i, (case, seed) in enumerate(work)]
    summary = plain(study.summarise(settings, records))
    return Result(
        study.name, study.title, study.question, settings, _versions(), records, summary, study.claims(settings, summary)
    )


def _measured(
    study: Study, settings: Settings, todo: list[tuple[int, Case, int]], jobs: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, numbers) of each piece of work as it is done; in this process, or in several of one thread each."""
    if jobs == 1 or len(todo) < 2:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in the other processes: sums over several threads may round otherwise
        try:
            for i, case, seed in todo:
                yield i, plain(study.measure(settings, case, seed))
        finally:
            torch.set_num_threads(threads)
        return
    with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=_begin) as pool:
        pending = {pool.submit(study.measure, settings, case, seed): i for i, case, seed in todo}
        try:
            for future in as_completed(pending):
                yield pending[future], plain(future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in active_children():  # else leaving the block would wait for what they are at
                child.terminate()
            raise


def _begin() -> None:
    """One thread a process; and an interrupt from the keyboard is the first process's to handle."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def plain(value: Any, *, strict: bool = True) -> Any:
    """The same numbers as JSON holds them; NaN and infinities are refused, or (strict=False) become None."""
    if isinstance(value, dict):
        return {str(key): plain(x, strict=strict) for key, x in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(x, strict=strict) for x in value]
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, float) and not np.isfinite(value):
        if strict:
            raise bad("numbers", "finite numbers (None for what is not there)", repr(value))
        return None
    return value


def _key(study: Study, settings: Settings, case: Case, seed: int) -> str:
    """A hash of all that a measurement depends on, the code under it included; how many seeds there are is not part of it."""
    others = {key: value for key, value in settings.items() if key != "seeds"}
    code = _code(inspect.getsourcefile(study.measure) or "")
    whole = json.dumps([study.name, others, case, seed, code, _versions()], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()[:24]


@cache
def _code(path: str) -> str:
    """A hash of a file and of every file of this package that it imports, directly or through others."""
    package = __name__.partition(".")[0]
    todo, seen = [path], {}
    while todo:
        file = todo.pop()
        if file in seen or not Path(file).is_file():
            continue
        seen[file] = Path(file).read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(seen[file])):
            names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            if isinstance(node, ast.ImportFrom):
                names = [str(node.module), *(f"{node.module}.{name}" for name in names)]
            todo += [_file_of(name) for name in names if name.split(".")[0] == package]
    return hashlib.sha256("".join(sorted(seen.values())).encode()).hexdigest()


@cache
def _file_of(name: str) -> str:
    """The file of a module; "" for a name inside one."""
    try:
        found = find_spec(name)
    except ModuleNotFoundError:
        return ""
    return found.origin or "" if found else ""


def _versions() -> dict[str, str]:
    parts = {"shiq_lab": version("shiq-lab"), "numpy": np.__version__, "torch": torch.__version__.partition("+")[0]}
    return {**parts, "python": ".".join(platform.python_version_tuple()[:2])}


def _kept(path: Path) -> dict[str, Any] | None:
    """The numbers of an earlier run; a damaged file counts as none."""
    try:
        numbers = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return numbers if isinstance(numbers, dict) else None


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Write JSON whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(_lines(value) + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _lines(value: Any) -> str:
    """JSON with a line for each entry of the first two levels: records and claims can be read and compared line by line."""
    flat = lambda x: json.dumps(x, allow_nan=False)  # noqa: E731

    def entry(x: Any) -> str:
        if isinstance(x, dict) and x:
            return "{\n  " + ",\n  ".join(f"{flat(str(key))}: {flat(part)}" for key, part in x.items()) + "\n }"
        if isinstance(x, list) and x and isinstance(x[0], (dict, list)):
            return "[\n  " + ",\n  ".join(map(flat, x)) + "\n ]"
        return flat(x)

    if not isinstance(value, dict):
        return flat(value)
    return "{\n " + ",\n ".join(f"{flat(str(key))}: {entry(part)}" for key, part in value.items()) + "\n}"
