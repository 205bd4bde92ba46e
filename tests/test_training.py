"""Training against the truth: exactly on the population loss, on rows, and by constant-step SGD."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from shiq_lab import TabularLM, enumerate_trajectories, make, solve
from shiq_lab.batch import cut
from shiq_lab.envs import ENVIRONMENTS
from shiq_lab.losses.methods import METHODS, Method
from shiq_lab.losses.shiq import shiq_loss
from shiq_lab.losses.steps import shifted
from shiq_lab.mdp import TokenMDP
from shiq_lab.policies import covering, mixture, on_path, reference_policy, softmax_policy, uniform_policy
from shiq_lab.population import Population
from shiq_lab.sampling import sample
from shiq_lab.stats import TokenStats
from shiq_lab.training import (
    Training,
    hessian_condition,
    measure,
    minibatches,
    policy_of,
    stationary,
    train,
    train_on_rows,
    train_sampled,
)

Q_EXACT, KL_EXACT = 1e-8, 1e-12  # what float64 must allow at condition numbers up to 1e5; seen 1e-13 and 1e-28
DETERMINISTIC = [name for name, e in ENVIRONMENTS.items() if e.builder().deterministic]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)  # small tables: more threads only wait for each other


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_shiq_on_the_population_loss_recovers_everything(name: str) -> None:
    """At default size, behaviour `covering`: visits >= 1e-3 / S in every reachable state, then q*, v*, pi* to the bounds."""
    environment = ENVIRONMENTS[name]
    mdp = stationary(environment.builder())
    behavior = covering(mdp)
    rows = mdp.reachable & mdp.is_policy
    visits = Population(mdp, behavior, environment.beta, environment.gamma).arrivals[rows]
    assert visits.min() >= 1e-3 / rows.sum(), "the behaviour leaves a state almost unvisited"
    trained = train(mdp, "shiq", beta=environment.beta, gamma=environment.gamma, behavior=behavior)
    assert trained.metrics.q_error <= Q_EXACT
    assert trained.metrics.v_error <= Q_EXACT
    assert trained.metrics.kl <= KL_EXACT
    assert abs(trained.metrics.gap) <= KL_EXACT * 100
    assert trained.optimizer.startswith("Gauss-Newton")


def test_every_environment_but_the_random_tool_is_deterministic() -> None:
    assert len(DETERMINISTIC) == len(ENVIRONMENTS) - 1 >= 13


BEHAVIORS = {
    "uniform": uniform_policy,
    "reference": reference_policy,
    "mixed": lambda mdp: mixture(uniform_policy(mdp), reference_policy(mdp), 0.3),
    "on-path": lambda mdp: on_path(mdp, solve(mdp, beta=0.2).log_policy(), 0.2),
    "tilted": lambda mdp: softmax_policy(mdp, np.random.default_rng(0).normal(size=mdp.ref_logits.shape)),
}


@pytest.mark.parametrize("behavior", BEHAVIORS)
@pytest.mark.parametrize("loss", ["naive", "easy", "shifted", "shiq"])
def test_any_behavior_has_the_same_zero(behavior: str, loss: str) -> None:
    """F8: off-policy data of full support lead every exact loss to the same q*."""
    mdp = make("ToolCall")
    trained = train(mdp, loss, beta=0.2, behavior=BEHAVIORS[behavior](mdp))
    assert trained.metrics.q_error <= Q_EXACT


@pytest.mark.parametrize("n_steps", [2, 3])
def test_n_step_losses_have_the_same_zero(n_steps: int) -> None:
    mdp = make("Star")
    assert train(mdp, Method(shiq_loss, shifted, n_steps=n_steps), beta=0.125).metrics.q_error <= Q_EXACT


def test_a_token_that_the_behavior_never_takes_is_missed() -> None:
    """Partial support: what is never taken enters through the log-sum-exp alone, and q* is not reached (F8)."""
    mdp = make("Bandit")
    behavior = uniform_policy(mdp).copy()
    behavior[0, :4] = -np.inf
    behavior[0, 4:8] = -np.log(4)
    assert train(mdp, "shiq", beta=0.5, behavior=behavior).metrics.q_error > 1e-2


def test_a_horizon_on_a_loop_has_no_stationary_table() -> None:
    """The optimum depends on t (F8): one [S, V] table for all of it leaves a loss, while the unrolled table is exact."""
    mdp = make("RandomWalk", horizon=4)
    rows = sample(mdp, uniform_policy(mdp), 1000, rng=0)  # whose states do not say how much is left
    stuck = train_on_rows(replace(mdp, horizon=None), "shiq", rows, beta=1.0)
    assert stuck.loss[-1] > 1e-2
    flat = mdp.unroll()
    assert train_on_rows(mdp, "shiq", sample(flat, uniform_policy(flat), 1000, rng=0), beta=1.0).loss[-1] < 1e-20


def test_rows_that_are_all_cut_after_two_actions_leave_states_unidentified() -> None:
    """F8: their bootstrap states are never acted in; the loss is 0 and q* is missed, by the size of what lies behind."""
    mdp = make("Tree", depth=4)
    rows = cut(enumerate_trajectories(mdp), 3)  # the prompt and two actions
    assert (rows.completion_mask.sum(1) == 2).all() and not rows.terminated.any()
    trained = train_on_rows(mdp, "shiq", rows, beta=0.5, gamma=0.9)
    assert trained.loss[-1] < 1e-20 and trained.metrics.q_error > 0.1 and trained.untried > 200


# --------------------------------------------------------------------------------------------------- random worlds
def test_random_replies_bias_full_gradients_and_not_the_two_repairs() -> None:
    mdp = make("RandomTool")
    options = {"beta": 0.2, "gamma": 0.9, "behavior": uniform_policy(mdp)}
    for loss in ("naive", "easy", "shifted", "shiq", "sequence"):
        assert train(mdp, loss, **options).metrics.q_error > 1e-2, loss
    for loss in ("semi-gradient", "turn-cut"):
        metrics = train(mdp, loss, **options).metrics
        assert metrics.q_error <= Q_EXACT and metrics.kl <= KL_EXACT, loss


def test_shiq_is_right_on_its_own_policy_even_with_random_replies() -> None:
    """F9: on data of pi* itself the whole multi-step loss has no bias at l*, so from l* training does not move."""
    mdp = make("RandomTool")
    truth = solve(mdp, beta=0.2, gamma=0.9)
    trained = train(mdp, "shiq", beta=0.2, gamma=0.9, behavior=truth.log_policy(), start=truth.optimal_logits())
    assert trained.metrics.q_error <= 1e-6  # Gauss-Newton stops where the loss stops falling: sqrt(eps) of its curvature


# ------------------------------------------------------------------------------------------------------------ rows
@pytest.mark.parametrize("loss", ["naive", "easy", "shifted", "shiq"])
@pytest.mark.parametrize("name", ["Bandit", "Chain", "Loop", "ToolCall"])
def test_sampled_rows_lead_to_the_same_q(name: str, loss: str) -> None:
    """F10: without noise in the zero, a finite set of rows that tries everything has the very same zero."""
    environment = ENVIRONMENTS[name]
    mdp = environment.builder()
    batch = sample(mdp, covering(mdp), 3000, rng=0)
    trained = train_on_rows(mdp, loss, batch, beta=environment.beta, gamma=environment.gamma)
    assert trained.untried == 0
    assert trained.metrics.q_error <= Q_EXACT


def test_rows_that_do_not_try_everything_say_so() -> None:
    mdp = make("Tree")
    trained = train_on_rows(mdp, "shiq", sample(mdp, covering(mdp), 100, rng=0), beta=0.5, gamma=0.9)
    assert trained.untried > 500
    assert trained.metrics.q_error > 1e-2


def test_listed_rows_equal_the_population() -> None:
    mdp = make("Forbidden")
    behavior = uniform_policy(mdp)
    listed = train_on_rows(mdp, "shiq", enumerate_trajectories(mdp, behavior=behavior), beta=0.5, gamma=0.95)
    exact = train(mdp, "shiq", beta=0.5, gamma=0.95, behavior=behavior)
    np.testing.assert_allclose(listed.logits, exact.logits, atol=1e-9)  # both within 1e-12 of l*, of size 10


# ------------------------------------------------------------------------------------------------------------- SGD
# Environment, parameters, beta, learning rate, steps: a constant step a little below the largest that is stable. Data:
# mini-batches of 32 rows of `covering`. Seen on the way to 1e-6: Hessian condition numbers 1 to 4e2, 250 to 4,000 steps.
SGD = {
    "Bandit": ({}, 0.5, 1.0, 1000),
    "Tree": ({"depth": 4}, 1.0, 0.6, 4500),
    "Needle": ({"length": 8}, 1.0, 0.3, 4000),
    "ToolCall": ({}, 1.0, 0.6, 3500),
}


def _sgd(name: str, loss: str = "shiq", steps: int | None = None) -> tuple[Training, float]:
    parameters, beta, rate, most = SGD[name]
    mdp = make(name, **parameters)
    gamma = ENVIRONMENTS[name].gamma
    pool = sample(mdp, covering(mdp), 20_000, rng=0)
    total = steps or most
    trained = train_sampled(
        mdp,
        loss,
        minibatches(pool, 32, rng=1),
        beta=beta,
        gamma=gamma,
        learning_rate=rate,
        steps=total,
        record_every=total // 10,
    )
    population = Population(mdp, covering(mdp), beta, gamma)
    optimum = torch.tensor(np.where(mdp.allowed, solve(mdp, beta=beta, gamma=gamma).optimal_logits(), 0.0))
    return trained, hessian_condition(population, METHODS[loss], optimum)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "Bandit" else [pytest.mark.slow]) for n in SGD])
def test_constant_step_sgd_converges_without_noise(name: str) -> None:
    """F10: the error falls geometrically to below 1e-6 at a constant step, since each row's gradient is 0 at l*."""
    trained, condition = _sgd(name)
    error = np.array(trained.q_error)
    print(f"{name}: condition {condition:.3g}, {trained.steps} steps, error {error[-1]:.2e}")
    assert error[-1] < 1e-6 or error.min() < 1e-12
    falling = error[error > 1e-12]  # Bandit reaches rounding on the way
    assert (falling[1:] < falling[:-1]).all(), "not falling in every tenth of the run"
    assert 1 <= condition < 1e4


