"""The relatives against plain loops with gradients derived by hand, their population forms against all pairs, their edges."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import lse, sequences, softmax
from strategies import EPS, Case, cases
from torch import Tensor

from shiq_lab import TokenBatch, TokenStats, enumerate_trajectories, evaluate, make, solve
from shiq_lab.batch import pack
from shiq_lab.facts import Case as World
from shiq_lab.losses import consistency, contrastive, kl, policy_gradient, preference, shiq
from shiq_lab.losses.sequences import all_pairs
from shiq_lab.policies import softmax_policy

torch.set_num_threads(1)
few = settings(max_examples=12, deadline=None)

# Both roads round a few operations a token on numbers below Case.size(); products with exponentials (ratios, k3) are as
# large as the result, so the bound is relative to that as well.
ROUNDING = 512 * EPS
LISTED = 1e3  # the same size for the fixed small worlds below: squares of residuals that stay under 30


# ------------------------------------------------------------------------------------------------------ the second road
@dataclass
class Row:
    """One row in plain numbers. A gradient is written as coefficients: `score` of ln pi of each action, `level` of the
    log-sum-exp at a column, both filled by the loss in hand."""

    columns: list[int]
    log_prob: list[float]
    ratio: list[float]
    reward: list[float]
    behavior: list[float]
    weight: float
    group: int
    end: int | None
    gamma: float
    first_value: float
    state_values: list[float]
    end_value: float
    score: list[float]
    level: dict[int, float]
    value_slope: dict[int | None, float]  # d loss / d V at a column (None: the row's V), bootstrapped ones apart:
    target_slope: dict[int | None, float]

    def discounted(self, x: list[float]) -> float:
        return sum(self.gamma**k * y for k, y in enumerate(x))

    def regularised(self, beta: float) -> float:
        return self.discounted(self.reward) - beta * self.discounted(self.ratio)

    def push(self, slope: float, discounted: bool = True) -> None:
        """d loss / d l(y) = slope, or of the undiscounted log-probability."""
        for k in range(len(self.score)):
            self.score[k] += slope * (self.gamma**k if discounted else 1.0)


@dataclass
class Extra:
    """What some of the losses take besides: garbage wherever they must not read."""

    behavior: Tensor  # [B, L]
    state_values: Tensor  # [B, L]
    row_values: Tensor  # [B]
    label: Tensor  # [B / 2]


def extra_of(case: Case, seed: int) -> Extra:
    rng = np.random.default_rng([seed, 4])
    B, L = case.batch.input_ids.shape
    behavior, values = np.full((B, L), np.nan), np.full((B, L), np.nan)
    logits = case.clean().logits
    for seq in sequences(case.batch):
        row = seq.where[0]
        for column, a, _ in seq.actions:
            now = logits[row, column].tolist()
            behavior[row, column + 1] = min(math.log(softmax(now)[a]) + rng.normal(0, 0.5), 0.0)
            values[row, column] = rng.normal()
        if seq.end is not None:
            values[row, seq.end] = rng.normal()
    made = (behavior, values, rng.normal(size=B), rng.uniform(size=B // 2))
    return Extra(*(torch.from_numpy(x) for x in made))


def plain_rows(case: Case, extra: Extra) -> list[Row]:
    clean = case.clean()
    out = []
    for b, seq in enumerate(sequences(case.batch)):
        at = [c for c, _, _ in seq.actions]
        taken = [a for _, a, _ in seq.actions]
        log_prob, ref = ([x[b, c, a].item() - lse(x[b, c].tolist()) for c, a in zip(at, taken, strict=True)]
                         for x in (clean.logits, clean.ref))  # fmt: skip
        out.append(
            Row(
                at, log_prob, [p - q for p, q in zip(log_prob, ref, strict=True)], [r for _, _, r in seq.actions],
                [float(extra.behavior[b, c + 1]) for c in at], seq.weight, int(case.batch.group_ids[b]), seq.end, case.gamma,
                float(extra.row_values[b]), [float(extra.state_values[b, c]) for c in at],
                0.0 if seq.end is None else float(extra.state_values[b, seq.end]), [0.0] * len(at), {}, {}, {},
            )
        )  # fmt: skip
    return out


def gradient_of(rows: list[Row], case: Case) -> np.ndarray:
    """From coefficients to logits: d ln pi(a) = e_a - pi, d lse = pi."""
    logits = case.clean().logits
    out = np.zeros(tuple(logits.shape))
    for b, row in enumerate(rows):
        for column, score in zip(row.columns, row.score, strict=True):
            out[b, column] -= score * np.array(softmax(logits[b, column].tolist()))
            out[b, column, int(case.batch.input_ids[b, column + 1])] += score
        for column, slope in row.level.items():
            out[b, column] += slope * np.array(softmax(logits[b, column].tolist()))
    return out


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def by_pairs(
    one: Callable[[float, float, float], tuple[float, float]], take: Callable[[Row, float], float], slope: float
) -> Any:
    """A pair loss of the difference x(first) - x(second): `one` gives its value and derivative; x = take(row, beta) changes
    by `slope` (times beta where negative: R_b) with l."""

    def run(rows: list[Row], beta: float, extra: Extra) -> list[float]:
        half, out = len(rows) // 2, []
        for i in range(half):
            plus, minus = rows[i], rows[half + i]
            value, derivative = one(take(plus, beta) - take(minus, beta), float(extra.label[i]), beta)
            factor = slope if slope > 0 else -beta
            plus.push(plus.weight * derivative * factor), minus.push(-plus.weight * derivative * factor)
            out.append(value)
        return out

    return run


def plain_dpo(h: float, p: float, beta: float) -> tuple[float, float]:
    z = beta * h
    value = p * (math.log1p(math.exp(-abs(z))) + max(-z, 0)) + (1 - p) * (math.log1p(math.exp(-abs(z))) + max(z, 0))
    return value, beta * (sigma(z) - p)


def plain_ipo(h: float, p: float, beta: float) -> tuple[float, float]:
    g = 1 / (2 * beta)
    return p * (h - g) ** 2 + (1 - p) * (h + g) ** 2, 2 * p * (h - g) + 2 * (1 - p) * (h + g)


def groups(rows: list[Row]) -> list[list[Row]]:
    return [[r for r in rows if r.group == g] for g in dict.fromkeys(r.group for r in rows)]


def plain_agro(rows: list[Row], beta: float, extra: Extra) -> list[float]:
    variance = {}
    for members in groups(rows):
        x = [r.regularised(beta) for r in members]
        mean, n = sum(x) / len(x), len(x)
        variance[members[0].group] = sum((y - mean) ** 2 for y in x) / (n - 1)
        for r, y in zip(members, x, strict=True):
            r.push(sum(m.weight for m in members) * 2 * (y - mean) / (n - 1) * -beta)
    return [variance[r.group] for r in rows]


def plain_dro(rows: list[Row], beta: float, extra: Extra) -> list[float]:
    for r in rows:
        r.push(r.weight * (r.regularised(beta) - r.first_value) * -beta)
        r.value_slope[None] = -r.weight * (r.regularised(beta) - r.first_value)
    return [(r.regularised(beta) - r.first_value) ** 2 / 2 for r in rows]


def plain_a_star(rows: list[Row], beta: float, extra: Extra) -> list[float]:
    for r in rows:
        r.push(r.weight * 2 * (r.first_value - r.regularised(beta)) * beta)
    return [(r.first_value - r.regularised(beta)) ** 2 for r in rows]


def plain_pcl(n_steps: int | None) -> Any:
    def run(rows: list[Row], beta: float, extra: Extra) -> list[float]:
        out = []
        for r in rows:
            T, total = len(r.columns), 0.0
            for t in range(T):
                until = T if n_steps is None else min(T, t + n_steps)
                after = r.end_value if until == T else r.state_values[until]
                C = r.state_values[t] - r.gamma ** (until - t) * after
                C -= sum(r.gamma ** (k - t) * (r.reward[k] - beta * r.ratio[k]) for k in range(t, until))
                r.value_slope[r.columns[t]] = r.weight * C
                ahead = r.end if until == T else r.columns[until]
                if ahead is not None:
                    r.target_slope[ahead] = r.target_slope.get(ahead, 0.0) - r.weight * C * r.gamma ** (until - t)
                for k in range(t, until):
                    r.score[k] += r.weight * C * beta * r.gamma ** (k - t)
                total += C**2 / 2
            out.append(total)
        return out

    return run


def plain_tbrm(rows: list[Row], beta: float, extra: Extra, level: Callable[[Row, int], float]) -> list[float]:
    out = []
    for r in rows:
        if not r.columns:
            out.append(0.0)
            continue
        rho = beta * level(r, r.columns[0]) - r.regularised(beta)
        r.level[r.columns[0]] = r.weight * 2 * rho * beta
        if r.end is not None:
            back = r.gamma ** len(r.columns)
            rho -= back * beta * level(r, r.end)
            r.level = {r.columns[0]: r.weight * 2 * rho * beta, r.end: -r.weight * 2 * rho * beta * back}
        r.push(r.weight * 2 * rho * beta)
        out.append(rho**2)
    return out


KL = {
    "k1": (lambda x: x, lambda x: 1.0),
    "k2": (lambda x: x**2 / 2, lambda x: x),
    "k3": (lambda x: math.exp(-x) - 1 + x, lambda x: 1 - math.exp(-x)),
}


def penalty(r: Row, name: str, beta: float, times: float = 1.0) -> float:
    """The KL's part of a row's loss; its coefficients are added."""
    if name == "reward":
        return 0.0
    if name == "score":
        r.push(r.weight * times * beta * r.discounted(r.ratio), discounted=False)
        return beta * r.discounted(r.ratio) * sum(r.log_prob)
    value, slope = KL[name]
    for k, x in enumerate(r.ratio):
        r.score[k] += r.weight * times * beta * r.gamma**k * slope(x)
    return beta * r.discounted([value(x) for x in r.ratio])


def plain_reinforce(name: str, baseline: Callable[[Row, list[Row], float], float]) -> Any:
    def run(rows: list[Row], beta: float, extra: Extra) -> list[float]:
        out = []
        for r in rows:
            paid = r.regularised(beta) if name == "reward" else r.discounted(r.reward)
            advantage = paid - baseline(r, rows, beta)
            r.push(-r.weight * advantage, discounted=False)
            out.append(penalty(r, name, beta) - advantage * sum(r.log_prob))
        return out

    return run


def leave_one_out(r: Row, rows: list[Row], beta: float) -> float:
    others = [m.regularised(beta) for m in rows if m.group == r.group and m is not r]
    return sum(others) / len(others)


def plain_grpo(*, std: bool, name: str, loo: bool, mean: bool, clip: float = 0.2) -> Any:
    def run(rows: list[Row], beta: float, extra: Extra) -> list[float]:
        out = []
        for r in rows:
            paid = lambda m: m.regularised(beta) if name == "reward" else m.discounted(m.reward)  # noqa: E731
            members = [m for m in rows if m.group == r.group]
            base = [paid(m) for m in members if not (loo and m is r)]
            A = paid(r) - sum(base) / len(base)
            if std:
                A /= float(np.std([paid(m) for m in members], ddof=1)) + 1e-4
            times, total = (1 / max(len(r.columns), 1) if mean else 1.0), 0.0
            for k, (now, old) in enumerate(zip(r.log_prob, r.behavior, strict=True)):
                w = math.exp(now - old)
                clipped = min(max(w, 1 - clip), 1 + clip)
                total += min(w * A, clipped * A)
                if w * A <= clipped * A:
                    r.score[k] -= r.weight * times * A * w
            out.append(times * (penalty(r, name, beta, times) - total))
        return out

    return run


def plain_topr(rows: list[Row], beta: float, extra: Extra) -> list[float]:
    out = []
    for r in rows:
        R = r.discounted(r.reward)
        w = 1.0 if R >= 0 else min(1.0, math.exp(sum(r.log_prob) - sum(r.behavior)))
        r.push(-r.weight * w * R, discounted=False)
        out.append(-w * R * sum(r.log_prob))
    return out


def plain_sft(rows: list[Row], beta: float, extra: Extra) -> list[float]:
    for r in rows:
        r.push(-r.weight, discounted=False)
    return [-sum(r.log_prob) for r in rows]


def plain_kl(name: str) -> Any:
    return lambda rows, beta, extra: [penalty(r, name, beta) for r in rows]


def square(x: float, p: float, beta: float) -> tuple[float, float]:
    return x**2, 2 * x


def call(loss: Callable[..., Tensor], **more: Any) -> Any:
    """The package's loss; options that are functions take them from the Extra."""

    def run(s: TokenStats, ref: TokenStats, batch: TokenBatch, extra: Extra, **options: Any) -> Tensor:
        return loss(s, ref, batch, **options, **{k: v(extra) if callable(v) else v for k, v in more.items()})

    return run


