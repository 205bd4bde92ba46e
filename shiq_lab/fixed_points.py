"""The fixed-point table: is pi* stationary under a loss, on which data, in which world, and what does the loss pin down?

Every entry is the exact expected gradient at the loss's own optimum: all rows of a small automaton with their exact
probabilities, float64. What theory predicts stands beside it; a yes is a gradient below a bound that rounding gives, a no
one that is orders of magnitude above it, and whatever lies in between is neither and fails.

Theory, in words; "path" means R_b(y) = R(y) - beta l(y) = v*(prompt) on every row, which a deterministic world grants.

    always         the residual has mean zero given what the gradient depends on, whatever the data and the replies
    path           zero row by row in a deterministic world; with random replies on data of pi* alone, where the score of
                   what comes later has mean zero
    deterministic  zero row by row in a deterministic world; with random replies nowhere: the gradient also passes through
                   what the reply decides
    on-policy      the expected score cancels it on data of pi* alone, in any world
    one token      on-policy, and only where a completion is one token long
    never          another optimum, or none

What a loss pins down is read off the Jacobian of the field (the expected gradient as a function of the logits, by differences
of fourth order; on-policy losses with data that follow the policy): its null directions are the levels that stay free.
All tables of one question are stacked into one batch, so that one backward pass answers them all.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from shiq_lab.batch import TokenBatch
from shiq_lab.bellman import EPS, Solution, solve
from shiq_lab.builders import random_reference
from shiq_lab.enumeration import enumerate_trajectories
from shiq_lab.graph import Floats
from shiq_lab.losses import consistency, contrastive, policy_gradient, preference, shiq
from shiq_lab.losses.residuals import actions_of
from shiq_lab.losses.sequences import all_pairs
from shiq_lab.mdp import TokenMDP
from shiq_lab.policies import uniform_policy
from shiq_lab.progress import progress
from shiq_lab.stats import TokenStats

Theory = Literal["always", "path", "deterministic", "on-policy", "one token", "never"]
Level = Literal["all", "start", "none"]
BEHAVIORS = ("on-policy", "reference", "uniform", "random")
APART = 1e6  # a "no" lies at least this factor above the bound of a "yes" (seen: 4e8 and more; at other rewards 1e7)
STEP = 1e-3  # of the differences; their error is STEP^4 times a fifth derivative, and rounding / STEP
MOVED = 1.3  # how far levels are shifted: any number that is not small
WRONG = 1.0  # how far a wrong V* is off
SEED = 32  # of the rewards: at this one the two prompts are worth unlike amounts in every world


# --------------------------------------------------------------------------------------------------------------- worlds
@dataclass(frozen=True, eq=False)
class World:
    """An automaton, what is paid in it, and the discount: a line of conditions that every loss is put through."""

    name: Literal["deterministic", "random replies", "one token"]
    rewards: Literal["dense", "terminal"]
    gamma: float
    mdp: TokenMDP
    beta: float = 0.7

    @cached_property
    def solution(self) -> Solution:
        return solve(self.mdp, beta=self.beta, gamma=self.gamma)

    @cached_property
    def rows(self) -> TokenBatch:
        """Every row once; its weight is the chance of what the environment says in it."""
        batch = enumerate_trajectories(self.mdp)
        return replace(batch, weights=torch.exp(_spoken(batch, torch.tensor(self.mdp.ref_log_policy), policy=False)))

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


def _spoken(batch: TokenBatch, log_policy: Tensor, *, policy: bool) -> Tensor:
    """Log-probability float[..., B] of the actions (or else of what the environment says) under tables float[..., S, V].

    The first token of a row is spoken from the start, state 0.
    """
    ids, acted = batch.input_ids.clamp(min=0), batch.completion_mask == 1
    before = torch.nn.functional.pad(batch.known_states()[:, :-1], (1, 0), value=0).clamp(min=0)
    use = (batch.attention_mask == 1) & (acted if policy else ~acted)
    return torch.where(use, log_policy[..., before, ids], 0.0).sum(-1)


def _automaton(random_replies: bool, terminal: bool) -> TokenMDP:
    """Two prompts, two turns, strings of 1 to 5 actions that meet again, unlike levels and rewards in every state."""
    follow = np.array([
        [1, 2, -1],  # 0: the prompts
        [3, 4, -1], [5, 6, 4], [7, 8, -1], [8, 7, 6], [9, -1, -1],  # 1 to 5
        [9, 10, -1], [8, 10, 11],  # 6 and 7: the environment answers
        [-1, 11, 9], [11, -1, -1], [-1, -1, 11], [-1, -1, -1],  # 8 to 11
    ])  # fmt: skip
    is_policy = ~np.isin(np.arange(12), [0, 6, 7])
    chance = np.zeros(follow.shape)
    chance[0], chance[6], chance[7] = [0.6, 0.4, 0], [0.55, 0.45, 0], [0.3, 0.3, 0.4]
    if not random_replies:
        chance[6], chance[7] = [0, 1, 0], [0, 0, 1]
    allowed = np.ones(follow.shape, dtype=bool)
    allowed[5, 2] = False
    return _finish(follow, chance, is_policy, allowed, terminal)


def _single_token() -> TokenMDP:
    """Two prompts and one action of three."""
    follow = np.array([[1, 2, -1], [-1, -1, -1], [-1, -1, -1]])
    chance = np.zeros(follow.shape)
    chance[0] = [0.6, 0.4, 0]
    return _finish(follow, chance, np.array([False, True, True]), np.ones(follow.shape, dtype=bool), True)


def _finish(follow: Any, chance: Floats, is_policy: Any, allowed: Any, terminal: bool) -> TokenMDP:
    paid = is_policy[:, None] & allowed & ((follow < 0) | (not terminal))
    reward = np.where(paid, np.random.default_rng(SEED).normal(size=follow.shape), 0.0)
    with np.errstate(divide="ignore"):
        logits = np.where(is_policy[:, None], np.where(allowed, 0.0, -np.inf), np.log(chance))
    return random_reference(TokenMDP(follow, reward, logits, is_policy), seed=4)


@cache
def worlds() -> tuple[World, ...]:
    """Deterministic and random replies, dense and terminal rewards, gamma 1 and below; and completions of one token."""
    out = [
        World(name, rewards, gamma, _automaton(name == "random replies", rewards == "terminal"))
        for name in ("deterministic", "random replies")
        for rewards in ("dense", "terminal")
        for gamma in (1.0, 0.8)
    ]
    return (*out, World("one token", "terminal", 1.0, _single_token()))


# --------------------------------------------------------------------------------------------------------------- fields
@dataclass(frozen=True, eq=False)
class Point:
    """What a loss is handed: K copies of all rows, each with its own table of logits, values and behaviour."""

    world: World
    batch: TokenBatch  # K * B rows; states count on from copy to copy, groups too
    tables: Tensor  # float[K * S, V]
    values: Tensor  # float[K * S]
    behavior: Tensor  # float[K * S, V]: log-probabilities
    copy: Tensor  # int[K * B]

    @property
    def options(self) -> dict[str, Any]:
        return {"beta": self.world.beta, "gamma": self.world.gamma, "reduction": "sum"}

    def stats(self, joint: bool = False) -> TokenStats:
        return TokenStats.from_table(self.tables, self.batch, ref_table=self.ref_table if joint else None)

    @cached_property
    def ref_table(self) -> Tensor:
        return torch.tensor(self.world.mdp.ref_logits).repeat(len(self.tables) // self.world.mdp.n_states, 1)

    @cached_property
    def ref(self) -> TokenStats:
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
    chance = torch.exp(_spoken(rows, behaviors, policy=True)) * rows.weights  # (K, B)
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


NOTHING, ONE_A_STATE = "nothing", "one number a state"


@cache
def subjects() -> tuple[Subject, ...]:
    """Every loss of the table: a line each."""
    return (*_derivation(), *_consistency(), *_preference(), *_policy_gradients())


# ----------------------------------------------------------------------------------------------------------- predictions
def predict(theory: Theory, world: World, behavior: str) -> bool:
    """Is the gradient zero, by theory?"""
    on_policy, deterministic = behavior == "on-policy", world.name != "random replies"
    return {
        "always": True,
        "path": deterministic or on_policy,
        "deterministic": deterministic,
        "on-policy": on_policy,
        "one token": on_policy and world.name == "one token",
        "never": False,
    }[theory]


def _name(level: str, values: str | None) -> str:
    """What is pinned down, in words."""
    base = {"all": "q*, v*", "start": "pi*, v* at the start", "none": "pi*"}[level]
    return base + {None: "", "start": ", V of the prompt", "states": ", V of every state"}[values]


def _seen(level: Level, world: World) -> Level:
    """Where every state is a first one, its level is seen or not: "all" and "start" are the same."""
    return "all" if level == "start" and not len(world.inner) else level


def predicted_fixes(subject: Subject, world: World) -> str | None:
    """What theory says that the loss pins down; None where pi* (with the loss's own values) is not stationary at all."""
    data = _data(subject, world, [name for name in BEHAVIORS if _predict_both(subject, world, name)])
    if data is None:
        return None
    return subject.fixes or _name(_seen(subject.level, world), subject.values)


def _predict_both(subject: Subject, world: World, behavior: str) -> bool:
    own = subject.values is None or predict(subject.value_theory, world, behavior)
    return predict(subject.theory, world, behavior) and own


def _data(subject: Subject, world: World, stationary: list[str]) -> str | None:
    """The data of the Jacobian: "random" where that is allowed, else such as "follow" the policy; None if there are none."""
    if subject.twos and world.name != "one token":
        return None
    if "random" in stationary and not subject.follow:
        return "random"
    return "follow" if "on-policy" in stationary else None


# ---------------------------------------------------------------------------------------------------------- measurements
@dataclass(frozen=True)
class Row:
    """One entry: a loss in a world under a behaviour, measured and predicted.

    gradient        largest entry of the expected gradient by the logits, at the loss's optimum
    value_gradient  the same by the loss's own values, None where it has none
    bound           a yes is at most this; a no is at least APART times it
    sees            levels of the logits that matter to the gradient: "all", "start", "none"
    fixes           what the Jacobian's null directions leave pinned down; None where pi* is not stationary
    free            how many directions stay free, and the least singular value of the others
    """

    loss: str
    world: str
    rewards: str
    gamma: float
    behavior: str
    gradient: float
    value_gradient: float | None
    bound: float
    predicted: bool
    value_predicted: bool | None
    sees: str
    sees_predicted: str
    fixes: str | None
    fixes_predicted: str | None
    free: int | None = field(default=None)
    least: float | None = field(default=None)

    @property
    def stationary(self) -> bool | None:
        """Yes, no, or None for a gradient that is neither."""
        return _verdict(self.gradient, self.bound)

    @property
    def value_stationary(self) -> bool | None:
        return None if self.value_gradient is None else _verdict(self.value_gradient, self.bound)

    @property
    def holds(self) -> bool:
        """Is everything as theory says?"""
        values = self.value_predicted is None or self.value_stationary is self.value_predicted
        same = (self.sees, self.fixes) == (self.sees_predicted, self.fixes_predicted)
        return self.stationary is self.predicted and values and same


def _verdict(gradient: float, bound: float) -> bool | None:
    if gradient <= bound:
        return True
    return False if gradient >= APART * bound else None


def measure(subject: Subject, world: World) -> list[Row]:
    """The rows of one loss in one world, one a behaviour."""
    best, v_star = subject.optimum(world), torch.tensor(world.solution.v())
    many = best.expand(len(BEHAVIORS), *best.shape)
    behaviors = torch.stack([world.policies[name] for name in BEHAVIORS])
    by_logits, by_values = fields(subject, world, many, v_star.expand(len(many), -1), behaviors)
    bound = world.bound(many)
    gradients = by_logits.abs().amax((1, 2)).tolist()
    value_gradients = by_values.abs().amax(1).tolist() if subject.values else [None] * len(BEHAVIORS)
    worst = zip(BEHAVIORS, gradients, value_gradients, strict=True)
    still = [name for name, g, w in worst if g <= bound and (w is None or w <= bound)]
    fixes, free, least = pinned_down(subject, world, _data(subject, world, still))
    sees = seen_levels(subject, world)
    return [
        Row(
            subject.name, world.name, world.rewards, world.gamma, name, gradient, value_gradient, bound,
            predict(subject.theory, world, name),
            predict(subject.value_theory, world, name) if subject.values else None,
            sees, _seen(subject.level, world), fixes, predicted_fixes(subject, world), free, least,
        )
        for name, gradient, value_gradient in zip(BEHAVIORS, gradients, value_gradients, strict=True)
    ]  # fmt: skip


def seen_levels(subject: Subject, world: World) -> str:
    """Which levels the loss sees, asked at a table of no meaning: it has a gradient along them (the sum over a state's
    tokens), or the gradient changes where they are shifted, those of inner states or those of first states."""
    base = world.elsewhere
    tables = base.repeat(3, 1, 1)
    tables[1, world.inner] += MOVED
    tables[2, world.starts] += MOVED
    behaviors = world.policies["random"].expand_as(tables)
    values = torch.tensor(world.solution.v()).expand(3, -1)
    by_logits, by_values = fields(subject, world, tables, values, behaviors)
    size = 1 + float(by_logits.abs().max())
    moved = (by_logits[1:] - by_logits[0]).abs().amax((1, 2)) + (by_values[1:] - by_values[0]).abs().amax(1)
    along = [by_logits[0, states].sum(1).abs().sum() for states in (world.inner, world.starts)]
    inner, start = (_verdict(float(m + a), size * world.bound(tables)) for m, a in zip(moved, along, strict=True))
    if not len(world.inner):
        inner = start
    names: dict[tuple[bool | None, bool | None], str] = {(True, True): "none", (True, False): "start", (False, False): "all"}
    return names.get((inner, start), "unclear")


def pinned_down(subject: Subject, world: World, data: str | None) -> tuple[str | None, int | None, float | None]:
    """(what is pinned down, how many directions stay free, the least singular value of the others) at the optimum."""
    if data is None:
        return None, None, None
    jacobian, noise = jacobian_of(subject, world, follow=data == "follow")
    singular = np.linalg.svd(jacobian, compute_uv=False)
    null = singular <= noise
    free = int(null.sum())
    least = float(singular[~null].min()) if not null.all() else None
    if least is not None and least < 100 * noise:
        return "unclear", free, least
    if null.all():
        return NOTHING, free, least
    edges = world.edges.numpy()
    level = lambda states: (edges[:, :1] == states.numpy()).astype(float)  # noqa: E731
    dead = {}
    for name, states in (("start", world.starts), ("inner", world.inner)):
        moves = jacobian[:, : len(edges)] @ level(states)
        dead[name] = (np.linalg.norm(moves, axis=0) <= noise * np.sqrt(len(edges))).all() if len(states) else None
    n_start, n_inner = len(world.starts), len(world.inner)
    for seen, expected in (("all", 0), ("start", n_inner), ("none", n_inner + n_start)):
        levels_free = {"all": (False, False), "start": (False, True), "none": (True, True)}[seen]
        matches = dead["start"] == levels_free[0] and dead["inner"] in (None, levels_free[1])
        if matches and free == expected:
            return _name(seen, subject.values), free, least
    rank = len(singular) - free
    return (ONE_A_STATE if rank == n_start + n_inner and not any(dead.values()) else "something else"), free, least


def jacobian_of(subject: Subject, world: World, *, follow: bool) -> tuple[Floats, float]:
    """The Jacobian [P, P] of the field at the optimum by differences of fourth order, and the singular values of its noise.

    Parameters are the reachable tokens' logits, then the loss's own values. `follow`: data follow the moved policy.
    (8 (f(+h) - f(-h)) - (f(+2h) - f(-2h))) / 12h: f's rounding enters 18 / 12h times, the fifth derivative h^4 / 30 times.
    """
    edges = world.edges
    states = {None: edges[:0, 0], "start": world.starts, "states": torch.cat([world.starts, world.inner])}[subject.values]
    E, P = len(edges), len(edges) + len(states)
    best, v_star = subject.optimum(world), torch.tensor(world.solution.v())
    best = torch.where(torch.tensor(np.array(world.mdp.allowed)), best, 0.0)
    step = torch.tensor([1.0, -1.0, 2.0, -2.0], dtype=best.dtype) * STEP
    tables, values = best.repeat(4, P, 1, 1), v_star.repeat(4, P, 1)
    number = torch.arange(E)
    tables[:, number, edges[:, 0], edges[:, 1]] += step[:, None]
    values[:, torch.arange(E, P), states] += step[:, None]
    tables, values = tables.reshape(4 * P, *best.shape), values.reshape(4 * P, -1)
    allowed = torch.tensor(np.array(world.mdp.allowed))
    if follow:
        behaviors = torch.where(allowed, tables, -torch.inf).log_softmax(2)
        speaks = torch.tensor(~np.array(world.mdp.is_policy))
        behaviors[:, speaks] = torch.tensor(world.mdp.ref_log_policy)[speaks]
    else:
        behaviors = world.policies["random"].expand_as(tables)
    by_logits, by_values = fields(subject, world, tables, values, behaviors)
    flat = torch.cat([by_logits[:, edges[:, 0], edges[:, 1]], by_values[:, states]], 1).reshape(4, P, P)
    jacobian = (8 * (flat[0] - flat[1]) - (flat[2] - flat[3])) / (12 * STEP)
    noise = P * (1.5 * world.bound(tables) / STEP + float(flat.abs().max()) / STEP * STEP**4 / 3)
    return jacobian.T.numpy(), noise


@cache
def _table() -> tuple[Row, ...]:
    jobs = [(f"{s.name}, {w.name}", s, w) for s in subjects() for w in worlds()]
    return tuple(row for _, subject, world in progress(jobs, "fixed points") for row in measure(subject, world))


def table() -> list[Row]:
    """Every loss in every world under every behaviour: 36 rows a loss. Takes seconds, once a process."""
    return list(_table())


# -------------------------------------------------------------------------------------------------------------- showing
@dataclass(frozen=True)
class Line:
    """A loss in the printed table: a cell for each world on data of pi* itself and on others, and what it pins down."""

    loss: str
    cells: tuple[str, ...]
    fixes: str
    holds: bool


COLUMNS = tuple((world, own) for world in ("deterministic", "random replies", "one token") for own in (True, False))
HEADS = ("loss", *(f"{world}, {'own' if own else 'other'} data" for world, own in COLUMNS), "pins down")


def summary(rows: list[Row]) -> list[Line]:
    """The table with rewards, discounts and foreign behaviours folded together."""
    out = []
    for loss in dict.fromkeys(r.loss for r in rows):
        mine = [r for r in rows if r.loss == loss]
        cells = [_cell([r for r in mine if (r.world, r.behavior == "on-policy") == column]) for column in COLUMNS]
        fixes = next((r.fixes for r in mine if r.fixes is not None), "-")
        out.append(Line(loss, tuple(cells), fixes, all(r.holds for r in mine)))
    return out


def _cell(rows: list[Row]) -> str:
    """ "yes", or "no" with the smallest gradient met; "mixed" and "unclear" name what should not happen."""
    answers = {r.stationary for r in rows}
    if len(answers) != 1:
        return "mixed" if answers else "-"
    (answer,) = answers
    if answer is None:
        return "unclear"
    if not answer:
        return f"no ({min(r.gradient for r in rows):.0e})"
    values = {r.value_stationary for r in rows}
    return "yes" if values <= {None, True} else "yes, its V not"


def to_markdown(rows: list[Row]) -> str:
    """The document docs/fixed_points.md."""
    lines = summary(rows)
    cells = lambda texts: "| " + " | ".join(texts) + " |"  # noqa: E731
    body = [cells(HEADS), cells(["---"] * len(HEADS))] + [cells((x.loss, *x.cells, x.fixes)) for x in lines]
    count = f"{len(rows)} expected gradients, {sum(r.holds for r in rows)} as theory predicts"
    return MARKDOWN.format(count=count, table="\n".join(body), behaviors=len(BEHAVIORS) - 1)


MARKDOWN = """# Is pi* a fixed point?

Each cell is an exact expected gradient at the optimum that the loss is after: all rows of a small automaton (two prompts, two
turns, 1 to 5 actions, another level of the reference's logits in every state) with their exact probabilities, in float64.
*yes*: zero to rounding under dense and terminal rewards, gamma = 1 and 0.8. *no*: the smallest of its largest entries, at
least a million times the rounding. *Own data*: rows drawn from pi* itself; *other data*: {behaviors} behaviours of full support
(the reference, uniform, random), all with the same answer. *Pins down* is what is left when the null directions of the gradient
field's Jacobian are taken away ("-": there is no optimum to ask at). {count}.

Printed by `shiq-lab selftest --table`, which also has every number (`--json`); this file is generated from it.

{table}

- *its V not*: the loss's own value net is pulled away from v*, while the policy stays.
- *one number a state*: the gradient through the value alone has one direction a state; it cannot tell the tokens apart.
- *nothing*: where the data follow the policy the expected gradient is zero at every policy.
- On *other data* GRPO's ratios are clipped; where one is out of bounds the token's gradient may be cut off altogether.
- On its own data k1 in the loss does nothing at all, k3 is the gradient of KL(pi_ref || pi), and k2 misses what a token does to
  the states after it: in the loss, pi* survives k2 alone, and only where a completion is one token long.
"""


def to_json(rows: list[Row]) -> dict[str, object]:
    """All of it, for programs."""
    more = lambda r: {"stationary": r.stationary, "value_stationary": r.value_stationary, "holds": r.holds}  # noqa: E731
    return {"passed": bool(rows) and all(r.holds for r in rows), "rows": [{**asdict(r), **more(r)} for r in rows]}
