"""Right losses and planted bugs of the loss itself: the right ones by another road than the suite's, then both by the suite."""

import inspect
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from shiq_lab import TabularLM, TokenBatch, TokenMDP, enumerate_trajectories, make, solve
from shiq_lab.batch import concatenate, cut, pad
from shiq_lab.checks.bugs import right_bellman as bellman
from shiq_lab.checks.bugs import right_policy as policy
from shiq_lab.checks.bugs import right_preference as preference
from shiq_lab.checks.bugs.losses import BUGS, COPIES, FORMULA, NOT_BUGS, RIGHT, reasons, smoke, suite
from shiq_lab.checks.bugs.plant import Bug
from shiq_lab.checks.report import FAILED, WARNED, Report
from shiq_lab.checks.traits import declare, traits_of
from shiq_lab.graph import Floats
from shiq_lab.policies import softmax_policy, uniform_policy
from shiq_lab.sampling import sample

torch.set_num_threads(1)

EPS = torch.finfo(torch.float64).eps
BETA = 0.5
# At the optimum a row's terms cancel: what is left is eps times their number and size, through a few sums and back.
ROUNDING = 64 * EPS
Loss = Callable[..., Tensor]


def title(loss: Loss) -> str:
    return str(getattr(loss, "__name__", type(loss).__name__))


SLOW = {"shiq_compiled", "shiq_loops", "dpo_pairs"}


def each(losses: list[Loss]) -> pytest.MarkDecorator:
    """One test a loss; the loops and the compiler are for the slow run."""
    marks = [pytest.param(x, id=title(x), marks=[pytest.mark.slow] if title(x) in SLOW else []) for x in losses]
    return pytest.mark.parametrize("loss", marks)


def of_kind(*kinds: str) -> list[Loss]:
    return [loss for loss in RIGHT if traits_of(loss).kind in kinds]


# ------------------------------------------------------------------------------- the second road: no part of the suite
def optimum(mdp: TokenMDP, gamma: float, readout: str) -> Floats:
    """l*, or ln pi* + v*/beta for losses without the shift."""
    solution = solve(mdp, beta=BETA, gamma=gamma)
    shifted = solution.optimal_logits()
    return shifted if readout == "shifted" else solution.log_policy() + solution.v()[:, None] / BETA


def moved(mdp: TokenMDP, table: Floats) -> Floats:
    """Another table: every allowed logit up to 1 away."""
    return np.where(mdp.allowed, table + np.cos(np.arange(table.size)).reshape(table.shape), -np.inf)


def call(
    loss: Loss, mdp: TokenMDP, batch: TokenBatch, table: Floats, gamma: float, behavior: Floats | None = None
) -> tuple[Tensor, Tensor]:
    """(value, gradient float[B, L, V]) where model and reference are causal language models and the critic says v*."""
    logits = TabularLM(mdp, torch.tensor(table))(batch.input_ids, batch.attention_mask).logits.detach().requires_grad_()
    ref = TabularLM.reference(mdp)(batch.input_ids, batch.attention_mask).logits.detach()
    before = torch.nn.functional.pad(batch.known_states(), (1, 0), value=-1)[:, :-1].clamp(min=0)
    acted = batch.completion_mask == 1
    by_state = torch.tensor(solve(mdp, beta=BETA, gamma=gamma).v())[before]
    data = torch.tensor(uniform_policy(mdp) if behavior is None else behavior)[before, batch.input_ids]
    given = {
        "logits": logits, "ref_logits": ref, "input_ids": batch.input_ids, "attention_mask": batch.attention_mask,
        "completion_mask": batch.completion_mask, "rewards": batch.rewards, "terminated": batch.terminated, "beta": BETA,
        "gamma": gamma, "weights": torch.ones(len(batch), dtype=torch.float64), "group_ids": batch.group_ids,
        "behavior_logprobs": torch.where(acted, data, 0.0), "values": torch.where(acted, by_state, 0.0),
    }  # fmt: skip
    names = inspect.signature(loss).parameters
    value = loss(**{k: v for k, v in given.items() if k in names})
    (gradient,) = torch.autograd.grad(value, logits)
    return value.detach(), gradient


@cache
def world(name: str) -> tuple[TokenMDP, TokenBatch]:
    """An environment and some of its rows, a third of them cut, padded on the left and on the right."""
    mdp = make(name, depth=4) if name == "Tree" else make(name)
    rows = sample(mdp, uniform_policy(mdp), 12, rng=3)
    return mdp, pad(concatenate([rows, cut(rows.select(slice(0, 6)), 3)]), "left" if name == "Tree" else "right", width=12)


