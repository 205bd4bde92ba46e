"""Memory and operations of a ShiQ step by formula, each constant measured: what fits on how many GPUs, and how long it takes.

Bytes and operations do not depend on the device, so they are counted on a CPU: on small Llamas, on a whole step of theirs
sharded over several processes (of which one is there), and on the real shapes where only a count is needed.
"""

import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shiq_lab.errors import at_least, bad
from shiq_lab.fused import CACHE, ROWS, token_statistics
from shiq_lab.plotting import GREY, PALETTE, figure, style
from shiq_lab.studies.frame import Case, Claim, Record, Result, Settings, Study, numbers_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GB = 1e9
PEAK = 989e12  # bf16 operations a second, dense, of an H100 SXM by NVIDIA's data sheet (1,979e12 with sparsity); not measured
UTILISATION = 0.4  # share of PEAK that a run reaches: a parameter, not a measurement
RANK = 16
# Bytes a parameter of weights, gradients, AdamW's state.
STATES = {"float32": (4, 4, 8), "bf16 autocast": (4, 4, 8), "pure bf16": (2, 2, 4), "LoRA, bf16 base": (4, 4, 8)}
# FSDP2's bytes a parameter, of weights gathered and gradients not yet scattered: of the head at its turn, of a tied one during
# the layers', of a layer; and bytes a token and hidden number around the head (last norm, its input, E, their gradients).
ROOTS = {"full": (4, 4, 8, 24), "LoRA": (2, 2, 6, 20)}
STATISTICS = 8  # reference: bytes a token on disk
LOGIT = 20  # bytes a materialised logit: five float32 copies at the peak
CARD, FREE = 80, 0.1  # GB of a GPU; the share to leave free
GPUS = (1, 8, 64)


# ----------------------------------------------------------------------------------------------------------- the formulas
@dataclass(frozen=True)
class Shape:
    """A Llama: hidden H, layers L, heads of head_dim (together q wide), kv_heads (k wide), intermediate I, vocabulary V."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool = False

    @property
    def q(self) -> int:
        """Width of all queries."""
        return self.heads * self.head_dim

    @property
    def k(self) -> int:
        """Width of all keys."""
        return self.kv_heads * self.head_dim

    @property
    def matrices(self) -> int:
        """Weights of a layer's seven linear maps: 2 H q + 2 H k + 3 H I."""
        return self.hidden * (2 * self.q + 2 * self.k + 3 * self.intermediate)

    @property
    def layer(self) -> int:
        """Parameters of a layer: its matrices and two norms."""
        return self.matrices + 2 * self.hidden

    @property
    def head(self) -> int:
        """Parameters of the head, V H; a tied one is the embedding too."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """L layers, embedding, head and the last norm."""
        return self.layers * self.layer + (1 if self.tied else 2) * self.head + self.hidden

    def adapter(self, rank: int) -> int:
        """A layer's LoRA parameters on all seven maps: rank times the sum of what goes in and out of each."""
        return rank * (2 * (self.hidden + self.q) + 2 * (self.hidden + self.k) + 3 * (self.hidden + self.intermediate))

    def saved(self, rank: int | None = None) -> int:
        """Bytes a token and layer that autograd keeps in bf16: 20 H + 4 k + 8 I + 4 heads + 8; LoRA 4 H fewer, 14 rank more.

        Two norms: the float32 input (4 H) and the product (2 H) each, what enters q, k, v, o, gate and up (6 H), q and o's own
        (2 H more), keys and values, four products of width I, attention's log-sum-exp. Written for q = H, rows not padded (a
        padding mask makes attention repeat keys and values), no dropout.
        """
        own = 20 * self.hidden if rank is None else 16 * self.hidden + 14 * rank
        return own + 4 * self.k + 8 * self.intermediate + 4 * self.heads + 8


SHAPES = {  # the published configurations of Llama 3.2 1B, Llama 3.1 8B and 70B
    "1B": Shape(2048, 16, 32, 8, 64, 8192, 128_256, tied=True),
    "8B": Shape(4096, 32, 32, 8, 128, 14_336, 128_256),
    "70B": Shape(8192, 80, 64, 8, 128, 28_672, 128_256),
}


