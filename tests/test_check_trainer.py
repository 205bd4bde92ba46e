"""check_trainer: right trainers pass, every check fails on its planted bug with its own message, and TRL's trainers run."""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shiq_lab.batch import TokenBatch
from shiq_lab.checks.bugs import trainers as bugs
from shiq_lab.checks.bugs.plant import Bug, plant
from shiq_lab.checks.bugs.trainers import BUGS, dpo, ppo, shiq
from shiq_lab.checks.report import FAILED, PASSED, SKIPPED, Report
from shiq_lab.checks.runner import SubjectError
from shiq_lab.checks.trainer.loop import PlainLoop, plain_loop, token_logprobs
from shiq_lab.checks.trainer.rows import TrainerConfig, World, collate, one_turn, worlds
from shiq_lab.checks.trainer.subject import TrainerSubject, plain_model, trainer_traits
from shiq_lab.checks.trainer.suite import TRAINER_CHECKS, check_trainer
from shiq_lab.enumeration import enumerate_trajectories
from shiq_lab.losses.methods import METHODS
from shiq_lab.models.tabular import TabularLM
from shiq_lab.policies import softmax_policy
from shiq_lab.training import table_loss

CODES = [check.name for check in TRAINER_CHECKS]


# ------------------------------------------------------------------------------------------------------- what is right
def agro(*, completion_mask: Tensor, rewards: Tensor, beta: float, **inputs: Any) -> Tensor:
    """The squared difference of R_b of two completions of a prompt, R_b = R - beta ln(pi / pi_ref): pi* makes it 0."""
    few = {k: inputs[k] for k in ("logits", "ref_logits", "input_ids", "attention_mask")}
    ratio = bugs._log_ratios(completion_mask=completion_mask, **few)[1]
    regularised = ((rewards * completion_mask).sum(1) - beta * ratio).reshape(-1, 2)
    return ((regularised[:, 0] - regularised[:, 1]) ** 2).mean()


def named(loss: Any, *names: str) -> Any:
    """The loss with the contract's argument names, as the loop looks them up."""

    def told(
        *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
        rewards: Tensor, terminated: Tensor, beta: float, gamma: float,
    ) -> Tensor:  # fmt: skip
        return loss(
            logits=logits, ref_logits=ref_logits, input_ids=input_ids, attention_mask=attention_mask,
            completion_mask=completion_mask, rewards=rewards, terminated=terminated, beta=beta, gamma=gamma,
        )  # fmt: skip

    return told


@pytest.mark.parametrize(
    ("loss", "traits", "skipped"),
    [
        (shiq, {"kind": "bellman", "packing": True}, ["CF"]),
        (dpo, {"kind": "preference", "options": {"label_smoothing": 0.2}}, ["PK"]),
        (ppo, {"kind": "on_policy"}, ["EV", "PK", "CF"]),
        (named(agro), {"kind": "policy_only"}, ["PK", "CF"]),
    ],
)
def test_right_loops_pass(loss: Any, traits: dict[str, Any], skipped: list[str]) -> None:
    report = check_trainer(plain_loop(loss, **traits))
    assert [r.name for r in report.results] == CODES
    assert report.passed, [r.message for r in report.results]
    for result in report.results:
        assert (result.status == SKIPPED) == (result.name in skipped)
        assert result.reason if result.status == SKIPPED else result.compared > 0


def test_the_loop_agrees_with_the_table() -> None:
    """Second road: the gradient of one batch through model, collator and loop, against the loss on the table itself."""
    world = worlds("bellman", 0.9, True)[1]
    subject = TrainerSubject(plain_loop(shiq), trainer_traits(plain_loop(shiq)))
    found = subject.gradient(world, "perturbed", world.dataset)
    rows = replace(enumerate_trajectories(world.mdp), weights=torch.ones(len(world.dataset), dtype=torch.float64))
    table = torch.where(
        torch.tensor(world.mdp.allowed), world.table("perturbed"), torch.finfo(torch.float64).min
    ).requires_grad_()
    ref = torch.where(torch.tensor(world.mdp.allowed), world.table("reference"), torch.finfo(torch.float64).min)
    table_loss(METHODS["shiq"], table, ref, rows, world.beta, 0.9).backward()
    assert table.grad is not None
    torch.testing.assert_close(found, table.grad, rtol=1e-12, atol=1e-14)


# ---------------------------------------------------------------------------------------------------------- the rows
def test_examples_collate_to_the_listing() -> None:
    """Examples, put together again, are the listing's own tensors."""
    world = worlds("bellman", 1.0, True)[1]
    batch, listed = collate(world.dataset, TrainerConfig("bellman", 1.0)), enumerate_trajectories(world.mdp)
    for name in ("input_ids", "attention_mask", "completion_mask", "rewards", "terminated", "group_ids"):
        assert torch.equal(getattr(batch, name), getattr(listed, name)), name
    left = collate(world.dataset, TrainerConfig("bellman", 1.0, padding_side="left", pad_to_multiple_of=8, pad_id=3))
    assert left.input_ids.shape[1] % 8 == 0 and bool((left.attention_mask[:, -1] == 1).all())
    assert set(left.input_ids[left.attention_mask == 0].tolist()) == {3}


