"""Every committed figure, and the numbers beside it: a line each. `shiq-lab figures` makes them again."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from shiq_lab import envs, plotting, selftest
from shiq_lab.bellman import Solution, solve
from shiq_lab.enumeration import enumerate_trajectories
from shiq_lab.errors import bad, unknown
from shiq_lab.pictures import automaton_figure, automaton_graph, credit_of, trajectory_figure, tree_figure, tree_graph
from shiq_lab.stats import TokenStats
from shiq_lab.studies import page
from shiq_lab.studies.frame import Result, plain, run, write_json
from shiq_lab.studies.table import STUDIES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Drawn = tuple["Figure", dict[str, Any]]


def _solution(name: str, **parameters: Any) -> Solution:
    environment = envs.lookup(name)
    return solve(environment.builder(**parameters), beta=environment.beta, gamma=environment.gamma)


def _tree() -> Drawn:
    solution = _solution("Tree", depth=2, n_tokens=3)
    return tree_figure(solution), asdict(tree_graph(solution))


def _automaton() -> Drawn:
    solution = _solution("ToolCall", n_functions=2, n_arguments=1, n_values=2)
    return automaton_figure(solution), asdict(automaton_graph(solution))


def _trajectory() -> Drawn:
    """The dialogue that pays most, where the model is the reference grown surer of itself: credit travels to every token."""
    mdp = envs.make("ToolCall", n_functions=2, n_arguments=2, n_values=2)
    batch = enumerate_trajectories(mdp)
    row = int((batch.rewards * batch.completion_mask).sum(1).argmax())
    table = torch.tensor(np.where(mdp.allowed, mdp.ref_logits, -np.inf))
    ref, policy = (TokenStats.from_table(x, batch) for x in (table, torch.where(torch.isfinite(table), 1.5 * table, table)))
    options: dict[str, Any] = {"row": row, "beta": 0.2, "gamma": 0.9}
    drawn = trajectory_figure(policy, ref, batch, tokens=mdp.tokens, **options)
    return drawn, asdict(credit_of(policy, ref, batch, **options))


PICTURES: dict[str, Callable[[], Drawn]] = {"tree": _tree, "automaton": _automaton, "trajectory": _trajectory}
NAMES = ("selftest", *PICTURES, *STUDIES)


def choose(names: list[str]) -> list[str]:
    """The named figures, default all; an unknown name is a ValueError that suggests the nearest."""
    for name in names:
        if name not in NAMES:
            raise unknown("NAME", "a figure", name, NAMES)
    return list(dict.fromkeys(names)) or list(NAMES)


def make(name: str, folder: Path, *, redraw: bool = False, **running: Any) -> Result | None:
    """Draw one figure and write NAME.png, NAME.svg and NAME.json; the result of a study is returned.

    redraw: a study is not measured again, its numbers in the folder are summed up and drawn anew. running: jobs, cache, fresh
    of studies.frame.run.
    """
    if name in STUDIES:
        result = again(name, folder) if redraw else run(STUDIES[name], **running)
        keep(result, folder)
        return result
    if name == "selftest":
        report = selftest.run()
        drawn, numbers = plotting.selftest_figure(report), report.to_json()
    else:
        drawn, numbers = PICTURES[name]()
    _write(name, folder, drawn, numbers)
    return None


def again(name: str, folder: Path) -> Result:
    """A study's committed records, summed up and claimed anew by the code as it stands."""
    path, study = folder / f"{name}.json", STUDIES[name]
    if not path.is_file():
        raise bad("--redraw", f"{path}, an earlier result", "no such file", f"Run `shiq-lab figures {name}`.")
    old = Result.read(path)
    summary = study.summarise(old.settings, old.records)
    return replace(
        old, title=study.title, question=study.question, summary=plain(summary), claims=study.claims(old.settings, summary)
    )


def keep(result: Result, folder: Path) -> list[Path]:
    """A study's figure and numbers."""
    return _write(result.study, folder, STUDIES[result.study].draw(result), result.to_json())


def _write(name: str, folder: Path, drawn: "Figure", numbers: dict[str, Any]) -> list[Path]:
    paths = [plotting.save(drawn, folder / f"{name}{kind}") for kind in (".png", ".svg")]
    return [*paths, write_json(folder / f"{name}.json", plain(numbers, strict=False))]


def results(folder: Path) -> list[Result]:
    """The studies' results that lie in a folder, in the order of the table."""
    paths = [folder / f"{name}.json" for name in STUDIES]
    return [Result.read(path) for path in paths if path.is_file()]


ROOT = Path(__file__).resolve().parent.parent


def write_page(folder: Path) -> Path | None:
    """docs/studies.md of this clone, where all studies lie in its own figures/; elsewhere nothing is written."""
    found, path = results(folder), ROOT / "docs" / "studies.md"
    if folder.resolve() != ROOT / "figures" or not path.parent.is_dir() or len(found) < len(STUDIES):
        return None
    path.write_text(page.markdown(found), encoding="utf-8")
    return path
