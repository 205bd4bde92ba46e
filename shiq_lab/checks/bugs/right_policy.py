"""Accepted losses, third part: what fixes the policy alone, with any data (policy_only) or with the policy's own (on_policy).

    R_b(y) = sum_t gamma^t [ r_t - beta ln(pi/pi_ref)(a_t|s_t) ],  constant over the answers of a prompt at pi*

CoPG, AGRO, DRO, PCL and A*-PO use that constancy row by row, so data of any policy will do. REINFORCE and its family are right
where the expected gradient is: E_pi[ R_b grad ln pi ] is the gradient of J, and J is stationary at pi*.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from shiq_lab.checks.traits import declare

CLIP = 0.2
LAMBDA = 0.95
TEMPERATURE = 0.7


# ------------------------------------------------------------------------------------------------- shared small parts
def token_logps(logits: Tensor, input_ids: Tensor, action: Tensor) -> Tensor:
    """ln pi of every action, 0 elsewhere: float[B, L-1]."""
    rows = torch.where(action[..., None], logits[:, :-1], 0.0)
    index = torch.where(action, input_ids[:, 1:], 0)[..., None]
    return torch.where(action, rows.log_softmax(-1).gather(-1, index)[..., 0], 0.0)


def discounts(action: Tensor, gamma: float, like: Tensor) -> Tensor:
    """gamma^t at the t-th action, float[B, L-1]."""
    return gamma ** (action.to(like.dtype).cumsum(1) - 1)


def soft_return(
    logits: Tensor, ref_logits: Tensor, input_ids: Tensor, completion_mask: Tensor, rewards: Tensor, beta: float, gamma: float
) -> tuple[Tensor, Tensor]:
    """(R_b float[B], ln pi of the row float[B])."""
    action = completion_mask[:, 1:] == 1
    logp = token_logps(logits, input_ids, action)
    log_ratio = logp - token_logps(ref_logits, input_ids, action)
    earned = torch.where(action, rewards[:, 1:] - beta * log_ratio, 0.0)
    return (discounts(action, gamma, logp) * earned).sum(1), logp.sum(1)


def state_kl(logits: Tensor, ref_logits: Tensor, action: Tensor) -> Tensor:
    """KL(pi(.|s) || pi_ref(.|s)) where an action is chosen, summed over the vocabulary; 0 elsewhere: float[B, L-1]."""
    model = torch.where(action[..., None], logits[:, :-1], 0.0).log_softmax(-1)
    ref = torch.where(action[..., None], ref_logits[:, :-1], 0.0).log_softmax(-1)
    allowed = torch.isfinite(ref) & torch.isfinite(model)
    difference = torch.where(allowed, model, 0.0) - torch.where(allowed, ref, 0.0)
    return (model.exp() * difference).sum(-1)


def later(x: Tensor) -> Tensor:
    """The sum of x over the columns to the right of each one: float[B, L-1]."""
    return x.flip(1).cumsum(1).flip(1) - x


def leave_one_out(scores: Tensor, group_ids: Tensor) -> Tensor:
    """Each row's score minus the mean of the others in its group; 0 for a row that is alone."""
    same = (group_ids[:, None] == group_ids[None, :]).to(scores.dtype)
    others = same.sum(1) - 1
    mean = (same @ scores - scores) / others.clamp(min=1)
    return torch.where(others > 0, scores - mean, 0.0)


# -------------------------------------------------------------------------------------------------------- policy_only
@declare(kind="policy_only", discounted=True)
def copg(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
    rewards: Tensor, terminated: Tensor, beta: float, gamma: float, group_ids: Tensor,
) -> Tensor:  # fmt: skip
    """(R_b(y) - R_b(y'))^2 over all pairs of answers to one prompt."""
    total, _ = soft_return(logits, ref_logits, input_ids, completion_mask, rewards, beta, gamma)
    gap = total[:, None] - total[None, :]
    pair = (group_ids[:, None] == group_ids[None, :]).triu(1)
    return torch.where(pair, gap**2, 0.0).sum() / pair.sum().clamp(min=1)


