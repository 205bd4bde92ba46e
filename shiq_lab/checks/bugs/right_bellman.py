"""Accepted losses, first part: ShiQ and its relatives as many different people would write them.

Every loss here has l* (or the log-policy form of it) as its optimum; they differ in style, in reduction, in what they detach
and in how they count time. The suite must accept all of them, and each is the ground on which bugs are planted.

    rho_t = Dv(s_t) - sum_{k>=t} gamma^{k-t} [ r_k - beta ln(pi/pi_ref)(a_k|s_k) ] (- gamma^n Dv(s_end) in a cut row)
    d_t   = beta (l - l_ref)(s_t, a_t) - r_t - gamma Dv(s_{t+1})

Nothing but PyTorch is shared with the losses of the package. Masked logits may hold NaN: they are replaced before any
arithmetic (`where` on the way in), since NaN * 0 in a backward pass is NaN.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shiq_lab.batch import TokenBatch
from shiq_lab.checks.traits import declare
from shiq_lab.losses.shiq import shiq_loss
from shiq_lab.stats import TokenStats


# ------------------------------------------------------------------------------------------------- shared small parts
def last_token(attention_mask: Tensor) -> Tensor:
    """Where a row's last real token stands, int[B]; padding may be on either side."""
    place = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return torch.where(attention_mask == 1, place, 0).amax(1)


def clean(logits: Tensor, completion_mask: Tensor, attention_mask: Tensor, terminated: Tensor) -> Tensor:
    """The logits with 0 wherever no action is scored and no cut row bootstraps, float[B, L, V]."""
    used = F.pad(completion_mask[:, 1:] == 1, (0, 1))
    ends = F.one_hot(last_token(attention_mask), attention_mask.shape[1]) == 1
    return torch.where((used | (ends & ~terminated[:, None]))[..., None], logits, 0.0)


def taken(rows: Tensor, input_ids: Tensor, action: Tensor) -> Tensor:
    """The entry of the token taken, 0 where none was: float[B, L-1]."""
    ids = torch.where(action, input_ids[:, 1:], 0)
    return torch.where(action, rows[:, :-1].gather(-1, ids[..., None])[..., 0], 0.0)


def actions_first(action: Tensor) -> tuple[Tensor, Tensor]:
    """A row's actions moved to the front: (index int[B, T], real bool[B, T])."""
    order = torch.argsort((~action).int(), dim=1, stable=True)
    return order, action.gather(1, order)


# ------------------------------------------------------------------------------------------------------------- styles
def shiq_loops(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
    rewards: Tensor, terminated: Tensor, beta: float, gamma: float,
) -> Tensor:  # fmt: skip
    """Plain loops over rows and tokens, straight from the equation; sum over a row, mean over rows."""
    total = logits[:0].sum()  # 0, and part of the graph even where no row acts
    for b in range(input_ids.shape[0]):
        actions = [i for i in range(1, input_ids.shape[1]) if completion_mask[b, i] == 1]
        if not actions:
            continue
        after = torch.zeros_like(total)
        if not terminated[b]:
            end = int(attention_mask[b].nonzero()[-1])
            after = beta * (logits[b, end].logsumexp(0) - ref_logits[b, end].logsumexp(0))
        for i in reversed(actions):
            token = input_ids[b, i]
            dv = beta * (logits[b, i - 1].logsumexp(0) - ref_logits[b, i - 1].logsumexp(0))
            log_ratio = logits[b, i - 1].log_softmax(0)[token] - ref_logits[b, i - 1].log_softmax(0)[token]
            after = rewards[b, i] - beta * log_ratio + gamma * after
            total = total + (dv - after) ** 2
    return total / input_ids.shape[0]


def shiq_cumsum(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
    rewards: Tensor, terminated: Tensor, beta: float, gamma: float,
) -> Tensor:  # fmt: skip
    """Reverse cumulative sums of gamma^t x_t, divided by gamma^t at the end: no loop and no matrix."""
    action = completion_mask[:, 1:] == 1
    model = clean(logits, completion_mask, attention_mask, terminated)
    ref = clean(ref_logits, completion_mask, attention_mask, terminated)
    dv = beta * (model.logsumexp(-1) - ref.logsumexp(-1))
    log_ratio = taken(model.log_softmax(-1), input_ids, action) - taken(ref.log_softmax(-1), input_ids, action)
    reward = torch.where(action, rewards[:, 1:], 0.0)
    discount = gamma ** (action.cumsum(1) - 1).to(logits.dtype)
    earned = torch.where(action, discount * (reward - beta * log_ratio), 0.0)
    to_go = earned.flip(1).cumsum(1).flip(1)
    bootstrap = dv.gather(1, last_token(attention_mask)[:, None]) * (~terminated[:, None])
    to_go = to_go + gamma ** action.sum(1, keepdim=True).to(logits.dtype) * bootstrap
    rho = torch.where(action, dv[:, :-1] - to_go / discount, 0.0)
    return (rho**2).sum(1).mean()


