"""The committed figures and pages: complete, what their numbers say, and the commands that make them."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shiq_lab import cli, gallery
from shiq_lab.studies import page, table
from shiq_lab.studies.frame import Result, plain
from shiq_lab.studies.table import STUDIES
from shiq_lab.studies.tiny_truth import TINY

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "figures"
FEW = ("tiny", "real-lm", "bfcl", "scale")  # a network or a real model a run, or nothing random: one or two seeds
every_study = pytest.mark.parametrize("name", STUDIES)


def committed(name: str) -> Result:
    return Result.read(FIGURES / f"{name}.json")


def test_nothing_is_missing_and_nothing_is_left_over() -> None:
    kinds = ("png", "svg", "json")
    assert {p.name for p in FIGURES.iterdir()} == {f"{name}.{kind}" for name in gallery.NAMES for kind in kinds}


NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


def same_drawing(first: Path, second: Path) -> bool:
    """The same SVG but for the last digits of coordinates, which another processor may round otherwise."""
    texts = [path.read_text(encoding="utf-8") for path in (first, second)]
    skeletons, numbers = ([f(text) for text in texts] for f in (lambda t: NUMBER.sub("#", t), NUMBER.findall))
    near = (a == b or abs(float(a) - float(b)) <= 1e-3 * (1 + abs(float(b))) for a, b in zip(*numbers, strict=False))
    return skeletons[0] == skeletons[1] and len(numbers[0]) == len(numbers[1]) and all(near)


def near(first: Any, second: Any) -> bool:
    """The same JSON; floats to 1e-9 of their size, as sums may be taken in another order elsewhere; rounding is no number."""
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(near(first[k], second[k]) for k in first)
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(near, first, second))
    if isinstance(first, float) and isinstance(second, float):
        return abs(first - second) <= 1e-9 * abs(second) + 1e-12
    return bool(first == second)


@every_study
def test_committed_numbers_are_a_full_run(name: str) -> None:
    """At the study's own settings, at least ten seeds but where a run takes minutes, every case at every seed once."""
    result, study = committed(name), STUDIES[name]
    assert result.settings == study.settings and (result.settings["seeds"] >= 10 or name in FEW)
    work = [(case, seed) for case in study.cases(result.settings) for seed in range(result.settings["seeds"])]
    assert [(r.case, r.seed) for r in result.records] == work
    assert set(result.versions) == {"shiq_lab", "numpy", "torch", "python"}


@every_study
def test_committed_claims_follow_from_the_numbers(name: str) -> None:
    """Summed up and claimed anew from the records: the same, and every claim holds."""
    result, study = committed(name), STUDIES[name]
    assert near(plain(study.summarise(result.settings, result.records)), result.summary)
    assert study.claims(result.settings, result.summary) == result.claims
    assert result.passed and len(result.claims) >= 3


@every_study
def test_a_committed_figure_can_be_drawn_again(name: str, tmp_path: Path) -> None:
    """From the numbers alone, the same SVG; and the comparison sees a curve that is another."""
    gallery.keep(committed(name), tmp_path)
    assert same_drawing(tmp_path / f"{name}.svg", FIGURES / f"{name}.svg")
    assert not same_drawing(tmp_path / f"{name}.svg", FIGURES / "tree.svg")


@pytest.mark.parametrize("name", gallery.PICTURES)
def test_pictures_are_what_is_committed(name: str, tmp_path: Path) -> None:
    gallery.make(name, tmp_path)
    assert same_drawing(tmp_path / f"{name}.svg", FIGURES / f"{name}.svg")
    fresh, kept = (json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for folder in (tmp_path, FIGURES))
    assert near(fresh, kept)


def test_the_page_of_studies_is_up_to_date() -> None:
    text = (ROOT / "docs" / "studies.md").read_text(encoding="utf-8")
    assert text == page.markdown(map(committed, STUDIES)), "run `shiq-lab figures` and commit docs/studies.md"
    assert (
        text.count("| holds |") == sum(len(committed(name).claims) for name in STUDIES) and "fails" not in text.split("## ")[1]
    )


