"""Data size and partial support: the predictions by plain computations, and plantings that break the claims."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from shiq_lab.learning import descend, rows_of
from shiq_lab.policies import uniform_policy
from shiq_lab.studies import data_size
from shiq_lab.studies.data_size import DATA_SIZE
from shiq_lab.studies.frame import Result, Settings, run

FAST: Settings = {**DATA_SIZE.settings, **DATA_SIZE.fast}


@pytest.fixture(scope="module")
def fast() -> Result:
    return run(DATA_SIZE, fast=True, cache=None)


@pytest.mark.slow
def test_claims_hold_and_the_figure_draws(fast: Result) -> None:
    assert [c.text for c in fast.claims if not c.holds] == []
    assert len(fast.claims) >= 6
    assert len(DATA_SIZE.draw(fast).axes) == 3


def test_partial_support_by_a_plain_recursion() -> None:
    """v(s) = beta ln(sum of tried pi_ref e^{q / beta} + what pi_ref gives the untried), written out."""
    world = data_size.world_at(FAST, 3)
    rows = rows_of(world, data_size.masked(world, 2, 3))
    tried = data_size.tried_in(world.mdp, rows)
    found, ref = data_size.predicted_q(world, tried), np.exp(world.mdp.ref_log_policy)

    def value(state: int) -> float:
        total = 0.0
        for a in np.flatnonzero(world.mdp.allowed[state]):
            follow = int(world.mdp.next_state[state, a])
            q = (world.mdp.reward[state, a] + (value(follow) if follow >= 0 else 0.0)) if tried[state, a] else 0.0
            assert found[state, a] == pytest.approx(q, abs=1e-13)
            total += ref[state, a] * np.exp(q / world.beta)
        return float(world.beta * np.log(total))

    first = int(world.mdp.next_state[world.mdp.start, world.mdp.allowed[world.mdp.start]][0])
    value(first)
    assert tried.sum() == 6  # 2 of 4 tokens at the root and in the two states behind them


def test_training_finds_it_and_a_wrong_worth_does_not() -> None:
    world = data_size.world_at(FAST, 1)
    found = data_size._shiq(world, rows_of(world, data_size.masked(world, 1, 1)))
    assert found["off"] <= data_size.ROUNDING
    assert found["kl"] == pytest.approx(found["kl_predicted"], abs=1e-12)
    assert found["untried_mass"] == pytest.approx(found["untried_mass_predicted"], abs=1e-12)
    tried = data_size.tried_in(world.mdp, rows_of(world, data_size.masked(world, 1, 1)))
    right, wrong = (data_size.predicted_q(world, tried, worth) for worth in (0.0, -1.0))
    assert np.abs(np.where(tried, right - wrong, 0.0)).max() > 1e-3


def test_nothing_masked_is_the_truth() -> None:
    world = data_size.world_at(FAST, 0)
    found = data_size._shiq(world, rows_of(world, uniform_policy(world.mdp)))
    assert found["covered"] == 1 and found["q_error"] <= data_size.ROUNDING and found["untried_mass"] == 0


@pytest.mark.slow
def test_weighted_reinforce_settles_where_the_closed_form_says() -> None:
    world = data_size.world_at(FAST, 0, 2.0)
    behavior = uniform_policy(world.mdp)
    rows = rows_of(world, behavior, 400, seed=0)
    mu, share = data_size.strings(world, behavior), data_size.shares(world, rows)
    assert (share > 0).all()
    expected = data_size.weighted_reinforce(world, mu, share)
    trace = descend("REINFORCE, importance weights", world, rows, behavior, steps=1500, learning_rate=0.1, schedule="cosine")
    policy = torch.tensor(trace.logits).log_softmax(1).numpy()
    assert data_size.strings(world, policy) == pytest.approx(expected, abs=1e-5)
    wrong = data_size.weighted_reinforce(world, share, mu)  # weights upside down
    assert np.abs(wrong - expected).max() > 1e-3


def test_weighted_reinforce_on_exact_shares_is_optimal() -> None:
    world = data_size.world_at(FAST, 2)
    mu = data_size.strings(world, uniform_policy(world.mdp))
    best = data_size.strings(world, world.solution.log_policy())
    assert data_size.string_kl(data_size.weighted_reinforce(world, mu, mu), best) <= 1e-20
    assert data_size.weighted_reinforce(world, mu, mu) == pytest.approx(best, abs=1e-12)


def test_weighted_reinforce_is_a_distribution_where_strings_are_missing() -> None:
    world = data_size.world_at(FAST, 2, -3.0)  # returns so low that what was seen cannot take all mass
    mu = data_size.strings(world, uniform_policy(world.mdp))
    share = np.where(np.arange(len(mu)) < 5, 0.2, 0.0)
    found = data_size.weighted_reinforce(world, mu, share)
    assert found.sum() == pytest.approx(1, abs=1e-12) and (found >= 0).all() and found[5:].sum() > 0


def test_shares_count_rows() -> None:
    world = data_size.world_at(FAST, 0)
    exact = data_size.shares(world, rows_of(world, uniform_policy(world.mdp)))
    assert exact == pytest.approx(np.full(16, 1 / 16), abs=1e-15)
    assert data_size.shares(world, rows_of(world, uniform_policy(world.mdp), 7, seed=1)) * 7 == pytest.approx(
        np.round(data_size.shares(world, rows_of(world, uniform_policy(world.mdp), 7, seed=1)) * 7), abs=1e-12
    )  # fmt: skip


def test_sft_s_rate_by_plain_sampling() -> None:
    """E KL(share || p) = (N - 1) / (2n): multinomial draws, no automaton."""
    p = np.array([0.1, 0.2, 0.3, 0.4])
    draws = np.random.default_rng(0).multinomial(2000, p, size=4000) / 2000
    mean = np.mean([data_size.string_kl(x, p) for x in draws])
    assert mean == pytest.approx(3 / 4000, rel=6 * np.sqrt(2 / 3 / 4000))  # chi^2 of 3: relative spread sqrt(2/3); 6 sigma


def test_same_seed_same_numbers() -> None:
    case = {"kind": "size", "behavior": "reference", "n": 20}
    assert data_size.measure(FAST, case, 1) == data_size.measure(FAST, case, 1)
    assert data_size.measure(FAST, case, 1) != data_size.measure(FAST, case, 2)


@pytest.mark.slow
def test_plantings_break_their_claims(fast: Result) -> None:
    def broken(key: str, factor: float) -> list[int]:
        records = [
            replace(r, numbers={**r.numbers, key: r.numbers[key] * factor}) if key in r.numbers else r for r in fast.records
        ]
        claims = DATA_SIZE.claims(fast.settings, DATA_SIZE.summarise(fast.settings, records))
        return [i for i, c in enumerate(claims) if not c.holds]

    assert broken("reinforce_predicted", 10.0) == [3]
    assert broken("sft_predicted", 10.0) == [3]
    assert broken("sft_limit", 2.0) == [4]
    assert 0 in broken("q_error", 1e12)
    assert 1 in broken("off", 1e12)
