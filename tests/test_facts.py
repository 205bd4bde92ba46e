"""Every fact on random automata and on every environment, and a planted bug for each that its findings must catch."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from strategies import World, assert_near, automata, holds_for
from torch import Tensor

import shiq_lab.losses.residuals as residuals_module
from shiq_lab import bellman, envs, facts
from shiq_lab.bellman import Solution
from shiq_lab.facts import FACTS, Case, Finding
from shiq_lab.losses import shiq, steps
from shiq_lab.losses.methods import METHODS
from shiq_lab.population import Population
from shiq_lab.stats import TokenStats
from shiq_lab.training import stationary

torch.set_num_threads(1)

Patch = pytest.MonkeyPatch


def case_of(world: World, rows: int = 32) -> Case:
    mdp = world.mdp if world.mdp.horizon is None else world.mdp.unroll()
    return Case(mdp, world.beta, world.gamma, seed=world.seed % 997, rows=rows)


@cache
def environment(name: str) -> tuple[Any, float, float]:
    entry = envs.lookup(name)
    return stationary(entry.builder()), entry.beta, entry.gamma


def case_named(name: str) -> Case:
    return Case(*environment(name))


def assert_holds(f: Finding) -> None:
    if not f.above:
        assert_near(f"{f.fact}, {f.claim}", f.measured, f.bound)
    assert f.holds, f"{f.fact}, {f.claim}: measured {f.measured:.3e}, expected {'>=' if f.above else '<='} {f.bound:.3e}"


# ----------------------------------------------------------------------------------------------------- random automata
MEASURED = {  # share of random automata on which a fact has something to say; the others are always measured
    "F8": 0.3,  # deterministic worlds of at most facts.DENSE edges
    "F9": 0.3,  # at most facts.LISTABLE strings
    "F11": 0.3,
    "F12": 0.3,
}


@holds_for(60, automata(prompted=True), often={fact: MEASURED.get(fact, 1.0) for fact in FACTS})
def test_facts_on_random_automata(world: World) -> set[str]:
    """Loops, prompts, replies, horizons (unrolled), sparse rewards, beta from 0.05 to 5: every fact holds."""
    case, met = case_of(world), set()
    for fact in FACTS.values():
        for finding in fact(case):
            assert_holds(finding)
            met.add(finding.fact)
    return met


ABOVE = {  # what must not vanish, and how often in worlds with random replies it is claimed
    "ShiQ's off-policy bias is not 0": 0.05,  # needs a choice after replies of unlike worth
    "a row's gradient at l*, random replies": 0.15,  # needs replies of unlike worth
}


@holds_for(
    60, automata(prompted=True, deterministic=False, listable=True, horizons=False), often={**ABOVE, "F9": 1.0, "F11": 1.0}
)
def test_random_worlds(world: World) -> set[str]:
    """F9 to F11 where replies are random: the bias has the predicted size, and is there where the prediction says so."""
    case, met = case_of(world), set()
    for name in ("F9", "F10", "F11", "F12"):
        for finding in FACTS[name](case):
            assert_holds(finding)
            met |= {finding.fact, finding.claim}
    return met


def test_nothing_compared_does_not_hold() -> None:
    """A NaN, an infinity or a comparison of nothing is a failure, in either direction."""
    for measured in (float("nan"), float("inf"), float("-inf"), facts._worst(np.zeros(0)), facts._worst(torch.zeros(0))):
        for above in (True, False):
            assert not Finding("F0", "", measured, 1.0, above).holds
    assert Finding("F0", "", 1.0, 1.0).holds and Finding("F0", "", 1.0, 1.0, above=True).holds
    assert not Finding("F0", "", 1.1, 1.0).holds and not Finding("F0", "", 0.9, 1.0, above=True).holds


# -------------------------------------------------------------------------------------------------------- environments
EVERYWHERE = ("F1", "F2", "F3", "F4", "F5", "F6", "F7", "F10")
LOOSEST = 1e-9  # a bound on what must vanish, in units of the scale squared: nine digits at the very least


@pytest.mark.parametrize("name", envs.ENVIRONMENTS)
def test_facts_on_every_environment(name: str) -> None:
    """Every finding holds, and no bound on something that must vanish is so loose that it says little."""
    case, met = case_named(name), Counter()
    for fact in FACTS.values():
        for finding in fact(case):
            assert_holds(finding)
            assert finding.above or finding.bound <= LOOSEST * case.solution.scale**2, f"{finding.claim}: {finding.bound:.1e}"
            assert not finding.above or finding.bound > 0, f"{finding.claim}: at least 0 holds for whatever is measured"
            met[finding.fact] += 1
    assert not set(EVERYWHERE) - set(met)
    assert ("F8" in met) == (case.mdp.deterministic and edges_of(case) <= facts.DENSE)
    assert case.listed == ("F9" in met) == ("F11" in met) == ("F12" in met)


@pytest.mark.parametrize("name", envs.ENVIRONMENTS)
def test_a_loss_that_must_vanish_is_held_to_the_square_of_rounding(name: str) -> None:
    """A loss sums squares: residuals of 1e-7 make one of 1e-14, which rounding alone would let pass."""
    case = case_named(name)
    (finding,) = (f for f in facts.f4(case) if f.claim == "shifted loss at l_ref, r = 0")
    assert finding.bound <= LOOSEST**2 * case.solution.scale**2


def edges_of(case: Case) -> int:
    return int((case.mdp.allowed & case.mdp.is_policy[:, None]).sum())


def test_facts_are_measured_on_enough_environments() -> None:
    """F8 needs few edges, F9, F11 and F12 few strings, the bias a random world: each is met often enough to mean something."""
    met: Counter[str] = Counter()
    for name in envs.ENVIRONMENTS:
        case = case_named(name)
        met["F8"] += case.mdp.deterministic and edges_of(case) <= facts.DENSE
        met["listed"] += case.listed
    assert met["F8"] >= 6 and met["listed"] >= 8
    claims = {f.claim for f in [*facts.f9(case_named("RandomTool")), *facts.f10(case_named("RandomTool"))] if f.above}
    assert claims == set(ABOVE)


# -------------------------------------------------------------------------------------------------------- planted bugs
# Originals, kept before anything is patched.
RESIDUALS, ACTIONS, SUM = shiq.residuals, shiq.actions_of, residuals_module.discounted_sum
SOFT_MAX, SHAPED, OPTIMAL = bellman.soft_max, facts.shaped_twin, Solution.optimal_logits
PIECES, SQUARES, WEIGHTS, FROM_TABLE = Population.pieces, Population.squares, Population._weights, TokenStats.from_table


def no_level(logit: Tensor, level: Tensor, ref_logit: Tensor, ref_level: Tensor, joint: Tensor, beta: float) -> Any:
    """Dv without the reference's level."""
    return beta * (logit - ref_logit), beta * level


