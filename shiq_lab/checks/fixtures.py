"""Small automata with exact solutions, and the batches of them that a loss is called with.

Between them they hold every stratum in which bugs hide: unequal lengths, two turns with observation tokens, several prompts,
forbidden tokens, dense and terminal rewards, cut and terminated rows, reference logits with another level in every state.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shiq_lab.batch import TokenBatch, cut, pad
from shiq_lab.bellman import Solution, evaluate, solve
from shiq_lab.builders import Act, Say, from_turns, random_reference
from shiq_lab.enumeration import enumerate_trajectories
from shiq_lab.graph import Floats
from shiq_lab.mdp import TokenMDP
from shiq_lab.policies import softmax_policy, uniform_policy

TOKENS = ("a", "b", "c", "<eos>", "=>", "x", "y", "<never>", "<bos>")
A, B, C, EOS, ARROW, X, Y, NEVER, BOS = range(9)
LOW = -1e9  # the logit of a forbidden token: exp of it is 0 and differences of it are finite, in every dtype but float16


@dataclass(frozen=True, eq=False)
class Inputs:
    """Everything that a loss can be called with, for one batch."""

    batch: TokenBatch
    logits: Tensor  # (B, L, V)
    ref_logits: Tensor  # (B, L, V)
    beta: float
    gamma: float
    behavior_logprobs: Tensor  # (B, L), at actions
    values: Tensor  # (B, L), at actions: the value of the state in which the action was chosen
    environment: str
    pair_weights: Tensor | None = None  # (B,), preference batches: the probability of this order
    reverse: Tensor | None = None  # (B / 2,), preference batches: which pair is this one with the halves exchanged

    def change(self, **fields: Any) -> "Inputs":
        """The same with other tensors; names of the batch's own fields go into the batch."""
        inner = {k: fields.pop(k) for k in list(fields) if k in TokenBatch.__dataclass_fields__}
        return replace(self, batch=replace(self.batch, **inner), **fields) if inner else replace(self, **fields)

    def rows(self, index: Tensor | list[int]) -> "Inputs":
        """Some of the rows."""
        at = torch.as_tensor(index)
        own = {name: getattr(self, name)[at] for name in ("logits", "ref_logits", "behavior_logprobs", "values")}
        return replace(self, batch=self.batch.select(at), pair_weights=None, reverse=None, **own)

    def rearranged(self, source: Tensor, *, pad_id: int = EOS, junk: float = 0.0) -> "Inputs":
        """Position j of the new rows is source[:, j] of the old; -1 = padding, -2 = a further observation token.

        source int[B, L']. New positions have logits, rewards and so on of size `junk`, which nothing may read.
        """
        old, there = source.clamp(min=0), source >= 0
        noise = junk * torch.cos(torch.arange(source.numel()) * 1.7).reshape(source.shape)

        def move(x: Tensor, empty: Tensor | float) -> Tensor:
            if x.ndim == 3:
                return torch.where(there[..., None], x.gather(1, old[..., None].expand(-1, -1, x.shape[2])), noise[..., None])
            return torch.where(there, x.gather(1, old), empty)

        b = self.batch
        return self.change(
            input_ids=move(b.input_ids, torch.where(source == -2, Y, pad_id)),
            attention_mask=move(b.attention_mask, (source == -2).long()),
            completion_mask=move(b.completion_mask, 0),
            rewards=move(b.rewards, noise),
            states=None,
            **{name: move(getattr(self, name), noise) for name in ("logits", "ref_logits", "behavior_logprobs", "values")},
        )

    @property
    def scored(self) -> Tensor:
        """bool[B, L]: positions whose logits a loss may read: those before an action, and the last of a cut row."""
        out = torch.zeros_like(self.batch.attention_mask, dtype=torch.bool)
        out[:, :-1] = self.batch.completion_mask[:, 1:] == 1
        last = torch.nn.functional.one_hot(self.batch.last_index(), out.shape[1]).bool()
        return out | (last & ~self.batch.terminated[:, None])

    @property
    def size(self) -> float:
        """Tokens times the largest logit in play: what rounding is measured in."""
        real = self.logits[self.logits > LOW / 2].abs().max().item() if self.logits.numel() else 0.0
        return self.logits.shape[1] * max(1.0, real)


