"""The collator: padded on either side, of any width, or packed, a loss is what a plain loop over single rows says."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from strategies import EPS, assert_near, holds_for
from torch import Tensor

from shiq_lab import TokenStats, shiq_loss
from shiq_lab.hf.collator import collate, reference_stats, token_batch
from shiq_lab.hf.rows import Row

V, PAD = 5, 3  # the pad token is a token that rows use
F64 = torch.float64


@dataclass
class Stats:
    token_logit: Any
    logsumexp: Any
    end_logsumexp: float


@dataclass
class Data:
    rows: list[Row]
    logits: list[np.ndarray]  # [L, V] a row
    ref: list[np.ndarray]

    def reference(self) -> list[Stats]:
        """The reference's numbers of each row alone, by numpy."""
        level = [np.log(np.exp(x).sum(1)) for x in self.ref]
        taken = [x[np.arange(len(x) - 1), row.input_ids[1:]] for x, row in zip(self.ref, self.rows, strict=True)]
        return [Stats(t, u[:-1], u[-1]) for t, u in zip(taken, level, strict=True)]


def made(masks: list[list[int]], seed: int) -> Data:
    rng = np.random.default_rng(seed)
    rows = [
        Row(
            rng.integers(0, V, len(mask)).tolist(), mask, (rng.normal(size=len(mask)) * mask).tolist(),
            bool(rng.integers(2)), float(rng.uniform(0.1, 2)), int(rng.integers(3)),
        )
        for mask in masks
    ]  # fmt: skip
    logits, ref = ([rng.normal(0, 2, (len(mask), V)) for mask in masks] for _ in range(2))
    return Data(rows, logits, ref)


def plain_losses(data: Data, beta: float, gamma: float) -> list[float]:
    """sum_t rho_t^2 of each row, rho_t = d_t + gamma rho_{t+1}, token by token in Python floats (F2)."""
    out = []
    for row, logits, ref in zip(data.rows, data.logits, data.ref, strict=True):
        level = lambda i: beta * (math.log(sum(map(math.exp, logits[i]))) - math.log(sum(map(math.exp, ref[i]))))  # noqa: B023, E731
        after, rho, total = (0.0 if row.terminated else level(len(logits) - 1)), 0.0, 0.0
        for i in reversed([i for i, own in enumerate(row.completion_mask) if own]):
            a = row.input_ids[i]
            rho = beta * (logits[i - 1][a] - ref[i - 1][a]) - row.rewards[i] - gamma * after + gamma * rho
            total, after = total + rho**2, level(i - 1)
        out.append(total)
    return out


def places(data: Data, layout: str, width: int) -> list[tuple[int, int, int]]:
    """(line, segment, offset) of each row; packed rows go where they first fit, in order of arrival."""
    if layout != "packed":
        return [(b, 0, width - len(row) if layout == "left" else 0) for b, row in enumerate(data.rows)]
    used: list[tuple[int, int]] = []
    out = []
    for row in data.rows:
        line = next((i for i, (full, _) in enumerate(used) if full + len(row) <= width), len(used))
        full, n = used[line] if line < len(used) else (0, 0)
        used[line : line + 1] = [(full + len(row), n + 1)]
        out.append((line, n, full))
    return out


def losses(data: Data, tensors: dict[str, Tensor], layout: str, beta: float, gamma: float) -> list[float]:
    """The loss of each row through the tensors; NaN wherever a model's logits must not be read."""
    batch = token_batch(tensors)
    logits = torch.full((*batch.input_ids.shape, V), math.nan, dtype=F64)
    where = places(data, layout, batch.input_ids.shape[1])
    for (line, _, at), own in zip(where, data.logits, strict=True):
        logits[line, at : at + len(own)] = torch.from_numpy(own)
    stats = TokenStats.from_logits(logits, batch)
    found = shiq_loss(stats, reference_stats(tensors), batch, beta=beta, gamma=gamma, reduction="none")
    mean = shiq_loss(stats, reference_stats(tensors), batch, beta=beta, gamma=gamma)
    weights = [row.weight for row in data.rows]
    plain = float(np.average(plain_losses(data, beta, gamma), weights=weights))
    rows = [float(found[line, n] if layout == "packed" else found[line]) for line, n, _ in where]
    assert_near(f"{layout}: weighted mean", abs(mean.item() - plain), bound(data, beta))
    return rows


