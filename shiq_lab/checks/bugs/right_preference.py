"""Accepted losses, second part: preference losses. The first half of the rows is chosen, the second half rejected.

DPO's optimum is pi* where the labels are Bradley-Terry draws of the returns. IPO and SimPO aim elsewhere (IPO regresses the
preference probability, SimPO has no reference): they are right as copies of their own formula and are checked against it.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from shiq_lab.checks.traits import declare

IGNORE = -100


def sequence_logps(logits: Tensor, input_ids: Tensor, completion_mask: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of ln pi over a row's actions float[B], how many they are float[B])."""
    mask = completion_mask[:, 1:] == 1
    rows = torch.where(mask[..., None], logits[:, :-1], 0.0)
    index = torch.where(mask, input_ids[:, 1:], 0)[..., None]
    logps = torch.where(mask, rows.log_softmax(-1).gather(-1, index)[..., 0], 0.0)
    return logps.sum(1), mask.sum(1).to(logits.dtype)


@declare(kind="preference")
def dpo(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
    rewards: Tensor, terminated: Tensor, beta: float, gamma: float,
) -> Tensor:  # fmt: skip
    """DPO as everybody writes it: -logsigmoid(beta (log-ratio chosen - log-ratio rejected)), mean over pairs."""
    model, _ = sequence_logps(logits, input_ids, completion_mask)
    ref, _ = sequence_logps(ref_logits, input_ids, completion_mask)
    policy_chosen, policy_rejected = model.chunk(2)
    ref_chosen, ref_rejected = ref.chunk(2)
    margin = (policy_chosen - policy_rejected) - (ref_chosen - ref_rejected)
    return -F.logsigmoid(beta * margin).mean()


@declare(kind="preference")
def dpo_two_classes(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
    rewards: Tensor, terminated: Tensor, beta: float, gamma: float,
) -> Tensor:  # fmt: skip
    """DPO as a classifier of two: F.cross_entropy over (reward chosen, reward rejected), labels of -100, a sum over pairs."""
    labels = torch.where(completion_mask == 1, input_ids, IGNORE)[:, 1:]
    scored = (labels != IGNORE)[..., None]
    model = torch.where(scored, logits[:, :-1], 0.0).transpose(1, 2)
    ref = torch.where(scored, ref_logits[:, :-1], 0.0).transpose(1, 2)
    gain = F.cross_entropy(ref, labels, reduction="none") - F.cross_entropy(model, labels, reduction="none")
    score = beta * gain.sum(1)
    pair = score.reshape(2, -1).T  # (pairs, 2)
    return F.cross_entropy(pair, torch.zeros(len(pair), dtype=torch.long, device=pair.device), reduction="sum")


