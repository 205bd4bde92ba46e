"""A tiny model, rows and a trainer that several tests share, and the jobs that launched processes run.

Run as `python hf_worker.py JOB FOLDER [json options]`, by one process or, under a launcher's environment variables, by several.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

os.environ.setdefault("HF_HUB_OFFLINE", "1")
V = 41
STEPS = 8
LENGTHS = (3, 17, 4, 9, 2, 12, 6, 5)  # policy tokens a row, again and again: very unequal


def llama(seed: int = 0, dtype: torch.dtype = torch.float64, **values: Any) -> Any:
    """Two layers of 16; weights large enough that its logits differ from token to token."""
    import transformers

    torch.manual_seed(seed)
    small: dict[str, Any] = {
        "vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**{**small, **values})).to(dtype)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4.0 if weight.ndim > 1 else 1.0)
    return model


def lora(model: Any) -> Any:
    """Its adapter is not at zero, so it counts from the first step on."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    return wrapped.to(next(model.parameters()).dtype)


def rows(n: int = 16, seed: int = 0) -> list[Any]:
    """Rows of unequal length, reward and weight, one in four cut; two a group."""
    from shiq_lab.hf.rows import Row

    draw = torch.Generator().manual_seed(seed)
    out = []
    for i in range(n):
        actions = LENGTHS[i % len(LENGTHS)]
        mask = [0, 0] + [1] * actions
        ids = torch.randint(3, V, (len(mask),), generator=draw).tolist()
        reward = torch.randn(actions, generator=draw).tolist()
        out.append(Row(ids, mask, [0.0, 0.0, *reward], terminated=i % 4 != 3, weight=0.5 + i % 3, group=i // 2))
    return out


def trainer(model: Any, data: Any, folder: Path | str, *, ref_model: Any = None, callbacks: Any = None, **options: Any) -> Any:
    """ShiQTrainer on one core: plain SGD, rows in order, no clipping (it would hide a wrong factor), every step logged."""
    from shiq_lab.hf.config import ShiQConfig
    from shiq_lab.hf.trainer import ShiQTrainer

    plain: dict[str, Any] = {
        "beta": 0.5, "learning_rate": 0.02, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "optim": "sgd",
        "train_sampling_strategy": "sequential", "report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True,
        "logging_strategy": "steps", "logging_steps": 1, "dataloader_pin_memory": False,
    }  # fmt: skip
    if "WORLD_SIZE" in os.environ:
        plain["ddp_backend"] = "gloo"
    args = ShiQConfig(output_dir=str(folder), **{**plain, **options})
    made = ShiQTrainer(model, args, data, ref_model=ref_model, callbacks=callbacks)
    made.pop_callback(_printer())
    return made


def _printer() -> Any:
    from transformers import PrinterCallback

    return PrinterCallback


def weights(model: Any) -> dict[str, Tensor]:
    """A copy of every parameter, whatever wraps the model."""
    return {name.removeprefix("module."): p.detach().clone() for name, p in model.named_parameters()}


# ------------------------------------------------------------------------------------------------ starting processes
def start(job: str, folder: Path, *, rank: int | None = None, port: int = 0, **options: Any) -> subprocess.Popen[bytes]:
    """This file in a process of its own; with a rank, as one of two that meet at a port of this machine alone."""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(Path(__file__).resolve().parent.parent), *sys.path])}
    if rank is not None:
        loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
        env |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        env |= {"GLOO_SOCKET_IFNAME": loopback[0]} if loopback else {}
    command = [sys.executable, __file__, job, str(folder), json.dumps(options)]
    with open(folder / f"log {job} {rank}", "wb") as log:
        return subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(path: Path, child: subprocess.Popen[bytes], limit: float = 180.0) -> None:
    """Until the file is there, or the process or our patience ends."""
    end = time.monotonic() + limit
    while not path.exists():
        assert child.poll() is None, f"the process ended with {child.returncode} before {path.name} appeared"
        assert time.monotonic() < end, f"no {path.name} in {limit:g} s"
        time.sleep(0.02)


# -------------------------------------------------------------------------------------------- a run that can be killed
def killable(folder: Path | str, *, callbacks: Any = None, resume: str | None = None, **options: Any) -> dict[str, Tensor]:
    """STEPS of AdamW on shuffled rows, a checkpoint every two: the final weights."""
    more: dict[str, Any] = {
        "optim": "adamw_torch", "train_sampling_strategy": "random", "save_strategy": "steps", "save_steps": 2,
        "max_steps": STEPS, "per_device_train_batch_size": 4, "lr_scheduler_type": "linear", "max_grad_norm": 1.0,
    }  # fmt: skip
    made = trainer(llama(dtype=torch.float32), rows(), folder, callbacks=callbacks, **{**more, **options})
    made.train(resume_from_checkpoint=resume)
    return weights(made.model)