@pytest.mark.parametrize("name", ["ToolCall", "Tree", "Forbidden"])
@each(of_kind("bellman", "trajectory", "policy_only"))
def test_every_row_has_zero_gradient_at_the_optimum(loss: Loss, name: str) -> None:
    """The losses whose optimum holds path by path, with l* from TabularLM; and away from it the gradient is not 0."""
    mdp, batch = world(name)
    traits = traits_of(loss)
    if not traits.cut_rows and title(loss) != "sequence_only":
        batch = batch.select(batch.terminated)
    for gamma in (1.0, 0.9) if traits.discounted else (1.0,):
        table = optimum(mdp, gamma, traits.readout)
        size = np.abs(table[mdp.allowed]).max() * batch.input_ids.shape[1] * len(batch)
        eps = torch.finfo(torch.float32).eps / EPS if title(loss) == "shiq_float32" else 1.0
        _, gradient = call(loss, mdp, batch, table, gamma)
        _, away = call(loss, mdp, batch, moved(mdp, table), gamma)
        assert gradient.abs().max() <= ROUNDING * eps * size
        assert away.abs().max() > 1e-3


@cache
def listing(behavior: str) -> tuple[TokenMDP, TokenBatch, Floats]:
    """A small two-turn world, all its rows, and the policy that makes them: "pi*" or "uniform"."""
    mdp = make("ToolCall", n_functions=1, n_arguments=2, n_values=1)
    data = uniform_policy(mdp) if behavior == "uniform" else softmax_policy(mdp, optimum(mdp, 1.0, "shifted"))
    return mdp, pad(enumerate_trajectories(mdp, behavior=data)), data


def expected(loss: Loss, table: Floats, behavior: str) -> Tensor:
    """The expected gradient by state float[S, V], from calls on single rows or on couples of rows of one prompt."""
    mdp, batch, data = listing(behavior)
    total = torch.zeros(mdp.next_state.shape, dtype=torch.float64)
    p = batch.weights

    def add(rows: list[int], weight: Tensor) -> None:
        part = batch.select(rows)
        _, gradient = call(loss, mdp, part, table, 1.0, data)
        total.index_add_(0, part.known_states().clamp(min=0).flatten(), weight * gradient.flatten(0, 1))

    n = range(len(batch))
    if traits_of(loss).kind == "preference":
        earned = (batch.rewards * batch.completion_mask).sum(1)
        for i, j in ((i, j) for i in n for j in n if i != j):
            add([i, j], torch.sigmoid(earned[i] - earned[j]))
    elif "group_ids" in inspect.signature(loss).parameters:
        for i, j in ((i, j) for i in n for j in n):
            add([i, j], p[i] * p[j])  # one prompt: every couple is a group
    else:
        for i in n:
            add([i], p[i])
    return total


@each([*of_kind("on_policy", "preference"), *of_kind("policy_only")])
def test_the_expected_gradient_vanishes_at_the_optimum(loss: Loss) -> None:
    mdp = listing("pi*")[0]
    table = optimum(mdp, 1.0, traits_of(loss).readout)
    data = "pi*" if traits_of(loss).kind == "on_policy" else "uniform"
    size = np.abs(table[mdp.allowed]).max() * listing(data)[1].input_ids.numel()
    assert expected(loss, table, data).abs().max() <= ROUNDING * size
    assert expected(loss, moved(mdp, table), data).abs().max() > 1e-3


def test_sequence_ratios_are_right_for_data_of_another_policy() -> None:
    """importance_reinforce off-policy: exact in the mean, although no single row's gradient vanishes."""
    mdp, batch, data = listing("uniform")
    table = optimum(mdp, 1.0, "shifted")
    size = np.abs(table[mdp.allowed]).max() * batch.input_ids.numel()
    assert expected(policy.importance_reinforce, table, "uniform").abs().max() <= ROUNDING * size
    assert call(policy.importance_reinforce, mdp, batch, table, 1.0, data)[1].abs().max() > 1e-2


@each(COPIES)
def test_a_copy_of_a_formula_has_another_optimum(loss: Loss) -> None:
    """Why IPO, SimPO and ORPO are compared with themselves: at pi* their expected gradient is far from 0."""
    mdp = listing("uniform")[0]
    assert expected(loss, optimum(mdp, 1.0, "shifted"), "uniform").abs().max() > 1e-2


FULL = ["shiq_loops", "shiq_matrix", "shiq_cross_entropy", "shiq_one_hot", "shiq_vmap", "shiq_compiled", "shiq_fused", "ShiQ",
        "shiq_package", "shiq_weighted_sum", "shiq_attention_mask", "shiq_packed"]  # fmt: skip


