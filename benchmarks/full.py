"""Token statistics and their gradient at full size: time, peak memory, gradient error; ours against peers and floors.

    python benchmarks/full.py [--repeats 3] [--tokens 1024] [--hidden 576] [--vocabulary 49152] [--dtype float32]
                              [--device cuda] [--threads 2] [--no-memory]

The work: N hidden states times a head of V tokens, the logit of the taken token and the log-sum-exp, backward to the hidden
states ("frozen") or to them and the head ("trained"). Times are medians over repeats that go round all settings, forward and
backward together, with the least beside them: seconds on the clock, and of the processor (for a machine that others use: one
thread, and the processor's seconds). Peak memory is that of a process of its own above its inputs (CUDA: the allocator's).
Gradient errors are relative to the largest entry of a float64 gradient of all logits at once, at 128 tokens. TRL's function and
cut-cross-entropy have the log-probability alone; Liger's is a whole DPO loss without reference. What cannot run is listed with
the reason.

Floors, bare matrix products: 4 N H V operations for a frozen head, 8 N H V for a trained one (6 N H V if logits are kept).
Aims (a sketch's figures): frozen <= 0.97 of its floor, trained <= 0.87 of the materialised path (which keeps the logits).
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shiq_lab.fused import token_statistics

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # hidden, head, tokens, upstream float[2, N] -> scalar
PROBE = 128  # tokens of the gradient's error


def ours(hidden: Tensor, head: Tensor, tokens: Tensor, g: Tensor) -> Tensor:
    taken, level = token_statistics(hidden, head, tokens)
    return (g[0] * taken + g[1] * level).sum()


def materialised(hidden: Tensor, head: Tensor, tokens: Tensor, g: Tensor) -> Tensor:
    logits = hidden @ head.T
    logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    return (g[0] * logits.gather(1, tokens[:, None])[:, 0] + g[1] * logits.logsumexp(1)).sum()


def trl() -> Loss:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as CHUNK

    def loss(hidden: Tensor, head: Tensor, tokens: Tensor, g: Tensor) -> Tensor:
        return (g[0] * ChunkedLogProbFunction.apply(hidden, head, None, tokens, 1.0, CHUNK, None, 1.0, ())[0]).sum()

    return loss


def cut_cross_entropy() -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    road = {"reduction": "none", "impl": "cce" if torch.cuda.is_available() else "torch_compile"}
    return lambda hidden, head, tokens, g: -(g[0] * linear_cross_entropy(hidden, head, tokens, **road)).sum()


def liger() -> Loss:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    dpo = LigerFusedLinearDPOLoss(use_ref_model=False, compiled=torch.cuda.is_available())
    pair = lambda x: x.unflatten(0, (2, -1))  # noqa: E731
    return lambda hidden, head, tokens, g: dpo(head, pair(hidden), pair(tokens))[0]


PEERS: dict[str, Callable[[], Loss]] = {
    "ours": lambda: ours,
    "materialised": lambda: materialised,
    "TRL's chunked log-probability": trl,
    "cut-cross-entropy": cut_cross_entropy,
    "Liger's fused DPO": liger,
}
ONE_NUMBER = ("TRL's chunked log-probability", "cut-cross-entropy")  # the log-probability alone: g_z = -g_c


def products(hidden: Tensor, head: Tensor, count: int) -> None:
    """logits; the gradient by hidden; logits again (count 4); the gradient by the head."""
    logits = hidden @ head.T
    logits @ head
    if count == 4:
        logits = hidden @ head.T
    if count > 2:
        logits.T @ hidden


FLOORS = {"frozen": 2, "trained": 4, "trained, logits kept": 3}  # products of 2 N H V operations


def problem(N: int, H: int, V: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, head, tokens and upstream gradients; logits of standard deviation 2."""
    g = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(N, H, generator=g), torch.randn(V, H, generator=g) * (2 / H**0.5)
    tokens, upstream = torch.randint(V, (N,), generator=g), torch.randn(2, N, generator=g)
    return hidden.to(device, dtype), head.to(device, dtype), tokens.to(device), upstream.to(device)


def step(loss: Loss, inputs: tuple[Tensor, ...], trained: bool) -> tuple[Tensor | None, ...]:
    """Forward and backward; the gradients by hidden and head."""
    hidden, head = inputs[0].detach().requires_grad_(), inputs[1].detach().requires_grad_(trained)
    loss(hidden, head, *inputs[2:]).backward()
    return hidden.grad, head.grad


