"""The multi-turn studies: expected updates against autograd, stability against its formula, claims, and planted mistakes."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from shiq_lab.learning import rows_of, world_of
from shiq_lab.objectives import fields, lookup
from shiq_lab.policies import uniform_policy
from shiq_lab.population import Population
from shiq_lab.studies import multi_turn
from shiq_lab.studies.frame import Result, run
from shiq_lab.studies.multi_turn import BETA, GAMMA, MULTI_TURN, MULTI_TURN_TINY, Field, at_edges, iteration, looping, on_table

NAMES = {"ShiQ": "ShiQ", "semi-gradient": "semi-gradient, through the token", "turn-cut": "turn-cut",
         "value": "semi-gradient, through the value"}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def result() -> Result:
    small = replace(MULTI_TURN, fast={**MULTI_TURN.fast, "seeds": 1, "gammas": [0.5, 0.99], "updates": 10})
    return run(small, fast=True, cache=None)


@pytest.mark.parametrize("form", NAMES)
def test_fields_are_the_losses_expected_gradients(form: str) -> None:
    """Against autograd through the losses of objectives.py on all rows, at a table of no meaning."""
    world = multi_turn._world("RandomTool", 1)
    behavior = uniform_policy(world.mdp)
    x = at_edges(world, world.elsewhere.numpy())
    table = torch.tensor(np.where(world.mdp.allowed, on_table(world, x), 0.0))[None]
    nothing = torch.zeros(1, world.mdp.n_states, dtype=torch.float64)
    gradient, _ = fields(lookup(NAMES[form]), world, table, nothing, torch.tensor(behavior)[None])
    found = Field.of(world, rows_of(world, behavior), form)(x)
    torch.testing.assert_close(found, gradient[0][tuple(world.edges.T)], rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("name", multi_turn.LOOPS)
def test_the_iteration_matrix_is_the_jacobian(name: str) -> None:
    """K = (I - gamma P_mu)^-1 (I - gamma P_pi*) against autograd through population.residual_mean."""
    mdp, behavior = looping(name, 0)
    world = world_of(mdp, BETA, 0.9)
    K, visits = iteration(world, behavior)
    population, where = Population(mdp, behavior, BETA, 0.9), tuple(world.edges.T)
    base = torch.tensor(np.where(mdp.allowed, world.solution.optimal_logits(), 0.0))
    found = torch.autograd.functional.jacobian(lambda x: population.residual_mean(base.index_put(where, x))[where], base[where])
    np.testing.assert_allclose(found / BETA, K, atol=1e-12)
    assert visits.sum() > 1


def test_on_policy_the_iteration_is_perfect() -> None:
    """Data of pi* itself: K is the identity, loops or not."""
    mdp, _ = looping("Ring", 0)
    world = world_of(mdp, BETA, 0.9)
    K, _ = iteration(world, world.solution.log_policy())
    np.testing.assert_allclose(K, np.eye(len(K)), atol=1e-12)


def test_the_claims_hold(result: Result) -> None:
    assert len(result.claims) == 7
    for claim in result.claims:
        assert claim.holds, f"{claim.text}\n{claim.measured}"
    assert len(multi_turn.draw(result).axes) == 3


def test_the_same_seed_gives_the_same_numbers(result: Result) -> None:
    for record in (result.records[1], result.records[-1]):
        assert multi_turn.measure(result.settings, record.case, record.seed) == record.numbers


def test_a_gradient_that_is_not_stopped_breaks_stationarity() -> None:
    """Planted: the turn-cut loss without its stop (left = right, bootstrap and all) has a gradient at l* in a random world."""
    world = multi_turn._world("RandomTool", 0)
    rows = rows_of(world, uniform_policy(world.mdp))
    best = at_edges(world, world.solution.optimal_logits())
    field = Field.of(world, rows, "turn-cut")
    c, u, _, turn = multi_turn._features(world, rows)
    later = torch.nn.functional.pad(u[:, 1:], (0, 0, 0, 1))
    assert multi_turn._size(field(best)) <= 1e-14
    same = (turn[:, :, None] == turn[:, None]) & (turn >= 0)[:, None]
    lag = torch.arange(c.shape[1])[None] - torch.arange(c.shape[1])[:, None]
    total = torch.where(same & (lag >= 0), GAMMA ** lag.clamp(min=0).double(), 0.0)
    right = total @ (c - GAMMA * later)
    reward = multi_turn._features(world, rows)[2]
    weight = rows.weights / rows.weights.sum()
    paid = 2 * torch.einsum("b,btk,bt->k", weight, right, (total @ reward[..., None])[..., 0])
    wrong = replace(field, matrix=2 * torch.einsum("b,btj,btk->jk", weight, right, right), paid=paid)
    assert multi_turn._size(wrong(best)) > 1e-3


def test_behaviours_swapped_break_a_claim(result: Result) -> None:
    """Planted: the records of pi*'s own data under the name of uniform data and the other way round."""
    lines = dict(result.summary["lines"])
    lines["RandomTool, uniform"], lines["RandomTool, pi*"] = (
        {**lines["RandomTool, pi*"], "samples": lines["RandomTool, uniform"]["samples"]}, lines["RandomTool, uniform"],
    )  # fmt: skip
    assert not multi_turn.claims(result.settings, {**result.summary, "lines": lines})[0].holds


@pytest.mark.slow
def test_the_tiny_claims_hold() -> None:
    tiny = run(MULTI_TURN_TINY, fast=True, cache=None)
    for claim in tiny.claims:
        assert claim.holds, f"{claim.text}\n{claim.measured}"
    assert len(multi_turn.tiny_draw(tiny).axes) == 2
