"""A report for people and for machines: the console's table, JUnit XML, a job summary in Markdown, one HTML file, JSON.

All are functions of `Outcome`s and return text (`show` prints); `write` puts a text in its place in one step.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape as html_escape
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from shiq_lab.checks.report import EXPECTED, FAILED, PASSED, SKIPPED, WARNED, Report, Result

STYLES = {PASSED: "green", FAILED: "red", WARNED: "yellow", SKIPPED: "dim", EXPECTED: "yellow"}
SHORT = {PASSED: "ok", FAILED: "FAIL", WARNED: "warn", SKIPPED: "skip", EXPECTED: "known"}
MOST_MEASUREMENTS = 40  # a check in the HTML file: the worst ones


@dataclass(frozen=True)
class Outcome:
    """What became of one loss: its report, or why there is none."""

    name: str
    report: Report | None = None
    error: str = ""

    @property
    def passed(self) -> bool:
        """True where the loss could be run and all its checks hold."""
        return self.report is not None and self.report.passed

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self.report is None:
            return f"not checked: {self.error}"
        if self.report.failed:
            return f"{_number(len(self.report.failed), 'check')} failed: {', '.join(self.report.failed)}"
        return "all checks hold" if self.passed else "nothing was checked: every check was skipped, warned or known to fail"

    @property
    def counts(self) -> dict[str, int]:
        """How many results of each status, in a fixed order, none left out that occurs."""
        seen = Counter(r.status for r in self.results)
        return {status: seen[status] for status in STYLES if seen[status]}

    @property
    def results(self) -> list[Result]:
        """What its checks measured; empty where it could not be run."""
        return self.report.results if self.report else []


def _number(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")


def number(value: float | None) -> str:
    """As the tables show it: three digits, "" for none."""
    if value is None:
        return ""
    return f"{value:.1e}" if math.isfinite(value) and value != 0 and not 1e-2 <= abs(value) < 1e4 else f"{value:.3g}"


def explanation(result: Result) -> str:
    """Why a check did not simply pass: what was seen, or the reason."""
    if result.status == SKIPPED:
        return result.reason
    if result.status == EXPECTED:
        return f"known: {result.reason}. {result.message}".strip()
    return result.message


# ------------------------------------------------------------------------------------------------------------ console
def show(outcome: Outcome, console: Console, quiet: bool = False) -> None:
    """The table, then every failure and warning in full, then the verdict. quiet: no table, no notes, nothing expected."""
    report = outcome.report
    title = f"[bold]{escape(outcome.name)}[/bold]"
    if report is None:
        console.print(f"{title}  [bold red]{escape(outcome.verdict)}[/bold red]", highlight=False, soft_wrap=True)
        return
    if not quiet:
        console.print(f"{title}  kind {report.kind}", highlight=False, soft_wrap=True)
        console.print(_table(report))
        for note in report.notes:
            console.print(f"note: {note}", style="dim", markup=False, highlight=False, soft_wrap=True)
    told = (FAILED, WARNED) if quiet else (FAILED, WARNED, EXPECTED)
    for i, result in enumerate(r for r in report.results if r.status in told):
        if i or not quiet:
            console.print()
        _details(result, console)
    style = "bold green" if outcome.passed else "bold red"
    console.print(f"{title}  [{style}]{escape(outcome.verdict)}[/{style}] ({tally(outcome)})", highlight=False, soft_wrap=True)


def tally(outcome: Outcome) -> str:
    """`16 passed, 1 warning: MI, 3 skipped, 1.2 s`: every check is counted; the failures, which the verdict names, are not."""
    names = {status: [r.name for r in outcome.results if r.status == status] for status in STYLES}
    parts = [f"{len(names[PASSED])} passed"]
    for status, word in ((WARNED, "warning"), (EXPECTED, "expected failure")):
        if names[status]:
            parts.append(f"{_number(len(names[status]), word)}: {', '.join(names[status])}")
    if names[SKIPPED]:
        parts.append(f"{len(names[SKIPPED])} skipped")
    return ", ".join([*parts, f"{outcome.report.seconds if outcome.report else 0.0:.1f} s"])


def telling(r: Result) -> Result:
    """The same with what a reader wants to see as its measurement: of a pass, how small the largest deviation was.

    "Something must differ by this much" can be nearest to its bound and still say nothing of how exact the check was.
    """
    deviations = [m for m in r.measurements if not m.at_least]
    if r.status != PASSED or not r.at_least or not deviations:
        return r
    m = max(deviations, key=lambda m: m.badness)
    return replace(r, measured=m.value, tolerance=m.tolerance, at_least=False, environment=m.environment, where=m.where)


def bound(r: Result) -> str:
    """The bound with its direction; nothing where nothing was measured."""
    return f"{'≥' if r.at_least else '≤'} {number(r.tolerance)}" if r.tolerance is not None else ""


def _table(report: Report) -> Table:
    table = Table("", "check", "what it asks", "measured", "bound", "numbers", box=None, pad_edge=False, header_style="bold")
    for column in (3, 4, 5):
        table.columns[column].justify = "right"
        table.columns[column].no_wrap = True
    for r in map(telling, report.results):
        mark = f"[{STYLES[r.status]}]{SHORT[r.status]}[/]"
        title = escape(r.title) + (f" [dim]({escape(r.reason)})[/dim]" if r.status == SKIPPED else "")
        numbers = str(r.compared) if r.compared else ""
        table.add_row(mark, escape(r.name), title, number(r.measured), bound(r), numbers)
    return table


def _details(result: Result, console: Console) -> None:
    style = STYLES[result.status]
    head = f"[{style}]{SHORT[result.status]}[/{style}] [bold]{escape(result.name)}[/bold]"
    console.print(f"{head}  {escape(explanation(result))}", highlight=False, soft_wrap=True)
    if result.hint and result.status != EXPECTED:
        console.print(f"     usually: {result.hint}", style="dim", markup=False, highlight=False, soft_wrap=True)


# ----------------------------------------------------------------------------------------------------------- machines
def as_json(outcomes: Sequence[Outcome]) -> str:
    """One loss: its report's own JSON. Several: {"passed", "reports": [...]}. A loss without a report has an "error"."""
    data = [_data(outcome) for outcome in outcomes]
    whole = data[0] if len(data) == 1 else {"passed": bool(data) and all(d["passed"] for d in data), "reports": data}
    return json.dumps(whole, indent=1, allow_nan=False)


