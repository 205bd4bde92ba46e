"""The trainer across processes, micro-batches, precisions, adapters and kills: always what one undisturbed process does."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hf_worker
import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.slow  # starts processes, imports transformers
Job = dict[str, Any]


@pytest.fixture(scope="module", autouse=True)
def _hf() -> None:
    pytest.importorskip("transformers", reason="the extra hf is not installed")


def worst(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference over all tensors, relative to each one's largest entry (at least 1)."""
    assert a.keys() == b.keys() and len(a) > 0
    return max(((a[k] - b[k]).abs().max() / (1 + b[k].abs().max())).item() for k in b)


def worst_log(a: list[dict[str, float]], b: list[dict[str, float]], names: tuple[str, ...]) -> float:
    assert len(a) == len(b) > 0
    return max(abs(x[name] - y[name]) / (1 + abs(y[name])) for x, y in zip(a, b, strict=True) for name in names)


METRICS = ("dv", "rho", "abs_rho", "log_ratio", "reward", "margin", "grad_norm")


# -------------------------------------------------------------------------------------------------- two processes
@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Job]]:
    """What both processes found, job by job."""
    folder, port = tmp_path_factory.mktemp("two"), hf_worker.free_port()
    children = [hf_worker.start("together", folder, rank=rank, port=port) for rank in (0, 1)]
    try:
        codes = [child.wait(280) for child in children]
    finally:
        [child.kill() for child in children]
    assert codes == [0, 0], "\n".join((folder / f"log together {rank}").read_text()[-2000:] for rank in (0, 1))
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """The same steps by one process with batches of four."""
    folder = tmp_path_factory.mktemp("one")
    return {how: hf_worker.ddp(folder, reduction=how, batch=4) for how in ("row", "token")}


# float64; the same products, summed over two processes in another order: a few ulp of weights up to 4 after three steps. The
# engine logs the loss in float32.
STEPS_BOUND, LOSS_BOUND = 1e-13, 1e-6


@pytest.mark.parametrize("job", ["row", "token", "accumulated"])
def test_two_processes_are_one(two: list[dict[str, Job]], one: dict[str, Job], job: str) -> None:
    """Rows of 2 to 17 policy tokens and weights of 0.5 to 2.5, so the counts differ; 2 x 2 rows, or 2 x 2 x 1."""
    alone = one["token" if job == "token" else "row"]
    assert alone["world"] == 1 and worst(alone["weights"], hf_worker.weights(hf_worker.llama())) > 1e-2
    for rank in two:
        assert (rank[job]["world"], rank[job]["wrapped"]) == (2, "DistributedDataParallel")
        assert worst(rank[job]["weights"], alone["weights"]) <= STEPS_BOUND
        assert worst_log(rank[job]["logs"], alone["logs"], METRICS) <= STEPS_BOUND
        assert worst_log(rank[job]["logs"], alone["logs"], ("loss",)) <= LOSS_BOUND
    assert {len(log) for log in alone["logs"]} == {11}


@pytest.mark.parametrize(
    ("bug", "seen_in"), [("local count", "weights"), ("no factor", "weights"), ("local metrics", "metrics")]
)
def test_bugs_of_two_processes_are_seen(two: list[dict[str, Job]], one: dict[str, Job], bug: str, seen_in: str) -> None:
    """Planted: divided by the own count; the mean over processes not made up for; metrics of one process alone."""
    found, alone = two[0][bug], one["row"]
    assert (worst(found["weights"], alone["weights"]) > 1e-2) == (seen_in == "weights")
    assert worst_log(found["logs"], alone["logs"], METRICS) > 1e-2


def test_both_processes_compute_the_reference(two: list[dict[str, Job]], one: dict[str, Job]) -> None:
    """Four parts of three rows: two parts each, all four alone."""
    assert [rank["row"]["computed"] for rank in two] == [[3, 3], [3, 3]] and one["row"]["computed"] == [3, 3, 3, 3]


