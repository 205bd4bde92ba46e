"""The checks: the answers of two processes against those of one, or against all logits at once."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shiq_lab.checks.distributed.processes import Processes
from shiq_lab.checks.distributed.scenario import DTYPES, RANKS, D, Scenario, V, sharded_head
from shiq_lab.checks.report import Measured, Skip
from shiq_lab.checks.rollout.oracle import toy_dialogue
from shiq_lab.checks.runner import SubjectError
from shiq_lab.stats import TokenStats

VISIBLE = 1000  # the gradient must be so many tolerances large, or a wrong weight of a rank could not be seen


@dataclass(eq=False)
class Subject:
    """A function under test, and what its processes answered."""

    payload: bytes
    processes: Processes
    base: Scenario
    with_reference: bool
    empty_rank: bool
    notes: list[str] = field(default_factory=list)
    _answers: dict[tuple[Scenario, int], Any] = field(default_factory=dict)

    def run(self, size: int = RANKS, **change: Any) -> list[dict[str, Any]]:
        """The answers to a scenario, asked once; what went wrong is a verdict each time."""
        key = (replace(self.base, **change), size)
        if key not in self._answers:
            try:
                self._answers[key] = self.processes.run(self.payload, key[0], size=size)
            except SubjectError as error:
                self._answers[key] = error
        if isinstance(self._answers[key], SubjectError):
            raise self._answers[key]
        return self._answers[key]

    @cached_property
    def eps(self) -> float:
        """The rounding of the dtype that the processes compute in."""
        return float(torch.finfo(DTYPES[self.base.dtype]).eps)

    @property
    def vocab(self) -> bool:
        """True where the vocabulary is split over the processes."""
        return self.base.kind == "vocab"


def gradients_agree(subject: Subject) -> Iterator[Measured]:
    """DI: gradients of two processes with unequal numbers of tokens equal one process's."""
    if subject.vocab:
        yield from sharded_gradients(subject)
        return
    for rows in ("unequal", "exchanged") if subject.base.kind == "data" else ("unequal",):
        yield from step_gradients(subject, rows)


def an_empty_rank(subject: Subject) -> Iterator[Measured]:
    """DI-empty: the same where one rank has rows but not a single action."""
    if subject.base.kind != "data":
        raise Skip("every rank gets all rows")
    if not subject.empty_rank:
        raise Skip("declared not to stand a rank without actions")
    yield from step_gradients(subject, "empty")


def step_gradients(subject: Subject, rows: str) -> Iterator[Measured]:
    """Gradient after combining against one process's with all rows."""
    ranks, (alone,) = subject.run(rows=rows), subject.run(size=1, rows=rows)
    truth, tokens = alone["gradient"], [answer["tokens"] for answer in ranks]
    if not math.isfinite(alone["loss"]) or not np.isfinite(truth).all():
        raise SubjectError(f"one process alone has a loss of {alone['loss']:g} or a gradient that is not finite ({rows} rows)")
    # The same terms summed in another order: each of the N partial sums is off by eps of what has been summed so far, which
    # is of the size of the gradient or, where terms cancel, of the loss, the sum of the terms' squares.
    N = truth.size + alone["tokens"]
    tolerance = N * subject.eps * (float(np.abs(truth).max()) + abs(alone["loss"]))
    shared = f"{tokens[0]} and {tokens[1]} tokens" if subject.base.kind == "data" else f"{tokens[0]} tokens on both ranks"
    hint = "The fixture must have a gradient: is the loss constant?"
    what = f"largest gradient of one process ({rows} rows)"
    if not np.abs(truth).max() >= VISIBLE * tolerance:
        yield Measured(what, float(np.abs(truth).max()), VISIBLE * tolerance, truth.size, at_least=True, hint=hint)
        return
    for rank in range(RANKS) if subject.base.combine == "none" else (0,):
        gap = np.abs(ranks[rank]["gradient"] - truth)
        gap[np.isnan(gap)] = np.inf
        worst = int(gap.argmax())
        detail = f"two processes {ranks[rank]['gradient'][worst]:.6g}, one {truth[worst]:.6g}"
        detail += diagnose(ranks, truth, subject.base) if not gap[worst] <= tolerance else ""
        state, token = divmod(worst, toy_dialogue().n_tokens)
        yield Measured(
            f"gradient of two processes minus one process's ({rows} rows)",
            float(gap[worst]),
            tolerance,
            gap.size,
            environment=shared,
            where=f"rank {rank}, state {state}, token {token} of the table",
            detail=detail,
        )


def diagnose(ranks: Sequence[dict[str, Any]], truth: np.ndarray, scenario: Scenario) -> str:
    """Whether all is off by one factor, or each rank by its own, in words; "" where neither fits."""
    found = ranks[0]["gradient"]
    if not np.isfinite(found).all():
        return "; it is not finite"
    factor = float(found @ truth / (truth @ truth))
    if np.abs(found - factor * truth).max() <= 1e-6 * np.abs(truth).max():
        return f"; it is {factor:.4g} times the one process's everywhere"
    share = 1 / RANKS if scenario.combine == "mean" else 1.0
    columns = np.stack([answer["local"] for answer in ranks], 1)  # (parameters, ranks)
    weights, *_ = np.linalg.lstsq(columns, truth, rcond=None)
    if np.abs(columns @ weights - truth).max() <= 1e-6 * np.abs(truth).max() and (weights != 0).all():
        parts = [f"rank {rank}'s tokens count {share / w:.4g} times what they should" for rank, w in enumerate(weights)]
        return "; " + ", ".join(parts)
    return ""


