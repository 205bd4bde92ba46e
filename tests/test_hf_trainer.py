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


# ------------------------------------------------------------------------- metrics, evaluation, dropout, settings
def by_hand(row: Any, logits: Tensor, ref: Tensor, beta: float, gamma: float, n_steps: int | None) -> dict[str, float]:
    """A row's numbers in Python floats: delta_t = beta (l - l_ref)(a_t) - r_t - gamma Dv_{t+1}, rho_t = sum_k gamma^k delta."""
    places = [i for i, own in enumerate(row.completion_mask) if own]
    level = [(beta * (a - b)).item() for a, b in zip(logits.logsumexp(-1), ref.logsumexp(-1), strict=True)]
    after = [level[i - 1] for i in places[1:]] + [0.0 if row.terminated else level[len(row) - 1]]
    gain = [beta * (logits - ref)[i - 1, row.input_ids[i]].item() for i in places]
    delta = [g - row.rewards[i] - gamma * v for g, i, v in zip(gain, places, after, strict=True)]
    last = len(delta) if n_steps is None else n_steps
    rho = [sum(gamma**k * d for k, d in enumerate(delta[t : t + last])) for t in range(len(delta))]
    ratio = sum(g - level[i - 1] for g, i in zip(gain, places, strict=True)) / beta
    return {
        "tokens": len(rho), "dv": level[places[0] - 1], "rho": sum(rho), "abs_rho": sum(map(abs, rho)),
        "log_ratio": ratio, "reward": sum(row.rewards), "implied": beta * ratio,
    }  # fmt: skip


