"""Right subjects: ShiQ's loss shared out by rows or by positions, and the statistics of a head in shards."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shiq_lab.batch import TokenBatch
from shiq_lab.losses.shiq import shiq_loss
from shiq_lab.models.tabular import TabularLM
from shiq_lab.stats import TokenStats

BETA = 0.5


class SumOverRanks(torch.autograd.Function):
    """y = sum of x over the ranks; backward hands every rank its gradient of y: the ranks go on with one and the same loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class CopyToRanks(torch.autograd.Function):
    """y = x, which all ranks hold; backward adds up what each of them did with it. The transpose of SumOverRanks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def stats_and_reference(model: TabularLM, batch: TokenBatch) -> tuple[TokenStats, TokenStats]:
    """Statistics of the model and of its automaton's reference."""
    reference = TabularLM.reference(model.mdp).to(model.table.dtype)
    both = [m(batch.input_ids, batch.attention_mask).logits for m in (model, reference)]
    return TokenStats.from_logits(both[0], batch), TokenStats.from_logits(both[1], batch)


def data_parallel(model: TabularLM, batch: TokenBatch, group: Any) -> Tensor:
    """ShiQ's token mean over the rows of all ranks: sum of rho^2 here, by the tokens of all, times the number of ranks."""
    stats, ref = stats_and_reference(model, batch)
    size = dist.get_world_size(group)
    tokens = batch.completion_mask.sum().to(stats.logsumexp.dtype)
    total = tokens.clone()
    dist.all_reduce(total, group=group)
    loss = shiq_loss(stats, ref, batch, beta=BETA, reduction="sum")
    return loss * size / total


def context_parallel(model: TabularLM, batch: TokenBatch, group: Any) -> Tensor:
    """ShiQ's token mean with positions shared out in blocks: statistics are gathered, gradient goes to the own block.

    Each rank has the whole loss but a share of its gradient, and the average over ranks would halve it: times the ranks.
    """
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    place = torch.arange(batch.input_ids.shape[1])
    own = place * size // len(place) == rank  # (L,)
    stats, ref = stats_and_reference(model, batch)
    merge = lambda x, here: SumOverRanks.apply(torch.where(here, x, 0.0), group)  # noqa: E731
    stats = TokenStats(
        token_logit=merge(stats.token_logit, own[:-1]),
        logsumexp=merge(stats.logsumexp, own[:-1]),
        end_logsumexp=merge(stats.end_logsumexp, own[batch.last_index()]),
    )
    loss = shiq_loss(stats, ref, batch, beta=BETA, reduction="sum") / batch.completion_mask.sum()
    return loss * size


def vocab_parallel_stats(hidden: Tensor, head: Tensor, batch: TokenBatch, group: Any) -> TokenStats:
    """TokenStats of hidden @ head where each rank holds V / size columns: no rank ever sees all the logits.

    lse = m + ln sum over ranks of sum exp(own logits - m), m the largest logit of all; the taken logit is its owner's.
    """
    first = dist.get_rank(group) * head.shape[1]
    logits = CopyToRanks.apply(hidden, group) @ head  # (B, L, V / size)
    top = logits.detach().amax(-1)
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    level = top + SumOverRanks.apply((logits - top[..., None]).exp().sum(-1), group).log()
    column = batch.input_ids[:, 1:] - first
    mine = (column >= 0) & (column < head.shape[1])
    picked = logits[:, :-1].gather(-1, column.clamp(0, head.shape[1] - 1)[..., None])[..., 0]
    chosen = SumOverRanks.apply(torch.where(mine, picked, 0.0), group)
    return masked_stats(chosen, level, batch)


def gathered_stats(hidden: Tensor, head: Tensor, batch: TokenBatch, group: Any) -> TokenStats:
    """The same without gradient from the whole head, put together again from all ranks: a reference path."""
    parts = [torch.empty_like(head) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, head.detach().contiguous(), group=group)
    whole = torch.cat(parts, 1)  # (D, V)
    return TokenStats.from_logits(hidden.detach() @ whole, batch)


def masked_stats(chosen: Tensor, level: Tensor, batch: TokenBatch) -> TokenStats:
    """TokenStats from the taken logits float[B, L-1] and the log-sum-exps float[B, L], 0 where nothing is scored."""
    here = batch.completion_mask[:, 1:] == 1
    end = level.gather(1, batch.last_index()[:, None])[:, 0]
    return TokenStats(
        token_logit=torch.where(here, chosen, 0.0),
        logsumexp=torch.where(here, level[:, :-1], 0.0),
        end_logsumexp=torch.where(batch.terminated, 0.0, end),
    )
