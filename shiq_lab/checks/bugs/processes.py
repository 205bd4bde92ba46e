"""Bugs of several processes, each planted in a right step by one edit. What travels to the processes is the bug's id."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch.distributed as dist
from torch import Tensor

from shiq_lab.checks.bugs.plant import Bug, plant
from shiq_lab.checks.distributed.parallel import context_parallel, data_parallel, gathered_stats, vocab_parallel_stats
from shiq_lab.checks.distributed.processes import Processes
from shiq_lab.checks.distributed.suite import check_distributed
from shiq_lab.checks.report import Report


@dataclass(frozen=True)
class Case:
    """What check_distributed is given: a step of a kind, and for sharded heads the reference's path."""

    step: Callable[..., Any]
    kind: str
    reference: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Planted:
    """The wrong function of a bug, rebuilt by its id in whatever process calls it."""

    id: str

    def __call__(self, *args: Any) -> Any:
        return wrong(self.id)(*args)


@cache
def shared_processes() -> Processes:
    """One pair for all the bugs: they end with this process."""
    return Processes(time_limit=30.0)


def suite(case: Case) -> Report:
    """check_distributed on the shared pair."""
    return check_distributed(
        case.step,
        case.kind,
        reference=case.reference,
        processes=shared_processes(),
        name=getattr(case.step, "__name__", repr(case.step)),
    )


def unseen_sum(x: Tensor, group: Any) -> Tensor:
    """A plain all_reduce in place: the other ranks' part comes without gradient."""
    total = x.clone()
    dist.all_reduce(total.detach(), group=group)
    return total


# The log-sum-exp is masked to the rank that owns the token and summed: right in value, and only the owner's shard has gradient.
OWNERS = """level = torch.cat([unseen_sum(torch.where(mine, level[:, :-1], 0.0), group), level[:, -1:]], 1)
    return masked_stats(chosen, level, batch)"""
EDITS: dict[str, tuple[Callable[..., Any], tuple[str, str]]] = {
    "E14": (gathered_stats, ("torch.cat(parts, 1)", "torch.stack(parts, 2).flatten(1)")),
    "G4": (data_parallel, ("loss * size / total", "loss / tokens")),
    "G5": (context_parallel, ("return loss * size", "return loss * size * size")),
    "J8": (vocab_parallel_stats, ("return masked_stats(chosen, level, batch)", OWNERS)),
}


@cache
def wrong(bug: str) -> Callable[..., Any]:
    """The function with the bug in."""
    function, edit = EDITS[bug]
    return plant(function, edit, unseen_sum=unseen_sum)


BUGS = [
    Bug(
        "E14",
        "NeMo-Aligner#227",
        "reference and policy differ at step 0",
        "the reference's log-probs come by another path, which takes the head's shards in another order",
        "D",
        right=Case(vocab_parallel_stats, "vocab", gathered_stats),
        wrong=Case(vocab_parallel_stats, "vocab", Planted("E14")),
        suite=suite,
    ),
    Bug(
        "G4",
        "prime-rl#2562",
        "tokens count differently on each rank",
        "each rank divides by its own number of tokens, then gradients are averaged",
        "D",
        right=Case(data_parallel, "data"),
        wrong=Case(Planted("G4"), "data"),
        suite=suite,
    ),
    Bug(
        "G5",
        "SkyRL#1751",
        "the loss doubles with context parallelism",
        "the factor for the context-parallel ranks is there twice",
        "D",
        right=Case(context_parallel, "context"),
        wrong=Case(Planted("G5"), "context"),
        suite=suite,
    ),
    Bug(
        "J8",
        "ms-swift#9947",
        "vocabulary shards that do not own the token get a wrong gradient",
        "a plain all_reduce takes the log-sum-exp from the shard that owns the token",
        "D",
        right=Case(vocab_parallel_stats, "vocab"),
        wrong=Case(Planted("J8"), "vocab"),
        suite=suite,
    ),
]