@pytest.mark.parametrize(
    "options", [{}, {"gamma": 0.8}, {"n_steps": 2, "gamma": 0.9}, {"packing": 40}, {"padding_side": "left"}], ids=str
)
def test_metrics_of_each_log_are_of_its_own_rows(options: dict[str, Any], tmp_path: Path) -> None:
    """Two steps of four rows, each log against a plain loop over its rows: nothing of the step before stays in the sums."""
    import hf_worker

    model, ref, rows = hf_worker.llama(), hf_worker.llama(1), hf_worker.rows(8)
    more: dict[str, Any] = {"per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 0.0, **options}
    made = hf_worker.trainer(model, rows, tmp_path, ref_model=ref, **more)
    made.train()
    with torch.no_grad():
        both = [[m(input_ids=torch.tensor([row.input_ids])).logits[0] for m in (model, ref)] for row in rows]
    found = [
        by_hand(row, *two, BETA, options.get("gamma", 1.0), options.get("n_steps")) for row, two in zip(rows, both, strict=True)
    ]
    for log, some, four in ((made.state.log_history[k], found[4 * k : 4 * k + 4], rows[4 * k : 4 * k + 4]) for k in (0, 1)):
        total = {name: sum(x[name] for x in some) for name in some[0]}
        paid = [x["reward"] for x in some]
        better = [paid[i] > paid[i ^ 1] for i in range(4)]  # two a group
        assert [row.group for row in four][::2] == [row.group for row in four][1::2]
        wanted = {name: total[name] / 4 for name in ("dv", "log_ratio", "reward")}
        wanted |= {name: total[name] / total["tokens"] for name in ("rho", "abs_rho")}
        wanted["margin"] = sum(x["implied"] * (1 if up else -1) for x, up in zip(some, better, strict=True)) / 2
        for name, value in wanted.items():
            assert log[name] == pytest.approx(value, rel=1e-11, abs=1e-12), name  # float64: sums in another order


def test_evaluation_has_its_own_rows_and_reference(tmp_path: Path) -> None:
    """Evaluated between two logs: eval_ metrics are of the eval rows, train metrics of all train rows since the last log.

    The eval rows' reference is the model as it came, so their log-ratio is no longer 0 once weights have moved.
    """
    import hf_worker

    from shiq_lab.hf.trainer import ShiQTrainer

    train, other = hf_worker.rows(8)[:4], hf_worker.rows(8)[4:]
    args = config(
        tmp_path, per_device_train_batch_size=2, max_steps=2, learning_rate=0.02, logging_steps=2, optim="sgd",
        eval_strategy="steps", eval_steps=1, train_sampling_strategy="sequential",
    )  # fmt: skip
    made = ShiQTrainer(hf_worker.llama(), args, train, other)
    made.pop_callback(hf_worker._printer())
    made.train()
    train_paid, eval_paid = (sum(sum(row.rewards) for row in some) / 4 for some in (train, other))
    evals = [log for log in made.state.log_history if "eval_loss" in log]
    assert len(evals) == 2 and all("reward" not in log for log in evals)
    assert all(log["eval_reward"] == pytest.approx(eval_paid, rel=1e-12) for log in evals)
    (log,) = (log for log in made.state.log_history if "loss" in log)
    assert log["reward"] == pytest.approx(train_paid, rel=1e-12)
    said = made.evaluate()
    assert said["eval_reward"] == pytest.approx(eval_paid, rel=1e-12) and abs(said["eval_log_ratio"]) > 1e-3
    made.sums["eval"] = torch.ones(11, dtype=torch.float64)  # what an evaluation that was broken off leaves behind
    assert made.evaluate()["eval_reward"] == said["eval_reward"]


def test_dropout_reaches_neither_policy_nor_reference(tmp_path: Path) -> None:
    """Attention's dropout is no nn.Dropout. The reference has none even where the policy keeps its own, however it comes."""
    import hf_worker

    def loss_twice(**options: Any) -> list[float]:
        model, ref = (hf_worker.llama(seed, attention_dropout=0.5).train() for seed in (0, 1))
        made = hf_worker.trainer(model, hf_worker.rows(4), tmp_path, ref_model=ref, **options)
        batch = made.collate([made.train_dataset[i] for i in range(4)])
        made.checked = True
        return [made.compute_loss(made.model.train(), batch).item() for _ in range(2)]

    for kind in ("model", "cache"):
        first, again = loss_twice(reference=kind)
        assert first == again
    first, again = loss_twice(disable_dropout=False)
    assert first != again
    noisy = hf_worker.llama(attention_dropout=0.5).train()
    kept = hf_worker.trainer(noisy, hf_worker.rows(4), tmp_path, disable_dropout=False).train_dataset.reference
    calm = hf_worker.trainer(hf_worker.llama(), hf_worker.rows(4), tmp_path).train_dataset.reference
    assert all((a.logsumexp == b.logsumexp).all() for a, b in zip(kept, calm, strict=True))


def test_where_the_batch_puts_rows_is_as_configured(tmp_path: Path) -> None:
    """No number depends on it, so only the tensors tell; group numbers come through packing too."""
    import hf_worker

    def batch(**options: Any) -> dict[str, Tensor]:
        made = hf_worker.trainer(hf_worker.llama(), hf_worker.rows(8), tmp_path, **options)
        return made.collate([made.train_dataset[i] for i in range(8)])

    plain, left, packed = batch(), batch(padding_side="left"), batch(packing=40)
    assert plain["input_ids"].shape == (8, 19) and batch(pad_to_multiple_of=16)["input_ids"].shape == (8, 32)
    assert plain["attention_mask"][0].argmin() == 5 and left["attention_mask"][0].argmax() == 14
    assert packed["input_ids"].shape == (2, 40) and int(packed["segment_ids"].max()) > 1
    for tensors in (plain, left, packed):
        number = tensors["group_ids"]
        assert sorted(number[number >= 0].tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_rows_models_and_roads_are_looked_at(tmp_path: Path) -> None:
    """Ready-made Rows are checked as examples are; a reference of another vocabulary is refused; fused: false is obeyed."""
    from dataclasses import replace

    import hf_worker

    from shiq_lab.hf.trainer import Rows

    rows = hf_worker.rows(4)
    bad = Rows([replace(rows[0], input_ids=[99] * len(rows[0])), *rows[1:]])
    with pytest.raises(ValueError, match=r"^train_dataset row 0, column input_ids: expected tokens from 0 to 40, got 99"):
        hf_worker.trainer(hf_worker.llama(), bad, tmp_path)
    with pytest.raises(ValueError, match=r"^ref_model: expected logits of 41 tokens, as the model, got 50"):
        hf_worker.trainer(hf_worker.llama(), rows, tmp_path, ref_model=hf_worker.llama(vocab_size=50))
    for fused in (None, True, False):
        assert hf_worker.trainer(hf_worker.llama(), rows, tmp_path, fused=fused).fused == (fused is not False)


def test_data_settings_reach_the_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each setting that says how examples become rows, none at its default, arrives as it was given."""
    import hf_worker

    from shiq_lab.hf import trainer

    seen: list[dict[str, Any]] = []
    plain = trainer.to_rows
    monkeypatch.setattr(trainer, "to_rows", lambda data, **options: seen.append(options) or plain(data, **options))
    given: dict[str, Any] = {
        "max_length": 7, "on_long": "cut", "append_eos": False, "end_of_turn": "<end>", "template_options": {"a": 1},
    }  # fmt: skip
    made = hf_worker.trainer(
        hf_worker.llama(), [{"prompt_ids": [3], "completion_ids": [4] * 9, "reward": 1}], tmp_path, **given
    )
    assert {name: seen[0][name] for name in given} == given and seen[0]["vocabulary"] == hf_worker.V
    assert len(made.train_dataset.rows[0]) == 7 and not made.train_dataset.rows[0].terminated


def test_the_cache_has_a_folder_for_whatever_changes_the_numbers(tmp_path: Path) -> None:
    import hf_worker

    def folder(n: int = 4, dtype: torch.dtype = torch.float32, **options: Any) -> str:
        made = hf_worker.trainer(
            hf_worker.llama(dtype=dtype), hf_worker.rows(n), tmp_path, reference_cache=str(tmp_path / "cache"), **options
        )
        return made.cache_folder(made.train_dataset.rows).name

    others: list[dict[str, Any]] = [
        {"n": 5}, {"dtype": torch.float64}, {"bf16": True}, {"fp16": True}, {"fused": False},
        {"allowed_tokens": list(range(3, 41))},
    ]  # fmt: skip
    assert len({folder(), *(folder(**changes) for changes in others)}) == 1 + len(others)
    assert folder(beta=2.0, per_device_eval_batch_size=1) == folder()


def test_allowed_tokens_bind_a_reference_in_memory_too(tmp_path: Path) -> None:
    """Cached or asked at every step: one loss. For naive, at l = l_ref, Dv over the allowed tokens is 0, as it is over all."""
    import hf_worker

    def loss(reference: str, **options: Any) -> tuple[float, float]:
        ref = hf_worker.llama(options.pop("seed", 1))
        more = {"reference": reference, "allowed_tokens": list(range(3, 41)), **options}
        made = hf_worker.trainer(hf_worker.llama(), hf_worker.rows(8), tmp_path, ref_model=ref, **more)
        found = made.compute_loss(made.model.train(), made.collate([made.train_dataset[i] for i in range(8)])).item()
        return found, made._metrics("train")["dv"]

    kept, asked = loss("cache"), loss("model")
    assert kept == pytest.approx(asked, rel=1e-12, abs=1e-12)
    assert abs(loss("cache", allowed_tokens=None)[0] / kept[0] - 1) > 1e-3, "three forbidden tokens do not matter here"
    assert loss("model", loss="naive", seed=0)[1] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("reference", ["cache", "model"])
def test_the_first_batch_asks_whether_the_head_and_packing_are_right(
    reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: a head that is thought to scale, and segments that see each other: refused before the first update."""
    import hf_worker

    from shiq_lab.hf import heads

    def run(**options: Any) -> None:
        ref = hf_worker.llama(1) if reference == "model" else None
        more = {"per_device_train_batch_size": 8, "max_steps": 1, "reference": reference, **options}
        hf_worker.trainer(hf_worker.llama(), hf_worker.rows(8), tmp_path, ref_model=ref, **more).train()

    plain = heads.model_inputs
    with monkeypatch.context() as patch:
        patch.setattr(heads, "head_options", lambda _: {"scale": 1.05, "soft_cap": None})
        with pytest.raises(ValueError, match="Set fused: false"):
            run()
        run(fused=False)
    with monkeypatch.context() as patch:
        blind = lambda m, b: {k: v for k, v in plain(m, b).items() if k != "position_ids"}  # noqa: E731
        patch.setattr(heads, "model_inputs", blind)
        with pytest.raises(ValueError, match="Set packing: null"):
            run(packing=40)
    run(packing=40)


def test_the_reference_road_is_checked_where_it_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the whole data set has gone through a wrong head."""
    import hf_worker

    from shiq_lab.hf import heads

    monkeypatch.setattr(heads, "head_options", lambda _: {"scale": 1.05, "soft_cap": None})
    with pytest.raises(ValueError, match="Set fused: false"):
        hf_worker.trainer(hf_worker.llama(), hf_worker.rows(4), tmp_path)


def test_sides_are_by_group_and_equal_rewards_have_none() -> None:
    """Three times 0.1 has a mean of 0.10000000000000002; a group's mean is its own."""
    from shiq_lab.hf.rows import Row
    from shiq_lab.hf.trainer import Rows

    paid = [(0.1, 7), (0.1, 7), (0.1, 7), (5.0, 2), (6.0, 2), (-1.0, 3)]
    rows = [Row([1, 2], [0, 1], [0.0, reward], group=group) for reward, group in paid]
    assert Rows(rows).sides.tolist() == [0, 0, 0, -1, 1, 0]


def test_a_reference_in_memory_rounds_as_the_policy_does(tmp_path: Path) -> None:
    """In bf16 at l = l_ref: both forwards under autocast, so Dv is exactly 0, as with the cache."""
    import hf_worker

    for reference in ("cache", "model"):
        ref = hf_worker.llama(dtype=torch.float32) if reference == "model" else None
        more: dict[str, Any] = {"reference": reference, "bf16": True, "max_steps": 1, "per_device_train_batch_size": 8}
        made = hf_worker.trainer(hf_worker.llama(dtype=torch.float32), hf_worker.rows(8), tmp_path, ref_model=ref, **more)
        made.train()
        assert made.state.log_history[0]["dv"] == 0, reference


def test_what_a_user_gets_who_says_nothing(tmp_path: Path) -> None:
    """The defaults that the docstring names: a change of one is a change of every run that leaves it out."""
    from shiq_lab.hf.config import ShiQConfig

    wanted: dict[str, Any] = {
        "beta": 0.1, "gamma": 1.0, "loss": "shiq", "n_steps": None, "reduction": "row", "reference": "cache",
        "reference_cache": None, "append_eos": True, "end_of_turn": None, "template_options": None, "max_length": None,
        "on_long": "error", "padding_side": "right", "pad_to_multiple_of": None, "packing": None, "fused": None,
        "allowed_tokens": None, "disable_dropout": True, "remove_unused_columns": False,
    }  # fmt: skip
    args = ShiQConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    assert {name: getattr(args, name) for name in wanted} == wanted


@pytest.mark.parametrize("reduction", ["row", "token"])
def test_the_eval_loss_does_not_depend_on_the_batch(reduction: str, tmp_path: Path) -> None:
    """Rows of unequal weight and length, one by one, in threes, all at once: the loss that training would see of them."""
    import hf_worker

    found = []
    for size in (1, 3, 8):
        options = {"per_device_eval_batch_size": size, "reduction": reduction}
        made = hf_worker.trainer(hf_worker.llama(), hf_worker.rows(8), tmp_path, **options)
        found.append(made.evaluate(made.train_dataset)["eval_loss"])
    whole = made.compute_loss(made.model, made.collate([made.train_dataset[i] for i in range(8)])).item()
    assert found == pytest.approx([whole] * 3, rel=1e-12)


def test_a_step_of_rows_without_weight_changes_nothing(tmp_path: Path) -> None:
    """A weight of 0 is allowed, and chance may put only such rows into a step: 0 / 0 made every weight NaN, logged as 0."""
    from dataclasses import replace

    import hf_worker

    rows = [replace(row, weight=row.weight * (i >= 4)) for i, row in enumerate(hf_worker.rows(8))]
    model = hf_worker.llama()
    before = hf_worker.weights(model)
    made = hf_worker.trainer(model, rows, tmp_path, per_device_train_batch_size=4, max_steps=1)
    made.train()
    assert made.state.log_history[0]["loss"] == 0
    assert all(torch.equal(weight, before[name]) for name, weight in hf_worker.weights(model).items())


def test_a_loss_that_is_nan_is_logged_as_it_is(tmp_path: Path) -> None:
    import hf_worker

    model = hf_worker.llama()
    made = hf_worker.trainer(model, hf_worker.rows(4), tmp_path, max_steps=1, fused=False)
    made.checked = True
    with torch.no_grad():
        model.lm_head.weight[5, 0] = torch.nan
    made.train()
    assert made.state.log_history[0]["loss"] != made.state.log_history[0]["loss"]


def test_rows_that_come_late_have_no_reference(tmp_path: Path) -> None:
    """The model as it came is gone by then; and ready-made Rows keep to allowed_tokens as examples do."""
    import hf_worker

    from shiq_lab.hf.trainer import Rows

    made = hf_worker.trainer(hf_worker.llama(), hf_worker.rows(4), tmp_path)
    with pytest.raises(ValueError, match=r"^dataset: expected rows with the reference's statistics.*when it is made\.$"):
        made.evaluate(Rows(hf_worker.rows(4)))
    with pytest.raises(ValueError, match=r"^train_dataset row 0, column input_ids: expected actions among allowed_tokens"):
        hf_worker.trainer(hf_worker.llama(), Rows(hf_worker.rows(4)), tmp_path, allowed_tokens=[3, 4])
    for ids in (5, [2.0, 3.0], [True, False], [2, "3"]):
        with pytest.raises(ValueError, match=r"^allowed_tokens: expected a list of token ids, got "):
            hf_worker.trainer(hf_worker.llama(), hf_worker.rows(4), tmp_path, allowed_tokens=ids)


def test_a_reference_in_memory_is_remembered_too(tmp_path: Path) -> None:
    import hf_worker

    more: dict[str, Any] = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "reference": "model"}
    hf_worker.trainer(hf_worker.llama(), hf_worker.rows(4), tmp_path, ref_model=hf_worker.llama(1), **more).train()
    other = hf_worker.trainer(hf_worker.llama(), hf_worker.rows(4), tmp_path, ref_model=hf_worker.llama(2), **more)
    with pytest.raises(ValueError, match=r"^resume_from_checkpoint: expected a run against this reference"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    (tmp_path / "checkpoint-best").mkdir()  # the user's own
    from shiq_lab.hf.trainer import last_checkpoint

    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
