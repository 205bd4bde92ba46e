"""ShiQTrainer against the small loops: one loss object, one path of weights, one answer at the exact optimum."""

from collections.abc import Callable
from copy import deepcopy
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shiq_lab import objectives, training
from shiq_lab.batch import TokenBatch
from shiq_lab.enumeration import enumerate_trajectories
from shiq_lab.envs import make
from shiq_lab.losses import methods, shiq
from shiq_lab.models.tabular import TabularLM
from shiq_lab.models.transformer import TinyTransformer
from shiq_lab.stats import TokenStats

pytestmark = pytest.mark.slow
BETA = 0.5


def config(folder: Path, **changes: Any) -> Any:
    from shiq_lab.hf.config import ShiQConfig

    plain = {
        "beta": BETA, "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "report_to": [],
        "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "steps", "logging_steps": 1,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    return ShiQConfig(output_dir=str(folder), **{**plain, **changes})


def rows_of(batch: TokenBatch) -> list[Any]:
    from shiq_lab.hf.rows import Row

    length = batch.attention_mask.sum(1).tolist()
    return [
        Row(
            batch.input_ids[i, :n].tolist(), batch.completion_mask[i, :n].tolist(), batch.rewards[i, :n].tolist(),
            bool(batch.terminated[i]), float(batch.weights[i]), int(batch.group_ids[i]),
        )
        for i, n in enumerate(length)
    ]  # fmt: skip


def path_of_trainer(model: nn.Module, ref: nn.Module, batch: TokenBatch, folder: Path, steps: int) -> list[list[Tensor]]:
    """The weights after each optimiser step of ShiQTrainer on all rows at once, plain SGD."""
    from transformers import PrinterCallback, TrainerCallback

    from shiq_lab.hf.trainer import ShiQTrainer

    seen: list[list[Tensor]] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            seen.append([p.detach().clone() for p in model.parameters()])

    args = config(folder, per_device_train_batch_size=len(batch), max_steps=steps)
    step = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = ShiQTrainer(model, args, rows_of(batch), ref_model=ref, optimizers=(step, None), callbacks=[Watch()])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return seen


def path_of_loop(model: nn.Module, ref: nn.Module, batch: TokenBatch, steps: int) -> list[list[Tensor]]:
    """The same by a plain loop: two forward passes, shiq_loss, backward, SGD."""
    step = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    for _ in range(steps):
        stats, fixed = (TokenStats.from_logits(m(batch.input_ids, batch.attention_mask).logits, batch) for m in (model, ref))
        step.zero_grad()
        shiq.shiq_loss(stats, fixed, batch, beta=BETA).backward()
        step.step()
        seen.append([p.detach().clone() for p in model.parameters()])
    return seen


MODELS: dict[str, Callable[[Any], tuple[nn.Module, nn.Module]]] = {
    "table": lambda mdp: (TabularLM(mdp), TabularLM.reference(mdp)),
    "tiny transformer": lambda mdp: (
        TinyTransformer(mdp.n_tokens, width=16, layers=1, heads=2, seed=1),
        TinyTransformer(mdp.n_tokens, width=16, layers=1, heads=2, seed=2),
    ),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", ["ToolCall", "Brackets"])
def test_the_trainer_follows_the_small_loop(kind: str, name: str, tmp_path: Path) -> None:
    """Five steps of plain SGD: the weights agree step for step, to 1e-6 of their size (float32: the engine's order of sums)."""
    mdp = make(name)
    batch = enumerate_trajectories(mdp).select(slice(0, 40))
    model, ref = MODELS[kind](mdp)
    plain = path_of_loop(deepcopy(model), ref, batch, 5)
    engine = path_of_trainer(model, deepcopy(ref), batch, tmp_path, 5)
    assert len(engine) == 5
    for a, b in zip(plain, engine, strict=True):
        for x, y in zip(a, b, strict=True):
            assert (x - y).abs().max() <= 1e-6 * max(1.0, x[x > torch.finfo(x.dtype).min].abs().max().item())
    moved = max((x - y).abs().max().item() for x, y in zip(plain[0], plain[-1], strict=True))
    assert moved > 1e-3, "nothing was trained, so nothing was compared"


def test_one_loss_object_everywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The trainer, the tiny loop and the table reach shiq_loss itself: one counter under them all counts each."""
    from shiq_lab import tiny
    from shiq_lab.learning import rows_of as rows_for

    assert config(tmp_path).method.loss is methods.METHODS["shiq"].loss is shiq.shiq_loss
    assert objectives.lookup("shiq").readout.loss is shiq.shiq_loss
    calls: list[str] = []
    code = shiq.residuals_of

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append("call")
        return code(*args, **kwargs)

    monkeypatch.setattr(shiq, "residuals_of", counted)  # a copy of the loss elsewhere would not come by here
    mdp = make("ToolCall")
    batch = enumerate_trajectories(mdp)
    seen = []
    training.train_sampled(mdp, "shiq", iter([batch]), beta=BETA, learning_rate=0.1, steps=1)
    seen.append(len(calls))
    start = tiny.pretrain(mdp, beta=BETA, width=8, layers=1, heads=2, steps=1, rows=64)
    tiny.train_tiny(start, "shiq", rows_for(start.world, start.world.mdp.ref_log_policy), steps=1)
    seen.append(len(calls))
    path_of_trainer(TabularLM(mdp), TabularLM.reference(mdp), batch, tmp_path, 1)
    seen.append(len(calls))
    assert 0 < seen[0] < seen[1] < seen[2]


@pytest.mark.parametrize(
    ("options", "same"),
    [({}, True), ({"loss": "shifted"}, False), ({"loss": "turn-cut"}, False), ({"loss": "semi-gradient"}, False),
     ({"reduction": "token"}, True), ({"reference": "model"}, False), ({"fused": False}, False)],
    ids=lambda x: ",".join(f"{k}={v}" for k, v in x.items()) or "default" if isinstance(x, dict) else "",
)  # fmt: skip
def test_check_trainer_holds(options: dict[str, Any], same: bool) -> None:
    """The oracle in the whole engine: data, collator, fused head, accumulation, packing, evaluation."""
    from shiq_lab import check_trainer
    from shiq_lab.hf.factories import shiq as factory

    made = factory(**options)
    if not same:
        made.trainer_traits |= {"options": {}, "same": {}}
    report = check_trainer(made)
    assert report.passed, str(report)
    assert {r.name for r in report.results if r.status == "passed"} >= {"FP", "CV", "BS", "PAD", "DT", "IN", "PU", "EV", "PK"}


def test_the_package_s_own_table_in_the_engine() -> None:
    """A module without backbone and head goes through its logits."""
    from shiq_lab import check_trainer
    from shiq_lab.checks.trainer.subject import plain_model
    from shiq_lab.hf.factories import shiq as factory

    assert check_trainer(factory(plain_model)).passed


def test_the_naive_step_has_another_optimum() -> None:
    """Step 0 in the engine: l* is none of its fixed points, as the derivation says, and everything else holds."""
    from shiq_lab import check_trainer
    from shiq_lab.hf.factories import shiq as factory

    made = factory(loss="naive", reference="model")
    made.trainer_traits |= {"options": {}, "same": {}}
    assert set(check_trainer(made).failed) == {"FP", "IN"}


@pytest.mark.parametrize("bug", ["shift", "local mean", "no reference", "dropout"])
def test_planted_bugs_are_caught(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the trainer could get wrong, and the check that sees it."""
    from shiq_lab import check_trainer
    from shiq_lab.hf import collator, factories, trainer

    if bug == "shift":
        plain = trainer.token_batch

        def late(tensors: Any) -> TokenBatch:
            mask = tensors["completion_mask"]
            later = torch.nn.functional.pad(mask, (1, 0))[:, :-1] * tensors["attention_mask"]
            return plain({**tensors, "completion_mask": later})

        monkeypatch.setattr(trainer, "token_batch", late)
        caught = "FP"
    elif bug == "local mean":
        monkeypatch.setattr(trainer.ShiQTrainer, "get_batch_samples", lambda self, it, n, device: (list(islice(it, n)), None))
        caught = "BS"
    elif bug == "no reference":
        plain_stats = collator.reference_stats

        def wrong(tensors: Any) -> TokenStats:
            stats = plain_stats(tensors)
            return TokenStats(stats.token_logit, torch.zeros_like(stats.logsumexp), stats.end_logsumexp)

        monkeypatch.setattr(trainer, "reference_stats", wrong)
        caught = "FP"
    else:
        monkeypatch.setattr(trainer, "disable_dropout", lambda model: None)
        caught = "PU"
    assert caught in check_trainer(factories.shiq()).failed


def test_metrics_are_what_they_say(tmp_path: Path) -> None:
    """Of one step on all rows: each logged number against plain sums over a listing."""
    from transformers import PrinterCallback

    from shiq_lab.hf.trainer import ShiQTrainer

    mdp = make("ToolCall")
    batch = enumerate_trajectories(mdp)
    model = TabularLM(mdp, torch.tensor(mdp.ref_logits) + 0.3 * torch.tensor(mdp.ref_logits).sin())
    ref = TabularLM.reference(mdp)
    stats, fixed = (
        TokenStats.from_logits(m(batch.input_ids, batch.attention_mask).logits.detach(), batch) for m in (model, ref)
    )
    rho, actions = shiq.residuals_of(methods.METHODS["shiq"].step, stats, fixed, batch, BETA, 1.0, None)
    ratio = actions.of((stats.token_logit - stats.logsumexp) - (fixed.token_logit - fixed.logsumexp)).sum(1)
    paid = (batch.rewards * batch.completion_mask).sum(1)
    mean = torch.stack([paid[batch.group_ids == g].mean() for g in batch.group_ids])
    args = config(tmp_path, per_device_train_batch_size=len(batch), max_steps=1, learning_rate=0.0)
    trainer = ShiQTrainer(model, args, rows_of(batch), ref_model=ref)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "dv" in entry)
    first = actions.of(stats.logsumexp - fixed.logsumexp)[:, 0]
    wanted = {
        "dv": BETA * first.mean(), "rho": rho.sum() / actions.real.sum(), "abs_rho": rho.abs().sum() / actions.real.sum(),
        "log_ratio": ratio.mean(), "reward": paid.mean(),
        "margin": BETA * (ratio[paid > mean + 1e-9].mean() - ratio[paid < mean - 1e-9].mean()),
    }  # fmt: skip
    for name, value in wanted.items():
        assert logged[name] == pytest.approx(float(value), rel=1e-10, abs=1e-12), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 0.0}, "beta: expected a finite number > 0, got 0.0."),
        ({"loss": "shiqq"}, "loss: expected a method, got 'shiqq'. Did you mean 'shiq'?"),
        ({"reduction": "mean"}, "reduction: expected one of row, token, got 'mean'."),
        ({"n_steps": 2, "loss": "shifted"},
         "n_steps: expected None for a loss whose number of steps is its own, got 2. Set loss: shiq."),
        ({"loss": "naive"},
         "reference: expected the reference's logits for the naive step, got 'cache'. Set reference: model or adapter."),
        ({"packing": 8, "padding_side": "left"}, "padding_side: expected 'right' where rows are packed, got 'left'."),
        ({"remove_unused_columns": True},
         "remove_unused_columns: expected False, got True. The loss needs columns that no model's forward names."),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)  # fmt: skip