@each([loss for loss in bellman.RIGHT if title(loss) in FULL])
def test_the_styles_of_shiq_are_one_loss(loss: Loss) -> None:
    """Value and gradient equal those by cumulative sums up to the factor of the reduction, cut rows and discount included."""
    for name in ("ToolCall", "Forbidden"):
        mdp, batch = world(name)
        table = moved(mdp, mdp.ref_logits)
        want, want_gradient = call(bellman.shiq_cumsum, mdp, batch, table, 0.9)
        value, gradient = call(loss, mdp, batch, table, 0.9)
        factor = {"shiq_one_hot": len(batch) / 2, "shiq_weighted_sum": len(batch), "shiq_packed": len(batch), "ShiQ": 3.0}
        k = factor.get(title(loss), 1.0)
        assert abs(value - k * want) <= ROUNDING * len(batch) * abs(k * want)
        assert (gradient - k * want_gradient).abs().max() <= ROUNDING * len(batch) * k * want_gradient.abs().max()


def test_there_are_many_styles() -> None:
    names = [title(loss) for loss in [*RIGHT, *COPIES]]
    assert len(set(names)) == len(names) >= 40
    assert {traits_of(loss).kind for loss in RIGHT} == {"bellman", "trajectory", "policy_only", "on_policy", "preference"}


# ------------------------------------------------------------------------------------------------------- the bugs
def by_id(id: str) -> Bug:
    return next(bug for bug in BUGS if bug.id == id)


def test_ids_are_unique_and_every_bug_changes_its_loss() -> None:
    assert len({bug.id for bug in BUGS}) == len(BUGS)
    assert len({bug.id.partition("-")[0] for bug in BUGS}) == 45  # rows of the survey
    assert all(bug.layer == "L" and bug.wrong is not bug.right and bug.thread.count("#") == 1 for bug in BUGS)
    assert all(traits_of(bug.wrong) == traits_of(bug.right) for bug in BUGS)


def test_the_naive_test_passes_right_losses_and_fails_what_does_not_train() -> None:
    assert smoke(bellman.shiq_cumsum) and smoke(preference.dpo) and smoke(policy.reinforce)
    assert not smoke(by_id("I8").wrong)  # no gradient
    assert not smoke(declare()(lambda *, logits: logits.sum() * torch.nan))
    assert not smoke(declare()(lambda *, logits: -(logits - logits.detach()).square().sum()))  # gradient 0


def test_the_naive_test_passes_nearly_every_bug() -> None:
    """Why a suite: all but three pass it, and a right loss whose ratio is 1 by construction does not fall."""
    assert {bug.id for bug in BUGS if not smoke(bug.wrong)} == {"B3", "F5", "I8"}
    assert {title(loss) for loss in [*RIGHT, *COPIES] if title(loss) not in SLOW and not smoke(loss)} == {"grpo_detached"}


def findings(report: Report) -> list[str]:
    return [f"{r.name} {r.status}: {r.message}" for r in report.results if r.status in (FAILED, WARNED)]


def assert_accepted(loss: Loss) -> None:
    report = suite(loss, expect_fail=reasons(loss))
    assert report.passed and not findings(report), "\n".join(findings(report))


def assert_caught(bug: Bug) -> None:
    report = bug.suite(bug.wrong)
    assert report.failed, f"{bug.id} ({bug.mutation}) passes: {[r.name for r in report.results if r.ok]}"


@pytest.mark.parametrize("loss", [bellman.shiq_cumsum, preference.dpo], ids=title)
def test_right_losses_pass(loss: Loss) -> None:
    assert_accepted(loss)


@pytest.mark.parametrize("id", ["D7", "E7", "I8", "J7"])
def test_bugs_are_caught(id: str) -> None:
    assert_caught(by_id(id))


@pytest.mark.slow
@pytest.mark.parametrize("loss", RIGHT, ids=title)
def test_every_right_loss_passes(loss: Loss) -> None:
    assert_accepted(loss)


@pytest.mark.parametrize("what", NOT_BUGS)
def test_what_is_no_bug_is_among_the_accepted_losses(what: str) -> None:
    """The test above runs the suite on each of them, with nothing expected to fail."""
    assert NOT_BUGS[what] in RIGHT and not reasons(NOT_BUGS[what])


@pytest.mark.slow
@pytest.mark.parametrize("loss", COPIES, ids=title)
def test_copies_of_formulas_equal_themselves(loss: Loss) -> None:
    report = suite(loss, like=loss, only=FORMULA)
    assert report.passed and not findings(report), "\n".join(findings(report))


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.id)
def test_every_bug_is_caught_and_its_right_version_is_not(bug: Bug) -> None:
    assert_caught(bug)
    report = bug.suite(bug.right)
    assert not findings(report), "\n".join(findings(report))


def test_the_value_of_a_group_loss_may_be_zero() -> None:
    """The first line of the list: what trl#3452 reported."""
    mdp, batch, _ = listing("pi*")
    value, gradient = call(policy.dr_grpo, mdp, batch, mdp.ref_logits, 1.0, softmax_policy(mdp, mdp.ref_logits))
    assert abs(value) <= ROUNDING * len(batch) and gradient.abs().max() > 1e-3
