"""Right components in several styles: the suite must accept all of them, and most planted bugs are edits of these."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shiq_lab.batch import TokenBatch, pack


# ------------------------------------------------------------------------------------------------ completion_mask
def mask_from_roles(*, roles: Tensor) -> Tensor:
    return (roles == 1).long()


def mask_from_turns(*, turns: list[list[tuple[str, list[int]]]], width: int, side: str) -> Tensor:
    """Loops over turns."""
    mask = torch.zeros(len(turns), width, dtype=torch.long)
    for b, row in enumerate(turns):
        place = width - sum(len(ids) for _, ids in row) if side == "left" else 0
        for role, ids in row:
            start, end = place, place + len(ids)
            if role == "policy":
                mask[b, start:end] = 1
            place = end
    return mask


def mask_after_prompt(*, attention_mask: Tensor, prompt_lengths: Tensor) -> Tensor:
    """One prompt, one completion: every real token behind the prompt."""
    count = attention_mask.cumsum(1)
    return attention_mask * (count > prompt_lengths[:, None]).long()


# ------------------------------------------------------------------------------------------------- attention_mask
def attention_from_lengths(*, input_ids: Tensor, lengths: Tensor, side: str) -> Tensor:
    L = input_ids.shape[1]
    place = torch.arange(L).expand_as(input_ids)
    if side == "left":
        return (place >= L - lengths[:, None]).long()
    return (place < lengths[:, None]).long()


def attention_from_rows(*, rows: list[list[int]], width: int, side: str) -> Tensor:
    pads = [[0] * (width - len(row)) for row in rows]
    ones = [[1] * len(row) for row in rows]
    return torch.tensor([p + o if side == "left" else o + p for p, o in zip(pads, ones, strict=True)])


def attention_of_completion(
    *, input_ids: Tensor, completion_mask: Tensor, lengths: Tensor, side: str, pad_id: int, eos_id: int
) -> Tensor:
    """By ids where these can tell, by lengths where pad and EOS are one."""
    if pad_id != eos_id:
        return (input_ids != pad_id).long()
    return attention_from_lengths(input_ids=input_ids, lengths=lengths, side=side)


# -------------------------------------------------------------------------------------- response_length, truncated
def length_by_sum(*, completion_mask: Tensor) -> Tensor:
    lengths = completion_mask.sum(1)
    return lengths


def length_by_loop(*, roles: Tensor) -> list[int]:
    return [sum(1 for role in row if role == 1) for row in roles.tolist()]


def truncated_by_eos(*, input_ids: Tensor, attention_mask: Tensor, eos_id: int) -> Tensor:
    """The last real token is no EOS."""
    place = torch.arange(input_ids.shape[1])
    last = torch.where(attention_mask == 1, place, -1).amax(1)
    cut_off = input_ids.gather(1, last[:, None])[:, 0] != eos_id
    return cut_off


def truncated_by_reason(*, finish_reasons: list[str]) -> list[bool]:
    return [reason == "length" for reason in finish_reasons]


# ------------------------------------------------------------------------------------------------------------ gae
def gae_loop(
    *, values: Tensor, rewards: Tensor, mask: Tensor, terminated: Tensor, next_value: Tensor, gamma: float, lam: float
) -> Tensor:
    """Backwards over columns; columns without an action pass everything through."""
    out = torch.zeros_like(values)
    carry = torch.zeros_like(next_value)
    after = torch.where(terminated, 0.0, next_value)
    for t in reversed(range(values.shape[1])):
        act = mask[:, t] == 1
        delta = rewards[:, t] + gamma * after - values[:, t]
        carry = torch.where(act, delta + gamma * lam * carry, carry)
        after = torch.where(act, values[:, t], after)
        out[:, t] = carry
    return out


def gae_by_rows(
    *, values: Tensor, rewards: Tensor, completion_mask: Tensor, truncated: Tensor, next_value: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Row by row on the actions alone, as numbers; returns (advantages, returns)."""
    advantages = torch.zeros_like(values)
    for b in range(len(values)):
        places = completion_mask[b].nonzero()[:, 0].tolist()
        following = float(next_value[b]) if truncated[b] else 0.0
        advantage = 0.0
        for i in reversed(places):
            value = float(values[b, i])
            advantage = float(rewards[b, i]) + gamma * following - value + gamma * lam * advantage
            advantages[b, i] = advantage
            following = value
    return advantages, advantages + values