@pytest.mark.slow
def test_constant_step_sgd_stays_noisy_with_random_replies() -> None:
    """F10's other half: with random replies the same step size leaves noise of its own size."""
    mdp = make("RandomTool")
    pool = sample(mdp, covering(mdp), 20_000, rng=0)
    trained = train_sampled(
        mdp, "semi-gradient", minibatches(pool, 32, rng=1), beta=0.5, gamma=0.9, learning_rate=1.0, steps=3000, record_every=300
    )
    late = np.array(trained.q_error[-4:])
    assert late.min() > 1e-2, "an unbiased loss has settled although every row's gradient is noisy"


def test_the_same_seed_gives_the_same_numbers() -> None:
    first, second = (_sgd("Bandit", steps=50)[0] for _ in range(2))
    np.testing.assert_array_equal(first.logits, second.logits)


# --------------------------------------------------------------------------------------------------------- metrics
def _reference_metrics(mdp: TokenMDP) -> dict[str, float]:
    truth = solve(mdp, beta=0.5)
    return vars(measure(truth, mdp.ref_logits, METHODS["shiq"]))


def test_metrics_at_the_reference_and_at_the_optimum() -> None:
    """At l_ref: q_hat = 0 and gap = 1; at l*: all zero. KL by hand: sum pi* ln(pi* / pi_ref)."""
    mdp = make("Bandit")
    truth = solve(mdp, beta=0.5)
    seen = _reference_metrics(mdp)
    q = truth.q()[0][mdp.allowed[0]]
    assert seen["q_error"] == pytest.approx(np.abs(q).max(), rel=1e-12)
    assert seen["v_error"] == pytest.approx(abs(truth.v()[0]), rel=1e-12)
    assert seen["gap"] == pytest.approx(1.0, rel=1e-12)
    best, ref = truth.log_policy()[0, :8], mdp.ref_log_policy[0, :8]
    assert seen["kl"] == pytest.approx((np.exp(best) * (best - ref)).sum(), rel=1e-12)
    at_best = measure(truth, truth.optimal_logits(), METHODS["shiq"])
    assert max(at_best.q_error, at_best.v_error, at_best.kl, abs(at_best.gap)) < 1e-14


