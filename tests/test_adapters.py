"""Adapters: a stack's own signature made into the contract's, and what they hand over against a plain loop."""

import math
from collections.abc import Callable
from typing import Any

import plain_losses
import pytest
import torch
from torch import Tensor

import shiq_lab
from shiq_lab.checks.adapters import from_logprobs, from_response_logprobs, from_stats, token_logprobs
from shiq_lab.checks.bugs.plant import plant
from shiq_lab.checks.fixtures import fixture
from shiq_lab.checks.loss import check_loss, make_subject
from shiq_lab.checks.subject import arrange


def given_to(adapter: Callable[..., Any], left: bool = False) -> tuple[dict[str, Tensor], Any]:
    """What an adapted loss receives on a two-turn batch, and the batch's inputs."""
    seen: dict[str, Tensor] = {}

    def spy(logprobs: Tensor, ref_logprobs: Tensor, old_logprobs: Tensor, completion_mask: Tensor, scores: Tensor,
            rewards: Tensor, values: Tensor) -> Tensor:  # fmt: skip
        seen.update({k: v.detach() for k, v in locals().items() if isinstance(v, Tensor)})
        return logprobs.sum()

    loss = adapter(spy, kind="on_policy")
    subject = make_subject(loss)
    case = fixture("two turns")
    inputs = arrange(subject, case, case.perturbed(1))
    if left:
        from shiq_lab.checks.invariance import sides

        inputs = inputs.rearranged(sides(inputs, "left", 2))
    subject.call(inputs)
    return seen, inputs


@pytest.mark.parametrize("left", [False, True])
def test_log_probs_are_those_of_a_plain_loop(left: bool) -> None:
    seen, inputs = given_to(from_logprobs, left)
    b = inputs.batch
    for row, position in (b.completion_mask == 1).nonzero().tolist():
        token = int(b.input_ids[row, position])
        for name, logits in (("logprobs", inputs.logits), ("ref_logprobs", inputs.ref_logits)):
            x = logits[row, position - 1]
            want = float(x[token]) - float(torch.log(torch.exp(x - x.max()).sum()) + x.max())
            assert float(seen[name][row, position]) == pytest.approx(want, abs=1e-13)  # a few eps of logits of size 10
    assert torch.equal(seen["scores"], torch.where(b.completion_mask == 1, b.rewards, 0.0).sum(1))
    assert torch.equal(seen["logprobs"][:, 0], torch.zeros(len(b), dtype=torch.float64))


@pytest.mark.parametrize("left", [False, True])
def test_responses_begin_with_the_first_action_and_keep_their_order(left: bool) -> None:
    """Column 0 is a row's first action, observation tokens inside stay with mask 0, and nothing is lost."""
    whole, _ = given_to(from_logprobs, left)
    cut, _ = given_to(from_response_logprobs, left)
    mask = whole["completion_mask"]
    for row in range(len(mask)):
        places = mask[row].nonzero()[:, 0]
        span = slice(int(places[0]), int(places[-1]) + 1)
        for name in ("logprobs", "ref_logprobs", "old_logprobs", "completion_mask", "rewards", "values"):
            want = whole[name][row, span]
            assert torch.equal(cut[name][row, : len(want)], want)
            assert not cut[name][row, len(want) :].any()
    assert cut["completion_mask"].shape[1] == 7  # at most two actions, three observations, two actions
    assert int(cut["completion_mask"].sum()) == int(mask.sum())


def policy_loss(logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor, rewards: Tensor, beta: float) -> Tensor:
    live = response_mask == 1
    paid = torch.where(live, rewards - beta * (logprobs - ref_logprobs), 0.0).detach()
    return -torch.where(live, logprobs * paid.flip(1).cumsum(1).flip(1), 0.0).sum() / len(rewards)


@pytest.mark.parametrize("adapter", [from_logprobs, from_response_logprobs])
def test_a_bug_of_the_stack_shows_through_the_adapter(adapter: Callable[..., Any]) -> None:
    names = {"response_mask": "completion_mask"}
    assert check_loss(adapter(policy_loss, names, kind="on_policy")).passed
    late = plant(policy_loss, ("paid.flip(1).cumsum(1).flip(1)", "paid.flip(1).cumsum(1).flip(1).roll(-1, 1)"))
    assert {"FP", "EG"} <= set(check_loss(adapter(late, names, kind="on_policy")).failed)
    unmasked = plant(policy_loss, ("live = response_mask == 1", "live = response_mask >= 0"))
    assert {"MT", "MI"} <= set(check_loss(adapter(unmasked, names, kind="on_policy")).failed)


def test_losses_of_statistics_pack_and_get_what_they_name() -> None:
    def statistics(policy: Any, ref: Any, batch: Any, *, beta: float, values: Tensor) -> Tensor:
        assert values.shape == batch.input_ids.shape
        return shiq_lab.shiq_loss(policy, ref, batch, beta=beta)

    names = make_subject(from_stats(statistics)).names
    assert {"segment_ids", "weights", "values"} <= names and not {"group_ids", "behavior_logprobs"} & names
    assert "group_ids" in make_subject(from_stats(statistics, grouped=True)).names


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: from_logprobs(lambda logps: logps.sum()), "names: expected a meaning for 'logps' among "),
        (lambda: from_logprobs(lambda logps: logps.sum(), {"logps": "log_probs"}), "a meaning for 'logps' among "),
        (lambda: from_logprobs(lambda logprobs: logprobs.sum(), semi_grad=True), "Did you mean 'semi_gradient'?"),
        (lambda: from_stats(shiq_lab.shiq_loss, reduced="sum"), "Did you mean 'reduction'?"),
        (
            lambda: from_logprobs(lambda logprobs: 0, {"lp": "logprobs"}),
            "names: expected arguments of the loss: logprobs, got 'lp'",
        ),
        (lambda: from_logprobs(lambda logp: 0, {"logp": "logprob"}), ", got 'logprob'."),
        (lambda: from_logprobs(3), "loss: expected a function, got 3."),  # type: ignore[arg-type]
        (lambda: from_stats(lambda logp, ref, m, scores: 0), "arguments logp, ref, m, scores"),
        (lambda: from_stats(plain_losses.shiq), "loss: expected loss(policy_stats, ref_stats, batch, *, beta"),
        (lambda: shiq_lab.declare(plain_losses.shiq), "declare: expected traits as keywords"),
    ],
)
def test_bad_adapters_are_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)


def test_token_logprobs_of_one_row() -> None:
    """ln softmax of (0, ln 3) is ln(1/4), ln(3/4)."""
    logits = torch.tensor([[[0.0, math.log(3)], [0.0, 0.0]]])
    assert token_logprobs(logits, torch.tensor([[0, 1]]))[0].tolist() == pytest.approx([0.0, math.log(0.75)])