# ---------------------------------------------------------------------------------------------------------- the commands
@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One quick study: Bandit alone."""
    quick = replace(TINY, settings={**TINY.settings, "environments": ["Bandit"]}, fast={})
    monkeypatch.setitem(table.STUDIES, "tiny", quick)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    monkeypatch.chdir(tmp_path)


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["shiq-lab", *words])
    with pytest.raises(SystemExit) as done:
        cli.main()
    code = done.value.code
    assert isinstance(code, int)
    return code


@pytest.mark.usefixtures("toy")
def test_a_study_from_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert call(monkeypatch, "study", "tiny", "--out", "out") == 0
    said = capsys.readouterr().out
    assert TINY.title in said and said.count("holds") == 3
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"tiny.json", "tiny.png", "tiny.svg"}
    assert list((tmp_path / ".shiq_lab" / "studies" / "tiny").glob("*.json"))  # kept, so that the next call is quick
    assert call(monkeypatch, "study", "tiny", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "out" / "tiny.json").read_text(encoding="utf-8"))


@pytest.mark.usefixtures("toy")
def test_a_claim_that_fails_is_exit_code_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    strict: Any = lambda settings, summary: [replace(c, holds=False) for c in TINY.claims(settings, summary)]  # noqa: E731
    monkeypatch.setitem(table.STUDIES, "tiny", replace(table.STUDIES["tiny"], claims=strict))
    assert call(monkeypatch, "study", "tiny") == 1
    assert capsys.readouterr().out.count("FAILS") == 3
    assert call(monkeypatch, "study", "tiny", "--fast") == 0  # a quick look is not what is claimed
    said = capsys.readouterr().out
    assert said.count("not here") == 3 and "FAILS" not in said and "a quick look" in said


@pytest.mark.usefixtures("toy")
def test_ctrl_c(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setitem(table.STUDIES, "tiny", replace(table.STUDIES["tiny"], measure=interrupted))
    assert call(monkeypatch, "study", "tiny") == 130
    assert "what was measured is kept" in capsys.readouterr().err


@pytest.mark.usefixtures("toy")
def test_redrawing_sums_up_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From the records in the folder: claims, summary and titles of the code as it stands; nothing is measured."""
    assert call(monkeypatch, "figures", "tiny", "tiny", "--out", "out") == 0
    path = tmp_path / "out" / "tiny.json"
    good = json.loads(path.read_text(encoding="utf-8"))
    stale = {**good, "title": "old", "summary": {}, "claims": [{"text": "old", "measured": "", "holds": False}]}
    path.write_text(json.dumps(stale), encoding="utf-8")

    def never(*_: Any) -> Any:
        raise AssertionError("measured")

    monkeypatch.setitem(table.STUDIES, "tiny", replace(table.STUDIES["tiny"], measure=never))
    assert call(monkeypatch, "figures", "tiny", "--redraw", "--out", "out") == 0
    assert json.loads(path.read_text(encoding="utf-8")) == good


def test_the_page_is_written_for_this_clone_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All studies in its own figures/, or no page at all."""
    (tmp_path / "figures").mkdir()
    (tmp_path / "docs").mkdir()
    for name in STUDIES:
        (tmp_path / "figures" / f"{name}.json").write_bytes((FIGURES / f"{name}.json").read_bytes())
    assert gallery.write_page(tmp_path / "figures") is None
    monkeypatch.setattr(gallery, "ROOT", tmp_path)
    written = gallery.write_page(tmp_path / "figures")
    assert written is not None and written.read_text(encoding="utf-8") == page.markdown(map(committed, STUDIES))
    (tmp_path / "figures" / "metric.json").unlink()
    assert gallery.write_page(tmp_path / "figures") is None


def test_studies_are_listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "study") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert all(name in said for name in STUDIES)
    assert call(monkeypatch, "study", "--json") == 0
    assert [s["name"] for s in json.loads(capsys.readouterr().out)] == list(STUDIES)


def test_figures_from_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    assert call(monkeypatch, "figures", "tree") == 0
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {"tree.png", "tree.svg", "tree.json"}
    assert "tree.png" in capsys.readouterr().out
    assert not list((tmp_path / "docs").iterdir())  # somebody else's
    (tmp_path / "figures" / "tiny.json").write_text("[]", encoding="utf-8")
    assert call(monkeypatch, "figures", "tiny", "--redraw") == 2
    assert "tiny.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["study", "tinny"], "NAME: expected a study, got 'tinny'. Did you mean 'tiny'?"),
        (["figures", "tre"], "NAME: expected a figure, got 'tre'. Did you mean 'tree'?"),
        (["study", "tiny", "--out", __file__], "--out: expected a folder to write to, got"),
        (["figures", "tiny", "--redraw", "--out", "nowhere"], "--redraw: expected nowhere/tiny.json, an earlier result, got"),
    ],
)
def test_bad_input(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, *words) == 2
    assert re.sub(r"\s+", " ", message) in " ".join(capsys.readouterr().err.split())
