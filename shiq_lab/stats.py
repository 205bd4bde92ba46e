"""TokenStats: the two numbers a token that a loss sees, from a table of logits or from a model's logits.

They are all that the losses of the derivation need (F3), so the same loss function serves a table in float64, a tiny
transformer and a model whose logits are never held in memory.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from shiq_lab.batch import TokenBatch
from shiq_lab.errors import bad
from shiq_lab.fused import token_statistics


@dataclass(frozen=True, eq=False)
class TokenStats:
    """Statistics of one model on one batch; column i belongs to the token input_ids[:, i + 1].

    token_logit          float[B, L-1]   logit of the token taken
    logsumexp            float[B, L-1]   ln sum_a exp logit(a) where it was taken
    end_logsumexp        float[B]        the same after the last real token ([B, N] for packed rows)
    joint_logsumexp      float[B, L-1]   ln sum_a exp (logit + ref_logit)(a): for the naive step 0 alone
    end_joint_logsumexp  float[B]        the same after the last real token

    Where nothing was chosen by the policy (and after a terminated row) every entry is 0, so that no padding can reach a loss.
    """

    token_logit: Tensor
    logsumexp: Tensor
    end_logsumexp: Tensor
    joint_logsumexp: Tensor | None = None
    end_joint_logsumexp: Tensor | None = None

    def detach(self) -> "TokenStats":
        """The same numbers without gradient: a reference, or a target network."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: value.detach() for name, value in parts.items() if value is not None})

    @classmethod
    def from_logits(cls, logits: Tensor, batch: TokenBatch, *, ref_logits: Tensor | None = None) -> "TokenStats":
        """From a model's logits float[B, L, V] (half precision is summed in float32).

        Rows that score nothing are replaced before the log-sum-exp, so NaN in padding reaches neither value nor gradient.
        ref_logits adds the joint statistics. Source: F3 of the derivation.
        """
        _check_table("logits", logits)
        if logits.ndim != 3 or logits.shape[:2] != batch.input_ids.shape:
            raise bad("logits", f"shape {(*batch.input_ids.shape, 'V')}", f"shape {tuple(logits.shape)}")
        if ref_logits is not None and ref_logits.shape != logits.shape:
            raise bad("ref_logits", f"shape {tuple(logits.shape)}, as logits", f"shape {tuple(ref_logits.shape)}")
        _check_taken(batch, logits.shape[-1])
        acts, end, rows = _live(batch)
        clean = torch.where((acts | end)[..., None], logits, 0.0)
        clean = clean.float() if clean.dtype in (torch.float16, torch.bfloat16) else clean
        level = clean.logsumexp(-1)  # (B, L)
        taken = batch.input_ids[:, 1:].clamp(0, logits.shape[-1] - 1)
        chosen = clean[:, :-1].gather(-1, taken[..., None])[..., 0]
        joint = None
        if ref_logits is not None:
            joint = (clean + torch.where((acts | end)[..., None], ref_logits, 0.0).to(clean.dtype)).logsumexp(-1)
        return cls._masked(chosen, level, joint, acts, rows, batch)

    @classmethod
    def from_table(cls, table: Tensor, batch: TokenBatch, *, ref_table: Tensor | None = None) -> "TokenStats":
        """From logits a state, float[S, V], for a batch that knows its states (half precision is summed in float32).

        Rows of states where nothing is scored are replaced before the log-sum-exp, as from_logits does. Raises ValueError
        where an action is scored, or a cut row ends, in no state of the table.
        """
        states = batch.known_states()
        _check_table("table", table, 2)
        if ref_table is not None and ref_table.shape != table.shape:
            raise bad("ref_table", f"shape {tuple(table.shape)}, as table", f"shape {tuple(ref_table.shape)}")
        _check_taken(batch, table.shape[1])
        acts, end, rows = _live(batch)
        used = acts | end
        lost = used & ((states < 0) | (states >= table.shape[0]))
        if lost.any():
            row, position = (int(x) for x in lost.nonzero()[0])
            expected = f"states from 0 to {table.shape[0] - 1} where an action is scored or a cut row ends"
            raise bad("batch.states", expected, f"{int(states[row, position])} at row {row}, position {position}")
        state = torch.where(used, states, 0)  # (B, L)
        seen = torch.zeros(len(table), dtype=torch.bool, device=table.device)
        seen[state[used]] = True
        clean = torch.where(seen[:, None], table, 0.0)
        clean = clean.float() if clean.dtype in (torch.float16, torch.bfloat16) else clean
        taken = batch.input_ids[:, 1:].clamp(0, table.shape[1] - 1)
        chosen = clean[state[:, :-1], taken]
        level = clean.logsumexp(-1)[state]
        joint = None
        if ref_table is not None:
            joint = (clean + torch.where(seen[:, None], ref_table, 0.0).to(clean.dtype)).logsumexp(-1)[state]
        return cls._masked(chosen, level, joint, acts, rows, batch)

    @classmethod
    def from_hidden(cls, hidden: Tensor, head: Tensor, batch: TokenBatch, **options: Any) -> "TokenStats":
        """From hidden states float[B, L, H] and a head float[V, H], never holding logits of more than a chunk of tokens.

        Equal to from_logits of hidden @ head.T, in value and gradient; options: those of fused.token_statistics (bias, scale,
        soft_cap, n_tokens, chunk).
        """
        _check_table("hidden", hidden)
        if hidden.ndim != 3 or hidden.shape[:2] != batch.input_ids.shape:
            raise bad("hidden", f"shape {(*batch.input_ids.shape, 'H')}", f"shape {tuple(hidden.shape)}")
        _check_taken(batch, options.get("n_tokens") or head.shape[0])
        return cls.from_columns(*columns(hidden, head, *scored(batch), **options), batch)

    @classmethod
    def from_columns(cls, token_logit: Tensor, logsumexp: Tensor, batch: TokenBatch) -> "TokenStats":
        """From the two numbers at every position, float[B, L]: of the token behind it, and of all tokens.

        What stands where `scored(batch)` is False never matters.
        """
        for name, x in (("token_logit", token_logit), ("logsumexp", logsumexp)):
            if x.shape != batch.input_ids.shape:
                raise bad(name, f"shape {tuple(batch.input_ids.shape)}", f"shape {tuple(x.shape)}")
        acts, end, rows = _live(batch)
        level = torch.where(acts | end, logsumexp, 0.0)
        return cls._masked(token_logit[:, :-1], level, None, acts, rows, batch)

    @classmethod
    def _masked(
        cls, chosen: Tensor, level: Tensor, joint: Tensor | None, acts: Tensor, last: Tensor, batch: TokenBatch
    ) -> "TokenStats":
        here = acts[:, :-1]

        def at_end(x: Tensor) -> Tensor:
            index = last if last.ndim == 2 else last[:, None]
            picked = x.gather(1, index)
            return torch.where(batch.terminated, 0.0, picked if last.ndim == 2 else picked[:, 0])

        return cls(
            token_logit=torch.where(here, chosen, 0.0),
            logsumexp=torch.where(here, level[:, :-1], 0.0),
            end_logsumexp=at_end(level),
            joint_logsumexp=None if joint is None else torch.where(here, joint[:, :-1], 0.0),
            end_joint_logsumexp=None if joint is None else at_end(joint),
        )