def no_shift(logit: Tensor, level: Tensor, ref_logit: Tensor, ref_level: Tensor, joint: Tensor, beta: float) -> Any:
    """beta l in place of beta (l - l_ref)."""
    return beta * logit, beta * (level - ref_level)


def no_beta(logit: Tensor, level: Tensor, ref_logit: Tensor, ref_level: Tensor, joint: Tensor, beta: float) -> Any:
    """The logits' difference without its temperature."""
    return logit - ref_logit, beta * (level - ref_level)


def gamma_late(x: Tensor, gamma: float, chain: Tensor, terms: int | None = None) -> Tensor:
    """gamma^{k-t+1} for the later terms."""
    return x + gamma * (SUM(x, gamma, chain, terms) - x)


def one_term_more(x: Tensor, gamma: float, chain: Tensor, terms: int | None = None) -> Tensor:
    """n + 1 terms in place of n, except where one is asked for."""
    return SUM(x, gamma, chain, terms + 1 if terms is not None and terms > 1 else terms)


def discounts_replies(c: Tensor, u: Tensor, u_end: Tensor, batch: Any, actions: Any, *, gamma: float, **rest: Any) -> Tensor:
    """gamma for every environment token as well: u of the next action is discounted once more after a reply."""
    said = torch.where(actions.real[:, 1:], actions.index[:, 1:] - actions.index[:, :-1] - 1, 0)
    extra = torch.nn.functional.pad(torch.cumsum(said, 1), (1, 0))  # environment tokens since the row's first action
    factor = torch.ones_like(u).scatter(1, actions.index, gamma ** extra.double())
    return RESIDUALS(c, u * factor, u_end, batch, actions, gamma=gamma, **rest)


