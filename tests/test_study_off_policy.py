"""The off-policy studies: claims at fast settings, fixed points and effective sample sizes by other roads, planted mistakes."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from shiq_lab.learning import rows_of
from shiq_lab.losses.policy_gradient import reinforce_loss
from shiq_lab.losses.sequences import sequences_of
from shiq_lab.objectives import Point, Subject, World, lookup
from shiq_lab.policies import softmax_policy
from shiq_lab.studies import off_policy
from shiq_lab.studies.frame import Result, run
from shiq_lab.studies.off_policy import BEHAVIORS, OFF_POLICY, OFF_POLICY_TINY, PLAIN, WEIGHTED, Strings, behavior_of

FAST = {**OFF_POLICY.settings, **OFF_POLICY.fast}


@pytest.fixture(scope="module")
def tables() -> Result:
    return run(OFF_POLICY, fast=True, cache=None)


@pytest.fixture(scope="module")
def world() -> World:
    return off_policy.world_at(FAST, 0)


@pytest.mark.slow
def test_every_claim_holds_on_tables(tables: Result) -> None:
    assert len(tables.claims) == 7
    assert tables.passed, [(c.text, c.measured) for c in tables.claims if not c.holds]


@pytest.mark.slow
def test_the_figure_draws(tables: Result) -> None:
    assert len(OFF_POLICY.draw(tables).axes) == 3


@pytest.mark.slow
def test_the_tiny_study_runs_and_repeats() -> None:
    first, second = (run(OFF_POLICY_TINY, fast=True, seeds=1, cache=None) for _ in range(2))
    assert first.records == second.records
    assert len(OFF_POLICY_TINY.draw(first).axes) == 3


def test_the_same_seed_gives_the_same_numbers() -> None:
    case = {"behavior": "mixture", "loss": WEIGHTED}
    settings = {**FAST, "steps": 10}
    assert off_policy.measure(settings, case, 1) == off_policy.measure(settings, case, 1)
    assert off_policy.measure(settings, case, 1) != off_policy.measure(settings, case, 0)


@pytest.mark.parametrize("name", BEHAVIORS)
def test_where_policy_gradients_settle(world: World, name: str) -> None:
    """Both conditions as plain numbers, string by string: one multiplier for all, and probabilities that sum to 1.

    Bisection ends within 1e-14 of logs of size 10; rare strings divide by a probability: 1e-8 relative."""
    rows = rows_of(world, behavior_of(world, name), FAST["rows"], seed=0)
    strings = Strings.of(world, behavior_of(world, name), rows)
    assert strings.share.sum() == pytest.approx(1) and strings.share.min() > 0
    for weighted in (False, True):
        log = strings.settled(world.beta, weighted=weighted)
        assert log is not None and np.exp(log).sum() == pytest.approx(1, abs=1e-12)
        prices = []
        for i, x in enumerate(log):
            paid = strings.returns[i] - world.beta * (x - math.log(strings.reference[i]))
            ratio = math.exp(x) / strings.behavior[i] if weighted else 1.0
            prices.append(strings.share[i] * ratio * paid / math.exp(x))
        assert np.ptp(prices) <= 1e-8 * max(prices) and min(prices) > 0


def test_it_settles_at_pi_star_on_data_of_pi_star(world: World) -> None:
    """Unweighted with pi*'s own exact rows, and weighted with anyone's: no error is left."""
    own = Strings.of(world, world.solution.log_policy())
    other = Strings.of(world, behavior_of(world, "adversarial"))
    for strings, weighted in ((own, False), (own, True), (other, True)):
        log = strings.settled(world.beta, weighted=weighted)
        assert log is not None and strings.kl(log) == pytest.approx(0, abs=1e-12)
    log = other.settled(world.beta, weighted=False)
    assert log is not None and other.kl(log) > 1e-2


def test_a_missing_string_leaves_nothing_to_predict(world: World) -> None:
    strings = Strings.of(world, behavior_of(world, "uniform"))
    share = strings.share.copy()
    share[0] = 0
    assert replace(strings, share=share).settled(world.beta, weighted=True) is None


def test_the_effective_share_row_by_row(world: World) -> None:
    """Every sampled row by itself, one weight a row, from products of token probabilities."""
    behavior, policy = behavior_of(world, "adversarial"), world.solution.log_policy()
    rows = rows_of(world, behavior, 500, seed=3)
    weights = []
    for i in range(len(rows)):
        state, ratio = world.mdp.start, 1.0
        for token, acted in zip(rows.input_ids[i].tolist(), rows.completion_mask[i].tolist(), strict=True):
            if acted:
                ratio *= math.exp(policy[state, token] - behavior[state, token])
            state = world.mdp.next_state[state, token]
        weights += [ratio] * round(500 * float(rows.weights[i]))
    assert len(weights) == 500
    expected = sum(weights) ** 2 / sum(w**2 for w in weights) / 500
    assert off_policy.effective(world, rows, behavior, policy) == pytest.approx(expected, rel=1e-12)
    assert off_policy.effective(world, rows, behavior, behavior) == pytest.approx(1, rel=1e-12)


def test_the_limit_of_the_effective_share(world: World) -> None:
    """On the listing (sum w)^2 / sum w^2 is 1 / sum pi*^2 / mu."""
    behavior = behavior_of(world, "mixture")
    found = off_policy.effective(world, rows_of(world, behavior), behavior, world.solution.log_policy())
    assert found == pytest.approx(off_policy.listing(world, "mixture")["effective_best"], rel=1e-12)


def test_coverage_counts_what_is_there(world: World) -> None:
    behavior = behavior_of(world, "adversarial")
    rows = rows_of(world, behavior, 6, seed=1)
    said = [tuple(ids[1:]) for ids in rows.input_ids.tolist()]
    prefixes, tokens = {y[:t] for y in said for t in range(len(y))}, {y[: t + 1] for y in said for t in range(len(y))}
    found = off_policy.coverage(world, rows, Strings.of(world, behavior, rows))
    assert found["strings"] == len(said) / 16 and found["prefixes"] == len(prefixes) / 5 and found["tokens"] == len(tokens) / 20
    assert len(off_policy.unvisited_of(world, rows)) == 5 - len(prefixes)
    assert 0 < found["mass"] < 1


def test_local_kl_is_zero_at_the_optimum_and_a_plain_sum_elsewhere(world: World) -> None:
    states = [*world.starts.tolist(), *world.inner.tolist()]
    np.testing.assert_allclose(off_policy.local_kl(world, world.solution.optimal_logits(), states), 0, atol=1e-14)
    best, ref = np.exp(world.solution.log_policy()), softmax_policy(world.mdp, np.array(world.mdp.ref_logits))
    s = states[1]
    expected = sum(best[s, a] * (math.log(best[s, a]) - ref[s, a]) for a in np.flatnonzero(world.mdp.allowed[s]))
    assert off_policy.local_kl(world, np.array(world.mdp.ref_logits), [s])[0] == pytest.approx(expected, abs=1e-14)


# ------------------------------------------------------------------------------------------------------ planted mistakes
def inverted(p: Point) -> Tensor:
    """Importance weights the wrong way round: behaviour over policy."""
    stats = p.stats()
    ratio = torch.exp(p.behavior_log_prob - sequences_of(stats, p.ref, p.batch, p.world.beta, p.world.gamma).log_prob.detach())
    return reinforce_loss(stats, p.ref, replace(p.batch, weights=p.batch.weights * ratio), **p.options)


def test_inverted_importance_weights_break_the_claims(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caught against the exact on-policy gradient, and where training settles."""
    wrong = Subject(WEIGHTED, inverted, "never")
    monkeypatch.setattr(off_policy, "lookup", lambda name: wrong if name == WEIGHTED else lookup(name))
    gaps = [off_policy.listing(off_policy.world_at(FAST, 0), b)["weighted_gap"] for b in BEHAVIORS]
    assert min(gaps) > 0.1


def test_on_policy_rows_called_uniform_break_the_claims(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data of pi* itself under every name: plain REINFORCE no longer settles elsewhere, so its claims fail."""

    def star(world: World, name: str) -> np.ndarray:
        return world.solution.log_policy()

    monkeypatch.setattr(off_policy, "behavior_of", star)
    found = off_policy.listing(off_policy.world_at(FAST, 0), "uniform")
    assert found["plain_at_best"] <= 1e-12  # where every claim about it asks for more than 1e-3
    out = off_policy.measure(FAST, {"behavior": "uniform", "loss": PLAIN}, 0)
    assert out["predicted"] is None or out["predicted"] < 0.01
