"""Where rows come from, by name: behaviours, and rows listed, sampled or played. One line each to add."""

import difflib
from collections.abc import Callable, Iterable

from shiq_lab import policies
from shiq_lab.batch import TokenBatch
from shiq_lab.bellman import solve
from shiq_lab.enumeration import enumerate_trajectories
from shiq_lab.errors import bad
from shiq_lab.graph import Floats
from shiq_lab.mdp import TokenMDP
from shiq_lab.sampling import sample

BEHAVIORS: dict[str, Callable[[TokenMDP, float, float], Floats]] = {
    "covering": lambda mdp, beta, gamma: policies.covering(mdp),
    "uniform": lambda mdp, beta, gamma: policies.uniform_policy(mdp),
    "reference": lambda mdp, beta, gamma: policies.reference_policy(mdp),
    "mixed": lambda mdp, beta, gamma: policies.mixture(policies.uniform_policy(mdp), policies.reference_policy(mdp), 0.5),
    "on-path": lambda mdp, beta, gamma: policies.on_path(mdp, solve(mdp, beta=beta, gamma=gamma).log_policy(), 0.1),
}


def _played(mdp: TokenMDP, policy: Floats, n: int, seed: int) -> TokenBatch:
    from shiq_lab.collect import collect
    from shiq_lab.gym import TokenVectorEnv

    return collect(TokenVectorEnv(min(n, 256), mdp), policy, n, seed=seed)


SOURCES: dict[str, Callable[[TokenMDP, Floats, int, int], TokenBatch]] = {
    "listed": lambda mdp, policy, n, seed: enumerate_trajectories(mdp, behavior=policy),
    "sampled": lambda mdp, policy, n, seed: sample(mdp, policy, n, rng=seed),
    "gym": _played,
}


def _known(argument: str, name: str, table: Iterable[str]) -> None:
    if name not in table:
        near = difflib.get_close_matches(name, list(table), n=1)
        raise bad(argument, f"one of {', '.join(table)}", repr(name), f"Did you mean {near[0]!r}?" if near else "")


def behavior(mdp: TokenMDP, name: str, beta: float, gamma: float) -> Floats:
    """A behaviour's table by name."""
    _known("behavior", name, BEHAVIORS)
    return BEHAVIORS[name](mdp, beta, gamma)


def rows(mdp: TokenMDP, source: str, policy: Floats, n: int, seed: int) -> TokenBatch:
    """Rows of a policy, by the source's name."""
    _known("data", source, ["population", *SOURCES])
    if n < 1:
        raise bad("rows", "at least 1", repr(n))
    return SOURCES[source](mdp, policy, n, seed)