def test_examples_carry_probabilities_and_labels() -> None:
    """Weights against the product of the reference's probabilities; labels against Bradley-Terry: sigma(h) + sigma(-h) = 1."""
    world = worlds("on_policy", 1.0, False)[0]
    table = world.table("reference")
    prompt = {1: 0.4, 2: 0.6}  # by the number of prompt tokens behind the beginning of the sequence
    for row in world.dataset:
        chance = prompt[len(row["prompt_ids"]) - 1] * torch.tensor(world.log_probability(table, row)).exp().item()
        assert chance == pytest.approx(row["weight"], rel=1e-12)
    pairs = worlds("preference", 1.0, False)[0].dataset
    weight = {(p["group"], tuple(p["chosen_ids"]), tuple(p["rejected_ids"])): p["weight"] for p in pairs}
    assert len(weight) == len(pairs) == 2 * 7 * 6
    assert all(weight[g, y, n] + weight[g, n, y] == pytest.approx(1) for g, y, n in weight)
    better = [p["weight"] > 0.5 for p in pairs]
    assert better == [p["chosen_reward"] > p["rejected_reward"] for p in pairs]
    assert pairs[0]["prompt_ids"] + pairs[0]["chosen_ids"] != pairs[0]["prompt_ids"] + pairs[0]["rejected_ids"]


def test_every_row_of_the_world_ends_with_the_end_token() -> None:
    """Tokenisers append one where it is missing; prompts and completions are of several lengths."""
    rows = worlds("bellman", 1.0, False)[0].dataset
    assert {row["completion_ids"][-1] for row in rows} == {one_turn().token("<eos>")}
    assert {len(row["prompt_ids"]) for row in rows} == {2, 3} and {len(row["completion_ids"]) for row in rows} == {1, 2, 3}


def test_micro_batches_keep_groups_whole() -> None:
    rows = [{"index": i} for i in range(8)]
    found = TrainerConfig("on_policy", 1.0, batch_size=1, accumulation=2).micro_batches(rows)
    assert [[[r["index"] for r in micro] for micro in window] for window in found] == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    whole = TrainerConfig("bellman", 1.0).micro_batches(rows)
    assert [[len(micro) for micro in window] for window in whole] == [[8]]


# ------------------------------------------------------------------------------------------------------------- the bugs
CAUGHT = {
    "B12": ["FP", "BS", "PAD", "IN"],
    "B14": ["FP", "PAD"],
    "E11": ["FP", "IN"],
    "E13": ["EV"],
    "E15": ["PU"],
    "G1": ["BS"],
    "G3": ["BS"],
    "G12": ["CF"],
    "K1": ["PK"],
}
MESSAGES = {
    "B12": "largest |importance ratio - 1| before anything has changed: 5.45, expected at most 2.13e-14, over 20 numbers "
    "(one turn, ratio 2 of the batch); rows: <bos> u | <eos>; <bos> u | a <eos> and 6 more",
    "B14": "gradient padded left to a multiple of 8, against the shortest padding, right, with the end token: 0.938, expected "
    "at most 2.13e-14, over 30 numbers (one turn, state 15, token 2 ('<eos>')); rows: <bos> u | <eos>; "
    "<bos> u | a a <eos> and 2 more",
    "E11": "difference of the losses of both labels of a pair at model = reference: 0.0279, expected at most 2.13e-14, over "
    "1 number (one turn); 0.707207 and 0.679283; rows: <bos> w u | a a <eos> > b <eos>",
    "E13": "evaluated loss against the training loss of the same rows, as a share of it: 0.00419, expected at most 2.13e-14, "
    "over 1 number (one turn); 0.693147 and 0.696062; rows: <bos> u | <eos> > a <eos>; <bos> u | a a <eos> > a b <eos> "
    "and 2 more",
    "E15": "",  # dropout draws: matched below
    "G1": "gradient of two optimiser steps in one call, against the sum of the two alone: 0.444, expected at most 2.13e-14, "
    "over 30 numbers (one turn, state 11, token 2 ('<eos>')); rows: <bos> u | <eos>; <bos> u | a a <eos> and 2 more",
    "G3": "gradient of 4 accumulated micro-batches of 1, against one of 4: 0.111, expected at most 2.13e-14, over 30 numbers "
    "(one turn, state 11, token 2 ('<eos>')); rows: <bos> u | <eos>; <bos> u | a a <eos> and 2 more",
    "G12": "gradient with fused=True and label_smoothing=0.2, against without fused: 0.446, expected at most 2.13e-14, over 30 "
    "numbers (one turn, state 6, token 1 ('b')); rows: <bos> u | <eos> > a <eos>; <bos> u | a a <eos> > a b <eos> and 2 more",
    "K1": "gradient of packed rows, against the rows apart: 1, expected at most 2.13e-14, over 30 numbers (one turn, state 11, "
    "token 0 ('a')); rows: <bos> u | <eos>; <bos> u | a a <eos> and 2 more",
}