def gae_matrix(
    *, values: Tensor, rewards: Tensor, mask: Tensor, terminated: Tensor, next_value: Tensor, gamma: float, lam: float
) -> Tensor:
    """An upper-triangular matrix of discounts between actions, by their number in the row."""
    act = mask == 1
    number = act.cumsum(1) - 1
    v, r = torch.where(act, values, 0.0), torch.where(act, rewards, 0.0)
    T = mask.shape[1]
    packed_v = torch.zeros(len(v), T + 1, dtype=v.dtype).scatter_add(1, torch.where(act, number, T), v)
    packed_v[:, T] = 0
    packed_v.scatter_add_(1, act.sum(1, keepdim=True), torch.where(terminated, 0.0, next_value)[:, None])
    packed_r = torch.zeros(len(v), T + 1, dtype=v.dtype).scatter_add(1, torch.where(act, number, T), r)[:, :T]
    real = torch.arange(T) < act.sum(1, keepdim=True)
    delta = torch.where(real, packed_r + gamma * packed_v[:, 1:] - packed_v[:, :T], 0.0)
    gap = torch.arange(T)[None, :] - torch.arange(T)[:, None]
    discount = torch.where(gap >= 0, torch.tensor(gamma * lam, dtype=v.dtype) ** gap.clamp(min=0), 0.0)
    return (delta @ discount.T).gather(1, number.clamp(min=0))