@declare(kind="policy_only", discounted=True)
def agro(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
    rewards: Tensor, terminated: Tensor, beta: float, gamma: float, group_ids: Tensor,
) -> Tensor:  # fmt: skip
    """The variance of R_b inside a group, summed over groups."""
    total, _ = soft_return(logits, ref_logits, input_ids, completion_mask, rewards, beta, gamma)
    loss = total.sum() * 0.0
    for group in torch.unique(group_ids):
        inside = total[group_ids == group]
        loss = loss + (inside - inside.mean()).square().sum() / max(len(inside) - 1, 1)
    return loss


@declare(kind="policy_only", discounted=True, trains_values=True)
def dro(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
    rewards: Tensor, terminated: Tensor, beta: float, gamma: float, values: Tensor,
) -> Tensor:  # fmt: skip
    """DRO-V: (R_b(y) - V(x))^2 / 2, which trains the value too."""
    action = completion_mask[:, 1:] == 1
    total, _ = soft_return(logits, ref_logits, input_ids, completion_mask, rewards, beta, gamma)
    start = action & (action.cumsum(1) == 1)
    value = torch.where(start, values[:, 1:], 0.0).sum(1)
    return 0.5 * (total - value).square().mean()


@declare(kind="policy_only", discounted=True)
def a_star_po(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
    rewards: Tensor, terminated: Tensor, beta: float, gamma: float, values: Tensor,
) -> Tensor:  # fmt: skip
    """A*-PO: regress beta ln(pi/pi_ref)(y) on the optimal advantage R(y) - V*(x), V* given."""
    action = completion_mask[:, 1:] == 1
    logp, ref_logp = token_logps(logits, input_ids, action), token_logps(ref_logits, input_ids, action)
    power = discounts(action, gamma, logp)
    R = torch.where(action, power * rewards[:, 1:], 0.0).sum(1)
    v_star = torch.where(action & (action.cumsum(1) == 1), values[:, 1:], 0.0).sum(1).detach()
    return (beta * (power * (logp - ref_logp)).sum(1) - (R - v_star)).square().mean()


@declare(kind="policy_only", discounted=True)
def pcl(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
    rewards: Tensor, terminated: Tensor, beta: float, gamma: float, values: Tensor,
) -> Tensor:  # fmt: skip
    """Path consistency with a separate critic: (V(s_t) - sum_{k>=t} gamma^{k-t} [r_k - beta ln ratio_k])^2, every t."""
    action = completion_mask[:, 1:] == 1
    logp, ref_logp = token_logps(logits, input_ids, action), token_logps(ref_logits, input_ids, action)
    earned = torch.where(action, rewards[:, 1:] - beta * (logp - ref_logp), 0.0)
    power = discounts(action, gamma, logp)
    to_go = (power * earned).flip(1).cumsum(1).flip(1) / power
    critic = values[:, 1:].detach()
    return torch.where(action, critic - to_go, 0.0).square().sum(1).mean()


@declare(kind="policy_only", discounted=True, semi_gradient=True)
def rloo(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
    rewards: Tensor, terminated: Tensor, beta: float, gamma: float, group_ids: Tensor,
) -> Tensor:  # fmt: skip
    """RLOO: -(R_b - mean of the others' R_b) ln pi(y), KL in the reward."""
    total, logp = soft_return(logits, ref_logits, input_ids, completion_mask, rewards, beta, gamma)
    advantage = leave_one_out(total.detach(), group_ids)
    return -(advantage * logp).mean()


