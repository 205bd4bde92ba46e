"""check_distributed: right steps of several styles pass, each planted bug is caught, and nothing hangs or is left behind."""

import math
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.nn.functional as with_gradient
from torch import Tensor

from shiq_lab.batch import TokenBatch, concatenate
from shiq_lab.checks.bugs.plant import Bug
from shiq_lab.checks.bugs.processes import BUGS, Planted, shared_processes
from shiq_lab.checks.distributed.address import address_of
from shiq_lab.checks.distributed.parallel import (
    BETA,
    CopyToRanks,
    SumOverRanks,
    context_parallel,
    data_parallel,
    gathered_stats,
    masked_stats,
    stats_and_reference,
    vocab_parallel_stats,
)
from shiq_lab.checks.distributed.processes import Processes
from shiq_lab.checks.distributed.scenario import RANKS, Scenario, V, sharded_head, shards, table_model
from shiq_lab.checks.distributed.suite import DISTRIBUTED_CHECKS, check_distributed
from shiq_lab.checks.report import FAILED, PASSED, SKIPPED, WARNED, Report
from shiq_lab.losses.shiq import shiq_gradient, shiq_loss
from shiq_lab.models.tabular import TabularLM
from shiq_lab.stats import TokenStats

BASE = Scenario("data", "float64", "mean", seed=0)


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    """The pair that the planted bugs use, shared by every test of this file in this process."""
    pair = shared_processes()
    yield pair
    pair.close()
    assert not _leftovers(pair) and not Path(pair._folder).exists()


def statuses(report: Report) -> dict[str, str]:
    return {r.name: r.status for r in report.results}


# ----------------------------------------------------------------------------------------------------- right steps
def sum_of_shares(model: TabularLM, batch: TokenBatch, group: Any) -> Tensor:
    """For stacks that add gradients up: the same without the factor; uses the default group."""
    stats, ref = stats_and_reference(model, batch)
    total = batch.completion_mask.sum()
    dist.all_reduce(total)
    return shiq_loss(stats, ref, batch, beta=BETA, reduction="sum") / total


def all_reduced_loss(model: TabularLM, batch: TokenBatch, group: Any) -> Tensor:
    """The loss of all on every rank, by the all_reduce that has a gradient: its backward adds up all the ranks' ones."""
    return with_gradient.all_reduce(sum_of_shares(model, batch, group), group=group)


def row_mean(model: TabularLM, batch: TokenBatch, group: Any) -> Tensor:
    """Mean over rows, in a loop over them; another reduction and another style."""
    stats, ref = stats_and_reference(model, batch)
    rows = torch.tensor(len(batch))
    dist.all_reduce(rows, group=group)
    each = shiq_loss(stats, ref, batch, beta=BETA, reduction="none")
    total = each.sum() * 0
    for value in each:
        total = total + value / rows * dist.get_world_size(group)
    return total


def everything_everywhere(model: TabularLM, batch: TokenBatch, group: Any) -> Tensor:
    """Every rank computes the whole loss: nothing is left to combine."""
    stats, ref = stats_and_reference(model, batch)
    return shiq_loss(stats, ref, batch, beta=BETA)


def gathered_vocabulary(hidden: Tensor, head: Tensor, batch: TokenBatch, group: Any) -> TokenStats:
    """All logits on every rank, each shard put in its place and summed; slow and simple."""
    logits = CopyToRanks.apply(hidden, group) @ head
    first = dist.get_rank(group) * head.shape[1]
    wide = torch.nn.functional.pad(logits, (first, V - head.shape[1] - first))
    return TokenStats.from_logits(SumOverRanks.apply(wide, group), batch)


RIGHT: list[tuple[Any, str, dict[str, Any]]] = [
    (data_parallel, "data", {}),
    (data_parallel, "data", {"dtype": "float32"}),
    (sum_of_shares, "data", {"combine": "sum"}),
    (all_reduced_loss, "data", {}),
    (row_mean, "data", {}),
    (context_parallel, "context", {}),
    (everything_everywhere, "context", {"combine": "none"}),
    (everything_everywhere, "context", {"combine": "mean"}),
    (vocab_parallel_stats, "vocab", {"reference": gathered_stats}),
    (vocab_parallel_stats, "vocab", {"reference": vocab_parallel_stats, "dtype": "float32"}),
    (gathered_vocabulary, "vocab", {}),
]