def test_every_bug_has_its_line() -> None:
    assert [bug.id for bug in BUGS] == list(CAUGHT) == list(MESSAGES)
    assert all(bug.layer == "M" and bug.thread and bug.symptom and bug.mutation for bug in BUGS)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.id)
def test_a_planted_bug_is_caught(bug: Bug) -> None:
    """The right trainer passes whole, the wrong one fails exactly these checks, and the last of them says so."""
    right, wrong = bug.suite(bug.right), bug.suite(bug.wrong)
    assert right.passed, [r.message for r in right.results if not r.ok]
    assert wrong.failed == CAUGHT[bug.id]
    result = wrong[wrong.failed[-1]]
    if bug.id == "E15":
        assert result.message.startswith("gradient of a model with dropout 0.5, against the same model without: ")
        assert result.hint == (
            "dropout is active in the pass of the policy or of the reference: call model.eval() / ref_model.eval(), "
            "or declare dropout=True"
        )
    else:
        assert result.message == MESSAGES[bug.id]
    assert result.hint


@pytest.mark.parametrize("bug", [bug for bug in BUGS if bug.smoke], ids=lambda bug: bug.id)
def test_the_naive_test_sees_none_of_them(bug: Bug) -> None:
    """Finite, falling, gradient not zero: true of the right trainer and of the wrong one alike."""
    assert bug.smoke is not None and bug.smoke(bug.right) and bug.smoke(bug.wrong)


def test_the_naive_test_can_fail() -> None:
    """It does see a loss that cannot fall; one with the wrong sign falls, and passes."""
    assert not bugs.smoke(plain_loop(named(lambda **inputs: 0.0 * shiq(**inputs))))
    assert bugs.smoke(plain_loop(named(lambda **inputs: -shiq(**inputs))))


# ------------------------------------------------------------------------------------------ each check, and its message
def failing(loss: Any, code: str, loop: type[PlainLoop] = PlainLoop, **traits: Any) -> str:
    """The message with which one check fails; run alone."""
    report = check_trainer(plain_loop(loss, loop=loop, **traits), checks=[code])
    assert report.failed == [code] and not report.passed and report[code].hint
    return report[code].message


class MaskFromIds(PlainLoop):
    """Masks made from ids != pad where padding is the end token: it gets no gradient (the classical bug)."""

    def batch_of(self, rows: Sequence[Any]) -> Any:
        batch = super().batch_of(rows)
        real = batch.input_ids != self.config.pad_id
        return replace(batch, completion_mask=torch.where(real, batch.completion_mask, 0))


def test_fixed_point_catches_a_mask_from_ids() -> None:
    assert failing(dpo, "FP", MaskFromIds, kind="preference") == (
        "expected gradient at the optimum, as a share of that at the reference: 0.824, expected at most 2.13e-14, over 30 "
        "numbers (one turn, state 12, token 1 ('b')); rows: <bos> w u | b b <eos> > <eos>"
    )


def test_convergence_catches_a_sign() -> None:
    """The optimum stays a fixed point when the loss is maximised: FP alone would let it pass."""

    def maximised(**inputs: Any) -> Tensor:
        return -shiq(**inputs)

    report = check_trainer(plain_loop(named(maximised)), checks=["FP", "CV"])
    assert report.failed == ["CV"] and report["FP"].status == PASSED
    assert report["CV"].message.startswith("cosine between the expected step and the way to the optimum: -0.")


class Still(PlainLoop):
    """Computes a gradient and never steps."""

    def step(self, rows: Sequence[Any]) -> float:
        before = self.table.detach().clone()
        loss = super().step(rows)
        self.table.data.copy_(before)
        return loss


class Hasty(PlainLoop):
    """Steps twice as far as its learning rate says."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.optimizer.param_groups[0]["lr"] *= 2


def test_convergence_catches_a_step_that_is_not_taken() -> None:
    said = failing(shiq, "CV", Still)
    assert said.startswith("change of the table in a step of plain SGD with learning rate 1, against minus its gradient: 1, ")
    assert said.endswith("rows: <bos> u | <eos>; <bos> w u | b b <eos>; the table did not move")
    assert failing(shiq, "CV", Hasty).endswith("it is 2 times the other")


class Adaptive(PlainLoop):
    """Adam instead of SGD."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.optimizer = torch.optim.Adam([self.table], lr=self.config.lr)  # type: ignore[assignment]


class Uphill(Adaptive):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.optimizer.param_groups[0]["maximize"] = True


