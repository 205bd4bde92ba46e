"""What a report looks like to people and to machines: nothing lost, nothing broken by hostile text, readable in both modes."""

import json
import math
import os
import re
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from shiq_lab.checks import render
from shiq_lab.checks.render import COLORS, Outcome, as_html, as_json, as_junit, as_markdown, number, show, write
from shiq_lab.checks.report import EXPECTED, FAILED, PASSED, SKIPPED, WARNED, Measured, Report, Result

HOSTILE = '</style><script>alert("x")</script> & [red]|`\x00\x1b[31m\ud800 ✂\n| row'
MISSES = tuple(Measured(f"part {i}", float(i), 0.5, 3, "small", f"row {i}") for i in range(60))


def result(status: str, name: str = "FP", **more: object) -> Result:
    known = {"measured": 0.1, "tolerance": 1e-13, "compared": 7, "message": f"message of {name}", "hint": f"hint of {name}"}
    return Result(name, f"title of {name}", status, **(known | more))  # type: ignore[arg-type]


def mixed() -> Outcome:
    rows = [
        result(PASSED, "OK", where="row 5"), result(FAILED, "BAD", measured=math.nan, measurements=MISSES),
        result(WARNED, "HM"), result(SKIPPED, "NO", measured=None, tolerance=None, reason="does not apply", message=""),
        result(EXPECTED, "KNOWN", reason="issue 12"),
    ]  # fmt: skip
    return Outcome("my.py:loss", Report("my.py:loss", "bellman", rows, ["reduction: sum"], 1.5))


def printed(outcome: Outcome, quiet: bool = False) -> str:
    stream = StringIO()
    show(outcome, Console(file=stream, width=140), quiet)
    return stream.getvalue()


# ----------------------------------------------------------------------------------------------------------- verdicts
def test_verdicts() -> None:
    of = lambda *statuses: Outcome("x", Report("x", "bellman", [result(s, s.upper()) for s in statuses]))  # noqa: E731
    assert of(PASSED, SKIPPED, WARNED).verdict == "all checks hold" and of(PASSED).passed
    assert of(PASSED, FAILED).verdict == "1 check failed: FAILED" and not of(PASSED, FAILED).passed
    assert of(FAILED, FAILED).verdict.startswith("2 checks failed")
    assert of(SKIPPED).verdict.startswith("nothing was checked") and not of(SKIPPED).passed and not of().passed
    assert Outcome("x", error="no file").verdict == "not checked: no file" and not Outcome("x", error="no file").passed


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (0.0, "0"), (0.144, "0.144"), (1.2e-13, "1.2e-13"), (2.0, "2"), (54321.0, "5.4e+04"), (math.nan, "nan")],
)
def test_numbers(value: float | None, text: str) -> None:
    assert number(value) == text


# ------------------------------------------------------------------------------------------------------------ console
def test_the_console_shows_every_check_and_explains_what_did_not_pass() -> None:
    text = printed(mixed())
    for name in ("OK", "BAD", "HM", "NO", "KNOWN"):
        assert f"title of {name}" in text
    assert "(does not apply)" in text and "known: issue 12. message of KNOWN" in text and "note: reduction: sum" in text
    for name in ("BAD", "HM"):
        assert f"message of {name}" in text and f"usually: hint of {name}" in text
    assert "message of OK" not in text and text.rstrip().endswith(
        "1 check failed: BAD (1 passed, 1 warning: HM, 1 expected failure: KNOWN, 1 skipped, 1.5 s)"
    )


def test_quiet_keeps_failures_warnings_and_the_verdict() -> None:
    """Nothing else: no empty line above the first, one between two."""
    text = printed(mixed(), quiet=True)
    for name in ("BAD", "HM"):
        assert f"message of {name}" in text and f"usually: hint of {name}" in text
    assert "title of OK" not in text and "message of KNOWN" not in text
    assert text.startswith("FAIL BAD") and "\n\nwarn HM" in text and text.count("\n\n") == 1
    assert "\n\nFAIL BAD" in printed(mixed()), "the table is set off from what follows"


