"""Token-level against sequence-level reward: the truths, the blind losses, and plantings that break the claims."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from shiq_lab.bellman import solve
from shiq_lab.enumeration import unfold
from shiq_lab.envs.brackets import brackets
from shiq_lab.studies import reward_level
from shiq_lab.studies.frame import Result, Settings, run
from shiq_lab.studies.reward_level import DRO, FIRST, ONE, REWARD_LEVEL, SHIQ

FAST: Settings = {**REWARD_LEVEL.settings, **REWARD_LEVEL.fast}


@pytest.fixture(scope="module")
def fast() -> Result:
    return run(REWARD_LEVEL, fast=True, cache=None)


def small(**changes: Any) -> Settings:
    """Two letters, ten updates: seconds in all."""
    return {**FAST, "depth": 2, "steps": 10, "marks": 4, **changes}


@pytest.mark.slow
def test_claims_hold_and_the_figure_draws(fast: Result) -> None:
    assert {i for i, c in enumerate(fast.claims) if not c.holds} <= {6}  # two seeds: its interval may touch 1
    assert len(fast.claims) >= 6
    assert len(REWARD_LEVEL.draw(fast).axes) == 2


def test_what_was_paid_before_is_the_sum_along_every_string() -> None:
    mdp = unfold(brackets(4))[0]
    rng = np.random.default_rng(0)
    mdp = replace(mdp, reward=np.where(mdp.is_policy[:, None], rng.normal(size=mdp.reward.shape), 0.0))
    paid, late = reward_level.paid_before(mdp), reward_level.paid_late(mdp)

    def walk(state: int, total: float) -> int:
        assert paid[state] == pytest.approx(total, abs=1e-15)
        strings = 0
        for token in np.flatnonzero(mdp.allowed[state]):
            gained = total + (mdp.reward[state, token] if mdp.is_policy[state] else 0.0)
            follow = int(mdp.next_state[state, token])
            assert late.reward[state, token] == (pytest.approx(gained, abs=1e-15) if follow < 0 else 0.0)
            strings += 1 if follow < 0 else walk(follow, gained)
        return strings

    assert walk(mdp.start, 0.0) > 10


def test_both_payments_have_one_optimal_policy() -> None:
    both = reward_level.worlds(small(depth=3), 4)
    token, late = (solve(both[level].mdp, beta=1.0) for level in ("token", "late"))
    assert np.exp(token.log_policy()) == pytest.approx(np.exp(late.log_policy()), abs=1e-14)
    found = reward_level.truth(both)
    assert max(found["v"], found["q"], found["policy"]) < 1e-14 < found["q_change"]


def test_paying_the_first_token_twice_breaks_the_shift() -> None:
    both = reward_level.worlds(small(depth=3), 4)
    late = both["late"]
    last = late.mdp.next_state < 0
    wrong = replace(late.mdp, reward=late.mdp.reward + np.where(last & late.mdp.allowed, late.mdp.reward, 0.0))
    assert reward_level.truth({"token": both["token"], "late": replace(late, mdp=wrong)})["policy"] > 1e-3


@pytest.mark.parametrize("loss", [DRO, FIRST, SHIQ])
def test_losses_of_whole_rows_are_blind_and_others_are_not(loss: str) -> None:
    found = reward_level.measure(small(), {"loss": loss}, 1)
    if loss == SHIQ:
        assert found["apart"] > 1e-3
    else:
        assert found["apart"] <= (0 if loss == DRO else 1e-14)


def test_the_front_moves_one_token_an_update() -> None:
    settings = small(depth=3)
    world = reward_level.worlds(settings, 0)["late"]
    assert reward_level.moved(settings, {"loss": ONE}, world) == [1, 2, 3]
    assert reward_level.moved(settings, {"loss": SHIQ}, world) == [3, 3, 3]


def test_what_sequence_only_leaves_by_a_plain_computation() -> None:
    world = reward_level.worlds(small(depth=3), 2)["late"]
    q, worst = world.solution.q(), 0.0
    for state in range(world.mdp.n_states):
        before = np.argwhere(world.mdp.next_state == state)
        if world.mdp.is_policy[state] and world.mdp.is_policy[before[0][0]]:
            worst = max(worst, abs(float(np.mean([q[state, a] for a in np.flatnonzero(world.mdp.allowed[state])]))))
    assert reward_level.inner_error(world) == pytest.approx(worst, rel=1e-14)


def test_same_seed_same_numbers() -> None:
    torch.set_num_threads(1)
    first, second = (reward_level.measure(small(), {"loss": ONE}, 3) for _ in range(2))
    assert first == second


@pytest.mark.slow
def test_a_wrong_inner_prediction_breaks_its_claim(fast: Result) -> None:
    records = [
        replace(r, numbers={**r.numbers, "predicted": {k: -x for k, x in r.numbers["predicted"].items()}})
        if "predicted" in r.numbers else r for r in fast.records
    ]  # fmt: skip
    claims = REWARD_LEVEL.claims(fast.settings, REWARD_LEVEL.summarise(fast.settings, records))
    assert [i for i, c in enumerate(claims) if not c.holds and i != 6] == [2]