def shiq_matrix(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
    rewards: Tensor, terminated: Tensor, beta: float, gamma: float,
) -> Tensor:  # fmt: skip
    """rho = A d with the upper-triangular matrix of discounts A and the one-step residuals d."""
    action = completion_mask[:, 1:] == 1
    order, real = actions_first(action)
    model = clean(logits, completion_mask, attention_mask, terminated)
    ref = clean(ref_logits, completion_mask, attention_mask, terminated)
    dv = beta * (model.logsumexp(-1) - ref.logsumexp(-1))
    token = beta * (taken(model, input_ids, action) - taken(ref, input_ids, action))
    end = torch.where(terminated, 0.0, dv.gather(1, last_token(attention_mask)[:, None])[:, 0])
    here = torch.where(real, dv[:, :-1].gather(1, order), 0.0)
    following = F.pad(here, (0, 1))[:, 1:]
    final = F.one_hot((real.sum(1) - 1).clamp(min=0), real.shape[1]) == 1
    following = torch.where(final, end[:, None], following)
    reward = torch.where(real, rewards[:, 1:].gather(1, order), 0.0)
    d = torch.where(real, token.gather(1, order) - reward - gamma * following, 0.0)
    time = torch.arange(real.shape[1], device=d.device)
    ahead = (time[None, :] - time[:, None]).clamp(min=0).to(d.dtype)
    A = torch.where(time[None, :] >= time[:, None], gamma**ahead, 0.0)
    rho = torch.where(real, d @ A.T, 0.0)
    return (rho**2).sum() / len(rho)


def shiq_cross_entropy(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
    rewards: Tensor, terminated: Tensor, beta: float, gamma: float,
) -> Tensor:  # fmt: skip
    """Log-probabilities from F.cross_entropy with -100 labels, and one backward walk over the columns."""
    labels = torch.where(completion_mask == 1, input_ids, -100)[:, 1:]
    model = clean(logits, completion_mask, attention_mask, terminated)
    ref = clean(ref_logits, completion_mask, attention_mask, terminated)
    nll = F.cross_entropy(model[:, :-1].transpose(1, 2), labels, reduction="none", ignore_index=-100)
    ref_nll = F.cross_entropy(ref[:, :-1].transpose(1, 2), labels, reduction="none", ignore_index=-100)
    kl = beta * (ref_nll - nll)
    dv = beta * (torch.logsumexp(model, -1) - torch.logsumexp(ref, -1))
    value = torch.where(terminated, 0.0, dv.gather(1, last_token(attention_mask)[:, None])[:, 0])
    losses = []
    for i in reversed(range(labels.shape[1])):
        acted = labels[:, i] != -100
        value = torch.where(acted, rewards[:, i + 1] - kl[:, i] + gamma * value, value)
        losses.append(torch.where(acted, (dv[:, i] - value) ** 2, 0.0))
    return torch.stack([dv[:0].sum(), *(step.mean() for step in losses)]).sum()