def train_slowly(folder: Path, *, where: str) -> None:
    """The same run, with a pause behind every step, or in the middle of writing a checkpoint, in which it is killed."""
    from transformers import TrainerCallback

    from shiq_lab.hf.trainer import ShiQTrainer

    class Pause(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if where == "step" and state.global_step == 5:
                (folder / "at step 5").touch()
                time.sleep(60)

    if where == "checkpoint":
        whole = ShiQTrainer._save_optimizer_and_scheduler

        def slow(self: Any, output_dir: str) -> None:
            if self.state.global_step == 6:
                (folder / "writing").touch()
                time.sleep(60)
            whole(self, output_dir)

        ShiQTrainer._save_optimizer_and_scheduler = slow  # type: ignore[method-assign]
    killable(folder, callbacks=[Pause()])


def write_slowly(folder: Path) -> None:
    """Writes two parts of reference statistics; in the second it stops before the move into place."""
    from shiq_lab.hf import reference

    reference.PART = 2  # type: ignore[misc]
    plain, calls = os.fsync, []

    def slow(handle: int) -> None:
        plain(handle)
        calls.append(handle)
        if len(calls) == 2:
            os.ftruncate(handle, 700)  # as if the second half had not arrived yet
            (folder / "writing").touch()
            time.sleep(60)

    os.fsync = slow
    reference.statistics_of(rows(6), made_up, folder)


def made_up(some: Any) -> list[Any]:
    """Reference statistics that follow from a row's ids, without a model."""
    from shiq_lab.hf.reference import Reference

    out = []
    for row in some:
        ids = torch.tensor(row.input_ids, dtype=torch.float64)
        out.append(
            Reference((ids[1:] / 7).numpy(), (ids[:-1] / 3 + 4).numpy(), float(ids.sum()) if not row.terminated else 0.0)
        )
    return out


# --------------------------------------------------------------------------------------------------- two processes
@contextmanager
def planted(bug: str | None) -> Iterator[None]:
    """A bug that an author of a distributed trainer makes."""
    from shiq_lab.hf.trainer import ShiQTrainer

    kept = ShiQTrainer.compute_loss, ShiQTrainer.get_batch_samples, ShiQTrainer._metrics

    def own_count(self: Any, iterator: Any, n: int, device: Any) -> Any:
        samples, total = kept[1](self, iterator, n, device)
        return samples, None if total is None else torch.stack([self._size(s) for s in samples]).sum() * self.args.world_size

    def no_factor(self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        return kept[0](self, model, inputs, return_outputs, num_items_in_batch) / self.accelerator.num_processes

    def own_mean(self: Any, part: str) -> Any:
        whole = self.accelerator.reduce
        self.accelerator.reduce = lambda x, how: x
        found = kept[2](self, part)
        self.accelerator.reduce = whole
        return found

    if bug == "local count":
        ShiQTrainer.get_batch_samples = own_count  # type: ignore[method-assign]
    elif bug == "no factor":
        ShiQTrainer.compute_loss = no_factor  # type: ignore[method-assign]
    elif bug == "local metrics":
        ShiQTrainer._metrics = own_mean  # type: ignore[method-assign]
    try:
        yield
    finally:
        ShiQTrainer.compute_loss, ShiQTrainer.get_batch_samples, ShiQTrainer._metrics = kept  # type: ignore[method-assign]


def ddp(folder: Path, *, reduction: str = "row", bug: str | None = None, batch: int = 2, accumulate: int = 1) -> dict[str, Any]:
    """Three steps over 12 rows through ShiQTrainer, however many processes share them."""
    from shiq_lab.hf import reference
    from shiq_lab.hf.trainer import ShiQTrainer

    counted: list[int] = []
    plain, part = ShiQTrainer._compute_reference, reference.PART

    def count(self: Any, model: Any, some: Any) -> Any:
        counted.append(len(some))
        return plain(self, model, some)

    ShiQTrainer._compute_reference, reference.PART = count, 3  # type: ignore[method-assign]
    model, ref = llama(seed=0), llama(seed=1)
    cache = str(folder / f"cache {reduction} {bug} {batch}")
    try:
        made = trainer(
            model, rows(12), folder, ref_model=ref, reference_cache=cache, reduction=reduction,
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate, max_steps=3,
        )  # fmt: skip
        with planted(bug):
            made.train()
    finally:
        ShiQTrainer._compute_reference, reference.PART = plain, part  # type: ignore[method-assign]
    drop = ("runtime", "per_second", "flos")
    logs = [{k: v for k, v in entry.items() if not any(d in k for d in drop)} for entry in made.state.log_history[:3]]
    wrapped = type(made.model_wrapped).__name__
    return {
        "weights": weights(made.model),
        "logs": logs,
        "computed": counted,
        "wrapped": wrapped,
        "world": made.args.world_size,
    }


def fsdp(folder: Path, *, own_head: bool = False, tied: bool = False) -> dict[str, Any]:
    """Statistics, loss and whole gradients of a sharded model, each process with its own half of the rows."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    from shiq_lab import shiq_loss
    from shiq_lab.hf import heads

    rank, world = dist.get_rank(), dist.get_world_size()
    model, batch = llama(tie_word_embeddings=tied), half_of(rows(8), rank, world)
    heads.answer_columns(model)
    for layer in model.model.layers:
        fully_shard(layer)
    if own_head:
        fully_shard(model.lm_head)
    fully_shard(model)
    kinds = sorted({type(p).__name__ for p in model.parameters()})
    stats = heads.statistics(model, batch, fused=True)
    with torch.no_grad():
        silent = heads.statistics(model, batch, fused=True)
    zero = type(stats)(*(torch.zeros_like(x) for x in (stats.token_logit, stats.logsumexp, stats.end_logsumexp)))
    total = torch.tensor(8.0, dtype=torch.float64)
    loss = shiq_loss(stats, zero, batch, beta=0.5, reduction="sum") / total
    (loss * world).backward()  # gradients are averaged over processes
    dist.all_reduce(loss := loss.detach())
    whole = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
    parts = [stats.token_logit.detach(), stats.logsumexp.detach(), stats.end_logsumexp.detach()]
    same = all(
        torch.equal(a, b) for a, b in zip(parts, (silent.token_logit, silent.logsumexp, silent.end_logsumexp), strict=True)
    )
    return {"kinds": kinds, "statistics": parts, "loss": loss, "gradients": whole, "same without gradient": same}


def fsdp_bf16(folder: Path, *, bug: str | None = None) -> dict[str, Any]:
    """The statistics that leave a model sharded as accelerate does it for bf16: it rounds all outputs to output_dtype."""
    import torch.distributed as dist
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    from shiq_lab.hf import heads

    model, batch = llama(dtype=torch.float32), half_of(rows(8), dist.get_rank(), dist.get_world_size())
    heads.answer_columns(model)
    if bug == "two real tensors":
        answer = model.forward
        model.forward = lambda *args, **kw: torch.view_as_real(answer(*args, **kw).pair).unbind(-1)
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16, output_dtype=torch.bfloat16)
    fully_shard(model, mp_policy=half)
    if bug is not None:
        where, taken = heads.scored(batch)
        return {"logsumexp": model(**heads.model_inputs(model, batch), where=where, taken=taken)[1].detach()}
    stats = heads.statistics(model, batch, fused=True)
    stats.logsumexp.sum().backward()
    grads = [p.grad for p in model.parameters()]
    return {
        "logsumexp": stats.logsumexp.detach(),
        "gradients": all(g is not None and bool(g.full_tensor().isfinite().all()) for g in grads),
    }


def half_of(some: list[Any], rank: int, world: int) -> Any:
    """This process's share, all padded to one width so that shares can be laid side by side."""
    from shiq_lab.hf.collator import collate, token_batch

    n = len(some) // world
    return token_batch(collate(some[rank * n : rank * n + n], dtype=torch.float64, width=max(LENGTHS) + 2))


def together(folder: Path, *, only: list[str] | None = None) -> None:
    """All that is asked of two processes, one after another: starting them costs more than the work."""
    jobs: dict[str, tuple[Callable[..., dict[str, Any]], dict[str, Any]]] = {
        "row": (ddp, {}), "token": (ddp, {"reduction": "token"}), "accumulated": (ddp, {"batch": 1, "accumulate": 2}),
        "local count": (ddp, {"bug": "local count"}), "no factor": (ddp, {"bug": "no factor"}),
        "local metrics": (ddp, {"bug": "local metrics"}), "fsdp": (fsdp, {}), "fsdp tied": (fsdp, {"tied": True}),
        "fsdp head": (fsdp, {"own_head": True}), "fsdp bf16": (fsdp_bf16, {}),
        "fsdp bf16 bug": (fsdp_bf16, {"bug": "two real tensors"}),
    }  # fmt: skip
    found = {}
    if only is not None:
        jobs = {name: jobs[name] for name in only}
    for name, (job, options) in jobs.items():
        found[name] = job(folder, **options)
    torch.save(found, folder / f"rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    signal.alarm(300)  # a lost partner must not leave a process behind
    job = {"together": together, "train": train_slowly, "write": write_slowly}[sys.argv[1]]
    job(Path(sys.argv[2]), **json.loads(sys.argv[3] if len(sys.argv) > 3 else "{}"))
