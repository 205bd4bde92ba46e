"""The bar: nothing for short work, nothing on standard output, one at a time, and never in the way of an error."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from shiq_lab import progress as module
from shiq_lab.progress import progress


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """A standard error that says it is a terminal, and a clock that moves a second a look."""
    screen = io.StringIO()
    monkeypatch.setattr(module, "Console", lambda stderr: Console(file=screen, force_terminal=True, width=80))
    monkeypatch.setattr(module, "sys", SimpleNamespace(stderr=SimpleNamespace(isatty=lambda: True)))
    clock = iter(range(10**6))
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    return screen


def test_short_work_shows_nothing(terminal: io.StringIO) -> None:
    assert list(progress(range(2), "short")) == [0, 1]
    assert terminal.getvalue() == ""


def test_long_work_shows_its_label_and_yields_everything(terminal: io.StringIO, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress(iter(range(6)), "long work", total=6)) == list(range(6))
    assert "long work" in terminal.getvalue()
    assert capsys.readouterr().out == ""


def test_a_bar_inside_a_bar_stays_silent(terminal: io.StringIO) -> None:
    seen = [(i, j) for i in progress(range(5), "outer") for j in progress(range(5), "inner")]
    assert len(seen) == 25
    assert "outer" in terminal.getvalue() and "inner" not in terminal.getvalue()


def test_after_an_error_the_next_bar_works(terminal: io.StringIO) -> None:
    with pytest.raises(RuntimeError, match="planted"):
        for i in progress(range(9), "first"):
            if i == 5:
                raise RuntimeError("planted")
    assert list(progress(range(6), "second")) == list(range(6))
    assert "second" in terminal.getvalue()


def test_the_bar_counts_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """After two seconds, on standard error, up to the last item; a bar inside another one is none."""
    events: list[object] = []

    class Bar:
        def __init__(self, *columns: object, console: Console, **options: object) -> None:
            assert console.stderr

        def add_task(self, label: str, total: int | None) -> int:
            events.append((label, total))
            return 0

        def start(self) -> None:
            events.append("start")

        def advance(self, task: int) -> None:
            events.append("advance")

        def stop(self) -> None:
            events.append("stop")

    clock = iter(range(100))
    monkeypatch.setattr(module, "Progress", Bar)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    assert [list(progress("xy", "inner")) for _ in progress(range(4), "outer")] == [["x", "y"]] * 4
    assert events == [("outer", 4), "advance", "advance", "start", "advance", "advance", "stop"]