def short(loss: Callable[..., Tensor], *names: str, **more: Any) -> Any:
    """A loss without reference."""

    def run(s: TokenStats, ref: TokenStats, batch: TokenBatch, extra: Extra, **options: Any) -> Tensor:
        kept = {k: v for k, v in options.items() if k in names}
        return loss(s, batch, **kept, **{k: v(extra) for k, v in more.items()})

    return run


REINFORCE, GRPO = policy_gradient.reinforce_loss, policy_gradient.grpo_loss
BEHAVIOR = {"behavior_logprobs": lambda e: e.behavior}
VALUES, STATE_VALUES = {"values": lambda e: e.row_values}, {"values": lambda e: e.state_values}
zero = lambda r, rows, beta: 0.0  # noqa: E731

# name: the package's loss, the plain one, may rows be cut, is it of pairs
LOSSES: dict[str, tuple[Any, Any, bool, bool]] = {
    "dpo": (
        call(preference.dpo_loss, chosen_probability=lambda e: e.label),
        by_pairs(plain_dpo, lambda r, b: r.discounted(r.ratio), 1.0),
        True,
        True,
    ),
    "ipo": (
        call(preference.ipo_loss, chosen_probability=lambda e: e.label),
        by_pairs(plain_ipo, lambda r, b: r.discounted(r.ratio), 1.0),
        True,
        True,
    ),
    "copg": (call(contrastive.copg_loss), by_pairs(square, lambda r, b: r.regularised(b), -1.0), False, True),
    "agro": (call(contrastive.agro_loss), plain_agro, False, False),
    "dro": (call(consistency.dro_loss, **VALUES), plain_dro, False, False),
    "a-star": (call(consistency.a_star_loss, v_star=lambda e: e.row_values), plain_a_star, False, False),
    "pcl": (call(consistency.pcl_loss, **STATE_VALUES), plain_pcl(None), True, False),
    "pcl, 1 step": (call(consistency.pcl_loss, n_steps=1, **STATE_VALUES), plain_pcl(1), True, False),
    "pcl, 2 steps": (call(consistency.pcl_loss, n_steps=2, **STATE_VALUES), plain_pcl(2), True, False),
    "pcl, 2 steps, stopped": (
        call(consistency.pcl_loss, n_steps=2, stop_target=True, **STATE_VALUES),
        plain_pcl(2),
        True,
        False,
    ),
    "tbrm": (call(consistency.tbrm_loss), plain_tbrm, True, False),
    "reinforce": (call(REINFORCE), plain_reinforce("reward", zero), False, False),
    "reinforce, baseline": (
        call(REINFORCE, baseline=lambda e: e.row_values),
        plain_reinforce("reward", lambda r, rows, beta: r.first_value),
        False,
        False,
    ),
    **{
        f"reinforce, {name}": (call(REINFORCE, kl=name), plain_reinforce(name, zero), False, False)
        for name in ("k1", "k2", "k3", "score")
    },
    "rloo": (call(policy_gradient.rloo_loss), plain_reinforce("reward", leave_one_out), False, False),
    "grpo": (call(GRPO, **BEHAVIOR), plain_grpo(std=True, name="k3", loo=False, mean=True), False, False),
    "grpo, plain": (
        call(GRPO, std=False, kl="reward", leave_one_out=True, length_mean=False, clip=0.5, **BEHAVIOR),
        plain_grpo(std=False, name="reward", loo=True, mean=False, clip=0.5),
        False,
        False,
    ),
    "grpo, score": (
        call(GRPO, std=False, kl="score", **BEHAVIOR),
        plain_grpo(std=False, name="score", loo=False, mean=True),
        False,
        False,
    ),
    "topr": (short(policy_gradient.topr_loss, "gamma", "reduction", **BEHAVIOR), plain_topr, False, False),
    "sft": (short(policy_gradient.sft_loss, "reduction"), plain_sft, True, False),
    **{f"kl, {name}": (call(kl.kl_loss, estimator=name), plain_kl(name), True, False) for name in KL},
    "kl, score": (call(kl.kl_score_loss), plain_kl("score"), True, False),
}