@declare(kind="preference")
def dpo_labels(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
    rewards: Tensor, terminated: Tensor, beta: float, gamma: float,
) -> Tensor:  # fmt: skip
    """DPO with the two halves taken apart first, each with its own label mask, as trainers that collate them apart do."""
    scores = []
    for half in (slice(None, len(input_ids) // 2), slice(len(input_ids) // 2, None)):
        labels = torch.where(completion_mask[half] == 1, input_ids[half], IGNORE)[:, 1:]
        mask = labels != IGNORE
        model = torch.where(mask[..., None], logits[half, :-1], 0.0).log_softmax(-1)
        ref = torch.where(mask[..., None], ref_logits[half, :-1], 0.0).log_softmax(-1)
        index = labels.clamp(min=0)[..., None]
        ratio = (model.gather(-1, index) - ref.gather(-1, index))[..., 0]
        scores.append(torch.where(mask, ratio, 0.0).sum(1))
    return F.softplus(-beta * (scores[0] - scores[1])).mean()


@declare(kind="preference")
def dpo_pairs(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
    rewards: Tensor, terminated: Tensor, beta: float, gamma: float,
) -> Tensor:  # fmt: skip
    """DPO with ln(1 + exp(-margin)) written out, one pair after the other."""
    total = logits[:0].sum()
    half = len(input_ids) // 2
    for i in range(half):
        scores = []
        for row in (i, i + half):
            at = completion_mask[row].nonzero()[:, 0]
            logps = torch.stack([logits[row, at - 1], ref_logits[row, at - 1]]).log_softmax(-1)  # (2, T, V)
            model, ref = logps[:, torch.arange(len(at)), input_ids[row, at]].sum(1)
            scores.append(beta * (model - ref))
        total = total + torch.log1p(torch.exp(scores[1] - scores[0]))
    return total / max(half, 1)


@declare(kind="preference")
def cross_pairs(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
    rewards: Tensor, terminated: Tensor, beta: float, gamma: float,
) -> Tensor:  # fmt: skip
    """The regression form of the same pairs: (beta margin - (R chosen - R rejected))^2, with the returns as targets."""
    action = completion_mask == 1
    model, _ = sequence_logps(logits, input_ids, completion_mask)
    ref, _ = sequence_logps(ref_logits, input_ids, completion_mask)
    chosen, rejected = (beta * (model - ref) - torch.where(action, rewards, 0.0).sum(1)).chunk(2)
    return 0.5 * (chosen - rejected).square().mean()


# -------------------------------------------------------------- right as formulas, with another optimum: used with like=
@declare(kind="preference")
def ipo(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
    rewards: Tensor, terminated: Tensor, beta: float, gamma: float,
) -> Tensor:  # fmt: skip
    """IPO of the paper: (log-ratio chosen - log-ratio rejected - 1/(2 beta))^2 with sums over tokens."""
    model, _ = sequence_logps(logits, input_ids, completion_mask)
    ref, _ = sequence_logps(ref_logits, input_ids, completion_mask)
    chosen, rejected = (model - ref).chunk(2)
    return (chosen - rejected - 1 / (2 * beta)).square().mean()


@declare(kind="preference")
def ipo_mean(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
    rewards: Tensor, terminated: Tensor, beta: float, gamma: float,
) -> Tensor:  # fmt: skip
    """IPO with log-probabilities averaged over a row's tokens, so that 1/(2 beta) is a margin a token."""
    model, count = sequence_logps(logits, input_ids, completion_mask)
    ref, _ = sequence_logps(ref_logits, input_ids, completion_mask)
    average = (model - ref) / count.clamp(min=1)
    chosen, rejected = average.chunk(2)
    return (chosen - rejected - 1 / (2 * beta)).square().mean()


@declare(kind="preference")
def ipo_without_last(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
    rewards: Tensor, terminated: Tensor, beta: float, gamma: float,
) -> Tensor:  # fmt: skip
    """ipo_mean with every row's last action (the end token) left out, of the sum and of the count alike."""
    place = torch.arange(input_ids.shape[1], device=input_ids.device)
    final = torch.where(completion_mask == 1, place, -1).amax(1, keepdim=True)
    kept = torch.where(place == final, 0, completion_mask)
    model, _ = sequence_logps(logits, input_ids, kept)
    ref, _ = sequence_logps(ref_logits, input_ids, kept)
    length = (kept[:, 1:] == 1).sum(1).clamp(min=1)
    chosen, rejected = ((model - ref) / length).chunk(2)
    return (chosen - rejected - 1 / (2 * beta)).square().mean()


@declare(kind="preference")
def simpo_with_nll(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
    rewards: Tensor, terminated: Tensor, beta: float, gamma: float,
) -> Tensor:  # fmt: skip
    """SimPO with the likelihood of the chosen answer added (as CPO and ORPO do): no reference, averages a token."""
    logps, count = sequence_logps(logits, input_ids, completion_mask)
    average = logps / count.clamp(min=1)
    chosen, rejected = average.chunk(2)
    nll = -chosen
    return (nll - F.logsigmoid(beta * (chosen - rejected) - 0.5)).mean()


@declare(kind="preference")
def orpo(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
    rewards: Tensor, terminated: Tensor, beta: float, gamma: float,
) -> Tensor:  # fmt: skip
    """ORPO: likelihood of the chosen answer, and the odds ratio of the two, ln odds(p) = ln p - ln(1 - p)."""
    logps, count = sequence_logps(logits, input_ids, completion_mask)
    average = logps / count.clamp(min=1)
    chosen, rejected = torch.where(count > 0, average, -1.0).chunk(2)
    p_chosen, p_rejected = (torch.exp(x).clamp(max=1 - 1e-6) for x in (chosen, rejected))  # a forced answer has p = 1
    odds = (chosen - rejected) - (torch.log1p(-p_chosen) - torch.log1p(-p_rejected))
    return (-chosen - beta * F.logsigmoid(odds)).mean()


@declare(kind="preference")
def preference(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
    rewards: Tensor, terminated: Tensor, beta: float, gamma: float, loss_type: str = "sigmoid",
) -> Tensor:  # fmt: skip
    """One function with an option, as trainers have it: sigmoid, hinge or ipo."""
    model, _ = sequence_logps(logits, input_ids, completion_mask)
    ref, _ = sequence_logps(ref_logits, input_ids, completion_mask)
    chosen, rejected = (model - ref).chunk(2)
    return preference_loss(chosen - rejected, beta, loss_type=loss_type).mean()


def preference_loss(margin: Tensor, beta: float, loss_type: str = "sigmoid") -> Tensor:
    """The loss of a margin, by name; ValueError for a name that it does not know."""
    if loss_type == "sigmoid":
        return -F.logsigmoid(beta * margin)
    if loss_type == "hinge":
        return torch.relu(1 - beta * margin)
    if loss_type == "ipo":
        return (margin - 1 / (2 * beta)).square()
    raise ValueError(f"loss_type: expected sigmoid, hinge or ipo, got {loss_type!r}.")


RIGHT: list[Callable[..., Tensor]] = [dpo, dpo_two_classes, dpo_labels, dpo_pairs, cross_pairs, preference]
OTHER_OPTIMUM: list[Callable[..., Tensor]] = [ipo, ipo_mean, ipo_without_last, simpo_with_nll, orpo]