def _name(value: object) -> str:
    """The same in every process: a function's name, never its address."""
    if isinstance(value, dict):
        return "-".join(f"{k}={_name(v)}" for k, v in value.items())
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize(("step", "kind", "options"), RIGHT, ids=_name)
def test_a_right_step_passes(step: Any, kind: str, options: dict[str, Any], processes: Processes) -> None:
    report = check_distributed(step, kind, processes=processes, **options)
    assert report.passed and not report.failed
    ran = {"data": {"DI", "DI-empty", "DI-value"}, "context": {"DI"}, "vocab": {"DI", "DI-value", "DT"}}[kind]
    ran |= {"IN"} if "reference" in options else set()
    assert statuses(report) == {check.name: PASSED if check.name in ran else SKIPPED for check in DISTRIBUTED_CHECKS}
    assert report["DI"].compared > 100 and all(r.reason for r in report.results if r.status == SKIPPED)


def test_the_truth_by_another_road(processes: Processes) -> None:
    """One process's gradient is the closed form F3 of all rows, which knows neither processes nor autograd."""
    (alone,) = _jobs(processes, data_parallel, BASE, size=1)
    batch, model = concatenate(shards(BASE)), table_model(BASE)
    stats, ref = stats_and_reference(model, batch)
    by_stats = shiq_gradient(stats, ref, batch, beta=BETA)
    logits = model(batch.input_ids, batch.attention_mask).logits
    again = TokenStats.from_logits(logits, batch)
    parts = [(getattr(by_stats, n) * getattr(again, n)).sum() for n in ("token_logit", "logsumexp", "end_logsumexp")]
    torch.stack(parts).sum().backward()
    assert model.table.grad is not None
    expected = model.table.grad.numpy().reshape(-1) / int(batch.completion_mask.sum())
    np.testing.assert_allclose(alone["gradient"], expected, rtol=0, atol=1e-13)
    assert np.abs(expected).max() > 0.1


def _jobs(processes: Processes, step: Any, scenario: Scenario, size: int = RANKS) -> list[dict[str, Any]]:
    return processes.run(pickle.dumps((address_of("step", step), None)), scenario, size=size)


def test_the_fixtures_are_what_they_claim() -> None:
    """Unequal tokens, rows that end and rows that are cut on the long side, tokens in both shards of the head."""
    few, many = shards(BASE)
    assert int(few.completion_mask.sum()) * 3 < int(many.completion_mask.sum())
    assert 0 < int((~many.terminated).sum()) < len(many)
    exchanged = shards(Scenario("data", "float64", "mean", 0, rows="exchanged"))
    assert torch.equal(exchanged[0].input_ids, many.input_ids)
    empty, _ = shards(Scenario("data", "float64", "mean", 0, rows="empty"))
    assert len(empty) == 4 and int(empty.completion_mask.sum()) == 0
    _, _, batch, weights = sharded_head(Scenario("vocab", "float64", "mean", 0))
    taken = batch.input_ids[batch.completion_mask == 1]
    assert (taken < V // 2).any() and (taken >= V // 2).any()
    assert all((w != 0).any() for w in weights)


# ----------------------------------------------------------------------------------------------------- planted bugs
CAUGHT = {
    "E14": (["IN"], "IN", "log-ratio of policy and reference at the same weights: "),
    "G4": (
        ["DI", "DI-empty"],
        "DI",
        "; rank 0's tokens count 2.818 times what they should, rank 1's tokens count 0.6078 times",
    ),
    "G5": (["DI"], "DI", "; it is 2 times the one process's everywhere"),
    "J8": (["DI"], "DI", "gradient by hidden of a head in 2 shards minus that of the whole head: "),
}


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.id)
def test_a_planted_bug_is_caught(bug: Bug, processes: Processes) -> None:
    """G4's factors by hand: 62 tokens, 11 and 51 a rank: 62 / (2 * 11) = 2.818 and 62 / (2 * 51) = 0.6078."""
    right, wrong = bug.suite(bug.right), bug.suite(bug.wrong)
    assert right.passed and not right.failed
    failed, check, words = CAUGHT[bug.id]
    assert wrong.failed == failed and right[check].status == PASSED
    result = wrong[check]
    assert words in result.message and "rank " in result.where and result.hint
    assert result.measured > 1e6 * result.tolerance  # type: ignore[operator]