@dataclass(frozen=True, eq=False)
class Fixture:
    """An automaton with its solution; tables of logits float[S, V] become the inputs of a loss."""

    name: str
    mdp: TokenMDP
    beta: float
    gamma: float
    solution: Solution = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "solution", solve(self.mdp, beta=self.beta, gamma=self.gamma))

    @property
    def listing(self) -> TokenBatch:
        """Every row, with its probability under the uniform policy."""
        return _listing(self)

    def reference(self) -> Floats:
        """l_ref."""
        return np.where(self.mdp.allowed, self.mdp.ref_logits, LOW)

    def optimum(self, readout: str = "shifted") -> Floats:
        """l* = l_ref + q* / beta, or ln pi* + v* / beta for losses without the shift."""
        if readout == "shifted":
            table = self.solution.optimal_logits()
        else:
            table = self.solution.log_policy() + self.solution.v()[:, None] / self.beta
        return np.where(self.mdp.allowed, table, LOW)

    def perturbed(self, seed: int, table: Floats | None = None, size: float = 1.0) -> Floats:
        """A table with normal noise on every allowed logit."""
        table = self.reference() if table is None else table
        noise = np.random.default_rng([seed, 7]).normal(0.0, size, table.shape)
        return np.where(self.mdp.allowed, table + noise, LOW)

    def policy(self, table: Floats) -> Floats:
        """softmax(table) over the allowed tokens, with the environment's own rows."""
        return softmax_policy(self.mdp, np.where(self.mdp.allowed, table, -np.inf))

    def inputs(
        self, table: Floats, batch: TokenBatch | None = None, *, behavior: Floats | None = None, values: Floats | None = None
    ) -> Inputs:
        """The batch (default: the listing) as a loss sees it. `values` float[S] defaults to v*, `behavior` to uniform."""
        batch = self.listing if batch is None else batch
        behavior = uniform_policy(self.mdp) if behavior is None else behavior
        values = self.solution.v() if values is None else values
        states = batch.known_states()
        before = torch.nn.functional.pad(states, (1, 0), value=-1)[:, :-1]
        chosen = (batch.completion_mask == 1) & (before >= 0)
        at = before.clamp(min=0)
        taken = torch.from_numpy(np.array(behavior))[at, batch.input_ids]
        return Inputs(
            batch=batch,
            logits=place(torch.from_numpy(table), states),
            ref_logits=place(torch.from_numpy(self.reference()), states),
            beta=self.beta,
            gamma=self.gamma,
            behavior_logprobs=torch.where(chosen, taken, 0.0),
            values=torch.where(chosen, torch.from_numpy(np.array(values))[at], 0.0),
            environment=self.name,
        )

    def own_values(self, table: Floats) -> Floats:
        """v of the policy softmax(table): what an exact critic would say."""
        return evaluate(self.mdp, self.policy(table), beta=self.beta, gamma=self.gamma).v

    def cut_rows(self, seed: int = 3) -> TokenBatch:
        """The listing with most rows cut somewhere, at another length each; those that can still end keep terminated."""
        rng = np.random.default_rng(seed)
        real = self.listing.attention_mask.sum(1)
        wanted = torch.from_numpy(rng.integers(2, int(real.max()) + 2, len(self.listing)))
        return cut(self.listing, wanted)

    def some(self, count: int) -> list[int]:
        """Rows of the listing spread over prompts and lengths: the order of the listing is by length."""
        return [int(i) for i in np.unique(np.linspace(0, len(self.listing) - 1, count).round())]

    def __hash__(self) -> int:
        return hash((self.name, self.beta, self.gamma))