def test_other_optimisers_may_be_declared() -> None:
    assert failing(shiq, "CV", Adaptive).startswith("change of the table in a step of plain SGD with learning rate 1, against ")
    assert check_trainer(plain_loop(shiq, loop=Adaptive, plain_sgd=False), checks=["CV"]).passed
    said = failing(shiq, "CV", Uphill, plain_sgd=False)
    assert said.startswith("cosine between a step and minus the gradient of its rows: -0.")


class LastDropped(PlainLoop):
    """Leaves the last row of a micro-batch out (an off-by-one in a data loader), unless it is alone."""

    def loss_of(self, rows: Sequence[Any], model: nn.Module, ref_model: nn.Module) -> Tensor:
        return super().loss_of(rows[:-1] or rows, model, ref_model)


def test_batches_catch_a_dropped_row() -> None:
    assert failing(shiq, "BS", LastDropped).startswith(
        "gradient of 2 accumulated micro-batches of 2, against one of 4: 0.516, "
    )


class HalfMask(PlainLoop):
    """Masks with 0 x -1e9, which is 0 in every dtype but float16, where -1e9 is -inf and 0 x -inf is NaN."""

    def logits(self, model: nn.Module, batch: Any) -> Tensor:
        found = super().logits(model, batch)
        return found + (torch.tensor(-1e9).to(found.dtype) * 0).nan_to_num(nan=float("nan"))


def test_dtypes_catch_an_infinite_mask() -> None:
    said = failing(dpo, "DT", HalfMask, kind="preference", dtypes=("float64", "float16"))
    assert said.startswith("gradient in float16, against float64: inf, expected at most 0.0234, over 30 numbers (one turn, ")
    assert check_trainer(plain_loop(dpo, kind="preference", dtypes=("float64", "float16")), checks=["DT"]).passed


def test_padding_catches_a_mean_over_the_padded_length() -> None:
    def padded_mean(*, input_ids: Tensor, **inputs: Any) -> Tensor:
        return shiq(input_ids=input_ids, **inputs) / input_ids.shape[1]

    report = check_trainer(plain_loop(named(padded_mean)), checks=["PAD"])
    assert report["PAD"].message.startswith(
        "gradient padded right to a multiple of 8, against the shortest padding, right, with "
    )


def test_initial_catches_rewards_from_nowhere() -> None:
    """A length bonus in the reward: with no reward at all it still pulls."""

    def bonus(*, rewards: Tensor, **inputs: Any) -> Tensor:
        return shiq(rewards=rewards + 0.1, **inputs)

    said = failing(named(bonus), "IN")
    assert said.startswith("gradient at model = reference without rewards, as a share of that with rewards: 0.")


class Trainee(PlainLoop):
    """Trains the reference along, and writes into the rows that it is given."""

    def step(self, rows: Sequence[Any]) -> float:
        if self.config.lr and rows[0].get("reward") is not None:
            self.ref_model.table.data += 0.25  # type: ignore[operator, union-attr]
        return super().step(rows)


class Scribbler(PlainLoop):
    def step(self, rows: Sequence[Any]) -> float:
        rows[0]["reward"] = 0.0
        return super().step(rows)


class Rng(PlainLoop):
    """Draws a random row a call."""

    def step(self, rows: Sequence[Any]) -> float:
        return super().step([rows[int(torch.randint(len(rows), ()))]])


def test_purity_catches_side_effects() -> None:
    said = failing(shiq, "PU", Trainee)
    assert said.startswith(
        "change of the reference model in a step: 0.25, expected at most 0, over 102 numbers (one turn, state "
    )
    assert (
        failing(shiq, "PU", Scribbler) == "number of rows that a step changed: 1, expected at most 0, over 4 numbers (one turn)"
    )
    assert failing(shiq, "PU", Rng).startswith("gradient of ")


def test_purity_accepts_dropout_where_it_is_declared() -> None:
    noisy = next(bug for bug in BUGS if bug.id == "E15").wrong
    assert check_trainer(noisy, checks=["PU"]).failed == ["PU"]
    assert check_trainer(noisy, checks=["PU"], dropout=True).passed


class Untold(PlainLoop):
    """Forgets its options."""

    def __init__(self, model: Any, ref_model: Any, dataset: Any, config: TrainerConfig, **options: Any) -> None:
        super().__init__(model, ref_model, dataset, replace(config, options={}), **options)


def test_options_catch_one_that_changes_nothing() -> None:
    said = failing(dpo, "CF", Untold, kind="preference", options={"label_smoothing": 0.2})
    assert said == "change of the gradient under label_smoothing=0.2: 0, expected at least 0.001, over 102 numbers (one turn)"


def test_packing_catches_a_model_that_is_not_told() -> None:
    class Untold(PlainLoop):
        logits = plant(PlainLoop.logits, ('"segment_ids" in named', '"nothing" in named'))  # type: ignore[assignment]

    assert failing(shiq, "PK", Untold, packing=True).startswith("gradient of packed rows, against the rows apart: ")


