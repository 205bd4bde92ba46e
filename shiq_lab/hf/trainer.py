"""ShiQTrainer: transformers' Trainer around the same loss functions that a table is trained with.

Only the loss, the data and the metrics are here. DDP, FSDP, mixed precision, gradient checkpointing, PEFT, resuming and
logging are the engine's own.
"""

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer
from transformers.utils import is_peft_available

from shiq_lab.batch import TokenBatch
from shiq_lab.errors import bad
from shiq_lab.hf import heads
from shiq_lab.hf.collator import collate, reference_stats, token_batch
from shiq_lab.hf.config import ShiQConfig
from shiq_lab.hf.formats import to_rows
from shiq_lab.hf.reference import Reference, data_hash, fingerprint, of_batch, statistics_of
from shiq_lab.hf.rows import Row, check_rows
from shiq_lab.losses.shiq import residuals_of
from shiq_lab.stats import TokenStats

logger = logging.getLogger(__name__)
REFERENCE_FILE = "shiq_reference.json"
# Sums that the metrics are made of, added up over micro-batches, steps and processes before they are divided.
SUMS = (
    "rows", "tokens", "dv", "rho", "abs_rho", "log_ratio", "reward",
    "good", "good_return", "bad", "bad_return", "loss", "size",
)  # fmt: skip


class Rows(Dataset):
    """Tokenised rows with their reference's statistics; `sides` int[n]: 1 better than the group's mean reward, -1 worse."""

    def __init__(self, rows: Sequence[Row], reference: Sequence[Reference] | None = None) -> None:
        self.rows, self.reference = list(rows), reference
        paid = torch.tensor([sum(row.rewards) for row in rows], dtype=torch.float64)
        _, group = torch.unique(torch.tensor([row.group for row in rows]), return_inverse=True)
        total = torch.zeros(int(group.max()) + 1, dtype=torch.float64).index_add(0, group, paid)
        mean = (total / torch.bincount(group))[group]
        apart = 1e-9 * (1 + paid.abs())  # a mean of equal rewards is rounded
        self.sides = (paid > mean + apart).long() - (paid < mean - apart).long()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        found = {"row": self.rows[index], "side": int(self.sides[index]), "length": len(self.rows[index])}
        return found if self.reference is None else {**found, "reference": self.reference[index]}