def test_the_naive_read_out_is_another_policy() -> None:
    """Logits q* / beta stand for pi_ref exp(q* / beta); sampled alone they do not give pi*."""
    mdp = make("Bandit")
    truth = solve(mdp, beta=0.5)
    logits = np.where(mdp.allowed, truth.q() / 0.5, -np.inf)
    np.testing.assert_allclose(policy_of(mdp, logits, METHODS["naive"])[0, :8], truth.log_policy()[0, :8], atol=1e-13)
    assert np.abs(policy_of(mdp, logits, METHODS["shiq"])[0, :8] - truth.log_policy()[0, :8]).max() > 0.1


def test_a_training_is_json_and_the_oracle_needs_none() -> None:
    mdp = make("Bandit")
    trained = train(mdp, "shiq", beta=0.5)
    assert json.loads(json.dumps(trained.to_json()))["metrics"]["q_error"] < 1e-12
    again = train(mdp, "shiq", beta=0.5, start=TabularLM.optimal(mdp, 0.5).table.detach().numpy())
    assert again.steps <= 2


def test_metrics_look_at_every_reachable_state_and_no_other() -> None:
    """State 2 is reachable from nowhere, state 1 only after a token: an error there counts in 1 alone."""
    next_state = np.array([[1, -1], [-1, -1], [-1, 1]])
    mdp = TokenMDP(next_state, np.array([[1.0, 0.5], [2.0, -1.0], [3.0, 0.0]]), np.zeros((3, 2))).with_prompt(0)
    truth = solve(mdp, beta=0.5)
    best = truth.optimal_logits()
    for state, reachable in ((1, True), (2, False)):
        logits = best.copy()
        logits[state] += 1.0
        seen = measure(truth, logits, METHODS["shiq"])
        assert (seen.q_error, seen.v_error) == pytest.approx((0.5, 0.5) if reachable else (0.0, 0.0), abs=1e-14)
    rows = enumerate_trajectories(mdp)
    assert train_on_rows(mdp, "shiq", rows, beta=0.5).untried == 0
    assert train_on_rows(mdp, "shiq", rows.select(rows.states[:, 1] == -1), beta=0.5).untried == 3


