"""`shiq-lab check`: loads losses, runs the suite on each under a time limit, shows and writes the reports.

Exit codes: 0 all checks hold, 1 a check failed, 2 a loss could not be loaded or run, or none was named. Every way into 2 ends
in one sentence, and the report files that were asked for are written then too, so that no older, greener file stays behind.
"""

import ast
import contextlib
import difflib
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from shiq_lab.checks import timelimit
from shiq_lab.checks.loading import last_line, load_loss
from shiq_lab.checks.render import SHORT, Outcome, as_html, as_json, as_junit, as_markdown, show, write
from shiq_lab.checks.report import Result
from shiq_lab.checks.runner import SubjectError
from shiq_lab.checks.traits import KINDS, Traits, check_names
from shiq_lab.errors import bad, is_real

HOLDS, FAILS, COULD_NOT_RUN = 0, 1, timelimit.FAILED_TO_RUN
DTYPES = ("float64", "float32", "bfloat16", "float16")
WRITERS = {"--json": as_json, "--junit": as_junit, "--html": as_html, "--markdown": as_markdown}
EVEN_IF_DASH = "--json"  # the only one that may go to standard output


@dataclass(frozen=True)
class Order:
    """What the command line asked for; `files` maps an option of WRITERS to its path, "-" for standard output."""

    losses: tuple[str, ...]
    kind: str | None = None
    like: str | None = None
    expect_fail: dict[str, str] = field(default_factory=dict)
    traits: dict[str, Any] = field(default_factory=dict)
    only: tuple[str, ...] = ()
    strict: bool = False
    device: str = "cpu"
    dtypes: tuple[str, ...] = ()
    time_limit: float = timelimit.DEFAULT
    quiet: bool = False
    files: dict[str, str] = field(default_factory=dict)

    @property
    def prints_json(self) -> bool:
        """`--json -`: the report goes to standard output, and nothing else does."""
        return self.files.get("--json") == "-"

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of check_loss that were given."""
        return {
            "kind": self.kind, "like": self.like, "expect_fail": self.expect_fail or None, "strict": self.strict,
            "device": self.device, "dtypes": self.dtypes or None, "only": self.only or None, "traits": self.traits or None,
        }  # fmt: skip


def order(
    losses: Sequence[str] | None, *, kind: str | None = None, like: str | None = None, expect_fail: Sequence[str] | None = None,
    trait: Sequence[str] | None = None, only: Sequence[str] | None = None, strict: bool = False, device: str = "cpu",
    dtype: Sequence[str] | None = None, time_limit: float = timelimit.DEFAULT, quiet: bool = False, **files: str | None,
) -> Order:  # fmt: skip
    """The command line's texts, read and checked before anything runs; ValueError names the option."""
    if not losses:
        raise bad("LOSS", "FILE.py:NAME or package.module:NAME, at least one", "none", "For instance my_losses.py:shiq.")
    if kind is not None and kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, n=1)
        raise bad("--kind", f"one of {', '.join(KINDS)}", repr(kind), f"Did you mean {near[0]!r}?" if near else "")
    for name in dtype or ():
        if name not in DTYPES:
            raise bad("--dtype", f"one of {', '.join(DTYPES)}", repr(name))
    if not is_real(time_limit) or not 0 <= time_limit < float("inf"):
        raise bad("--time-limit", "seconds >= 0 (0: no limit)", repr(time_limit))
    codes = [code.strip() for text in only or () for code in text.split(",")]
    if not all(codes):
        raise bad("--only", "names of checks", repr(",".join(only or ())))
    codes = [_code("--only", code) for code in codes]
    return Order(
        losses=tuple(losses), kind=kind, like=like, strict=strict, device=device, quiet=quiet, time_limit=float(time_limit),
        expect_fail=dict(_reason(text) for text in expect_fail or ()), traits=dict(_trait(text) for text in trait or ()),
        only=tuple(codes), dtypes=tuple(dtype or ()), files=_files({f"--{k}": v for k, v in files.items() if v is not None}),
    )  # fmt: skip


