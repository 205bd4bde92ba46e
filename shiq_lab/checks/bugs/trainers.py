"""Bugs of whole trainers, each in the layer of its thread: a loop, a model or an adapter, with a correct loss inside."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, scaled_dot_product_attention

from shiq_lab.batch import TokenBatch
from shiq_lab.checks.bugs.plant import Bug, plant
from shiq_lab.checks.report import Report
from shiq_lab.checks.trainer.loop import PlainLoop, call_loss, plain_loop, token_logprobs
from shiq_lab.checks.trainer.rows import Example, TrainerConfig, collate
from shiq_lab.checks.trainer.subject import NoisyTable, TrainerSubject, trainer_traits
from shiq_lab.checks.trainer.suite import check_trainer
from shiq_lab.enumeration import enumerate_trajectories
from shiq_lab.losses.shiq import shiq_loss
from shiq_lab.mdp import TokenMDP
from shiq_lab.models.tabular import CausalLMOutput
from shiq_lab.stats import TokenStats


# ------------------------------------------------------------------------------------------------ losses to train with
def shiq(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor, rewards: Tensor,
    terminated: Tensor, beta: float, gamma: float, weights: Tensor | None = None, segment_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """ShiQ, the mean over rows (or packed segments) of the sum over tokens."""
    batch = TokenBatch(input_ids, attention_mask, completion_mask, rewards, terminated, weights=weights,  # type: ignore[arg-type]
                       segment_ids=segment_ids, position_ids=position_ids)  # fmt: skip
    stats, ref = (TokenStats.from_logits(x, batch) for x in (logits, ref_logits))
    return shiq_loss(stats, ref, batch, beta=beta, gamma=gamma)


def token_mean_shiq(*, completion_mask: Tensor, **inputs: Any) -> Tensor:
    """ShiQ, the mean over the policy's tokens."""
    return shiq(completion_mask=completion_mask, **inputs) * len(completion_mask) / completion_mask.sum()


