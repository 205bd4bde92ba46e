"""The losses of the derivation against plain loops, autograd against the closed form, the facts F1 to F11 on batches."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference import Meaning, loss_and_gradient, one_step, population_loss, residuals, sequences
from strategies import EPS, MIXED_ROWS, Case, build, cases, mixed, random_world, spoil
from torch import Tensor

import shiq_lab.losses.residuals as residuals_module
from shiq_lab import TokenStats, enumerate_trajectories, make, shiq_loss, solve
from shiq_lab.batch import TokenBatch, concatenate, cut, pack, pad
from shiq_lab.losses import shiq, steps
from shiq_lab.losses.residuals import actions_of
from shiq_lab.policies import uniform_policy
from shiq_lab.population import Population

torch.set_num_threads(1)

# float64: a loss sums at most ~50 squares of numbers below Case.size()**0.5, each rounded in a few operations a token.
FLOAT64 = 256 * EPS
# At the optimum a row's few dozen terms cancel rewards against beta * logits: what is left is their size times eps.
AT_OPTIMUM = 256 * EPS

LOSSES: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "naive": (shiq.naive_loss, {"step": "naive", "n_steps": 1}),
    "naive, whole row": (lambda *a, **k: shiq.naive_loss(*a, n_steps=None, **k), {"step": "naive"}),
    "easy": (shiq.easy_sampling_loss, {"step": "easy", "n_steps": 1}),
    "easy, 2 steps": (lambda *a, **k: shiq.easy_sampling_loss(*a, n_steps=2, **k), {"step": "easy", "n_steps": 2}),
    "shifted": (shiq.shifted_loss, {"n_steps": 1}),
    "shiq": (shiq.shiq_loss, {}),
    "shiq, 2 steps": (lambda *a, **k: shiq.shiq_loss(*a, n_steps=2, **k), {"n_steps": 2}),
    "shiq, 3 steps": (lambda *a, **k: shiq.shiq_loss(*a, n_steps=3, **k), {"n_steps": 3}),
    "sequence": (shiq.sequence_loss, {"form": "sequence"}),
    "semi-gradient, token": (shiq.semi_gradient_loss, {"form": "semi", "through": "token"}),
    "semi-gradient, value": (
        lambda *a, **k: shiq.semi_gradient_loss(*a, through="value", **k),
        {"form": "semi", "through": "value"},
    ),
    "turn-cut": (shiq.turn_cut_loss, {"form": "turns"}),
}
every_loss = pytest.mark.parametrize("name", LOSSES)
few = settings(max_examples=15, deadline=None)


def value_and_gradient(case: Case, name: str, reduction: str = "mean") -> tuple[Tensor, Tensor]:
    """The loss and its gradient by the logits float[B, L, V] ("none": of the sum of rows)."""
    loss, _ = LOSSES[name]
    x = case.logits.clone().requires_grad_()
    policy, ref = case.stats(x, joint=name.startswith("naive"))
    out = loss(policy, ref, case.batch, beta=case.beta, gamma=case.gamma, reduction=reduction)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    return out.detach(), gradient


def reference(case: Case, name: str, reduction: str = "mean") -> tuple[Any, np.ndarray]:
    _, options = LOSSES[name]
    clean = case.clean()
    return loss_and_gradient(
        case.batch, clean.logits.numpy(), clean.ref.numpy(), beta=case.beta, gamma=case.gamma, reduction=reduction, **options
    )


def assert_close(actual: Any, expected: Any, size: float) -> None:
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert expected.size > 0, "nothing compared"
    np.testing.assert_allclose(actual, expected, rtol=0, atol=FLOAT64 * size)


def assert_agrees(case: Case, name: str) -> None:
    """Value and gradient of every reduction equal the plain loops; unread places get gradient exactly 0."""
    scale = case.size() * max(1.0, case.beta)
    for reduction in ("none", "sum", "mean"):
        value, gradient = value_and_gradient(case, name, reduction)
        expected, expected_gradient = reference(case, name, reduction)
        assert_close(value, expected, scale)
        assert_close(gradient, expected_gradient, scale)
        assert (gradient[~case.read()] == 0).all(), "a gradient where nothing is read"


# --------------------------------------------------------------------------------------------- values and gradients
@every_loss
@given(case=cases())
@few
def test_every_loss_equals_the_plain_loops(name: str, case: Case) -> None:
    assert_agrees(case, name)


@every_loss
@pytest.mark.parametrize("layout", ["left", "right", "both"])
def test_every_stratum_at_once(name: str, layout: str) -> None:
    """Two turns, replies at the end, empty completions, cut rows of each kind, in one batch."""
    assert_agrees(mixed(layout), name)


@every_loss
@pytest.mark.parametrize("row", MIXED_ROWS)
def test_a_single_row(name: str, row: Any) -> None:
    assert_agrees(build([row], "right", 0.7, 0.9, 5), name)


@pytest.mark.parametrize("terminated", [True, False])
def test_all_rows_of_one_ending(terminated: bool) -> None:
    rows = [(*row[:3], terminated, row[4]) for row in MIXED_ROWS]
    for name in LOSSES:
        assert_agrees(build(rows, "left", 0.7, 0.9, 7), name)


@every_loss
def test_no_actions_at_all(name: str) -> None:
    """T = 0: the loss is 0 and its gradient is 0, not an error."""
    case = build([(1, [], True, True, 0), (2, [], True, False, 0)], "right", 0.7, 0.9, 0)
    value, gradient = value_and_gradient(case, name)
    assert value == 0 and (gradient == 0).all()


@given(case=cases(), n_steps=st.sampled_from([None, 1, 2, 3]))
@few
def test_target_network(case: Case, n_steps: int | None) -> None:
    """Bootstrapped values come from target_stats, without gradient; what does not bootstrap is unchanged."""
    x = case.logits.clone().requires_grad_()
    policy, ref = case.stats(x, joint=False)
    target = TokenStats.from_logits(case.target, case.batch)
    options = {"beta": case.beta, "gamma": case.gamma, "n_steps": n_steps}
    value = shiq_loss(policy, ref, case.batch, target_stats=target, **options)
    (gradient,) = torch.autograd.grad(value, x)
    clean = case.clean()
    arrays = [y.numpy() for y in (clean.logits, clean.ref)]
    expected, expected_gradient = loss_and_gradient(case.batch, *arrays, target=clean.target.numpy(), **options)
    assert_close(value.detach(), expected, case.size())
    assert_close(gradient, expected_gradient, case.size() * max(1.0, case.beta))


@every_loss
@given(case=cases(), again=st.integers(0, 10**6))
@settings(max_examples=8, deadline=None)
def test_garbage_changes_no_bit(name: str, case: Case, again: int) -> None:
    """NaN, infinities and other ids in every unread place: value and gradient are the same floats."""
    other = spoil(case, again)
    for x, y in zip(value_and_gradient(case, name), value_and_gradient(other, name), strict=True):
        assert torch.equal(x, y)


# ------------------------------------------------------------------------------------------- the same rows, laid out anew
def as_table(case: Case) -> tuple[TokenBatch, Tensor, Tensor]:
    """The same case with a state of its own for every position: tables float[B * L, V], garbage rows included."""
    B, L = case.batch.input_ids.shape
    number = torch.arange(B * L).reshape(B, L)
    states = torch.where(case.batch.attention_mask == 1, number, -1)
    last = case.batch.last_index()
    over = case.batch.terminated[:, None] & (torch.arange(L) == last[:, None])
    batch = replace(case.batch, states=torch.where(over, -1, states))
    return batch, case.logits.reshape(B * L, -1), case.ref.reshape(B * L, -1)


@every_loss
@given(case=cases())
@settings(max_examples=8, deadline=None)
def test_a_table_equals_logits(name: str, case: Case) -> None:
    """from_table on states is from_logits on rows, gradients included, with garbage in the rows that nothing reads."""
    loss, _ = LOSSES[name]
    batch, table, ref = as_table(case)
    x = table.clone().requires_grad_()
    joint = ref if name.startswith("naive") else None
    stats = TokenStats.from_table(x, batch, ref_table=joint), TokenStats.from_table(ref, batch)
    value = loss(*stats, batch, beta=case.beta, gamma=case.gamma)
    (gradient,) = torch.autograd.grad(value, x)
    expected, expected_gradient = value_and_gradient(case, name)
    assert_close(value.detach(), expected, case.size())
    assert_close(gradient, expected_gradient.reshape(gradient.shape), case.size() * max(1.0, case.beta))
    assert (gradient[~case.read().reshape(-1)] == 0).all()


@every_loss
@given(case=cases(min_rows=2), extra=st.integers(0, 4))
@settings(max_examples=8, deadline=None)
def test_packed_equals_unpacked(name: str, case: Case, extra: int) -> None:
    """Rows packed head to tail: the loss of every segment, the weighted mean and the gradient at every table row."""
    loss, _ = LOSSES[name]
    batch, table, ref = as_table(case)
    wide = int(batch.attention_mask.sum(1).max())
    packed = pack(replace(batch, group_ids=torch.arange(len(batch))), wide + extra)
    results = []
    for rows in (batch, packed):
        x = table.clone().requires_grad_()
        stats = TokenStats.from_table(x, rows, ref_table=ref), TokenStats.from_table(ref, rows)
        value = loss(*stats, rows, beta=case.beta, gamma=case.gamma)
        each = loss(*stats, rows, beta=case.beta, gamma=case.gamma, reduction="none").detach()
        by_row = torch.zeros(len(batch), dtype=each.dtype)
        by_row[rows.group_ids[rows.group_ids >= 0]] = each[rows.group_ids >= 0]
        results.append((value.detach(), by_row, torch.autograd.grad(value, x)[0]))
        assert each[rows.group_ids < 0].eq(0).all(), "an empty segment has a loss"
    for plain, other in zip(*results, strict=True):
        assert_close(other, plain, case.size() * max(1.0, case.beta))


@every_loss
@given(case=cases())
@settings(max_examples=8, deadline=None)
def test_packed_logits_equal_the_plain_loops(name: str, case: Case) -> None:
    """Segments read from the contract's arrays alone: segment_ids, and terminated and weights float[B, N]."""
    rng = np.random.default_rng(len(case.batch))
    rows = pack(case.batch, 2 * int(case.batch.attention_mask.sum(1).max()))
    shape = (*rows.input_ids.shape, case.logits.shape[-1])
    made = Case(rows, *(torch.from_numpy(rng.normal(0, 2, shape)) for _ in range(3)), case.beta, case.gamma)
    assert_agrees(spoil(made, 1), name)


