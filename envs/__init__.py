"""Environments: one file each, a builder that returns a TokenMDP, and a card in its docstring.

To add one: write envs/NAME.py with a builder, and add its line to ENVIRONMENTS. Everything else (command line, gymnasium
ids, selftest, tests) reads that table.
"""

if __name__ != "shiq_lab.envs":
    raise ImportError("this folder is the package shiq_lab.envs; import it by that name")

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from shiq_lab.mdp import TokenMDP
from shiq_lab.envs.bandit import bandit


@dataclass(frozen=True)
class Environment:
    """A builder and the temperature and discount at which the selftest solves what it builds."""

    builder: Callable[..., TokenMDP]
    beta: float = 1.0
    gamma: float = 1.0


ENVIRONMENTS: dict[str, Environment] = {
    "Bandit": Environment(bandit),
}


def lookup(name: str) -> Environment:
    """The table's entry; an unknown name is a ValueError that suggests the nearest one."""
    if name in ENVIRONMENTS:
        return ENVIRONMENTS[name]
    known = {key.lower(): key for key in ENVIRONMENTS}
    near = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f"Did you mean {known[near[0]]!r}?" if near else f"Known: {', '.join(ENVIRONMENTS)}."
    raise ValueError(f"name: expected an environment, got {name!r}. {hint}")


def make(name: str, **parameters: Any) -> TokenMDP:
    """Build an environment by name: make("Needle", length=8)."""
    return lookup(name).builder(**parameters)
