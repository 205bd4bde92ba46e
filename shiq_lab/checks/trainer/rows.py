"""What check_trainer hands to a trainer: the configuration, and examples in TRL's columns; how they become a batch.

An example is a dict. `dataset` is the list of all of them, `rows` a list of some: one call of `step(rows)` trains on these.

    kinds bellman, trajectory, policy_only, on_policy   one completion
        prompt_ids, completion_ids      lists of token ids; an example's tokens are prompt_ids + completion_ids
        completion_mask                 1 where the policy chose the token, 0 for observations between two turns
        rewards, reward                 one a completion token (0 on observations), and their sum
        terminated                      whether the row ended by itself
        group                           examples with the same prompt share it
    kind preference                                     a pair
        prompt_ids, chosen_ids, rejected_ids
        chosen_reward, rejected_reward  the sums over their tokens
    every example
        index                           its place in `dataset`
        weight                          its probability: of the string under the reference, or of the label under Bradley-Terry

On-policy and policy-only trainers get the rows of a group together, `group_size` at a time; on-policy trainers are to train as
if they had just generated these completions (the Hugging Face oracle's `saying` makes `generate` say them).
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from shiq_lab.batch import TokenBatch, pad
from shiq_lab.bellman import Solution, solve
from shiq_lab.builders import END, Row, from_states, random_reference
from shiq_lab.checks.fixtures import fixture
from shiq_lab.enumeration import enumerate_trajectories
from shiq_lab.graph import Floats
from shiq_lab.mdp import TokenMDP
from shiq_lab.policies import softmax_policy

Example = dict[str, Any]
GROUPED = ("policy_only", "on_policy")  # kinds whose losses compare the completions of one prompt


@dataclass(frozen=True)
class TrainerConfig:
    """What check_trainer varies.

    kind, beta, gamma   the objective, J = E sum gamma^t [r - beta ln(pi / pi_ref)]
    lr                  of plain SGD (no momentum, decay, clipping or schedule); 0 where only the gradient is wanted
    batch_size          examples a micro-batch (rows, pairs, or whole groups); None: all of them
    accumulation        micro-batches an optimiser step; rows beyond batch_size x accumulation make further steps
    padding_side, pad_to_multiple_of, pad_id
                        where padding stands, to what width, and which id it holds (that of the end token by default)
    group_size          completions of a group
    packing             several rows in one
    dtype               of the models
    options             the trainer's own switches, by name
    """

    kind: str
    beta: float
    gamma: float = 1.0
    lr: float = 0.0
    batch_size: int | None = None
    accumulation: int = 1
    padding_side: str = "right"
    pad_to_multiple_of: int | None = None
    pad_id: int = 0
    group_size: int = 2
    packing: bool = False
    dtype: str = "float64"
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def unit(self) -> int:
        """How many examples belong together."""
        return self.group_size if self.kind in GROUPED else 1

    def micro_batches(self, rows: Sequence[Example]) -> list[list[list[Example]]]:
        """The rows as optimiser steps of micro-batches; groups stay whole."""
        size = (self.batch_size or max(1, len(rows) // self.unit)) * self.unit
        micro = [list(rows[i : i + size]) for i in range(0, len(rows), size)]
        return [micro[i : i + self.accumulation] for i in range(0, len(micro), self.accumulation)]


# ----------------------------------------------------------------------------------------------- examples to batches
def collate(rows: Sequence[Example], config: TrainerConfig) -> TokenBatch:
    """The examples as one padded batch; pairs as the contract wants them, all chosen before all rejected."""
    if config.kind == "preference":
        rows = [_half(row, side) for side in ("chosen", "rejected") for row in rows]
    ids = [list(row["prompt_ids"]) + list(row["completion_ids"]) for row in rows]
    longest = max(map(len, ids))
    multiple = config.pad_to_multiple_of or 1
    batch = TokenBatch(
        input_ids=_columns(ids, longest, torch.int64),
        attention_mask=_columns([[1] * len(x) for x in ids], longest, torch.int64),
        completion_mask=_columns([[0] * len(r["prompt_ids"]) + list(r["completion_mask"]) for r in rows], longest, torch.int64),
        rewards=_columns([[0.0] * len(r["prompt_ids"]) + list(r["rewards"]) for r in rows], longest, torch.float64),
        terminated=torch.tensor([bool(row["terminated"]) for row in rows]),
        group_ids=torch.tensor([int(row["group"]) for row in rows]),
    )
    side = "left" if config.padding_side == "left" else "right"
    return pad(batch, side, pad_id=config.pad_id, width=-(-longest // multiple) * multiple)  # type: ignore[arg-type]


def _half(pair: Example, side: str) -> Example:
    """One answer of a pair as an example of its own; its reward stands on its last token."""
    said = list(pair[f"{side}_ids"])
    rewards = [0.0] * (len(said) - 1) + [pair[f"{side}_reward"]]
    return {
        "prompt_ids": pair["prompt_ids"],
        "completion_ids": said,
        "completion_mask": [1] * len(said),
        "rewards": rewards,
        "terminated": True,
        "group": pair["group"],
    }


def _columns(lists: Sequence[Sequence[float]], width: int, dtype: torch.dtype) -> Tensor:
    return torch.tensor([list(x) + [0] * (width - len(x)) for x in lists], dtype=dtype)


# -------------------------------------------------------------------------------------------------------- the worlds
TOKENS = ("a", "b", "<eos>", "u", "w", "<bos>")
A, B, EOS, U, W, BOS = range(len(TOKENS))


def one_turn(length: int = 2) -> TokenMDP:
    """Two prompts of unequal length; the policy says up to `length` letters and always closes with the end token.

    Tokenisers that append an end token where it is missing leave such rows alone. Rewards stand on every token.
    """
    prompts = {(BOS,): {U: 0.4, W: 0.6}, (BOS, W): {U: 1.0}}

    def row(said: tuple[int, ...]) -> Row:
        if not said:
            return Row(next={BOS: (BOS,)}, probs={BOS: 1.0})
        if said in prompts:
            return Row(next={token: (*said, token) for token in prompts[said]}, probs=prompts[said])
        letters = () if len(said) - said.index(U) > length else (A, B)
        after: dict[int, Any] = {token: (*said, token) for token in letters}
        paid = {
            token: math.sin(7.0 * sum((i + 1) * (t + 2) for i, t in enumerate((*said, token)))) for token in (*letters, EOS)
        }
        return Row(next={**after, EOS: END}, reward=paid)

    return random_reference(from_states((), row, len(TOKENS), tokens=TOKENS, name="one turn"), seed=5, level=2.0)


@dataclass(frozen=True, eq=False)
class World:
    """An automaton, its solution, and every string of it as examples."""

    name: str
    mdp: TokenMDP
    kind: str
    beta: float
    gamma: float

    @cached_property
    def solution(self) -> Solution:
        """The exact solution of its automaton."""
        return solve(self.mdp, beta=self.beta, gamma=self.gamma)

    @cached_property
    def strings(self) -> list[Example]:
        """One example a string, in the order of the listing; weight: its probability under the reference."""
        batch = enumerate_trajectories(self.mdp)
        return [_example(batch, i) for i in range(len(batch))]

    @cached_property
    def dataset(self) -> list[Example]:
        """Every string once, or every ordered pair of strings of one prompt."""
        if self.kind != "preference":
            return self.strings
        same = [(y, n) for y, n in itertools.permutations(self.strings, 2) if y["group"] == n["group"]]
        return [_pair(y, n, i) for i, (y, n) in enumerate(same)]

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest string."""
        return max(len(s["prompt_ids"]) + len(s["completion_ids"]) for s in self.strings)

    @cached_property
    def spread(self) -> float:
        """The largest reward-to-go of a row, or the largest difference between two: the size of a residual at the reference."""
        totals = [abs(sum(s["rewards"][t:])) for s in self.strings for t in range(len(s["rewards"]))]
        return max(totals)

    @cached_property
    def largest(self) -> float:
        """max |l| over both tables, allowed tokens alone: what is rounded."""
        allowed = torch.tensor(self.mdp.allowed)
        return max(self.table(name)[allowed].abs().max().item() for name in ("optimum", "reference"))

    @cached_property
    def end_id(self) -> int:
        """The end token."""
        return self.mdp.token("<eos>")

    def table(self, which: str) -> Tensor:
        """Logits float64[S, V]: "optimum", "reference", or "perturbed" (the optimum with noise of 0.3)."""
        if which == "reference":
            return torch.tensor(self.mdp.ref_logits)
        best = torch.tensor(self.solution.optimal_logits())
        if which == "perturbed":
            best = best + 0.3 * torch.randn(best.shape, generator=torch.Generator().manual_seed(3), dtype=best.dtype)
        return torch.where(torch.tensor(self.mdp.allowed), best, -torch.inf)

    def log_probability(self, table: Tensor, row: Example) -> float:
        """ln of the probability of a completion under softmax(table)."""
        policy: Floats = softmax_policy(self.mdp, table.numpy())
        state, total = self.mdp.start, 0.0
        tokens = [*row["prompt_ids"], *row["completion_ids"]]
        chosen = [0] * len(row["prompt_ids"]) + list(row["completion_mask"])
        for token, mine in zip(tokens, chosen, strict=True):
            total += policy[state, token] if mine else 0.0
            state = int(self.mdp.next_state[state, token])
        return total

    def without_rewards(self) -> "World":
        """The same world where nothing is paid: the reference is the optimum."""
        return replace(self, name=f"{self.name}, no reward", mdp=replace(self.mdp, reward=0.0 * self.mdp.reward))

    def text(self, rows: Sequence[Example]) -> str:
        """Rows to show in a message."""
        show = lambda ids: " ".join(self.mdp.show(i) for i in ids)  # noqa: E731
        parts = []
        for row in rows[:2]:
            names = [k for k in ("completion_ids", "chosen_ids", "rejected_ids") if k in row]
            parts.append(f"{show(row['prompt_ids'])} | " + " > ".join(show(row[k]) for k in names))
        return "; ".join(parts) + (f" and {len(rows) - 2} more" if len(rows) > 2 else "")