@every_loss
@given(case=cases(min_rows=2))
@settings(max_examples=8, deadline=None)
def test_padding_order_and_split(name: str, case: Case) -> None:
    """Left equals right padding, rows may be shuffled, and a batch is the sum of its halves."""
    loss, _ = LOSSES[name]
    batch, table, ref = as_table(case)

    def rows(b: TokenBatch) -> Tensor:
        stats = TokenStats.from_table(table, b, ref_table=ref), TokenStats.from_table(ref, b)
        return loss(*stats, b, beta=case.beta, gamma=case.gamma, reduction="none")

    plain = rows(batch)
    backwards = torch.arange(len(batch)).flip(0)
    for other in (
        rows(pad(batch, "left", pad_id=-7)),
        rows(pad(batch, "right", pad_id=99, width=batch.input_ids.shape[1] + 2)),
        rows(batch.select(backwards)).flip(0),
        torch.cat([rows(batch.select([0])), rows(batch.select(slice(1, None)))]),
        rows(concatenate([batch.select([0]), batch.select(slice(1, None))])),
    ):
        assert_close(other, plain, case.size())


# ------------------------------------------------------------------------------------------ the closed-form gradient, F3
@given(case=cases(), n_steps=st.sampled_from([None, 1, 2, 3, 9]), packed=st.booleans())
@settings(max_examples=60, deadline=None)
def test_autograd_equals_the_closed_form(case: Case, n_steps: int | None, packed: bool) -> None:
    """F3 by the statistics; through logits it is 2 beta [D_k e_a - gamma D_{k-1} pi]; over the vocabulary 2 beta rho_k."""
    assume(case.batch.input_ids.shape[1] > 1)  # else there is nothing to compare
    case = case.clean()
    if packed:
        rng = np.random.default_rng(0)
        rows = pack(case.batch, 2 * int(case.batch.attention_mask.sum(1).max()))
        shape = (*rows.input_ids.shape, 4)
        case = Case(rows, *(torch.from_numpy(rng.normal(0, 2, shape)) for _ in range(3)), case.beta, case.gamma)
    batch, options = case.batch, {"beta": case.beta, "gamma": case.gamma, "n_steps": n_steps}
    x = case.logits.clone().requires_grad_()
    policy, ref = case.stats(x, joint=False)
    parts = (policy.token_logit, policy.logsumexp, policy.end_logsumexp)
    value = shiq_loss(policy, ref, batch, reduction="none", **options).sum()
    found = torch.autograd.grad(value, parts, retain_graph=True, materialize_grads=True)  # T = 0 uses none
    closed = shiq.shiq_gradient(policy, ref, batch, **options)
    scale = case.size() * max(1.0, case.beta)
    for auto, form in zip(found, (closed.token_logit, closed.logsumexp, closed.end_logsumexp), strict=True):
        assert_close(form, auto, scale)

    (by_logits,) = torch.autograd.grad(value, x)
    pi = case.logits.softmax(-1)
    expected = torch.zeros_like(by_logits)
    expected[:, :-1] += closed.logsumexp[..., None] * pi[:, :-1]
    taken = batch.input_ids[:, 1:].clamp(0, 3)
    expected[:, :-1] += closed.token_logit[..., None] * torch.nn.functional.one_hot(taken, 4)
    ends = closed.end_logsumexp.reshape(len(batch), -1)
    for seq in sequences(batch):
        if seq.end is not None:
            expected[seq.where[0], seq.end] += ends[seq.where] * pi[seq.where[0], seq.end]
    assert_close(by_logits, expected, scale)
    if n_steps is None:
        for seq in sequences(batch):
            b = seq.where[0]
            rho = residuals(seq, case.logits[b].tolist(), case.ref[b].tolist(), beta=case.beta, gamma=case.gamma)
            for r in rho:
                assert_close(by_logits[b, seq.actions[r.t][0]].sum(), 2 * case.beta * r.value, scale)