def test_every_row_of_the_layer_is_planted() -> None:
    assert [bug.id for bug in BUGS] == list(CAUGHT)
    assert {bug.layer for bug in BUGS} == {"D"}


def test_the_owners_shard_alone_is_right(processes: Processes) -> None:
    """J8 has the right statistics, so a check of values alone accepts it: only gradients tell."""
    report = check_distributed(Planted("J8"), "vocab", processes=processes)
    assert report["DI-value"].status == PASSED and report["DI"].status == FAILED


def forgotten_copy(hidden: Tensor, head: Tensor, batch: TokenBatch, group: Any) -> TokenStats:
    """The hidden states' gradient stays the own shard's part."""
    logits = hidden @ head
    first = dist.get_rank(group) * head.shape[1]
    wide = torch.nn.functional.pad(logits, (first, V - head.shape[1] - first))
    return TokenStats.from_logits(SumOverRanks.apply(wide, group), batch)


def own_maximum(hidden: Tensor, head: Tensor, batch: TokenBatch, group: Any) -> TokenStats:
    """No shared maximum: right until exp overflows."""
    logits = CopyToRanks.apply(hidden, group) @ head
    level = SumOverRanks.apply(logits.exp().sum(-1), group).log()
    exact = gathered_vocabulary(hidden, head, batch, group)
    chosen = torch.nn.functional.pad(exact.token_logit, (0, 0))
    return masked_stats(chosen, level, batch)


def context_parallel_on_one_rank(model: TabularLM, batch: TokenBatch, group: Any) -> Tensor:
    """Rank 0 has all the gradient, the others none, and the average is taken over all."""
    loss = everything_everywhere(model, batch, group)
    return loss if dist.get_rank(group) == 0 else loss * 0


def summed_and_averaged(model: TabularLM, batch: TokenBatch, group: Any) -> Tensor:
    """The factor for the ranks forgotten where gradients are averaged."""
    return sum_of_shares(model, batch, group)


def gradient_stops(model: TabularLM, batch: TokenBatch, group: Any) -> Tensor:
    """A loss without any gradient to compare."""
    return data_parallel(model, batch, group).detach() + 0 * model.table[model.allowed].sum()


def early_return(model: TabularLM, batch: TokenBatch, group: Any) -> Tensor:
    """Divides by the rank's own tokens, and those are 0 on an empty rank: 0 / 0."""
    stats, ref = stats_and_reference(model, batch)
    return shiq_loss(stats, ref, batch, beta=BETA, reduction="sum") / batch.completion_mask.sum()