def bound(data: Data, beta: float) -> float:
    """Rounding of a sum of T squares, each of a sum of T differences of numbers of this size: 16 T ulp of its square."""
    T = max(len(row) for row in data.rows)
    size = max(float(np.abs(x).max()) for x in data.logits + data.ref) + math.log(V)
    paid = max(sum(map(abs, row.rewards)) for row in data.rows)
    return 16 * T * EPS * T * (2 * beta * (T + 1) * size + paid) ** 2


MASKS = st.lists(
    st.lists(st.integers(0, 1), min_size=1, max_size=6).filter(any).map(lambda tail: [0, *tail]), min_size=1, max_size=5
)
LAYOUT = st.sampled_from(["left", "right", "packed"])


def collated(
    data: Data, layout: str, multiple: int | None, more: int, reference: list[Stats] | None = None
) -> dict[str, Tensor]:
    reference = data.reference() if reference is None else reference
    longest = max(map(len, data.rows))
    if layout == "packed":
        return collate(data.rows, pad_id=PAD, packing=longest + more, reference=reference, dtype=F64)
    size = {"multiple": multiple} if multiple else {"width": longest + more}
    return collate(data.rows, pad_id=PAD, side=layout, **size, reference=reference, dtype=F64)


@holds_for(60, MASKS, LAYOUT, st.sampled_from([None, 1, 3, 8]), st.integers(0, 9), st.integers(0, 999), often={"packed": 0.2})
def test_the_loss_is_that_of_single_rows(
    masks: list[list[int]], layout: str, multiple: int | None, more: int, seed: int
) -> list[str]:
    data = made(masks, seed)
    tensors = collated(data, layout, multiple, more)
    for found, plain in zip(losses(data, tensors, layout, 0.7, 0.9), plain_losses(data, 0.7, 0.9), strict=True):
        assert_near(f"{layout}: a row", abs(found - plain), bound(data, 0.7))
    if multiple and layout != "packed":
        assert tensors["input_ids"].shape[1] % multiple == 0
    where = places(data, layout, tensors["input_ids"].shape[1])
    for row, (line, n, at) in zip(data.rows, where, strict=True):
        span = slice(at, at + len(row))
        for name, column in (("input_ids", row.input_ids), ("completion_mask", row.completion_mask), ("rewards", row.rewards)):
            assert tensors[name][line, span].tolist() == column
        for name, value in (("terminated", row.terminated), ("weights", row.weight), ("group_ids", row.group)):
            assert tensors[name][(line, n) if layout == "packed" else line].item() == value
    assert tensors["attention_mask"].sum() == sum(map(len, data.rows))
    assert (tensors["input_ids"][tensors["attention_mask"] == 0] == PAD).all()
    return [layout]


DATA = made([[0, 1, 0, 1, 1], [0, 0, 1], [0, 1, 1, 0], [0, 1]], 5)
DATA = replace(DATA, rows=[replace(row, terminated=i == 0) for i, row in enumerate(DATA.rows)])  # three rows bootstrap