def no_bootstrap(c: Tensor, u: Tensor, u_end: Tensor, *args: Any, **rest: Any) -> Tensor:
    return RESIDUALS(c, u, 0 * u_end, *args, **rest)


def beta_inside(cls: Any, table: Tensor, batch: Any, **rest: Any) -> TokenStats:
    """lse(l / 2) * 2 in place of lse(l): a temperature inside the log-sum-exp."""
    warm = FROM_TABLE(table / 2, batch)
    return replace(FROM_TABLE(table, batch, **rest), logsumexp=2 * warm.logsumexp, end_logsumexp=2 * warm.end_logsumexp)


def without_variance(self: Population, *args: Any, **rest: Any) -> Any:
    """(u - M)^2 alone: the square of the mean in place of the mean of the square."""
    return SQUARES(self, *args, **rest)[:1]


def weigh_once(self: Population, turns: bool, power: int) -> Any:
    """Variance discounted by gamma a step, not by gamma^2."""
    return WEIGHTS(self, turns, 1)


def attached(patch: Patch) -> None:
    """No stop-gradient anywhere: a turn is still cut, but its target moves."""
    patch.setattr(torch.Tensor, "detach", lambda self: self)


def semi_is_full(patch: Patch) -> None:
    full = replace(METHODS["semi-gradient"], loss=lambda *a, through, **k: shiq.shiq_loss(*a, **k))
    patch.setitem(METHODS, "semi-gradient", full)


def turns_are_full(patch: Patch) -> None:
    patch.setitem(METHODS, "turn-cut", METHODS["shiq"])


def set_to(owner: Any, name: str, bug: Any) -> Callable[[Patch], None]:
    return lambda patch: patch.setattr(owner, name, bug)


def wrong_state(mdp: Any, potential: Any, gamma: float) -> Any:
    """gamma Phi(s) - Phi(s)."""
    rows = mdp.is_policy[:, None] & mdp.allowed
    return replace(mdp, reward=np.where(rows, mdp.reward + (gamma - 1) * potential[:, None], 0.0))


def stopped_value(self: Population, logits: Tensor, *args: Any) -> Any:
    c, u = PIECES(self, logits, *args)
    return c, u.detach()


def warm_value(self: Population, logits: Tensor, *args: Any) -> Any:
    return PIECES(self, logits, *args)[0], 2 * PIECES(self, logits / 2, *args)[1]


def turns_forget(batch: Any) -> Any:
    """Chains broken by environment tokens, as if every turn were a sequence of its own."""
    actions = ACTIONS(batch)
    return replace(actions, segment=actions.turn)


def ignores_pi_ref(q: Any, log_ref: Any, beta: float) -> Any:
    return SOFT_MAX(q, np.where(log_ref > -np.inf, 0.0, -np.inf), beta)


def beta_lost(self: Solution, t: int = 0) -> Any:
    """l_ref + q*."""
    edges = self.mdp.allowed & self.mdp.is_policy[:, None]
    return np.where(edges, self.mdp.ref_logits + np.where(edges, self.q(t), 0.0), OPTIMAL(self, t))