def prepared(case: Case, cut_rows: bool, pairs: bool) -> Case:
    """The case with groups of at least two rows, whole rows where they are needed, pairs of equal weight."""
    batch, half = case.batch, len(case.batch) // 2
    weights = torch.cat([batch.weights[:half]] * 2) if pairs else batch.weights
    ids = torch.tensor([7, 3]).repeat(len(batch))[: len(batch)] if half > 1 and not pairs else torch.zeros(len(batch)).long()
    ends = batch.terminated if cut_rows else torch.ones_like(batch.terminated)
    return replace(case, batch=replace(batch, weights=weights, group_ids=ids, terminated=ends))


def measured(case: Case, name: str, extra: Extra, reduction: str) -> tuple[Tensor, Tensor]:
    x = case.logits.clone().requires_grad_()
    policy, ref = case.stats(x, joint=False)
    out = LOSSES[name][0](policy, ref, case.batch, extra, beta=case.beta, gamma=case.gamma, reduction=reduction)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    return out.detach(), gradient


def expected(case: Case, name: str, extra: Extra) -> tuple[list[float], list[Row]]:
    rows = plain_rows(case, extra)
    if name == "tbrm":
        logits = case.clean().logits
        index = {id(r): b for b, r in enumerate(rows)}
        return plain_tbrm(rows, case.beta, extra, lambda r, c: lse(logits[index[id(r)], c].tolist())), rows
    return LOSSES[name][1](rows, case.beta, extra), rows