@declare(kind="policy_only", discounted=True, semi_gradient=True)
def sequence_ratio_centred(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
    rewards: Tensor, terminated: Tensor, beta: float, gamma: float, group_ids: Tensor, behavior_logprobs: Tensor,
) -> Tensor:  # fmt: skip
    """Sequence ratios, their logs centred over the group action by action, times a leave-one-out advantage (0 at pi*)."""
    action = completion_mask[:, 1:] == 1
    order = torch.argsort((~action).int(), dim=1, stable=True)  # a row's t-th action into column t
    real = action.gather(1, order)
    log_ratio = (token_logps(logits, input_ids, action) - behavior_logprobs[:, 1:]).gather(1, order)
    log_ratio = torch.where(real, log_ratio, 0.0)
    same = (group_ids[:, None] == group_ids[None, :]).to(log_ratio.dtype)
    column_mean = same @ log_ratio / (same @ real.to(log_ratio.dtype)).clamp(min=1)
    centred = torch.where(real, log_ratio - column_mean, 0.0)
    ratio = torch.exp(centred.sum(1) / real.sum(1).clamp(min=1))
    total, _ = soft_return(logits, ref_logits, input_ids, completion_mask, rewards, beta, gamma)
    return -(ratio * leave_one_out(total.detach(), group_ids)).mean()


# ---------------------------------------------------------------------------------------------------------- on_policy
@declare(kind="on_policy", discounted=True, random_world=True)
def importance_reinforce(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
    rewards: Tensor, terminated: Tensor, beta: float, gamma: float, behavior_logprobs: Tensor,
) -> Tensor:  # fmt: skip
    """REINFORCE with the ratio of whole sequences, pi(y)/mu(y): 1 on-policy, and right in the mean for data of any mu."""
    action = completion_mask[:, 1:] == 1
    logp = token_logps(logits, input_ids, action)
    log_ratio = logp - torch.where(action, behavior_logprobs[:, 1:], 0.0)
    total, _ = soft_return(logits, ref_logits, input_ids, completion_mask, rewards, beta, gamma)
    ratio = torch.exp(log_ratio.sum(1))
    return -(ratio * total.detach()).mean()


@declare(kind="on_policy", discounted=True)
def reinforce(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
    rewards: Tensor, terminated: Tensor, beta: float, gamma: float,
) -> Tensor:  # fmt: skip
    """-R_b ln pi(y), KL in the reward, R_b without gradient."""
    total, logp = soft_return(logits, ref_logits, input_ids, completion_mask, rewards, beta, gamma)
    return -(total.detach() * logp).mean()


@declare(kind="on_policy", random_world=True)
def reinforce_to_go(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
    rewards: Tensor, terminated: Tensor, beta: float, gamma: float,
) -> Tensor:  # fmt: skip
    """-sum_t G_t ln pi(a_t|s_t) with G_t the KL-penalised reward to go; the KL is made of all tokens, then masked."""
    action, seen = completion_mask[:, 1:] == 1, attention_mask[:, 1:] == 1
    log_ratio = (token_logps(logits, input_ids, seen) - token_logps(ref_logits, input_ids, seen)).detach()
    kl = torch.where(action, log_ratio, 0.0)
    penalised = torch.where(action, rewards[:, 1:], 0.0) - beta * kl
    to_go = penalised.flip(1).cumsum(1).flip(1)
    return -(to_go * token_logps(logits, input_ids, action)).sum(1).mean()


@declare(kind="on_policy", random_world=True)
def reinforce_exact_kl(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
    rewards: Tensor, terminated: Tensor, beta: float, gamma: float,
) -> Tensor:  # fmt: skip
    """The KL in the loss: each state's KL with gradient, and later states' KL through the score of what led to them."""
    action = completion_mask[:, 1:] == 1
    logp = token_logps(logits, input_ids, action)
    reward = torch.where(action, rewards[:, 1:], 0.0)
    to_go = reward + later(reward)
    policy_loss = -(to_go * logp).sum(1)
    kl = state_kl(logits, ref_logits, action)
    kl_loss = (kl + later(kl).detach() * logp).sum(1)
    loss = policy_loss + beta * kl_loss
    return loss.mean()


