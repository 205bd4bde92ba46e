"""The metric study: the family's ends, its metric in closed form, three Hessians, its claims."""

import numpy as np
import pytest
import torch

from shiq_lab import make, solve
from shiq_lab.learning import world_of
from shiq_lab.policies import uniform_policy
from shiq_lab.population import Population
from shiq_lab.studies import metric
from shiq_lab.studies.frame import Result, run
from shiq_lab.studies.horizon import Descent, Quadratic
from shiq_lab.studies.metric import METRIC, Listed, trace_residuals


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def result() -> Result:
    return run(METRIC, fast=True, seeds=1, cache=None)


def listed() -> tuple[Listed, Quadratic]:
    world = world_of(make("Chain", length=5, seed=1), 0.4, 0.95)
    behavior = uniform_policy(world.mdp)
    quadratic = Quadratic.of(Population(world.mdp, behavior, 0.4, 0.95), 0.6)
    return Listed(world, behavior, quadratic.edges), quadratic


def test_residuals_and_metric_by_plain_loops() -> None:
    """rho_t = sum_k (gamma lambda)^(k-t) d_k, entry by entry, and A'A as a product of matrices."""
    rows, quadratic = listed()
    x = quadratic.best + 0.3
    d, _ = trace_residuals(*rows.stats(x), beta=0.4, gamma=0.95, trace=0.0)
    rho, actions = trace_residuals(*rows.stats(x), beta=0.4, gamma=0.95, trace=0.6)
    for b in range(len(d)):
        T = int(actions.real[b].sum())
        for t in range(T):
            plain = sum((0.95 * 0.6) ** (k - t) * float(d[b, k]) for k in range(t, T))
            assert float(rho[b, t]) == pytest.approx(plain, abs=1e-13)
    for trace in (0.0, 0.6, 1.0):
        A = np.array([[(0.95 * trace) ** (k - t) if k >= t else 0.0 for k in range(6)] for t in range(6)])
        np.testing.assert_allclose(metric.metric(6, 0.95, trace), A.T @ A, rtol=1e-13)
    np.testing.assert_allclose(metric.metric(4, 1.0, 1.0), np.minimum.outer(range(4), range(4)) + 1.0)


def test_three_hessians_agree_and_a_wrong_lambda_is_seen() -> None:
    rows, quadratic = listed()
    assert metric._roads(rows, quadratic, 0.6) <= 1e-12
    assert metric._roads(rows, quadratic, 0.61) > 1e-3


def test_rates_are_those_of_the_spectrum() -> None:
    """And a step beyond 2 / lambda_max grows instead, by the factor that the spectrum says."""
    _, quadratic = listed()
    descent = Descent(quadratic, torch.ones_like(quadratic.visits))
    for predicted, seen in metric._rates(descent).values():
        assert 1 - seen == pytest.approx(1 - predicted, rel=1e-2)
    values, vectors = descent.spectrum(quadratic.best)
    grown = metric.contraction(descent, 2.2 / float(values[-1]), vectors[:, -1] * 1e-9, 20)
    assert grown == pytest.approx(1.2, rel=1e-3)


def test_the_claims_hold(result: Result) -> None:
    assert len(result.claims) == 5
    for claim in result.claims:
        assert claim.holds, f"{claim.text}\n{claim.measured}"
    assert len(metric.draw(result).axes) == 3


def test_the_same_seed_gives_the_same_numbers(result: Result) -> None:
    record = result.records[-1]
    assert metric.measure(result.settings, record.case, record.seed) == record.numbers


def test_the_family_upside_down_breaks_claims(result: Result) -> None:
    """Planted: lambda read as 1 - lambda in every record."""
    flipped = [
        type(r)(r.case, r.seed, {**r.numbers, **{key: r.numbers[key][::-1] for key in ("condition", "updates")}})
        for r in result.records
    ]
    claims = metric.claims(result.settings, metric.summarise(result.settings, flipped))
    assert not claims[2].holds and not claims[3].holds


def test_the_zero_is_the_same_for_every_lambda() -> None:
    rows, quadratic = listed()
    world = rows.world
    best = rows.loss(quadratic.best, 0.35)
    assert float(best) <= 1e-25 and float(rows.loss(quadratic.best + 0.1, 0.35)) > 1e-4
    assert solve(world.mdp, beta=0.4, gamma=0.95).objective == world.solution.objective
