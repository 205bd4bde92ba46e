"""Every loss by name, as one function of a Point: a table of logits, rows with their chances, values, the behaviour.

A line a loss, beside what theory says of it. fixed_points.py asks where each is stationary; learning.py trains with each.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from shiq_lab.batch import TokenBatch
from shiq_lab.bellman import EPS, Solution, solve
from shiq_lab.enumeration import enumerate_trajectories
from shiq_lab.errors import unknown
from shiq_lab.losses import consistency, contrastive, policy_gradient, preference, shiq
from shiq_lab.losses.methods import METHODS, Method
from shiq_lab.losses.residuals import actions_of
from shiq_lab.losses.sequences import all_pairs, sequences_of
from shiq_lab.mdp import TokenMDP
from shiq_lab.policies import uniform_policy
from shiq_lab.stats import TokenStats

Theory = Literal["always", "path", "deterministic", "on-policy", "one token", "never"]
Level = Literal["all", "start", "none"]
WRONG = 1.0  # how far a wrong V* is off
NOTHING, ONE_A_STATE = "nothing", "one number a state"


@dataclass(frozen=True, eq=False)
class World:
    """An automaton, what is paid in it, and the discount: a line of conditions that every loss is put through."""

    name: str
    rewards: str
    gamma: float
    mdp: TokenMDP
    beta: float = 0.7

    @cached_property
    def solution(self) -> Solution:
        """The exact solution of its automaton."""
        return solve(self.mdp, beta=self.beta, gamma=self.gamma)

    @cached_property
    def rows(self) -> TokenBatch:
        """Every row once; its weight is the chance of what the environment says in it."""
        batch = enumerate_trajectories(self.mdp)
        return replace(batch, weights=torch.exp(spoken(self.mdp, batch, torch.tensor(self.mdp.ref_log_policy), policy=False)))

    @cached_property
    def first(self) -> Tensor:
        """int[B]: the state of every row's first action."""
        index = actions_of(self.rows).index[:, :1]
        return self.rows.known_states().gather(1, index)[:, 0]

    @cached_property
    def edges(self) -> Tensor:
        """int[E, 2]: the tokens that the policy may choose, over reachable states."""
        return torch.tensor(np.argwhere(self.mdp.allowed & (self.mdp.is_policy & self.mdp.reachable)[:, None]))

    @cached_property
    def starts(self) -> Tensor:
        """Policy states where a row's first action is chosen."""
        return torch.unique(self.first)

    @cached_property
    def inner(self) -> Tensor:
        """The other reachable policy states."""
        states = torch.tensor(np.flatnonzero(self.mdp.is_policy & self.mdp.reachable))
        return states[~torch.isin(states, self.starts)]

    @cached_property
    def policies(self) -> dict[str, Tensor]:
        """Log-probabilities float[S, V] of each behaviour."""
        noise = np.random.default_rng(5).normal(size=self.mdp.ref_logits.shape)
        tables = {
            "on-policy": self.solution.log_policy(),
            "reference": self.mdp.ref_log_policy,
            "uniform": uniform_policy(self.mdp),
            "random": np.where(self.mdp.allowed, noise, -np.inf),
        }
        return {name: torch.tensor(table).log_softmax(1) for name, table in tables.items()}

    @cached_property
    def elsewhere(self) -> Tensor:
        """A table of no particular meaning, another level in every state."""
        rng = np.random.default_rng(6)
        noise = rng.normal(size=self.mdp.ref_logits.shape) + rng.normal(size=(self.mdp.n_states, 1))
        return torch.tensor(np.where(self.mdp.allowed, self.mdp.ref_logits, 0.0) + noise)

    def bound(self, tables: Tensor) -> float:
        """Rounding of an expected gradient, a mean over rows: a residual adds up to 4 numbers a token, each sum rounded by an
        ulp of its parts; a token's logit enters the residuals of all tokens before it, with slope 2 beta, or 1 in a score."""
        live = self.edges
        biggest = float(tables[:, live[:, 0], live[:, 1]].abs().max())
        longest = self.rows.input_ids.shape[1]
        paid = float((self.rows.rewards * self.rows.completion_mask).abs().sum(1).max())
        residual = self.solution.scale + paid + self.beta * (1 + biggest) * longest
        return 4 * EPS * longest**2 * (1 + 2 * self.beta) * residual