def _data(outcome: Outcome) -> dict[str, Any]:
    if outcome.report is None:
        return {"passed": False, "subject": outcome.name, "kind": "", "results": [], "notes": [], "error": outcome.error}
    return json.loads(outcome.report.to_json())


def as_junit(outcomes: Sequence[Outcome]) -> str:
    """JUnit XML: a suite a loss, a test case a check; warnings and expected failures in system-out."""
    root = ElementTree.Element("testsuites", name="shiq-lab")
    for outcome in outcomes:
        results, name = outcome.results, _xml(outcome.name)
        counts = {
            "tests": str(max(len(results), 1)), "failures": str(sum(r.status == FAILED for r in results)),
            "errors": str(int(outcome.report is None)),
            "skipped": str(sum(r.status in (SKIPPED, EXPECTED) for r in results)),
        }  # fmt: skip
        seconds = outcome.report.seconds if outcome.report else 0.0
        suite = ElementTree.SubElement(root, "testsuite", {"name": name, "time": f"{seconds:.3f}", **counts})
        if outcome.report is None:
            case = ElementTree.SubElement(suite, "testcase", classname=name, name="run", time="0.000")
            ElementTree.SubElement(case, "error", message=_xml(outcome.error)).text = _xml(outcome.error)
        for r in results:
            _case(suite, name, r)
        if outcome.report and outcome.report.notes:
            ElementTree.SubElement(suite, "system-out").text = _xml("\n".join(outcome.report.notes))
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _case(suite: ElementTree.Element, classname: str, r: Result) -> None:
    case = ElementTree.SubElement(suite, "testcase", classname=classname, name=_xml(r.name), time=f"{r.seconds:.3f}")
    if r.status == FAILED:
        text = r.message + (f"\nUsually: {r.hint}" if r.hint else "")
        ElementTree.SubElement(case, "failure", message=_xml(r.message), type=_xml(r.name)).text = _xml(text)
    elif r.status in (SKIPPED, EXPECTED):
        ElementTree.SubElement(case, "skipped", message=_xml(explanation(r)))
    if r.status == WARNED:
        ElementTree.SubElement(case, "system-out").text = _xml(f"warning: {r.message}\nUsually: {r.hint}")