def _log_ratios(
    logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """(ln pi, ln pi / pi_ref) of every row's completion, float[B] each."""
    none = torch.zeros_like(input_ids, dtype=logits.dtype)
    batch = TokenBatch(input_ids, attention_mask, completion_mask, none, torch.ones(len(input_ids), dtype=torch.bool))
    own, ref = (token_logprobs(x, batch).sum(1) for x in (logits, ref_logits))
    return own, own - ref


def dpo(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor, rewards: Tensor,
    terminated: Tensor, beta: float, gamma: float, label_smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    """DPO with label smoothing, the mean over pairs."""
    chosen, rejected = _log_ratios(logits, ref_logits, input_ids, attention_mask, completion_mask)[1].chunk(2)
    margin = beta * (chosen - rejected)
    return -((1 - label_smoothing) * logsigmoid(margin) + label_smoothing * logsigmoid(-margin)).mean()


def ppo(
    *, logits: Tensor, ref_logits: Tensor, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor, rewards: Tensor,
    terminated: Tensor, beta: float, gamma: float, behavior_logprobs: Tensor,
) -> Tensor:  # fmt: skip
    """Clipped sequence-level ratio times a leave-one-out advantage with the KL in the reward; groups of two."""
    own, ratio_ref = _log_ratios(logits, ref_logits, input_ids, attention_mask, completion_mask)
    regularised = ((rewards * completion_mask).sum(1) - beta * ratio_ref).detach().reshape(-1, 2)
    advantage = (regularised - regularised.flip(1)).reshape(-1)
    ratio = torch.exp(own - behavior_logprobs.sum(1))
    return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()


# --------------------------------------------------------------------------------------------- models that can go wrong
class AttentionLM(NoisyTable):
    """The oracle behind one attention layer: what each token attends to decides which row of the table it gets.

    Token and position embeddings are multiplied and summed by attention with equal scores; the sum names the string so far,
    and the nearest of the automaton's own strings gives the state. Wrong positions, attended padding or a neighbour's tokens
    give another sum, hence another row.
    """

    def __init__(self, mdp: TokenMDP, logits: Tensor, *, trainable: bool, dropout: float) -> None:
        super().__init__(mdp, logits, trainable=trainable, dropout=dropout)
        rows = enumerate_trajectories(mdp)
        width, length = 24, 4 * rows.input_ids.shape[1]
        draw = torch.Generator().manual_seed(1)
        self.tokens = torch.randn(mdp.n_tokens, width, generator=draw, dtype=torch.float64)
        self.places = torch.randn(length, width, generator=draw, dtype=torch.float64)
        real = rows.attention_mask == 1
        codes = self.attend(rows.input_ids, rows.attention_mask, None, None)
        self.codes, self.coded = codes[real], rows.known_states()[real]

    def attend(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None, segment_ids: Tensor | None
    ) -> Tensor:
        """The sum over each token's own past, float[B, L, D]; without position_ids every column counts, as in GPT-2."""
        L = input_ids.shape[1]
        position = torch.arange(L).expand_as(input_ids) if position_ids is None else position_ids
        value = self.tokens[input_ids.clamp(0, len(self.tokens) - 1)] * self.places[position.clamp(max=len(self.places) - 1)]
        seen = torch.ones(L, L, dtype=torch.bool).tril() & (attention_mask[:, None, :] == 1)  # (B, L, L)
        if segment_ids is not None:
            seen = seen & (segment_ids[:, :, None] == segment_ids[:, None, :])
        seen = seen | torch.eye(L, dtype=torch.bool)
        mean = scaled_dot_product_attention(torch.zeros_like(value), torch.zeros_like(value), value, attn_mask=seen)
        return mean * seen.sum(-1, keepdim=True)

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
    ) -> CausalLMOutput:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        code = self.attend(input_ids, mask, position_ids, segment_ids)
        state = self.coded[torch.cdist(code, self.codes.expand(len(code), -1, -1)).argmin(-1)]
        state = torch.where(mask == 1, state, -1)
        lowest = torch.finfo(self.table.dtype).min
        table = torch.where(self.allowed, self.dropout(self.table), lowest)
        return CausalLMOutput(torch.where((state >= 0)[..., None], table[state.clamp(min=0)], 0.0))


def attention_model(mdp: TokenMDP, logits: Tensor, *, trainable: bool, dropout: float, dtype: torch.dtype) -> AttentionLM:
    """For the trait make_model."""
    table = torch.where(torch.tensor(mdp.allowed), logits, 0.0).to(dtype)
    return AttentionLM(mdp, table, trainable=trainable, dropout=dropout)


class AdaptedLM(nn.Module):
    """A frozen base table with named adapters added to it, of which one or none is active."""

    def __init__(self, model: Any, ref_model: Any) -> None:
        super().__init__()
        self.core = model
        shift = torch.linspace(-1, 1, model.table.numel(), dtype=model.table.dtype).reshape(model.table.shape)
        self.register_buffer("base", torch.where(model.allowed, ref_model.table.detach() - shift, 0.0))  # before fine-tuning
        self.base: Tensor
        trained = {"policy": model.table, "reference": ref_model.table}
        self.adapters = nn.ParameterDict({name: nn.Parameter(table.detach() - self.base) for name, table in trained.items()})
        self.adapters["reference"].requires_grad_(False)
        self.active: str | None = "policy"

    @property
    def table(self) -> nn.Parameter:
        return self.adapters["policy"]

    @contextlib.contextmanager
    def using(self, adapter: str | None) -> Iterator[None]:
        """Inside, the named adapter is active; None: the base alone."""
        before, self.active = self.active, adapter
        try:
            yield
        finally:
            self.active = before

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> CausalLMOutput:
        table = self.base if self.active is None else self.base + self.adapters[self.active]
        found: CausalLMOutput = torch.func.functional_call(self.core, {"table": table}, (input_ids, attention_mask))
        return found


# ------------------------------------------------------------------------------------------------------ further loops
class AdapterLoop(PlainLoop):
    """Policy and reference are adapters of one base model: the fine-tuned one was copied before training."""

    def __init__(self, model: Any, ref_model: Any, dataset: Sequence[Example], config: TrainerConfig, **options: Any) -> None:
        super().__init__(AdaptedLM(model, ref_model), ref_model, dataset, config, **options)

    def ref_logits(self, ref_model: nn.Module, batch: TokenBatch) -> Tensor:
        with torch.no_grad(), self.model.using("reference"):  # type: ignore[operator]
            return self.logits(self.model, batch)


class FusedLoop(PlainLoop):
    """DPO whose option `fused` computes log-probabilities a pair at a time, never all logits at once."""

    def loss_of(self, rows: Sequence[Example], model: nn.Module, ref_model: nn.Module) -> Tensor:
        batch, config = self.batch_of(rows), self.config
        if config.options.get("fused"):
            smoothing = config.options.get("label_smoothing", 0.0)
            return self.fused_dpo(batch, model, ref_model, beta=config.beta, label_smoothing=smoothing)
        return call_loss(self.loss, self.logits(model, batch), self.ref_logits(ref_model, batch), batch, config)

    def fused_dpo(
        self, batch: TokenBatch, model: nn.Module, ref_model: nn.Module, *, beta: float, label_smoothing: float = 0.0
    ) -> Tensor:
        """The mean over pairs of their losses."""
        total, pairs = torch.zeros(()), len(batch) // 2
        for pair in range(pairs):
            both = batch.select([pair, pair + pairs])
            own = token_logprobs(self.logits(model, both), both)
            ref = token_logprobs(self.ref_logits(ref_model, both), both)
            chosen, rejected = (own - ref).sum(1)
            margin = beta * (chosen - rejected)
            total = total - (1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)
        return total / pairs


class RolloutLoop(PlainLoop):
    """The log-probabilities of the behaviour are taken when a row is generated, alone and without padding."""

    ratios: Tensor

    def loss_of(self, rows: Sequence[Example], model: nn.Module, ref_model: nn.Module) -> Tensor:
        batch = self.batch_of(rows)
        logits = self.logits(model, batch)
        old, chosen = self.rollout(rows, batch), batch.completion_mask == 1
        self.ratios = (token_logprobs(logits, batch).detach() - old).exp()[chosen]
        said = lambda **inputs: self.loss(**inputs, behavior_logprobs=old)  # noqa: E731
        return said(
            logits=logits, ref_logits=self.ref_logits(ref_model, batch), input_ids=batch.input_ids,
            attention_mask=batch.attention_mask, completion_mask=batch.completion_mask, rewards=batch.rewards.to(logits.dtype),
            terminated=batch.terminated, beta=self.config.beta, gamma=self.config.gamma,
        )  # fmt: skip

    def rollout(self, rows: Sequence[Example], batch: TokenBatch) -> Tensor:
        """ln pi of the tokens when they were sampled, in the places that they have in the padded batch: float[B, L]."""
        alone = []
        with torch.no_grad():
            for row in rows:
                single = collate([row], self.config)
                real = single.attention_mask[0] == 1
                logits = self.model(input_ids=single.input_ids[:, real], attention_mask=single.attention_mask[:, real]).logits
                narrow = {
                    name: getattr(single, name)[:, real]
                    for name in ("input_ids", "attention_mask", "completion_mask", "rewards")
                }
                said = TokenBatch(**narrow, terminated=single.terminated)
                alone.append(token_logprobs(logits, said)[said.completion_mask == 1])
        old = torch.zeros(batch.input_ids.shape, dtype=alone[0].dtype)
        old[batch.completion_mask == 1] = torch.cat(alone)
        return old


# ----------------------------------------------------------------------------------------------------------- the matrix
def suite(factory: Any) -> Report:
    """check_trainer with the factory's own traits."""
    return check_trainer(factory)


def smoke(factory: Any) -> bool:
    """The naive test: from the reference the loss is finite and falls in ten steps, and the gradient is not zero."""
    subject = TrainerSubject(factory, trainer_traits(factory))
    world = subject.worlds[0]
    rows = subject.some(world, 4)
    trainer = subject.build(world, "reference", lr=0.05)[0]
    losses = [float(trainer.step(rows)) for _ in range(10)]
    moving = bool(trainer.gradient.abs().max() > 0)
    return all(abs(x) < float("inf") for x in losses) and losses[-1] < losses[0] and moving


def broken(loop: type[PlainLoop], method: str, *edits: tuple[str, str]) -> type[PlainLoop]:
    """The loop with one method's source edited."""
    return type(loop.__name__, (loop,), {method: plant(getattr(loop, method), *edits)})


def _bug(
    id: str, thread: str, symptom: str, mutation: str, loss: Any, method: str, *edits: tuple[str, str],
    loop: type[PlainLoop] = PlainLoop, falls: bool = True, **options: Any,
) -> Bug:  # fmt: skip
    """A bug in a method of a loop. falls: whether the loss has a value that training makes smaller."""
    right = plain_loop(loss, loop=loop, **options)
    wrong = plain_loop(loss, loop=broken(loop, method, *edits), **options)
    return Bug(id, thread, symptom, mutation, "M", right, wrong, suite, smoke if falls else None)


SMOOTHED: dict[str, Any] = {"kind": "preference", "options": {"label_smoothing": 0.2}, "same": {"fused": True}}
LEFT: dict[str, Any] = {"kind": "on_policy", "padding": ("left", "right")}

ATTEND = ('"attention_mask": batch.attention_mask}', '"attention_mask": torch.ones_like(batch.attention_mask)}')
POSITIONS = ('if "position_ids" in named:', "if False:")
WHOLE = ("self.size([row for micro in window for row in micro])", "self.size(rows)")
BOUNDARIES = ("batch.segment_ids is not None:", "batch.segment_ids is not None and len(batch) == 1:")
TOKENS: dict[str, Any] = {"reduction": "token mean"}
PACKED: dict[str, Any] = {"make_model": attention_model, "packing": True}

BUGS: list[Bug] = [
    _bug("B12", "NeMo-Aligner#68", "the ratio is not 1 at step 0",
         "the training pass attends to padding, the rollout had none",
         ppo, "logits", ATTEND, loop=RolloutLoop, falls=False, **LEFT),
    _bug("B14", "trl#6800", "left-padded rows are scored at shifted positions",
         "position_ids are not passed to a model with absolute positions",
         shiq, "logits", POSITIONS, make_model=attention_model),
    _bug("E11", "LlamaFactory#8459", "anchored to the base model instead of the fine-tuned one",
         "the reference is the model with its adapter off",
         dpo, "ref_logits", ('using("reference")', "using(None)"), loop=AdapterLoop, kind="preference", dtypes=("float64",)),
    _bug("E13", "trl#6443", "evaluation margins mean nothing",
         "evaluation takes the reference's log-probabilities from the trained policy",
         dpo, "evaluate", ("self.ref_model", "self.model"), kind="preference"),
    _bug("E15", "trl#2042", "noisy log-ratios", "dropout stays on in the reference's pass",
         dpo, "__init__", ("self.ref_model.eval()", "pass"), kind="preference"),
    _bug("G1", "trl#6024", "the gradient shrinks by accumulated over generated micro-batches",
         "the denominator counts the whole call, the sum one optimiser step",
         token_mean_shiq, "step", WHOLE, **TOKENS),
    _bug("G3", "open-instruct#1161", "the token mean became a mean of micro-batch means", "every micro-batch counts alike",
         token_mean_shiq, "accumulate", ("self.size(micro) / whole", "1 / len(window)"), **TOKENS),
    _bug("G12", "trl#7062", "label smoothing is ignored when fused", "the option is not forwarded to the fused path",
         dpo, "loss_of", (", label_smoothing=smoothing", ""), loop=FusedLoop, **SMOOTHED),
    _bug("K1", "axolotl#1375", "tokens attend to other samples",
         "segment boundaries are dropped in batches of more than one row",
         shiq, "logits", BOUNDARIES, **PACKED),
]  # fmt: skip
