"""docs/studies.md, made from the committed results: what each study asked, claims and measured, how to run it again."""

from collections.abc import Iterable

from shiq_lab.studies.frame import Result

HEAD = """# Studies

What the paper claims, on automata whose optimum is known exactly. The paper's own tasks and hyper-parameters are unknown, so
these are reconstructions. Each number is an interquartile mean over the seeds with a 95 % bootstrap interval, unless it says
otherwise; every claim is computed from the numbers, and a claim that does not hold fails the command. The numbers, seed by
seed, stand in `figures/NAME.json`. This page is generated from these files by `shiq-lab figures`.
"""


def markdown(results: Iterable[Result]) -> str:
    """The whole page."""
    return "\n".join([HEAD, *map(section, results)])


def section(result: Result) -> str:
    """One study: question, figure, claims, settings."""
    rows = [f"| {_cell(c.text)} | {_cell(c.measured)} | {'holds' if c.holds else '**fails**'} |" for c in result.claims]
    settings = ", ".join(f"{key} {value}" for key, value in result.settings.items() if value is not None)
    versions = ", ".join(f"{key} {value}" for key, value in result.versions.items())
    return "\n".join([
        f"## {result.title}", "", result.question, "", f"![{result.title}](../figures/{result.study}.png)", "",
        "| claim | measured | |", "|---|---|---|", *rows, "",
        f"`shiq-lab study {result.study}`: {settings}. {versions}.", "",
    ])  # fmt: skip


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
