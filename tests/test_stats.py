"""TokenStats: two numbers a token, from logits and from tables; what is masked, what is refused, in which precision."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import lse, sequences
from strategies import EPS, Case, cases, mixed

from shiq_lab import TokenStats, make
from shiq_lab.batch import TokenBatch, pack
from shiq_lab.policies import uniform_policy
from shiq_lab.sampling import sample
from shiq_lab.stats import scored

torch.set_num_threads(1)
LEVEL = 16 * EPS  # a log-sum-exp of 4 terms rounds a few times numbers of the size of the largest logit


@given(case=cases())
@settings(max_examples=50, deadline=None)
def test_statistics_are_what_they_say(case: Case) -> None:
    """Each entry against its own definition; 0 wherever nothing is scored and after terminated rows."""
    stats, _ = case.stats()
    logits, ref = case.clean().logits.tolist(), case.clean().ref.tolist()
    expected = {name: torch.zeros_like(getattr(stats, name)) for name in ("token_logit", "logsumexp", "joint_logsumexp")}
    ends = torch.zeros_like(stats.end_logsumexp), torch.zeros_like(stats.end_logsumexp)
    for seq in sequences(case.batch):
        b = seq.where[0]
        joint = lambda i, b=b: lse([x + y for x, y in zip(logits[b][i], ref[b][i], strict=True)])  # noqa: E731
        for i, a, _ in seq.actions:
            expected["token_logit"][b, i] = logits[b][i][a]
            expected["logsumexp"][b, i], expected["joint_logsumexp"][b, i] = lse(logits[b][i]), joint(i)
        if seq.end is not None:
            ends[0][b], ends[1][b] = lse(logits[b][seq.end]), joint(seq.end)
    biggest = 1 + max(float(x[x.isfinite()].abs().max()) for x in (case.clean().logits, case.clean().ref))
    if not case.batch.completion_mask.any():
        assert not stats.token_logit.any() and not stats.logsumexp.any() and not stats.joint_logsumexp.any()
        expected = {}
    for name, value in expected.items():
        assert torch.equal(getattr(stats, name) != 0, value != 0), name
        assert (getattr(stats, name) - value).abs().max() <= LEVEL * 2 * biggest, name
    assert (stats.end_logsumexp - ends[0]).abs().max() <= LEVEL * biggest
    assert (stats.end_joint_logsumexp - ends[1]).abs().max() <= LEVEL * 2 * biggest


def test_detach_keeps_numbers_and_drops_gradients() -> None:
    case = mixed()
    stats = TokenStats.from_logits(case.logits.requires_grad_(), case.batch, ref_logits=case.ref)
    bare = stats.detach()
    for name in ("token_logit", "logsumexp", "end_logsumexp", "joint_logsumexp", "end_joint_logsumexp"):
        assert torch.equal(getattr(bare, name), getattr(stats, name)) and not getattr(bare, name).requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    """The log-sum-exp of 4096 equal logits in bfloat16 would be off by its ulp, 2^-5 at 8.3; in float32 by 1e-6."""
    batch = TokenBatch(
        input_ids=torch.zeros(1, 2, dtype=torch.int64),
        attention_mask=torch.ones(1, 2, dtype=torch.int64),
        completion_mask=torch.tensor([[0, 1]]),
        rewards=torch.zeros(1, 2),
        terminated=torch.tensor([False]),
        states=torch.tensor([[0, 1]]),
    )
    table = torch.zeros(2, 4096, dtype=dtype)
    float32 = 8 * np.log(4096) * torch.finfo(torch.float32).eps
    for stats in (TokenStats.from_logits(table[None], batch), TokenStats.from_table(table, batch, ref_table=table)):
        assert stats.logsumexp.dtype == stats.token_logit.dtype == stats.end_logsumexp.dtype == torch.float32
        assert abs(stats.logsumexp.item() - np.log(4096)) <= float32
        assert abs(stats.end_logsumexp.item() - np.log(4096)) <= float32


def test_an_empty_row_reaches_nothing() -> None:
    """A row that is all padding, marked as cut: no value, and no NaN in the gradient."""
    case = mixed().clean()
    blank = replace(case.batch, terminated=torch.zeros_like(case.batch.terminated))
    mask = blank.attention_mask.clone()
    mask[0] = 0
    batch = replace(blank, attention_mask=mask, completion_mask=blank.completion_mask * mask)
    logits = case.logits.clone()
    logits[0] = torch.nan
    x = logits.requires_grad_()
    stats = TokenStats.from_logits(x, batch)
    (gradient,) = torch.autograd.grad(stats.token_logit.sum() + stats.logsumexp.sum() + stats.end_logsumexp.sum(), x)
    assert (gradient[0] == 0).all() and not gradient.isnan().any()


def test_one_column_rows() -> None:
    """L = 1: prompts alone. No token statistics, an end level where the row was cut."""
    batch = TokenBatch(
        input_ids=torch.zeros(2, 1, dtype=torch.int64),
        attention_mask=torch.ones(2, 1, dtype=torch.int64),
        completion_mask=torch.zeros(2, 1, dtype=torch.int64),
        rewards=torch.zeros(2, 1),
        terminated=torch.tensor([True, False]),
    )
    stats = TokenStats.from_logits(torch.zeros(2, 1, 4), batch)
    assert stats.token_logit.shape == (2, 0)
    assert stats.end_logsumexp[0] == 0 and abs(float(stats.end_logsumexp[1]) - np.log(4)) < 1e-6


def test_packed_ends_are_a_segment_each() -> None:
    mdp = make("Loop")
    batch = sample(mdp, uniform_policy(mdp), 12, rng=0, max_tokens=4)
    batch = replace(batch, group_ids=torch.arange(12))
    packed, table = pack(batch, 12), torch.tensor(mdp.ref_logits)
    plain, other = TokenStats.from_table(table, batch), TokenStats.from_table(table, packed)
    assert other.end_logsumexp.shape == packed.terminated.shape
    for p, n in (packed.group_ids >= 0).nonzero().tolist():
        assert other.end_logsumexp[p, n] == plain.end_logsumexp[packed.group_ids[p, n]]
    assert (other.end_logsumexp[packed.terminated] == 0).all() and (other.end_logsumexp != 0).any()


def test_wrong_statistics_are_named() -> None:
    mdp = make("Loop")
    batch = sample(mdp, uniform_policy(mdp), 6, rng=0, max_tokens=4)
    table = torch.tensor(mdp.ref_logits)
    with pytest.raises(ValueError, match=r"^batch: .*with_states"):
        TokenStats.from_table(table, replace(batch, states=None))
    states = batch.states.clone()
    states[0, 0] = -1
    with pytest.raises(ValueError, match=r"^batch.states: .*-1 at row 0, position 0"):
        TokenStats.from_table(table, replace(batch, states=states))
    with pytest.raises(ValueError, match=r"^batch.states: "):
        TokenStats.from_table(table[:2], batch)
    with pytest.raises(ValueError, match=r"^logits: expected shape"):
        TokenStats.from_logits(torch.zeros(6, 3, 4), batch)
    with pytest.raises(ValueError, match=r"^ref_logits: expected shape"):
        TokenStats.from_logits(torch.zeros(6, 4, 4), batch, ref_logits=torch.zeros(6, 4, 5))


@given(case=cases(), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_hidden_states_give_what_their_logits_give(case: Case, seed: int) -> None:
    """Fused or from logits: the same numbers and gradients by hidden states and head; NaN in padding reaches neither."""
    rng = torch.Generator().manual_seed(seed)
    batch, V = case.batch, case.logits.shape[-1]
    where, _ = scored(batch)
    hidden = torch.randn(*batch.input_ids.shape, 5, generator=rng, dtype=torch.float64)
    head = torch.randn(V, 5, generator=rng, dtype=torch.float64)
    found = []
    for fused in (True, False):
        h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        seen = torch.where(where[..., None], h, torch.nan)
        if fused:
            stats = TokenStats.from_hidden(seen, w, batch)
        else:
            stats = TokenStats.from_logits(torch.where(where[..., None], h, 0.0) @ w.T, batch)
        parts = (stats.token_logit, stats.logsumexp, stats.end_logsumexp)
        total = sum((torch.randn(x.shape, generator=torch.Generator().manual_seed(7), dtype=x.dtype) * x).sum() for x in parts)
        grads = torch.autograd.grad(total, (h, w), allow_unused=True)
        found.append([*parts, *(torch.zeros(1) if g is None else g for g in grads)])
    for a, b in zip(*found, strict=True):
        biggest = 1 + float(b.detach().abs().max()) if b.numel() else 1.0
        assert a.numel() == b.numel() == 0 or (a - b).abs().max() <= 8 * LEVEL * biggest  # sums of up to 40 terms of this size


def test_columns_of_the_wrong_shape_are_named() -> None:
    batch = mixed().batch
    B, L = batch.input_ids.shape
    good = torch.zeros(B, L)
    for arguments, message in (
        ((good[:, 1:], good), f"token_logit: expected shape {(B, L)}, got shape {(B, L - 1)}."),
        ((good, good[1:]), f"logsumexp: expected shape {(B, L)}, got shape {(B - 1, L)}."),
    ):
        with pytest.raises(ValueError) as error:
            TokenStats.from_columns(*arguments, batch)
        assert str(error.value) == message
    with pytest.raises(ValueError, match=r"^hidden: expected shape "):
        TokenStats.from_hidden(torch.zeros(B, L - 1, 3), torch.zeros(4, 3), batch)
    with pytest.raises(ValueError, match=r"^input_ids: expected actions from 0 to 0, got "):
        TokenStats.from_hidden(torch.zeros(B, L, 3), torch.zeros(1, 3), batch)


def test_columns_off_the_scored_positions_reach_nothing() -> None:
    """NaN wherever `scored` is False, in a row that is all padding and marked as cut too: no value, no gradient."""
    case = mixed().clean()
    blank = replace(case.batch, terminated=torch.zeros_like(case.batch.terminated))
    mask = blank.attention_mask.clone()
    mask[0] = 0
    batch = replace(blank, attention_mask=mask, completion_mask=blank.completion_mask * mask)
    where, _ = scored(batch)
    assert not where[0].any() and where.any()
    x = torch.where(where, 1.5, torch.nan).double().requires_grad_()
    stats = TokenStats.from_columns(x, x, batch)
    parts = (stats.token_logit, stats.logsumexp, stats.end_logsumexp)
    assert not any(part.isnan().any() for part in parts) and stats.end_logsumexp[0] == 0
    (gradient,) = torch.autograd.grad(sum(part.sum() for part in parts), x)
    assert (gradient[~where] == 0).all() and not gradient.isnan().any()


def test_a_token_beyond_n_tokens_and_half_hidden_states() -> None:
    """A padded head has rows that are no tokens; columns of bfloat16 states are float32's, as from_logits sums them."""
    batch = mixed().batch
    hidden = torch.randn(*batch.input_ids.shape, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    head = torch.randn(8, 3, generator=torch.Generator().manual_seed(1)).bfloat16()
    with pytest.raises(ValueError, match=r"^input_ids: expected actions from 0 to 0, got "):
        TokenStats.from_hidden(hidden, head, batch, n_tokens=1)
    found = TokenStats.from_hidden(hidden, head, batch)
    plain = TokenStats.from_logits(hidden.float() @ head.float().T, batch)
    for name in ("token_logit", "logsumexp", "end_logsumexp"):
        a, b = getattr(found, name), getattr(plain, name)
        # On a CPU every factor is widened first: float32's rounding of sums of three products and of eight exponentials.
        assert a.dtype == torch.float32 and (a - b).abs().max() <= 16 * torch.finfo(torch.float32).eps * (1 + b.abs().max())