def shiq_one_hot(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
    rewards: Tensor, terminated: Tensor, beta: float, gamma: float,
) -> Tensor:  # fmt: skip
    """One-hot masks instead of gather, half the square, a plain sum: the mathematician's version."""
    action = (completion_mask[:, 1:] == 1).to(logits.dtype)
    model = clean(logits, completion_mask, attention_mask, terminated)
    ref = clean(ref_logits, completion_mask, attention_mask, terminated)
    chosen = F.one_hot(torch.where(completion_mask == 1, input_ids, 0)[:, 1:], logits.shape[-1]) == 1
    level, ref_level = model.logsumexp(-1), ref.logsumexp(-1)
    dv = beta * (level - ref_level)
    log_pi = torch.where(chosen, model[:, :-1] - level[:, :-1, None], 0.0).sum(-1)
    log_ref = torch.where(chosen, ref[:, :-1] - ref_level[:, :-1, None], 0.0).sum(-1)
    number = action.cumsum(1)
    gap = number[:, None, :] - number[:, :, None]  # (B, L-1, L-1): actions from i to j
    later = (gap >= 0) & (action[:, None, :] == 1)
    later &= torch.ones_like(later).triu()
    power = torch.where(later, gamma ** gap.clamp(min=0), 0.0)
    earned = torch.where(action == 1, rewards[:, 1:] - beta * (log_pi - log_ref), 0.0)
    to_end = gamma ** (number[:, -1:] - number + 1)
    bootstrap = torch.where(terminated, 0.0, dv.gather(1, last_token(attention_mask)[:, None])[:, 0])
    rho = dv[:, :-1] - torch.einsum("bij,bj->bi", power, earned) - to_end * bootstrap[:, None]
    return 0.5 * torch.where(action == 1, rho, 0.0).square().sum()


def _row(
    logits: Tensor, ref_logits: Tensor, ids: Tensor, real: Tensor, action: Tensor, rewards: Tensor, done: Tensor,
    beta: float, gamma: float,
) -> Tensor:  # fmt: skip
    """One row of shiq_vmap: float[L, V], int[L], ... -> its sum of squares."""
    place = torch.arange(ids.shape[0], device=ids.device)
    last = torch.where(real == 1, place, 0).amax()
    acted = action == 1
    used = torch.cat([acted[1:], acted.new_zeros(1)]) | ((place == last) & ~done)
    model, ref = torch.where(used[:, None], logits, 0.0), torch.where(used[:, None], ref_logits, 0.0)
    dv = beta * (model.logsumexp(-1) - ref.logsumexp(-1))
    token = torch.where(acted, ids, 0)[1:, None]
    soft = (model.log_softmax(-1) - torch.where(ref == -torch.inf, 0.0, ref.log_softmax(-1)))[:-1].gather(-1, token)[:, 0]
    value = torch.where(done, 0.0, (dv * (place == last)).sum())
    total = torch.zeros_like(value)
    for i in range(ids.shape[0] - 1, 0, -1):
        value = torch.where(acted[i], rewards[i] - beta * soft[i - 1] + gamma * value, value)
        total = total + torch.where(acted[i], dv[i - 1] - value, 0.0) ** 2
    return total


def shiq_vmap(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
    rewards: Tensor, terminated: Tensor, beta: float, gamma: float,
) -> Tensor:  # fmt: skip
    """The loss of one row, mapped over the rows by torch.vmap."""
    each = torch.vmap(_row, in_dims=(0, 0, 0, 0, 0, 0, 0, None, None))
    rows = each(logits, ref_logits, input_ids, attention_mask, completion_mask, rewards, terminated, beta, gamma)
    return rows.mean()


@torch.compile(backend="aot_eager", dynamic=True)
def _compiled_residuals(c: Tensor, u: Tensor, end: Tensor, reward: Tensor, action: Tensor, gamma: float) -> Tensor:
    """rho float[B, L-1] from beta (l - l_ref), Dv, the bootstrap and the rewards, by reverse cumulative sums."""
    number = action.to(u.dtype).cumsum(1)  # an integer exponent would make float32 of gamma
    discount = gamma ** (number - 1)
    earned = torch.where(action, discount * (reward - c + u), 0.0)
    to_go = earned.flip(1).cumsum(1).flip(1) + gamma ** number[:, -1:] * end[:, None]
    return torch.where(action, u - to_go / discount, 0.0)


