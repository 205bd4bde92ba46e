"""`shiq-lab preflight config.yaml`: the sanity check before the large run, on the user's own model, data and settings.

At most 16 rows and one step, minutes on a CPU; nothing is written to the run's folders. Exit codes: 0 all checks hold,
1 a check failed, 2 the configuration could not be loaded or run.
"""

import os
import tempfile
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from shiq_lab.checks.command import COULD_NOT_RUN, FAILS, HOLDS, Order, deliver, order
from shiq_lab.checks.loading import last_line
from shiq_lab.checks.render import Outcome, show
from shiq_lab.checks.report import Report, Result, Skip
from shiq_lab.checks.runner import run_checks
from shiq_lab.errors import at_least
from shiq_lab.hf import run
from shiq_lab.hf.preflight_checks import CHECKS
from shiq_lab.hf.preflight_subject import Subject

# A look at a run is no run: it keeps no checkpoints, reports to nobody and starts on one process.
QUIET: dict[str, Any] = {
    "report_to": "none", "save_strategy": "no", "eval_strategy": "no", "load_best_model_at_end": False, "push_to_hub": False,
    "disable_tqdm": True, "reference_cache": None,
}  # fmt: skip
ENDS = 6  # tokens shown at either end of a long run of one speaker


@dataclass(frozen=True)
class Preflight(Report):
    """The report, and the chosen rows as they are trained on: what `--show` prints and `--json` carries.

    rows: for each {"row", "terminated", "tokens": [{"position", "id", "text", "policy", "reward", "rho", "D"}]}; rho and D
    (2 beta D is the gradient by the token's logit, F3) are null off the policy's tokens, and D for losses without F3.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)


def preflight(
    config: run.Config, *, rows: int = 16, name: str = "", on_result: Callable[[Result], None] | None = None
) -> Preflight:
    """Every check on a configuration's own model, data and settings. Raises ValueError where these cannot be loaded."""
    at_least("rows", rows, 1)
    with tempfile.TemporaryDirectory() as folder:
        job = run.load(config, output_dir=folder, **QUIET)
        subject = Subject(job, rows)
        report = run_checks(CHECKS, subject, name=name or str(config.folder), kind="preflight", on_result=on_result)
        return Preflight(**vars(report), rows=seen(subject))


def seen(subject: Subject) -> list[dict[str, Any]]:
    """The chosen rows, token by token, with what the loss makes of them before the first step."""
    try:
        return [_tokens(subject, i) for i in range(len(subject.rows))]
    except (Skip, ValueError):  # no rows, no trainer, no batch
        return []


def _tokens(s: Subject, i: int) -> dict[str, Any]:
    row, rho = s.rows[i], iter(s.base[i][4].tolist())
    tokens, before, past = [], 0.0, []
    for position, (token, acts, reward) in enumerate(zip(row.input_ids, row.completion_mask, row.rewards, strict=True)):
        entry = {"position": position, "id": token, "text": s.job.tokenizer.decode([token]), "policy": bool(acts)}
        own = next(rho) if acts else None
        pushed = None
        if own is not None and s.args.loss in ("shiq", "shifted"):
            past.append(own)
            n = s.args.steps_ahead
            dropped = s.args.gamma**n * past[-1 - n] if n is not None and len(past) > n else 0.0
            pushed = before = own + s.args.gamma * before - dropped
        tokens.append(entry | {"reward": float(reward) if acts else None, "rho": own, "D": pushed})
    return {"row": s.chosen[i], "terminated": bool(row.terminated), "tokens": tokens}


# ---------------------------------------------------------------------------------------------------------------- showing
def table(row: Mapping[str, Any]) -> Table:
    """A row for a person: position, token, who chose it, reward, rho and D; the middle of long runs is left out."""
    title = f"row {row['row']}{'' if row['terminated'] else ', cut'} (D < 0: will be likelier)"
    shown = Table("", "token", "who", "reward", "rho", "D", box=None, pad_edge=False, header_style="bold")
    shown.title, shown.title_justify, shown.title_style = title, "left", "bold"
    for column in (0, 3, 4, 5):
        shown.columns[column].justify = "right"
    shown.columns[1].max_width, shown.columns[1].overflow, shown.columns[1].no_wrap = 48, "ellipsis", True
    number = lambda x: "" if x is None else f"{x:.4g}"  # noqa: E731
    for who, tokens in _speakers(row["tokens"]):
        middle = range(ENDS, len(tokens) - ENDS)
        for k, t in enumerate(tokens):
            if len(middle) > 1 and k in middle and not t["reward"]:
                if k == ENDS:
                    shown.add_row("", f"[dim]... {len(middle)} tokens[/dim]", "", "", "", "")
                continue
            style = "bold green" if t["policy"] else "dim"
            paid = number(t["reward"]) if t["reward"] else ""
            shown.add_row(str(t["position"]), escape(repr(t["text"])), who, paid, number(t["rho"]), number(t["D"]), style=style)
    return shown


def _speakers(tokens: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Runs of tokens of one speaker."""
    found: list[tuple[str, list[dict[str, Any]]]] = []
    for t in tokens:
        who = "policy" if t["policy"] else "environment"
        if not found or found[-1][0] != who:
            found.append((who, []))
        found[-1][1].append(t)
    return found


# ------------------------------------------------------------------------------------------------------------ the command
def run_command(
    path: str, *, rows: int = 16, show_rows: int = 2, json: str | None = None, junit: str | None = None,
    html: str | None = None, markdown: str | None = None, out: Console | None = None, err: Console | None = None,
) -> int:  # fmt: skip
    """Read, check, show, write; the exit code. Every way into 2 ends in one sentence, and in the files that were asked for."""
    out, err = out or Console(), err or Console(stderr=True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    asked = None
    try:
        asked = order([path], json=json, junit=junit, html=html, markdown=markdown)
        at_least("--rows", rows, 1)
        at_least("--show", show_rows, 0)
        report = preflight(run.read(path), rows=rows, name=path)
        outcome = Outcome(path, report)
    except (ValueError, OSError) as error:
        return _could_not(path, str(error), asked, err)
    except Exception as error:  # of a model or a tokenizer, which are programs of their own
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return _could_not(
            path, f"it could not be run: {last_line(error)} ({Path(frame.filename).name}:{frame.lineno})", asked, err
        )
    to = err if asked.prints_json else out
    for row in report.rows[:show_rows]:
        to.print(table(row))
        to.print()
    show(outcome, to)
    try:
        deliver(asked, [outcome])
    except ValueError as error:
        return _could_not(path, str(error), None, err)
    return HOLDS if outcome.passed else FAILS


def _could_not(path: str, why: str, asked: Order | None, err: Console) -> int:
    err.print(f"[red]error[/red] {escape(why)}", soft_wrap=True, highlight=False)
    if asked is not None:
        try:
            deliver(asked, [Outcome(path, error=why)])
        except ValueError as error:
            err.print(f"[red]error[/red] {escape(str(error))}", soft_wrap=True, highlight=False)
    return COULD_NOT_RUN
