"""What the relatives see of a row: its return, its log-ratio to the reference, its log-probability; groups and pairs of rows.

    R(y)     = sum_k gamma^k r_k                        discounted from the row's first action
    l(y)     = sum_k gamma^k ln(pi / pi_ref)(a_k|s_k)   discounted alike, or for gamma < 1 no loss of whole rows keeps pi*
    R_b(y)   = R(y) - beta l(y)                         the regularised return: J = E R_b
    ln pi(y) = sum_k ln pi(a_k|s_k)                     never discounted: it is the score of the whole row

At pi* of a deterministic world R_b(y) = v*(prompt) for every row, which is what most of the relatives regress on.
Groups are rows of the same id, and all group sums are segment sums.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from shiq_lab.batch import TokenBatch
from shiq_lab.errors import bad
from shiq_lab.losses.residuals import Actions, Reduction, actions_of, check_arguments, reduce
from shiq_lab.stats import TokenStats


@dataclass(frozen=True, eq=False)
class Sequences:
    """Rows (packed: segments [B, N]) as numbers; only what comes from the policy carries gradient.

    log_ratio  float[B]     l(y)
    returns    float[B]     R(y)
    log_prob   float[B]     ln pi(y)
    length     float[B]     how many actions
    token_log_prob, token_log_ratio  float[B, T]   the same an action, undiscounted; 0 behind the last
    discount   float[B, T]  gamma^k, k counted from the first action of the row or segment
    """

    log_ratio: Tensor
    returns: Tensor
    log_prob: Tensor
    length: Tensor
    token_log_prob: Tensor
    token_log_ratio: Tensor
    discount: Tensor
    actions: Actions

    def regularised(self, beta: float) -> Tensor:
        """R_b(y) = R(y) - beta l(y), float[B]."""
        return self.returns - beta * self.log_ratio


def sequences_of(
    policy_stats: TokenStats, ref_stats: TokenStats, batch: TokenBatch, beta: float, gamma: float, *, whole: bool = True
) -> Sequences:
    """The sequence statistics of a batch. `whole`: a return is asked for, so a cut row is a ValueError."""
    check_arguments(policy_stats, ref_stats, batch, beta, gamma, None)
    live = batch.weights > 0
    if whole and not bool((batch.terminated | ~live).all()):
        row = int((~batch.terminated & live).nonzero()[0][0])
        raise bad(
            "batch", "rows that terminated: a return needs the whole row", f"row {row}, which was cut",
            "Drop cut rows, batch.select(batch.terminated), or take a loss that bootstraps (shiq_loss, pcl_loss, tbrm_loss).",
        )  # fmt: skip
    actions = actions_of(batch)
    log_prob = actions.of(policy_stats.token_logit - policy_stats.logsumexp)
    log_ratio = log_prob - actions.of(ref_stats.token_logit - ref_stats.logsumexp).detach()
    discount = gamma ** place_of(actions).to(log_prob.dtype)
    add = lambda x: reduce(x, batch, actions, "none")  # noqa: E731
    return Sequences(
        log_ratio=add(discount * log_ratio),
        returns=add(discount * actions.of(batch.rewards[:, 1:].to(log_prob.dtype))),
        log_prob=add(log_prob),
        length=add(actions.real.to(log_prob.dtype)),
        token_log_prob=log_prob,
        token_log_ratio=log_ratio,
        discount=discount,
        actions=actions,
    )


def place_of(actions: Actions) -> Tensor:
    """int[B, T]: the action's number in its row or segment, from 0."""
    slot = torch.arange(actions.real.shape[1], device=actions.real.device).expand(actions.real.shape)
    first = torch.ones_like(actions.real)
    first[:, 1:] = actions.segment[:, 1:] != actions.segment[:, :-1]
    start = torch.where(first, slot, 0)
    return slot - (start.cummax(1).values if start.numel() else start)


def reduce_rows(rows: Tensor, weights: Tensor, reduction: Reduction) -> Tensor:
    """Losses a row (or a pair): as they are for "none", their weighted sum, or their weighted mean."""
    if reduction not in ("mean", "sum", "none"):
        raise bad("reduction", "'mean', 'sum' or 'none'", repr(reduction))
    if reduction == "none":
        return rows
    weights = weights.to(rows.dtype)
    total = (weights * rows).sum()
    return total / weights.sum() if reduction == "mean" else total