def test_nothing_trained_is_a_failure() -> None:
    """A gradient that is always 0 keeps every optimum; no check may call that a pass."""

    def idle(*, logits: Tensor, **inputs: Any) -> Tensor:
        return 0.0 * shiq(logits=logits, **inputs)

    report = check_trainer(plain_loop(named(idle)))
    assert report["FP"].message == (
        "gradient at the reference: 0, expected at least 1e-12, over 1 number (one turn); nothing is trained at all"
    )
    assert [r.name for r in report.results if r.status == PASSED] == []
    assert "there is no gradient at all" in report["BS"].message


# --------------------------------------------------------------------------------------------- verdicts, not tracebacks
def bare(**parts: Any) -> Any:
    """A factory of an object with these members, and the model."""

    def factory(model: Any, ref_model: Any, dataset: Any, config: Any) -> Any:
        return type("Bare", (), {"model": model, **parts})()

    return factory


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (
            bare(step=lambda self, rows: rows["no"]),
            "step(rows) raised TypeError: list indices must be integers or slices, not str",
        ),
        (bare(step=lambda self, rows: None, gradient=torch.zeros(2)), "the gradient has shape (2,), not the table's (17, 6)"),
    ],
)
def test_what_a_trainer_does_wrong_is_a_verdict(factory: Any, message: str) -> None:
    report = check_trainer(factory, checks=["FP"])
    assert report["FP"].status == FAILED and report["FP"].message == message


FORGOT = ": a factory takes (model, ref_model, dataset, config); did you forget to call trl_dpo() or plain_loop(loss)?"


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (lambda *args: 1 / 0, "the factory raised ZeroDivisionError: division by zero"),
        (plain_loop, "the factory raised TypeError: plain_loop() takes 1 positional argument but 4 were given"),
        (lambda *args: None, "the factory returned NoneType without .step"),
        (lambda model, *args: type("T", (), {"step": 1})(), "the factory returned T without .model"),
    ],
)
def test_a_factory_that_makes_no_trainer_is_said_once(factory: Any, message: str) -> None:
    seen: list[Any] = []
    with pytest.raises(SubjectError) as error:
        check_trainer(factory, on_result=seen.append)
    assert str(error.value) == message + FORGOT and seen == []


def test_a_factory_that_fails_at_one_setting_fails_the_check_that_asks_for_it() -> None:
    def fussy(model: Any, ref_model: Any, dataset: Any, config: TrainerConfig) -> PlainLoop:
        if config.padding_side == "left":
            raise RuntimeError("padding on the right only")
        return PlainLoop(model, ref_model, dataset, config, loss=shiq)

    report = check_trainer(fussy, checks=["PAD", "PU"])
    assert report.failed == ["PAD"]
    assert report["PAD"].message == "the factory raised RuntimeError: padding on the right only"


def test_a_cast_to_float32_is_named() -> None:
    """Rewards through float32 leave a share between 1e-9 and 1e-6 at the optimum; the declared dtypes make it a pass."""

    def cast(*, rewards: Tensor, **inputs: Any) -> Tensor:
        return shiq(rewards=rewards.float().to(rewards.dtype), **inputs)

    result = check_trainer(plain_loop(cast), checks=["FP"])["FP"]
    assert result.status == FAILED and result.measured is not None and 1e-9 < result.measured < 1e-6
    assert result.hint == (
        "float32 rounding: something is cast to float32 (rewards?); use model.table.dtype, "
        "or declare dtypes=('float32', 'bfloat16')"
    )
    declared = check_trainer(plain_loop(cast), checks=["FP"], dtypes=("float32", "bfloat16"))
    assert declared.passed, declared["FP"].message
    other = check_trainer(plain_loop(dpo, loop=MaskFromIds, kind="preference"), checks=["FP"])[
        "FP"
    ]  # a share of the order of 1 keeps the check's own hint
    assert other.status == FAILED and other.hint.startswith("the trainer's loss has another optimum")


def test_the_docstring_holds_the_contract() -> None:
    told = check_trainer.__doc__ or ""
    columns = {name for kind in ("bellman", "preference") for name in worlds(kind, 1.0, False)[0].dataset[0]}
    for word in (
        *columns,
        *(f.name for f in fields(TrainerConfig) if f.name != "options"),
        *CODES,
        "plain_loop(loss",
        "trl_dpo()",
    ):
        assert re.search(rf"\b{re.escape(word)}", told), word
    assert "shiq_lab.checks.trainer.loop import plain_loop" in told and "shiq_lab.hf.factories import trl_dpo" in told


class Closed:
    """A trainer that shows nothing but its model, and clears its gradients."""

    def __init__(self, *args: Any) -> None:
        self.inner = PlainLoop(*args, loss=shiq)
        self.model = self.inner.model

    def step(self, rows: Sequence[Any]) -> None:
        self.inner.step(rows)
        self.inner.optimizer.zero_grad()