@pytest.mark.parametrize(
    ("statuses", "said"),
    [
        ([PASSED] * 16 + [SKIPPED] * 4, "all checks hold (16 passed, 4 skipped, 1.2 s)"),
        ([PASSED, WARNED, SKIPPED], "all checks hold (1 passed, 1 warning: C1, 1 skipped, 1.2 s)"),
        ([WARNED, PASSED, WARNED], "all checks hold (1 passed, 2 warnings: C0, C2, 1.2 s)"),
        ([FAILED, FAILED, PASSED], "2 checks failed: C0, C1 (1 passed, 1.2 s)"),
        ([FAILED], "1 check failed: C0 (0 passed, 1.2 s)"),
    ],
)
def test_the_closing_line_counts_what_became_of_every_check(statuses: list[str], said: str) -> None:
    """A skip or a warning is never counted as a pass."""
    rows = [result(s, f"C{i}") for i, s in enumerate(statuses)]
    assert printed(Outcome("x", Report("x", "bellman", rows, [], 1.2)), quiet=True).splitlines()[-1] == f"x  {said}"


LEVEL_MOVES = Measured("the value moves", 0.0327, 4.9e-29, 3, "one turn", "row 1", at_least=True)
SLOPES = Measured("slope", 1.2e-11, 7.3e-9, 4, "two turns", "row 2"), Measured("slope", 1.3e-12, 7.3e-9, 4, "small", "row 3")


def test_a_pass_shows_its_deviation_and_not_that_something_moved() -> None:
    """Of the deviations the nearest to its bound, with its own place; what must differ is shown where there is no other."""
    bare = {"measured": 0.0327, "tolerance": 4.9e-29, "at_least": True, "environment": "one turn", "where": "row 1"}
    outcome = lambda r: Outcome("x", Report("x", "bellman", [r]))  # noqa: E731
    passed = outcome(result(PASSED, **bare, measurements=(LEVEL_MOVES, *SLOPES)))
    assert "1.2e-11  ≤ 7.3e-09" in printed(passed) and "0.0327" not in printed(passed)
    page = "".join(Page(as_html([passed])).words)
    assert "1.2e-11 ≤ 7.3e-09" in page and "two turns" in page and "row 2" in page and "0.0327" not in page
    for same in (
        result(PASSED, **bare, measurements=(LEVEL_MOVES,)),
        result(FAILED, **bare, measurements=(LEVEL_MOVES, *SLOPES)),
    ):
        assert "0.0327  ≥ 4.9e-29" in printed(outcome(same)), same.status


def test_hostile_text_is_shown_as_it_is() -> None:
    """No markup of rich in a user's message is obeyed."""
    text = printed(Outcome("x", Report("x", "bellman", [result(FAILED, message="a [red]b[/red] [/] c", hint="[/nothing]")])))
    assert "a [red]b[/red] [/] c" in text and "[/nothing]" in text


# --------------------------------------------------------------------------------------------------------------- JSON
def test_json_is_strict_and_whole() -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    one = json.loads(as_json([mixed()]), parse_constant=refuse)
    assert one["results"][1]["measured"] == "nan" and one["passed"] is False
    assert [r["status"] for r in one["results"]] == ["passed", "failed", "warned", "skipped", "expected failure"]
    several = json.loads(as_json([mixed(), Outcome("y", error=HOSTILE)]), parse_constant=refuse)
    assert several["reports"][0] == one and several["reports"][1]["error"] == HOSTILE and several["passed"] is False


# -------------------------------------------------------------------------------------------------------------- JUnit
def test_junit_has_a_case_a_check() -> None:
    root = ElementTree.fromstring(as_junit([mixed(), Outcome("gone", error="it hangs")]))
    first, second = root
    assert {k: first.get(k) for k in ("tests", "failures", "errors", "skipped")} == {
        "tests": "5", "failures": "1", "errors": "0", "skipped": "2",
    }  # fmt: skip
    cases = {case.get("name"): case for case in first.iter("testcase")}
    assert list(cases) == ["OK", "BAD", "HM", "NO", "KNOWN"] and len(cases["OK"]) == 0
    failure = cases["BAD"].find("failure")
    assert failure is not None and failure.get("message") == "message of BAD" and "hint of BAD" in str(failure.text)
    assert "message of HM" in cases["HM"].findtext("system-out", "")
    reasons = {name: cases[name].find("skipped").get("message") for name in ("NO", "KNOWN")}  # type: ignore[union-attr]
    assert reasons == {"NO": "does not apply", "KNOWN": "known: issue 12. message of KNOWN"}
    assert second.get("errors") == "1" and second.find("testcase/error").get("message") == "it hangs"  # type: ignore[union-attr]


def test_junit_stands_characters_that_xml_does_not() -> None:
    text = as_junit([Outcome(HOSTILE, Report("x", "bellman", [result(FAILED, message=HOSTILE)], [HOSTILE]))])
    said = ElementTree.fromstring(text.encode("utf-8")).find("testsuite/testcase/failure").get("message", "")  # type: ignore[union-attr]
    assert said.startswith('</style><script>alert("x")</script> & [red]|`\ufffd\ufffd[31m\ufffd ✂')