class ShiQTrainer(Trainer):
    """Trains a causal language model so that beta (logits - reference logits) are Q-values.

    model           of the transformers library, with or without a PEFT adapter; or any module (input_ids, attention_mask) ->
                    .logits, such as shiq_lab's own
    args            ShiQConfig
    train_dataset   examples (formats.to_rows: token ids, text, messages, preference pairs), or Rows
    ref_model       the frozen reference; None: the model as it comes, its adapter off
    processing_class   the tokenizer; not needed for token ids

    Logged beside the loss: dv (Dv at the first policy token, in units of reward), rho and abs_rho (mean residual a token),
    log_ratio (ln pi / pi_ref of a row), reward (of a row), margin (implied return beta log_ratio of rows better than their
    group's mean, less that of the worse). Each is a ratio of sums over all tokens or rows since the last log, on all processes.
    """

    args: ShiQConfig
    loss_is_scaled_for_ga = True  # each micro-batch is divided by the whole step's rows or tokens

    def __init__(
        self,
        model: nn.Module,
        args: ShiQConfig,
        train_dataset: Sequence[Mapping[str, Any]] | Rows | None = None,
        eval_dataset: Sequence[Mapping[str, Any]] | Rows | None = None,
        *,
        ref_model: nn.Module | None = None,
        processing_class: Any = None,
        **engine: Any,
    ) -> None:
        if not isinstance(args, ShiQConfig):
            raise bad("args", "a ShiQConfig", type(args).__name__)
        if args.n_gpu > 1:
            raise bad("args", "one process a GPU", f"one for {args.n_gpu}", "Start it with accelerate launch.")
        self.vocabulary = vocabulary_of(model)
        self.among = heads.allowed_tokens(args.allowed_tokens, self.vocabulary)
        self.fused = self._use_head(model, args)
        self.ref_model = self._check_reference(model, ref_model, args)
        if args.disable_dropout:
            disable_dropout(model)
        self.pad_id = int(getattr(processing_class, "pad_token_id", None) or 0)
        dtype = next(p for p in model.parameters() if p.is_floating_point()).dtype
        self.number = torch.float64 if dtype == torch.float64 else torch.float32
        self.sums: dict[str, Tensor] = {}
        self.checked = False
        parts = [self._rows(data, processing_class, args, f"{name}_dataset") for name, data in
                 (("train", train_dataset), ("eval", eval_dataset))]  # fmt: skip
        super().__init__(
            model=model, args=args, train_dataset=parts[0], eval_dataset=parts[1], processing_class=processing_class,
            data_collator=self.collate, **engine,
        )  # fmt: skip
        if self.among is not None:
            self.among = self.among.to(args.device)
        self.reference_hash = ""
        self._prepare_reference([part for part in parts if part is not None])

    # ------------------------------------------------------------------------------------------------- set-up
    @staticmethod
    def _use_head(model: nn.Module, args: ShiQConfig) -> bool:
        reason = "the naive step needs the logits of both models" if args.loss == "naive" else heads.why_not(model)
        if args.fused and reason:
            raise bad("fused", "a model whose head can be fused", reason, "Set fused: false.")
        if args.fused is None and reason:
            logger.info("token statistics are made from whole logits: %s", reason)
        if args.fused is False or reason:
            return False
        heads.answer_columns(model)
        return True

    def _check_reference(self, model: nn.Module, ref_model: nn.Module | None, args: ShiQConfig) -> nn.Module | None:
        if args.reference == "adapter" and not has_adapter(model):
            raise bad("reference", "'cache' or 'model' without an adapter", "'adapter'")
        if args.reference == "model" and ref_model is None:
            raise bad("ref_model", "a model, as reference is 'model'", "None")
        if ref_model is None:
            return None
        if vocabulary_of(ref_model) != self.vocabulary:
            raise bad("ref_model", f"logits of {self.vocabulary} tokens, as the model", f"{vocabulary_of(ref_model)}")
        if self.fused and not heads.why_not(ref_model):
            heads.answer_columns(ref_model)
        return ref_model.requires_grad_(False).eval()

    def _rows(self, data: Any, tokenizer: Any, args: ShiQConfig, name: str) -> Rows | None:
        if data is None:
            return None
        if isinstance(data, Rows):
            rows = data.rows
        elif isinstance(data, Sequence) and data and isinstance(data[0], Row):
            rows = list(data)
        else:
            names = ("max_length", "on_long", "append_eos", "end_of_turn", "template_options")
            options: dict[str, Any] = {key: getattr(args, key) for key in names}
            rows = to_rows(data, tokenizer=tokenizer, vocabulary=self.vocabulary, name=name, **options)
        check_rows(rows, vocabulary=self.vocabulary, name=name)
        self._check_allowed(rows, name)
        return data if isinstance(data, Rows) else Rows(rows)

    def _check_allowed(self, rows: Sequence[Row], name: str) -> None:
        """Every token that the policy chose must be one that it may say."""
        if self.among is None:
            return
        for i, row in enumerate(rows):
            ids = torch.tensor(row.input_ids)
            lost = (torch.tensor(row.completion_mask) == 1) & ~torch.isin(ids, self.among.cpu())
            if lost.any():
                place = int(lost.nonzero()[0])
                found = f"{int(ids[place])} at position {place}"
                raise bad(f"{name} row {i}, column input_ids", "actions among allowed_tokens", found)

    def _prepare_reference(self, parts: Sequence[Rows]) -> None:
        """Each row's reference statistics, from the cache or computed now; nothing where they are made at every step."""
        todo = [part for part in parts if part.reference is None]
        if self.args.reference == "model" and self.ref_model is not None:
            self.reference_hash = fingerprint(self.ref_model)
        if self.args.reference != "cache" or not todo:
            return
        model = self.model if self.ref_model is None else self.ref_model.to(self.args.device)
        self.reference_hash = fingerprint(model)
        for part in todo:
            compute = partial(self._compute_reference, model)
            part.reference = statistics_of(
                part.rows, compute, self.cache_folder(part.rows),
                rank=self.args.process_index, world=self.args.world_size, wait=self.accelerator.wait_for_everyone,
            )  # fmt: skip
        if self.ref_model is not None:
            self.ref_model = None  # its two numbers a token are all that is needed

    def cache_folder(self, rows: Sequence[Row]) -> Path | None:
        """Where these rows' statistics are kept: named after the reference, the rows, and what else changes the numbers."""
        if self.args.reference_cache is None:
            return None
        among = "" if self.among is None else ",".join(map(str, self.among.tolist()))
        kind = f"{self.number} {self.args.bf16} {self.args.fp16} {self.fused} {among}"
        key = "-".join(text[:16] for text in (self.reference_hash, data_hash(rows), sha256(kind.encode()).hexdigest()))
        return Path(self.args.reference_cache) / key

    def _compute_reference(self, model: nn.Module, rows: Sequence[Row]) -> list[Reference]:
        """In the trainer's own precision, batch by batch, without dropout and adapter."""
        training, size = model.training, self.args.per_device_eval_batch_size
        model.eval()
        found: list[Reference] = []
        with torch.no_grad(), self.accelerator.autocast(), adapter_off(model):
            for i in range(0, len(rows), size):
                some = rows[i : i + size]
                batch = token_batch(collate(some, pad_id=self.pad_id, dtype=self.number)).to(self.args.device)
                fused = self.fused and not heads.why_not(model)
                if i == 0 and fused:
                    heads.check_fused(model, batch)
                found += of_batch(heads.statistics(model, batch, fused=fused, among=self.among), some)
        model.train(training)
        return found

    # --------------------------------------------------------------------------------------------------- a step
    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Rows -> tensors; `sides` stands beside group_ids, so it is packed as they are."""
        rows = [item["row"] for item in items]
        reference = [item["reference"] for item in items] if "reference" in items[0] else None
        places: dict[str, Any] = {"pad_id": self.pad_id, "reference": reference, "dtype": self.number}
        if self.args.packing is not None:
            places["packing"] = self.args.packing
        else:
            places |= {"side": self.args.padding_side, "multiple": self.args.pad_to_multiple_of}
        numbered = [replace(row, group=i) for i, row in enumerate(rows)]  # a place in `items`, to be packed along
        tensors = collate(numbered, **places)
        sides = torch.tensor([item["side"] for item in items])
        number = tensors["group_ids"]
        tensors["sides"] = torch.where(number >= 0, sides[number.clamp(min=0)], 0)
        tensors["group_ids"] = torch.where(number >= 0, torch.tensor([row.group for row in rows])[number.clamp(min=0)], -1)
        return tensors

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The micro-batches of an optimiser step, and what their summed loss is divided by, over all processes."""
        samples = list(islice(epoch_iterator, num_batches))
        total = torch.stack([self._size(sample) for sample in samples]).sum().to(device) if samples else None
        return samples, None if total is None else self.accelerator.reduce(total, "sum")

    def _size(self, inputs: Mapping[str, Tensor]) -> Tensor:
        count = inputs["weights"] if self.args.reduction == "row" else inputs["completion_mask"]
        return count.sum().to(self.number)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The method's summed loss over the step's rows or tokens; times the processes, over which gradients are averaged."""
        batch = token_batch(inputs)
        if not self.checked:
            self._check_model(model, batch)
        stats, ref = self.both_statistics(model, batch, inputs)
        loss = self.args.method.loss(stats, ref, batch, reduction="sum", **self.args.loss_options)
        size = self._size(inputs)
        self._add_up(stats, ref, batch, inputs["sides"], "train" if model.training else "eval", loss, size)
        total = size if num_items_in_batch is None else num_items_in_batch / self.accelerator.num_processes
        loss = loss / (total + (total == 0))  # rows of weight 0 alone: a loss of 0, not of 0 / 0
        return (loss, {"loss": loss.detach()}) if return_outputs else loss

    def _check_model(self, model: nn.Module, batch: TokenBatch) -> None:
        """The first batch tells whether the fused road and packing give what the model itself computes."""
        self.checked, training = True, model.training
        model.eval()
        with self.accelerator.autocast():
            if self.fused:
                heads.check_fused(model, batch)
            heads.check_packed(model, batch, fused=self.fused, among=self.among)
        model.train(training)

    def both_statistics(
        self, model: nn.Module, batch: TokenBatch, inputs: Mapping[str, Tensor]
    ) -> tuple[TokenStats, TokenStats]:
        """(policy_stats, ref_stats) of a batch, the reference from its columns, the adapter switched off, or its model."""
        if self.args.loss == "naive":
            logits = heads.logits_of(model, batch, self.among)
            with torch.no_grad(), self._as_reference(model) as reference:
                ref_logits = heads.logits_of(reference, batch, self.among)
            return TokenStats.from_logits(logits, batch, ref_logits=ref_logits), TokenStats.from_logits(ref_logits, batch)
        stats = heads.statistics(model, batch, fused=self.fused, among=self.among)
        if "ref_token_logit" in inputs:
            return stats, reference_stats(inputs)
        if self.args.reference == "cache":  # the model as it is now is not the reference
            remedy = "Give these rows to the trainer when it is made."
            raise bad("dataset", "rows with the reference's statistics, as reference is 'cache'", "rows without", remedy)
        with torch.no_grad(), self._as_reference(model) as reference:
            fused = self.fused and not heads.why_not(reference)
            return stats, heads.statistics(reference, batch, fused=fused, among=self.among)

    @contextlib.contextmanager
    def _as_reference(self, model: nn.Module) -> Iterator[nn.Module]:
        if self.args.reference == "model":
            assert self.ref_model is not None
            self.ref_model.to(self.args.device)
            with self.accelerator.autocast():  # the policy's own forward was wrapped in it
                yield self.ref_model
        else:
            with adapter_off(model):
                yield model

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, None, None]:
        """The loss of a batch that is not trained on; its sums enter the eval_ metrics."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach().mean(), None, None

    # --------------------------------------------------------------------------------------------------- metrics
    def _add_up(
        self, stats: TokenStats, ref: TokenStats, batch: TokenBatch, sides: Tensor, part: str, loss: Tensor, size: Tensor
    ) -> None:
        with torch.no_grad():
            args, policy = self.args, stats.detach()
            rho, actions = residuals_of(args.method.step, policy, ref, batch, args.beta, args.gamma, args.steps_ahead)
            rows = torch.zeros(batch.terminated.shape, dtype=rho.dtype, device=rho.device)
            rows = rows[:, None] if rows.ndim == 1 else rows  # (B, N)
            into = actions.segment.clamp(min=0)
            per_row = lambda x: rows.scatter_add(1, into, torch.where(actions.real, x, 0.0))  # noqa: E731
            ratio = actions.of(policy.token_logit - policy.logsumexp - ref.token_logit + ref.logsumexp)
            first = torch.ones_like(actions.real)
            first[:, 1:] = actions.segment[:, 1:] != actions.segment[:, :-1]
            dv = torch.where(first & actions.real, args.beta * actions.of(policy.logsumexp - ref.logsumexp), 0.0)
            implied, side = args.beta * per_row(ratio), sides.reshape(rows.shape)
            real = per_row(torch.ones_like(rho)) > 0
            found = (
                real.sum(), actions.real.sum(), dv.sum(), rho.sum(), rho.abs().sum(), ratio.sum(),
                actions.of(batch.rewards[:, 1:].to(rho.dtype)).sum(),
                (side > 0).sum(), implied[side > 0].sum(), (side < 0).sum(), implied[side < 0].sum(),
                loss, size,
            )  # fmt: skip
            new = torch.stack([x.to(torch.float64) for x in found])
            self.sums[part] = new if part not in self.sums else self.sums[part] + new

    def _metrics(self, part: str) -> dict[str, float]:
        """The metrics since the last log, from sums over all processes; all of them must call."""
        total = self.accelerator.reduce(self.sums.pop(part), "sum")
        s = dict(zip(SUMS, total.tolist(), strict=True))
        means = {
            "dv": s["dv"] / s["rows"], "rho": s["rho"] / s["tokens"], "abs_rho": s["abs_rho"] / s["tokens"],
            "log_ratio": s["log_ratio"] / s["rows"], "reward": s["reward"] / s["rows"],
        }  # fmt: skip
        if s["good"] and s["bad"]:
            means["margin"] = s["good_return"] / s["good"] - s["bad_return"] / s["bad"]
        if part == "eval" and s["size"]:  # the engine's is a mean over batches, and so depends on their size
            means["loss"] = s["loss"] / s["size"]
        return means

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The engine's numbers, and train metrics beside a train loss; those of an evaluation are in its output."""
        if "train" in self.sums and "loss" in logs:
            logs.update(self._metrics("train"))
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The engine's, with the metrics of these rows in its output."""
        self.sums.pop("eval", None)
        output = super().evaluation_loop(*args, **kwargs)
        if "eval" in self.sums:
            prefix = kwargs.get("metric_key_prefix", "eval")
            output.metrics.update({f"{prefix}_{name}": value for name, value in self._metrics("eval").items()})
        return output

    # ------------------------------------------------------------------------------------------------ checkpoints
    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Which reference the run is against, and the engine's checkpoint, whose own last file says that it is whole."""
        if self.args.should_save and self.reference_hash:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / REFERENCE_FILE).write_text(json.dumps({"reference": self.reference_hash, "run": self._run()}))
        super()._save_checkpoint(model, trial)

    def _run(self) -> dict[str, Any]:
        """What a run that goes on should share with its beginning."""
        data = data_hash(self.train_dataset.rows) if isinstance(self.train_dataset, Rows) else ""
        return {"loss": self.args.loss, "reduction": self.args.reduction, "data": data, **self.args.loss_options}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Refuses a checkpoint that was trained against another reference."""
        path = Path(resume_from_checkpoint) / REFERENCE_FILE
        if path.exists() and self.reference_hash:
            kept = json.loads(path.read_text())
            said = kept["reference"]
            changed = [name for name, value in self._run().items() if kept.get("run", {}).get(name, value) != value]
            if changed:
                logger.warning("the run goes on with another %s than it began with", ", ".join(changed))
            if said != self.reference_hash:
                remedy = "Make the trainer with the model that the run began with; the checkpoint's weights are loaded on top."
                raise bad("resume_from_checkpoint", "a run against this reference", f"one against {said[:12]}", remedy)
        super()._load_from_checkpoint(resume_from_checkpoint, model)


def last_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """The newest checkpoint that was written to its end: the engine writes trainer_state.json last. None if there is none."""
    numbered = (p for p in Path(folder).glob("checkpoint-*") if p.name.rpartition("-")[2].isdecimal())
    found = sorted(numbered, key=lambda p: int(p.name.rpartition("-")[2]), reverse=True)
    return next((str(path) for path in found if _whole(path / "trainer_state.json")), None)


def _whole(state: Path) -> bool:
    try:
        return "global_step" in json.loads(state.read_text())
    except (OSError, ValueError):
        return False


# --------------------------------------------------------------------------------------------------------- the model
def vocabulary_of(model: nn.Module) -> int:
    """V: rows of the model's head, or what a small model says of itself."""
    inner = heads.core(model)
    head = heads.head_of(inner)
    if head is not None:
        return int(head.weight.shape[0])  # type: ignore[index]
    for holder, name in (
        (getattr(inner, "mdp", None), "n_tokens"),
        (inner, "n_tokens"),
        (getattr(inner, "config", None), "vocab_size"),
    ):
        if getattr(holder, name, None) is not None:
            return int(getattr(holder, name))
    raise bad("model", "a causal language model that tells its vocabulary (config.vocab_size)", type(inner).__name__)


def has_adapter(model: Any) -> bool:
    """Whether PEFT wraps the model, so that its adapter can be switched off."""
    if not is_peft_available():
        return False
    from peft import PeftModel

    inner = getattr(model, "module", model)
    return isinstance(inner, PeftModel)


@contextlib.contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """Inside, a PEFT model answers as the model under it; any other as itself."""
    inner = getattr(model, "module", model)
    with inner.disable_adapter() if has_adapter(model) else contextlib.nullcontext():
        yield


def disable_dropout(model: nn.Module) -> None:
    """Every dropout's probability 0, attention's included: the policy and its reference must be one network."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "attn_dropout", "dropout_p"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