def test_the_gradient_is_read_from_the_change_of_the_table() -> None:
    report = check_trainer(Closed)
    assert report.passed, [r.message for r in report.results if not r.ok]
    assert report.notes == ["gradient read from the change of the table under SGD with learning rate 1"]
    assert report["EV"].reason == "the trainer has no evaluate(rows)"


def test_the_gradient_is_read_from_the_table() -> None:
    class Open(Closed):
        def step(self, rows: Sequence[Any]) -> None:
            self.inner.step(rows)

    report = check_trainer(Open, checks=["FP", "BS"])
    assert report.passed and report.notes == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "offline"}, "kind: expected one of bellman, trajectory, policy_only, on_policy, preference, got 'offline'."),
        ({"paddings": ()}, "traits: expected one of kind, make_model, dtypes, "),
        ({"padding": ("top",)}, "padding: expected 'right', 'left' or both, got ('top',)."),
        ({"dtypes": ("int8",)}, "dtypes: expected some of float64, float32, bfloat16, float16, got ('int8',)."),
        ({"checks": ["XY"]}, "checks: expected names of checks (FP, CV, BS, PAD, DT, IN, PU, EV, PK, CF), got 'XY'."),
        ({"expect_fail": {"XY": "?"}}, "expect_fail: expected names of checks (FP, "),
        ({"kind": "preference", "multi_turn": True}, "multi_turn: expected False for preference trainers, "),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        check_trainer(plain_loop(shiq), **arguments)
    assert str(error.value).startswith(message)