def assert_close(actual: Any, wanted: Any, size: float) -> None:
    actual, wanted = np.asarray(actual), np.asarray(wanted)
    assert actual.shape == wanted.shape and wanted.size > 0, "nothing compared"
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=ROUNDING * (size + np.abs(wanted).max()))


@pytest.mark.parametrize("name", LOSSES)
@given(case=cases(4, 6), seed=st.integers(0, 2**16))
@few
def test_every_relative_equals_the_plain_loops(name: str, case: Case, seed: int) -> None:
    """Value a row (or pair), weighted sum and mean, gradient of the sum; what is not read is garbage and gets gradient 0."""
    _, _, cut_rows, pairs = LOSSES[name]
    if len(case.batch) % 2:
        case = replace(case, batch=case.batch.select(slice(1, None)), logits=case.logits[1:], ref=case.ref[1:])
        case = replace(case, target=case.target[1:])
    case = prepared(case, cut_rows, pairs)
    extra = extra_of(case, seed)
    values, rows = expected(case, name, extra)
    size = case.size() * max(1.0, case.beta, 1 / case.beta**2)
    weights = np.array([r.weight for r in rows])[: len(values)]
    assert_close(measured(case, name, extra, "none")[0], values, size)
    total, gradient = measured(case, name, extra, "sum")
    assert_close(total, (weights * values).sum(), size)
    assert_close(gradient, gradient_of(rows, case), size)
    mean, of_mean = measured(case, name, extra, "mean")
    assert_close(mean, (weights * values).sum() / weights.sum(), size)
    assert_close(of_mean, gradient_of(rows, case) / weights.sum(), size)
    assert (gradient[~case.read()] == 0).all(), "a gradient where nothing is read"


@pytest.mark.parametrize("name", LOSSES)
def test_no_gradient_reaches_the_reference(name: str) -> None:
    """Nor the behaviour, a given V* or a baseline: only the policy, and values that are learned."""
    from strategies import mixed

    case = mixed()
    parts = {key: getattr(case, key)[:6] for key in ("logits", "ref", "target")}
    case = prepared(replace(case, batch=case.batch.select(slice(0, 6)), **parts), LOSSES[name][2], LOSSES[name][3])
    extra = extra_of(case, 0)
    x, y = case.logits.clone().requires_grad_(), case.ref.clone().requires_grad_()
    behavior, row_values = extra.behavior.clone().requires_grad_(), extra.row_values.clone().requires_grad_()
    policy, ref = TokenStats.from_logits(x, case.batch), TokenStats.from_logits(y, case.batch)
    given_ = replace(extra, behavior=behavior, row_values=row_values)
    out = LOSSES[name][0](policy, ref, case.batch, given_, beta=case.beta, gamma=case.gamma)
    found = torch.autograd.grad(out, (x, y, behavior, row_values), allow_unused=True)
    assert found[0] is not None and float(found[0].abs().max()) > 0
    assert found[1] is None and found[2] is None and (found[3] is None or name == "dro")


def test_nothing_is_discounted_by_default() -> None:
    """gamma 1 and the mean of rows, in every loss that takes them."""
    rooms = (preference, contrastive, consistency, policy_gradient, kl)
    found = [f for room in rooms for name, f in vars(room).items() if name.endswith("_loss")]
    assert len(found) >= 16
    for loss in found:
        defaults = {k: p.default for k, p in inspect.signature(loss).parameters.items()}
        assert defaults.get("gamma", 1.0) == 1.0 and defaults["reduction"] == "mean", loss.__name__


def test_the_kl_counts_once_by_default() -> None:
    """kl_loss and kl_score_loss alone: beta 1, gamma 1, k2."""
    case = small()
    stats, ref = case.stats(case.logits, case.batch), case.stats(case.ref, case.batch)
    for loss in (kl.kl_loss, kl.kl_score_loss):
        assert float(loss(stats, ref, case.batch)) == float(loss(stats, ref, case.batch, beta=1.0, gamma=1.0))
        assert float(loss(stats, ref, case.batch)) != float(loss(stats, ref, case.batch, beta=1.0, gamma=0.9))
    assert float(kl.kl_loss(stats, ref, case.batch)) == float(kl.kl_loss(stats, ref, case.batch, estimator="k2"))