@declare(kind="on_policy", random_world=True)
def reinforce_sampled_kl(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
    rewards: Tensor, terminated: Tensor, beta: float, gamma: float,
) -> Tensor:  # fmt: skip
    """The KL in the loss from samples: ln ratio (whose own gradient has mean 0) and the score of the row times its ln ratio."""
    action = completion_mask[:, 1:] == 1
    logp = token_logps(logits, input_ids, action)
    log_ratio = (logp - token_logps(ref_logits, input_ids, action)).sum(1)
    reward = torch.where(action, rewards[:, 1:], 0.0).sum(1)
    kl_loss = log_ratio + log_ratio.detach() * logp.sum(1)
    return (-reward * logp.sum(1) + beta * kl_loss).mean()


@declare(kind="on_policy", random_world=True)
def reinforce_entropy(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
    rewards: Tensor, terminated: Tensor, beta: float, gamma: float,
) -> Tensor:  # fmt: skip
    """An entropy bonus beta H(s_t) and beta ln pi_ref in the reward, which together are the KL; logits of a tempered head."""
    action = completion_mask[:, 1:] == 1
    raw = torch.where(action[..., None], logits[:, :-1], 0.0) * TEMPERATURE  # what the head says before the temperature
    raw.div_(TEMPERATURE)
    log_pi = raw.log_softmax(-1)
    entropy = -(log_pi.exp() * log_pi.clamp(min=-1e30)).sum(-1)  # 0 * (-inf) is NaN
    entropy = torch.where(action, entropy, 0.0)
    index = torch.where(action, input_ids[:, 1:], 0)[..., None]
    logp = torch.where(action, raw.log_softmax(-1).gather(-1, index)[..., 0], 0.0)
    reward = torch.where(action, rewards[:, 1:], 0.0) + beta * token_logps(ref_logits, input_ids, action)
    to_go = (reward + later(reward + beta * entropy)).detach()
    policy_loss = -(to_go * logp).sum(1)
    acted = action.any(1)
    bonus = beta * entropy.sum(1) * acted
    return (policy_loss.sum() - bonus.sum()) / len(input_ids)


@declare(kind="on_policy", discounted=True, random_world=True)
def actor_critic_gae(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
    rewards: Tensor, terminated: Tensor, beta: float, gamma: float, values: Tensor,
) -> Tensor:  # fmt: skip
    """Generalised advantages from a critic, KL in the reward; actions are moved together, so replies cost no discount.

    Weighted by gamma^t, which makes it the gradient of J for gamma < 1 as well.
    """
    action = completion_mask[:, 1:] == 1
    order = torch.argsort((~action).int(), dim=1, stable=True)
    real = action.gather(1, order)
    pick = lambda x: torch.where(real, x.gather(1, order), 0.0)  # noqa: E731
    logp = pick(token_logps(logits, input_ids, action))
    kl = logp - pick(token_logps(ref_logits, input_ids, action))
    r = pick(rewards[:, 1:]) - beta * kl.detach()
    V = pick(values[:, 1:])
    V_next = torch.cat([V[:, 1:], V.new_zeros(len(V), min(1, V.shape[1]))], 1)
    delta = r + gamma * V_next - V
    gae = torch.zeros_like(delta)
    running = torch.zeros_like(delta[:, :1])
    for t in range(delta.shape[1] - 1, -1, -1):
        running = delta[:, t : t + 1] + gamma * LAMBDA * running
        gae[:, t : t + 1] = running
    advantage = torch.where(real, gae, 0.0).detach()
    return -(discounts(real, gamma, logp) * advantage * logp).sum(1).mean()