def scored(batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """(bool[B, L] positions whose logits the losses see, int[B, L] the token behind each: any in-range id where none is)."""
    acts, end, _ = _live(batch)
    taken = torch.nn.functional.pad(batch.input_ids[:, 1:], (0, 1))
    return acts | end, torch.where(acts, taken, 0)


def columns(hidden: Tensor, head: Tensor, where: Tensor, taken: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """(token_logit, logsumexp) float[B, L] of hidden states float[B, L, H] at the positions `where`; 0 elsewhere."""
    logit, level = token_statistics(hidden[where], head, taken[where], **options)  # (N,)
    empty = torch.zeros(where.shape, dtype=level.dtype, device=level.device)
    return empty.masked_scatter(where, logit), empty.masked_scatter(where, level)


def _check_table(name: str, table: object, ndim: int | None = None) -> None:
    if not isinstance(table, Tensor) or not table.is_floating_point():
        raise bad(name, "a floating-point tensor", f"{type(table).__name__} of {getattr(table, 'dtype', 'no dtype')}")
    if ndim is not None and table.ndim != ndim:
        raise bad(name, "shape [S, V]", f"shape {tuple(table.shape)}")


def _check_taken(batch: TokenBatch, vocabulary: int) -> None:
    """Chosen tokens must have a logit; ids anywhere else may hold anything."""
    outside = (batch.completion_mask == 1) & ((batch.input_ids < 0) | (batch.input_ids >= vocabulary))
    if outside.any():
        row, position = (int(x) for x in outside.nonzero()[0])
        token = int(batch.input_ids[row, position])
        raise bad("input_ids", f"actions from 0 to {vocabulary - 1}", f"{token} at row {row}, position {position}")


def _live(batch: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
    """bool[B, L] positions that score an action, bool[B, L] positions after a cut row's last token, and that index."""
    acts = torch.nn.functional.pad(batch.completion_mask[:, 1:] == 1, (0, 1))
    last = batch.last_index()
    place = torch.arange(batch.input_ids.shape[1], device=last.device)
    hit = (place == last[..., None]) & ~batch.terminated[..., None]
    hit = hit if last.ndim == 1 else hit.any(1)
    return acts, hit & (batch.attention_mask == 1), last