# Central differences: the error is h^2 f''' / 6 + eps f / h. With h = 1e-4 the first is 2e-9 f''' (derivatives of products of
# log-sum-exps), the second 1e-12 f with f < 1e4: below 1e-6 of the gradient's largest entry.
DIFFERENCE = 1e-6


@pytest.mark.parametrize("n_steps", [None, 1, 2])
def test_closed_form_against_central_differences(n_steps: int | None) -> None:
    case = mixed().clean()
    options = {"beta": case.beta, "gamma": case.gamma, "n_steps": n_steps, "reduction": "none"}
    value = lambda x: shiq_loss(*case.stats(x, joint=False), case.batch, **options).sum()  # noqa: E731
    x = case.logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(x), x)
    h, rng, compared = 1e-4, np.random.default_rng(0), 0
    for b, i in case.read().nonzero().tolist():
        v = int(rng.choice(np.flatnonzero(np.isfinite(case.logits[b, i].numpy()))))
        up, down = case.logits.clone(), case.logits.clone()
        up[b, i, v] += h
        down[b, i, v] -= h
        assert abs((value(up) - value(down)) / (2 * h) - gradient[b, i, v]) < DIFFERENCE * gradient.abs().max()
        compared += 1
    assert compared > 10


@pytest.mark.parametrize("name", [n for n in LOSSES if "semi" not in n and n != "turn-cut"])
def test_gradcheck(name: str) -> None:
    """torch's own finite differences; the losses that stop gradients are not gradients and are held to the plain loops."""
    case = build([(1, [(2, 1), (1, 1)], True, False, 0), (1, [(1, 1)], False, True, 0)], "left", 0.7, 0.9, 2, V=3).clean()
    loss, _ = LOSSES[name]
    allowed = case.logits.isfinite()

    def f(x: Tensor) -> Tensor:
        stats = case.stats(torch.where(allowed, x, -torch.inf), joint=name.startswith("naive"))
        return loss(*stats, case.batch, beta=case.beta, gamma=case.gamma)

    assert torch.autograd.gradcheck(f, torch.where(allowed, case.logits, 0.0).requires_grad_())


