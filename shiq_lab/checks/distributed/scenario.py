"""What the ranks are given: rows of unequal lengths, a table, a head in shards; made anew in each from a seed."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from shiq_lab.batch import TokenBatch, concatenate, cut, pad
from shiq_lab.checks.rollout.oracle import toy_dialogue
from shiq_lab.models.tabular import TabularLM
from shiq_lab.sampling import sample

RANKS = 2
D, V = 6, 10  # of the sharded head
DTYPES = {"float64": torch.float64, "float32": torch.float32}


@dataclass(frozen=True)
class Scenario:
    """What the processes are given; made anew in each from the seed, so that nothing large travels.

    rows      "unequal": the short rows on rank 0, the long on rank 1; "exchanged": the other way round; "empty": rank 0
              gets rows without any action
    scale     of the hidden states ("vocab")
    """

    kind: str
    dtype: str
    combine: str
    seed: int
    rows: str = "unequal"
    scale: float = 1.0


def shards(scenario: Scenario) -> list[TokenBatch]:
    """The rows of each rank, padded to its own longest: a third of them shorter than the rest, some cut."""
    mdp = toy_dialogue()
    batch = sample(mdp, mdp.ref_log_policy, 12, rng=scenario.seed, max_tokens=14)
    batch = replace(batch, rewards=batch.rewards.to(DTYPES[scenario.dtype]), weights=batch.weights.to(DTYPES[scenario.dtype]))
    order = torch.argsort(batch.attention_mask.sum(1), stable=True)
    few, many = batch.select(order[:4]), batch.select(order[4:])
    if scenario.rows == "empty":
        few = cut(few, 3)  # the prompts alone
    both = [pad(few), pad(many)]
    return both[::-1] if scenario.rows == "exchanged" else both


def table_model(scenario: Scenario) -> TabularLM:
    """A table away from the reference, so that every residual and every gradient is there."""
    mdp = toy_dialogue()
    noise = np.random.default_rng(scenario.seed + 1).normal(size=mdp.ref_logits.shape)
    return TabularLM(mdp, torch.tensor(mdp.ref_logits + noise, dtype=DTYPES[scenario.dtype]))


def sharded_head(scenario: Scenario) -> tuple[Tensor, Tensor, TokenBatch, list[Tensor]]:
    """hidden float[B, L, D], head float[D, V], a batch whose tokens fall in every shard, and random weights of its statistics
    (0 where nothing is scored)."""
    rng = np.random.default_rng(scenario.seed + 2)
    batch = concatenate(shards(scenario))
    B, L = batch.input_ids.shape
    batch = replace(batch, input_ids=torch.tensor(rng.integers(0, V, (B, L))), states=None)
    make = lambda *shape: torch.tensor(rng.normal(size=shape), dtype=DTYPES[scenario.dtype])  # noqa: E731
    live = batch.completion_mask[:, 1:] == 1
    masks = [live, live, ~batch.terminated]
    weights = [torch.where(mask, make(*mask.shape), 0.0) for mask in masks]
    return make(B, L, D) * scenario.scale, make(D, V), batch, weights