def _xml(text: str) -> str:
    """Without the characters that XML 1.0 cannot hold, escaped or not."""
    return re.sub("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)


def as_markdown(outcomes: Sequence[Outcome]) -> str:
    """For a job summary: the verdict, then a table of what did not simply pass."""
    cell = lambda text: html_escape(" ".join(text.split()), quote=False).replace("|", "\\|")  # noqa: E731
    lines = []
    for outcome in outcomes:
        mark = "✅" if outcome.passed else "❌"
        lines += [f"### {mark} {cell(outcome.name)}", "", cell(outcome.verdict) + _counted(outcome), ""]
        rows = [r for r in outcome.results if r.status != PASSED]
        if rows:
            lines += ["| | check | what was seen | usually |", "|---|---|---|---|"]
            for r in rows:
                hint = r.hint if r.status in (FAILED, WARNED) else ""
                lines.append(f"| {SHORT[r.status]} | **{cell(r.name)}** | {cell(explanation(r))} | {cell(hint)} |")
            lines.append("")
    return "\n".join(lines)


def _counted(outcome: Outcome) -> str:
    return f" ({', '.join(f'{n} {status}' for status, n in outcome.counts.items())})" if outcome.report else ""


# --------------------------------------------------------------------------------------------------------------- HTML
# Each pair (text, ground) has a contrast of at least 4.5 : 1 in both modes; a test computes it.
COLORS = {
    "light": {
        "text": "#1c1e21", "dim": "#5b6068", "page": "#f6f7f8", "card": "#ffffff", "line": "#d9dce0",
        "passed": "#11702f", "failed": "#b3141e", "warned": "#855400", "skipped": "#5b6068", "expected": "#6a45a8",
    },
    "dark": {
        "text": "#e7e9ec", "dim": "#a2a8b1", "page": "#121417", "card": "#1c1f24", "line": "#343941",
        "passed": "#5dd584", "failed": "#ff8b85", "warned": "#f0b94f", "skipped": "#a2a8b1", "expected": "#c3a6f5",
    },
}  # fmt: skip
CSS = """
*{box-sizing:border-box}
body{margin:0;padding:1rem;background:var(--page);color:var(--text);
  font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;-webkit-text-size-adjust:100%}
main{max-width:60rem;margin:0 auto}
h1{font-size:1.15rem;margin:0 0 1rem}
h2{font-size:1.05rem;margin:0;overflow-wrap:anywhere}
section{background:var(--card);border:1px solid var(--line);border-radius:.6rem;margin:0 0 1.2rem;overflow:hidden}
header{padding:.8rem 1rem;border-left:.4rem solid var(--tone)}
header p{margin:.2rem 0 0;overflow-wrap:anywhere}
.verdict{font-weight:600;color:var(--tone)}
.dim,dt{color:var(--dim);font-size:.875rem}
details{border-top:1px solid var(--line)}
summary{display:grid;grid-template-columns:4.2rem 4rem minmax(0,1fr) auto;gap:.15rem .6rem;align-items:baseline;
  padding:.65rem 1rem;cursor:pointer;list-style:none}
summary::-webkit-details-marker{display:none}
summary:hover,summary:focus-visible{background:var(--page)}
.status{color:var(--tone);font-weight:700;font-size:.875rem}
.code{font-weight:600;overflow-wrap:anywhere}
.title{overflow-wrap:anywhere}
.figure{font-variant-numeric:tabular-nums;color:var(--dim);font-size:.875rem;text-align:right;white-space:nowrap}
.more{padding:0 1rem .9rem;overflow-wrap:anywhere}
.more p{margin:.3rem 0}
.more b{color:var(--tone)}
ul{margin:.4rem 0 0;padding-left:1.1rem;font-size:.875rem}
dl{display:grid;grid-template-columns:auto minmax(0,1fr);gap:.1rem .8rem;margin:.4rem 0 0}
dd{margin:0;font-size:.875rem}
@media (max-width:34rem){
  body{padding:.5rem}
  summary{grid-template-columns:3.2rem minmax(0,1fr) auto;padding:.7rem .75rem}
  .title{grid-column:1/-1;grid-row:2}
  header,.more{padding-left:.75rem;padding-right:.75rem}
}
@media print{summary{cursor:auto}}
"""
LEGEND = '<p class="dim">At the right of a check: measured, then its bound.</p>'
TONES = {PASSED: "passed", FAILED: "failed", WARNED: "warned", SKIPPED: "skipped", EXPECTED: "expected"}


def as_html(outcomes: Sequence[Outcome]) -> str:
    """One file that needs nothing else: a row a check, failures open; light or dark as the reader's device is set."""
    good = bool(outcomes) and all(o.passed for o in outcomes)
    title = f"shiq-lab: {'all checks hold' if good else 'not all checks hold'}"
    body = "\n".join(_section(outcome) for outcome in outcomes)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{_html(title)}</title>\n<style>{_palette()}{CSS}</style>\n</head>\n"
        f"<body>\n<main>\n<h1>{_html(title)}</h1>\n{body}\n{LEGEND}\n</main>\n</body>\n</html>\n"
    )


