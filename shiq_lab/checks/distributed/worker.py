"""What runs inside the processes: a rank's part of a scenario, and a rank's life."""

import os
import pickle
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from shiq_lab.batch import concatenate
from shiq_lab.checks.distributed.address import load
from shiq_lab.checks.distributed.scenario import Scenario, V, sharded_head, shards, table_model
from shiq_lab.stats import TokenStats


def perform(function: Callable[..., Any], reference: Callable[..., Any] | None, scenario: Scenario) -> dict[str, Any]:
    """One rank's part of a scenario in the process group that stands; numpy arrays by name."""
    if scenario.kind == "vocab":
        return _sharded(function, reference, scenario)
    rank, size = dist.get_rank(), dist.get_world_size()
    parts = shards(scenario)
    batch = parts[rank] if scenario.kind == "data" and size > 1 else concatenate(parts)
    model = table_model(scenario)
    loss = function(model, batch, dist.group.WORLD)
    _check_scalar(loss)
    loss.backward()
    local = _flat(model)
    total = torch.from_numpy(local.copy())
    if scenario.combine != "none":
        dist.all_reduce(total)
        total /= size if scenario.combine == "mean" else 1
    out = {"loss": float(loss.detach()), "local": local, "gradient": total.numpy()}
    return {**out, "tokens": int(batch.completion_mask.sum()), "rows": len(batch)}


def _sharded(stats: Callable[..., Any], reference: Callable[..., Any] | None, scenario: Scenario) -> dict[str, Any]:
    hidden, head, batch, weights = sharded_head(scenario)
    width = V // dist.get_world_size()
    mine = head[:, dist.get_rank() * width : (dist.get_rank() + 1) * width].clone().requires_grad_()
    hidden = hidden.requires_grad_()
    found = _as_arrays("the statistics", stats(hidden, mine, batch, dist.group.WORLD), weights)
    total = torch.stack([(w * torch.where(w != 0, x, 0.0)).sum() for w, x in zip(weights, found, strict=True)]).sum()
    _check_scalar(total)
    total.backward()
    out: dict[str, Any] = {"hidden": _gradient(hidden), "head": _gradient(mine)}
    out["stats"] = [x.detach().numpy() for x in found]
    if reference is not None:
        anchor = reference(hidden.detach(), mine.detach(), batch, dist.group.WORLD)
        out["reference"] = [x.detach().numpy() for x in _as_arrays("the reference's statistics", anchor, weights)]
    return out


def _as_arrays(name: str, stats: Any, weights: Sequence[Tensor]) -> list[Tensor]:
    if not isinstance(stats, TokenStats):
        raise TypeError(f"returned {type(stats).__name__} as {name}, expected TokenStats")
    found = [stats.token_logit, stats.logsumexp, stats.end_logsumexp]
    for part, x, w in zip(("token_logit", "logsumexp", "end_logsumexp"), found, weights, strict=True):
        if x.shape != w.shape:
            raise TypeError(f"{name}: {part} has shape {tuple(x.shape)}, expected {tuple(w.shape)}")
    return found


def _check_scalar(loss: Any) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = f" of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else ""
        raise TypeError(f"returned a {type(loss).__name__}{shape}, expected a scalar tensor")
    if not loss.requires_grad:
        raise TypeError("returned a tensor without gradient")


def _flat(model: torch.nn.Module) -> np.ndarray:
    """The gradient by every parameter, one after the other."""
    return np.concatenate([_gradient(p).reshape(-1) for p in model.parameters() if p.requires_grad])


def _gradient(leaf: Tensor) -> np.ndarray:
    """0 where none came."""
    return (torch.zeros_like(leaf) if leaf.grad is None else leaf.grad).numpy()


def worker(rank: int, descriptor: int, folder: str) -> None:
    """A rank's life: answer jobs until the parent is gone. A parent that ends well kills it, and removes the folder itself."""
    os.environ["SHIQ_LAB_WORKER"] = "1"
    torch.set_num_threads(1)
    connection = Connection(descriptor)
    threading.Thread(target=_leave_with_parent, args=(os.getppid(), folder), daemon=True).start()
    connection.send(("ready", rank))
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return shutil.rmtree(folder, ignore_errors=True)
        connection.send(_answer(rank, *job))


def _leave_with_parent(parent: int, folder: str) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _answer(rank: int, payload: bytes, scenario: Scenario, store: str, size: int, limit: float) -> tuple[str, Any]:
    """("done", numbers) or ("raised", text); the process group lives as long as the job."""
    try:
        function, reference = (load(address) for address in pickle.loads(payload))
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=limit)
        )
        try:
            return "done", perform(function, reference, scenario)
        except Exception as error:
            return "raised", (time.monotonic(), _one_line(error))
        finally:
            dist.destroy_process_group()
    except Exception as error:
        return "raised", (time.monotonic(), _one_line(error))


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:500]