def test_a_factory_is_callable() -> None:
    with pytest.raises(ValueError, match=r"factory: expected a function \(model, ref_model, dataset, config\), got 3"):
        check_trainer(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reduction: expected 'sum', 'row mean' or 'token mean', got 'median'"):
        plain_loop(shiq, reduction="median")


def test_an_expected_failure_keeps_its_reason() -> None:
    wrong = next(bug for bug in BUGS if bug.id == "G3").wrong
    report = check_trainer(wrong, expect_fail={"BS": "a mean of means, on purpose"})
    assert report.passed and report["BS"].reason == "a mean of means, on purpose"


def test_the_global_random_state_is_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    check_trainer(plain_loop(dpo, kind="preference"), checks=["PU"])
    assert torch.equal(torch.get_rng_state(), before)


def test_rounding_grows_with_q_over_beta() -> None:
    """Tolerances follow the ulp of the largest logit, l_ref + q* / beta, in units of the rewards."""
    factory = plain_loop(shiq)
    subject = TrainerSubject(factory, trainer_traits(factory))
    world = worlds("bellman", 1.0, False)[0]
    hot, cold = (World("w", world.mdp, "bellman", beta, 1.0) for beta in (1.0, 1e-3))
    assert cold.largest > 100 * hot.largest
    assert subject.rounding(hot) == pytest.approx(16 * hot.longest * 2**-52 * max(1, hot.largest / hot.spread))
    assert subject.rounding(hot, "float32") == pytest.approx(2**29 * subject.rounding(hot))


@pytest.mark.slow  # a new interpreter
def test_no_transformers_needed() -> None:
    """The suite imports and runs where transformers cannot be imported."""
    program = (
        "import sys; sys.modules['transformers'] = None\n"
        "from shiq_lab.checks.trainer.suite import check_trainer\n"
        "from shiq_lab.checks.trainer.loop import plain_loop\n"
        "from shiq_lab.checks.bugs.trainers import dpo\n"
        "print(check_trainer(plain_loop(dpo, kind='preference'), checks=['FP']).passed)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert found.stdout.strip() == "True", found.stderr


# ------------------------------------------------------------------------------------------- models of the planted bugs
def test_attention_reaches_the_same_rows_of_the_table() -> None:
    """The attention model against the walking one: same logits with right positions, other ones with shifted positions."""
    world = worlds("bellman", 1.0, True)[1]
    batch = collate(world.dataset, TrainerConfig("bellman", 1.0, padding_side="left"))
    logits = world.table("optimum")
    make = {"trainable": False, "dropout": 0.0, "dtype": torch.float64}
    walking: TabularLM = plain_model(world.mdp, logits, **make)
    attending = bugs.attention_model(world.mdp, logits, **make)
    wanted = walking(batch.input_ids, batch.attention_mask).logits
    places = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
    assert torch.equal(attending(batch.input_ids, batch.attention_mask, places).logits, wanted)
    assert not torch.equal(attending(batch.input_ids, batch.attention_mask).logits, wanted)


def test_adapters_add_up_to_the_models() -> None:
    world = worlds("preference", 1.0, False)[0]
    batch = collate(world.dataset[:3], TrainerConfig("preference", 1.0))
    make = {"dropout": 0.0, "dtype": torch.float64}
    policy, ref = (
        plain_model(world.mdp, world.table(n), trainable=t, **make) for n, t in (("optimum", True), ("reference", False))
    )
    adapted = bugs.AdaptedLM(policy, ref)
    for adapter, model in (("policy", policy), ("reference", ref)):
        with adapted.using(adapter):
            found = token_logprobs(adapted(batch.input_ids, batch.attention_mask).logits, batch)
        torch.testing.assert_close(
            found, token_logprobs(model(batch.input_ids, batch.attention_mask).logits, batch), rtol=0, atol=1e-13
        )
    assert adapted.active == "policy"


def test_log_probability_follows_the_table() -> None:
    """Against softmax rows looked up by hand along one string."""
    world = worlds("on_policy", 1.0, False)[0]
    table = world.table("perturbed")
    row = next(r for r in world.dataset if len(r["completion_ids"]) == 3)
    policy = softmax_policy(world.mdp, table.numpy())
    state, total = world.mdp.start, 0.0
    for token in row["prompt_ids"]:
        state = int(world.mdp.next_state[state, token])
    for token in row["completion_ids"]:
        total, state = total + policy[state, token], int(world.mdp.next_state[state, token])
    assert world.log_probability(table, row) == pytest.approx(total, rel=1e-14)


# ------------------------------------------------------------------------------------------------------ TRL's trainers
@pytest.fixture(scope="module")
def trl() -> Any:
    """The factories; the extra hf is installed by `make test-slow`."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    pytest.importorskip("trl", reason="the extra hf is not installed")
    from shiq_lab.hf import factories

    return factories


def assert_passes(report: Report, skipped: list[str]) -> None:
    assert report.passed, [(r.name, r.message) for r in report.results if not r.ok]
    assert [r.name for r in report.results if r.status == SKIPPED] == skipped


@pytest.mark.slow
def test_trl_dpo_passes(trl: Any) -> None:
    """float32: the expected gradient at pi* is seen at 1.7e-7 of that at the reference."""
    report = check_trainer(trl.trl_dpo())
    assert_passes(report, ["PK"])
    assert report["FP"].compared > 1000


@pytest.mark.slow
def test_trl_dpo_gradient_is_the_plain_loops(trl: Any) -> None:
    """Second road: TRL's text, tokenizer, collator and fused head in float32 against the plain loop in float64."""
    ours, theirs = (TrainerSubject(f, trainer_traits(f)) for f in (plain_loop(dpo, kind="preference"), trl.trl_dpo()))
    world = ours.worlds[0]
    rows = ours.some(world, 8)
    found, wanted = (s.gradient(world, "perturbed", rows) for s in (theirs, ours))
    assert (found - wanted).abs().max() <= theirs.rounding(world) * wanted.abs().max()


@pytest.mark.slow
def test_trl_rloo_gradient_is_that_of_the_objective(trl: Any) -> None:
    """Second road: the expected RLOO gradient of a prompt is minus the exact gradient of its E[R - beta ln(pi / pi_ref)]."""
    subject = TrainerSubject(trl.trl_rloo(), trainer_traits(trl.trl_rloo()))
    world = subject.worlds[0]
    for cell in subject.cells(world, "reference"):
        found = subject.expected(world, "reference", cell)
        group = cell.calls[0][0][0]["group"]
        rows = [row for row in world.dataset if row["group"] == group]
        wanted = -objective_gradient(world, "reference", rows)
        assert wanted.abs().max() > 0.01
        assert (found - wanted).abs().max() <= subject.rounding(world) * wanted.abs().max()


def objective_gradient(world: World, which: str, rows: Sequence[Any]) -> Tensor:
    """d/dl of sum_y pi(y) [R(y) - beta ln(pi / pi_ref)(y)] over all the completions of a prompt, on the table itself."""
    table = world.table(which).requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        state, own, ref = world.mdp.start, torch.zeros((), dtype=torch.float64), 0.0
        for token in row["prompt_ids"]:
            state = int(world.mdp.next_state[state, token])
        for token in row["completion_ids"]:
            own = own + table[state, token] - table[state][torch.tensor(world.mdp.allowed[state])].logsumexp(0)
            ref += float(world.mdp.ref_log_policy[state, token])
            state = int(world.mdp.next_state[state, token])
        total = total + own.exp() * (row["reward"] - world.beta * (own - ref))
    total.backward()
    assert table.grad is not None
    return table.grad


@pytest.mark.slow
def test_the_hugging_face_oracle_in_a_plain_loop(trl: Any) -> None:
    """Two turns and left padding, through the transformers model."""
    from shiq_lab.hf.tabular import TabularLM as Oracle

    assert_passes(check_trainer(plain_loop(shiq, make_model=Oracle.from_logits)), ["PK", "CF"])


@pytest.mark.slow
def test_trl_dpo_with_a_mask_bug_fails(trl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One character of TRL's own collator: the chosen answer's mask begins a token late."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference as Collator

    old = 'chosen_mask = [[0] * len(example["prompt_ids"]) + [1] * len(example["chosen_ids"])'
    new = 'chosen_mask = [[0] * (len(example["prompt_ids"]) + 1) + [1] * (len(example["chosen_ids"]) - 1)'
    monkeypatch.setattr(Collator, "torch_call", plant(Collator.torch_call, (old, new)))
    report = check_trainer(trl.trl_dpo())
    assert "FP" in report.failed and "IN" in report.failed
    assert report["FP"].message.startswith("expected gradient at the optimum, as a share of that at the reference: ")


@pytest.mark.slow
def test_trl_dpo_with_its_dropout_left_on_fails(trl: Any) -> None:
    def noisy(model: Any, ref_model: Any, dataset: Any, config: TrainerConfig) -> Any:
        return trl.trl_dpo()(model, ref_model, dataset, replace(config, options={"disable_dropout": False, **config.options}))

    traits = trl.trl_dpo().trainer_traits
    assert check_trainer(noisy, **{**traits, "options": {}, "same": {}}).failed == ["PU"]


@pytest.mark.slow
def test_trl_rloo_passes(trl: Any) -> None:
    """Its own generate, rewards, leave-one-out baseline and KL penalty; the gradient is exact over all groups of two."""
    assert_passes(check_trainer(trl.trl_rloo()), ["EV", "PK", "CF"])


@pytest.mark.slow
def test_trl_rloo_with_the_mask_of_its_end_token_lost_fails(trl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end token left out of what counts as the completion: generation is cut before it."""
    from trl import RLOOTrainer

    old, new = "sequence_indices <= eos_idx.unsqueeze(1)", "sequence_indices < eos_idx.unsqueeze(1).clamp(min=1)"
    monkeypatch.setattr(RLOOTrainer, "_generate_single_turn", plant(RLOOTrainer._generate_single_turn, (old, new)))
    assert "FP" in check_trainer(trl.trl_rloo(), checks=["FP"]).failed


@pytest.mark.slow
def test_trl_grpo_keeps_another_optimum(trl: Any) -> None:
    """As the table of fixed points says; everything else holds."""
    reason = "the group's mean includes the completion itself, and the KL in the loss is that of single tokens"
    report = check_trainer(trl.trl_grpo(), expect_fail={"FP": reason, "CV": reason})
    assert_passes(report, ["EV", "PK", "CF"])
    assert report["FP"].measured is not None and report["FP"].measured > 0.1


def grpo(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor, rewards: Tensor,
    terminated: Tensor, beta: float, gamma: float,
) -> Tensor:  # fmt: skip
    """-A ln pi with A = R - mean of the group of two, plus beta k3 x ratio in the loss, the mean over the batch's tokens.

    The ratio is 1; its gradient makes k3's that of the per-token KL at fixed states (TRL's use_bias_correction_kl).
    """
    batch = TokenBatch(input_ids, attention_mask, completion_mask, rewards, terminated)
    own, ref = (token_logprobs(x, batch) for x in (logits, ref_logits))
    total = (rewards * completion_mask).sum(1).reshape(-1, 2)
    advantage = (total - total.mean(1, keepdim=True)).reshape(-1, 1)
    k3 = (torch.exp(ref - own) - (ref - own) - 1) * torch.exp(own - own.detach())
    return ((beta * k3 - advantage * own) * completion_mask).sum() / completion_mask.sum()


@pytest.mark.slow
def test_trl_grpo_is_where_theory_puts_it(trl: Any) -> None:
    """Second road to what GRPO still wants to change at pi*: its loss written out, in float64, on the plain model."""
    ours, theirs = (TrainerSubject(f, trainer_traits(f)) for f in (plain_loop(grpo, kind="on_policy"), trl.trl_grpo()))
    world = ours.worlds[0]
    for cell in ours.cells(world, "optimum"):
        found, wanted = (s.expected(world, "optimum", cell) for s in (theirs, ours))
        assert wanted.abs().max() > 0.01
        assert (found - wanted).abs().max() <= theirs.rounding(world) * wanted.abs().max()


@pytest.mark.slow
def test_trl_rloo_trains_on_what_it_samples(trl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without listed answers: every sampled completion is a string of the automaton, and the step has a gradient."""
    import contextlib

    from shiq_lab.hf.tabular import TabularLM as Oracle

    monkeypatch.setattr(Oracle, "saying", lambda self, completions: contextlib.nullcontext())
    subject = TrainerSubject(trl.trl_rloo(), trainer_traits(trl.trl_rloo()))
    world = subject.worlds[0]
    rows = [world.dataset[0]] * 16
    gradient = subject.gradient(world, "reference", rows)
    assert torch.isfinite(gradient).all() and gradient.abs().max() > 0
    trainer = subject.cached(world, "reference")[0].built[16]
    said = {"".join(world.mdp.show(i) for i in row["completion_ids"][:-1]) for row in world.dataset}
    assert len(trainer._logs["completion"]) == 16 and set(trainer._logs["completion"]) <= said