# --------------------------------------------------------------------------------------------------------------- facts
@given(case=cases())
@few
def test_f2_one_step_residuals_add_up(case: Case) -> None:
    """rho_t = sum_{k>=t} gamma^{k-t} d_k with d from its own definition: ShiQ's loss from one-step residuals alone."""
    case = case.clean()
    rows = shiq_loss(*case.stats(joint=False), case.batch, beta=case.beta, gamma=case.gamma, reduction="none")
    meaning = Meaning("shifted", case.beta)
    for seq in sequences(case.batch):
        logits, ref = case.logits[seq.where[0]].tolist(), case.ref[seq.where[0]].tolist()
        places = [c for c, _, _ in seq.actions] + [seq.end]
        d = []
        for (c, a, r), after in zip(seq.actions, places[1:], strict=True):
            level = 0.0 if after is None else meaning.value(logits[after], ref[after])
            d.append(one_step("shifted", logits[c], ref[c], a, r, level, case.beta, case.gamma))
        rho = [sum(case.gamma ** (k - t) * d[k] for k in range(t, len(d))) for t in range(len(d))]
        assert_close(rows[seq.where[0]], sum(x * x for x in rho), case.size())


@given(case=cases())
@few
def test_f4_at_the_reference(case: Case) -> None:
    """At l = l_ref rho_t = -(reward-to-go); with r = 0 loss and gradient are 0 with the shift, and not without it."""
    case = replace(case, logits=case.ref)
    policy, ref = case.stats()
    rows = shiq_loss(policy, ref, case.batch, beta=case.beta, gamma=case.gamma, reduction="none")
    for seq in sequences(case.batch):
        paid = [r for _, _, r in seq.actions]
        to_go = [sum(case.gamma ** (k - t) * paid[k] for k in range(t, len(paid))) for t in range(len(paid))]
        assert_close(rows[seq.where[0]], sum(x * x for x in to_go), case.size())
    free = replace(case, batch=replace(case.batch, rewards=torch.zeros_like(case.batch.rewards)))
    for name in ("shifted", "shiq", "sequence", "turn-cut", "semi-gradient, token"):
        value, gradient = value_and_gradient(free, name)
        assert value <= (FLOAT64**2) * case.size() and gradient.abs().max() <= FLOAT64 * case.size()
    if case.batch.completion_mask.any():
        assert value_and_gradient(free, "easy")[0] > FLOAT64 * case.size()


@given(case=cases())
@few
def test_f5_gauge(case: Case) -> None:
    """c(s) added to l and l_ref changes nothing; added to l alone it changes ShiQ, whose level carries v*."""
    case = case.clean()
    level = torch.from_numpy(np.random.default_rng(0).uniform(-2, 2, case.logits.shape[:2]))[..., None]
    both = replace(case, logits=case.logits + level, ref=case.ref + level)
    alone = replace(case, logits=case.logits + level)
    for name in ("shifted", "shiq", "shiq, 2 steps", "sequence", "turn-cut"):
        assert_close(value_and_gradient(both, name)[0], value_and_gradient(case, name)[0], both.size())
        if case.batch.completion_mask.any():
            assert value_and_gradient(alone, name)[0] != value_and_gradient(case, name)[0]


@every_loss
@given(case=cases(), factor=st.sampled_from([0.1, 3.0, 10.0]))
@settings(max_examples=5, deadline=None)
def test_f6_scaling(name: str, case: Case, factor: float) -> None:
    """(r, beta) -> (c r, c beta) multiplies the residuals by c, the loss by c^2."""
    scaled = replace(case, beta=factor * case.beta, batch=replace(case.batch, rewards=factor * case.batch.rewards))
    plain, other = value_and_gradient(case, name)[0], value_and_gradient(scaled, name)[0]
    assert_close(other / factor**2, plain, case.size() * max(1.0, factor**-2))


@given(case=cases())
@few
def test_one_step_shiq_is_the_shifted_loss(case: Case) -> None:
    stats = case.stats(joint=False)
    options = {"beta": case.beta, "gamma": case.gamma, "reduction": "none"}
    shifted = shiq.shifted_loss(*stats, case.batch, **options)
    assert torch.equal(shifted, shiq_loss(*stats, case.batch, n_steps=1, **options))
    long = shiq_loss(*stats, case.batch, n_steps=100, **options)
    assert_close(long, shiq_loss(*stats, case.batch, **options), case.size())