def place(table: Tensor, states: Tensor) -> Tensor:
    """logits[:, i] = the table's row of the state after token i, 0 where there is none: float[B, L, V]."""
    return torch.where((states >= 0)[..., None], table[states.clamp(min=0)], 0.0)


@lru_cache(maxsize=64)
def _listing(fixture: Fixture) -> TokenBatch:
    return pad(enumerate_trajectories(fixture.mdp, behavior=uniform_policy(fixture.mdp)))


def automaton(turns: list[Say | Act], seed: int, *, terminal: bool = False, thin: float = 0.0, name: str = "") -> TokenMDP:
    """Turns with a random reward on every action (or on a row's last alone), and a share `thin` of the edges forbidden."""
    rng = np.random.default_rng(seed)
    table: dict[tuple[int, ...], float] = {}

    def reward(prefix: tuple[int, ...]) -> float:
        if prefix not in table:
            table[prefix] = float(rng.normal())
        return table[prefix]

    mdp = random_reference(from_turns(turns, reward, len(TOKENS), tokens=TOKENS, name=name), seed, level=2.0)
    if terminal:
        mdp = replace(mdp, reward=np.where(mdp.allowed & (mdp.next_state < 0), 2 * mdp.reward, 0.0))
    drop = (rng.random(mdp.ref_logits.shape) < thin) & mdp.is_policy[:, None]
    drop &= np.cumsum(mdp.allowed, 1) > 1  # the first allowed token of a state always stays
    return replace(mdp, ref_logits=np.where(drop, -np.inf, mdp.ref_logits))


PROMPTS = Say({(BOS, X): 0.4, (BOS, Y, X): 0.6})  # two prompts of unequal length


def reply(prefix: tuple[int, ...]) -> dict[tuple[int, ...], float]:
    """A deterministic tool: one, two or three observation tokens, by the last token said."""
    return {{A: (ARROW, X), B: (ARROW, Y, X)}.get(prefix[-1], (Y,)): 1.0}


def coin(prefix: tuple[int, ...]) -> dict[tuple[int, ...], float]:
    """A random tool."""
    return {(ARROW, X): 0.3, (Y,): 0.7}


@lru_cache(maxsize=64)
def fixture(name: str, gamma: float = 1.0) -> Fixture:
    """A fixture by name; `gamma` other than 1 where the loss follows a discount."""
    turns: dict[str, tuple[list[Say | Act], dict[str, Any]]] = {
        "one turn": ([PROMPTS, Act(3, (A, B), stop=EOS)], {"seed": 11, "thin": 0.15}),
        "terminal reward": ([PROMPTS, Act(3, (A, B), stop=EOS)], {"seed": 12, "terminal": True}),
        "two turns": (
            [PROMPTS, Act(2, (A, B), stop=EOS), Say(reply), Act(2, (A, C), stop=EOS)],
            {"seed": 13, "thin": 0.2},
        ),
        "small": ([PROMPTS, Act(2, (A,), stop=EOS), Say(reply), Act(2, (B,), stop=EOS)], {"seed": 14}),
        "one length": ([PROMPTS, Act(1, (A, B)), Say({(Y,): 1.0}), Act(1, (A, C))], {"seed": 15}),
        "long rows": ([PROMPTS, Act(7, (A,), stop=EOS)], {"seed": 21}),
        "large q / beta": ([PROMPTS, Act(3, (A, B), stop=EOS)], {"seed": 11, "thin": 0.15}),
        "random tool": ([PROMPTS, Act(1, (A, B)), Say(coin), Act(2, (C,), stop=EOS)], {"seed": 16}),
    }
    said, options = turns[name]
    label = name if gamma == 1.0 else f"{name}, gamma {gamma}"
    return Fixture(label, automaton(said, name=name, **options), beta=0.05 if name == "large q / beta" else 0.7, gamma=gamma)


def fixtures(names: tuple[str, ...], gammas: tuple[float, ...]) -> Iterator[Fixture]:
    """Every name with every discount."""
    for name in names:
        for gamma in gammas:
            yield fixture(name, gamma)