@declare(kind="on_policy", discounted=True, random_world=True)
def gae_in_place(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
    rewards: Tensor, terminated: Tensor, beta: float, gamma: float, values: Tensor,
) -> Tensor:  # fmt: skip
    """The same advantages in the row's own layout: a backward walk that holds its state over tokens that are no action."""
    mask = completion_mask[:, 1:] == 1
    V = torch.where(mask, values[:, 1:], 0.0)
    logp = token_logps(logits, input_ids, mask)
    ref_logp = token_logps(ref_logits, input_ids, mask)
    r = torch.where(mask, rewards[:, 1:], 0.0) - beta * (logp - ref_logp).detach()
    next_value, last_gae = torch.zeros_like(V[:, 0]), torch.zeros_like(V[:, 0])
    reversed_gae = []
    for t in range(mask.shape[1] - 1, -1, -1):
        delta = r[:, t] + gamma * next_value - V[:, t]
        gae = delta + gamma * LAMBDA * last_gae
        next_value = torch.where(mask[:, t], V[:, t], next_value)
        last_gae = torch.where(mask[:, t], gae, last_gae)
        reversed_gae.append(gae)
    advantage = torch.stack(reversed_gae[::-1], 1).detach()
    return -torch.where(mask, discounts(mask, gamma, V) * advantage * logp, 0.0).sum(1).mean()


@declare(kind="on_policy", random_world=True)
def gae_flat(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
    rewards: Tensor, terminated: Tensor, beta: float, gamma: float, values: Tensor,
) -> Tensor:  # fmt: skip
    """The same advantages over one long buffer of all episodes, with a flag where each ends: the classic rollout buffer."""
    action = completion_mask[:, 1:] == 1
    row = torch.arange(len(action), device=action.device)[:, None].expand_as(action)[action]
    logp = token_logps(logits, input_ids, action)[action]
    kl = logp - token_logps(ref_logits, input_ids, action)[action]
    r, V = rewards[:, 1:][action] - beta * kl.detach(), values[:, 1:][action]
    N = len(r)
    advantage = torch.zeros_like(r)
    gae = r.new_zeros(())
    for i in reversed(range(N)):
        done = float(i == N - 1 or bool(row[i + 1] != row[i]))
        next_value = V[i + 1] if i + 1 < N else V.new_zeros(())
        delta = r[i] + gamma * next_value * (1 - done) - V[i]
        gae = delta + gamma * LAMBDA * (1 - done) * gae
        advantage[i] = gae
    return -(advantage.detach() * logp).sum() / len(input_ids)


@declare(kind="on_policy", random_world=True)
def ppo(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
    rewards: Tensor, terminated: Tensor, beta: float, gamma: float, behavior_logprobs: Tensor, values: Tensor,
) -> Tensor:  # fmt: skip
    """Clipped ratio to the behaviour's log-probs, one-step advantages from a critic, the dual clip where they are negative."""
    action = completion_mask[:, 1:] == 1
    raw = logits * TEMPERATURE  # what the head says; sampled, and so scored, at this temperature
    logp = token_logps(raw / TEMPERATURE, input_ids, action)
    old_logp = torch.where(action, behavior_logprobs[:, 1:], 0.0)
    r = torch.where(action, rewards[:, 1:], 0.0)
    r = r - beta * (logp - token_logps(ref_logits, input_ids, action)).detach()
    critic, upcoming = torch.where(action, values[:, 1:], 0.0), torch.zeros_like(r[:, 0])
    after = torch.zeros_like(r)
    for i in range(action.shape[1] - 1, -1, -1):
        after[:, i] = upcoming
        upcoming = torch.where(action[:, i], critic[:, i], upcoming)
    advantage = (r + gamma * after - critic).detach()
    ratio = torch.exp(logp - old_logp)
    surrogate = ratio * advantage
    clipped = torch.clamp(ratio, 1 - CLIP, 1 + CLIP) * advantage
    objective = torch.minimum(surrogate, clipped)
    objective = torch.where(advantage < 0, torch.maximum(objective, 3.0 * advantage), objective)
    return -torch.where(action, objective, 0.0).sum(1).mean()