@pytest.mark.parametrize("name", ["dro", "pcl", "pcl, 2 steps", "pcl, 2 steps, stopped"])
@given(case=cases(4, 4), seed=st.integers(0, 2**16))
@few
def test_values_get_their_gradient(name: str, case: Case, seed: int) -> None:
    """d/dV against the same by hand; a stopped target gives none to the value that is bootstrapped from."""
    case = prepared(case, LOSSES[name][2], False)
    extra, key = extra_of(case, seed), "row_values" if name == "dro" else "state_values"
    values = getattr(extra, key).clone().requires_grad_()
    policy, ref = case.stats(joint=False)
    options = {"beta": case.beta, "gamma": case.gamma, "reduction": "sum"}
    total = LOSSES[name][0](policy, ref, case.batch, replace(extra, **{key: values}), **options)
    (gradient,) = torch.autograd.grad(total, values)
    wanted = np.zeros(tuple(values.shape))
    for b, row in enumerate(expected(case, name, extra)[1]):
        slopes = [row.value_slope] + ([] if "stopped" in name else [row.target_slope])
        for column, slope in ((c, x) for part in slopes for c, x in part.items()):
            wanted[(b,) if column is None else (b, column)] += slope
    assert_close(gradient, wanted, case.size())


@pytest.mark.parametrize("name", ["sft", "dro", "a-star", "reinforce", "reinforce, k3", "rloo", "agro", "grpo", "topr", "tbrm",
                                  "pcl, 2 steps", "kl, k2", "kl, score"])  # fmt: skip
def test_packed_rows_are_the_same_rows(name: str) -> None:
    """Packing moves segments, not numbers: weighted sums and their gradients agree."""
    from strategies import mixed

    case = prepared(mixed("left"), LOSSES[name][2], False)
    extra = extra_of(case, 0)
    case = case.clean()
    wide = int(case.batch.attention_mask.sum(1).max()) * 2
    # carry all that a row has through pack by numbering its tokens
    L = case.batch.input_ids.shape[1]
    number = torch.arange(case.batch.input_ids.numel()).reshape(-1, L)
    packed = pack(replace(case.batch, states=number), wide)
    where = packed.states.clamp(min=0)  # type: ignore[union-attr]
    through = lambda x: x.reshape(-1, *x.shape[2:])[where]  # noqa: E731
    owner = torch.full(packed.terminated.shape, 0)
    for p in range(len(packed)):
        for n in range(packed.terminated.shape[1]):
            own = packed.segment_ids[p] == n + 1  # type: ignore[index]
            owner[p, n] = where[p][own][0] // L if own.any() else 0
    other = Extra(through(extra.behavior), through(extra.state_values), extra.row_values[owner], extra.label)
    x = case.logits.clone().requires_grad_()
    loss = LOSSES[name][0]
    out = []
    for batch, logits, ref, more in ((case.batch, x, case.ref, extra), (packed, through(x), through(case.ref), other)):
        stats, ref_stats = TokenStats.from_logits(logits, batch), TokenStats.from_logits(ref, batch)
        total = loss(stats, ref_stats, batch, more, beta=case.beta, gamma=case.gamma, reduction="sum")
        out.append((total.detach(), torch.autograd.grad(total, x)[0]))
    assert_close(out[1][0], out[0][0], case.size())
    assert_close(out[1][1], out[0][1], case.size())
    assert float(out[0][1].abs().max()) > 0


# ---------------------------------------------------------------------------------------------------------- populations
def world(name: str = "ToolCall", gamma: float = 0.9, **options: Any) -> World:
    return World(make(name, **options), 0.7, gamma)


def small(gamma: float = 0.9, replies: bool = False) -> World:
    """A listing of some dozen rows with two prompts, from the fixed-point table's own automata."""
    from shiq_lab.fixed_points import worlds

    found = [w for w in worlds() if w.gamma == 1.0 and w.name == ("random replies" if replies else "deterministic")]
    return World(found[0].mdp, 0.7, gamma)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("kind", ["dpo", "ipo", "copg"])
def test_all_pairs_are_all_pairs(kind: str, hard: bool) -> None:
    """The population form equals a loop over pairs of rows, and the pair loss on the pairs as rows with their label."""
    case = small()
    batch, beta = case.batch.select(slice(0, None, 3)), case.beta
    stats, ref = case.stats(case.logits, batch), case.stats(case.ref, batch)
    options = {"beta": beta, "gamma": case.gamma, "reduction": "sum"}
    rows = []
    for seq, weight, group in zip(sequences(batch), batch.weights.tolist(), batch.group_ids.tolist(), strict=True):
        b = seq.where[0]
        x = [float(s.token_logit[b, c] - s.logsumexp[b, c]) for s in (stats,) for c, _, _ in seq.actions]
        y = [float(ref.token_logit[b, c] - ref.logsumexp[b, c]) for c, _, _ in seq.actions]
        ratio = sum(case.gamma**k * (p - q) for k, (p, q) in enumerate(zip(x, y, strict=True)))
        paid = sum(case.gamma**k * r for k, (_, _, r) in enumerate(seq.actions))
        rows.append((ratio, paid, weight, group))
    total = 0.0
    for ratio, paid, weight, group in rows:
        mass = sum(w for _, _, w, g in rows if g == group)
        for other, reward, w, g in rows:
            if g != group:
                continue
            p = (0.5 if paid == reward else float(paid > reward)) if hard else sigma(paid - reward)
            one = {"dpo": plain_dpo, "ipo": plain_ipo, "copg": square}[kind]
            x = paid - reward - beta * (ratio - other) if kind == "copg" else ratio - other
            total += weight * w / mass * one(x, p, beta)[0]
    form = {"dpo": preference.dpo_pairs_loss, "ipo": preference.ipo_pairs_loss, "copg": contrastive.copg_pairs_loss}[kind]
    more = {} if kind == "copg" else {"hard_labels": hard}
    assert_close(form(stats, ref, batch, **options, **more), np.array(total), LISTED)
    pairs = all_pairs(batch)
    both = torch.cat([pairs.first, pairs.second])
    twice = replace(batch.select(both), weights=pairs.weight.repeat(2))
    paid_all = torch.tensor([paid for _, paid, _, _ in rows], dtype=torch.float64)
    better = paid_all[pairs.first] - paid_all[pairs.second]
    label = (1 + better.sign()) / 2 if hard else preference.bradley_terry(better)
    plain = {"dpo": preference.dpo_loss, "ipo": preference.ipo_loss, "copg": contrastive.copg_loss}[kind]
    more = {} if kind == "copg" else {"chosen_probability": label}
    seen = plain(case.stats(case.logits, twice), case.stats(case.ref, twice), twice, **options, **more)
    assert_close(seen, np.array(total), LISTED)


