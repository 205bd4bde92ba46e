"""A model against a prefix tree: its logits at every prefix as one table, and the tree whose reference is the frozen model.

A network's logits depend on all that was said, so the truth about it is solved on the unfolded tree, prefix by prefix. Rows
share their prefixes: few rows hold them all, and one forward pass over these gives the table that every loss reads.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from shiq_lab.enumeration import unfold
from shiq_lab.errors import bad
from shiq_lab.mdp import TokenMDP
from shiq_lab.models.tabular import CausalLMOutput
from shiq_lab.sampling import require_prompt


class CausalLM(Protocol):
    """Anything that takes (input_ids, attention_mask) and returns .logits float[B, L, V]."""

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> CausalLMOutput: ...


@dataclass(frozen=True, eq=False)
class Prefixes:
    """Every prefix of an automaton at which the policy speaks, in as few rows as hold them all.

    tree            the automaton unfolded; a state for every prefix
    input_ids       int[R, L]  right-padded rows; attention_mask {0, 1}[R, L]
    row, position   int[S]     where the policy state's prefix ends in these rows; 0 in environment states
    """

    tree: TokenMDP
    input_ids: Tensor
    attention_mask: Tensor
    row: Tensor
    position: Tensor

    @classmethod
    def of(cls, mdp: TokenMDP, max_states: int = 100_000) -> "Prefixes":
        """Unfold an automaton with an environment root. ValueError where it has more than max_states prefixes."""
        require_prompt(mdp)
        tree, _ = unfold(mdp, max_states)
        S = tree.n_states
        parent, said = np.full(S, -1), np.full(S, -1)
        state, token = np.nonzero(tree.next_state >= 0)
        parent[tree.next_state[state, token]], said[tree.next_state[state, token]] = state, token
        length, inner, up = np.zeros(S, dtype=np.int64), np.zeros(S, dtype=bool), parent.copy()
        while (up >= 0).any():  # one step towards the root from every state at once
            length += up >= 0
            inner[up[tree.is_policy & (up >= 0)]] = True
            up = np.where(up >= 0, parent[up], -1)
        last = tree.is_policy & ~inner  # no policy state behind it
        ends = np.flatnonzero(last)
        row, ids = np.zeros(S, dtype=np.int64), np.zeros((len(ends), int(length.max(initial=1))), dtype=np.int64)
        here, rows = ends.copy(), np.arange(len(ends))
        while rows.size:
            row[here] = rows
            on = length[here] > 0
            here, rows = here[on], rows[on]
            ids[rows, length[here] - 1] = said[here]
            here = parent[here]
        real = np.arange(ids.shape[1]) < length[ends][:, None]
        where = np.where(tree.is_policy, length - 1, 0)
        parts = (ids, real.astype(np.int64), np.where(tree.is_policy, row, 0), where)
        return cls(tree, *(torch.from_numpy(part) for part in parts))

    @cached_property
    def _open(self) -> Tensor:
        """bool[S, V]: what the policy may say."""
        return torch.from_numpy(self.tree.allowed & self.tree.is_policy[:, None])

    def table(self, model: CausalLM) -> Tensor:
        """The model's logits at every prefix, float[S, V], with gradient; -inf where forbidden, the tree's own elsewhere."""
        logits = model(input_ids=self.input_ids, attention_mask=self.attention_mask).logits[self.row, self.position]
        if logits.shape[1] != self.tree.n_tokens:
            raise bad("model", f"logits of {self.tree.n_tokens} tokens", f"{logits.shape[1]}")
        own = torch.from_numpy(np.array(self.tree.ref_logits)).to(logits.dtype)
        return torch.where(self._open, logits, torch.where(torch.from_numpy(~self.tree.is_policy)[:, None], own, -torch.inf))

    def with_reference(self, model: CausalLM) -> "Prefixes":
        """The same tree where the frozen model's logits are the reference: solve(.tree) is then the truth about training it."""
        with torch.no_grad():
            table = self.table(model).double().numpy()
        ref_logits = np.where(self.tree.is_policy[:, None], table, self.tree.ref_logits)  # replies keep their float64
        return replace(self, tree=replace(self.tree, ref_logits=ref_logits))
