"""TabularLM: a table of logits a state as a causal language model, by walking the automaton along the tokens."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from shiq_lab.batch import TokenBatch
from shiq_lab.bellman import solve
from shiq_lab.errors import bad
from shiq_lab.mdp import TokenMDP
from shiq_lab.sampling import require_prompt


@dataclass(frozen=True, eq=False)
class CausalLMOutput:
    """logits float[B, L, V]; logits[:, i] scores input_ids[:, i + 1]."""

    logits: Tensor


def walk(next_state: Tensor, start: int, input_ids: Tensor, real: Tensor, first: Tensor | None = None) -> Tensor:
    """The state after each token, int[B, L]; -1 in padding, at the end and off the automaton. One step a column.

    next_state int[S, V] (-1: the end, or no edge); `real` and `first` are bool[B, L]; a first token starts again.
    """
    table = torch.nn.functional.pad(next_state, (0, 0, 0, 1), value=-1)  # a last row to stay in: the end
    ids = input_ids.clamp(0, next_state.shape[1] - 1)
    outside = ids != input_ids
    state = torch.full(ids.shape[:1], start, device=ids.device)
    out = torch.full_like(ids, -1)
    for i in range(ids.shape[1]):
        if first is not None:
            state = torch.where(first[:, i], start, state)
        follow = torch.where(outside[:, i], -1, table[state, ids[:, i]])
        state = torch.where(real[:, i], follow, state)
        out[:, i] = torch.where(real[:, i], follow, -1)
    return out


def real_tokens(input_ids: Tensor, attention_mask: Tensor | None = None, segment_ids: Tensor | None = None) -> Tensor:
    """bool[B, L]: what is no padding. Raises ValueError for inputs of a causal language model that do not fit together."""
    if not isinstance(input_ids, Tensor):
        raise bad("input_ids", "a tensor of integers [B, L]", type(input_ids).__name__)
    if input_ids.ndim != 2 or input_ids.is_floating_point():
        raise bad("input_ids", "integers [B, L]", f"{input_ids.dtype}, shape {tuple(input_ids.shape)}")
    for name, mask in (("attention_mask", attention_mask), ("segment_ids", segment_ids)):
        if mask is not None and mask.shape != input_ids.shape:
            raise bad(name, f"shape {tuple(input_ids.shape)}, as input_ids", f"shape {tuple(mask.shape)}")
    return torch.ones_like(input_ids) == 1 if attention_mask is None else attention_mask == 1


def states_of(
    next_state: Tensor, start: int, input_ids: Tensor, attention_mask: Tensor | None = None, segment_ids: Tensor | None = None
) -> Tensor:
    """`walk` along a causal language model's inputs: padding and packed segments as the masks say; int[B, L]."""
    real = real_tokens(input_ids, attention_mask, segment_ids)
    first = None
    if segment_ids is not None:
        first = real & (segment_ids != torch.nn.functional.pad(segment_ids, (1, 0))[:, :-1])
    return walk(next_state, start, input_ids, real, first)


class TabularLM(nn.Module):
    """A table of logits float[S, V] with the interface of a causal language model.

    forward(input_ids, attention_mask=None, segment_ids=None) -> .logits float[B, L, V], whose row i is the table's row of
    the state after token i. Forbidden tokens take the dtype's least finite number; rows in padding, after the end, and after
    a token that the automaton forbids are all 0. Padding may stand on either side and its ids may hold anything.
    The automaton needs an environment root and no horizon (use mdp.unroll(): the optimum depends on t).
    """

    def __init__(self, mdp: TokenMDP, logits: Tensor | None = None, *, trainable: bool = True) -> None:
        super().__init__()
        require_prompt(mdp)
        if mdp.horizon is not None:
            raise bad("mdp", "an automaton without a horizon", f"horizon {mdp.horizon}", "Use mdp.unroll().")
        table = torch.tensor(mdp.ref_logits) if logits is None else logits
        if not isinstance(table, Tensor):
            raise bad("logits", "a tensor", type(table).__name__)
        if tuple(table.shape) != mdp.ref_logits.shape:
            raise bad("logits", f"shape {mdp.ref_logits.shape}", f"shape {tuple(table.shape)}")
        if not table.is_floating_point():
            raise bad("logits", "a floating-point table", f"dtype {table.dtype}")
        self.mdp = mdp
        allowed = torch.from_numpy(np.array(mdp.allowed))
        if torch.isnan(table[allowed]).any():
            state, token = (int(x) for x in (torch.isnan(table) & allowed).nonzero()[0])
            raise bad("logits", "numbers where a token is allowed", f"NaN at {mdp.place(state, token)}")
        lowest = torch.finfo(table.dtype).min
        finite = torch.where(allowed, table, lowest).clamp(min=lowest).detach().clone()
        self.table = nn.Parameter(finite, requires_grad=trainable)
        self.register_buffer("allowed", allowed)
        self.register_buffer("next_state", torch.from_numpy(np.array(mdp.next_state)))
        self.allowed: Tensor
        self.next_state: Tensor

    @classmethod
    def reference(cls, mdp: TokenMDP, *, trainable: bool = False) -> "TabularLM":
        """The reference model, at l_ref."""
        return cls(mdp, trainable=trainable)

    @classmethod
    def optimal(cls, mdp: TokenMDP, beta: float, gamma: float = 1.0, *, trainable: bool = True) -> "TabularLM":
        """The oracle, whose logits are l* = l_ref + q* / beta: any loss for which it is optimal has zero gradient here."""
        return cls(mdp, torch.tensor(solve(mdp, beta=beta, gamma=gamma).optimal_logits()), trainable=trainable)

    def states(self, input_ids: Tensor, attention_mask: Tensor | None = None, segment_ids: Tensor | None = None) -> Tensor:
        """The automaton's state after each token, int[B, L]; -1 where there is none."""
        return states_of(self.next_state, self.mdp.start, input_ids, attention_mask, segment_ids)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, segment_ids: Tensor | None = None
    ) -> CausalLMOutput:
        states = self.states(input_ids, attention_mask, segment_ids)
        table = torch.where(self.allowed, self.table, torch.finfo(self.table.dtype).min)
        logits = table[states.clamp(min=0)]  # (B, L, V)
        return CausalLMOutput(torch.where((states >= 0)[..., None], logits, 0.0))

    def __call__(self, *args: Tensor, **kwargs: Tensor | None) -> CausalLMOutput:  # typed, for callers' sake
        return super().__call__(*args, **kwargs)


def with_states(batch: TokenBatch, mdp: TokenMDP) -> TokenBatch:
    """The batch with its automaton states filled in by walking the tokens."""
    model = TabularLM(mdp, trainable=False)
    return replace(batch, states=model.states(batch.input_ids, batch.attention_mask, batch.segment_ids))
