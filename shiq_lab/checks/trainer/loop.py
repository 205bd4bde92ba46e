"""A plain training loop around any contract loss: the accepted trainer that check_trainer is tested with, and a template."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shiq_lab.batch import TokenBatch, pack
from shiq_lab.checks.trainer.rows import Example, TrainerConfig, collate
from shiq_lab.checks.traits import REDUCTIONS
from shiq_lab.errors import bad

ContractLoss = Callable[..., Tensor]


class PlainLoop:
    """step(rows): collate, two forward passes, a contract loss, backward, SGD; micro-batches add up to the whole batch.

    loss        as the contract of check_loss has it; it may also name weights, group_ids, behavior_logprobs, segment_ids,
                position_ids, and any of config.options
    reduction   what its scalar is: "sum", "row mean" or "token mean"; so many rows, or tokens, a micro-batch counts for
    gradient    of model.table, summed over the optimiser steps of the last call
    """

    def __init__(
        self,
        model: nn.Module,
        ref_model: nn.Module,
        dataset: Sequence[Example],
        config: TrainerConfig,
        *,
        loss: ContractLoss,
        reduction: str = "row mean",
    ) -> None:
        self.model, self.ref_model, self.config = model, ref_model, config
        self.loss, self.reduction = loss, reduction
        self.model.eval()  # dropout off: the two log-probabilities of a ratio must be of the same network
        self.ref_model.eval()
        self.table: nn.Parameter = model.table  # type: ignore[assignment]
        self.optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=config.lr)
        self.gradient = torch.zeros_like(self.table)

    def step(self, rows: Sequence[Example]) -> float:
        """Trains on the rows; the mean loss of its optimiser steps."""
        self.gradient = torch.zeros_like(self.table)
        losses = []
        for window in self.config.micro_batches(rows):
            self.optimizer.zero_grad()
            losses.append(self.accumulate(window, self.size([row for micro in window for row in micro])))
            self.gradient += 0.0 if self.table.grad is None else self.table.grad
            self.optimizer.step()
        return sum(losses) / len(losses)

    def accumulate(self, window: Sequence[Sequence[Example]], whole: int) -> float:
        """The gradient of an optimiser step's micro-batches, as if they were one batch; returns that batch's loss.

        whole: the size of that batch, in what the loss's mean is over.
        """
        total = 0.0
        for micro in window:
            share = 1.0 if self.reduction == "sum" else self.size(micro) / whole
            loss = self.loss_of(micro, self.model, self.ref_model) * share
            loss.backward()
            total += loss.item()
        return total

    def evaluate(self, rows: Sequence[Example]) -> float:
        """The loss of the rows in one batch, without gradient."""
        with torch.no_grad():
            return self.loss_of(rows, self.model, self.ref_model).item()

    # --------------------------------------------------------------------------------------------------- the parts
    def size(self, micro: Sequence[Example]) -> int:
        """What the loss's mean is over: rows (or pairs), or the policy's tokens."""
        if self.reduction == "row mean":
            return len(micro)
        return int(collate(micro, self.config).completion_mask.sum())

    def batch_of(self, rows: Sequence[Example]) -> TokenBatch:
        """One padded batch, or packed rows that hold two of the longest."""
        batch = collate(rows, self.config)
        return pack(batch, 2 * int(batch.attention_mask.sum(1).max())) if self.config.packing else batch

    def loss_of(self, rows: Sequence[Example], model: nn.Module, ref_model: nn.Module) -> Tensor:
        """The contract loss of some rows; gradient flows through `model` alone."""
        batch = self.batch_of(rows)
        return call_loss(self.loss, self.logits(model, batch), self.ref_logits(ref_model, batch), batch, self.config)

    def ref_logits(self, ref_model: nn.Module, batch: TokenBatch) -> Tensor:
        """The reference's forward pass, without gradient."""
        with torch.no_grad():
            return self.logits(ref_model, batch)

    def logits(self, model: nn.Module, batch: TokenBatch) -> Tensor:
        """A forward pass; models that name them get positions that skip padding, and the numbers of packed segments."""
        named = inspect.signature(model.forward).parameters
        given: dict[str, Tensor] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if "position_ids" in named:
            counted = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
            given["position_ids"] = counted if batch.position_ids is None else batch.position_ids
        if "segment_ids" in named and batch.segment_ids is not None:
            given["segment_ids"] = batch.segment_ids
        return model(**given).logits


def call_loss(loss: ContractLoss, logits: Tensor, ref_logits: Tensor, batch: TokenBatch, config: TrainerConfig) -> Tensor:
    """The loss with the contract's arguments, and with those of the further ones that it names."""
    given: dict[str, Any] = {
        "logits": logits,
        "ref_logits": ref_logits,
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "completion_mask": batch.completion_mask,
        "rewards": batch.rewards.to(logits.dtype),
        "terminated": batch.terminated,
        "beta": config.beta,
        "gamma": config.gamma,
    }
    further = {
        "weights": batch.weights,
        "group_ids": batch.group_ids,
        "behavior_logprobs": token_logprobs(logits, batch).detach(),
        "segment_ids": batch.segment_ids,
        "position_ids": batch.position_ids,
        **config.options,
    }
    named = inspect.signature(loss).parameters
    return loss(**given, **{name: value for name, value in further.items() if name in named})


def token_logprobs(logits: Tensor, batch: TokenBatch) -> Tensor:
    """ln pi of every token that the policy chose, float[B, L]; 0 elsewhere."""
    acts = batch.completion_mask[:, 1:] == 1
    scored = torch.where(acts[..., None], logits[:, :-1], 0.0).log_softmax(-1)
    taken = torch.where(acts, batch.input_ids[:, 1:], 0)
    picked = torch.where(acts, scored.gather(-1, taken[..., None])[..., 0], 0.0)
    return torch.nn.functional.pad(picked, (1, 0))


def plain_loop(loss: ContractLoss, *, reduction: str = "row mean", loop: type[PlainLoop] = PlainLoop, **traits: Any) -> Any:
    """A factory for check_trainer from a contract loss. Traits are those of check_trainer: kind, packing, multi_turn, ..."""
    if reduction not in REDUCTIONS[:3]:
        raise bad("reduction", "'sum', 'row mean' or 'token mean'", repr(reduction))

    def factory(model: nn.Module, ref_model: nn.Module, dataset: Sequence[Example], config: TrainerConfig) -> PlainLoop:
        return loop(model, ref_model, dataset, config, loss=loss, reduction=reduction)

    factory.__name__ = f"{loop.__name__} with {getattr(loss, '__name__', 'a loss')}"
    factory.trainer_traits = traits  # type: ignore[attr-defined]
    return factory