def shiq_compiled(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
    rewards: Tensor, terminated: Tensor, beta: float, gamma: float,
) -> Tensor:  # fmt: skip
    """The residuals run through torch.compile (the backend that needs no C++ compiler)."""
    action = completion_mask[:, 1:] == 1
    model = clean(logits, completion_mask, attention_mask, terminated)
    ref = clean(ref_logits, completion_mask, attention_mask, terminated)
    dv = beta * (model.logsumexp(-1) - ref.logsumexp(-1))
    c = beta * (taken(model, input_ids, action) - taken(ref, input_ids, action))
    end = torch.where(terminated, 0.0, dv.gather(1, last_token(attention_mask)[:, None])[:, 0])
    reward = torch.where(action, rewards[:, 1:], 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # while tracing, torch looks at .grad of its own inputs and warns of it
        rho = _compiled_residuals(c, dv[:, :-1], end, reward, action, gamma)
    return rho.square().sum(1).mean()


class _Fused(torch.autograd.Function):
    """Sum of rho^2 of one row of T actions with its gradient by hand (F3), as a fused kernel would have it."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, d: Tensor, tokens: Tensor, beta: float, gamma: float) -> Tensor:
        """logits float[T(+1), V] of the row's states, d float[T] its one-step residuals."""
        rho = d.clone()
        for t in range(len(d) - 2, -1, -1):
            rho[t] += gamma * rho[t + 1]
        flow = rho.clone()  # D_k = rho_k + gamma D_{k-1}
        for t in range(1, len(d)):
            flow[t] += gamma * flow[t - 1]
        gradient = torch.zeros_like(logits)
        gradient[torch.arange(len(d)), tokens] = flow
        gradient[1:] -= gamma * flow[: len(logits) - 1, None] * logits[1:].softmax(-1)
        ctx.save_for_backward(2 * beta * gradient)
        return (rho**2).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        return grads[0] * ctx.saved_tensors[0], None, None, None, None


def shiq_fused(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
    rewards: Tensor, terminated: Tensor, beta: float, gamma: float,
) -> Tensor:  # fmt: skip
    """A hand-written backward pass instead of autograd's: what a fused kernel does."""
    total = logits[:0].sum()
    for b in range(len(input_ids)):
        at = completion_mask[b].nonzero()[:, 0]
        if len(at) == 0:
            continue
        end = [] if terminated[b] else [int(attention_mask[b].nonzero()[-1])]
        rows = torch.cat([at - 1, at.new_tensor(end)])
        model, ref, tokens = logits[b, rows], ref_logits[b, rows], input_ids[b, at]
        with torch.no_grad():
            dv = beta * (model.logsumexp(-1) - ref.logsumexp(-1))
            after = torch.cat([dv[1:], dv.new_zeros(len(at) + 1 - len(rows))])
            number = torch.arange(len(at))
            d = beta * (model[number, tokens] - ref[number, tokens]) - rewards[b, at] - gamma * after
        total = total + _Fused.apply(model, d, tokens, beta, gamma)
    return total / len(input_ids)


class ShiQ:
    """A loss that is an object: options in the constructor, a call like a function."""

    def __init__(self, scale: float = 3.0) -> None:
        self.scale = scale

    def __call__(
        self, *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
        rewards: Tensor, terminated: Tensor, beta: float, gamma: float,
    ) -> Tensor:  # fmt: skip
        """`scale` times the loss of shiq_cumsum: a constant factor is no bug."""
        return self.scale * shiq_cumsum(
            logits=logits, ref_logits=ref_logits, input_ids=input_ids, attention_mask=attention_mask,
            completion_mask=completion_mask, rewards=rewards, terminated=terminated, beta=beta, gamma=gamma,
        )  # fmt: skip


shiq_object = ShiQ()


def shiq_package(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
    rewards: Tensor, terminated: Tensor, beta: float, gamma: float, weights: Tensor, group_ids: Tensor,
) -> Tensor:  # fmt: skip
    """The package's own shiq_loss, which takes statistics and a batch: what its users call. Weighted mean of rows."""
    batch = TokenBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        completion_mask=completion_mask,
        rewards=torch.where(completion_mask == 1, rewards, 0.0),
        terminated=terminated,
        weights=weights,
        group_ids=group_ids,
    )
    model, ref = TokenStats.from_logits(logits, batch), TokenStats.from_logits(ref_logits, batch)
    return shiq_loss(model, ref, batch, beta=beta, gamma=gamma)


def shiq_float32(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
    rewards: Tensor, terminated: Tensor, beta: float, gamma: float,
) -> Tensor:  # fmt: skip
    """Everything cast to float32 first, as most training code does, whatever comes in."""
    action = completion_mask[:, 1:] == 1
    model = clean(logits.float(), completion_mask, attention_mask, terminated)
    ref = clean(ref_logits.float(), completion_mask, attention_mask, terminated)
    dv = beta * (model.logsumexp(-1) - ref.logsumexp(-1))
    kl = beta * (taken(model.log_softmax(-1), input_ids, action) - taken(ref.log_softmax(-1), input_ids, action))
    target = torch.where(terminated, 0.0, dv.gather(1, last_token(attention_mask)[:, None])[:, 0])
    loss = torch.zeros_like(target)
    for i in range(action.shape[1] - 1, -1, -1):
        target = torch.where(action[:, i], rewards[:, i + 1].float() - kl[:, i] + gamma * target, target)
        loss = loss + torch.where(action[:, i], dv[:, i] - target, 0.0) ** 2
    return loss.mean()


