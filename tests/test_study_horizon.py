"""The horizon study: its one-matrix loss against the population's, its counts against plain steps, its claims."""

import numpy as np
import pytest
import torch

from shiq_lab import make, solve
from shiq_lab.losses.methods import METHODS
from shiq_lab.policies import on_path, uniform_policy
from shiq_lab.population import Population
from shiq_lab.studies import horizon
from shiq_lab.studies.frame import Result, run
from shiq_lab.studies.horizon import HORIZON, Descent, Quadratic
from shiq_lab.training import hessian_condition


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def result() -> Result:
    return run(HORIZON, fast=True, seeds=1, cache=None)


def population(name: str = "Needle", length: int = 5) -> Population:
    mdp, beta = horizon.world(name, length, seed=3)
    return Population(mdp, on_path(mdp, solve(mdp, beta=beta).log_policy(), 1 / length), beta)


@pytest.mark.parametrize("name", ["Needle", "Chain"])
@pytest.mark.parametrize(("trace", "n_steps"), [(0.0, 1), (1.0, None)])
def test_one_matrix_holds_the_population_loss(name: str, trace: float, n_steps: int | None) -> None:
    """Gradient, Hessian and condition number against autograd through population.py and training.hessian_condition."""
    p = population(name)
    quadratic = Quadratic.of(p, trace)
    edges = tuple(torch.from_numpy(quadratic.edges.T))
    base = torch.where(torch.tensor(np.array(p.mdp.allowed)), torch.tensor(p.mdp.ref_logits), 0.0)
    x = quadratic.best + torch.from_numpy(np.random.default_rng(0).normal(size=len(quadratic.best)))
    loss = lambda y: p.loss(base.index_put(edges, y), n_steps=n_steps)  # noqa: E731
    y = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(y), y)
    torch.testing.assert_close(quadratic.gradient(x)[0], gradient, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(quadratic.hessian(x), torch.autograd.functional.hessian(loss, x), rtol=1e-9, atol=1e-12)
    best = torch.tensor(solve(p.mdp, beta=p.beta).optimal_logits())
    known = hessian_condition(p, METHODS["shifted" if n_steps else "shiq"], best)
    plain = Descent(quadratic, torch.ones_like(quadratic.visits)).condition()
    assert plain == pytest.approx(known, rel=1e-6)  # kappa of about 1e3 costs three digits


def test_counts_are_those_of_plain_steps() -> None:
    """By an own loop of autograd steps on the population loss."""
    p = population("Chain", 4)
    quadratic = Quadratic.of(p, 1.0)
    descent, start = Descent(quadratic, torch.ones_like(quadratic.visits)), quadratic.at(p.mdp.ref_logits)
    step = descent.step(start)
    counted = descent.count(start, step, [0.1, 1e-3])
    table = torch.where(torch.tensor(np.array(p.mdp.allowed)), torch.tensor(p.mdp.ref_logits), 0.0)
    seen: list[int] = []
    for done in range(2 * counted[-1]):
        if quadratic.error(quadratic.at(table.detach().numpy())) <= [0.1, 1e-3][len(seen)]:
            seen.append(done)
            if len(seen) == 2:
                break
        table = table.detach().requires_grad_()
        table = table - step * torch.autograd.grad(p.loss(table), table)[0]
    assert np.abs(np.array(seen) - counted).max() <= 1


def test_a_random_world_and_a_lambda_out_of_range_are_refused() -> None:
    mdp = make("RandomTool")
    with pytest.raises(ValueError, match="deterministic"):
        Quadratic.of(Population(mdp, uniform_policy(mdp), 0.2), 1.0)
    with pytest.raises(ValueError, match="trace"):
        Quadratic.of(population(), 1.5)
    quadratic = Quadratic.of(population(), 1.0)
    descent = Descent(quadratic, torch.ones_like(quadratic.visits))
    with pytest.raises(ValueError, match="goals"):
        descent.count(quadratic.best + 1, 1e-6, [1e-3], most=2)


def test_the_claims_hold(result: Result) -> None:
    assert len(result.claims) == 6
    for claim in result.claims:
        assert claim.holds, f"{claim.text}\n{claim.measured}"
    assert len(horizon.draw(result).axes) == 3


def test_the_same_seed_gives_the_same_numbers(result: Result) -> None:
    record = result.records[0]
    assert horizon.measure(result.settings, record.case, record.seed) == record.numbers


def test_a_wrong_power_breaks_a_claim(result: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: every model of m updates takes half of them. The counts then differ from those taken one by one."""
    many = Descent.many
    monkeypatch.setattr(Descent, "many", lambda self, x, step, model, m: many(self, x, step, model, max(1, m // 2)))
    case = {"data": "on path", "environment": "Chain", "length": 4}
    numbers = horizon.measure(result.settings, case, 0)["ShiQ, plain"]
    assert abs(numbers["updates"][-1] / (numbers["singly"] or 1) - 1) > 0.02


def test_losses_swapped_break_claims(result: Result) -> None:
    """Planted: one-step's numbers under ShiQ's name."""
    swapped = {key.replace("one-step", "@").replace("ShiQ", "one-step").replace("@", "ShiQ"): x
               for key, x in result.summary["curves"].items()}  # fmt: skip
    claims = horizon.claims(result.settings, {**result.summary, "curves": swapped})
    assert [c.holds for c in claims[1:3]] == [False, False]