def memory(
    shape: Shape, *, gpus: int = 1, tokens: int = 8192, rank: int | None = None, checkpointing: bool = True,
    fused: bool = True, cuda: bool = True,
) -> dict[str, float]:  # fmt: skip
    """Bytes a GPU at the peak of a step under FSDP2 (accelerate, mixed_precision bf16), by part; their sum is "total".

        weights + gradients + optimiser = (4 + 4 + 8) P / gpus;    LoRA: (2 P + 16 A) / gpus, A the adapters'
        saved = tokens layers 2 H with gradient checkpointing, else tokens layers shape.saved
        + gathered + working, at the worst of five moments:
          arrival 4 V H, 2 a layer's parameter: the head is gathered and copied;  tokens (12 H + ...)
          head    4 (LoRA 2) V H, 2 a layer's parameter;
                  tokens (24 (20) H + ...), V (tokens / 50 + 2 H) fused, or 20 tokens V materialised
          layer   8 (LoRA 6) a layer's parameter, 4 (2) V H where the head is tied;
                  tokens (4 H + 4 I + ...), and shape.saved more with checkpointing
          beside  the same with 6 (4) a layer's parameter and, untied, 2 V H: the last layer's turn, the head's gradient not yet
                  scattered; with LoRA the first one's, the embedding already gathered, and saved is one layer's
          end     4 V H, tied 8 (4), 2 a layer's parameter;  tokens 4 H, nothing saved any more

    tokens: of a micro-batch on one GPU; rank: LoRA's, None trains every weight; cuda=False: the fused head's tile on a CPU.
    A layer, head and embedding are a group each, and two neighbours' weights stand side by side. Not in it: the allocator's
    waste, NCCL's and CUDA's own (leave a tenth free), shards padded to whole rows (a rank below gpus), a reference model in
    memory (`second`). gpus -> infinity leaves saved, gathered and working. Raises ValueError for counts below 1.
    Source: measured, this study; sharding: ZeRO, stage 3.
    """
    for name, value in (("gpus", gpus), ("tokens", tokens), *((("rank", rank),) if rank is not None else ())):
        at_least(name, value, 1)
    kind = "full" if rank is None else "LoRA"
    trained = shape.parameters if rank is None else shape.layers * shape.adapter(rank)
    base = 4 * shape.parameters if rank is None else 2 * shape.parameters + 4 * trained
    H, kept = shape.hidden, shape.saved(rank)
    turn, tied, each, ends = ROOTS[kind]
    layer = shape.layer + (0 if rank is None else shape.adapter(rank))
    saved = tokens * shape.layers * (2 * H if checkpointing else kept)
    around = 4 * shape.head_dim + 100  # rotary tables, ids, masks and rewards
    inner = tokens * (4 * H + 4 * shape.intermediate + around + kept * checkpointing)
    beside = (each - 2) * layer + 2 * shape.head * (not shape.tied)
    moments = [
        (4 * shape.head + 2 * layer, saved, tokens * (12 * H + around)),
        (turn * shape.head + 2 * layer, saved, tokens * (ends * H + around) + _head(shape, tokens, rank, fused, cuda)),
        (each * layer + tied * shape.head * shape.tied, saved, inner),
        (beside, saved if rank is None else saved // shape.layers, inner),
        ((8 if shape.tied and rank is None else 4) * shape.head + 2 * layer, 0, tokens * (4 * H + around)),
    ]
    gathered, saved, working = max(moments, key=sum)
    parts: dict[str, float] = {
        "weights": base / gpus, "gradients": 4 * trained / gpus, "optimiser": 8 * trained / gpus,
        "gathered": gathered, "saved": saved, "working": working,
    }  # fmt: skip
    return {**parts, "total": sum(parts.values())}


def _head(shape: Shape, tokens: int, rank: int | None, fused: bool, cuda: bool) -> float:
    """The head's working set: the materialised logits' 20 bytes each, or the fused sweep's bound (shiq_lab.fused)."""
    if not fused:
        return LOGIT * tokens * shape.vocabulary
    bound = shape.vocabulary * (tokens / 50 + 2 * shape.hidden)
    logits, width = min(CACHE, tokens * shape.vocabulary), min(shape.vocabulary, CACHE // min(tokens, ROWS))
    # Frozen: a tile of logits and small parts, a float32 tile of the head. Trained: two of each.
    tile = 8 * (logits + width * shape.hidden) if rank is None else 5 * logits + 4 * width * shape.hidden
    return max(16 * CACHE, bound) if cuda else tile


def second(shape: Shape, tokens: int) -> dict[str, int]:
    """Bytes of a reference: "cache" on disk, 8 a token of the data, none on a GPU; "model" on every GPU, bf16, not sharded."""
    return {"cache": STATISTICS * tokens, "model": 2 * shape.parameters}


def operations(shape: Shape, *, length: int, rank: int | None = None, checkpointing: bool = True) -> dict[str, float]:
    """Operations (a multiply-add is 2) a token of a row of `length` tokens: "forward", "backward", "again", "head", "total".

        forward 2 M + 4 length q layers;  backward 4 M + 10 length q layers;  M the weights of all layers' matrices
        LoRA: no gradient for frozen weights, 2 M + 4 A in place of 4 M, and forward 2 A more
        again (checkpointing): the forward but for its last product, down's 2 H I a layer (LoRA: its 2 rank H)
        head, fused: 8 V H, frozen 4 V H;  nothing for scores that are not needed

    Attention's squares are counted whole, as torch counts them; causal kernels do half. LoRA without checkpointing skips the
    first layer's gradient by its input, 2 H (q + 2 k) + 6 rank H. length -> 0 and no checkpointing: 6 M + 8 V H. Raises
    ValueError for counts below 1.
    """
    at_least("length", length, 1)
    L, H, M = shape.layers, shape.hidden, shape.layers * shape.matrices
    A = 0 if rank is None else L * shape.adapter(at_least("rank", rank, 1))
    square = length * shape.q * L
    forward = 2 * M + 2 * A + 4 * square
    backward = (4 * M if rank is None else 2 * M + 4 * A) + 10 * square
    last = 2 * L * H * (shape.intermediate if rank is None else rank)
    if rank is not None and not checkpointing:
        backward -= 2 * H * (shape.q + 2 * shape.k) + 6 * rank * H
    parts = {
        "forward": forward, "backward": backward, "again": (forward - last) * checkpointing,
        "head": (8 if rank is None else 4) * shape.head,
    }  # fmt: skip
    return {**parts, "total": sum(parts.values())}


def speed(per_token: float, gpus: int, *, peak: float = PEAK, utilisation: float = UTILISATION) -> float:
    """Tokens a second: gpus peak utilisation / operations a token. Raises ValueError unless 0 < utilisation <= 1."""
    if not 0 < utilisation <= 1:
        raise bad("utilisation", "a share in (0, 1]", repr(utilisation))
    return gpus * peak * utilisation / per_token


def traffic(shape: Shape) -> int:
    """Bytes a GPU receives a step under FSDP: bf16 weights gathered twice, gradients scattered once (ZeRO, stage 3: 3 P)."""
    return 3 * 2 * shape.parameters


# -------------------------------------------------------------------------------------------------------------- the measuring
class Live(TorchDispatchMode):
    """Bytes of all storages alive, after every operation; FSDP shrinks and grows them, so each is asked anew."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, Any] = {}
        self.peak = 0

    def add(self, values: Any) -> None:
        """Count tensors from now on; of a sharded one, what is here."""
        for value in (x for x in tree_leaves(values) if isinstance(x, Tensor)):
            storage = getattr(value, "_local_tensor", value).untyped_storage()
            if self.known.get(storage._cdata, lambda: None)() is None:
                self.known[storage._cdata] = weakref.ref(storage)

    def now(self) -> int:
        """Bytes alive now."""
        alive = {key: storage for key, ref in self.known.items() if (storage := ref()) is not None}
        self.known = {key: self.known[key] for key in alive}
        return sum(storage.nbytes() for storage in alive.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.add((args, kwargs, out))
        self.peak = max(self.peak, self.now())
        return out


def llama(shape: Shape, *, rank: int | None = None, checkpointing: bool = False, device: str = "cpu") -> nn.Module:
    """A Llama of the transformers library of that shape, with ShiQTrainer's forward; with a rank, bf16 under LoRA adapters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from shiq_lab.hf import heads

    config = LlamaConfig(
        hidden_size=shape.hidden, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim, intermediate_size=shape.intermediate,
        vocab_size=shape.vocabulary, tie_word_embeddings=shape.tied,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(config)
        if rank is not None:
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(model.to(torch.bfloat16), LoraConfig(r=rank, target_modules="all-linear"))
    if checkpointing:
        core = heads.core(model)
        getattr(core, "activation_checkpointing_enable", core.gradient_checkpointing_enable)({"use_reentrant": False})
        if rank is not None:
            core.enable_input_require_grads()
    heads.answer_columns(model)
    found: nn.Module = model.train()
    return found


def full_rows(rows: int, length: int) -> Any:
    """A batch of rows of one length, all chosen by the policy."""
    from shiq_lab.hf.collator import collate, token_batch
    from shiq_lab.hf.rows import Row

    one = Row(input_ids=[0] * length, completion_mask=[0] + [1] * (length - 1), rewards=[0.0] * length)
    return token_batch(collate([one] * rows, pad_id=0))


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    """A number that both statistics enter with unequal gradients, through the trainer's own road."""
    from shiq_lab.hf import heads

    stats = heads.statistics(model, batch, fused=True)
    return (stats.token_logit + stats.logsumexp.square()).sum()


def count_parameters(settings: Settings) -> dict[str, Any]:
    """Of the real shapes, on the meta device, and of their adapters."""
    out: dict[str, Any] = {}
    for name, shape in SHAPES.items():
        plain = llama(shape, device="meta")
        adapted = llama(replace(shape, layers=2), rank=RANK, device="meta")
        tuned = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        out[name] = {"counted": sum(p.numel() for p in plain.parameters()), "adapter": tuned // 2}
    return out


def count_states(settings: Settings) -> dict[str, Any]:
    """Bytes a trained parameter of weights, gradients and AdamW's state after a step; a frozen weight's beside."""
    shape = Shape(64, 2, 4, 2, 16, 224, 256)
    out: dict[str, Any] = {}
    for name in STATES:
        model = llama(shape, rank=RANK if name.startswith("LoRA") else None)
        model = model.to(torch.bfloat16) if name == "pure bf16" else model
        trained = [p for p in model.parameters() if p.requires_grad]
        frozen = [p for p in model.parameters() if not p.requires_grad]
        optimiser = torch.optim.AdamW(trained, lr=1e-3)
        with torch.autocast("cpu", torch.bfloat16, enabled=name in ("bf16 autocast", "LoRA, bf16 base")):
            loss = loss_of(model, full_rows(2, 8))
        loss.backward()
        optimiser.step()
        moments = [x for state in optimiser.state.values() for x in state.values() if x.ndim]
        bytes_of: Callable[[list[Any]], int] = lambda many: sum(x.numel() * x.element_size() for x in many)  # noqa: E731
        P = sum(p.numel() for p in trained)
        out[name] = [bytes_of(x) / P for x in (trained, [p.grad for p in trained], moments)]
        out[name].append(bytes_of(frozen) / sum(p.numel() for p in frozen) if frozen else None)
    return out


def saved_a_layer(shape: Shape, rank: int | None, checkpointing: bool, batch: Any = None) -> float:
    """Bytes a token that one more layer makes autograd keep, of bf16 weights: storages that are no parameters, each once."""
    from shiq_lab.hf import heads

    batch, found = full_rows(2, 32) if batch is None else batch, []
    for layers in (1, 2):
        model = llama(replace(shape, layers=layers), rank=rank, checkpointing=checkpointing).to(torch.bfloat16)
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        kept: dict[int, Tensor] = {}  # holds the tensors, so that no address comes twice

        def pack(x: Tensor, kept: dict[int, Tensor] = kept) -> Tensor:
            kept.setdefault(x.untyped_storage()._cdata, x)
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            inputs = heads.model_inputs(model, batch)
            heads.core(model).base_model(**inputs)
        found.append(sum(x.untyped_storage().nbytes() for key, x in kept.items() if key not in own))
    return (found[1] - found[0]) / batch.input_ids.numel()


def measure_saved(settings: Settings) -> dict[str, Any]:
    """At every width: with and without LoRA; the last of them is predicted from the others."""
    shapes = [Shape(*(*size, 64)) for size in settings["widths"]]
    out: dict[str, Any] = {"checkpointed": [saved_a_layer(s, None, True) / s.hidden for s in shapes[:2]]}
    for kind, rank in (("full", None), ("LoRA", RANK)):
        found = np.array([saved_a_layer(s, rank, False) for s in shapes])
        terms = np.array([[s.hidden, s.k, s.intermediate, s.heads, 1] for s in shapes], dtype=float)
        fit = np.linalg.solve(terms[:-1], found[:-1])
        out[kind] = {
            "fit": fit, "measured": found, "predicted": float(terms[-1] @ fit), "formula": [s.saved(rank) for s in shapes]
        }  # fmt: skip
    return out


def measure_head(settings: Settings) -> dict[str, Any]:
    """Peak bytes beside inputs, of the materialised logits and the fused sweep: a logit, and in all."""
    from shiq_lab.stats import TokenStats

    N, H, V = settings["head"]
    batch = full_rows(1, N)
    out: dict[str, Any] = {}
    for kind, trained in (("full", True), ("LoRA", False)):
        for fused in (False, True):
            draw = torch.Generator().manual_seed(0)
            hidden = torch.randn(N, H, generator=draw).bfloat16().requires_grad_()
            weight = torch.randn(V, H, generator=draw).bfloat16().requires_grad_(trained)
            live = Live()
            live.add([hidden, weight])
            before = live.now()
            with live:
                if fused:
                    logit, level = token_statistics(hidden, weight, batch.input_ids[0])
                else:
                    stats = TokenStats.from_logits((hidden @ weight.T)[None], batch)
                    logit, level = stats.token_logit, stats.logsumexp
                (logit + level.square()).sum().backward()
            out[f"{kind}, {'fused' if fused else 'materialised'}"] = {
                "bytes": live.peak - before, "a logit": (live.peak - before) / (N * V)
            }  # fmt: skip
    return out


def measure_operations(settings: Settings) -> dict[str, Any]:
    """[counted, formula] a token: torch's counter on forward and backward of a small Llama through the fused head."""
    from torch.utils.flop_counter import FlopCounterMode

    aten, shape = torch.ops.aten, Shape(*(*settings["widths"][0], 512))
    shape = replace(shape, layers=3)
    product = lambda out, a, b, **_: 2 * a[0] * a[1] * b[1]  # noqa: E731  # what torch does not count by itself
    square = lambda q, k: q[0] * q[1] * q[2] * k[2] * q[3]  # noqa: E731
    more = {
        aten.addmm_: product,
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, *_, **__: 4 * square(q, k),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda _, q, k, *__, **___: 10 * square(q, k),
    }
    out, batch = {}, full_rows(4, 64)
    N, scored = batch.input_ids.numel(), int(batch.completion_mask.sum())
    for kind, rank in (("full", None), ("LoRA", RANK)):
        for checkpointing in (False, True):
            model = llama(shape, rank=rank, checkpointing=checkpointing).float()
            forward, backward = (FlopCounterMode(display=False, custom_mapping=more) for _ in range(2))
            with forward:
                loss = loss_of(model, batch)
            with backward:
                loss.backward()
            said = operations(shape, length=64, rank=rank, checkpointing=checkpointing)
            head = said["head"] * scored / N  # a row's first token is scored by nothing
            counted = (forward.get_total_flops() + backward.get_total_flops()) / N
            out[f"{kind}, {'checkpointed' if checkpointing else 'kept'}"] = [counted, said["total"] - said["head"] + head]
    return out


def measure_reference(settings: Settings) -> dict[str, Any]:
    """Bytes a token of the reference's files on disk."""
    from shiq_lab.hf.reference import Reference, statistics_of
    from shiq_lab.hf.rows import Row

    rows = [Row(input_ids=[0] * 1024, completion_mask=[0] + [1] * 1023, rewards=[0.0] * 1024)] * 64
    one = Reference(np.zeros(1023, dtype=np.float32), np.zeros(1023, dtype=np.float32), 0.0)
    with tempfile.TemporaryDirectory() as folder:
        statistics_of(rows, lambda some: [one] * len(some), Path(folder))
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
    return {"bytes a token": size / (64 * 1024)}


@contextmanager
def one_of(processes: int) -> Iterator[Any]:
    """A device mesh of so many processes of which only this one exists: shards have their sizes, nothing is sent."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    try:
        yield dist.device_mesh.init_device_mesh("cpu", (processes,))
    finally:
        dist.destroy_process_group()


def shard(model: nn.Module, mesh: Any) -> None:
    """FSDP2 in the groups that accelerate makes: layers, embedding, last norm with head, and the rest; bf16 inside."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    from shiq_lab.hf import heads

    inner: Any = heads.core(model)
    half = torch.bfloat16
    options: Any = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(param_dtype=half, reduce_dtype=half, output_dtype=half)}
    for layer in inner.model.layers:
        fully_shard(layer, **options)
    embedding, tail = inner.model.embed_tokens, [inner.model.norm, inner.lm_head]
    if inner.config.tie_word_embeddings:
        tail.insert(1, embedding)
    else:
        fully_shard(embedding, **options)
    fully_shard(tail, reshard_after_forward=False, **options)
    fully_shard(model, **options)


def measure_step(settings: Settings, shape: Shape, rank: int | None, checkpointing: bool) -> dict[str, Any]:
    """Peak bytes of the second step, its second micro-batch, of one process among several; and what the formula says."""
    rows, length = settings["batch"]
    gpus, batch = settings["processes"], full_rows(rows, length)
    live = Live()
    with one_of(gpus) as mesh:
        model = llama(shape, rank=rank, checkpointing=checkpointing)
        shard(model, mesh)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(trained, lr=1e-3, foreach=False)
        live.add(list(model.parameters()))
        with live:
            for _ in range(2):
                optimiser.zero_grad()
                for _ in range(2):  # the second adds to gradients that are there
                    live.peak = 0
                    with torch.autocast("cpu", torch.bfloat16):
                        loss = loss_of(model, batch)
                    loss.backward()
                    del loss
                peak, rest = live.peak, live.now()
                optimiser.step()
    said = memory(shape, gpus=gpus, tokens=rows * length, rank=rank, checkpointing=checkpointing, cuda=False)
    states = said["weights"] + said["gradients"] + said["optimiser"]
    return {"peak": peak, "formula": said["total"], "states": rest, "states formula": states}


MEASURED: dict[str, Callable[[Settings], dict[str, Any]]] = {
    "parameters": count_parameters, "states": count_states, "saved": measure_saved, "head": measure_head,
    "operations": measure_operations, "reference": measure_reference,
}  # fmt: skip


def cases(settings: Settings) -> list[Case]:
    """What is measured: a constant each, and whole steps of shapes that no constant was taken from."""
    steps: list[Case] = [
        {"what": "step", "shape": shape, "rank": rank, "checkpointing": checkpointing}
        for shape in settings["shapes"] for rank in (None, RANK) for checkpointing in (True, False)
        if checkpointing or shape == settings["shapes"][0]
    ]  # fmt: skip
    return [{"what": name} for name in MEASURED] + steps


def measure(settings: Settings, case: Case, seed: int) -> dict[str, Any]:
    """One constant, or one step. Needs the extra `hf`."""
    if case["what"] == "step":
        return measure_step(settings, Shape(*case["shape"]), case["rank"], case["checkpointing"])
    return MEASURED[case["what"]](settings)


# ------------------------------------------------------------------------------------------------------------ summing up
def summarise(settings: Settings, records: list[Record]) -> dict[str, Any]:
    """Each measurement beside its formula, and what follows for the real shapes."""
    out: dict[str, Any] = {name: numbers_of(records, what=name)[0] for name in MEASURED}
    steps = [r for r in records if r.case["what"] == "step"]
    out["steps"] = [{**r.case, **r.numbers, "ratio": r.numbers["formula"] / r.numbers["peak"]} for r in steps]
    out["table"] = table(settings["tokens"], settings["length"])
    return out


def table(tokens: int, length: int) -> list[dict[str, Any]]:
    """A line a shape, way of training and number of GPUs: memory by part in GB, whether it fits, speed and hours."""
    lines = []
    for name, shape in SHAPES.items():
        for way, rank in (("full", None), ("LoRA", RANK)):
            for gpus in GPUS:
                parts = {key: x / GB for key, x in memory(shape, gpus=gpus, tokens=tokens, rank=rank).items()}
                rate = speed(operations(shape, length=length, rank=rank)["total"], gpus)
                fits = parts["total"] <= CARD * (1 - FREE)
                line = {"model": name, "way": way, "gpus": gpus, **parts, "fits": fits, "tokens a second": rate}
                lines.append({**line, "hours": 1e8 / rate / 3600})
    return lines


def page_rows(lines: list[dict[str, Any]]) -> list[str]:
    """The table of docs/scale.md: "not" where it does not fit, without a speed then."""
    head = [
        "| model | trained | GPUs | states | gathered | saved | working | GB a GPU | fits | tokens/s | hours |",
        "|---" * 11 + "|",
    ]
    for x in lines:
        states = x["weights"] + x["gradients"] + x["optimiser"]
        parts = " | ".join(f"{y:,.1f}" for y in (states, x["gathered"], x["saved"], x["working"], x["total"]))
        pace = f"yes | {x['tokens a second']:,.0f} | {x['hours']:.2g}" if x["fits"] else "not | |"
        head.append(f"| {x['model']} | {x['way']} | {x['gpus']} | {parts} | {pace} |")
    return head


def claims(settings: Settings, summary: dict[str, Any]) -> list[Claim]:
    """The formula against what was counted, and what it says of the real shapes."""
    counted, states, saved = summary["parameters"], summary["states"], summary["saved"]
    head, done, steps = summary["head"], summary["operations"], [x["ratio"] for x in summary["steps"]]
    said = {name: [shape.parameters, shape.adapter(RANK)] for name, shape in SHAPES.items()}
    trained = {name: [a - b for a, b in zip(x[:3], STATES[name], strict=True)] for name, x in states.items()}
    kept = [saved[kind]["measured"][-1] for kind in ("full", "LoRA")]
    foretold = [saved[kind]["predicted"] for kind in ("full", "LoRA")]
    off = max(
        abs(a - b) for kind in ("full", "LoRA") for a, b in zip(saved[kind]["measured"], saved[kind]["formula"], strict=True)
    )
    material = [head[f"{kind}, materialised"]["a logit"] for kind in ("full", "LoRA")]
    fused = [head[f"{kind}, fused"]["a logit"] for kind in ("full", "LoRA")]
    apart = max(abs(a / b - 1) for a, b in done.values())
    bits = summary["reference"]["bytes a token"]
    return [
        Claim(
            "The closed form counts the parameters of the 1B, 8B and 70B shapes and of their adapters exactly.",
            ", ".join(f"{name} {x['counted']:,}" for name, x in counted.items()),
            {name: [x["counted"], x["adapter"]] for name, x in counted.items()} == said,
        ),
        Claim(
            "After a step a trained weight has 16 bytes with its gradient and AdamW's state, in pure bf16 8, a frozen one 2.",
            "; ".join(f"{name} {' + '.join(f'{b:g}' for b in x[:3])}" for name, x in states.items()),
            all(x == [0, 0, 0] for x in trained.values()) and states["LoRA, bf16 base"][3] == 2,
        ),
        Claim(
            "What autograd keeps a token and layer is linear: coefficients solved for at five widths foretell the sixth, and "
            "are the formula's; with checkpointing it is the layer's input.",
            f"full {kept[0]:.0f} bytes, foretold {foretold[0]:.2f}; LoRA {kept[1]:.0f}, foretold {foretold[1]:.2f}; largest "
            f"difference from the formula {off:g}; checkpointed {saved['checkpointed'][0]:g} bytes a hidden number",
            off == 0
            and max(abs(a - b) for a, b in zip(kept, foretold, strict=True)) < 1e-6 * kept[0]  # a solve's rounding
            and saved["checkpointed"] == [2, 2],
        ),
        Claim(
            "Materialised logits cost 20 bytes each at the peak, five float32 copies; the fused head a small part of it.",
            f"{material[0]:.2f} and {material[1]:.2f} bytes a logit; fused {fused[0]:.2f} (trained), {fused[1]:.2f} (frozen)",
            all(abs(x - LOGIT) < 0.01 for x in material) and max(fused) < 1,
        ),
        Claim(
            "Operations, with and without LoRA and checkpointing, are the formula's.",
            f"{len(done)} counts, largest relative difference {apart:.1e}",
            len(done) == 4 and apart < 1e-12,
        ),
        Claim(
            "The reference costs 8 bytes a token on disk.",
            f"{bits:.3f}, headers included",
            STATISTICS <= bits < 1.01 * STATISTICS,
        ),
        Claim(
            "The peak of whole steps, sharded, of shapes that gave no constant, never passes the formula, which lies at most a "
            "seventh above it.",
            f"{len(steps)} steps: formula / measured from {min(steps):.2f} to {max(steps):.2f}",
            bool(steps) and 1 <= min(steps) and max(steps) <= 8 / 7,
        ),
        _fitting(summary["table"]),
    ]


def _fitting(lines: list[dict[str, Any]]) -> Claim:
    """The smallest number of GPUs of the table that each needs."""
    least: dict[str, dict[str, Any]] = {}
    for line in lines:
        if line["fits"]:
            least.setdefault(f"{line['model']} {line['way']}", line)
    wanted = {"1B full": 1, "1B LoRA": 1, "8B full": 8, "8B LoRA": 1, "70B full": 64, "70B LoRA": 8}
    return Claim(
        "Of 1, 8 and 64 GPUs of 80 GB, with checkpointing and the fused head, the 8B model needs 8 and the 70B model 64; with "
        "LoRA 1 and 8; the 1B model one.",
        "; ".join(f"{name}: {x['gpus']} ({x['total']:.0f} GB each)" for name, x in least.items()),
        {name: x["gpus"] for name, x in least.items()} == wanted,
    )


@style()
def draw(result: Result) -> "Figure":
    """Memory a GPU by part, a bar a model and number of GPUs; a panel a way of training."""
    page = figure(figsize=(9.6, 3.9))
    panels = page.subplots(1, 2, sharey=True, sharex=True)
    colors = {
        "weights": "blue",
        "gradients": "sky",
        "optimiser": "green",
        "gathered": "yellow",
        "saved": "orange",
        "working": "vermilion",
    }
    limit, room = 2 * CARD, 1.2
    for axes, (way, title) in zip(panels, (("full", "every weight trained"), ("LoRA", f"LoRA, rank {RANK}")), strict=True):
        lines = [line for line in result.summary["table"] if line["way"] == way]
        places = [i + 0.6 * (i // len(GPUS)) for i in range(len(lines))]
        left = np.zeros(len(lines))
        for part, color in colors.items():
            width = np.array([line[part] for line in lines])
            shown = np.clip(left + width, 0, limit) - np.clip(left, 0, limit)
            axes.barh(places, shown, left=np.clip(left, 0, limit), color=PALETTE[color], label=part, height=0.8)
            left += width
        for place, line in zip(places, lines, strict=True):
            beyond = line["total"] > limit
            text = f"{line['total']:,.0f}" + " (cut)" * beyond
            x = min(line["total"], limit)
            axes.annotate(text, (x, place), (3, 0), textcoords="offset points", va="center", fontsize=8)
        axes.axvline(CARD, color=GREY, lw=1, ls="--")
        axes.set(xlim=(0, room * limit), xlabel="GB a GPU", title=title)
        axes.set_yticks(places, [f"{line['model']}, {line['gpus']} GPU{'s' * (line['gpus'] > 1)}" for line in lines])
        axes.tick_params(axis="y", length=0)
    panels[0].invert_yaxis()
    page.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return page


SCALE = Study(
    name="scale",
    title="Memory of a ShiQ step at 1B, 8B and 70B",
    question="What fits on how many GPUs under FSDP2, by a formula whose constants are measured on small Llamas?",
    settings={
        "seeds": 1,
        "widths": [  # hidden, layers, heads, kv_heads, head_dim, intermediate; the last is foretold from the others
            [64, 1, 4, 2, 16, 224], [128, 1, 8, 2, 16, 448], [128, 1, 4, 1, 32, 512], [192, 1, 6, 2, 32, 640],
            [128, 1, 2, 2, 64, 384], [256, 1, 4, 2, 64, 896],
        ],
        "head": [1024, 64, 8192],  # tokens, hidden, vocabulary
        "shapes": [
            [208, 4, 13, 1, 16, 736, 3000],
            [144, 5, 3, 1, 48, 480, 13000],
            [176, 3, 11, 11, 16, 640, 15000, True],
        ],
        "batch": [8, 128],
        "processes": 8,
        "tokens": 8192,
        "length": 4096,
    },
    fast={"shapes": [[208, 4, 13, 1, 16, 736, 3000]]},
    cases=cases,
    measure=measure,
    summarise=summarise,
    claims=claims,
    draw=draw,
)  # fmt: skip
