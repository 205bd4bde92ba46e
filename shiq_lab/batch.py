"""TokenBatch: the one batch type, in causal-LM layout, and what makes one out of another: padding, cutting, packing."""

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

from shiq_lab.errors import at_least, bad, is_whole


@dataclass(frozen=True, eq=False, repr=False)
class TokenBatch:
    """Rows of tokens; logits[:, i] scores input_ids[:, i + 1].

    input_ids        int[B, L]
    attention_mask   {0, 1}[B, L]   0 = padding, on either side; what the ids hold there never matters
    completion_mask  {0, 1}[B, L]   1 where input_ids[:, i] was chosen by the policy
    rewards          float[B, L]    reward of the action input_ids[:, i]; elsewhere ignored
    terminated       bool[B]        False = the row was cut after its last real token, in a policy state
    weights          float[B]       default 1; a listing puts exact probabilities here
    group_ids        int[B]         same prompt, same id; default 0
    segment_ids      int[B, L]      packed rows only, 0 = padding, 1..N in order; terminated, weights, group_ids are [B, N]
    position_ids     int[B, L]      packed rows only; they restart with every segment
    states           int[B, L]      the automaton's state after token i, -1 at the end and in padding; None where unknown

    A row's first real token cannot be an action: nothing scores it.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor
    rewards: Tensor
    terminated: Tensor
    weights: Tensor = None  # type: ignore[assignment]  # None only on the way in
    group_ids: Tensor = None  # type: ignore[assignment]
    segment_ids: Tensor | None = None
    position_ids: Tensor | None = None
    states: Tensor | None = None

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if not isinstance(value, Tensor) and (value is not None or f.default is MISSING):
                raise bad(f.name, "a tensor", type(value).__name__)
        if self.terminated.dtype != torch.bool:
            raise bad("terminated", "booleans", f"dtype {self.terminated.dtype}")
        if self.input_ids.is_floating_point():
            raise bad("input_ids", "integers", f"dtype {self.input_ids.dtype}")
        if not self.rewards.is_floating_point():
            raise bad("rewards", "floating-point numbers", f"dtype {self.rewards.dtype}")
        shape = tuple(self.input_ids.shape)
        if len(shape) != 2:
            raise bad("input_ids", "shape [B, L]", f"shape {shape}")
        for name in ("attention_mask", "completion_mask", "rewards", "segment_ids", "position_ids", "states"):
            value = getattr(self, name)
            if value is not None and tuple(value.shape) != shape:
                raise bad(name, f"shape {shape}, as input_ids", f"shape {tuple(value.shape)}")
        rows = tuple(self.terminated.shape)
        if rows[:1] != shape[:1] or len(rows) != (1 if self.segment_ids is None else 2):
            expected = f"({shape[0]},)" if self.segment_ids is None else f"({shape[0]}, N) for packed rows"
            raise bad("terminated", f"shape {expected}", f"shape {rows}")
        if self.weights is None:
            object.__setattr__(self, "weights", torch.ones(rows, dtype=self.rewards.dtype, device=self.rewards.device))
        if self.group_ids is None:
            object.__setattr__(self, "group_ids", torch.zeros(rows, dtype=torch.int64, device=self.rewards.device))
        for name in ("weights", "group_ids"):
            if tuple(getattr(self, name).shape) != rows:
                raise bad(name, f"shape {rows}, as terminated", f"shape {tuple(getattr(self, name).shape)}")
        if not ((self.weights >= 0) & torch.isfinite(self.weights)).all():
            raise bad("weights", "finite numbers >= 0", f"{self.weights.min().item()} to {self.weights.max().item()}")
        self._check_masks()

    def _check_masks(self) -> None:
        for name in ("attention_mask", "completion_mask"):
            value = getattr(self, name)
            if not ((value == 0) | (value == 1)).all():
                raise bad(name, "only 0 and 1", f"{value[(value != 0) & (value != 1)][0].item()}")
        stray = (self.completion_mask == 1) & (self.attention_mask == 0)
        if stray.any():
            row, position = (int(x) for x in stray.nonzero()[0])
            raise bad("completion_mask", "0 in padding", f"1 at row {row}, position {position}")
        lost = (self.completion_mask == 1) & ~torch.isfinite(self.rewards)
        if lost.any():
            row, position = (int(x) for x in lost.nonzero()[0])
            raise bad("rewards", "finite numbers", f"{self.rewards[row, position].item()} at row {row}, position {position}")
        first = self.first_tokens() & (self.completion_mask == 1)
        if first.any():
            row, position = (int(x) for x in first.nonzero()[0])
            raise bad(
                "completion_mask",
                "0 at a row's first real token, which nothing scores",
                f"1 at row {row}, position {position}",
                "Put a beginning-of-sequence token before it: mdp.with_prompt(token).",
            )

    def __repr__(self) -> str:
        rows, cut_rows = tuple(self.input_ids.shape), int((~self.terminated).sum())
        return f"<TokenBatch {rows}: {int(self.completion_mask.sum())} actions, {cut_rows} rows cut>"

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])

    def first_tokens(self) -> Tensor:
        """bool[B, L]: the first real token of every row or segment."""
        real = self.attention_mask == 1
        label = real.long() if self.segment_ids is None else self.segment_ids
        before = torch.nn.functional.pad(label, (1, 0))[:, :-1]
        return real & (label != before)

    def known_states(self) -> Tensor:
        """`states`, or a ValueError where the batch does not know them."""
        if self.states is None:
            raise bad("batch", "one that knows its automaton states", "states=None", "Fill them with tabular.with_states.")
        return self.states

    def last_index(self) -> Tensor:
        """int[B] (packed: [B, N]): where the last real token sits; 0 for an empty row."""
        position = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        if self.segment_ids is None:
            return torch.where(self.attention_mask == 1, position, 0).amax(1)
        N = self.terminated.shape[1]
        number = torch.arange(1, N + 1, device=position.device)
        inside = self.segment_ids[:, None, :] == number[:, None]  # (B, N, L)
        return torch.where(inside, position, 0).amax(2)

    def to(self, device: torch.device | str) -> "TokenBatch":
        """The same batch on another device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.to(device) for k, v in moved.items() if v is not None})

    def select(self, rows: Tensor | Sequence[int] | slice) -> "TokenBatch":
        """Some of the rows, by index or mask."""
        index = rows if isinstance(rows, (slice, Tensor)) else torch.as_tensor(rows)
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v[index] for k, v in parts.items() if v is not None})