@given(case=cases())
@few
def test_sequence_loss_has_one_term_a_sequence(case: Case) -> None:
    """rho_0^2 alone: of a row with one action it is ShiQ's, of any row at most ShiQ's, of an empty one 0."""
    options = {"beta": case.beta, "gamma": case.gamma, "reduction": "none"}
    whole = shiq_loss(*case.stats(joint=False), case.batch, **options)
    first = shiq.sequence_loss(*case.stats(joint=False), case.batch, **options)
    actions = case.batch.completion_mask.sum(1)
    assert torch.equal(first[actions <= 1], whole[actions <= 1]) and (first[actions > 1] < whole[actions > 1]).all()


@given(case=cases())
@few
def test_turn_cut_with_one_turn_is_shiq(case: Case) -> None:
    options = {"beta": case.beta, "gamma": case.gamma}
    one = [b for b, seq in enumerate(sequences(case.batch)) if not any(seq.replied[:-1])]
    if one:
        batch = case.batch.select(one)
        part = replace(case, batch=batch, logits=case.logits[one], ref=case.ref[one], target=case.target[one])
        values = [loss(*part.stats(joint=False), batch, **options) for loss in (shiq_loss, shiq.turn_cut_loss)]
        assert_close(values[1], values[0], case.size())


def test_turn_cut_stops_the_gradient_after_a_reply() -> None:
    """F11b on rows that are cut right after a random reply: at l* the expected gradient is 0 under any behaviour.

    Rows of RandomTool cut after the value has been said: 5 tokens keep every reply, so the cut selects nothing.
    ShiQ's own expected gradient on the same rows is not 0 (F9).
    """
    mdp, beta = make("RandomTool"), 0.2
    table, ref = torch.tensor(solve(mdp, beta=beta).optimal_logits()), torch.tensor(mdp.ref_logits)
    behavior = uniform_policy(mdp)
    for length in (5, 100):
        batch = cut(enumerate_trajectories(mdp, behavior=behavior), length)
        assert length == 100 or bool((~batch.terminated).any())
        gradients = []
        for loss in (shiq.turn_cut_loss, shiq_loss):
            x = table.clone().requires_grad_()
            stats = TokenStats.from_table(x, batch), TokenStats.from_table(ref, batch)
            (g,) = torch.autograd.grad(loss(*stats, batch, beta=beta, reduction="sum"), x)
            gradients.append(float(g.abs().max()))
        size = beta * float(table[table > -torch.inf].abs().max()) + float(mdp.reward.max())
        assert gradients[0] <= AT_OPTIMUM * size < 1e-4 < gradients[1]