@pytest.mark.parametrize("kind", ["rloo", "agro", "grpo"])
def test_groups_of_two_have_the_population_as_their_mean(kind: str) -> None:
    """RLOO, the variance and leave-one-out advantages are unbiased at any group size: all groups of two, weighted, give the
    population's expected gradient. With oneself in the mean the advantage is half as large."""
    case = small()
    batch = case.batch.select(slice(0, None, 2))
    pairs = all_pairs(batch)
    both, number = torch.cat([pairs.first, pairs.second]), torch.arange(len(pairs.weight))
    twos = replace(batch.select(both), weights=pairs.weight.repeat(2) / 2, group_ids=number.repeat(2))
    options = {"beta": case.beta, "gamma": case.gamma, "reduction": "sum"}
    plain: dict[str, Any] = {"std": False, "kl": "reward", "length_mean": False}
    form: Any = {
        "rloo": policy_gradient.rloo_loss,
        "agro": contrastive.agro_loss,
        "grpo": lambda *a, **k: policy_gradient.grpo_loss(*a, **plain, **k),
    }[kind]

    def gradient(rows: TokenBatch, **more: Any) -> Tensor:
        ref = case.stats(case.ref, rows)
        return case.gradient(case.logits, lambda t: form(case.stats(t, rows), ref, rows, **options, **more))

    whole, sampled = gradient(batch, population=True), gradient(twos)
    assert_close(sampled, whole / 2 if kind == "grpo" else whole, LISTED)
    if kind == "grpo":
        assert_close(gradient(twos, leave_one_out=True), whole, LISTED)
    assert float(whole.abs().max()) > 1e-2
    if kind == "agro":
        ref = case.stats(case.ref, batch)
        twice = contrastive.copg_pairs_loss(case.stats(case.logits, batch), ref, batch, **options)
        once = contrastive.agro_loss(case.stats(case.logits, batch), ref, batch, population=True, **options)
        assert_close(2 * once, twice, LISTED)


def test_grpo_without_a_behaviour_is_on_policy() -> None:
    """None means the policy's own log-probabilities: ratio 1, and with a leave-one-out baseline and R_b it is RLOO."""
    case = small()
    batch, ref = case.batch, case.stats(case.ref, case.batch)
    stats = case.stats(case.logits, batch)
    own = torch.nn.functional.pad(stats.token_logit - stats.logsumexp, (1, 0))
    options = {"beta": case.beta, "gamma": case.gamma, "reduction": "sum"}
    plain: dict[str, Any] = {"std": False, "kl": "reward", "length_mean": False, "leave_one_out": True, **options}
    found = [
        case.gradient(case.logits, lambda t, m=more: GRPO(case.stats(t, batch), ref, batch, **plain, **m))
        for more in ({}, {"behavior_logprobs": own}, {"behavior_logprobs": own - 1.0})
    ]
    rloo = case.gradient(case.logits, lambda t: policy_gradient.rloo_loss(case.stats(t, batch), ref, batch, **options))
    assert_close(found[0], rloo, LISTED)
    assert_close(found[1], rloo, LISTED)
    assert float((found[2] - rloo).abs().max()) > 1e-2


# ------------------------------------------------------------------------------------------------- gradients of J and KL
def exact_slopes(case: World, log_policy: np.ndarray, reward: float, beta: float) -> np.ndarray:
    """d J / d l(s, a) by the policy gradient theorem, from backward induction: occupancy (q - beta ln ratio - v)."""
    mdp = replace(case.mdp, reward=reward * case.mdp.reward)
    value = evaluate(mdp, log_policy, beta=beta, gamma=case.gamma)
    ratio = np.where(mdp.allowed, log_policy - np.where(mdp.allowed, mdp.ref_log_policy, 0.0), 0.0)
    use = mdp.allowed & mdp.is_policy[:, None]
    return np.where(use, value.occupancy * (np.where(use, value.q, 0.0) - beta * ratio - value.v[:, None]), 0.0)


def on_its_own(case: World) -> tuple[World, np.ndarray]:
    """The case with the policy of its table as behaviour."""
    log_policy = softmax_policy(case.mdp, np.where(case.mdp.allowed, case.logits.numpy(), 0.0))
    return replace(case, policy=log_policy), log_policy


@pytest.mark.parametrize("gamma", [1.0, 0.8])
@pytest.mark.parametrize("replies", [False, True])
def test_reinforce_follows_the_gradient_of_the_objective(gamma: float, replies: bool) -> None:
    """On-policy -E d REINFORCE = d J at any policy, discounted and random worlds too, for the KL in the reward and for its
    true gradient in the loss; RLOO's and AGRO's expectations are the same direction (AGRO's at 2 beta)."""
    case, log_policy = on_its_own(small(gamma, replies))
    wanted = exact_slopes(case, log_policy, 1.0, case.beta)
    batch, ref = case.batch, case.stats(case.ref, case.batch)

    def gradient(loss: Any, **more: Any) -> Tensor:
        options = {"beta": case.beta, "gamma": gamma, "reduction": "sum", **more}
        return case.gradient(case.logits, lambda t: loss(case.stats(t, batch), ref, batch, **options))

    for more in ({}, {"kl": "score"}, {"baseline": 3.0}):
        assert_close(-gradient(REINFORCE, **more), wanted, LISTED)
    assert_close(-gradient(policy_gradient.rloo_loss, population=True), wanted, LISTED)
    if gamma == 1.0:
        assert_close(-gradient(contrastive.agro_loss, population=True) / (2 * case.beta), wanted, LISTED)
        assert_close(-gradient(consistency.a_star_loss, v_star=0.4) / (2 * case.beta), wanted, LISTED)
    assert np.abs(wanted).max() > 1e-2