def spoken(mdp: TokenMDP, batch: TokenBatch, log_policy: Tensor, *, policy: bool) -> Tensor:
    """Log-probability float[..., B] of the actions (or else of what the environment says) under tables float[..., S, V]."""
    ids, acted = batch.input_ids.clamp(min=0), batch.completion_mask == 1
    before = torch.nn.functional.pad(batch.known_states()[:, :-1], (1, 0), value=mdp.start).clamp(min=0)
    use = (batch.attention_mask == 1) & (acted if policy else ~acted)
    return torch.where(use, log_policy[..., before, ids], 0.0).sum(-1)


# --------------------------------------------------------------------------------------------------------------- points
@dataclass(frozen=True, eq=False)
class Point:
    """What a loss is handed: K copies of all rows, each with its own table of logits, values and behaviour."""

    world: World
    batch: TokenBatch  # K * B rows; states count on from copy to copy, groups too
    tables: Tensor  # float[K * S, V]
    values: Tensor  # float[K * S]
    behavior: Tensor  # float[K * S, V]: log-probabilities
    copy: Tensor  # int[K * B]

    def at(self, tables: Tensor, values: Tensor, *, weights: Tensor | None = None, behavior: Tensor | None = None) -> "Point":
        """The same rows at another table (or of another behaviour): what depends on the rows alone is not computed again."""
        batch = self.batch if weights is None else replace(self.batch, weights=weights)
        moved = replace(
            self, tables=tables, values=values, batch=batch, behavior=self.behavior if behavior is None else behavior
        )
        kept = ["ref_table", "ref", "first_state", "v_star"] + ["behavior_logprobs"] * (behavior is None)
        moved.__dict__.update({name: self.__dict__[name] for name in kept if name in self.__dict__})
        return moved

    @property
    def options(self) -> dict[str, Any]:
        """beta, gamma and the reduction that every loss here is called with."""
        return {"beta": self.world.beta, "gamma": self.world.gamma, "reduction": "sum"}

    def stats(self, joint: bool = False) -> TokenStats:
        """The two numbers a token of the tables; joint: and the naive step's third."""
        return TokenStats.from_table(self.tables, self.batch, ref_table=self.ref_table if joint else None)

    @cached_property
    def ref_table(self) -> Tensor:
        """The reference's logits, once for every copy of the tables."""
        return torch.tensor(self.world.mdp.ref_logits).repeat(len(self.tables) // self.world.mdp.n_states, 1)

    @cached_property
    def ref(self) -> TokenStats:
        """The reference's two numbers a token."""
        return TokenStats.from_table(self.ref_table, self.batch)

    @cached_property
    def first_state(self) -> Tensor:
        """int[K * B]: the state of each row's first action, counted on from copy to copy."""
        return self.batch.known_states().gather(1, actions_of(self.batch).index[:, :1])[:, 0]

    @cached_property
    def v_star(self) -> Tensor:
        """v* of the prompt, float[K * B]."""
        return torch.tensor(self.world.solution.v())[self.first_state % self.world.mdp.n_states]

    @cached_property
    def state_values(self) -> Tensor:
        """`values` of the state after every token, float[K * B, L]."""
        return self.values[self.batch.known_states().clamp(min=0)]

    @cached_property
    def behavior_logprobs(self) -> Tensor:
        """float[K * B, L] at the actions, 0 elsewhere."""
        before = torch.nn.functional.pad(self.batch.known_states()[:, :-1], (1, 0)).clamp(min=0)
        taken = self.behavior[before, self.batch.input_ids.clamp(min=0)]
        return torch.where(self.batch.completion_mask == 1, taken, 0.0)

    @property
    def behavior_log_prob(self) -> Tensor:
        """float[K * B]: ln of the behaviour's probability of the row's actions."""
        return self.behavior_logprobs.sum(1)

    def pooled(self) -> TokenBatch:
        """The rows without their prompts' groups: one group a copy."""
        return replace(self.batch, group_ids=self.copy)

    def twos(self) -> "Point":
        """Groups of two independent rows of one prompt, all of them, each a group of its own with its probability.

        Both orders of a pair are one group with the probability of both.
        """
        pairs = all_pairs(self.batch)
        once = pairs.first <= pairs.second
        weight = torch.where(pairs.first < pairs.second, pairs.weight, pairs.weight / 2)[once]
        both, number = torch.cat([pairs.first[once], pairs.second[once]]), torch.arange(len(weight))
        batch = replace(self.batch.select(both), weights=weight.repeat(2), group_ids=number.repeat(2))
        return replace(self, batch=batch, copy=self.copy[both])


def stack(world: World, tables: Tensor, values: Tensor, behaviors: Tensor) -> Point:
    """K copies: tables and behaviours float[K, S, V], values float[K, S]."""
    rows, (K, S, V) = world.rows, tables.shape
    B, groups = len(rows), int(rows.group_ids.max()) + 1
    copy = torch.arange(K).repeat_interleave(B)
    many = rows.select(torch.arange(B).repeat(K))
    states = many.known_states()
    chance = torch.exp(spoken(world.mdp, rows, behaviors, policy=True)) * rows.weights  # (K, B)
    batch = replace(
        many,
        states=torch.where(states < 0, -1, states + S * copy[:, None]),
        weights=chance.reshape(-1),
        group_ids=many.group_ids + groups * copy,
    )
    return Point(world, batch, tables.reshape(K * S, V), values.reshape(-1), behaviors.reshape(K * S, V), copy)


def fields(subject: "Subject", world: World, tables: Tensor, values: Tensor, behaviors: Tensor) -> tuple[Tensor, Tensor]:
    """The expected gradient by the logits float[K, S, V] and by the values float[K, S]; data are given, not differentiated."""
    allowed = torch.tensor(np.array(world.mdp.allowed))
    x, v = torch.where(allowed, tables, 0.0).requires_grad_(), values.clone().requires_grad_()
    point = stack(world, torch.where(allowed, x, -torch.inf), v, behaviors)
    found = torch.autograd.grad(subject.loss(point.twos() if subject.twos else point), (x, v), allow_unused=True)
    by_logits, by_values = (torch.zeros_like(y) if g is None else g for g, y in zip(found, (x, v), strict=True))
    return by_logits, by_values


# ------------------------------------------------------------------------------------------------------------- subjects
def _l_star(world: World) -> Tensor:
    """l* = l_ref + q* / beta."""
    return torch.tensor(world.solution.optimal_logits())


def _q_over_beta(world: World) -> Tensor:
    """Step 0's optimum: q* / beta."""
    return torch.tensor(world.solution.q()) / world.beta


def _unshifted(world: World) -> Tensor:
    """ln pi* + v* / beta = ln pi_ref + q* / beta: the optimum of step 1, and one of TBRM's."""
    return torch.tensor(world.solution.log_policy() + world.solution.v()[:, None] / world.beta)


@dataclass(frozen=True, eq=False)
class Subject:
    """A loss, and what theory says of it.

    loss          of a Point, summed with the rows' probabilities
    theory        where pi* is stationary
    level         which levels of the logits it sees, and so pins down: of all states, of the start alone, or none
    optimum       the table at which it is asked
    values        where it has values of its own: "start" or "states"; they are asked at v*
    value_theory  where these values are stationary, by the same loss
    twos          asked on groups of two rows; what it pins down is asked where a completion has one token (the groups are many)
    follow        its Jacobian is asked on data that follow the policy: clipping has a kink at the optimum on any other
    fixes         what it pins down, where that does not follow from `level`
    """

    name: str
    loss: Callable[[Point], Tensor]
    theory: Theory
    level: Level = "none"
    optimum: Callable[[World], Tensor] = _l_star
    values: Literal["start", "states"] | None = None
    value_theory: Theory = "always"
    twos: bool = False
    follow: bool = False
    fixes: str = ""

    @property
    def readout(self) -> Method:
        """The derivation step as whose logits its table is read."""
        names: dict[Any, str] = {_q_over_beta: "naive", _unshifted: "easy"}
        return METHODS[names.get(self.optimum, "shiq")]


def _of(loss: Callable[..., Tensor], *, joint: bool = False, **more: Any) -> Callable[[Point], Tensor]:
    """A loss of (policy_stats, ref_stats, batch) with options; options that are functions are asked of the point."""

    def run(p: Point) -> Tensor:
        options = {key: value(p) if callable(value) else value for key, value in more.items()}
        return loss(p.stats(joint), p.ref, p.batch, **p.options, **options)

    return run


def _stopped(p: Point) -> Tensor:
    stats = p.stats()
    return shiq.shifted_loss(stats, p.ref, p.batch, target_stats=stats.detach(), **p.options)


def _topr(p: Point) -> Tensor:
    return policy_gradient.topr_loss(
        p.stats(), p.batch, behavior_logprobs=p.behavior_logprobs, gamma=p.world.gamma, reduction="sum"
    )


def _weighted_reinforce(p: Point) -> Tensor:
    """Every row counts pi(y) / behaviour(y) times, without gradient."""
    stats = p.stats()
    ratio = torch.exp(sequences_of(stats, p.ref, p.batch, p.world.beta, p.world.gamma).log_prob.detach() - p.behavior_log_prob)
    batch = replace(p.batch, weights=p.batch.weights * ratio)
    return policy_gradient.reinforce_loss(stats, p.ref, batch, **p.options)


def _pooled_copg(p: Point) -> Tensor:
    return contrastive.copg_pairs_loss(p.stats(), p.ref, p.pooled(), **p.options)


def _grpo(**options: Any) -> Callable[[Point], Tensor]:
    plain: dict[str, Any] = {"std": False, "length_mean": False, "behavior_logprobs": lambda p: p.behavior_logprobs}
    return _of(policy_gradient.grpo_loss, **(plain | options))


def _derivation() -> Iterator[Subject]:
    """The steps of ShiQ's derivation, and its repairs."""
    yield Subject("naive", _of(shiq.naive_loss, joint=True), "deterministic", "all", _q_over_beta)
    yield Subject("easy", _of(shiq.easy_sampling_loss), "deterministic", "all", _unshifted)
    yield Subject("shifted, one step", _of(shiq.shifted_loss), "deterministic", "all")
    yield Subject("shifted, two steps", _of(shiq.shiq_loss, n_steps=2), "deterministic", "all")
    yield Subject("ShiQ", _of(shiq.shiq_loss), "path", "all")
    yield Subject("sequence only", _of(shiq.sequence_loss), "path", "start")
    yield Subject("one step, target stopped", _stopped, "always", "all")
    yield Subject("semi-gradient, through the token", _of(shiq.semi_gradient_loss), "always", "all")
    value = _of(shiq.semi_gradient_loss, through="value")
    yield Subject("semi-gradient, through the value", value, "always", "all", fixes=ONE_A_STATE)
    yield Subject("turn-cut", _of(shiq.turn_cut_loss), "always", "all")


def _consistency() -> Iterator[Subject]:
    """Regressions of whole rows, with or without a value."""
    yield Subject("CoPG", _of(contrastive.copg_pairs_loss), "path")
    yield Subject("CoPG, pairs across prompts", _pooled_copg, "on-policy")
    yield Subject("AGRO", _of(contrastive.agro_loss, population=True), "path")
    dro = _of(consistency.dro_loss, values=lambda p: p.values[p.first_state])
    yield Subject("DRO-V", dro, "path", values="start")
    yield Subject("A*-PO", _of(consistency.a_star_loss, v_star=lambda p: p.v_star), "path")
    yield Subject("A*-PO, wrong V*", _of(consistency.a_star_loss, v_star=lambda p: p.v_star + WRONG), "on-policy")
    pcl: dict[str, Any] = {"values": lambda p: p.state_values}
    yield Subject("PCL", _of(consistency.pcl_loss, **pcl), "path", values="states")
    one = _of(consistency.pcl_loss, **pcl, n_steps=1)
    yield Subject("PCL, one step", one, "always", values="states", value_theory="deterministic")
    stopped = _of(consistency.pcl_loss, **pcl, n_steps=1, stop_target=True)
    yield Subject("PCL, one step, target stopped", stopped, "always", values="states")
    yield Subject("TBRM", _of(consistency.tbrm_loss), "path", "start", _unshifted)
    yield Subject("TBRM at l*", _of(consistency.tbrm_loss), "never", "start")


def _preference() -> Iterator[Subject]:
    yield Subject("DPO, Bradley-Terry labels", _of(preference.dpo_pairs_loss), "deterministic")
    yield Subject("DPO, hard labels", _of(preference.dpo_pairs_loss, hard_labels=True), "never")
    yield Subject("IPO, Bradley-Terry labels", _of(preference.ipo_pairs_loss), "never")
    sft = lambda p: policy_gradient.sft_loss(p.stats(), p.batch, reduction="sum")  # noqa: E731
    yield Subject("SFT", sft, "on-policy", fixes=NOTHING)


def _policy_gradients() -> Iterator[Subject]:
    reinforce, rloo = policy_gradient.reinforce_loss, policy_gradient.rloo_loss
    yield Subject("REINFORCE, KL in the reward", _of(reinforce), "on-policy")
    yield Subject("REINFORCE, importance weights", _weighted_reinforce, "always")
    yield Subject("REINFORCE, baseline v*", _of(reinforce, baseline=lambda p: p.v_star), "path")
    yield Subject("REINFORCE, k1 in the loss", _of(reinforce, kl="k1"), "never")
    yield Subject("REINFORCE, k2 in the loss", _of(reinforce, kl="k2"), "one token")
    yield Subject("REINFORCE, k3 in the loss", _of(reinforce, kl="k3"), "never")
    yield Subject("RLOO", _of(rloo, population=True), "path")
    yield Subject("RLOO, groups of 2", _of(rloo), "path", twos=True)
    population: dict[str, Any] = {"population": True}
    yield Subject("GRPO", _grpo(std=True, length_mean=True, **population), "never")
    yield Subject("GRPO without std", _grpo(**population), "never")
    yield Subject("GRPO with std, true KL gradient", _grpo(std=True, kl="score", **population), "never")
    yield Subject("GRPO, groups of 2, mean with oneself, true KL gradient", _grpo(kl="score"), "never", twos=True)
    yield Subject(
        "GRPO, groups of 2, leave-one-out, true KL gradient", _grpo(kl="score", leave_one_out=True), "on-policy", twos=True
    )
    yield Subject("GRPO, groups of 2, mean with oneself, KL in the reward", _grpo(kl="reward"), "path", twos=True, follow=True)
    yield Subject("GRPO, true KL gradient, mean over tokens", _grpo(kl="score", length_mean=True, **population), "one token")
    yield Subject("TOPR", _topr, "never")


@cache
def subjects() -> tuple[Subject, ...]:
    """Every loss of the table: a line each."""
    return (*_derivation(), *_consistency(), *_preference(), *_policy_gradients())


def lookup(name: str) -> Subject:
    """The loss of that name, whatever its case; an unknown one is a ValueError that suggests the nearest."""
    known = {s.name.lower(): s for s in subjects()}
    found = known.get(str(name).lower())
    if found is None:
        raise unknown("loss", "a loss of the fixed-point table", name, (s.name for s in subjects()))
    return found