def sharded_truth(subject: Subject, **change: Any) -> tuple[list[np.ndarray], np.ndarray, np.ndarray, float]:
    """(statistics, gradient by hidden, gradient by head, largest logit) from all logits at once, without processes."""
    hidden, head, batch, weights = sharded_head(replace(subject.base, **change))
    hidden, head = hidden.requires_grad_(), head.requires_grad_()
    logits = hidden @ head
    stats = TokenStats.from_logits(logits, batch)
    found = [stats.token_logit, stats.logsumexp, stats.end_logsumexp]
    torch.stack([(w * x).sum() for w, x in zip(weights, found, strict=True)]).sum().backward()
    assert hidden.grad is not None and head.grad is not None
    return [x.detach().numpy() for x in found], hidden.grad.numpy(), head.grad.numpy(), float(logits.detach().abs().max())


def sharded_gradients(subject: Subject) -> Iterator[Measured]:
    """Gradients by hidden (every rank the whole) and by the head (every rank its columns)."""
    ranks = subject.run()
    _, by_hidden, by_head, _ = sharded_truth(subject)
    width = V // RANKS
    for rank, answer in enumerate(ranks):
        wanted = {"hidden": by_hidden, "head": by_head[:, rank * width : (rank + 1) * width]}
        for name, truth in wanted.items():
            gap = np.abs(answer[name] - truth)
            gap[np.isnan(gap)] = np.inf
            worst = tuple(int(i) for i in np.unravel_index(int(gap.argmax()), gap.shape))
            detail = f"sharded {answer[name][worst]:.6g}, whole {truth[worst]:.6g}"
            # A logit's gradient is a weight times a probability, off by a few eps, then summed over positions or tokens.
            tolerance = (by_hidden.size // D + V) * subject.eps * float(np.abs(truth).max())
            if not gap[worst] <= tolerance and not np.abs(answer[name]).any():
                detail += "; it is 0 everywhere"
            what = f"gradient by {name} of a head in {RANKS} shards minus that of the whole head"
            place = f"rank {rank}, {name}{list(worst)}"
            yield Measured(what, float(gap[worst]), tolerance, gap.size, where=place, detail=detail)


def values_agree(subject: Subject) -> Iterator[Measured]:
    """DI-value: the loss (combined over ranks) or the statistics equal one process's."""
    if subject.vocab:
        yield from sharded_statistics(subject)
        return
    if subject.base.kind == "context":
        raise Skip(
            "the loss of a rank that holds a part of the positions may carry a factor for the ranks; DI compares gradients"
        )
    ranks, (alone,) = subject.run(), subject.run(size=1)
    share = RANKS if subject.base.combine != "sum" else 1
    loss = sum(answer["loss"] for answer in ranks) / share
    tolerance = alone["tokens"] * subject.eps * max(abs(alone["loss"]), 1.0)  # as many terms, summed in another order
    name = "sum" if share == 1 else "mean"
    detail = f"{loss:.6g} against {alone['loss']:.6g}"
    gap = abs(loss - alone["loss"])
    yield Measured(f"{name} of the ranks' losses minus one process's", gap, tolerance, 1, warn_only=True, detail=detail)


def large_logits(subject: Subject) -> Iterator[Measured]:
    """DT: statistics of logits far beyond exp's range, which need the largest logit of all ranks."""
    if not subject.vocab:
        raise Skip("no head is sharded")
    yield from sharded_statistics(subject, scale=1000.0)


def sharded_statistics(subject: Subject, **change: Any) -> Iterator[Measured]:
    """The three statistics on every rank against those of all logits at once, where something is scored."""
    truth, _, _, largest = sharded_truth(subject, **change)
    *_, weights = sharded_head(replace(subject.base, **change))
    tolerance = 4 * (D + V) * subject.eps * largest  # a dot product of D terms, then a log-sum-exp of V, of that size
    for rank, answer in enumerate(subject.run(**change)):
        for name, found, wanted, weight in zip(
            ("token_logit", "logsumexp", "end_logsumexp"), answer["stats"], truth, weights, strict=True
        ):
            yield _entries(
                f"{name} of a head in {RANKS} shards minus that of the whole head", rank, found, wanted, weight, tolerance
            )


def reference_agrees(subject: Subject) -> Iterator[Measured]:
    """IN: at the same weights the policy's and the reference's log-probs are equal, so the ratio is 1 at step 0."""
    if not subject.vocab:
        raise Skip("a step returns no log-probs")
    if not subject.with_reference:
        raise Skip("no function for the reference's statistics was given")
    *_, largest = sharded_truth(subject)
    *_, weights = sharded_head(subject.base)
    for rank, answer in enumerate(subject.run()):
        policy, anchor = (answer[name][0] - answer[name][1] for name in ("stats", "reference"))
        what = "log-ratio of policy and reference at the same weights"
        yield _entries(what, rank, policy, anchor, weights[0], 8 * (D + V) * subject.eps * largest)


def _entries(what: str, rank: int, found: np.ndarray, wanted: np.ndarray, weight: Tensor, tolerance: float) -> Measured:
    """The largest difference where the weight is not 0."""
    live = weight.numpy() != 0
    gap = np.where(live, np.abs(found - wanted), 0.0)
    gap[np.isnan(gap)] = np.inf
    worst = tuple(int(i) for i in np.unravel_index(int(gap.argmax()), gap.shape))
    place = f"rank {rank}, row {worst[0]}" + (f", position {worst[1]}" if len(worst) > 1 else ", its end")
    detail = f"{found[worst]:.6g} against {wanted[worst]:.6g}"
    return Measured(what, float(gap[worst]), tolerance, int(live.sum()), where=place, detail=detail)