def test_without_room_above_the_reference_there_is_no_gap() -> None:
    mdp = replace(make("Bandit"), reward=np.zeros((2, 9)))
    truth = solve(mdp, beta=0.5)
    assert measure(truth, truth.optimal_logits(), METHODS["shiq"]).gap == 0.0


def test_the_loss_is_a_mean_over_weighted_rows() -> None:
    """Rows twice, or all weights twice: the same loss; unequal weights: the weighted mean of `shiq_loss` itself."""
    mdp = make("ToolCall")
    rows = enumerate_trajectories(mdp)
    once = train_on_rows(mdp, "shiq", rows, beta=0.2, max_steps=1).loss[0]
    twice = rows.select(torch.arange(len(rows)).repeat(2))
    for same in (twice, replace(rows, weights=2 * rows.weights)):
        assert train_on_rows(mdp, "shiq", same, beta=0.2, max_steps=1).loss[0] == pytest.approx(once, rel=1e-12)
    stats = TokenStats.from_table(torch.tensor(mdp.ref_logits), rows)
    assert once == pytest.approx(float(shiq_loss(stats, stats, rows, beta=0.2)), rel=1e-12)


def test_sgd_records_its_last_step_and_may_stop_early() -> None:
    mdp = make("Bandit")
    pool = sample(mdp, covering(mdp), 2000, rng=0)
    options = {"beta": 0.5, "learning_rate": 1.0, "record_every": 10}
    whole = train_sampled(mdp, "shiq", minibatches(pool, 32, rng=1), steps=25, **options)
    assert (whole.steps, whole.recorded_at) == (25, [10, 20, 25]) and len(whole.loss) == len(whole.q_error) == 3
    early = train_sampled(mdp, "shiq", minibatches(pool, 32, rng=1), steps=25, stop_below=whole.q_error[1], **options)
    assert (early.steps, early.recorded_at) == (20, [10, 20])