def pad(
    batch: TokenBatch, side: Literal["left", "right"] = "right", *, pad_id: int = 0, width: int | None = None
) -> TokenBatch:
    """The same rows padded on the given side to the given width (default: the longest row). Masks are kept, not guessed."""
    if side not in ("left", "right"):
        raise bad("side", "'left' or 'right'", repr(side))
    if batch.segment_ids is not None:
        raise bad("batch", "rows that are not packed", "packed rows", "Pad before packing.")
    real = batch.attention_mask == 1
    length = real.sum(1)
    longest = int(length.max()) if len(batch) else 0
    width = longest if width is None else width
    if width < longest:
        raise bad("width", f"at least the longest row, {longest}", repr(width), "Use cut to shorten rows.")
    order = torch.argsort(~real, dim=1, stable=True)  # real tokens first, in order
    slot = torch.arange(width, device=real.device).expand(len(batch), width)
    if side == "left":
        slot = slot - (width - length)[:, None]
    inside = (slot >= 0) & (slot < length[:, None])
    source = order.gather(1, slot.clamp(0, max(order.shape[1] - 1, 0)))
    move = lambda x, empty: torch.where(inside, x.gather(1, source), empty)  # noqa: E731
    return replace(
        batch,
        input_ids=move(batch.input_ids, pad_id),
        attention_mask=inside.to(batch.attention_mask.dtype),
        completion_mask=move(batch.completion_mask, 0),
        rewards=move(batch.rewards, 0),
        states=None if batch.states is None else move(batch.states, -1),
    )


def cut(batch: TokenBatch, length: int | Tensor) -> TokenBatch:
    """Rows cut after at most `length` tokens (int or int[B]) and marked as not terminated; right-padded.

    The token after the cut must be an action, so that the state there is the policy's; a cut inside an environment turn, or
    before one, goes back to the position before the last action. A row keeps at least its prompt, and rows that are short
    enough stay as they are.
    """
    batch = pad(batch, "right")
    B, L = batch.input_ids.shape
    if not is_whole(length) and not (isinstance(length, Tensor) and not length.is_floating_point() and length.shape == (B,)):
        raise bad("length", f"a whole number, or integers of shape ({B},)", repr(length))
    wanted = torch.as_tensor(length, device=batch.input_ids.device).expand(B)
    if (wanted < 1).any():
        raise bad("length", "at least 1 token", f"{int(wanted.min())}")
    real = batch.attention_mask.sum(1)
    place = torch.arange(L, device=batch.input_ids.device).expand(B, L)
    action = batch.completion_mask == 1
    before = torch.where(action & (place <= wanted[:, None]), place, -1).amax(1)
    first = torch.where(action, place, L).amin(1)
    keep = torch.where(wanted >= real, real, torch.where(before >= 0, before, first.minimum(real)))
    inside = place < keep[:, None]
    return pad(
        replace(
            batch,
            attention_mask=inside.to(batch.attention_mask.dtype),
            completion_mask=torch.where(inside, batch.completion_mask, 0),
            rewards=torch.where(inside, batch.rewards, 0),
            terminated=batch.terminated & (keep == real),
        )
    )