# ----------------------------------------------------------------------------------------------------------- Markdown
def test_markdown_keeps_its_table_whatever_the_message_says() -> None:
    text = as_markdown([Outcome("x", Report("x", "bellman", [result(FAILED, message=HOSTILE), result(PASSED)]))])
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 3 and all(len(re.findall(r"(?<!\\)\|", row)) == 5 for row in rows)
    assert "<script>" not in text and "1 failed, 1 passed" not in text and "(1 passed, 1 failed)" in text


# --------------------------------------------------------------------------------------------------------------- HTML
VOID = {"meta"}


class Page(HTMLParser):
    """Reads a page strictly: every tag closed in order; keeps rows, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.seen if name == tag]


def test_html_is_well_formed_with_a_row_a_check_and_failures_open() -> None:
    page = Page(as_html([mixed()]))
    rows = page.attributes("details")
    assert [r["class"] for r in rows] == ["passed", "failed", "warned", "skipped", "expected"]
    assert ["open" in r for r in rows] == [False, True, False, False, False]
    text = "\n".join(page.words)
    for piece in ("title of OK", "row 5", "message of BAD", "hint of BAD", "does not apply", "issue 12", "reduction: sum"):
        assert piece in text
    assert "measured, then its bound." in text
    assert "part 59" in text and "part 3:" not in text and "more that miss their bound" in text, "the worst are kept"


def test_html_needs_nothing_from_elsewhere_and_runs_nothing() -> None:
    text = as_html(
        [Outcome(HOSTILE, Report("x", "bellman", [result(FAILED, HOSTILE, message=HOSTILE, hint=HOSTILE)], [HOSTILE]))]
    )
    page = Page(text)
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.seen}
    assert not [a for _, attrs in page.seen for a in attrs if a in ("src", "href", "style") or a.startswith("on")]
    assert "url(" not in text and "@import" not in text and "http" not in text
    text.encode("utf-8")


def test_html_stays_small() -> None:
    """Twenty checks with all that can be wrong with them."""
    rows = [result(FAILED, f"C{i}", measurements=MISSES[:8]) for i in range(20)]
    assert len(as_html([Outcome("x", Report("x", "bellman", rows))])) < 60_000


def contrast(one: str, other: str) -> float:
    """WCAG 2: (L1 + 0.05) / (L2 + 0.05) of the relative luminances."""

    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("mode", COLORS)
def test_every_text_can_be_read_on_every_ground(mode: str) -> None:
    """At least 4.5 : 1, the bound of WCAG AA for small text, on the card and on the page (a row under the pointer)."""
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    colors = COLORS[mode]
    texts = set(colors) - {"page", "card", "line"}
    low = {(t, g): contrast(colors[t], colors[g]) for t in texts for g in ("card", "page")}
    assert len(low) == 14 and min(low.values()) >= 4.5, low


def test_the_page_follows_the_device_and_fits_a_phone() -> None:
    text = as_html([mixed()])
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert "@media (prefers-color-scheme:dark)" in text and "color-scheme:light dark" in text
    assert set(re.findall(r"var\(--(\w+)\)", text)) - {"tone"} <= set(COLORS["light"]) == set(COLORS["dark"])
    fixed = [float(n) for n in re.findall(r"(?<![-\w.])(?:min-)?width:\s*([\d.]+)(?:px|rem)", text)]
    assert not fixed, "nothing has a width of its own"


# -------------------------------------------------------------------------------------------------------------- files
def test_a_file_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, link = tmp_path / "new" / "r.txt", tmp_path / "link"
    write(target, "one ✂\ud800")
    assert target.read_text() == "one ✂?"
    link.symlink_to(target)
    write(link, "two")
    assert link.is_symlink() and target.read_text() == "two" and len(list(target.parent.iterdir())) == 1
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    end = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    write(pipe, "three")
    assert pipe.is_fifo() and os.read(end, 10) == b"three", "a pipe or a device is written to, not replaced"
    os.close(end)
    seen: list[str] = []
    monkeypatch.setattr(Path, "replace", lambda self, to: seen.append(self.read_text()))
    write(target, "four")
    assert seen == ["four"] and target.read_text() == "two", "the whole text lay there before it took the place"


def test_statuses_have_a_style_a_word_and_a_tone() -> None:
    assert set(render.STYLES) == set(render.SHORT) == set(render.TONES) == {PASSED, FAILED, WARNED, SKIPPED, EXPECTED}