def gae_all_ended(*, values: Tensor, rewards: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Arithmetic with the mask in place of `where`, and no bootstrap: every row counts as ended."""
    ahead, carry = torch.zeros(len(values), dtype=values.dtype), torch.zeros(len(values), dtype=values.dtype)
    columns: list[Tensor] = []
    for t in range(values.shape[1] - 1, -1, -1):
        m = mask[:, t].to(values.dtype)
        step = rewards[:, t] + gamma * ahead - values[:, t] + gamma * lam * carry
        ahead = m * values[:, t] + (1 - m) * ahead
        carry = m * step + (1 - m) * carry
        columns.insert(0, carry)
    return torch.stack(columns, dim=1)


# ------------------------------------------------------------------------------------------- n_step, reward_to_go
def n_step_loop(
    *, values: Tensor, rewards: Tensor, mask: Tensor, terminated: Tensor, next_value: Tensor, gamma: float, n: int
) -> Tensor:
    out = torch.zeros_like(values)
    for b in range(len(values)):
        places = [i for i in range(values.shape[1]) if mask[b, i]]
        v = [float(values[b, i]) for i in places] + [0.0 if terminated[b] else float(next_value[b])]
        for k, i in enumerate(places):
            end = min(k + n, len(places))
            total = sum(gamma ** (j - k) * float(rewards[b, places[j]]) for j in range(k, end))
            out[b, i] = total + gamma ** (end - k) * v[end]
    return out


def n_step_sweeps(
    *, values: Tensor, rewards: Tensor, mask: Tensor, truncated: Tensor, next_value: Tensor, gamma: float, n: int
) -> Tensor:
    """n backward sweeps: target^(k) = r + gamma target^(k-1) of the next action, target^(0) = V."""
    act = mask == 1
    target = values
    for _ in range(min(n, mask.shape[1])):
        after = torch.where(truncated, next_value, 0.0)
        new = torch.zeros_like(values)
        for t in reversed(range(values.shape[1])):
            new[:, t] = rewards[:, t] + gamma * after
            after = torch.where(act[:, t], target[:, t], after)
        target = new
    return target


def to_go_loop(*, rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    total = torch.zeros(len(rewards), dtype=rewards.dtype)
    columns = []
    for t in reversed(range(rewards.shape[1])):
        total = torch.where(mask[:, t] == 1, rewards[:, t] + gamma * total, total)
        columns.append(total)
    return torch.stack(columns[::-1], 1)


def to_go_cumsum(*, rewards: Tensor, completion_mask: Tensor, gamma: float) -> Tensor:
    """A reversed running sum of rewards discounted to the row's first action, brought back."""
    number = completion_mask.cumsum(1) - 1
    weight = gamma ** number.clamp(min=0).to(rewards.dtype)
    paid = torch.where(completion_mask == 1, rewards, 0.0) * weight
    return paid.flip(1).cumsum(1).flip(1) / weight


# ------------------------------------------------------------------------------- reward_placement, score_readout
def place_scatter(*, scores: Tensor, completion_mask: Tensor) -> Tensor:
    place = torch.arange(completion_mask.shape[1])
    last = torch.where(completion_mask == 1, place, -1).amax(1)
    out = torch.zeros(completion_mask.shape, dtype=scores.dtype)
    out.scatter_(1, last.clamp(min=0)[:, None], scores[:, None])
    return out * completion_mask


def place_loop(*, scores: Tensor, mask: Tensor) -> Tensor:
    out = torch.zeros(mask.shape, dtype=scores.dtype)
    for b, row in enumerate(mask.tolist()):
        if 1 in row:
            out[b, len(row) - 1 - row[::-1].index(1)] = scores[b]
    return out


def read_last_token(*, scores: Tensor, attention_mask: Tensor) -> Tensor:
    index = (attention_mask * torch.arange(attention_mask.shape[1])).argmax(1)
    return scores.gather(1, index[:, None])[:, 0]


def read_by_length(*, scores: Tensor, lengths: Tensor, side: str) -> Tensor:
    index = torch.full_like(lengths, -1) if side == "left" else lengths - 1
    return scores[torch.arange(len(scores)), index]


# ------------------------------------------------------------------------------------------------- group_baseline
def group_loop(*, rewards: Tensor, group_ids: Tensor) -> Tensor:
    """GRPO without std (Dr. GRPO)."""
    out = torch.zeros_like(rewards)
    for g in group_ids.unique():
        members = group_ids == g
        out[members] = rewards[members] - rewards[members].mean()
    return out


def group_scatter(*, rewards: Tensor, group_ids: Tensor) -> Tensor:
    """The same with sums by group."""
    key = group_ids
    _, number, count = key.unique(return_inverse=True, return_counts=True)
    total = torch.zeros(len(count), dtype=rewards.dtype).index_add(0, number, rewards)
    return rewards - (total / count)[number]


def group_view(*, rewards: Tensor, group_size: int) -> Tensor:
    """Contiguous groups of one size, divided by the standard deviation: GRPO as TRL writes it."""
    grouped = rewards.view(-1, group_size)
    mean = grouped.mean(dim=1)
    std = grouped.std(dim=1)
    mean, std = mean.repeat_interleave(group_size), std.repeat_interleave(group_size)
    return (rewards - mean) / (std + 1e-4)


def group_leave_one_out(*, rewards: Tensor, group_ids: Tensor) -> Tensor:
    """RLOO as a matrix; a group of one keeps its reward."""
    same = (group_ids[:, None] == group_ids[None, :]).to(rewards.dtype)
    others = same - torch.eye(len(rewards), dtype=rewards.dtype)
    return rewards - others @ rewards / others.sum(1).clamp(min=1)


def group_reshape_or_loop(*, rewards: Tensor, group_ids: Tensor) -> Tensor:
    """A reshape where groups are equal and contiguous, loops elsewhere; population deviation."""
    sizes = group_ids.unique_consecutive(return_counts=True)[1]
    contiguous = len(sizes) == len(group_ids.unique())
    if contiguous and (sizes == sizes[0]).all():
        grouped = rewards.view(-1, int(sizes[0]))
        centred = grouped - grouped.mean(1, keepdim=True)
        return (centred / (grouped.std(1, keepdim=True, correction=0) + 1e-6)).view(-1)
    out = torch.zeros_like(rewards)
    for g in group_ids.unique():
        rows = (group_ids == g).nonzero()[:, 0]
        out[rows] = (rewards[rows] - rewards[rows].mean()) / (rewards[rows].std(correction=0) + 1e-6)
    return out


def group_dropped(*, rewards: Tensor, keep: Tensor, group_size: int) -> Tensor:
    """Rows may have been dropped (too long, no answer): each baseline is over what is left of its group."""
    group_ids = torch.arange(len(rewards)) // group_size
    kept, ids = rewards[keep], group_ids[keep]
    total = torch.zeros(int(group_ids.max()) + 1, dtype=rewards.dtype)
    mean = total.index_add(0, ids, kept) / total.index_add(0, ids, torch.ones_like(kept)).clamp(min=1)
    advantages = kept - mean[ids]
    return advantages


# ------------------------------------------------------------------------------------------------------ whitening
def whiten_masked(*, x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    live = mask == 1
    clean = torch.where(live, x, 0.0)
    mean = clean.sum() / live.sum()
    variance = (torch.where(live, clean - mean, 0.0) ** 2).sum() / live.sum()
    white = (clean - mean) * torch.rsqrt(variance + 1e-8)
    return white if shift_mean else white + mean


def whiten_selected(*, x: Tensor, completion_mask: Tensor) -> Tensor:
    chosen = x[completion_mask == 1]
    return (x - chosen.mean()) / (chosen.std() + 1e-6)


# ---------------------------------------------------------------------------------------------------- kl_baseline
def kl_running(*, logprobs: list[Tensor], ref_logprobs: list[Tensor]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    count = 0
    for model, ref in zip(logprobs, ref_logprobs, strict=True):
        total += (model - ref).sum()
        count += len(model)
    return (total / count).clamp(min=0)


def kl_concatenated(*, logprobs: list[Tensor], ref_logprobs: list[Tensor]) -> float:
    return (torch.cat(logprobs) - torch.cat(ref_logprobs)).mean().item()


# --------------------------------------------------------------------------------------------------- kl_estimator
def k1(*, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    return logprobs - ref_logprobs


def k2(*, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    return 0.5 * (logprobs - ref_logprobs).square()


def k3(*, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    gap = torch.where(mask == 1, ref_logprobs - logprobs, 0.0)
    return gap.exp() - 1 - gap


def k3_straight_through(*, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The value of k3 with the gradient of k2."""
    gap = ref_logprobs - logprobs
    value, slope = torch.expm1(gap) - gap, 0.5 * gap.square()
    return value.detach() + slope - slope.detach()


# -------------------------------------------------------------------------------------------------- micro_batches
def micro_in_order(*, rows: dict[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    count = len(rows["input_ids"])
    return [{k: x[i : i + size] for k, x in rows.items()} for i in range(0, count, size)]


def micro_balanced(*, rows: dict[str, Tensor], lengths: Tensor, size: int) -> list[dict[str, Tensor]]:
    """Rows sorted by length, so that rows of one micro-batch need little padding."""
    order = lengths.argsort(descending=True)
    rows = {k: x[order] for k, x in rows.items()}
    return [dict(zip(rows, parts, strict=True)) for parts in zip(*(x.split(size) for x in rows.values()), strict=True)]


def micro_shuffled(*, rows: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    order = torch.randperm(len(rows["input_ids"]), generator=torch.Generator().manual_seed(seed))
    return {k: x[order] for k, x in rows.items()}


# ------------------------------------------------------------------------------------------------------- collator
def collate_right(rows: list[dict[str, Any]], *, pad_id: int) -> dict[str, Tensor]:
    """Lists first, tensors last."""
    ids = [[*r["prompt_ids"], *r["completion_ids"]] for r in rows]
    width = max(map(len, ids))
    acts = [[0] * len(r["prompt_ids"]) + r.get("completion_mask", [1] * len(r["completion_ids"])) for r in rows]
    fill = lambda x, empty: [row + [empty] * (width - len(row)) for row in x]  # noqa: E731
    return {
        "input_ids": torch.tensor(fill(ids, pad_id)),
        "attention_mask": torch.tensor(fill([[1] * len(row) for row in ids], 0)),
        "completion_mask": torch.tensor(fill(acts, 0)),
        "rewards": torch.tensor([r["reward"] for r in rows]),
    }


def collate_labels(rows: list[dict[str, Any]], *, pad_id: int, side: str) -> dict[str, Tensor]:
    """Either side, labels in place of a mask, position ids that know about left padding."""
    width = max(len(r["prompt_ids"]) + len(r["completion_ids"]) for r in rows)
    input_ids = torch.full((len(rows), width), pad_id)
    attention_mask, labels = torch.zeros_like(input_ids), torch.full_like(input_ids, -100)
    for b, r in enumerate(rows):
        ids = torch.tensor(r["prompt_ids"] + r["completion_ids"])
        span = slice(width - len(ids), width) if side == "left" else slice(0, len(ids))
        input_ids[b, span], attention_mask[b, span] = ids, 1
        trained = torch.tensor([0] * len(r["prompt_ids"]) + r.get("completion_mask", [1] * len(r["completion_ids"])))
        labels[b, span] = torch.where(trained == 1, ids, -100)
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, "position_ids": position_ids}


class CollatorWithPadId:
    """An object that knows its pad id, as Hugging Face collators are; rewards on the last action; left padding."""

    def __init__(self, pad_id: int = 0) -> None:
        self.pad_id = pad_id

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
        flip = lambda rows, empty: torch.nn.utils.rnn.pad_sequence(  # noqa: E731
            [torch.tensor(x[::-1]) for x in rows], batch_first=True, padding_value=empty
        ).flip(1)
        acts = [[0] * len(f["prompt_ids"]) + f.get("completion_mask", [1] * len(f["completion_ids"])) for f in features]
        completion_mask = flip(acts, 0)
        return {
            "input_ids": flip([f["prompt_ids"] + f["completion_ids"] for f in features], self.pad_id),
            "attention_mask": flip([[1] * len(a) for a in acts], 0),
            "completion_mask": completion_mask,
            "rewards": place_loop(scores=torch.tensor([f["reward"] for f in features]), mask=completion_mask),
        }


# -------------------------------------------------------------------------------------------------------- packing
def pack_first_fit(batch: TokenBatch, *, width: int) -> TokenBatch:
    return pack(batch, width)


def pack_in_order(batch: TokenBatch, *, width: int) -> dict[str, Tensor]:
    """Next fit, as plain tensors, with labels for the next token."""
    bins: list[list[int]] = [[]]
    used = 0
    lengths = batch.attention_mask.sum(1).tolist()
    for b, n in enumerate(lengths):
        if used + n > width:
            bins.append([])
            used = 0
        bins[-1].append(b)
        used += n
    P, N = len(bins), max(map(len, bins))
    wide = lambda like, empty=0: torch.full((P, width), empty, dtype=like.dtype)  # noqa: E731
    out = {k: wide(getattr(batch, k)) for k in ("input_ids", "attention_mask", "completion_mask", "rewards")}
    out |= {"segment_ids": wide(batch.input_ids), "position_ids": wide(batch.input_ids)}
    out |= {"labels": wide(batch.input_ids, -100), "shifted_labels": wide(batch.input_ids, -100)}
    out |= {"terminated": torch.ones(P, N, dtype=torch.bool), "weights": torch.zeros(P, N, dtype=batch.weights.dtype)}
    out["group_ids"] = torch.full((P, N), -1)
    for p, members in enumerate(bins):
        at = 0
        for n, b in enumerate(members):
            span = slice(at, at + lengths[b])
            for k in ("input_ids", "attention_mask", "completion_mask", "rewards"):
                out[k][p, span] = getattr(batch, k)[b, : lengths[b]]
            out["segment_ids"][p, span] = n + 1
            out["position_ids"][p, span] = torch.arange(lengths[b])
            act = batch.completion_mask[b, : lengths[b]] == 1
            labels = torch.where(act, batch.input_ids[b, : lengths[b]], -100)
            out["labels"][p, span] = labels
            out["shifted_labels"][p, at : at + lengths[b] - 1] = labels[1:]
            for k in ("terminated", "weights", "group_ids"):
                out[k][p, n] = getattr(batch, k)[b]
            at += lengths[b]
    return out


# ----------------------------------------------------------------------------------------------- token_statistics
def statistics_plain(*, logits: Tensor, labels: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    x = logits / temperature
    return x.gather(-1, labels[..., None])[..., 0], x.logsumexp(-1)


def logprobs_cross_entropy(*, hidden: Tensor, head: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    logits = (hidden @ head.T).flatten(0, 1) / temperature
    return -torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="none").view_as(labels)


def statistics_chunked(
    *,
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    soft_cap: float | None = None,
    chunk_size: int = 4,
) -> tuple[Tensor, Tensor]:
    """A chunk of tokens at a time: no more than chunk_size rows of logits are ever held."""
    flat, taken = hidden.flatten(0, 1), labels.flatten()
    chosen, level = [], []
    for h, a in zip(flat.split(chunk_size), taken.split(chunk_size), strict=True):
        x = h @ head.T
        x = x if bias is None else x + bias
        x = x * logit_scale
        if soft_cap is not None:
            x = soft_cap * torch.tanh(x / soft_cap)
        x = x / temperature
        chosen.append(x.gather(1, a[:, None])[:, 0])
        level.append(x.logsumexp(1))
    return torch.cat(chosen).view_as(labels), torch.cat(level).view_as(labels)


# ---------------------------------------------------------------------------------------------- fused_policy_loss
def policy_loss_plain(
    *, logits: Tensor, labels: Tensor, mask: Tensor, advantages: Tensor, old_logprobs: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    logp = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    ratio = torch.where(mask == 1, logp - old_logprobs, 0.0).exp()
    A = advantages[:, None]
    loss = -torch.minimum(ratio * A, ratio.clamp(1 - clip_low, 1 + clip_high) * A)
    return (loss * mask).sum() / mask.sum()


def policy_loss_fused(
    *,
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    mask: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor,
    is_ratio: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.3,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    soft_cap: float | None = None,
    chunk_size: int = 4,
) -> Tensor:
    """A row at a time, chunked inside by statistics_chunked; token mean over the whole batch."""
    total = torch.zeros((), dtype=hidden.dtype)
    for b in range(len(labels)):
        token_logit, level = statistics_chunked(
            hidden=hidden[b : b + 1],
            head=head,
            labels=labels[b : b + 1],
            temperature=temperature,
            logit_scale=logit_scale,
            soft_cap=soft_cap,
            chunk_size=chunk_size,
        )
        act = mask[b] == 1
        ratio = torch.where(act, (token_logit - level)[0] - old_logprobs[b], 0.0).exp()
        clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
        loss = -torch.minimum(ratio * advantages[b], clipped * advantages[b])
        if is_ratio is not None:
            loss = loss * torch.where(act, is_ratio[b], 0.0)
        total = total + torch.where(act, loss, 0.0).sum()
    return total / mask.sum()


ACCEPTED: dict[str, tuple[Callable[..., Any], ...]] = {
    "completion_mask": (mask_from_roles, mask_from_turns),
    "attention_mask": (attention_from_lengths, attention_from_rows, attention_of_completion),
    "response_length": (length_by_sum, length_by_loop),
    "truncated": (truncated_by_eos, truncated_by_reason),
    "gae": (gae_loop, gae_by_rows, gae_matrix, gae_all_ended),
    "n_step": (n_step_loop, n_step_sweeps),
    "reward_to_go": (to_go_loop, to_go_cumsum),
    "reward_placement": (place_scatter, place_loop),
    "score_readout": (read_last_token, read_by_length),
    "group_baseline": (group_loop, group_scatter, group_view, group_leave_one_out, group_reshape_or_loop, group_dropped),
    "whitening": (whiten_masked, whiten_selected),
    "kl_baseline": (kl_running, kl_concatenated),
    "kl_estimator": (k1, k2, k3, k3_straight_through),
    "micro_batches": (micro_in_order, micro_balanced, micro_shuffled),
    "collator": (collate_right, collate_labels, CollatorWithPadId()),
    "packing": (pack_first_fit, pack_in_order),
    "token_statistics": (statistics_plain, logprobs_cross_entropy, statistics_chunked),
    "fused_policy_loss": (policy_loss_plain, policy_loss_fused),
}
SINGLE_TURN: dict[str, tuple[Callable[..., Any], ...]] = {"completion_mask": (mask_after_prompt,)}