def _html(text: str) -> str:
    return html_escape(_xml(text), quote=True)


def _palette() -> str:
    lists = {mode: "".join(f"--{k}:{v};" for k, v in colors.items()) for mode, colors in COLORS.items()}
    tones = "".join(f".{tone}{{--tone:var(--{tone})}}" for tone in TONES.values())
    dark = f"@media (prefers-color-scheme:dark){{:root{{{lists['dark']}}}}}"
    return f":root{{color-scheme:light dark;{lists['light']}}}{dark}{tones}"


def _section(outcome: Outcome) -> str:
    tone, report = "passed" if outcome.passed else "failed", outcome.report
    about = (
        [f"kind {report.kind}", f"{report.seconds:.1f} s", *(f"{n} {s}" for s, n in outcome.counts.items())] if report else []
    )
    notes = "".join(f'<p class="dim">{_html(note)}</p>' for note in (report.notes if report else []))
    head = (
        f'<header><h2>{_html(outcome.name)}</h2><p class="verdict">{_html(outcome.verdict)}</p>'
        f'<p class="dim">{_html(" · ".join(about))}</p>{notes}</header>'
    )
    rows = "\n".join(_row(telling(r)) for r in outcome.results)
    return f'<section class="{tone}">\n{head}\n{rows}\n</section>'


def _row(r: Result) -> str:
    figure = f"{number(r.measured)} {bound(r)}" if r.measured is not None else ""
    return (
        f'<details class="{TONES[r.status]}"{" open" if r.status == FAILED else ""}><summary>'
        f'<span class="status">{SHORT[r.status]}</span><span class="code">{_html(r.name)}</span>'
        f'<span class="title">{_html(r.title)}</span><span class="figure">{_html(figure)}</span></summary>'
        f'<div class="more">{_more(r)}</div></details>'
    )


def _more(r: Result) -> str:
    said = explanation(r)
    parts = [f"<p>{_html(said)}</p>"] if said else []
    if r.hint and r.status in (FAILED, WARNED):
        parts.append(f"<p><b>Usually:</b> {_html(r.hint)}</p>")
    facts = {"numbers compared": str(r.compared) if r.compared else "", "time": f"{r.seconds:.2f} s"}
    if r.status == PASSED:  # the others say these in their sentence
        facts = {"environment": r.environment, "where": r.where, **facts}
    parts.append("<dl>" + "".join(f"<dt>{k}</dt><dd>{_html(v)}</dd>" for k, v in facts.items() if v) + "</dl>")
    missed = [m for m in sorted(r.measurements, key=lambda m: -m.badness) if not m.holds and m.sentence() != r.message]
    if missed:
        parts.append("<ul>" + "".join(f"<li>{_html(m.sentence())}</li>" for m in missed[:MOST_MEASUREMENTS]) + "</ul>")
        if len(missed) > MOST_MEASUREMENTS:
            parts.append(f'<p class="dim">and {len(missed) - MOST_MEASUREMENTS} more that miss their bound</p>')
    return "".join(parts)


# -------------------------------------------------------------------------------------------------------------- files
def write(path: Path, text: str) -> None:
    """The whole text or nothing: a new file that takes the old one's place. Devices and pipes are written to directly."""
    data, path = text.encode("utf-8", "replace"), path.resolve()
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        draft.write_bytes(data)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