def _pair(option: str, form: str, text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise bad(option, form, repr(text))
    return key.strip(), value.strip()


def _reason(text: str) -> tuple[str, str]:
    code, reason = _pair("--expect-fail", "CHECK=reason", text)
    if not reason:
        raise bad("--expect-fail", "CHECK=reason", repr(text), "An expected failure needs its reason.")
    return _code("--expect-fail", code), reason


def _code(option: str, code: str) -> str:
    """The check of that name, in upper or lower case; an unknown one is a ValueError that suggests the nearest."""
    from shiq_lab.checks.loss import LOSS_CHECKS

    known = {check.name.upper(): check.name for check in LOSS_CHECKS}
    if code.upper() in known:
        return known[code.upper()]
    near = difflib.get_close_matches(code.upper(), known, n=1)
    hint = f"Did you mean {known[near[0]]!r}?" if near else ""
    raise bad(option, f"names of checks: {', '.join(known.values())}", repr(code), hint)


def _trait(text: str) -> tuple[str, Any]:
    """name=value with the value read as the trait's type wants it: true and false in any case, tuples by commas."""
    name, value = _pair("--trait", "name=value", text)
    try:
        check_names({name: value})
    except ValueError as error:
        raise ValueError(in_options(str(error))) from None
    wanted = str(get_type_hints(Traits)[name])
    try:
        read = ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(value.lower(), value))
    except (ValueError, SyntaxError):
        read = value
    if "tuple" in wanted:
        parts = read if isinstance(read, (tuple, list)) else str(read).strip("()[] ").split(",")
        read = tuple(part for part in (str(part).strip(" '\"") for part in parts) if part)
    if name == "dtypes" and not set(read) <= set(DTYPES):
        raise bad("--trait dtypes", f"among {', '.join(DTYPES)}", repr(text))
    if "bool" in wanted and not isinstance(read, bool):
        raise bad("--trait", f"{name}=true or {name}=false", repr(text))
    return name, read


def in_options(complaint: str) -> str:
    """A complaint of the suite about one of its arguments, under the name that the command line has for it."""
    argument, colon, rest = complaint.partition(": ")
    options = {"only": "--only", "like": "--like", "expect_fail": "--expect-fail", "traits": "--trait", "kind": "--kind",
               "device": "--device", "dtypes": "--dtype"}  # fmt: skip
    options |= {field.name: f"--trait {field.name}" for field in fields(Traits) if field.name not in options}
    return options.get(argument, argument) + colon + rest


def _files(files: dict[str, str]) -> dict[str, str]:
    seen: dict[Path, str] = {}
    for option, name in files.items():
        if name == "-":
            if option != EVEN_IF_DASH:
                raise bad(option, "a file", "'-'", "Only --json may go to standard output.")
            continue
        path = Path(name).resolve()
        if not name or path.is_dir():
            raise bad(option, "a file", repr(name) + (", a folder" if name else ""))
        if path in seen:
            raise bad(option, f"another file than {seen[path]}", repr(name))
        seen[path] = option
        above = next(p for p in path.parents if p.exists())
        if not above.is_dir():
            raise bad(option, "a file in a folder", f"{name!r}, below the file {above}")
    return files


# ------------------------------------------------------------------------------------------------------------ running
def check(asked: Order, out: Console, err: Console) -> int:
    """Everything that the order asks for, under a guard; the exit code. Where the guard forked, the parent leaves here."""
    if asked.time_limit:
        timelimit.guard(asked.time_limit, lambda verdict: _deliver_failure(asked, verdict, err))
    try:
        return timelimit.finish(run(asked, out, err))
    except (ValueError, OSError) as error:
        _complain(err, in_options(str(error)))
    except Exception as error:  # ours: still one sentence, for a log that others read
        _complain(err, _our_fault(error))
    return timelimit.finish(COULD_NOT_RUN)


def run(asked: Order, out: Console, err: Console) -> int:
    """The same without a guard."""
    from shiq_lab.checks.loss import select

    _check_device(asked.device)
    torch.set_num_threads(1)  # small tables: more threads only wait for each other
    outcomes = []
    for which in asked.losses:
        with _diverted(asked.prints_json), _bar(err, which, len(select(asked.only or None))) as on_result:
            outcome = check_one(which, asked, on_result)
        outcomes.append(outcome)
        show(outcome, err if asked.prints_json or outcome.report is None else out, asked.quiet or asked.prints_json)
    deliver(asked, outcomes)
    if any(outcome.report is None for outcome in outcomes):
        return COULD_NOT_RUN
    return HOLDS if all(outcome.passed for outcome in outcomes) else FAILS


