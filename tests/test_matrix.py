"""The matrix check x bug: every row of the survey is planted and caught, and the published figures are the computed ones."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from shiq_lab.checks.bugs import matrix
from shiq_lab.checks.bugs.matrix import Matrix, Row

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "planted_bugs.md"
# The survey's rows: a family's letter and a number; two rows may name several threads, so an id may have a suffix.
SURVEY = (
    "A1 A2 A4 A5 A6 A8 A9 A10 B2 B3 B4 B6 B7 B8 B10 B11 B12 B14 B15 B16 C2 C3 C4 C6 C7 C8 D2 D3 D4 D6 D7 D8 "
    "E1 E2 E3 E5 E6 E7 E9 E10 E11 E13 E14 E15 E17 F1 F2 F4 F5 G1 G3 G4 G5 G7 G8 G9 G11 G12 H1 H3 H4 H5 H7 H8 "
    "I1 I3 I4 I5 I7 I8 I9 J2 J3 J4 J6 J7 J8 K1 K2 K3"
).split()


def row(id_: str = "A1", caught_by: tuple[str, ...] = ("FP",), right: tuple[str, ...] = (), smoke: bool | None = True) -> Row:
    return Row(id_, "thread#1", "symptom", "mutation", "L", caught_by, right, smoke, 0.1)


def test_what_counts_as_caught() -> None:
    """A suite that fails on the accepted twin too has caught nothing."""
    assert row().caught
    assert not row(caught_by=()).caught
    assert not row(right=("FP",)).caught


def test_the_totals_follow_from_the_rows() -> None:
    found = Matrix(
        [row("A1", ("FP", "CV")), row("A2", ("PU",)), row("K3", (), smoke=None), row("K3-bos", ("ID",), smoke=False)]
    )
    assert found.alone() == {"PU": ["A2"], "ID": ["K3-bos"]}
    assert found.catches() == {"FP": 1, "CV": 1, "PU": 1, "ID": 1}
    assert found.smoked() == (2, 3)
    assert matrix.totals(found)[0].startswith("2 of 3 bugs of the survey are caught")  # one of K3's two is missed
    assert found.to_json()["missed"] == ["K3"]
    assert "| K3 | thread#1 | the loss itself | symptom | mutation | **missed** | - |" in matrix.to_markdown(found)


def test_the_page_names_every_row_of_the_survey() -> None:
    assert len(SURVEY) == 80
    page = PAGE.read_text(encoding="utf-8")
    shown = set(re.findall(r"^\| ([A-K]\d+)", page, re.M))
    assert shown | set(matrix.UNREACHED) == set(SURVEY) and not shown & set(matrix.UNREACHED)


@pytest.fixture(scope="module")
def computed() -> Iterator[Matrix]:
    pytest.importorskip("trl", reason="needs the extra hf")
    yield Matrix(list(matrix.compute(workers=min(2, os.cpu_count() or 1))))


@pytest.mark.slow
def test_every_row_of_the_survey_is_caught(computed: Matrix) -> None:
    missed = {r.id: r.right_failed or "nothing failed" for r in computed.rows if not r.caught}
    assert not missed
    assert {r.id.partition("-")[0] for r in computed.rows} | set(matrix.UNREACHED) == set(SURVEY)


@pytest.mark.slow
def test_the_published_matrix_is_the_computed_one(computed: Matrix) -> None:
    """docs/planted_bugs.md whole, and the totals in README.md; PAGE.write_text(matrix.to_markdown(...)) writes it anew."""
    assert PAGE.read_text(encoding="utf-8") == matrix.to_markdown(computed)
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    passed, of = computed.smoked()
    assert f"all {len(SURVEY)} are caught" in readme and f"{passed} of the {of}" in readme