@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_only_the_score_has_the_gradient_of_the_kl(gamma: float) -> None:
    """On-policy: k1's is 0, the score's is that of the discounted KL; k2's and k3's are neither (many tokens)."""
    case, log_policy = on_its_own(small(gamma))
    wanted = -exact_slopes(case, log_policy, 0.0, 1.0)
    batch, ref = case.batch, case.stats(case.ref, case.batch)
    found = {
        name: case.gradient(
            case.logits,
            lambda t, n=name: kl.kl_loss(
                case.stats(t, batch), ref, batch, estimator=n, beta=1.0, gamma=gamma, reduction="sum"
            ),
        )
        for name in ("k1", "k2", "k3")
    }  # fmt: skip
    score = case.gradient(
        case.logits, lambda t: kl.kl_score_loss(case.stats(t, batch), ref, batch, beta=1.0, gamma=gamma, reduction="sum")
    )
    assert_close(score, wanted, LISTED)
    assert_close(found["k1"], np.zeros_like(wanted), LISTED)
    for name in ("k2", "k3"):
        assert np.abs(found[name].numpy() - wanted).max() > 1e-2 * np.abs(wanted).max()


@given(seed=st.integers(0, 2**32 - 1), size=st.integers(2, 6))
@settings(max_examples=30, deadline=None)
def test_kl_estimators_at_one_state(seed: int, size: int) -> None:
    """E k1 = E k3 = KL; E d k1 = 0, E d k2 = d KL(pi || ref), E d k3 = d KL(ref || pi); slopes are the derivatives."""
    rng = np.random.default_rng(seed)
    l, r = (torch.tensor(rng.normal(0, 1.5, size)) for _ in range(2))  # noqa: E741
    x = l.clone().requires_grad_()
    pi, ref = l.softmax(0), r.softmax(0)
    forward = (x.softmax(0) * (x.log_softmax(0) - r.log_softmax(0))).sum()
    backward = (ref * (r.log_softmax(0) - x.log_softmax(0))).sum()
    wanted = {"k1": torch.zeros_like(l), "k2": torch.autograd.grad(forward, x)[0], "k3": torch.autograd.grad(backward, x)[0]}
    large = ROUNDING * float((ref / pi).max() + 10)
    for name, value in kl.ESTIMATORS.items():
        ratio = x.log_softmax(0) - r.log_softmax(0)
        (mean,) = torch.autograd.grad((pi * value(ratio)).sum(), x)
        np.testing.assert_allclose(mean, wanted[name], rtol=0, atol=large)
        point = ratio.detach().requires_grad_()
        (slope,) = torch.autograd.grad(value(point).sum(), point)
        np.testing.assert_allclose(slope, kl.SLOPES[name](point.detach()), rtol=0, atol=large)
        if name != "k2":
            assert abs(float((pi * value(ratio)).sum().detach() - forward.detach())) <= large
        assert float(value(torch.zeros(1)).abs().max()) == 0


# -------------------------------------------------------------------------------------------------------------- kinships
def test_pcl_with_the_policys_own_value_is_shiq() -> None:
    """V = Dv of the logits: unified PCL, half of ShiQ's loss, value and gradient, for cut rows and n steps too."""
    case = small()
    batch = case.ragged
    ref = case.stats(case.ref, batch)
    options = {"beta": case.beta, "gamma": case.gamma, "reduction": "sum"}
    states = batch.known_states().clamp(min=0)

    def pcl(table: Tensor, n: int | None) -> Tensor:
        level = case.beta * (torch.where(torch.isfinite(table), table, -1e9).logsumexp(1) - case.ref.logsumexp(1))
        return consistency.pcl_loss(case.stats(table, batch), ref, batch, values=level[states], n_steps=n, **options)

    for n in (None, 1, 2):
        both = [
            case.gradient(case.logits, lambda t, n=n: shiq.shiq_loss(case.stats(t, batch), ref, batch, n_steps=n, **options)),
            case.gradient(case.logits, lambda t, n=n: pcl(t, n)),
        ]
        assert_close(2 * both[1], both[0], LISTED)
        assert float(both[0].abs().max()) > 1e-2


def test_tbrm_is_the_sequence_loss_at_a_normalised_reference() -> None:
    """The shift is beta lse(l_ref): none where it is 0, and elsewhere the two differ."""
    case = small()
    level = case.ref.logsumexp(1, keepdim=True)
    stats = case.stats(case.logits, case.ragged)
    options = {"beta": case.beta, "gamma": case.gamma, "reduction": "none"}
    flat = case.stats(case.ref - level, case.ragged)
    assert_close(consistency.tbrm_loss(stats, flat, case.ragged, **options),
                 shiq.sequence_loss(stats, flat, case.ragged, **options), LISTED)  # fmt: skip
    bent = case.stats(case.ref, case.ragged)
    apart = consistency.tbrm_loss(stats, bent, case.ragged, **options) - shiq.sequence_loss(stats, bent, case.ragged, **options)
    assert float(apart.abs().max()) > 1e-2


def test_the_reference_tells_v_star() -> None:
    """A*-PO's first stage on a listing is v* of the prompt (gamma 1, deterministic), at any beta, without overflow; on a
    sample of equal rows it is that of the sample; with random replies it is another number."""
    for beta in (0.7, 1e-3, 50.0):
        case = replace(small(1.0), beta=beta, policy=small().mdp.ref_log_policy)
        value = consistency.reference_value(case.batch, beta=beta, population=True)
        first = case.batch.known_states()[:, 0]
        gap = (value - torch.tensor(case.solution.v())[first]).abs().max()
        assert float(gap) <= 64 * EPS * case.solution.scale * max(1.0, beta)
    rows = replace(case.batch, weights=torch.ones(len(case.batch)))
    assert_close(consistency.reference_value(rows, beta=1.0), consistency.reference_value(rows, beta=1.0, population=True), 1.0)
    lucky = replace(small(1.0, replies=True), policy=small(replies=True).mdp.ref_log_policy)
    value = consistency.reference_value(lucky.batch, beta=0.7, population=True)
    gap = (value - torch.tensor(lucky.solution.v())[lucky.batch.known_states()[:, 0]]).abs()
    assert float(gap.max()) > 1e-3