def check_one(which: str, asked: Order, on_result: Callable[[Result], None] | None = None) -> Outcome:
    """One loss's outcome; whatever stops it becomes the outcome's error. Only a wrong argument of the suite is raised."""
    from shiq_lab.checks.loss import check_loss

    loss, arguments = None, {**asked.arguments, "like": reference(asked.like, asked.time_limit)}
    try:
        with timelimit.time_limit(f"importing {which}", asked.time_limit or None):
            loss = load_loss(which)
        watched = timelimit.limited(loss, asked.time_limit or None, f"a call of {which}")
        return Outcome(which, check_loss(watched, name=which, on_result=on_result, time_limit=None, **arguments))
    except (SubjectError, timelimit.TimedOut) as error:
        return Outcome(which, error=str(error))
    except ValueError as error:
        if loss is not None and not str(error).startswith(f"{which}: "):  # about an option, not about this loss
            raise
        return Outcome(which, error=str(error))
    except Exception as error:
        return Outcome(which, error=_our_fault(error))


def reference(like: str | None, seconds: float) -> str | Callable[..., Any] | None:
    """What --like means: a known loss's name as it is, a FILE.py:NAME as the function. ValueError if it cannot be called."""
    from shiq_lab.checks.loss import make_subject

    if like is None or not (":" in like or like.endswith(".py")):
        return like
    try:
        with timelimit.time_limit(f"importing {like}", seconds or None):
            loss = load_loss(like)
        make_subject(loss, name="--like")
    except timelimit.TimedOut as error:
        raise bad("--like", "a file that can be imported", str(error)) from None
    except ValueError as error:
        said = str(error)
        raise ValueError(f"--like: {said.removeprefix('LOSS: ').removeprefix('--like: ')}") from None
    return timelimit.limited(loss, seconds or None, f"a call of {like}")


def _our_fault(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(frame.filename).name}:{frame.lineno}"
    return f"the suite itself failed: {last_line(error)} ({place}). Please report this."


def _check_device(device: str) -> None:
    try:
        torch.zeros(1, device=device).add(1)
    except Exception as error:
        raise bad("--device", "a device of this machine, such as cpu or cuda", f"{device!r} ({last_line(error)})") from None


@contextlib.contextmanager
def _diverted(divert: bool) -> Iterator[None]:
    """What the user's code prints goes to standard error while standard output is for JSON."""
    with contextlib.redirect_stdout(sys.stderr) if divert else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _bar(err: Console, which: str, total: int) -> Iterator[Callable[[Result], None]]:
    """A line on standard error that says what is done; nothing where that is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(f"checking {escape(which)}", total=total)

        def on_result(result: Result) -> None:
            bar.update(task, advance=1, description=f"{result.name} {SHORT[result.status]}")

        yield on_result


# --------------------------------------------------------------------------------------------------------- delivering
def deliver(asked: Order, outcomes: Sequence[Outcome]) -> None:
    """The files that were asked for, and JSON on standard output."""
    for option, name in asked.files.items():
        text = WRITERS[option](outcomes)
        if name == "-":
            print(text)
            continue
        try:
            write(Path(name), text)
        except OSError as error:
            raise bad(option, "a file that can be written", f"{name!r} ({error.strerror or error})") from None


def _deliver_failure(asked: Order, verdict: str, err: Console) -> None:
    """After a hang or a crash: the verdict, and the files with it in the place of reports."""
    if err.is_terminal:
        err.show_cursor()
    outcomes = [Outcome(which, error=verdict) for which in asked.losses]
    _complain(err, verdict)
    try:
        deliver(asked, outcomes)
    except ValueError as error:
        _complain(err, str(error))


def _complain(err: Console, text: str) -> None:
    err.print(f"[red]error[/red] {escape(text)}", soft_wrap=True, highlight=False)