# --------------------------------------------------------------------------------------------------------------- groups
@dataclass(frozen=True, eq=False)
class Groups:
    """Rows of the same group id. `share` float[B] adds up to `mass` in every group.

    The rows of a sample count one each; in a listing (`population`) a row counts its probability, batch.weights.
    """

    index: Tensor  # int[B], the group's number, from 0
    share: Tensor  # float[B]
    mass: Tensor  # float[G]
    population: bool

    def total(self, x: Tensor) -> Tensor:
        """Sum of share * x over the group of each row, float[B]."""
        flat = torch.zeros_like(self.mass, dtype=x.dtype).index_add(0, self.index, (self.share * x).reshape(-1))
        return flat[self.index].reshape(x.shape)

    def mean(self, x: Tensor) -> Tensor:
        """The mean over the group of each row, itself included, float[B]."""
        return self.total(x) / self.size

    def others(self, x: Tensor) -> Tensor:
        """The mean over the group's other rows; in a population the expected one, which is the mean itself."""
        return self.mean(x) if self.population else (self.total(x) - x) / (self.size - 1).clamp(min=1)

    def variance(self, x: Tensor) -> Tensor:
        """The group's variance, float[B]: divided by G - 1 in a sample, exact in a population."""
        squares = self.total((x - self.mean(x)) ** 2)
        return squares / (self.size if self.population else (self.size - 1).clamp(min=1))

    @property
    def size(self) -> Tensor:
        """The mass of each row's group, float[B]."""
        return self.mass[self.index].reshape(self.share.shape).clamp(min=torch.finfo(self.mass.dtype).tiny)


def groups_of(batch: TokenBatch, dtype: torch.dtype, *, population: bool, least: int = 1) -> Groups:
    """The batch's groups; `least`: how many rows a sampled group needs, else a ValueError."""
    _, index = torch.unique(batch.group_ids.reshape(-1), return_inverse=True)
    live = batch.weights > 0
    share = batch.weights.to(dtype) if population else live.to(dtype)
    count = int(index.max()) + 1 if index.numel() else 0
    mass = torch.zeros(count, dtype=dtype, device=share.device).index_add(0, index, share.reshape(-1))
    small = (mass[index].reshape(share.shape) < least) & live
    if not population and bool(small.any()):
        group = int(batch.group_ids[small][0])
        got = f"{int(mass[index].reshape(share.shape)[small][0])} in group {group}"
        raise bad("batch.group_ids", f"groups of at least {least} rows", got, "population=True is for listings.")
    return Groups(index, share, mass, population)


# ---------------------------------------------------------------------------------------------------------------- pairs
@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of rows: their indices int[N] and the weight float[N] of each."""

    first: Tensor
    second: Tensor
    weight: Tensor

    def difference(self, x: Tensor) -> Tensor:
        """x of the first row minus x of the second, float[N]."""
        return x[self.first] - x[self.second]


def halves(batch: TokenBatch, *, same_group: bool = True) -> Pairs:
    """The pairs of the contract's layout: first half of the rows chosen, second half rejected, in the same order."""
    if batch.segment_ids is not None:
        raise bad("batch", "rows that are not packed", "packed rows", "Pair rows before packing.")
    if len(batch) % 2:
        raise bad("batch", "an even number of rows, the first half chosen, the second rejected", f"{len(batch)} rows")
    index = torch.arange(len(batch), device=batch.input_ids.device)
    first, second = index[: len(batch) // 2], index[len(batch) // 2 :]
    for name, apart in (("group_ids", same_group), ("weights", True)):
        values = getattr(batch, name)
        wrong = values[first] != values[second]
        if apart and bool(wrong.any()):
            pair = int(wrong.nonzero()[0])
            got = f"{values[first][pair].item()} and {values[second][pair].item()} in pair {pair}"
            raise bad(f"batch.{name}", "the same in both rows of a pair", got)
    return Pairs(first, second, batch.weights[first])


def all_pairs(batch: TokenBatch, *, same_group: bool = True) -> Pairs:
    """All ordered pairs of two independent draws from a listing, a row with itself included.

    weight = w_i w_j / (the mass of the group), so that prompts keep their probability; same_group=False pairs rows of
    different prompts too, which is a mistake that the fixed-point table shows.
    """
    if batch.segment_ids is not None:
        raise bad("batch", "rows that are not packed", "packed rows", "Pair rows before packing.")
    group = batch.group_ids if same_group else torch.zeros_like(batch.group_ids)
    _, index, count = torch.unique(group, return_inverse=True, return_counts=True)
    order = torch.argsort(index, stable=True)  # rows of a group stand together
    partners = count[index[order]]
    first = order.repeat_interleave(partners)
    number = torch.arange(len(first), device=first.device) - (partners.cumsum(0) - partners).repeat_interleave(partners)
    second = order[(count.cumsum(0) - count)[index[first]] + number]
    mass = torch.zeros(len(count), dtype=batch.weights.dtype, device=first.device).index_add(0, index, batch.weights)[index]
    mass = mass.clamp(min=torch.finfo(mass.dtype).tiny)
    return Pairs(first, second, batch.weights[first] * batch.weights[second] / mass[first])