def pack(batch: TokenBatch, width: int) -> TokenBatch:
    """Several rows in one, first fit in order of arrival: segment_ids count from 1, position_ids restart with each."""
    batch, width = pad(batch, "right"), at_least("width", width, 1)
    length = batch.attention_mask.sum(1).tolist()
    if length and max(length) > width:
        raise bad("width", f"at least the longest row, {max(length)}", repr(width))
    used: list[int] = []
    members: list[list[int]] = []
    for row, size in enumerate(length):
        bin_ = next((i for i, u in enumerate(used) if u + size <= width), len(used))
        if bin_ == len(used):
            used.append(0)
            members.append([])
        used[bin_] += size
        members[bin_].append(row)
    P, N = len(members), max(map(len, members), default=0)
    wide = {
        "input_ids": torch.zeros(P, width, dtype=batch.input_ids.dtype),
        "attention_mask": torch.zeros(P, width, dtype=batch.attention_mask.dtype),
        "completion_mask": torch.zeros(P, width, dtype=batch.completion_mask.dtype),
        "rewards": torch.zeros(P, width, dtype=batch.rewards.dtype),
        "states": torch.full((P, width), -1),
        "segment_ids": torch.zeros(P, width, dtype=torch.int64),
        "position_ids": torch.zeros(P, width, dtype=torch.int64),
    }
    terminated = torch.ones(P, N, dtype=torch.bool)
    weights = torch.zeros(P, N, dtype=batch.weights.dtype)
    group_ids = torch.full((P, N), -1)
    for p, rows in enumerate(members):
        at = 0
        for n, row in enumerate(rows):
            span = slice(at, at + length[row])
            for name in ("input_ids", "attention_mask", "completion_mask", "rewards", "states"):
                source = getattr(batch, name)
                if source is not None:
                    wide[name][p, span] = source[row, : length[row]]
            wide["segment_ids"][p, span] = n + 1
            wide["position_ids"][p, span] = torch.arange(length[row])
            terminated[p, n], weights[p, n] = batch.terminated[row], batch.weights[row]
            group_ids[p, n] = batch.group_ids[row]
            at += length[row]
    if batch.states is None:
        del wide["states"]
    packed = TokenBatch(**wide, terminated=terminated, weights=weights, group_ids=group_ids)
    return packed.to(batch.input_ids.device)


def unique(batch: TokenBatch) -> TokenBatch:
    """Each different row once, its weights added up: the same loss from fewer rows."""
    batch = pad(batch)
    real = batch.attention_mask == 1
    states = torch.zeros_like(batch.input_ids) if batch.states is None else batch.states
    parts = (batch.input_ids, batch.completion_mask, torch.where(real, states, -1), batch.rewards * batch.completion_mask)
    ends = torch.stack([batch.terminated, batch.attention_mask.sum(1), batch.group_ids], 1)
    key = torch.cat([torch.where(real, part, 0).double() for part in parts] + [ends.double()], 1)
    _, group = torch.unique(key, dim=0, return_inverse=True)
    n = int(group.max()) + 1 if len(batch) else 0
    first = torch.full((n,), len(batch)).scatter_reduce(0, group, torch.arange(len(batch)), "amin")
    weights = torch.zeros(n, dtype=batch.weights.dtype).index_add(0, group, batch.weights)
    return replace(batch.select(first), weights=weights)


def concatenate(batches: Sequence[TokenBatch]) -> TokenBatch:
    """One batch out of several, right-padded to the longest row; group ids are kept as they are."""
    if not batches:
        raise bad("batches", "at least one batch", "none")
    width = max(int(b.attention_mask.sum(1).max()) if len(b) else 0 for b in batches)
    parts = [pad(b, width=width) for b in batches]
    known = all(b.states is not None for b in parts)
    names = [
        f.name for f in fields(TokenBatch) if f.name not in ("segment_ids", "position_ids") and (f.name != "states" or known)
    ]
    return TokenBatch(**{name: torch.cat([getattr(b, name) for b in parts]) for name in names})
