"""ShiQ in plain PyTorch, as one would write it inside a training script. Check it: shiq-lab check examples/my_shiq.py:loss"""

import torch


def loss(*, logits, ref_logits, input_ids, completion_mask, attention_mask, rewards, terminated, beta, gamma):
    """Mean over rows of sum_t rho_t^2, rho_t = Dv(s_t) - sum_{k>=t} gamma^(k-t) [r_k - beta ln(pi/pi_ref)(a_k|s_k)]."""
    L = input_ids.shape[1]
    acts = completion_mask.bool()  # (B, L): this token was chosen, by logits one position to its left
    end = (attention_mask * torch.arange(1, L + 1, device=input_ids.device)).argmax(1)  # (B,): the last real token

    # Positions whose logits nobody chose from hold anything, NaN included: out with them before they meet a gradient.
    read = torch.nn.functional.pad(acts[:, 1:], (0, 1))
    read = read | (torch.nn.functional.one_hot(end, L).bool() & ~terminated[:, None])
    logits, ref_logits = (torch.where(read[..., None], x, 0.0) for x in (logits, ref_logits))

    level, ref_level = logits.logsumexp(-1), ref_logits.logsumexp(-1)
    dv = beta * (level - ref_level)  # (B, L): the value of the state after each token
    taken = torch.where(acts, input_ids, 0)[:, 1:, None]
    chosen, ref_chosen = (x[:, :-1].gather(-1, taken)[..., 0] for x in (logits, ref_logits))
    log_ratio = (chosen - level[:, :-1]) - (ref_chosen - ref_level[:, :-1])  # (B, L-1)

    future = torch.where(terminated, 0.0, dv.gather(1, end[:, None])[:, 0])  # (B,): what a cut row still had to come
    total = torch.zeros_like(future)
    for i in range(L - 2, -1, -1):
        acted = acts[:, i + 1]  # prompts, tool replies and padding cost no time
        future = torch.where(acted, rewards[:, i + 1] - beta * log_ratio[:, i] + gamma * future, future)
        total = total + torch.where(acted, dv[:, i] - future, 0.0) ** 2
    return total.mean()