def test_bad_settings(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        config(tmp_path, **changes)
    assert str(error.value) == message


def test_bad_models_and_rows(tmp_path: Path) -> None:
    """Named before the first step: models that do not fit, actions outside allowed_tokens, rows that cannot be trained on."""
    from shiq_lab.hf.trainer import ShiQTrainer

    mdp = make("ToolCall")
    batch = enumerate_trajectories(mdp)
    model = TabularLM(mdp)
    row = {"prompt_ids": [0], "completion_ids": [1], "reward": 1.0}
    cases: list[tuple[dict[str, Any], list[Any], str]] = [
        ({"reference": "model"}, rows_of(batch), "ref_model: expected a model, as reference is 'model', got None."),
        ({"reference": "adapter"}, rows_of(batch), "reference: expected 'cache' or 'model' without an adapter, got 'adapter'."),
        ({"fused": True}, rows_of(batch), "fused: expected a model whose head can be fused"),
        (
            {"allowed_tokens": [0, 1]},
            rows_of(batch),
            "train_dataset row 0, column input_ids: expected actions among allowed_tokens",
        ),
        ({"allowed_tokens": [0, 99]}, rows_of(batch), "allowed_tokens: expected at least two different ids from 0 to"),
        ({}, [row, {**row, "reward": float("nan")}], "train_dataset row 1, column reward"),
        ({}, [row, {**row, "completion_ids": []}], "train_dataset row 1, column completion_ids"),
        ({}, [row, {**row, "completion_ids": [999]}], "train_dataset row 1, column"),
        ({}, [row, {**row, "rewards": [1.0, 2.0], "reward": None}], "train_dataset row 1, column rewards"),
    ]
    for changes, data, message in cases:
        with pytest.raises(ValueError) as error:
            ShiQTrainer(model, config(tmp_path, **changes), data)
        assert str(error.value).startswith(message), str(error.value)