@declare(kind="on_policy", trains_values=True)
def actor_critic_joint(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
    rewards: Tensor, terminated: Tensor, beta: float, gamma: float, values: Tensor,
) -> Tensor:  # fmt: skip
    """Actor and critic in one loss: the advantage is a constant to the actor, the return is a constant to the critic."""
    action = completion_mask[:, 1:] == 1
    logp = token_logps(logits, input_ids, action)
    kl = (logp - token_logps(ref_logits, input_ids, action)).detach()
    power = discounts(action, gamma, logp)
    earned = torch.where(action, power * (rewards[:, 1:] - beta * kl), 0.0)
    returns = (earned + later(earned)) / power
    V = torch.where(action, values[:, 1:], 0.0)
    advantage = (returns - V).detach()
    actor = -(advantage * logp).sum(1)
    error = (V - returns) ** 2
    critic = torch.where(action, error, 0.0).sum(1)
    return (actor + 0.5 * critic).mean()


@declare(kind="on_policy")
def dr_grpo(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
    rewards: Tensor, terminated: Tensor, beta: float, gamma: float, group_ids: Tensor, behavior_logprobs: Tensor,
) -> Tensor:  # fmt: skip
    """Group advantages without std, KL in the reward, one ratio a sequence: on-policy its value is 0, its gradient is not.

    The advantage lies on tokens, as trainers keep it, and a sequence's is their mean.
    """
    action = completion_mask[:, 1:] == 1
    logp = token_logps(logits, input_ids, action)
    total, _ = soft_return(logits, ref_logits, input_ids, completion_mask, rewards, beta, gamma)
    same = (group_ids[:, None] == group_ids[None, :]).to(total.dtype)
    centred = (total - same @ total / same.sum(1)).detach()
    on_tokens = torch.where(action, centred[:, None], 0.0)
    advantage = on_tokens.sum(1) / action.sum(1).clamp(min=1)
    old_logp = torch.where(action, behavior_logprobs[:, 1:], 0.0)
    ratio = torch.exp((logp - old_logp).sum(1))
    return -(ratio * advantage).mean()


@declare(kind="on_policy")
def grpo_true_kl(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
    rewards: Tensor, terminated: Tensor, beta: float, gamma: float, group_ids: Tensor, behavior_logprobs: Tensor,
) -> Tensor:  # fmt: skip
    """Leave-one-out advantages of the plain return, a ratio a token, and the true KL gradient in the loss."""
    response_mask = completion_mask[:, 1:] == 1
    logp = token_logps(logits, input_ids, response_mask)
    old_logp = torch.where(response_mask, behavior_logprobs[:, 1:], 0.0)
    R = torch.where(response_mask, rewards[:, 1:], 0.0).sum(1)
    advantages = leave_one_out(R, group_ids)[:, None].expand_as(logp)
    ratio = torch.exp(logp - old_logp)
    kl = state_kl(logits, ref_logits, response_mask)
    per_token = -ratio * advantages + beta * (kl + later(kl).detach() * logp)
    return (per_token * response_mask).sum(1).mean()


@declare(kind="on_policy")
def grpo_detached(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor,
    rewards: Tensor, terminated: Tensor, beta: float, gamma: float, group_ids: Tensor,
) -> Tensor:  # fmt: skip
    """exp(logp - logp.detach()) for the ratio, right as long as the data are the policy's own; its value stays where it is."""
    response_mask = completion_mask[:, 1:] == 1
    logp = token_logps(logits, input_ids, response_mask)
    total, _ = soft_return(logits, ref_logits, input_ids, completion_mask, rewards, beta, gamma)
    advantages = leave_one_out(total.detach(), group_ids)[:, None]
    ratio = torch.exp(logp - logp.detach())
    return -torch.where(response_mask, ratio * advantages, 0.0).sum(1).mean()


RIGHT: list[Callable[..., Tensor]] = [
    copg, agro, dro, a_star_po, pcl, rloo, sequence_ratio_centred, importance_reinforce, reinforce, reinforce_to_go,
    reinforce_exact_kl, reinforce_sampled_kl, reinforce_entropy, actor_critic_gae, gae_in_place, gae_flat, ppo,
    actor_critic_joint, dr_grpo, grpo_true_kl, grpo_detached,
]  # fmt: skip