def test_at_the_optimum_every_row_pays_the_same() -> None:
    """R_b = v*(prompt) row by row in ToolCall (deterministic), so DRO, CoPG, AGRO and A*-PO are 0 there."""
    mdp = make("ToolCall")
    for gamma in (1.0, 0.9):
        truth = solve(mdp, beta=0.3, gamma=gamma)
        batch = enumerate_trajectories(mdp)
        table, ref_table = torch.tensor(truth.optimal_logits()), torch.tensor(mdp.ref_logits)
        stats, ref = TokenStats.from_table(table, batch), TokenStats.from_table(ref_table, batch)
        v = torch.full((len(batch),), truth.objective, dtype=torch.float64)
        options = {"beta": 0.3, "gamma": gamma}
        rounding = (256 * EPS * truth.scale) ** 2
        assert float(consistency.dro_loss(stats, ref, batch, values=v, reduction="none", **options).max()) <= rounding
        assert float(consistency.a_star_loss(stats, ref, batch, v_star=truth.objective, **options)) <= rounding
        assert float(contrastive.agro_loss(stats, ref, batch, population=True, **options)) <= rounding


# ------------------------------------------------------------------------------------------------------------- bad input
def bad_calls() -> dict[str, tuple[Callable[[World], Any], str]]:
    def on(loss: Any, rows: Callable[[World], TokenBatch] = lambda c: c.batch, **more: Any) -> Any:
        def run(c: World) -> Any:
            batch = rows(c)
            return loss(c.stats(c.logits, batch), c.stats(c.ref, batch), batch, **{"beta": 0.5, **more})

        return run

    first = lambda n: lambda c: c.batch.select(slice(0, n))  # noqa: E731
    grouped = lambda c: replace(first(4)(c), group_ids=torch.tensor([0, 1, 2, 3]))  # noqa: E731
    one = lambda c: replace(first(4)(c), group_ids=torch.zeros(4).long(), weights=torch.ones(4))  # noqa: E731
    weighed = lambda c: replace(one(c), weights=torch.tensor([1.0, 1.0, 2.0, 1.0]))  # noqa: E731
    packed = lambda c: pack(first(4)(c), 30)  # noqa: E731
    return {
        "odd": (on(preference.dpo_loss, first(3)), "batch: expected an even number of rows"),
        "two prompts": (on(contrastive.copg_loss, grouped), "batch.group_ids: expected the same in both rows of a pair"),
        "weights": (on(preference.ipo_loss, weighed), "batch.weights: expected the same in both rows of a pair"),
        "packed": (on(preference.dpo_loss, packed), "batch: expected rows that are not packed"),
        "packed pairs": (on(preference.dpo_pairs_loss, packed), "batch: expected rows that are not packed"),
        "label": (on(preference.dpo_loss, one, chosen_probability=1.5), "chosen_probability: expected probabilities"),
        "labels": (on(preference.dpo_loss, one, chosen_probability=torch.ones(3)), "chosen_probability: expected a"),
        "cut": (on(policy_gradient.reinforce_loss, lambda c: c.ragged), "batch: expected rows that terminated"),
        "alone": (on(policy_gradient.rloo_loss, grouped), "batch.group_ids: expected groups of at least 2 rows"),
        "kl": (on(policy_gradient.reinforce_loss, kl="k4"), "kl: expected one of 'k1', 'k2', 'k3', got 'k4'"),
        "estimator": (on(kl.kl_loss, estimator="score"), "kl: expected one of 'k1', 'k2', 'k3'"),
        "baseline": (on(policy_gradient.reinforce_loss, baseline=torch.ones(2)), "baseline: expected a number, or shape"),
        "values": (on(consistency.dro_loss, values=torch.ones(2)), "values: expected a number, or shape"),
        "state values": (on(consistency.pcl_loss, values=torch.ones(2)), "values: expected shape"),
        "no values": (on(consistency.pcl_loss, values=None), "values: expected shape"),
        "n": (on(consistency.pcl_loss, values=torch.ones(2), n_steps=0), "n_steps: expected a whole number >= 1"),
        "behaviour": (on(policy_gradient.grpo_loss, behavior_logprobs=torch.ones(2)), "behavior_logprobs: expected shape"),
        "no behaviour": (
            lambda c: policy_gradient.topr_loss(c.stats(c.logits, c.batch), c.batch, behavior_logprobs=None),  # type: ignore[arg-type]
            "behavior_logprobs: expected shape",
        ),
        "reduction": (on(contrastive.agro_loss, population=True, reduction="all"), "reduction: expected 'mean', 'sum'"),
        "beta": (on(consistency.a_star_loss, v_star=0.0, beta=0.0), "beta: expected a finite number > 0"),
        "beta of values": (lambda c: consistency.reference_value(c.batch, beta=-1.0), "beta: expected a finite number > 0"),
        "stats": (lambda c: policy_gradient.sft_loss(c.logits, c.batch), "policy_stats: expected TokenStats"),  # type: ignore[arg-type]
    }  # fmt: skip


@pytest.mark.parametrize("name", bad_calls())
def test_what_would_train_the_wrong_thing_is_refused(name: str) -> None:
    run, message = bad_calls()[name]
    with pytest.raises(ValueError) as error:
        run(small())
    assert str(error.value).startswith(message)
