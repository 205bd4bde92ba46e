"""Planted bugs of the loss itself: rows of the survey whose layer is L, each the smallest edit of an accepted loss.

A row lives where its thread found it: a DPO bug in DPO, a bug of generalised advantages in the loss that computes them. What
has another optimum than pi* (IPO, SimPO, ORPO) is compared with its own right version, and so is what only data of another
policy can show (clipping).
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from shiq_lab.checks.bugs import right_bellman as bellman
from shiq_lab.checks.bugs import right_policy as policy
from shiq_lab.checks.bugs import right_preference as preference
from shiq_lab.checks.bugs.plant import Bug, plant
from shiq_lab.checks.fixtures import fixture
from shiq_lab.checks.loss import check_loss, make_subject
from shiq_lab.checks.report import Report
from shiq_lab.checks.runner import SubjectError
from shiq_lab.checks.subject import arrange

Loss = Callable[..., Tensor]
RIGHT: list[Loss] = [*bellman.RIGHT, *policy.RIGHT, *preference.RIGHT]
COPIES: list[Loss] = preference.OTHER_OPTIMUM  # right as formulas, with another optimum than pi*
# What a copy of a formula is held to: everything but where its optimum lies.
FORMULA = ("CALL", "OR", "FD", "PAD", "MI", "BS", "VP", "DT", "PU")

# What was reported as a bug somewhere and is none: the suite must accept each.
NOT_BUGS: dict[str, Loss] = {
    "a loss of 0 whose gradient is not (trl#3452)": policy.dr_grpo,
    "logp - logp.detach() on the policy's own data (trl#2681)": policy.grpo_detached,
    "attention_mask[:, 1:] as a mask where prompts are masked elsewhere (OpenRLHF#465)": bellman.shiq_attention_mask,
    "a token mean, declared (trl#5375)": bellman.shiq_token_mean,
    "a mean of row means, declared (trl#5375)": bellman.shiq_row_means,
    "a declared semi-gradient": bellman.one_step_target,
    "a constant factor": bellman.shiq_object,
}

# Accepted losses that miss one check, and why theory says that they must.
KNOWN: dict[str, dict[str, str]] = {
    "shiq_value_gradient": {"CV": "one equation a state: l* is stationary, but the actions of a state are not told apart"},
}


def reasons(loss: Loss) -> dict[str, str]:
    """The failures that are expected of an accepted loss."""
    return KNOWN.get(getattr(loss, "__name__", ""), {})


def suite(
    loss: Loss,
    *,
    like: Loss | None = None,
    options: Mapping[str, Iterable[Any]] | None = None,
    only: Iterable[str] | None = None,
    expect_fail: Mapping[str, str] | None = None,
    strict: bool = False,
) -> Report:
    """check_loss in the form that Bug.suite wants."""
    return check_loss(loss, like=like, options=options, only=only, expect_fail=expect_fail, strict=strict)


def smoke(loss: Loss) -> bool:
    """The naive test: on one batch the value is finite, the gradient is not 0, and ten steps of descent lower the loss."""
    subject = make_subject(loss)
    case = fixture("one turn")
    inputs = arrange(subject, case, case.perturbed(1))
    try:
        first = subject.call(inputs)
        size = float(first.grad.norm())
        if not (torch.isfinite(first.value) and 0 < size < float("inf")):
            return False
        here, out = inputs, first
        for _ in range(10):
            here = here.change(logits=here.logits - 1e-2 * out.grad / size)
            out = subject.call(here)
    except SubjectError:
        return False
    return bool(out.value < first.value)


def bug(
    id: str, thread: str, symptom: str, mutation: str, right: Loss, *edits: tuple[str, str], run: Any = suite, **names: Any
) -> Bug:
    """A row of this layer; `edits` and `names` as plant() wants them."""
    wrong = plant(right, *edits, **names)
    return Bug(id, thread, symptom, mutation, "L", right, wrong, run, smoke)


def like(right: Loss, *only: str) -> Callable[[Loss], Report]:
    """A suite that holds a loss to its own right version too (and to the checks named, if any)."""
    return partial(suite, like=right, only=only or None, expect_fail=reasons(right))


BUGS = [
    # ------------------------------------------------------------------------------------------------ A: off by one
    bug(
        "A1", "trl#44", "critic targets off by one", "values rolled by one against the log-probs",
        policy.actor_critic_gae,
        ("V = pick(values[:, 1:])", "V = pick(values.roll(-1, 1)[:, 1:])"),
    ),
    bug(
        "A2", "ColossalAI#3622", "values of the prompt used", "the first columns of values instead of the actions'",
        policy.actor_critic_gae,
        ("V = pick(values[:, 1:])", "V = torch.where(real, values[:, :-1], 0.0)"),
    ),
    bug(
        "A4", "trlx#509", "ratio is not 1 at step 0", "the mask is not shifted with the logits",
        policy.ppo,
        ("action = completion_mask[:, 1:] == 1", "action = completion_mask[:, :-1] == 1"),
    ),
    bug(
        "A5", "spinningup#50", "credit one step late", "the reward of the token before",
        policy.actor_critic_gae,
        ("pick(rewards[:, 1:])", "pick(rewards[:, :-1])"),
    ),
    bug(
        "A8", "prime-rl#1525", "the ratio compares different tokens", "labels are shifted, the old log-probs are not",
        policy.ppo,
        ("behavior_logprobs[:, 1:]", "behavior_logprobs[:, :-1]"),
    ),
    bug(
        "A9", "verl#6475", "a label crosses samples", "the shift along the flat buffer does not stop at a sample's end",
        bellman.shiq_packed,
        ("inside = (next_sample == sample) & (sample > 0)", "inside = (next_sample > 0) & (sample > 0)"),
    ),
    bug(
        "A10", "treeqn#3", "n-step target past the episode's end", "the window ignores `done`",
        bellman.n_step,
        ("alive = alive & ~last[now]", "alive = alive & (at < len(row))"),
    ),
    # --------------------------------------------------------------------------------------------------- B: masking
    bug(
        "B2", "CosyVoice#1449", "trains on padding", "mask = (labels == IGNORE)",
        preference.dpo_labels,
        ("mask = labels != IGNORE", "mask = labels == IGNORE"),
    ),
    bug(
        "B2-half", "CosyVoice#1449", "trains on padding", "rejected answers are masked with the chosen ones' mask",
        preference.dpo_labels,
        ("completion_mask[half] == 1", "completion_mask[: len(input_ids) // 2] == 1"),
    ),
    bug(
        "B2-width", "CosyVoice#1449", "trains on padding", "a mean over the padded length",
        bellman.shiq_row_means,
        ("action.sum(1).clamp(min=1)", "action.shape[1]"),
    ),
    bug(
        "B3", "RAGEN#71", "trains on states, not actions", "the mask is inverted",
        policy.reinforce_to_go,
        ("completion_mask[:, 1:] == 1,", "completion_mask[:, 1:] == 0,"),
    ),
    bug(
        "B4", "verl#2506", "wrong weights and denominator", "response_mask = advantages",
        policy.grpo_true_kl,
        ("(per_token * response_mask)", "(per_token * advantages)"),
    ),
    bug(
        "B6", "AReaL#1346", "padding changes the loss", "a sequence's advantage is the mean over all columns",
        policy.dr_grpo,
        ("on_tokens.sum(1) / action.sum(1).clamp(min=1)", "on_tokens.mean(1)"),
    ),
    bug(
        "B8", "Soup#723", "a masked token moves other rows", "centred before it is masked",
        policy.sequence_ratio_centred,
        ("    log_ratio = torch.where(real, log_ratio, 0.0)\n", ""),
    ),
    bug(
        "B15", "mlx-lm-lora#88", "padding targets are counted", "the target mask keeps everything after the first action",
        preference.dpo,
        sequence_logps=plant(
            preference.sequence_logps,
            ("completion_mask[:, 1:] == 1", "completion_mask[:, 1:].cumsum(1) > 0"),
        ),
    ),
    # ------------------------------------------------------------------------------------------------ C: many turns
    bug(
        "C2", "miles#1827", "credit decays across observations", "a gamma lambda step on masked tokens",
        policy.gae_in_place,
        ("last_gae = torch.where(mask[:, t], gae, last_gae)", "last_gae = gae"),
    ),
    bug(
        "C3", "slime#1370", "the KL of tool tokens enters the return", "the KL is summed unmasked",
        policy.reinforce_to_go,
        ("kl = torch.where(action, log_ratio, 0.0)", "kl = log_ratio"),
    ),
    bug(
        "C4", "Search-R1#21", "the KL of retrieved tokens blows up", "the KL in the loss is masked by attention alone",
        policy.grpo_true_kl,
        ("kl = state_kl(logits, ref_logits, response_mask)", "kl = state_kl(logits, ref_logits, attention_mask[:, 1:] == 1)"),
    ),
    # --------------------------------------------------------------------------------------------------- D: endings
    bug(
        "D2", "verl#50", "padding's values enter the advantage", "bootstraps with V[t+1] where that is no action",
        policy.gae_in_place,
        ("V = torch.where(mask, values[:, 1:], 0.0)", "V = values[:, 1:]"),
        ("next_value = torch.where(mask[:, t], V[:, t], next_value)", "next_value = V[:, t]"),
    ),
    bug(
        "D4", "pytorch/rl#4209", "the next episode's value at a truncation", "the next entry of the flat buffer",
        bellman.flat_one_step,
        ("v_next = torch.where(cut_off, final_value[row], v_next)", "v_next = 1.0 * v_next"),
    ),
    bug(
        "D6", "Super-mario-PPO#21", "the advantage crosses episodes", "gae *= gamma lambda without (1 - done)",
        policy.gae_flat,
        ("gamma * LAMBDA * (1 - done) * gae", "gamma * LAMBDA * gae"),
    ),
    bug(
        "D7", "baselines#436", "values biased low", "a time limit is treated as the end",
        bellman.one_step,
        ("torch.where(terminated, 0.0, v.gather(1, last_token(attention_mask)[:, None])[:, 0])", "torch.zeros_like(v[:, 0])"),
    ),
    bug(
        "D8", "pytorch-ddpg-naf#16", "the target is meaningless", "r + gamma * mask + V'",
        bellman.flat_one_step,
        ("r + gamma * not_done * v_next", "r + gamma * not_done + v_next"),
    ),
    # -------------------------------------------------------------------------------------------- E: KL and entropy
    bug(
        "E1", "Logic-RL#58", "the KL is maximised", "loss - beta * kl",
        policy.reinforce_exact_kl,
        ("policy_loss + beta * kl_loss", "policy_loss - beta * kl_loss"),
    ),
    bug(
        "E2", "open-instruct#530", "the KL has no effect", "the KL is computed under no_grad",
        policy.reinforce_exact_kl,
        ("policy_loss + beta * kl_loss", "policy_loss + beta * kl_loss.detach()"),
    ),
    bug(
        "E3", "NeMo-RL#2506", "the KL's gradient has mean 0", "the sampled KL without its score term",
        policy.reinforce_sampled_kl,
        ("log_ratio + log_ratio.detach() * logp.sum(1)", "log_ratio"),
    ),
    bug(
        "E5", "optimate#298", "divergence is rewarded", "the KL is reversed and added to the reward",
        policy.reinforce_exact_kl,
        ("state_kl(logits, ref_logits, action)", "state_kl(ref_logits, logits, action)"),
        ("policy_loss + beta * kl_loss", "policy_loss - beta * kl_loss"),
    ),
    bug(
        "E6", "optimate#250", "the entropy is minimised", "the sign of the bonus",
        policy.reinforce_entropy,
        ("policy_loss.sum() - bonus.sum()", "policy_loss.sum() + bonus.sum()"),
    ),
    bug(
        "E7", "maxtext#1530", "beta is applied twice", "beta in the margin and again inside logsigmoid",
        preference.dpo,
        (
            "margin = (policy_chosen - policy_rejected) - (ref_chosen - ref_rejected)",
            "margin = beta * ((policy_chosen - policy_rejected) - (ref_chosen - ref_rejected))",
        ),
    ),
    bug(
        "E9", "p-christ#54", "the soft value is too small by the number of actions", ".mean instead of .sum over the actions",
        bellman.one_step_target,
        ("(Q - beta * log_ratio)).sum(-1)", "(Q - beta * log_ratio)).mean(-1)"),
    ),
    bug(
        "E10", "gflownet#251", "trajectory balance does not train", "a detached clone of the logits",
        bellman.tbrm,
        ("model.clone()", "model.clone().detach()"),
    ),
    # --------------------------------------------------------------------------------------------- F: which log-probs
    bug(
        "F1", "trl#3029", "biased gradient at temperature other than 1", "logits not divided by the temperature in logp",
        policy.ppo,
        ("token_logps(raw / TEMPERATURE, input_ids, action)", "token_logps(raw, input_ids, action)"),
    ),
    bug(
        "F2", "OpenRLHF#1319", "the entropy of another policy", "the entropy before the division in place",
        policy.reinforce_entropy,
        ("    raw.div_(TEMPERATURE)\n", ""),
        ("    index = torch.where", "    raw.div_(TEMPERATURE)\n    index = torch.where"),
    ),
    bug(
        "F5", "torchforge#571", "flat reward off-policy", "logp - logp.detach() instead of the behaviour's log-probs",
        policy.importance_reinforce,
        ("torch.where(action, behavior_logprobs[:, 1:], 0.0)", "logp.detach()"),
        run=like(policy.importance_reinforce),
    ),
    # -------------------------------------------------------------------------------------------- G: normalisation
    bug(
        "G7", "LlamaFactory#6722", "the likelihood term is divided by the length twice", "an average, divided again",
        preference.simpo_with_nll,
        ("nll = -chosen", "nll = -chosen / count.chunk(2)[0].clamp(min=1)"),
        run=like(preference.simpo_with_nll, *FORMULA),
    ),
    bug(
        "G8", "trl#1265", "beta depends on the length", "a sum over tokens instead of a mean",
        preference.ipo_mean,
        ("(model - ref) / count.clamp(min=1)", "model - ref"),
        run=like(preference.ipo_mean, *FORMULA),
    ),
    bug(
        "G9", "PaddleFormers#4909", "length bias", "the end token is out of the sum, but in the count",
        preference.ipo_without_last,
        ("(kept[:, 1:] == 1).sum(1)", "(completion_mask[:, 1:] == 1).sum(1)"),
        run=like(preference.ipo_without_last, *FORMULA),
    ),
    bug(
        "G11", "ms-swift#10167", "hinge and IPO trained as sigmoid", "loss_type is not forwarded",
        preference.preference,
        (", loss_type=loss_type)", ")"),
        run=partial(suite, options={"loss_type": ("sigmoid", "hinge", "ipo")}),
    ),
    # --------------------------------------------------------------------------------------------- I: surrogates
    bug(
        "I1", "ray#22171", "the value's gradient is zero", "the maximum of unclipped and clipped picks a constant",
        bellman.shiq_value_gradient,
        (
            "error = (value - target) ** 2",
            "near = values[:, 1:] + (value - values[:, 1:]).clamp(-0.2, 0.2)\n"
            "    error = torch.maximum((value - target) ** 2, (near - target) ** 2)",
        ),
        run=like(bellman.shiq_value_gradient),
    ),
    bug(
        "I3", "RL2#21", "wrong clip", "clamp(eps, 1 + eps)",
        policy.ppo,
        ("torch.clamp(ratio, 1 - CLIP, 1 + CLIP)", "torch.clamp(ratio, CLIP, 1 + CLIP)"),
        run=like(policy.ppo),
    ),
    bug(
        "I4", "tianshou#433", "a huge loss for positive advantages", "the dual clip without the guard A < 0",
        policy.ppo,
        ("torch.where(advantage < 0, torch.maximum(objective, 3.0 * advantage), objective)",
         "torch.maximum(objective, 3.0 * advantage)"),
        run=like(policy.ppo),
    ),
    bug(
        "I5", "pytorch/rl#1033", "surrogates on different scales", "advantages normalised between the two surrogates",
        policy.ppo,
        ("    surrogate = ratio * advantage\n",
         "    surrogate = ratio * advantage\n    advantage = advantage / advantage.abs().mean().clamp(min=1e-8)\n"),
        run=like(policy.ppo),
    ),
    bug(
        "I7", "encode-attend-navigate#3", "the critic is trained by the policy loss", "the advantage is not detached",
        policy.actor_critic_gae,
        ("advantage = torch.where(real, gae, 0.0).detach()", "advantage = torch.where(real, gae, 0.0)"),
    ),
    bug(
        "I8", "mlx-lm-lora#65", "ORPO's gradient is zero", "log-probs computed outside of what is differentiated",
        preference.orpo,
        ("average = logps / count", "average = logps.detach() / count"),
        run=like(preference.orpo, *FORMULA),
    ),
    bug(
        "I9", "RLinf#1565", "entropy times the batch size", "[B] * [B, 1] -> [B, B]",
        policy.reinforce_entropy,
        ("acted = action.any(1)", "acted = action.any(1, keepdim=True)"),
    ),
    # ----------------------------------------------------------------------------------------------- J: NaN and inf
    bug(
        "J6", "prime-rl#2084", "NaN poisons the weights", "mask * exp(large)",
        policy.ppo,
        ("old_logp = torch.where(action, behavior_logprobs[:, 1:], 0.0)", "old_logp = behavior_logprobs[:, 1:]"),
        ("torch.where(action, objective, 0.0).sum(1)", "(action * objective).sum(1)"),
        run=partial(suite, strict=True),  # inf in a masked place is a warning otherwise
    ),
    bug(
        "J7", "SkyRL#2259", "NaN with masked vocabulary rows", "0 * (-inf) in the entropy",
        policy.reinforce_entropy,
        (".clamp(min=-1e30)", ""),
    ),
]  # fmt: skip