# --------------------------------------------------------------------------------------------------------- reductions
def _rho(
    logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
    rewards: Tensor, terminated: Tensor, beta: float, gamma: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(rho float[B, L-1], where the actions are): for the losses below, which differ in what they do with it."""
    action = completion_mask[:, 1:] == 1
    model = clean(logits, completion_mask, attention_mask, terminated)
    ref = clean(ref_logits, completion_mask, attention_mask, terminated)
    dv = beta * (model.logsumexp(-1) - ref.logsumexp(-1))
    c = beta * (taken(model, input_ids, action) - taken(ref, input_ids, action))
    rho = torch.zeros_like(dv)
    after = torch.where(terminated, 0.0, dv.gather(1, last_token(attention_mask)[:, None])[:, 0])
    carry = torch.zeros_like(after)
    for i in range(action.shape[1] - 1, -1, -1):
        d = c[:, i] - rewards[:, i + 1] - gamma * after
        carry = torch.where(action[:, i], d + gamma * carry, carry)
        rho = rho.index_copy(1, torch.tensor([i], device=rho.device), torch.where(action[:, i], carry, 0.0)[:, None])
        after = torch.where(action[:, i], dv[:, i], after)
    return rho[:, :-1], action


@declare(reduction="token mean")
def shiq_token_mean(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
    rewards: Tensor, terminated: Tensor, beta: float, gamma: float,
) -> Tensor:  # fmt: skip
    """The mean over all actions of the batch, declared as such."""
    rho, action = _rho(
        logits, ref_logits, input_ids, attention_mask, completion_mask, rewards, terminated, beta, gamma
    )  # fmt: skip
    return (rho**2).sum() / action.sum().clamp(min=1)


@declare(reduction="mean of row means")
def shiq_row_means(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
    rewards: Tensor, terminated: Tensor, beta: float, gamma: float,
) -> Tensor:  # fmt: skip
    """A row's mean over its actions, then the mean over rows, declared as such."""
    rho, action = _rho(
        logits, ref_logits, input_ids, attention_mask, completion_mask, rewards, terminated, beta, gamma
    )  # fmt: skip
    return ((rho**2).sum(1) / action.sum(1).clamp(min=1)).mean()


def shiq_weighted_sum(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
    rewards: Tensor, terminated: Tensor, beta: float, gamma: float, weights: Tensor,
) -> Tensor:  # fmt: skip
    """Asks for weights and sums over rows."""
    rho, _ = _rho(
        logits, ref_logits, input_ids, attention_mask, completion_mask, rewards, terminated, beta, gamma
    )  # fmt: skip
    return (weights * (rho**2).sum(1)).sum()


def shiq_attention_mask(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
    rewards: Tensor, terminated: Tensor, beta: float, gamma: float,
) -> Tensor:  # fmt: skip
    """Called a bug and retracted: the mask is attention_mask[:, 1:], because prompts are 0 already where rho is made."""
    rho, _ = _rho(
        logits, ref_logits, input_ids, attention_mask, completion_mask, rewards, terminated, beta, gamma
    )  # fmt: skip
    action_mask = attention_mask[:, 1:]
    return (rho**2 * action_mask).sum(1).mean()


# -------------------------------------------------------------------------------------------------- other consistency
@declare(semi_gradient=True, random_world=True)
def shiq_semi_gradient(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
    rewards: Tensor, terminated: Tensor, beta: float, gamma: float,
) -> Tensor:  # fmt: skip
    """The gradient flows through beta l(s_t, a_t) alone: stationary in random worlds too."""
    rho, action = _rho(
        logits, ref_logits, input_ids, attention_mask, completion_mask, rewards, terminated, beta, gamma
    )  # fmt: skip
    live = beta * taken(clean(logits, completion_mask, attention_mask, terminated), input_ids, action)
    return ((live - (live - rho).detach()) ** 2).sum(1).mean()


@declare(semi_gradient=True, random_world=True)
def shiq_value_gradient(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
    rewards: Tensor, terminated: Tensor, beta: float, gamma: float, values: Tensor,
) -> Tensor:  # fmt: skip
    """The gradient flows through Dv(s_t) alone, towards the detached soft return: a critic's regression inside the policy.

    l* is stationary, but not alone: one equation a state does not tell its actions apart. `values` is there for the bug.
    """
    rho, action = _rho(
        logits, ref_logits, input_ids, attention_mask, completion_mask, rewards, terminated, beta, gamma
    )  # fmt: skip
    level = clean(logits, completion_mask, attention_mask, terminated).logsumexp(-1)
    ref_level = clean(ref_logits, completion_mask, attention_mask, terminated).logsumexp(-1)
    value = torch.where(action, beta * (level - ref_level)[:, :-1], 0.0)
    target = (value - rho).detach()
    error = (value - target) ** 2
    return torch.where(action, error, 0.0).sum(1).mean()


def one_step(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
    rewards: Tensor, terminated: Tensor, beta: float, gamma: float,
) -> Tensor:  # fmt: skip
    """The one-step residual d_t with its full gradient: the derivation before the multi-step one."""
    action = completion_mask[:, 1:] == 1
    model = clean(logits, completion_mask, attention_mask, terminated)
    ref = clean(ref_logits, completion_mask, attention_mask, terminated)
    v = beta * (model.logsumexp(-1) - ref.logsumexp(-1))
    q = beta * (taken(model, input_ids, action) - taken(ref, input_ids, action))
    v_next = torch.where(terminated, 0.0, v.gather(1, last_token(attention_mask)[:, None])[:, 0])
    targets = []
    for i in range(action.shape[1] - 1, -1, -1):
        targets.append(rewards[:, i + 1] + gamma * v_next)
        v_next = torch.where(action[:, i], v[:, i], v_next)
    target = torch.stack(targets[::-1], 1)
    return torch.where(action, q - target, 0.0).square().sum(1).mean()


@declare(semi_gradient=True, random_world=True)
def one_step_target(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
    rewards: Tensor, terminated: Tensor, beta: float, gamma: float,
) -> Tensor:  # fmt: skip
    """Soft Q-learning with a stopped target, the value written as sum_a pi (Q - beta ln pi/pi_ref) as actor-critics do."""
    action = completion_mask[:, 1:] == 1
    model = clean(logits, completion_mask, attention_mask, terminated)
    ref = clean(ref_logits, completion_mask, attention_mask, terminated)
    forbidden = ref == -torch.inf
    Q = beta * torch.where(forbidden, 0.0, model - torch.where(forbidden, 0.0, ref))
    log_ratio = model.log_softmax(-1) - torch.where(forbidden, 0.0, ref.log_softmax(-1))
    log_ratio = torch.where(forbidden, 0.0, log_ratio)
    v = (model.softmax(-1) * (Q - beta * log_ratio)).sum(-1).detach()
    v_next = v.gather(1, last_token(attention_mask)[:, None])[:, 0] * ~terminated
    loss = torch.zeros_like(v_next)
    for i in range(action.shape[1] - 1, -1, -1):
        target = rewards[:, i + 1] + gamma * v_next
        loss = loss + torch.where(action[:, i], taken(Q, input_ids, action)[:, i] - target, 0.0) ** 2
        v_next = torch.where(action[:, i], v[:, i], v_next)
    return loss.mean()


def n_step(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
    rewards: Tensor, terminated: Tensor, beta: float, gamma: float,
) -> Tensor:  # fmt: skip
    """Two rewards, then Dv of the state behind them (of the row's end, if that comes first), from a replay buffer."""
    n = 2
    action = completion_mask[:, 1:] == 1
    model = clean(logits, completion_mask, attention_mask, terminated)
    ref = clean(ref_logits, completion_mask, attention_mask, terminated)
    dv = beta * (model.logsumexp(-1) - ref.logsumexp(-1))
    kl = beta * (taken(model.log_softmax(-1), input_ids, action) - taken(ref.log_softmax(-1), input_ids, action))
    final_value = torch.where(terminated, 0.0, dv.gather(1, last_token(attention_mask)[:, None])[:, 0])
    row = torch.arange(len(action), device=action.device)[:, None].expand_as(action)[action]  # (N), one entry an action
    v, earned = dv[:, :-1][action], (rewards[:, 1:] - kl)[action]
    last = torch.cat([row[1:] != row[:-1], row.new_ones(min(1, len(row))).bool()])  # the episode's last action
    at = torch.arange(len(row), device=row.device)
    alive = torch.ones_like(last)
    target = torch.zeros_like(v)
    for k in range(n):
        now = (at + k).clamp(max=max(len(row) - 1, 0))
        target = target + torch.where(alive, gamma**k * earned[now], 0.0)
        target = target + torch.where(alive & last[now], gamma ** (k + 1) * final_value[row], 0.0)
        alive = alive & ~last[now]
    after = (at + n).clamp(max=max(len(row) - 1, 0))
    target = target + torch.where(alive, gamma**n * v[after], 0.0)
    return (v - target).square().sum() / len(input_ids)


def flat_one_step(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
    rewards: Tensor, terminated: Tensor, beta: float, gamma: float,
) -> Tensor:  # fmt: skip
    """All actions of all rows in one long buffer, as rollout buffers keep them, with flags where episodes end."""
    action = completion_mask[:, 1:] == 1
    model = clean(logits, completion_mask, attention_mask, terminated)
    ref = clean(ref_logits, completion_mask, attention_mask, terminated)
    dv = beta * (model.logsumexp(-1) - ref.logsumexp(-1))
    c = beta * (taken(model, input_ids, action) - taken(ref, input_ids, action))
    row = torch.arange(len(action), device=action.device)[:, None].expand_as(action)[action]  # (N)
    q, v, r = c[action], dv[:, :-1][action], rewards[:, 1:][action]
    final_value = dv.gather(1, last_token(attention_mask)[:, None])[:, 0]
    episode_ends = torch.cat([row[1:] != row[:-1], row.new_ones(min(1, len(row))).bool()])
    done = episode_ends & terminated[row]
    cut_off = episode_ends & ~terminated[row]
    v_next = torch.cat([v[1:], v.new_zeros(min(1, len(v)))])
    v_next = torch.where(cut_off, final_value[row], v_next)
    not_done = (~done).to(q.dtype)
    target = r + gamma * not_done * v_next
    return ((q - target) ** 2).sum() / len(input_ids)


def shiq_packed(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
    rewards: Tensor, terminated: Tensor, beta: float, gamma: float, segment_ids: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Knows packed rows: one flat buffer of tokens, labels from the next token of the same sample. Sum over the batch."""
    B, L = input_ids.shape
    if segment_ids is None:
        segment, done = attention_mask.clamp(max=1), terminated[:, None]
    else:
        segment, done = segment_ids, terminated
    sample = torch.where(segment > 0, torch.arange(B, device=segment.device)[:, None] * L + segment, 0).flatten()
    ids, acted, reward = input_ids.flatten(), completion_mask.flatten() == 1, rewards.flatten()
    labels, chosen = torch.roll(ids, -1), torch.roll(acted, -1)
    next_sample = F.pad(sample, (0, 1))[1:]  # not a roll: a lone row without padding would follow itself
    inside = (next_sample == sample) & (sample > 0)
    scored = chosen & inside
    final = (sample > 0) & ~inside
    over = done.gather(1, (segment - 1).clamp(min=0)).flatten()
    used = scored | (final & ~over)
    model = torch.where(used[:, None], logits.flatten(0, 1), 0.0)
    ref = torch.where(used[:, None], ref_logits.flatten(0, 1), 0.0)
    dv = beta * (model.logsumexp(-1) - ref.logsumexp(-1))
    label = torch.where(scored, labels, 0)[:, None]
    kl = beta * (model.log_softmax(-1).gather(1, label) - ref.log_softmax(-1).gather(1, label))[:, 0]
    earned = torch.roll(reward, -1)
    total, value = logits[:0].sum(), logits.new_zeros(())
    for i in reversed(range(B * L)):
        if final[i]:
            value = torch.where(over[i], 0.0, dv[i])
        if scored[i]:
            value = earned[i] - kl[i] + gamma * value
            total = total + (dv[i] - value) ** 2
    return total


@declare(semi_gradient=True, random_world=True)
def turn_cut(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
    rewards: Tensor, terminated: Tensor, beta: float, gamma: float,
) -> Tensor:  # fmt: skip
    """Multi-step inside a turn; where the world answers, the next turn's value without gradient: right in random worlds."""
    action = completion_mask[:, 1:] == 1
    model = clean(logits, completion_mask, attention_mask, terminated)
    ref = clean(ref_logits, completion_mask, attention_mask, terminated)
    dv = beta * (model.logsumexp(-1) - ref.logsumexp(-1))
    kl = beta * (taken(model.log_softmax(-1), input_ids, action) - taken(ref.log_softmax(-1), input_ids, action))
    last = last_token(attention_mask)
    value = torch.where(terminated, 0.0, dv.gather(1, last[:, None])[:, 0])
    first = value  # Dv of the first state of what comes next
    loss = torch.zeros_like(value)
    for i in range(action.shape[1] - 1, -1, -1):
        follows = action[:, i + 1] if i + 1 < action.shape[1] else torch.zeros_like(terminated)
        answered = ~follows & (i + 1 < last)
        after = torch.where(answered, first.detach(), value)
        value = torch.where(action[:, i], rewards[:, i + 1] - kl[:, i] + gamma * after, value)
        first = torch.where(action[:, i], dv[:, i], first)
        loss = loss + torch.where(action[:, i], dv[:, i] - value, 0.0) ** 2
    return loss.mean()


@declare(readout="log_policy")
def easy_sampling(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
    rewards: Tensor, terminated: Tensor, beta: float, gamma: float,
) -> Tensor:  # fmt: skip
    """Without the shift: V = beta lse(l), multi-step. Its optimum is ln pi* + v*/beta."""
    action = completion_mask[:, 1:] == 1
    model = clean(logits, completion_mask, attention_mask, terminated)
    ref = clean(ref_logits, completion_mask, attention_mask, terminated).log_softmax(-1)
    V = beta * model.logsumexp(-1)
    kl = beta * (taken(model.log_softmax(-1), input_ids, action) - taken(ref, input_ids, action))
    value = torch.where(terminated, 0.0, V.gather(1, last_token(attention_mask)[:, None])[:, 0])
    loss = torch.zeros_like(value)
    for i in range(action.shape[1] - 1, -1, -1):
        value = torch.where(action[:, i], rewards[:, i + 1] - kl[:, i] + gamma * value, value)
        loss = loss + torch.where(action[:, i], V[:, i] - value, 0.0) ** 2
    return loss.mean()


# --------------------------------------------------------------------------------------------------------- trajectory
@declare(kind="trajectory")
def sequence_only(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
    rewards: Tensor, terminated: Tensor, beta: float, gamma: float,
) -> Tensor:  # fmt: skip
    """rho_0^2 alone: the policy and the level at the start."""
    rho, action = _rho(
        logits, ref_logits, input_ids, attention_mask, completion_mask, rewards, terminated, beta, gamma
    )  # fmt: skip
    start = action & (action.cumsum(1) == 1)
    return (torch.where(start, rho, 0.0) ** 2).sum(1).mean()


@declare(kind="trajectory", readout="log_policy")
def tbrm(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
    rewards: Tensor, terminated: Tensor, beta: float, gamma: float,
) -> Tensor:  # fmt: skip
    """Trajectory Bellman residual: (beta lse(l)(s_0) - sum_t gamma^t [r_t - beta ln(pi/pi_ref)])^2, unshifted."""
    action = completion_mask[:, 1:] == 1
    model = torch.where(action[..., None], logits[:, :-1], 0.0)
    ref = torch.where(action[..., None], ref_logits[:, :-1], 0.0)
    index = torch.where(action, input_ids[:, 1:], 0)[..., None]
    trained = model.clone()
    log_ratio = (trained.log_softmax(-1).gather(-1, index) - ref.log_softmax(-1).gather(-1, index))[..., 0]
    log_z = torch.where(action & (action.cumsum(1) == 1), model.logsumexp(-1), 0.0).sum(1)
    power = gamma ** (action.cumsum(1) - 1).to(logits.dtype)
    soft_return = torch.where(action, power * (rewards[:, 1:] - beta * log_ratio), 0.0).sum(1)
    residual = torch.where(action.any(1), beta * log_z - soft_return, 0.0)
    return (residual**2).mean()


RIGHT: list[Callable[..., Tensor]] = [
    shiq_loops, shiq_cumsum, shiq_matrix, shiq_cross_entropy, shiq_one_hot, shiq_vmap, shiq_compiled, shiq_fused, shiq_object,
    shiq_package, shiq_float32, shiq_token_mean, shiq_row_means, shiq_weighted_sum, shiq_attention_mask, shiq_semi_gradient,
    shiq_value_gradient, one_step, one_step_target, n_step, flat_one_step, shiq_packed, turn_cut, easy_sampling,
    sequence_only, tbrm,
]  # fmt: skip