@pytest.mark.parametrize("job", ["fsdp", "fsdp tied", "fsdp head"])
def test_a_sharded_model_is_the_whole_one(two: list[dict[str, Job]], job: str) -> None:
    """FSDP2, each process with half of the rows; the head in the root's group, tied, or a group of its own.

    Its weight gathered by hand in place of its forward gave the right statistics and one process's gradient.
    """
    from shiq_lab import shiq_loss
    from shiq_lab.hf import heads

    model = hf_worker.llama(tie_word_embeddings=job == "fsdp tied")
    heads.answer_columns(model)
    batch = hf_worker.half_of(hf_worker.rows(8), 0, 1)
    stats = heads.statistics(model, batch, fused=True)
    parts = [stats.token_logit, stats.logsumexp, stats.end_logsumexp]
    loss = shiq_loss(stats, type(stats)(*map(torch.zeros_like, parts)), batch, beta=0.5, reduction="sum") / 8
    loss.backward()
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(wanted) == len(list(model.parameters())) and worst(wanted, {k: 0 * v for k, v in wanted.items()}) > 1
    for rank, found in enumerate(jobs[job] for jobs in two):
        assert found["kinds"] == ["DTensor"] and found["same without gradient"]
        for mine, all_ in zip(found["statistics"], parts, strict=True):
            torch.testing.assert_close(mine, all_.detach().chunk(2)[rank], rtol=1e-13, atol=1e-13)
        assert abs(found["loss"] - loss.item()) <= 1e-13 * loss.item()
        assert worst(found["gradients"], wanted) <= 1e-13


def test_sharding_in_bf16_does_not_round_the_statistics(two: list[dict[str, Job]]) -> None:
    """Two floats a token keep float32. Planted: as two real tensors they leave the model in bf16."""
    for jobs in two:
        kept, lost = jobs["fsdp bf16"]["logsumexp"], jobs["fsdp bf16 bug"]["logsumexp"]
        kept = kept[kept != 0]
        assert kept.dtype == torch.float32 and (kept != kept.bfloat16().float()).float().mean() > 0.9
        assert lost.dtype == torch.bfloat16 and jobs["fsdp bf16"]["gradients"]


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="the engine's own FSDP needs CUDA: on CPU it raises or falls back to DDP"
)
def test_the_engines_own_fsdp_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process on one GPU, FSDP2 through the trainer: its layers are FSDP modules and the weights DTensors."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    for name, value in {
        "RANK": 0,
        "LOCAL_RANK": 0,
        "WORLD_SIZE": 1,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": hf_worker.free_port(),
    }.items():
        monkeypatch.setenv(name, str(value))
    wrap = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    options = {
        "use_cpu": False,
        "ddp_backend": "nccl",
        "fsdp": "full_shard auto_wrap",
        "fsdp_config": wrap,
        "bf16": True,
        "max_steps": 2,
    }
    made = hf_worker.trainer(hf_worker.llama(dtype=torch.float32), hf_worker.rows(8), tmp_path, **options)
    made.train()
    assert isinstance(made.model_wrapped, FSDPModule)
    assert all(isinstance(p, DTensor) for p in made.model_wrapped.parameters())
    torch.distributed.destroy_process_group()


# ---------------------------------------------------------------------------------------------- gradient accumulation
def two_steps(folder: Path, each: int, times: int, **options: Any) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    batch = {"per_device_train_batch_size": each, "gradient_accumulation_steps": times, "max_steps": 2}
    made = hf_worker.trainer(hf_worker.llama(), hf_worker.rows(32), folder, **batch, **options)
    made.train()
    return hf_worker.weights(made.model), made.state.log_history[:2]