def test_minibatches_draw_by_weight_and_count_each_row_once() -> None:
    rows = enumerate_trajectories(make("Bandit"))
    weights = torch.tensor([0.0, 3.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    drawn = next(minibatches(replace(rows, weights=weights), 4000, rng=0))
    assert (drawn.weights == 1).all() and len(drawn) == 4000
    count = torch.bincount(drawn.input_ids[:, 1], minlength=8).tolist()
    assert sum(count) == count[1] + count[3] and abs(count[1] - 3000) < 5 * 28  # sqrt(4000 * 3/16) = 27.4


def test_the_condition_number_is_the_hessians() -> None:
    mdp = make("ToolCall", n_functions=2, n_arguments=1, n_values=1)
    population = Population(mdp, covering(mdp), 0.5)
    optimum = torch.tensor(np.where(mdp.allowed, solve(mdp, beta=0.5).optimal_logits(), 0.0))
    edges = torch.tensor(mdp.allowed & mdp.is_policy[:, None])
    loss = lambda x: population.loss(optimum.index_put(torch.where(edges), x))  # noqa: E731
    hessian = torch.autograd.functional.hessian(loss, optimum[edges])
    truth = float(torch.linalg.cond(hessian))
    assert hessian_condition(population, METHODS["shiq"], optimum) == pytest.approx(truth, rel=1e-6) and truth > 4


def test_a_population_keeps_what_it_remembers_apart() -> None:
    """Whole rows, their first residual alone and turns that are cut, asked of one population: each as of a fresh one."""
    mdp = make("RandomTool")
    table = torch.tensor(
        np.where(mdp.allowed, mdp.ref_logits + np.random.default_rng(0).normal(size=(mdp.n_states, 1)), -np.inf)
    )
    fresh = lambda: Population(mdp, uniform_policy(mdp), 0.5, 0.9)  # noqa: E731
    targets = fresh().pieces(table)[1]
    kinds: list[dict[str, Any]] = [{}, {"first_only": True}, {"turn_targets": targets}]
    alone = [float(fresh().loss(table, **kind)) for kind in kinds]
    one = fresh()
    assert [float(one.loss(table, **kind)) for kind in kinds] == alone
    assert len(set(alone)) == 3


def test_the_lowest_draw_never_selects_a_row_of_weight_zero() -> None:
    """random() may be 0.0 itself; the first row, of weight 0, is not the one that it selects."""

    class Lowest(np.random.Generator):
        def random(self, size: Any = None, *args: Any, **kwargs: Any) -> Any:
            return np.zeros(size)

    listed = enumerate_trajectories(make("Bandit"))
    weights = torch.where(torch.arange(len(listed)) == 0, 0.0, listed.weights)
    drawn = next(minibatches(replace(listed, weights=weights), 3, rng=Lowest(np.random.PCG64(0))))
    assert (drawn.input_ids == listed.input_ids[1]).all()


def test_the_semi_gradient_leaves_alone_what_is_never_said() -> None:
    mdp = make("Bandit")
    behavior = uniform_policy(mdp).copy()
    behavior[0, :4], behavior[0, 4:8] = -np.inf, -np.log(4)
    never = torch.tensor(mdp.allowed & (behavior == -np.inf))
    rho = Population(mdp, behavior, 0.5).residual_mean(torch.tensor(np.where(mdp.allowed, mdp.ref_logits, 0.0)))
    assert never.sum() == 4 and (rho[never] == 0).all() and (rho[0, 4:8] != 0).all()
    trained = train(mdp, "semi-gradient", beta=0.5, behavior=behavior)
    np.testing.assert_array_equal(trained.logits[never.numpy()], mdp.ref_logits[never.numpy()])


def test_the_json_of_a_training_is_everything_but_the_table() -> None:
    trained = train(make("Bandit"), "shiq", beta=0.5)
    assert set(trained.to_json()) == set(vars(trained)) - {"logits"}
