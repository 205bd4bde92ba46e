"""Environments: one file each, a builder that returns a TokenMDP, and a card in its docstring.

To add one: write envs/NAME.py with a builder, and add its line to ENVIRONMENTS. Everything else (command line, gymnasium
ids, selftest, tests) reads that table.
"""

if __name__ != "shiq_lab.envs":
    raise ImportError("this folder is the package shiq_lab.envs; import it by that name")

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from shiq_lab.envs.addition import addition
from shiq_lab.envs.bandit import bandit
from shiq_lab.envs.brackets import brackets
from shiq_lab.envs.chain import chain
from shiq_lab.envs.forbidden import forbidden
from shiq_lab.envs.loop import loop
from shiq_lab.envs.needle import needle
from shiq_lab.envs.parity import parity
from shiq_lab.envs.random_tool import random_tool
from shiq_lab.envs.random_walk import random_walk
from shiq_lab.envs.shaped import shaped
from shiq_lab.envs.star import star
from shiq_lab.envs.tool_call import tool_call
from shiq_lab.envs.tree import tree
from shiq_lab.errors import bad, unknown
from shiq_lab.mdp import TokenMDP


@dataclass(frozen=True)
class Environment:
    """A builder and the temperature and discount at which the selftest solves what it builds."""

    builder: Callable[..., TokenMDP]
    beta: float = 1.0
    gamma: float = 1.0


ENVIRONMENTS: dict[str, Environment] = {
    "Bandit": Environment(bandit, beta=0.5),
    "Tree": Environment(tree, beta=0.5, gamma=0.9),
    "Needle": Environment(needle, beta=1 / 16),
    "Chain": Environment(chain, beta=0.4, gamma=0.95),
    "Brackets": Environment(brackets, beta=0.5),
    "Parity": Environment(parity, beta=0.25),
    "Addition": Environment(addition, beta=0.125),
    "Loop": Environment(loop, beta=0.25),
    "ToolCall": Environment(tool_call, beta=0.2),
    "RandomTool": Environment(random_tool, beta=0.2, gamma=0.9),
    "Star": Environment(star, beta=0.125),
    "RandomWalk": Environment(random_walk, beta=1.0),
    "Forbidden": Environment(forbidden, beta=0.5, gamma=0.95),
    "Shaped": Environment(shaped, beta=0.5, gamma=0.9),
}


def lookup(name: str) -> Environment:
    """The table's entry; an unknown name is a ValueError that suggests the nearest one."""
    if name in ENVIRONMENTS:
        return ENVIRONMENTS[name]
    raise unknown("name", "an environment", name, ENVIRONMENTS)


def make(name: str, **parameters: Any) -> TokenMDP:
    """Build an environment by name: make("Needle", length=8)."""
    builder = lookup(name).builder
    known = inspect.signature(builder).parameters
    for parameter in parameters:
        if parameter not in known:
            raise bad(parameter, f"a parameter of {name}: {', '.join(known)}", repr(parameters[parameter]))
    return builder(**parameters)
