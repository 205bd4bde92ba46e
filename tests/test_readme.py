"""What README.md and docs/ show is what the commands print, and the examples are what README says they are."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from shiq_lab.checks.loss import check_loss
from shiq_lab.checks.report import FAILED, PASSED, SKIPPED, WARNED

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def example(name: str):  # type: ignore[no-untyped-def]
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.loss


@pytest.mark.parametrize("name", ["my_shiq", "trl_like", "verl_like", "torchtune_like"])
def test_the_right_examples_pass(name: str) -> None:
    report = check_loss(example(name))
    assert report.passed, [r.message for r in report.results if r.status == FAILED]


def test_the_first_example_has_not_even_a_warning() -> None:
    assert not [
        r.name for r in check_loss(example("my_shiq"), like="shiq", strict=True).results if r.status in (FAILED, WARNED)
    ]


def test_the_walk_through_is_what_the_command_prints() -> None:
    """Every FAIL line with its place and its hint, and the closing line, but for the seconds."""
    report = check_loss(example("my_shiq_with_a_bug"))
    shown = README.partition("check -q examples/my_shiq_with_a_bug.py:loss")[2].partition("```")[0]
    plain = " ".join(shown.split())
    told = re.findall(r"FAIL (\w+) (.*?) usually: (.*?)(?= FAIL| \.\.\.)", plain)
    assert [code for code, _, _ in told] == ["MT", "TE"]
    for code, message, hint in told:
        assert (message, hint) == (report[code].message, report[code].hint)
    count = lambda status: sum(r.status == status for r in report.results)  # noqa: E731
    tally = f"({count(PASSED)} passed, {count(SKIPPED)} skipped, "
    assert f"{len(report.failed)} checks failed: {', '.join(report.failed)} {tally}" in plain


def test_a_smoke_test_passes_the_example_with_the_bug() -> None:
    """Finite, falling, gradient not zero: what README says of it."""
    from shiq_lab.checks.bugs.losses import smoke

    assert smoke(example("my_shiq_with_a_bug"))


def test_the_table_of_fixed_points_is_that_of_the_docs() -> None:
    docs = (ROOT / "docs" / "fixed_points.md").read_text(encoding="utf-8")
    cells = lambda line: [c.strip().split(" (")[0] for c in line.strip("|").split("|")]  # noqa: E731
    full = {cells(line)[0]: cells(line) for line in docs.splitlines() if line.startswith("| ")}
    section = README.partition("## Which losses have pi*")[2].partition("## ")[0]
    shown = [cells(line) for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(shown) > 20
    for row in shown:
        assert row == [*full[row[0]][:5], full[row[0]][7]]


def test_every_public_name_in_the_readme_exists() -> None:
    import shiq_lab

    for name in set(re.findall(r"shiq_lab\.([a-z_A-Z]+)\(", README)) | {
        "from_logprobs",
        "from_response_logprobs",
        "from_stats",
    }:
        assert hasattr(shiq_lab, name), name


def committed(name: str) -> dict[str, object]:
    return json.loads((ROOT / "figures" / f"{name}.json").read_text(encoding="utf-8"))


def test_the_tiny_transformers_table_is_what_was_measured() -> None:
    shown = README.partition("## Do a network's logits")[2].partition("```\n")[2].partition("```")[0].splitlines()[1:]
    summary: dict[str, dict[str, float]] = committed("tiny")["summary"]  # type: ignore[assignment]
    assert [line.split()[0] for line in shown] == list(summary)
    for line, (name, n) in zip(shown, summary.items(), strict=True):
        tried = f"{n['edges'] - n['untried']:.0f}/{n['edges']:.0f}"
        numbers = [f"{n['prefixes']:.0f}", tried, f"{n['steps']:.0f}", f"{n['q_relative']:.2%}", f"{n['kl']:.0e}"]
        assert line.split() == [name, *numbers, f"{n['q_relative_before']:.0%}", f"{n['kl_before']:.0e}"]


def test_what_the_studies_found_is_what_they_claim() -> None:
    """Every cell is made of claims, word for word, and they hold."""
    section = README.partition("## What the paper claims, measured")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| \[([a-z-]+)\]\(figures/([a-z-]+)\.png\) \| (.*) \|$", section, re.MULTILINE)
    assert len(rows) == 11
    for name, picture, cell in rows:
        rest = cell.replace("\\|", "|")
        for claim in committed(name)["claims"]:  # type: ignore[attr-defined]
            if claim["text"] in rest:
                assert claim["holds"]
                rest = rest.replace(claim["text"], "")
        assert name == picture and not rest.strip(), rest


def test_every_notebook_is_listed() -> None:
    listed = re.findall(r"\(notebooks/(\d\d_\w+\.ipynb)\)", README)
    assert listed == sorted(p.name for p in (ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize(
    "page", ["README.md", "docs/studies.md", "docs/fixed_points.md", "docs/planted_bugs.md", "docs/scale.md"]
)
def test_every_link_leads_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [x for x in re.findall(r"\]\(([^)\s]+)\)", text) if not x.startswith(("http", "#"))]
    lost = [x for x in links if not ((ROOT / page).parent / x.partition("#")[0]).exists()]
    assert not lost, lost