def _example(batch: TokenBatch, i: int) -> Example:
    length = int(batch.attention_mask[i].sum())
    action = batch.completion_mask[i, :length].tolist()
    first = action.index(1)
    ids, rewards = batch.input_ids[i, :length].tolist(), batch.rewards[i, :length].tolist()
    return {
        "index": i,
        "weight": batch.weights[i].item(),
        "group": int(batch.group_ids[i]),
        "prompt_ids": ids[:first],
        "completion_ids": ids[first:],
        "completion_mask": action[first:],
        "rewards": rewards[first:],
        "reward": sum(rewards[first:]),
        "terminated": bool(batch.terminated[i]),
    }


def _pair(chosen: Example, rejected: Example, index: int) -> Example:
    """A labelled pair; its weight is the probability of the label, 1 / (1 + exp(R_rejected - R_chosen))."""
    return {
        "index": index,
        "weight": 1 / (1 + math.exp(rejected["reward"] - chosen["reward"])),
        "group": chosen["group"],
        "prompt_ids": chosen["prompt_ids"],
        "chosen_ids": chosen["completion_ids"],
        "rejected_ids": rejected["completion_ids"],
        "chosen_reward": chosen["reward"],
        "rejected_reward": rejected["reward"],
    }


def worlds(kind: str, gamma: float, multi_turn: bool) -> list[World]:
    """Where a kind of trainer is checked; gamma where it discounts, and a dialogue of two turns where it stands one."""
    found = [World("one turn", one_turn(), kind, beta=0.5, gamma=gamma)]
    if multi_turn:
        found.append(World("two turns", fixture("two turns").mdp, kind, beta=0.7, gamma=gamma))
    return found