def by_pad_id(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    real = tensors["input_ids"] != PAD
    return {**tensors, "attention_mask": real.long(), "completion_mask": tensors["completion_mask"] * real}


SPOILED = {
    "reference one column late": lambda t: {**t, "ref_token_logit": t["ref_token_logit"].roll(1, 1)},
    "reference level one column early": lambda t: {**t, "ref_logsumexp": t["ref_logsumexp"].roll(-1, 1)},
    "reference of the row beside": lambda t: {**t, "ref_end_logsumexp": t["ref_end_logsumexp"].roll(1, -1)},
    "rewards one column late": lambda t: {**t, "rewards": t["rewards"].roll(1, 1)},
    "mask one column late": lambda t: {**t, "completion_mask": t["completion_mask"].roll(1, 1)},
    "masks from ids that are not pad": by_pad_id,
    "ends of the row beside": lambda t: {**t, "terminated": t["terminated"].roll(1, -1)},
}


@pytest.mark.parametrize("layout", ["left", "right", "packed"])
@pytest.mark.parametrize("bug", SPOILED)
def test_the_comparison_catches_what_a_collator_gets_wrong(bug: str, layout: str) -> None:
    assert any(PAD in row.input_ids for row in DATA.rows)
    tensors = collated(DATA, layout, None, 3 if layout != "packed" else 20)  # packed: all four rows in one line
    losses(DATA, tensors, layout, 0.7, 0.9)
    with pytest.raises((AssertionError, ValueError)):
        losses(DATA, SPOILED[bug](tensors), layout, 0.7, 0.9)


@holds_for(40, MASKS, st.integers(0, 9), st.integers(0, 99), often={"padding": 0.2, "two in a line": 0.15})
def test_positions_alone_tell_segments_and_padding_apart(masks: list[list[int]], more: int, seed: int) -> list[str]:
    """Attention kernels take segments from where position_ids do not go up by one."""
    tensors = collate(made(masks, seed).rows, packing=max(map(len, masks)) + more)
    positions, segments = tensors["position_ids"], tensors["segment_ids"]
    started = torch.nn.functional.pad(positions.diff() != 1, (1, 0), value=True).cumsum(1)
    same = started[:, :, None] == started[:, None, :]
    assert torch.equal(same, segments[:, :, None] == segments[:, None, :])
    assert (positions[torch.nn.functional.pad(segments.diff() != 0, (1, 0), value=True)] == 0).all()
    return ["padding"] * bool((segments == 0).any()) + ["two in a line"] * bool((segments == 2).any())


@pytest.mark.slow
def test_transformers_reads_the_same_segments_from_the_positions() -> None:
    masking = pytest.importorskip("transformers.masking_utils")
    tensors = collate(DATA.rows, packing=11)
    found, segments = masking.find_packed_sequence_indices(tensors["position_ids"]), tensors["segment_ids"]
    assert (segments == 2).any() and (segments == 0).any()
    assert torch.equal(found[:, :, None] == found[:, None, :], segments[:, :, None] == segments[:, None, :])


def test_left_padded_rows_count_their_real_tokens() -> None:
    tensors = collate(DATA.rows, side="left", multiple=8)
    for line, row in zip(tensors["position_ids"], DATA.rows, strict=True):
        assert line[8 - len(row) :].tolist() == list(range(len(row)))
    assert "position_ids" not in collate(DATA.rows)
    assert token_batch(tensors).position_ids is None  # only packed batches have them


def test_types_and_what_a_loss_without_reference_is_told() -> None:
    tensors = collate(DATA.rows)
    whole = ("input_ids", "attention_mask", "completion_mask", "group_ids")
    assert all(tensors[name].dtype == torch.int64 for name in whole) and tensors["terminated"].dtype == torch.bool
    assert tensors["rewards"].dtype == tensors["weights"].dtype == torch.float32
    with pytest.raises(ValueError, match=r"no ref_token_logit, ref_logsumexp, ref_end_logsumexp\. Pass reference= to collate"):
        reference_stats(tensors)


SHORT = [replace(stats, logsumexp=stats.logsumexp[1:]) for stats in DATA.reference()]
REFUSED = {
    r"rows: expected at least one row": lambda: collate([]),
    r"rows\[0\]: expected .* one length > 0, got 2, 1, 2": lambda: collate([Row([1, 2], [1], [0.0, 0.0])]),
    r"side: expected 'left' or 'right'": lambda: collate(DATA.rows, side="middle"),
    r"width: expected a whole number >= 5, got 4": lambda: collate(DATA.rows, width=4),
    r"width: expected None where": lambda: collate(DATA.rows, width=8, multiple=8),
    r"multiple: expected a whole number >= 1": lambda: collate(DATA.rows, multiple=0),
    r"width: expected at least the longest row, 5, got 4": lambda: collate(DATA.rows, packing=4),
    r"packing: expected side='right'": lambda: collate(DATA.rows, packing=8, side="left"),
    r"packing: expected .* multiple of": lambda: collate(DATA.rows, packing=9, multiple=8),
    r"reference: expected 4 entries, one a row, got 3": lambda: collate(DATA.rows, reference=DATA.reference()[:3]),
    r"reference\[0\].logsumexp: expected shape \(4,\)": lambda: collate(DATA.rows, reference=SHORT),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_is_refused(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()


def test_a_width_that_is_a_multiple_stays() -> None:
    """The longest row has 5 tokens: 5 is its own next multiple, of 4 it is 8."""
    assert [collate(DATA.rows, multiple=n)["input_ids"].shape[1] for n in (1, 4, 5, 6)] == [5, 8, 5, 6]