BUGS: list[tuple[str, str, str, Callable[[Patch], None]]] = [
    # fact, what the bug is, words of the claim that must fail, how to plant it
    ("F1", "soft maximum without pi_ref", "Dv = v*", set_to(bellman, "soft_max", ignores_pi_ref)),
    ("F1", "l* with q* in place of q* / beta", "= q*", set_to(Solution, "optimal_logits", beta_lost)),
    ("F2", "gamma one power late", "rho = A d", set_to(residuals_module, "discounted_sum", gamma_late)),
    ("F2", "a term too many", "rho^(3)", set_to(residuals_module, "discounted_sum", one_term_more)),
    ("F2", "turns forget each other", "rho = A d", set_to(shiq, "actions_of", turns_forget)),
    ("F3", "D_k in place of D_{k-1}", "closed form = autograd, n_steps=None", set_to(shiq, "ahead", lambda x, n, chain: x)),
    ("F3", "bootstrap dropped on cut rows", "closed form", set_to(shiq, "residuals", no_bootstrap)),
    ("F3", "a term too many", "n_steps=2", set_to(residuals_module, "discounted_sum", one_term_more)),
    ("F4", "level of the reference dropped", "r = 0", set_to(steps, "shifted", no_level)),
    ("F4", "logits not shifted", "rho_t = -(reward-to-go)", set_to(steps, "shifted", no_shift)),
    ("F4", "gamma one power late", "rho_t = -(reward-to-go)", set_to(residuals_module, "discounted_sum", gamma_late)),
    ("F5", "level of the reference dropped", "loss unchanged", set_to(steps, "shifted", no_level)),
    ("F5", "logits not shifted", "loss unchanged", set_to(steps, "shifted", no_shift)),
    ("F6", "logits without beta", "scale", set_to(steps, "shifted", no_beta)),
    ("F7", "Phi of the wrong state", "v* falls by Phi", set_to(facts, "shaped_twin", wrong_state)),
    ("F7", "Phi of what follows not discounted", "pi* stays", set_to(facts, "shaped_twin", lambda m, p, g: SHAPED(m, p, 1.0))),
    ("F8", "semi-gradient in the Jacobian", "Jacobian", set_to(Population, "pieces", stopped_value)),
    ("F8", "temperature inside the log-sum-exp", "Jacobian", set_to(Population, "pieces", warm_value)),
    ("F9", "variance forgotten", "expected gradient", set_to(Population, "squares", without_variance)),
    ("F9", "variance discounted once", "shiq: expected gradient", set_to(Population, "_weights", weigh_once)),
    ("F9", "environment tokens discounted", "expected gradient", set_to(shiq, "residuals", discounts_replies)),
    ("F10", "beta inside the log-sum-exp", "", set_to(TokenStats, "from_table", classmethod(beta_inside))),
    ("F10", "bootstrap dropped on cut rows", "cut rows", set_to(shiq, "residuals", no_bootstrap)),
    ("F10", "environment tokens discounted", "whole rows", set_to(shiq, "residuals", discounts_replies)),
    ("F10", "level of the reference dropped", "", set_to(steps, "shifted", no_level)),
    ("F11", "semi-gradient without its stop", "semi-gradient", semi_is_full),
    ("F11", "no stop-gradient at all", "turn-cut: expected", attached),
    ("F11", "turns not cut", "turn-cut: expected", turns_are_full),
    ("F12", "variance forgotten", "shiq", set_to(Population, "squares", without_variance)),
    ("F12", "variance discounted once", "shiq", set_to(Population, "_weights", weigh_once)),
    ("F12", "gamma one power late", "shiq", set_to(residuals_module, "discounted_sum", gamma_late)),
    ("F12", "beta inside the log-sum-exp", "shifted", set_to(TokenStats, "from_table", classmethod(beta_inside))),
]
# Random replies, single replies (the environment's own discount of 1 hides some bugs), forbidden tokens, long rows.
PLOTS = {"RandomTool": 0.9, "ToolCall": 0.8, "Forbidden": 0.95, "Chain": 0.95}


def findings(fact: str, claim: str) -> list[Finding]:
    """What the fact says on fresh cases: nothing that a planted bug poisoned is cached for later."""
    cases = [replace(case_named(name), gamma=gamma) for name, gamma in PLOTS.items()]
    return [f for case in cases for f in FACTS[fact](case) if claim in f.claim]


@pytest.mark.parametrize(("fact", "bug", "claim", "plant"), BUGS, ids=[f"{fact}: {bug}" for fact, bug, *_ in BUGS])
def test_a_planted_bug_breaks_its_fact(fact: str, bug: str, claim: str, plant: Callable[[Patch], None]) -> None:
    """The named claim holds on these environments, and with the bug it fails on one of them."""
    with pytest.MonkeyPatch.context() as patch:
        plant(patch)
        broken = [f for f in findings(fact, claim) if not f.holds]
    assert broken, f"nothing in {fact} ({claim!r}) noticed: {bug}"
    sound = findings(fact, claim)
    assert sound and all(f.holds for f in sound)


def test_every_fact_has_its_bugs() -> None:
    assert {fact for fact, *_ in BUGS} == set(FACTS)