def clocked(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds on the clock and of the processor."""
    begin, used = time.perf_counter(), time.process_time()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin, time.process_time() - used


def errors(name: str, loss: Loss, inputs: tuple[Tensor, ...]) -> dict[str, float] | str:
    """Largest error of each gradient over its largest entry, at PROBE tokens."""
    if name == "Liger's fused DPO":
        return "another loss"
    few = (inputs[0][:PROBE], inputs[1], inputs[2][:PROBE], inputs[3][:, :PROBE].clone())
    if name in ONE_NUMBER:
        few[3][1] = -few[3][0]
    truth = step(materialised, (few[0].double(), few[1].double(), few[2], few[3].double()), True)
    found = step(loss, few, True)
    gap = [float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(found, truth, strict=True)]  # type: ignore[union-attr]
    return {"hidden": float(f"{gap[0]:.2g}"), "head": float(f"{gap[1]:.2g}")}


# ------------------------------------------------------------------------------------------------------------- memory
def peak_of_process() -> int:
    """Bytes: the most that this process has held in memory since the mark was last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def peak(name: str, size: tuple[int, int, int], dtype: torch.dtype, device: str, trained: bool) -> int:
    """Bytes above the inputs at the peak of one step, after a small step that fills the libraries' own buffers."""
    loss = PEERS[name]()
    step(loss, problem(8, 64, 600, dtype, device), trained)
    inputs = problem(*size, dtype, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(loss, inputs, trained)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the mark starts again from what is held now
    before = peak_of_process()
    step(loss, inputs, trained)
    return peak_of_process() - before


def peak_elsewhere(name: str, size: tuple[int, int, int], dtype: str, device: str, trained: bool) -> float | str:
    """MB, from a process of its own."""
    command = [sys.executable, __file__, "--peak", json.dumps([name, size, dtype, device, trained])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return round(int(done.stdout) / 1e6, 1) if done.returncode == 0 else done.stderr.strip().splitlines()[-1][:200]


# ---------------------------------------------------------------------------------------------------------- one size
def works(inputs: tuple[Tensor, ...]) -> tuple[dict[tuple[str, str], Callable[[], Any]], dict[str, Loss], dict[str, str]]:
    """(name, head) -> what is timed; the losses that run here; why the others do not."""
    losses: dict[str, Loss] = {}
    missing: dict[str, str] = {}
    small = problem(8, 64, 600, inputs[0].dtype, inputs[0].device.type)
    for name, build in PEERS.items():
        try:
            losses[name] = build()
            step(losses[name], small, True)
        except Exception as error:
            losses.pop(name, None)
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
    timed: dict[tuple[str, str], Callable[[], Any]] = {}
    for head, count in FLOORS.items():
        timed["floor", head] = lambda count=count: products(inputs[0], inputs[1], count)  # type: ignore[misc]
    for (name, loss), trained in itertools.product(losses.items(), (False, True)):
        key = (name, "trained" if trained else "frozen")
        timed[key] = lambda loss=loss, trained=trained: step(loss, inputs, trained)  # type: ignore[misc]
    return timed, losses, missing


def measure(size: tuple[int, int, int], options: argparse.Namespace) -> dict[str, Any]:
    inputs = problem(*size, getattr(torch, options.dtype), options.device)
    timed, losses, missing = works(inputs)
    times: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in timed}
    load = [os.getloadavg()[0]]
    for _ in range(options.repeats):
        for key, work in timed.items():
            times[key].append(clocked(work))
        load.append(os.getloadavg()[0])
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for (name, head), pairs in times.items():
        clock, processor = zip(*pairs, strict=True)
        entry = {"seconds": statistics.median(clock), "least": min(clock), "processor": statistics.median(processor)}
        entry = {k: round(v, 4) for k, v in entry.items()}
        if name != "floor":
            entry["of the floor"] = round(entry["seconds"] / table["floor"][head]["seconds"], 3)
            entry["of the floor (processor)"] = round(entry["processor"] / table["floor"][head]["processor"], 3)
            if options.memory:
                entry["peak MB"] = peak_elsewhere(name, size, options.dtype, options.device, head == "trained")
        table.setdefault(name, {})[head] = entry
    N, H, V = size
    item = inputs[0].element_size()
    return {
        "tokens": N,
        "hidden": H,
        "vocabulary": V,
        "dtype": options.dtype,
        "results": table,
        "gradient error": {name: errors(name, loss, inputs) for name, loss in losses.items()},
        "not run": missing,
        "MB: hidden + head, N V logits, N V / 50 bytes": [
            round(x / 1e6, 1) for x in ((N + V) * H * item, N * V * item, N * V / 50)
        ],
        "load": [round(x, 1) for x in load],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, nargs="+", help="default 1024; on CUDA 4096 16384 65536")
    parser.add_argument("--hidden", type=int, nargs="+", help="default 576; on CUDA 576 2048 4096")
    parser.add_argument("--vocabulary", type=int, nargs="+", help="default 49152; on CUDA 49152 128256 262144")
    parser.add_argument("--dtype", default=None, help="default float32; on CUDA bfloat16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        name, size, dtype, device, trained = json.loads(options.peak)
        torch.set_num_threads(1)
        print(peak(name, tuple(size), getattr(torch, dtype), device, trained))
        return
    torch.set_num_threads(options.threads)
    gpu = options.device == "cuda"
    options.dtype = options.dtype or ("bfloat16" if gpu else "float32")
    grid = itertools.product(
        options.tokens or ([4096, 16384, 65536] if gpu else [1024]),
        options.hidden or ([576, 2048, 4096] if gpu else [576]),
        options.vocabulary or ([49152, 128256, 262144] if gpu else [49152]),
    )
    machine = {"device": torch.cuda.get_device_name() if gpu else "cpu", "cpus": os.cpu_count(), "threads": options.threads}
    machine |= {"python": platform.python_version(), "torch": torch.__version__}
    sizes = [measure(size, options) for size in grid]
    print(
        json.dumps(
            {"unit": "seconds, forward and backward", "repeats": options.repeats, "sizes": sizes, "machine": machine}, indent=1
        )
    )


if __name__ == "__main__":
    main()
