"""Every committed figure, and the numbers beside it: a line each. `shiq-lab figures` makes them again."""

import difflib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from shiq_lab import envs, pictures, plotting, selftest
from shiq_lab.bellman import Solution, solve
from shiq_lab.errors import bad
from shiq_lab.models.tabular import TabularLM
from shiq_lab.sampling import sample
from shiq_lab.stats import TokenStats
from shiq_lab.studies import page
from shiq_lab.studies.frame import Result, run, write_json
from shiq_lab.studies.table import STUDIES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Drawn = tuple["Figure", dict[str, Any]]


def _solution(name: str, **parameters: Any) -> Solution:
    environment = envs.lookup(name)
    return solve(environment.builder(**parameters), beta=environment.beta, gamma=environment.gamma)


def _tree() -> Drawn:
    solution = _solution("Tree", depth=2, n_tokens=3)
    return pictures.tree_figure(solution), {"v": solution.v().tolist(), "objective": solution.objective}


def _automaton() -> Drawn:
    solution = _solution("ToolCall", n_functions=2, n_arguments=1, n_values=2)
    return pictures.automaton_figure(solution), {"v": solution.v().tolist(), "objective": solution.objective}


def _trajectory() -> Drawn:
    """A dialogue under the reference: the reward comes last, and D_k carries it to every token before."""
    mdp = envs.make("ToolCall", n_functions=2, n_arguments=2, n_values=2)
    batch = sample(mdp, solve(mdp, beta=0.2).log_policy(), 1, rng=0)
    table = torch.tensor(mdp.ref_logits)
    ref = TokenStats.from_logits(TabularLM.reference(mdp)(batch.input_ids, batch.attention_mask).logits, batch)
    moved = torch.where(torch.isfinite(table), table * 0.7, table)
    policy = TokenStats.from_logits(TabularLM(mdp, moved)(batch.input_ids, batch.attention_mask).logits.detach(), batch)
    drawn = pictures.trajectory_figure(policy, ref, batch, beta=0.2, gamma=0.9, tokens=mdp.tokens)
    return drawn, {"input_ids": batch.input_ids.tolist(), "rewards": batch.rewards.tolist()}


PICTURES: dict[str, Callable[[], Drawn]] = {"tree": _tree, "automaton": _automaton, "trajectory": _trajectory}
NAMES = ("selftest", *PICTURES, *STUDIES)


def choose(names: list[str]) -> list[str]:
    """The named figures, default all; an unknown name is a ValueError that suggests the nearest."""
    for name in names:
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, n=1)
            raise bad("NAME", "a figure", repr(name), f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(NAMES)}.")
    return list(dict.fromkeys(names)) or list(NAMES)


def make(name: str, folder: Path, *, jobs: int = 1, cache: Path | None = None) -> Result | None:
    """Draw one figure and write NAME.png, NAME.svg and NAME.json; the result of a study is returned."""
    if name in STUDIES:
        result = run(STUDIES[name], jobs=jobs, cache=cache)
        keep(result, folder)
        return result
    if name == "selftest":
        report = selftest.run()
        drawn, numbers = plotting.selftest_figure(report), report.to_json()
    else:
        drawn, numbers = PICTURES[name]()
    _write(name, folder, drawn, numbers)
    return None


def keep(result: Result, folder: Path) -> list[Path]:
    """A study's figure and numbers."""
    return _write(result.study, folder, STUDIES[result.study].draw(result), result.to_json())


def _write(name: str, folder: Path, drawn: "Figure", numbers: dict[str, Any]) -> list[Path]:
    paths = [plotting.save(drawn, folder / f"{name}{kind}") for kind in (".png", ".svg")]
    return [*paths, write_json(folder / f"{name}.json", numbers)]


def results(folder: Path) -> list[Result]:
    """The studies' results that lie in a folder, in the order of the table."""
    paths = [folder / f"{name}.json" for name in STUDIES]
    return [Result.from_json(json.loads(path.read_text(encoding="utf-8"))) for path in paths if path.is_file()]


def write_page(folder: Path, path: Path) -> Path:
    """docs/studies.md from the results in a folder."""
    path.write_text(page.markdown(results(folder)), encoding="utf-8")
    return path