@pytest.mark.parametrize("reduction", ["row", "token"])
def test_micro_batches_are_one_batch(tmp_path: Path, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 rows at once, 2 x 8 and 4 x 4: float64, so a few ulp. Planted: each micro-batch divided by its own count."""
    from shiq_lab.hf.trainer import ShiQTrainer

    whole, logs = two_steps(tmp_path, 16, 1, reduction=reduction)
    assert worst(whole, hf_worker.weights(hf_worker.llama())) > 1e-2
    for each, times in ((8, 2), (4, 4)):
        found, said = two_steps(tmp_path, each, times, reduction=reduction)
        assert worst(found, whole) <= STEPS_BOUND and worst_log(said, logs, METRICS) <= STEPS_BOUND
        assert worst_log(said, logs, ("loss",)) <= LOSS_BOUND
    plain = ShiQTrainer.compute_loss
    monkeypatch.setattr(ShiQTrainer, "compute_loss", lambda *args, num_items_in_batch=None, **kw: plain(*args, **kw) / 4)
    assert worst(two_steps(tmp_path, 4, 4, reduction=reduction)[0], whole) > 1e-3


# ------------------------------------------------------------------------------------------------------------- kills
@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Folders of runs ended by kill -9: behind step 5, and while checkpoint 6 was being written."""
    folders = {where: tmp_path_factory.mktemp(where) for where in ("step", "checkpoint")}
    children = {where: hf_worker.start("train", folder, where=where) for where, folder in folders.items()}
    for where, folder in folders.items():
        hf_worker.wait_for(folder / ("writing" if where == "checkpoint" else "at step 5"), children[where])
        os.kill(children[where].pid, signal.SIGKILL)
        assert children[where].wait(30) == -signal.SIGKILL
    yield folders


@pytest.fixture(scope="module")
def unharmed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return hf_worker.killable(tmp_path_factory.mktemp("unharmed"))


@pytest.mark.parametrize("where", ["step", "checkpoint"])
def test_a_killed_run_goes_on_to_the_same_weights(killed: dict[str, Path], unharmed: dict[str, Tensor], where: str) -> None:
    """AdamW, shuffled rows, a falling learning rate: bit for bit, as one core repeats the same float32 operations."""
    from transformers.trainer_utils import get_last_checkpoint

    from shiq_lab.hf.trainer import last_checkpoint

    folder = killed[where]
    found = last_checkpoint(folder)
    assert found == str(folder / "checkpoint-4")
    if where == "checkpoint":  # the engine's own choice is the half-written one
        half = folder / "checkpoint-6"
        assert (half / "model.safetensors").exists() and not (half / "trainer_state.json").exists()
        assert get_last_checkpoint(str(folder)) == str(half)
    after = hf_worker.killable(folder, resume=found)
    assert worst(after, unharmed) == 0
    assert worst(unharmed, hf_worker.weights(hf_worker.llama(dtype=torch.float32))) > 1e-2


@pytest.mark.parametrize("lost", ["optimizer.pt", "scheduler.pt", "all but the weights"])
def test_what_a_checkpoint_must_hold(tmp_path: Path, unharmed: dict[str, Tensor], lost: str) -> None:
    """Planted: without the moments, the place in the schedule or in the data, a run goes on to other weights."""
    options = {"save_steps": 4}
    hf_worker.killable(tmp_path, **options)
    start = tmp_path / "checkpoint-4"
    if lost == "all but the weights":
        state = json.loads((start / "trainer_state.json").read_text())
        (start / "trainer_state.json").write_text(json.dumps(state | {"global_step": 0, "epoch": 0}))
    else:
        (start / lost).unlink()
    if lost == "scheduler.pt":  # the engine loads both or neither
        (start / "optimizer.pt").unlink()
    after = hf_worker.killable(tmp_path, resume=str(start), **options)
    assert worst(after, unharmed) > 1e-4


def test_half_written_checkpoints_are_passed_over(tmp_path: Path) -> None:
    from shiq_lab.hf.trainer import last_checkpoint

    assert last_checkpoint(tmp_path) is None
    for step, state in ((2, '{"global_step": 2}'), (10, '{"global_step": 10}'), (12, '{"global_st'), (14, ""), (16, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")  # by number, not by name
    shutil.rmtree(tmp_path / "checkpoint-10")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


# -------------------------------------------------------------------------------------------------------- PEFT
def test_lora_trains_and_saves_the_adapter_alone(tmp_path: Path) -> None:
    from peft import PeftModel

    from shiq_lab.hf import heads

    model = hf_worker.lora(hf_worker.llama())
    before = hf_worker.weights(model)
    made = hf_worker.trainer(model, hf_worker.rows(8), tmp_path, max_steps=3)
    made.train()
    after = hf_worker.weights(model)
    moved = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert moved == {name for name in after if "lora_" in name} and len(moved) == 8
    made.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    again = PeftModel.from_pretrained(hf_worker.llama(), str(tmp_path / "adapter"), autocast_adapter_dtype=False)
    batch = hf_worker.half_of(hf_worker.rows(8), 0, 1)
    with torch.no_grad():
        said, wanted, plain = (heads.statistics(m, batch, fused=False).logsumexp for m in (again, model, hf_worker.llama()))
    assert torch.equal(said, wanted) and (said - plain).abs().max() > 1e-3


# -------------------------------------------------------------------------------------------------------- precision
def step(model: Any, folder: Path, **options: Any) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The log of one step over eight rows, and the gradients it made (a learning rate of 1 and plain SGD show them)."""
    before = hf_worker.weights(model)
    batch = {"per_device_train_batch_size": 8, "max_steps": 1, "learning_rate": 1.0}
    made = hf_worker.trainer(model, hf_worker.rows(8), folder, **{**batch, **options})
    made.train()
    after = hf_worker.weights(made.model)
    return made.state.log_history[0], {name: before[name] - after[name] for name in before}


def test_bf16_drifts_no_more_than_its_products(tmp_path: Path) -> None:
    """Reference and policy round alike, so Dv is exactly 0 and the loss the same before the first update.

    A gradient goes through at most 7 products a layer and the head's, forward and backward, each rounded to 2^-9 of its size:
    2 (2 * 7 + 1) 2^-9 = 6 % in norm if all errors add up.
    """
    (exact, grads), (half, rounded) = (
        step(hf_worker.llama(dtype=torch.float32), tmp_path, bf16=bf16) for bf16 in (False, True)
    )  # fmt: skip
    assert half["dv"] == exact["dv"] == 0
    assert (
        max(abs(half["log_ratio"]), abs(exact["log_ratio"])) < 1e-5
    )  # (a - b) - a + b is rounded in float32, at 4, a few times
    assert half["loss"] == pytest.approx(exact["loss"], rel=1e-6)
    drift = {n: ((rounded[n] - g).norm() / g.norm()).item() for n, g in grads.items()}
    assert 1e-4 < max(drift.values()) <= 2 * (2 * 7 + 1) * 2.0**-9, drift


def test_a_reference_in_another_precision_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the reference in float32, the policy in bf16: Dv is no longer 0 at the start."""
    import contextlib

    from shiq_lab.hf.trainer import ShiQTrainer

    plain = ShiQTrainer._compute_reference

    def in_float32(self: Any, model: Any, some: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(self.accelerator, "autocast", contextlib.nullcontext)
            return plain(self, model, some)

    monkeypatch.setattr(ShiQTrainer, "_compute_reference", in_float32)
    log, _ = step(hf_worker.llama(dtype=torch.float32), tmp_path, bf16=True)
    assert abs(log["dv"]) > 1e-6 and abs(log["log_ratio"]) > 1e-4


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "LoRA"])
def test_gradient_checkpointing_changes_no_gradient(tmp_path: Path, adapted: bool) -> None:
    """The same operations twice: the same bits."""
    make = (lambda: hf_worker.lora(hf_worker.llama())) if adapted else hf_worker.llama
    (plain_log, plain), (log, again) = (step(make(), tmp_path, activation_checkpointing=on) for on in (False, True))
    assert all(torch.equal(again[n], g) for n, g in plain.items()) and max(g.abs().max() for g in plain.values()) > 1e-2
    assert {k: log[k] for k in (*METRICS, "loss")} == {k: plain_log[k] for k in (*METRICS, "loss")}