# ------------------------------------------------------------------------------------------------------------ precision
def row_bound(case: Case, seq: Any, step: float) -> list[float]:
    """|error of rho_t| where every read logit is off by at most `step`: two numbers a log-ratio, of two models, and two levels.

    rho_t = Dv(s_t) - sum gamma^{k-t} [r_k - beta ln ratio_k] - gamma^n Dv(s_end): |d lse| <= step, |d logit| <= step.
    """
    T = len(seq.actions)
    return [case.beta * step * (2 + 4 * sum(case.gamma**j for j in range(T - t)) + 2) for t in range(T)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(case=cases())
@few
def test_drift_of_short_floats(dtype: torch.dtype, case: Case) -> None:
    """Logits rounded to half an ulp of max|logit|, then arithmetic in float32: rho drifts by no more than both allow.

    step = eps(dtype)/2 max|logit| (storage) + 8 eps(float32) max(|logit| + ln V, |r|, |rho|) (log-sum-exp, sums of a few
    terms); the loss sum rho^2 drifts by at most sum (2 |rho| + error) error.
    """
    case = case.clean()
    loss = lambda c, cast: shiq_loss(  # noqa: E731
        TokenStats.from_logits(c.logits.to(cast), c.batch),
        TokenStats.from_logits(c.ref.to(cast), c.batch),
        c.batch,
        beta=c.beta,
        gamma=c.gamma,
        reduction="none",
    )
    exact, short = loss(case, torch.float64), loss(case, dtype)
    assert short.dtype == torch.float32
    eps32 = torch.finfo(torch.float32).eps
    for seq in sequences(case.batch):
        b = seq.where[0]
        logits, ref = case.logits[b].tolist(), case.ref[b].tolist()
        rho = residuals(seq, logits, ref, beta=case.beta, gamma=case.gamma)
        biggest = max([abs(x) for row in [*logits, *ref] for x in row if np.isfinite(x)])
        rewards = sum(abs(r) for _, _, r in seq.actions)
        arithmetic = 8 * eps32 * (biggest + 2 + (rewards + max([abs(r.value) for r in rho], default=0.0)) / case.beta)
        errors = row_bound(case, seq, torch.finfo(dtype).eps / 2 * biggest + arithmetic)
        allowed = sum((2 * abs(r.value) + e) * e for r, e in zip(rho, errors, strict=True)) + eps32 * float(exact[b]) * 4
        assert abs(float(short[b]) - float(exact[b])) <= allowed


def test_a_late_reward_does_not_blur_early_one_step_residuals() -> None:
    """float32, one reward of 1e8 at the end: the first tokens' d_t stay exact, since nothing sums to the row's end.

    A difference rho_t - gamma rho_{t+1} would be rounded to eps32 * 1e8 = 12.
    """
    case = build([(1, [(3, 1)], True, True, 0)], "right", 1.0, 1.0, 0).clean()
    rewards = case.batch.rewards.clone()
    rewards[0, 3] = 1e8
    batch = replace(case.batch, rewards=rewards)
    policy, ref = (TokenStats.from_logits(x.float(), batch) for x in (case.logits, case.ref))
    u, c = policy.logsumexp - ref.logsumexp, policy.token_logit - ref.token_logit
    actions = actions_of(batch)
    d = residuals_module.residuals(c, u, policy.end_logsumexp, batch, actions, gamma=1.0, n_steps=1)
    (seq,) = sequences(batch)
    exact = residuals(seq, case.logits[0].tolist(), case.ref[0].tolist(), beta=1.0, gamma=1.0, n_steps=1)
    for t in (0, 1):  # half a dozen float32 operations on numbers below 16
        assert abs(float(d[0, t]) - exact[t].value) <= 8 * 16 * torch.finfo(torch.float32).eps


# ----------------------------------------------------------------------------------------------------------- population
FORMS: dict[str, tuple[Callable[..., Tensor], dict[str, Any], dict[str, Any]]] = {
    "naive": (shiq.naive_loss, {"step": steps.naive, "n_steps": 1}, {"step": "naive", "n_steps": 1}),
    "easy": (shiq.easy_sampling_loss, {"step": steps.easy, "n_steps": 1}, {"step": "easy", "n_steps": 1}),
    "shifted": (shiq.shifted_loss, {"n_steps": 1}, {"n_steps": 1}),
    "2 steps": (lambda *a, **k: shiq_loss(*a, n_steps=2, **k), {"n_steps": 2}, {"n_steps": 2}),
    "3 steps": (lambda *a, **k: shiq_loss(*a, n_steps=3, **k), {"n_steps": 3}, {"n_steps": 3}),
    "shiq": (shiq_loss, {}, {}),
    "sequence": (shiq.sequence_loss, {"first_only": True}, {"form": "sequence"}),
    "turn-cut": (shiq.turn_cut_loss, {}, {"form": "turns"}),
}
every_form = pytest.mark.parametrize("form", FORMS)


def perturbed(mdp: Any, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, 1, mdp.ref_logits.shape)
    return np.where(mdp.allowed, mdp.ref_logits, 0.0) + noise


def population_value(mdp: Any, behavior: np.ndarray, table: Tensor, form: str, beta: float, gamma: float) -> Tensor:
    population = Population(mdp, behavior, beta, gamma)
    options = dict(FORMS[form][1])
    if form == "turn-cut":
        options["turn_targets"] = population.pieces(table)[1].detach()
    return population.loss(table, **options)


def world_scale(mdp: Any, table: np.ndarray, beta: float, tokens: float) -> float:
    """Squares of sums of at most `tokens` terms below max|r| + 2 beta (max|l| + max|l_ref| + ln V), one a token."""
    size = np.abs(mdp.reward).max() + 2 * beta * (np.abs(table).max() + np.abs(mdp.ref_logits[mdp.allowed]).max() + 2)
    return float(tokens * (tokens * size) ** 2)


@every_form
@given(seed=st.integers(0, 2**31), random_replies=st.booleans(), gamma=st.sampled_from([1.0, 0.8]))
@settings(max_examples=15, deadline=None)
def test_population_loss_equals_listing(form: str, seed: int, random_replies: bool, gamma: float) -> None:
    """The exact expectation: value and gradient of the listed rows, weighted by their probability; and F12's recursion.

    The turn-cut form bootstraps with the mean of the next turn's value in place of the value itself, so its value lacks
    the variance of that (a constant under the stopped gradient): there the gradient is compared, and the value where no
    reply is random.
    """
    mdp, behavior = random_world(seed, loops=False, random_replies=random_replies)
    beta, table = 0.7, perturbed(mdp, seed)
    batch = enumerate_trajectories(mdp, behavior=behavior)
    loss = FORMS[form][0]
    allowed, ref = torch.tensor(mdp.allowed), torch.tensor(mdp.ref_logits)
    x = torch.tensor(table).requires_grad_()
    full = torch.where(allowed, x, -torch.inf)
    stats = TokenStats.from_table(full, batch, ref_table=ref), TokenStats.from_table(ref, batch)
    listed = loss(*stats, batch, beta=beta, gamma=gamma, reduction="sum")
    y = torch.tensor(table).requires_grad_()
    exact = population_value(mdp, behavior, y, form, beta, gamma)
    scale = world_scale(mdp, table, beta, mdp.n_states)
    assert_close(torch.autograd.grad(exact, y)[0], torch.autograd.grad(listed, x)[0], scale)
    if form != "turn-cut" or not random_replies:
        assert_close(exact.detach(), listed.detach(), scale)


# Conditioning: the dense solves of recursion and package see matrices I - gamma P with a chance of at least ~1/4 to end, so
# their inverses are below 16 and the visits below that.
VISITS = 16


@every_form
@pytest.mark.parametrize("loops", [False, True])
@given(seed=st.integers(0, 2**31), random_replies=st.booleans(), gamma=st.sampled_from([1.0, 0.8]))
@settings(max_examples=10, deadline=None)
def test_population_loss_equals_the_literal_recursion(
    form: str, loops: bool, seed: int, random_replies: bool, gamma: float
) -> None:
    """m1 and m2 of F12 by plain loops and a dense solve, loops included."""
    mdp, behavior = random_world(seed, loops, random_replies and form != "turn-cut")
    beta, table = 0.7, perturbed(mdp, seed)
    literal = population_loss(mdp, behavior, np.where(mdp.allowed, table, -np.inf), beta=beta, gamma=gamma, **FORMS[form][2])
    exact = population_value(mdp, behavior, torch.tensor(table), form, beta, gamma)
    assert_close(exact, literal, world_scale(mdp, table, beta, VISITS * mdp.n_states))


@every_form
def test_population_loss_on_loop(form: str) -> None:
    """An environment without a longest episode: the literal recursion, and rows sampled long enough to lose nothing."""
    mdp = make("Loop")
    behavior, table = uniform_policy(mdp), perturbed(mdp, 0)
    literal = population_loss(mdp, behavior, np.where(mdp.allowed, table, -np.inf), beta=0.25, gamma=0.9, **FORMS[form][2])
    exact = population_value(mdp, behavior, torch.tensor(table), form, 0.25, 0.9)
    assert_close(exact, literal, world_scale(mdp, table, 0.25, VISITS * mdp.n_states))


@given(seed=st.integers(0, 2**31), random_replies=st.booleans(), gamma=st.sampled_from([1.0, 0.8]))
@settings(max_examples=15, deadline=None)
def test_residual_mean_is_the_semi_gradient(seed: int, random_replies: bool, gamma: float) -> None:
    """E[rho | s, a] x visits x 2 beta is the listed gradient of the semi-gradient loss (F11a)."""
    mdp, behavior = random_world(seed, False, random_replies)
    beta, table = 0.7, perturbed(mdp, seed)
    batch = enumerate_trajectories(mdp, behavior=behavior)
    x = torch.tensor(table).requires_grad_()
    stats = (
        TokenStats.from_table(torch.where(torch.tensor(mdp.allowed), x, -torch.inf), batch),
        TokenStats.from_table(torch.tensor(mdp.ref_logits), batch),
    )
    listed = shiq.semi_gradient_loss(*stats, batch, beta=beta, gamma=gamma, reduction="sum")
    population = Population(mdp, behavior, beta, gamma)
    rho = population.residual_mean(torch.tensor(table)).numpy()
    expected = 2 * beta * population.arrivals[:, None] * population.chance * rho
    assert_close(torch.autograd.grad(listed, x)[0], expected, world_scale(mdp, table, beta, mdp.n_states))


# ----------------------------------------------------------------------------------------------------------- bad input
def test_wrong_arguments_are_named() -> None:
    case = mixed().clean()
    policy, ref = case.stats(joint=False)
    good = {"beta": 1.0, "gamma": 0.9}
    for change, name in (
        ({"beta": 0.0}, "beta"),
        ({"beta": float("nan")}, "beta"),
        ({"beta": float("inf")}, "beta"),
        ({"gamma": 0.0}, "gamma"),
        ({"gamma": 1.1}, "gamma"),
        ({"n_steps": 0}, "n_steps"),
        ({"n_steps": True}, "n_steps"),
        ({"n_steps": 1.5}, "n_steps"),
        ({"reduction": "median"}, "reduction"),
        ({"target_stats": replace(policy, logsumexp=policy.logsumexp[:, :1])}, "target_stats.logsumexp"),
    ):
        with pytest.raises(ValueError, match=rf"^{name}: "):
            shiq_loss(policy, ref, case.batch, **{**good, **change})
    with pytest.raises(ValueError, match=r"^policy_stats.token_logit: "):
        shiq_loss(replace(policy, token_logit=policy.token_logit[:, :-1]), ref, case.batch, **good)
    with pytest.raises(ValueError, match=r"^ref_stats.end_logsumexp: "):
        shiq_loss(policy, replace(ref, end_logsumexp=ref.end_logsumexp[:1]), case.batch, **good)
    with pytest.raises(ValueError, match=r"^policy_stats: .*joint_logsumexp"):
        shiq.naive_loss(policy, ref, case.batch, **good)
    with pytest.raises(ValueError, match=r"^through: "):
        shiq.semi_gradient_loss(policy, ref, case.batch, through="both", **good)


def test_closed_form_takes_mixed_dtypes() -> None:
    """A float32 model against a float64 reference: the gradient comes in the wider type."""
    case = mixed().clean()
    policy = TokenStats.from_logits(case.logits.float(), case.batch)
    assert shiq.shiq_gradient(policy, case.stats()[1], case.batch, beta=0.7).token_logit.dtype == torch.float64


# -------------------------------------------------------------------------------------------------------- planted bugs
def _gamma_late(x: Tensor, gamma: float, chain: Tensor, terms: int | None = None) -> Tensor:
    """gamma^{k-t+1} in place of gamma^{k-t} for the later terms."""
    return x + gamma * (ORIGINAL_SUM(x, gamma, chain, terms) - x)


ORIGINAL_SUM, ORIGINAL_ACTIONS = residuals_module.discounted_sum, residuals_module.actions_of
ORIGINAL_RESIDUALS, ORIGINAL_MASKED, ORIGINAL_FROM_LOGITS = shiq.residuals, TokenStats._masked, TokenStats.from_logits


def _unshifted_mask(batch: TokenBatch) -> Any:
    """The mask of input_ids used as if it were the mask of logits: the last action is lost, the prompt's last column not."""
    mask = torch.nn.functional.pad(batch.completion_mask[:, :-1] * batch.attention_mask[:, :-1], (1, 0))
    return ORIGINAL_ACTIONS(replace_mask(batch, mask))


def replace_mask(batch: TokenBatch, mask: Tensor) -> TokenBatch:
    """A batch whose completion mask nobody checks."""
    out = replace(batch)
    object.__setattr__(out, "completion_mask", mask)
    return out


def _no_bootstrap(c: Tensor, u: Tensor, u_end: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return ORIGINAL_RESIDUALS(c, u, 0 * u_end, *args, **kwargs)


def _end_everywhere(c: Tensor, u: Tensor, u_end: Tensor, batch: TokenBatch, *args: Any, **kwargs: Any) -> Tensor:
    """Bootstraps at terminated rows as well; the statistics' own masking is undone by a level of 1."""
    end = torch.where(batch.terminated, torch.ones_like(u_end), u_end)
    return ORIGINAL_RESIDUALS(c, u, end, replace(batch, terminated=torch.zeros_like(batch.terminated)), *args, **kwargs)


def _beta_inside(cls: Any, logits: Tensor, batch: TokenBatch, *, ref_logits: Tensor | None = None) -> TokenStats:
    """v = lse(beta l) in place of beta lse(l), at beta = 0.7: its 0.7 times this level is that."""
    good = ORIGINAL_FROM_LOGITS(logits, batch, ref_logits=ref_logits)
    scaled = ORIGINAL_FROM_LOGITS(0.7 * logits, batch)
    return replace(good, logsumexp=scaled.logsumexp / 0.7, end_logsumexp=scaled.end_logsumexp / 0.7)


def _own_level(c: Tensor, u: Tensor, u_end: Tensor, batch: TokenBatch, actions: Any, **kwargs: Any) -> Tensor:
    """The next state's level taken from the action's own column."""
    shifted = torch.nn.functional.pad(u, (1, 0))[:, :-1]
    return ORIGINAL_RESIDUALS(c, shifted, u_end, batch, actions, **kwargs)


def _reward_early(c: Tensor, u: Tensor, u_end: Tensor, batch: TokenBatch, actions: Any, **kwargs: Any) -> Tensor:
    """Rewards read at the column that scores the action."""
    early = torch.nn.functional.pad(batch.rewards[:, :-1].nan_to_num(0.0), (1, 0))
    return ORIGINAL_RESIDUALS(c, u, u_end, replace(batch, rewards=early), actions, **kwargs)


def _environment_discounted(batch: TokenBatch) -> Any:
    """Chains broken by environment tokens, as if every turn were a sequence of its own."""
    actions = ORIGINAL_ACTIONS(batch)
    return replace(actions, segment=actions.turn)


BUGS: dict[str, tuple[Any, str, Any]] = {
    "gamma one power late": (residuals_module, "discounted_sum", _gamma_late),
    "mask not shifted": (shiq, "actions_of", _unshifted_mask),
    "bootstrap dropped": (shiq, "residuals", _no_bootstrap),
    "end level not masked": (shiq, "residuals", _end_everywhere),
    "beta inside the log-sum-exp": (TokenStats, "from_logits", classmethod(_beta_inside)),
    "next level from the same column": (shiq, "residuals", _own_level),
    "rewards one token early": (shiq, "residuals", _reward_early),
    "turns forget each other": (shiq, "actions_of", _environment_discounted),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_noticed(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each bug, planted in the package, must break the comparison with the plain loops that holds without it."""
    case = mixed()
    assert_agrees(case, "shiq")
    monkeypatch.setattr(*BUGS[bug])
    with pytest.raises(AssertionError):
        assert_agrees(case, "shiq")


def test_an_unmasked_statistic_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masking by multiplication lets NaN of the padding through; the garbage in every case finds it."""

    def multiply(cls: Any, chosen: Tensor, level: Tensor, joint: Any, acts: Tensor, last: Tensor, batch: TokenBatch) -> Any:
        good = ORIGINAL_MASKED(chosen, level, joint, acts, last, batch)
        return replace(good, logsumexp=level[:, :-1] * acts[:, :-1] + 0 * batch.rewards[:, :1])

    monkeypatch.setattr(TokenStats, "_masked", classmethod(multiply))
    with pytest.raises(AssertionError):
        assert_agrees(mixed(), "shiq")


@pytest.mark.parametrize("n_steps", [None, 1, 2])
def test_no_gradient_flows_into_a_target_network_or_a_reference(n_steps: int | None) -> None:
    """The policy's own statistics as target, cut rows among them: the gradient is that of a frozen copy."""
    case = mixed()
    policy, ref = case.stats()
    names = ("token_logit", "logsumexp", "end_logsumexp")

    def leaves(stats: TokenStats) -> TokenStats:
        return TokenStats(*[getattr(stats, name).detach().clone().requires_grad_() for name in names])

    own, reference = leaves(policy), leaves(ref)
    options = {"beta": 0.7, "gamma": 0.9, "n_steps": n_steps}
    shiq_loss(own, reference, case.batch, target_stats=own, **options).backward()
    alone = leaves(policy)
    shiq_loss(alone, reference.detach(), case.batch, target_stats=policy.detach(), **options).backward()
    for name in names:
        got, expected = getattr(own, name).grad, getattr(alone, name).grad
        torch.testing.assert_close(0 if got is None else got, 0 if expected is None else expected, rtol=0, atol=0)
        assert getattr(reference, name).grad is None
