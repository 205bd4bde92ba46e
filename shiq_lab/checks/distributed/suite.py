"""check_distributed: two processes over gloo on the CPU must find the gradient that one process finds.

What is tested is a function of yours, at the top of a module (other processes import it). Three kinds:

    kind="data"     step(model, batch, group) -> loss       every rank gets rows of its own, of unequal numbers of tokens
    kind="context"  step(model, batch, group) -> loss       every rank gets all rows; the step shares out the positions
    kind="vocab"    stats(hidden, head, batch, group) -> TokenStats
                    every rank gets all rows, hidden float[B, L, D] and its own V / size columns of the head, in order of
                    rank; autograd must give each rank the whole gradient by `hidden` and that of its own columns

`model` is a TabularLM, `batch` a TokenBatch, `group` the process group of all ranks, which is also the default one. The check
calls backward and then averages the parameters' gradients over the ranks, as DDP and FSDP do (combine="mean"), sums them
("sum"), or leaves them ("none": every rank has the whole gradient already). The truth is the same function in a world of one
process with all the rows; for "vocab" it is TokenStats.from_logits, which knows no processes. For example

    def step(model, batch, group):                             # in my_stack.py
        stats = TokenStats.from_logits(model(batch.input_ids, batch.attention_mask).logits, batch)
        tokens = batch.completion_mask.sum().double()
        dist.all_reduce(tokens, group=group)                   # of all ranks
        nll = (stats.logsumexp - stats.token_logit).sum()
        return nll * dist.get_world_size(group) / tokens       # times the ranks, since gradients are averaged

    check_distributed(step, kind="data")                       # or check_distributed("my_stack.py:step")

`data_parallel`, `context_parallel`, `vocab_parallel_stats` and `gathered_stats` of parallel.py are right ones.
"""

import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from shiq_lab.checks.distributed.address import address_of
from shiq_lab.checks.distributed.comparing import (
    Subject,
    an_empty_rank,
    gradients_agree,
    large_logits,
    reference_agrees,
    values_agree,
)
from shiq_lab.checks.distributed.processes import Processes
from shiq_lab.checks.distributed.scenario import DTYPES, Scenario
from shiq_lab.checks.report import Check, Report, Result
from shiq_lab.checks.runner import run_checks
from shiq_lab.errors import bad

KINDS = ("data", "context", "vocab")
COMBINE = ("mean", "sum", "none")
DISTRIBUTED_CHECKS = (
    Check(
        "DI",
        "gradients of two processes with unequal numbers of tokens equal one process's",
        gradients_agree,
        "Each rank divides by its own number of tokens before the average over ranks (weights 1 / tokens of the rank); or a "
        "factor for the number of ranks is missing or there twice; or a collective without gradient stands between a shard "
        "and the loss (all_reduce of torch.distributed is none that autograd follows).",
    ),
    Check(
        "DI-empty",
        "the same where one rank has no action at all",
        an_empty_rank,
        "A rank without actions divides by its own count of 0, or returns early and leaves a collective to the others.",
    ),
    Check(
        "DI-value",
        "the loss or the statistics equal one process's",
        values_agree,
        "A loss that is only logged may be scaled otherwise than its gradient; statistics of a sharded head must be equal.",
    ),
    Check(
        "IN",
        "policy and reference agree at the same weights",
        reference_agrees,
        "The reference's log-probs come by another path: another order of the shards, another dtype, tokens shifted by one.",
    ),
    Check(
        "DT",
        "a sharded log-sum-exp stands large logits",
        large_logits,
        "Each shard subtracts its own largest logit, or none: sums of exp must share the largest logit of all ranks.",
    ),
)


def check_distributed(
    step: Callable[..., Any] | str,
    kind: str = "data",
    *,
    combine: str = "mean",
    reference: Callable[..., Any] | str | None = None,
    empty_rank: bool = True,
    dtype: str = "float64",
    seed: int = 0,
    time_limit: float = 60.0,
    processes: Processes | None = None,
    name: str = "",
    expect_fail: Mapping[str, str] | None = None,
    strict: bool = False,
    on_result: Callable[[Result], None] | None = None,
) -> Report:
    """Two processes over gloo against one process: DI, DI-empty, DI-value, IN, DT of DISTRIBUTED_CHECKS.

    step        a function at the top of a module, or "file.py:name" or "package.module:name"; other processes import it, so
                guard a script with `if __name__ == "__main__":`
    kind        "data"     step(model, batch, group) -> loss, a scalar; every rank gets rows of its own
                "context"  step(model, batch, group) -> loss; every rank gets all rows, the step shares out the positions
                "vocab"    step(hidden, head, batch, group) -> TokenStats; every rank gets all rows, hidden float[B, L, D]
                           and its own V / size columns of the head, in order of rank
                model: shiq_lab.TabularLM, model(input_ids, attention_mask).logits; batch: shiq_lab.TokenBatch; group: the
                process group of all ranks, also the default one. The check calls backward
    combine     what happens to gradients over ranks afterwards: "mean" (as DDP and FSDP do), "sum", or "none" (every rank
                has the whole gradient already); not for "vocab"
    reference   "vocab": a function like step for the frozen reference's statistics, if they come by another path
    empty_rank  "data": stands a rank without actions
    dtype       of the fixtures: "float64" or "float32"
    time_limit  seconds a job; processes that hang are killed
    processes   a Processes to share between calls, since starting one takes seconds; its own time limit holds
    expect_fail {check: the reason why it must fail}; strict: warnings are failures; on_result(result): after each check
    Raises ValueError for arguments that are none of these; what the step does wrong is in the report. Right steps to start
    from: data_parallel, context_parallel and vocab_parallel_stats of shiq_lab.checks.distributed.parallel.
    """
    for argument, value, allowed in (("kind", kind, KINDS), ("combine", combine, COMBINE), ("dtype", dtype, tuple(DTYPES))):
        if value not in allowed:
            raise bad(argument, f"one of {', '.join(allowed)}", repr(value))
    if reference is not None and kind != "vocab":
        raise bad("reference", f"None for kind={kind!r}", repr(reference), "Only kind='vocab' compares log-probs.")
    if os.environ.get("SHIQ_LAB_WORKER"):
        remedy = 'Guard the script with `if __name__ == "__main__":`; the processes import it to find the step.'
        raise bad("check_distributed", "a call outside the processes that it starts", "one inside", remedy)
    payload = pickle.dumps((address_of("step", step), address_of("reference", reference)))
    scenario = Scenario(kind, dtype, combine, seed)
    name = name or (step if isinstance(step, str) else getattr(step, "__qualname__", repr(step)))
    with _borrowed(processes, time_limit) as pair:
        subject = Subject(payload, pair, scenario, reference is not None, empty_rank)
        return run_checks(
            DISTRIBUTED_CHECKS,
            subject,
            name=name,
            kind=f"distributed {kind}",
            expect_fail=expect_fail,
            strict=strict,
            on_result=on_result,
        )


@contextmanager
def _borrowed(processes: Processes | None, time_limit: float) -> Iterator[Processes]:
    """The caller's processes, left running, or ones of our own, ended afterwards."""
    if processes is not None:
        yield processes
        return
    with Processes(time_limit=time_limit) as own:
        yield own