@pytest.mark.parametrize(
    ("step", "kind", "failed", "words"),
    [
        (forgotten_copy, "vocab", ["DI"], "gradient by hidden of a head in 2 shards"),
        (own_maximum, "vocab", ["DT"], "logsumexp of a head in 2 shards minus that of the whole head: inf"),
        (context_parallel_on_one_rank, "context", ["DI"], "; it is 0.5 times the one process's everywhere"),
        (summed_and_averaged, "data", ["DI", "DI-empty"], "; it is 0.5 times the one process's everywhere"),
        (early_return, "data", ["DI", "DI-empty"], "gradient of two processes minus one process's"),
        (gradient_stops, "data", ["DI", "DI-empty"], "largest gradient of one process"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_other_mistakes_are_caught(step: Any, kind: str, failed: list[str], words: str, processes: Processes) -> None:
    report = check_distributed(step, kind, processes=processes)
    assert report.failed == failed and words in report[failed[0]].message


def test_what_is_only_logged_is_a_warning_and_a_failure_under_strict(processes: Processes) -> None:
    report = check_distributed(sum_of_shares, combine="sum", processes=processes)
    assert report["DI-value"].status == PASSED
    logged = check_distributed(Planted("G4"), processes=processes)["DI-value"]
    assert logged.status == WARNED and "mean of the ranks' losses minus one process's" in logged.message
    assert "DI-value" in check_distributed(Planted("G4"), processes=processes, strict=True).failed


def test_an_empty_rank_can_be_declared_away(processes: Processes) -> None:
    report = check_distributed(data_parallel, processes=processes, empty_rank=False)
    assert report.passed and report["DI-empty"].reason == "declared not to stand a rank without actions"


# ------------------------------------------------------------------------------------------------ what steps may do
def a_number(model: TabularLM, batch: TokenBatch, group: Any) -> float:
    return 1.0


def no_gradient(model: TabularLM, batch: TokenBatch, group: Any) -> Tensor:
    return data_parallel(model, batch, group).detach()


def not_finite(model: TabularLM, batch: TokenBatch, group: Any) -> Tensor:
    return data_parallel(model, batch, group) * math.nan


def raises_on_rank_1(model: TabularLM, batch: TokenBatch, group: Any) -> Tensor:
    """The other rank is left in a collective."""
    if dist.get_rank() == 1:
        raise RuntimeError("no such\ncolumn")
    return data_parallel(model, batch, group)


def hangs(model: TabularLM, batch: TokenBatch, group: Any) -> Tensor:
    if dist.get_rank() == 1:
        time.sleep(1000)
    return data_parallel(model, batch, group)


def dies(model: TabularLM, batch: TokenBatch, group: Any) -> Tensor:
    if dist.get_rank() == 1:
        print("segmentation fault", file=sys.stderr, flush=True)
        os._exit(3)
    return data_parallel(model, batch, group)


def _leftovers(processes: Processes) -> list[int]:
    return [child.pid for child in processes._children if child.poll() is None]


def test_a_step_that_raises_on_one_rank_gets_a_verdict(processes: Processes) -> None:
    """At once, and from the rank that raised, though the other waits for it; the next check runs as ever."""
    begin = time.monotonic()
    report = check_distributed(raises_on_rank_1, processes=processes, empty_rank=False)
    assert report["DI"].message == "rank 1 of 2 raised RuntimeError: no such"
    assert report["DI-value"].message == report["DI"].message  # not asked again
    assert time.monotonic() - begin < 25
    assert check_distributed(data_parallel, processes=processes).passed


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (a_number, "raised TypeError: returned a float, expected a scalar tensor"),
        (no_gradient, "raised TypeError: returned a tensor without gradient"),
        (not_finite, "one process alone has a loss of nan or a gradient that is not finite (unequal rows)"),
        ("no_such_module:step", "raised ModuleNotFoundError: No module named 'no_such_module'"),
    ],
)
def test_what_is_no_step_gets_a_verdict(step: Any, message: str, processes: Processes) -> None:
    """Where every rank has answered, the processes live on."""
    check_distributed(data_parallel, processes=processes)
    starts = processes.starts
    assert check_distributed(step, processes=processes)["DI"].message.endswith(message)
    assert check_distributed(data_parallel, processes=processes).passed and processes.starts == starts


@pytest.mark.slow
def test_a_step_that_hangs_or_dies_gets_a_verdict() -> None:
    with Processes(time_limit=5.0) as pair:
        message = check_distributed(dies, processes=pair, empty_rank=False)["DI"].message
        assert message == "rank 1 of 2 died with exit code 3: segmentation fault"
        assert not _leftovers(pair)
        begin = time.monotonic()
        report = check_distributed(hangs, processes=pair, empty_rank=False)
        assert report.failed == ["DI", "DI-value"] and time.monotonic() - begin < 30
        assert "after 5 s" in report["DI"].message or "rank 0 of 2 raised" in report["DI"].message  # gloo's limit is the same
        assert not _leftovers(pair)


@pytest.mark.slow
def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    """Also where that one is killed and can clean nothing up."""
    script = tmp_path / "start.py"
    script.write_text(
        "import os, signal\n"
        "from shiq_lab.checks.distributed.processes import Processes\n"
        "pair = Processes()\n"
        "pair._start()\n"
        "print(*[child.pid for child in pair._children], flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    out = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False, env=env)
    pids = [int(pid) for pid in out.stdout.split()]
    assert len(pids) == RANKS
    end = time.monotonic() + 15
    while any(_alive(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.2)
    assert not any(_alive(pid) for pid in pids)
    assert not list(tmp_path.glob("shiq_lab_*"))


def _alive(pid: int) -> bool:
    """Running: neither gone nor a zombie that nobody has waited for."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
def test_a_users_own_file_and_script(tmp_path: Path) -> None:
    """By "file.py:name" from elsewhere; and a script that checks its own function, guarded and not."""
    source = (
        "import torch.distributed as dist\n"
        "from shiq_lab.stats import TokenStats\n"
        "from shiq_lab.checks.distributed.suite import check_distributed\n"
        "def step(model, batch, group):\n"
        "    stats = TokenStats.from_logits(model(batch.input_ids, batch.attention_mask).logits, batch)\n"
        "    tokens = batch.completion_mask.sum().double()\n"
        "    dist.all_reduce(tokens, group=group)\n"
        "    nll = (stats.logsumexp - stats.token_logit).sum()\n"
        "    return nll * dist.get_world_size(group) / tokens\n"
    )
    file = tmp_path / "my_stack.py"
    file.write_text(source)
    report = check_distributed(f"{file}:step")
    assert report.passed and report.subject == f"{file}:step"
    for guard, passed in ((True, "True"), (False, "False")):
        call = "report = check_distributed(step, empty_rank=False)\n    print(report.passed, report['DI'].message)\n"
        body = "if __name__ == '__main__':\n    " + call if guard else call.replace("\n    ", "\n")
        script = tmp_path / f"script_{passed}.py"
        script.write_text(source + body)
        out = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=True)
        assert out.stdout.startswith(passed), out
        assert guard or "Guard the script with `if __name__" in out.stdout


@pytest.mark.parametrize(
    ("step", "options", "message"),
    [
        (data_parallel, {"kind": "tensor"}, "kind: expected one of data, context, vocab, got 'tensor'."),
        (data_parallel, {"combine": "max"}, "combine: expected one of mean, sum, none, got 'max'."),
        (data_parallel, {"dtype": "int8"}, "dtype: expected one of float64, float32, got 'int8'."),
        (data_parallel, {"time_limit": 0}, "time_limit: expected a finite number of seconds > 0, got 0."),
        ("step", {}, "step: expected 'path/to/file.py:name' or 'package.module:name', got 'step'."),
        (3, {}, "step: expected a function, got int."),
        (
            lambda *a: None,
            {},
            "step: expected a function at the top of a module, got <lambda>. "
            "Put it at the top of a module, with def: other processes import it.",
        ),
        (
            data_parallel,
            {"kind": "vocab", "reference": lambda *a: None},
            "reference: expected a function at the top of a module",
        ),
        ("nofile.py:x", {}, "step: expected a file that exists, got 'nofile.py:x'. There is no "),
        (data_parallel, {"reference": data_parallel}, "Only kind='vocab' compares log-probs."),
    ],
)
def test_bad_arguments_are_named(step: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="expected") as error:
        check_distributed(step, **options)
    assert message in str(error.value)


def test_what_no_other_process_can_find_in_a_script(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a script functions go by file and name, which a lambda, an inner function and an object do not have."""
    mine = lambda *a: None  # noqa: E731
    monkeypatch.setattr(mine, "__module__", "__main__")
    monkeypatch.setattr(mine, "__qualname__", "<lambda>")

    class Step:
        def __call__(self, *a: Any) -> None: ...

    monkeypatch.setattr(Step, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "__file__", __file__, raising=False)
    monkeypatch.setattr(Processes, "_start", lambda self: pytest.fail("a process was started"))
    with pytest.raises(ValueError, match=r"^step: expected a function at the top of a module, got <lambda>\."):
        check_distributed(mine)
    with pytest.raises(ValueError, match=r"^step: expected a function at the top of a module, got an object of Step\."):
        check_distributed(Step())


def test_an_unknown_option_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"^check_distributed\(\) got an unexpected keyword argument 'foo'"):
        check_distributed(data_parallel, foo=1)  # type: ignore[call-arg]


def test_the_docstring_holds_the_contract() -> None:
    told = check_distributed.__doc__ or ""
    assert "step(model, batch, group) -> loss" in told and "step(hidden, head, batch, group) -> TokenStats" in told
    assert "at the top of a module" in told and "shiq_lab.checks.distributed.parallel" in told


def test_not_inside_its_own_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHIQ_LAB_WORKER", "1")
    with pytest.raises(ValueError, match="expected a call outside the processes that it starts"):
        check_distributed(data_parallel)
