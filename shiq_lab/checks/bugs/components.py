"""The survey's bugs around a loss (layer A) and in fused paths (J2, J3, J4), each an edit of an accepted component."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from shiq_lab.checks.bugs import accepted_components as right
from shiq_lab.checks.bugs.plant import Bug, plant
from shiq_lab.checks.components.suite import check_component
from shiq_lab.errors import bad

Edit = tuple[str, str]


def _bug(
    id: str,
    thread: str,
    kind: str,
    function: Callable[..., Any],
    edits: tuple[Edit, ...],
    *,
    symptom: str,
    mutation: str,
    layer: str = "A",
    smoke: Callable[[Any], bool] | None = None,
    **names: Any,
) -> Bug:
    wrong = plant(function, *edits, **names)
    return Bug(id, thread, symptom, mutation, layer, function, wrong, partial(check_component, kind=kind), smoke)


# ----------------------------------------------------------------------------------------- what a naive test sees
def _falls(loss: Callable[..., torch.Tensor], steps: int = 20) -> bool:
    """Plain gradient descent on hidden states and head: every loss finite, the last below the first, some gradient."""
    draw = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(shape, generator=draw, requires_grad=True) for shape in ((2, 5, 8), (13, 8)))
    labels = torch.randint(13, (2, 5), generator=draw)
    seen, moved = [], 0.0
    for _ in range(steps):
        value = loss(hidden, head, labels)
        grads = torch.autograd.grad(value, (hidden, head))
        seen.append(value.item())
        moved = max(moved, *(float(g.abs().max()) for g in grads))
        with torch.no_grad():
            hidden -= 0.1 * grads[0]
            head -= 0.1 * grads[1]
    return bool(torch.tensor(seen).isfinite().all()) and seen[-1] < seen[0] and moved > 0


def smoke_statistics(function: Callable[..., Any]) -> bool:
    """The naive test of a token-statistics function: maximum likelihood with its own log-probabilities falls."""

    def loss(hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        chosen, level = function(hidden=hidden, head=head, labels=labels, logit_scale=0.5, soft_cap=5.0)
        out: torch.Tensor = (level - chosen).mean()
        return out

    return _falls(loss)


def smoke_policy(function: Callable[..., Any]) -> bool:
    """The naive test of a policy loss: it falls on fixed data, with every option on."""
    old = torch.full((2, 5), -2.5)

    def loss(hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        extra = {"mask": torch.ones(2, 5), "advantages": torch.tensor([1.0, -0.5]), "old_logprobs": old, "soft_cap": 5.0}
        out: torch.Tensor = function(hidden=hidden, head=head, labels=labels, is_ratio=torch.full((2, 5), 0.9), **extra)
        return out

    return _falls(loss)


# ------------------------------------------------------------------------------------------------------- the rows
CAP: Edit = ("soft_cap * torch.tanh(x / soft_cap)", "x * torch.tanh(x / soft_cap)")
ROWS_OF_GROUP = "rows = (group_ids == g).nonzero()[:, 0]"

BUGS: list[Bug] = [
    _bug(
        "A6",
        "minimind#621",
        "completion_mask",
        right.mask_from_turns,
        (("start, end = place, place + len(ids)", "start, end = place + 1, place + len(ids)"),),
        symptom="the first token of every answer is never trained",
        mutation="the mask starts one token late",
    ),
    _bug(
        "B7",
        "SkyRL#1305",
        "whitening",
        right.whiten_masked,
        (("mean = clean.sum() / live.sum()", "mean = clean.mean()"),),
        symptom="whitened advantages are biased, the more the more padding there is",
        mutation="the mean is taken over padding too, the variance over the mask",
    ),
    _bug(
        "B10",
        "trl#4970",
        "attention_mask",
        right.attention_of_completion,
        (("if pad_id != eos_id:", "if True:"),),
        symptom="with pad = EOS no EOS is attended",
        mutation="attention mask from ids != pad_id",
    ),
    _bug(
        "B11",
        "trl#2778",
        "score_readout",
        right.read_by_length,
        (('torch.full_like(lengths, -1) if side == "left" else lengths - 1', "lengths - 1"),),
        symptom="the reward of left-padded rows is read from a wrong token",
        mutation="the index of right padding on every row",
    ),
    _bug(
        "B16",
        "reasoning-from-scratch#185",
        "completion_mask",
        right.mask_from_turns,
        (("start, end = place, place + len(ids)", "start, end = place, place + len(ids) - 1"),),
        symptom="EOS gets no gradient; answers never learn to end",
        mutation="the last action is dropped",
    ),
    _bug(
        "C6",
        "OpenRLHF#1252",
        "response_length",
        right.length_by_sum,
        (
            (
                "completion_mask.sum(1)",
                "completion_mask.amax(1) * (completion_mask.shape[1]"
                " - completion_mask.flip(1).argmax(1) - completion_mask.argmax(1))",
            ),
        ),
        symptom="rows with long tool replies are punished as overlong",
        mutation="length = span from first to last action in place of mask.sum()",
    ),
    _bug(
        "D3",
        "AReaL#1637",
        "truncated",
        right.truncated_by_eos,
        (("input_ids.gather(1, last[:, None])[:, 0] != eos_id", "last == input_ids.shape[1] - 1"),),
        symptom="complete and cut rows are taken for each other",
        mutation="a row counts as cut if it reaches the batch's width",
    ),
    _bug(
        "E17",
        "align-anything#216",
        "kl_baseline",
        right.kl_running,
        (("total += (model", "total = (model"), ("count += len(model)", "count = len(model)")),
        symptom="KTO's KL baseline is that of the last batch",
        mutation="the sum is overwritten in the loop",
    ),
    _bug(
        "H1",
        "PipelineRL#54",
        "group_baseline",
        right.group_view,
        (("mean = grouped.mean(dim=1)", "mean = grouped[:, :1].mean(dim=1)"),),
        symptom="the baseline is one rollout's reward",
        mutation="mean over [:1] of the group",
    ),
    _bug(
        "H3",
        "NeMo-RL#3882",
        "group_baseline",
        right.group_scatter,
        (
            ("rewards: Tensor, group_ids: Tensor", "rewards: Tensor, group_ids: Tensor, prompt_ids: Tensor"),
            ("key = group_ids", "key = prompt_ids.unique(dim=0, return_inverse=True)[1]"),
        ),
        symptom="groups of different samples with the same prompt tokens are merged",
        mutation="the group's key is its prompt tokens",
    ),
    _bug(
        "H4",
        "grpo-flat#2",
        "group_baseline",
        right.group_view,
        (("mean = grouped.mean(dim=1)", "mean = rewards.mean(dim=0).expand(len(grouped))"),),
        symptom="hard prompts are punished for being hard",
        mutation="the mean is over the whole batch",
    ),
    _bug(
        "H5",
        "slime#2230",
        "group_baseline",
        right.group_reshape_or_loop,
        ((ROWS_OF_GROUP, "rows = torch.arange(len(rewards))"),),
        symptom="identical rewards in a group give an advantage of -1.09",
        mutation="uneven groups fall back to one normalisation of the whole batch",
    ),
    _bug(
        "H7",
        "open-instruct#1794",
        "group_baseline",
        right.group_dropped,
        (("rewards[keep], group_ids[keep]", "rewards[keep], torch.arange(int(keep.sum())) // group_size"),),
        symptom="after filtering, rows are compared with another prompt's",
        mutation="groups are counted off after rows were dropped",
    ),
    _bug(
        "H8",
        "verl#2185",
        "micro_batches",
        right.micro_balanced,
        (("x[order] for k", 'x if k == "rewards" else x[order] for k'),),
        symptom="rewards stand on other rows than their tokens",
        mutation="every tensor but one is permuted",
    ),
    _bug(
        "J2",
        "Liger#1088",
        "fused_policy_loss",
        right.policy_loss_fused,
        (("if is_ratio is not None:", "if False:"),),
        symptom="the fused loss has another gradient than the plain one",
        mutation="the sampler's importance ratio is dropped in the fused path",
        layer="M",
        smoke=smoke_policy,
    ),
    _bug(
        "J3",
        "unsloth-zoo#593",
        "fused_policy_loss",
        right.policy_loss_fused,
        (),
        symptom="a KL of 0.24 at step 1, where it must be 0",
        mutation="soft cap x tanh(x / c) in place of c tanh(x / c) in the fused path",
        layer="M",
        smoke=smoke_policy,
        statistics_chunked=plant(right.statistics_chunked, CAP),
    ),
    _bug(
        "J4",
        "unsloth#11277",
        "token_statistics",
        right.statistics_chunked,
        (("x = x * logit_scale", "x = x * 1.0"),),
        symptom="another loss for models with a logit scale (Cohere, Granite)",
        mutation="the logit scale is dropped in the fused path",
        layer="M",
        smoke=smoke_statistics,
    ),
]


def lookup(id: str) -> Bug:
    """One bug by its id."""
    for bug in BUGS:
        if bug.id == id:
            return bug
    raise bad("id", f"one of {', '.join(bug.id for bug in BUGS)}", repr(id))
