"""Rows and their reference statistics to a dict of tensors, padded on either side or packed, and back to TokenBatch."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from shiq_lab.batch import TokenBatch, pack, pad
from shiq_lab.errors import at_least, bad
from shiq_lab.hf.rows import Row
from shiq_lab.stats import TokenStats

_BATCH = (
    "input_ids", "attention_mask", "completion_mask", "rewards", "terminated", "weights", "group_ids", "segment_ids",
)  # fmt: skip
_STATS = ("token_logit", "logsumexp", "end_logsumexp")


class RowStats(Protocol):
    """The reference's numbers of one row of L tokens, as TokenStats has them of a batch."""

    @property
    def token_logit(self) -> Any:
        """float[L-1]: of the token taken."""

    @property
    def logsumexp(self) -> Any:
        """float[L-1]: over all tokens."""

    @property
    def end_logsumexp(self) -> Any:
        """After the last token; 0 where the row ended."""


def collate(
    rows: Sequence[Row], *, pad_id: int = 0, side: Literal["left", "right"] = "right", multiple: int | None = None,
    width: int | None = None, reference: Sequence[RowStats] | None = None, packing: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:  # fmt: skip
    """The tensors of a batch, by name: what a model and a loss are called with.

    Padded, to the longest row (or to `width`, or to the next `multiple`):
      input_ids, attention_mask, completion_mask int64[B, L]; rewards float[B, L]; terminated bool[B]; weights float[B];
      group_ids int64[B]; with side="left" also position_ids, which count real tokens from 0
    Packed, packing=L: several rows in one, by the rule of `shiq_lab.batch.pack`:
      also segment_ids (from 1, 0 = padding) and position_ids, which restart with every segment and once more in the padding,
      so that an attention that knows them alone keeps segments and padding apart; terminated, weights, group_ids are [B, N]
    With reference, one object a row: ref_token_logit, ref_logsumexp float[B, L-1], ref_end_logsumexp float[B] or [B, N],
    0 where no row is. Masks come from lengths, so a pad_id that is also the end token does no harm. Raises ValueError if a row
    does not fit, or a row and its reference disagree in length.
    """
    flat = _right_padded(rows, dtype)
    if packing is None:
        batch = pad(flat, side, pad_id=pad_id, width=_padded_width(max(map(len, rows)), width, multiple))
    else:
        if side != "right" or width is not None or (multiple is not None and packing % at_least("multiple", multiple, 1)):
            found = f"side={side!r}, width={width}, multiple={multiple}"
            raise bad("packing", "side='right', no width, and itself a multiple of `multiple`", found)
        batch = pack(flat, packing)
        batch = replace(batch, input_ids=torch.where(batch.attention_mask == 1, batch.input_ids, pad_id))
    tensors = {name: getattr(batch, name) for name in _BATCH if getattr(batch, name) is not None}
    tensors["group_ids"] = _take(torch.tensor([row.group for row in rows]), batch.group_ids, -1)
    if packing is not None or side == "left":
        tensors["position_ids"] = _positions(batch)
    if reference is not None:
        tensors |= _reference(rows, reference, batch, flat.input_ids.shape[1], dtype)
    return tensors


def token_batch(tensors: Mapping[str, Tensor]) -> TokenBatch:
    """The TokenBatch in collate's tensors; its own checks run again."""
    packed = {"position_ids": tensors["position_ids"]} if "segment_ids" in tensors else {}
    return TokenBatch(**{name: tensors[name] for name in _BATCH if name in tensors}, **packed)


def reference_stats(tensors: Mapping[str, Tensor]) -> TokenStats:
    """The reference's TokenStats in collate's tensors. Raises ValueError where they hold none."""
    missing = [f"ref_{name}" for name in _STATS if f"ref_{name}" not in tensors]
    if missing:
        raise bad("tensors", "the reference's statistics", f"no {', '.join(missing)}", "Pass reference= to collate.")
    return TokenStats(**{name: tensors[f"ref_{name}"] for name in _STATS})


def _right_padded(rows: Sequence[Row], dtype: torch.dtype) -> TokenBatch:
    """The rows right-padded. What padding and packing carry along tells where all came from: `states` holds each token's
    place, row * L + position, and `group_ids` the row's number.
    """
    if len(rows) == 0:
        raise bad("rows", "at least one row", "none")
    for number, row in enumerate(rows):
        if not len(row.input_ids) == len(row.completion_mask) == len(row.rewards) > 0:
            lengths = f"{len(row.input_ids)}, {len(row.completion_mask)}, {len(row.rewards)}"
            raise bad(f"rows[{number}]", "input_ids, completion_mask and rewards of one length > 0", lengths)
    B, L = len(rows), max(map(len, rows))
    wide = lambda kind: torch.zeros(B, L, dtype=kind)  # noqa: E731
    ids, attention, completion, rewards = wide(torch.int64), wide(torch.int64), wide(torch.int64), wide(dtype)
    for b, row in enumerate(rows):
        ids[b, : len(row)] = torch.as_tensor(row.input_ids)
        attention[b, : len(row)] = 1
        completion[b, : len(row)] = torch.as_tensor(row.completion_mask)
        rewards[b, : len(row)] = torch.as_tensor(row.rewards, dtype=dtype)
    return TokenBatch(
        ids, attention, completion, rewards,
        terminated=torch.tensor([bool(row.terminated) for row in rows]),
        weights=torch.tensor([row.weight for row in rows], dtype=dtype),
        group_ids=torch.arange(B),
        states=torch.arange(B * L).reshape(B, L),
    )  # fmt: skip


def _padded_width(longest: int, width: int | None, multiple: int | None) -> int:
    if width is not None:
        if multiple is not None:
            raise bad("width", "None where `multiple` is given", repr(width))
        return at_least("width", width, longest, f"The longest row has {longest} tokens: cut rows with rows.cut_row.")
    multiple = 1 if multiple is None else at_least("multiple", multiple, 1)
    return -(-longest // multiple) * multiple


def _positions(batch: TokenBatch) -> Tensor:
    """int64[B, L]: from 0 in every row or segment, and from 0 again in padding, which so is a segment of its own."""
    label = batch.attention_mask if batch.segment_ids is None else batch.segment_ids
    place = torch.arange(label.shape[1]).expand_as(label)
    changed = label != torch.nn.functional.pad(label, (1, 0), value=-1)[:, :-1]
    return place - torch.where(changed, place, 0).cummax(1).values


def _reference(
    rows: Sequence[Row], reference: Sequence[RowStats], batch: TokenBatch, stride: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The reference's columns, put where the batch says that each token and each row came from."""
    if len(reference) != len(rows):
        raise bad("reference", f"{len(rows)} entries, one a row", str(len(reference)))
    wide = {name: torch.zeros(len(rows), stride, dtype=dtype) for name in _STATS[:2]}
    for b, (row, stats) in enumerate(zip(rows, reference, strict=True)):
        for name, column in wide.items():
            values = torch.as_tensor(getattr(stats, name), dtype=dtype)
            if values.shape != (len(row) - 1,):
                raise bad(f"reference[{b}].{name}", f"shape ({len(row) - 1},)", f"shape {tuple(values.shape)}")
            column[b, 1 : len(row)] = values  # at the token it belongs to, not at the one before
    ends = torch.tensor([float(stats.end_logsumexp) for stats in reference], dtype=dtype)
    placed = {f"ref_{name}": _take(column.flatten(), batch.known_states(), 0)[:, 1:] for name, column in wide.items()}
    return placed | {"ref_end_logsumexp": _take(ends, batch.group_ids, 0)}


def _take(values: Tensor, index: Tensor, empty: int) -> Tensor:
    """values[index], `empty` where the index is -1."""
    return torch.where(index >= 0, values[index.clamp(min=0)], empty)
