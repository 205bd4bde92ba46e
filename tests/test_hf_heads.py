"""heads.py: the fused road gives what a model's own logits give, for every head it knows, and says so where it does not."""

import os
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shiq_lab
from shiq_lab.batch import TokenBatch
from shiq_lab.stats import TokenStats

pytestmark = pytest.mark.slow  # importing transformers takes seconds
V = 61
WIDE = 72  # rows of a head that is padded to a multiple of 8
SMALL: dict[str, Any] = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT2: dict[str, Any] = {
    "vocab_size": V,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MAMBA: dict[str, Any] = {
    k: SMALL[k] for k in ("vocab_size", "hidden_size", "num_hidden_layers", "pad_token_id", "bos_token_id", "eos_token_id")
}
GEMMA = {"head_dim": 8, "final_logit_softcapping": 0.5}  # a cap that bends every logit
FALCON = SMALL | {
    "head_dim": 8, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_chunk_size": 8,
}  # fmt: skip
# name: (configuration, its values, dtype)
MODELS: dict[str, tuple[str, dict[str, Any], torch.dtype]] = {
    "llama": ("LlamaConfig", SMALL, torch.float64),
    "llama tied": ("LlamaConfig", SMALL | {"tie_word_embeddings": True}, torch.float64),
    "qwen2 padded": ("Qwen2Config", SMALL | {"vocab_size": WIDE}, torch.float64),
    "gemma2": ("Gemma2Config", SMALL | GEMMA, torch.float32),  # in float64 its own eager attention is NaN on the left padding
    "gemma3": ("Gemma3TextConfig", SMALL | GEMMA | {"sliding_window": 6}, torch.float64),
    "cohere": ("CohereConfig", SMALL | {"logit_scale": 0.25}, torch.float64),
    "granite": ("GraniteConfig", SMALL | {"logits_scaling": 4.0}, torch.float64),
    "phi": ("PhiConfig", SMALL, torch.float64),  # a bias on the head
    "gpt2": ("GPT2Config", GPT2, torch.float64),
    "gpt-neox": ("GPTNeoXConfig", {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}, torch.float64),
    "mamba": ("MambaConfig", MAMBA | {"state_size": 4}, torch.float32),  # it rounds its own logits to float32
}  # fmt: skip
# Two sums over 32 hidden units and 61 tokens in another order: a few dozen ulp of numbers up to 10; then two layers back.
CLOSE = {torch.float64: 1e-12, torch.float32: 1e-5}


@pytest.fixture(scope="module")
def heads() -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    pytest.importorskip("transformers", reason="the extra hf is not installed")
    from shiq_lab.hf import heads

    return heads


def make(name: str, **options: Any) -> Any:
    import transformers

    kind, values, dtype = MODELS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**values), **options).to(dtype).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4.0 if weight.ndim > 1 else 1.0).add_(torch.randn_like(weight) * 0.02)  # no bias is 0
    return model


def rows() -> list[Any]:
    """Four rows of unequal length and weight; one with an environment turn inside, one cut, one action alone."""
    from shiq_lab.hf.rows import Row

    draw, out = torch.Generator().manual_seed(1), []
    for i, (length, prompt, ends) in enumerate([(9, 3, True), (5, 2, True), (12, 5, False), (2, 1, True)]):
        ids = torch.randint(3, V, (length,), generator=draw).tolist()
        mask = [int(j >= prompt and not (i == 0 and j == 5)) for j in range(length)]
        out.append(Row(ids, mask, [0.5 * acts for acts in mask], terminated=ends, weight=1.0 + i))
    return out


def batch_of(some: list[Any], dtype: torch.dtype, **options: Any) -> TokenBatch:
    from shiq_lab.hf.collator import collate, token_batch

    return token_batch(collate(some, dtype=dtype, **options))


def numbers(stats: TokenStats, batch: TokenBatch) -> Tensor:
    """Every number that a loss sees, in the order of rows and tokens, wherever padding and packing put them."""
    acts = batch.completion_mask[:, 1:] == 1
    ends = (
        stats.end_logsumexp[~batch.terminated]
        if batch.weights is None
        else stats.end_logsumexp[~batch.terminated & (batch.weights > 0)]
    )
    return torch.cat([stats.token_logit[acts], stats.logsumexp[acts], ends])


def gradients(model: nn.Module, found: Tensor) -> dict[str, Tensor]:
    """Of a random combination of all numbers, as any loss would send back."""
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(found.dtype)
    model.zero_grad()
    (weight * found).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found: dict[str, Tensor], wanted: dict[str, Tensor], close: float) -> None:
    assert found.keys() == wanted.keys() and len(found) > 0
    for name, grad in wanted.items():
        assert grad.isfinite().all()
        assert (found[name] - grad).abs().max() <= close * (1 + grad.abs().max()), name
    assert any(g.abs().max() > 1e-3 for g in wanted.values())


# --------------------------------------------------------------------------------------------- fused and from logits
@pytest.mark.parametrize("among", [None, list(range(3, V))], ids=["whole", "allowed"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", list(MODELS))
def test_fused_gives_the_models_own_numbers_and_gradients(heads: Any, name: str, side: str, among: list[int] | None) -> None:
    model, dtype = make(name), MODELS[name][2]
    assert heads.why_not(model) == ""
    heads.answer_columns(model)
    batch = batch_of(rows(), dtype, side=side)
    ids = heads.allowed_tokens(among, model.get_output_embeddings().weight.shape[0])
    found, wanted = (numbers(heads.statistics(model, batch, fused=f, among=ids), batch) for f in (True, False))
    assert found.dtype == wanted.dtype == dtype and len(found) == 2 * sum(sum(r.completion_mask) for r in rows()) + 1
    assert (found - wanted).abs().max() <= CLOSE[dtype] * (1 + wanted.abs().max())
    assert_same_gradients(gradients(model, found), gradients(model, wanted), CLOSE[dtype])
    assert heads.check_fused(model, batch) <= 64 * torch.finfo(dtype).eps


def test_the_plain_forward_stays(heads: Any) -> None:
    """Taught or not, a call without `where` is the model's own; teaching twice is teaching once."""
    model, batch = make("llama"), batch_of(rows(), torch.float64)
    before = model(batch.input_ids, attention_mask=batch.attention_mask).logits
    heads.answer_columns(model)
    taught = model.__dict__["forward"]
    heads.answer_columns(model)
    assert model.__dict__["forward"] is taught
    assert torch.equal(model(batch.input_ids, attention_mask=batch.attention_mask).logits, before)
    assert model.generate(batch.input_ids[:1, :3], max_new_tokens=2, do_sample=False).shape == (1, 5)


def test_a_deep_copy_answers_with_its_own_weights(heads: Any) -> None:
    """A reference made by deepcopy behind the trainer's back must not follow the model that is trained."""
    model, batch = make("llama"), batch_of(rows(), torch.float64)
    heads.answer_columns(model)
    before = numbers(heads.statistics(model, batch, fused=True), batch).detach()
    twin = deepcopy(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
    assert torch.equal(numbers(heads.statistics(twin, batch, fused=True), batch), before)
    assert (numbers(heads.statistics(model, batch, fused=True), batch) - before).abs().max() > 1e-2


def test_a_padded_vocabulary_is_the_models_own(heads: Any) -> None:
    """The model's softmax runs over all rows of its head, so both roads count them; allowed_tokens leaves them out."""
    from shiq_lab.hf.trainer import vocabulary_of

    model, batch = make("qwen2 padded"), batch_of(rows(), torch.float64)
    assert vocabulary_of(model) == WIDE
    heads.answer_columns(model)
    logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits
    acts = batch.completion_mask[:, 1:] == 1
    for among, width in ((None, WIDE), (torch.arange(V), V)):
        level = heads.statistics(model, batch, fused=True, among=among).logsumexp
        torch.testing.assert_close(level[acts], logits[:, :-1, :width].logsumexp(-1)[acts], rtol=1e-13, atol=0)


def test_a_table_is_fused_too(heads: Any) -> None:
    """TabularLM's identity head over rows with forbidden tokens: the table's own statistics, and its gradient."""
    from shiq_lab.hf.tabular import TabularLM

    for mdp in (shiq_lab.make("Forbidden"), shiq_lab.make("ToolCall")):
        mdp = mdp if mdp.horizon is None else mdp.unroll()
        model = TabularLM.perturbed(mdp, 0.5, size=0.7)
        batch = shiq_lab.enumerate_trajectories(mdp)
        assert heads.why_not(model) == ""
        heads.answer_columns(model)
        ways = [heads.statistics(model, batch, fused=f) for f in (True, False)]
        ways.append(TokenStats.from_table(torch.where(torch.tensor(mdp.allowed), model.table, -torch.inf), batch))
        found = [numbers(s, batch) for s in ways]
        grads = [gradients(model, x) for x in found]
        for other, grad in zip(found[1:], grads[1:], strict=True):
            torch.testing.assert_close(found[0], other, rtol=1e-13, atol=1e-13)
            assert_same_gradients(grads[0], grad, CLOSE[torch.float64])


def test_models_without_a_plain_head_are_told_apart(heads: Any) -> None:
    from shiq_lab.models.transformer import TinyTransformer

    tiny = TinyTransformer(7, width=8, layers=1, heads=2)
    assert "no backbone and head" in heads.why_not(tiny)
    bent = make("llama")
    bent.lm_head = nn.Sequential(bent.lm_head)
    assert heads.why_not(bent) == "its head is a Sequential, not a plain linear layer (an adapter on the head?)"


# ---------------------------------------------------------------------------------------------- positions and packing
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "logits"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba"])
def test_padding_on_either_side_gives_the_same_numbers(heads: Any, name: str, fused: bool) -> None:
    """Whatever the padding holds: the ids there are set to another token."""
    model, dtype = make(name), MODELS[name][2]
    heads.answer_columns(model)
    found = []
    for side in ("right", "left"):
        for pad_id in (0, 7):
            batch = batch_of(rows(), dtype, side=side, width=15, pad_id=pad_id)
            found.append(numbers(heads.statistics(model, batch, fused=fused), batch))
    for other in found[1:]:
        assert (other - found[0]).abs().max() <= CLOSE[dtype] * (1 + found[0].abs().max())


def test_positions_counted_from_the_left_edge_are_seen(heads: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: arange. Absolute positions (GPT-2) give other numbers; rotary ones (Llama) know only differences."""
    plain = heads.model_inputs

    def from_the_edge(model: Any, batch: TokenBatch) -> dict[str, Any]:
        found = plain(model, batch)
        return found | {"position_ids": torch.arange(batch.input_ids.shape[1]).expand_as(batch.input_ids)}

    monkeypatch.setattr(heads, "model_inputs", from_the_edge)
    worst = {}
    for name in ("llama", "gpt2"):
        model = make(name)
        both = []
        for side in ("right", "left"):
            batch = batch_of(rows(), torch.float64, side=side)
            both.append(numbers(heads.statistics(model, batch, fused=False), batch))
        worst[name] = (both[0] - both[1]).abs().max().item()
    assert worst["gpt2"] > 1e-2
    assert worst["llama"] < 1e-5  # rotary angles are made in float32


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "logits"])
@pytest.mark.parametrize(("name", "attention"), [("llama", "sdpa"), ("llama", "eager"), ("gpt2", "sdpa"), ("gemma3", "sdpa")])
def test_packed_rows_are_the_rows_alone(heads: Any, name: str, attention: str, fused: bool) -> None:
    model = make(name, attn_implementation=attention)
    heads.answer_columns(model)
    alone, packed = batch_of(rows(), torch.float64), batch_of(rows(), torch.float64, packing=15)
    assert packed.segment_ids is not None and len(packed) < len(alone) and bool((packed.attention_mask == 0).any())
    found, wanted = (numbers(heads.statistics(model, b, fused=fused), b) for b in (packed, alone))
    assert len(found) == len(wanted) and heads.check_packed(model, packed, fused=fused) == 0
    close = 1e-6 if name == "gemma3" else 1e-12  # Gemma sums its norms in float32, over another number of rows here
    assert (found - wanted).abs().max() <= close * (1 + wanted.abs().max())
    assert_same_gradients(gradients(model, found), gradients(model, wanted), close)


@pytest.mark.parametrize("bug", ["positions run on", "the mask is handed over too", "a cache is asked for"])
def test_segments_that_see_each_other_are_seen(heads: Any, monkeypatch: pytest.MonkeyPatch, bug: str) -> None:
    """All planted: segments are told apart by positions that restart, and only where there is no mask and no cache."""
    plain = heads.model_inputs

    def leaking(model: Any, batch: TokenBatch) -> dict[str, Any]:
        found = plain(model, batch)
        if batch.segment_ids is None:
            return found
        if bug == "positions run on":
            return found | {"position_ids": torch.arange(batch.input_ids.shape[1]).expand_as(batch.input_ids)}
        return found | ({"use_cache": True} if "cache" in bug else {"attention_mask": batch.attention_mask})

    monkeypatch.setattr(heads, "model_inputs", leaking)
    model = make("llama")
    alone, packed = batch_of(rows(), torch.float64), batch_of(rows(), torch.float64, packing=15)
    found, wanted = (numbers(heads.statistics(model, b, fused=False), b) for b in (packed, alone))
    assert (found - wanted).abs().max() > 1e-2
    with pytest.raises(
        ValueError, match=r"packing: expected a model that keeps packed segments apart, got .* Set packing: null"
    ):
        heads.check_packed(model, packed, fused=False)


def test_a_model_that_cannot_tell_segments_apart_is_refused(heads: Any) -> None:
    model = make("mamba")
    with pytest.raises(
        ValueError, match="packing: expected a model that takes segment_ids or position_ids, got MambaForCausalLM"
    ):
        heads.statistics(model, batch_of(rows(), torch.float32, packing=15), fused=False)


def test_a_state_that_runs_on_from_segment_to_segment_is_noticed(heads: Any) -> None:
    """Falcon-H1 takes position_ids and its attention heeds them; its Mamba layers do not. Rows alone have nothing to check."""
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.FalconH1Config(**FALCON)).eval()
    assert heads.check_packed(model, batch_of(rows(), torch.float32), fused=False) == 0
    with pytest.raises(ValueError, match="packing: expected a model that keeps packed segments apart"):
        heads.check_packed(model, batch_of(rows(), torch.float32, packing=15), fused=False)


# ------------------------------------------------------------------------------------------------------- PEFT
def lora(model: Any, targets: list[str], **more: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **more))
    return wrapped.to(torch.float64).eval()  # peft makes its adapters in float32


@pytest.mark.parametrize("name", ["llama", "llama tied", "cohere"])
def test_an_adapter_on_attention(heads: Any, name: str) -> None:
    """Adapter on: fused equals logits, gradients reach the adapter alone. Off: the base model's numbers, bit for bit."""
    batch = batch_of(rows(), torch.float64, side="left")
    base = make(name)
    bare = numbers(heads.statistics(base, batch, fused=False), batch)
    model = lora(base, ["q_proj", "v_proj"])
    assert heads.why_not(model) == "" and heads.core(model) is base
    heads.answer_columns(model)
    found, wanted = (numbers(heads.statistics(model, batch, fused=f), batch) for f in (True, False))
    assert (found - wanted).abs().max() <= 1e-12 * (1 + wanted.abs().max()) and (found - bare).abs().max() > 1e-3
    grads = gradients(model, found)
    assert all("lora_" in n for n in grads) and len(grads) == 8
    assert_same_gradients(grads, gradients(model, wanted), 1e-12)
    with model.disable_adapter():
        off = [numbers(heads.statistics(model, batch, fused=f), batch) for f in (True, False)]
    assert torch.equal(off[1], bare) and (off[0] - bare).abs().max() <= 1e-12 * (1 + bare.abs().max())


@pytest.mark.parametrize("how", ["lora", "saved whole"])
def test_an_adapter_on_the_head_goes_by_logits(heads: Any, how: str, tmp_path: Any) -> None:
    from shiq_lab.hf.config import ShiQConfig
    from shiq_lab.hf.trainer import ShiQTrainer

    def wrap() -> Any:
        return (
            lora(make("llama"), ["q_proj", "lm_head"])
            if how == "lora"
            else lora(make("llama"), ["q_proj"], modules_to_save=["lm_head"])
        )

    reason = heads.why_not(wrap())
    assert "not a plain linear layer (an adapter on the head?)" in reason
    options: dict[str, Any] = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": []}
    trainer = ShiQTrainer(wrap(), ShiQConfig(**options), train_dataset=rows())
    assert trainer.fused is False
    with pytest.raises(ValueError, match="fused: expected a model whose head can be fused, got its head is a"):
        ShiQTrainer(wrap(), ShiQConfig(**options, fused=True), train_dataset=rows())


# -------------------------------------------------------------------------------------------- rounding and the check
@pytest.mark.parametrize("name", ["llama", "gemma3", "cohere", "phi"])
def test_autocast_rounds_as_much_as_the_models_own_logits(heads: Any, name: str) -> None:
    """bf16 products: the model rounds each logit to 2^-9 of itself, once a step of its head (product, scale, cap: at most 4).

    The fused road keeps them in float32, so it may differ from the model by that, and is nearer to the unrounded product.
    """
    model = make(name).float()
    heads.answer_columns(model)
    batch = batch_of(rows(), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, wanted = (numbers(heads.statistics(model, batch, fused=f), batch) for f in (True, False))
        heads.check_fused(model, batch)
        with torch.no_grad():
            logits = heads.logits_of(model, batch)
    assert found.dtype == wanted.dtype == torch.float32
    largest = logits.float().abs().max()
    assert 0 < (found - wanted).abs().max() <= 4 * 2.0**-9 * largest
    a, b = gradients(model, found), gradients(model, wanted)
    # The logits' shift changes each probability by that much; their gradient, and every one below, is rounded to 2^-9 a layer.
    for grad in b:
        assert (a[grad] - b[grad]).norm() <= (8 * largest + 8) * 2.0**-9 * max(b[grad].norm(), 1e-2)


def test_heads_that_do_more_are_noticed(heads: Any) -> None:
    """Not planted but found: HyperCLOVA X multiplies by what Granite divides by, and Falcon-H1 has a multiplier of its own."""
    import transformers

    ways = {"HyperCLOVAXConfig": SMALL | {"logits_scaling": 4.0}, "FalconH1Config": FALCON | {"lm_head_multiplier": 3.0}}
    for kind, values in ways.items():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**values))
        heads.answer_columns(model)
        with pytest.raises(ValueError, match=r"fused: expected statistics equal to those .* Set fused: false"):
            heads.check_fused(model, batch_of(rows(), torch.float32))


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bf16 autocast"])
@pytest.mark.parametrize("bug", ["scale", "no scale", "cap", "no cap", "a layer between", "no bias"])
def test_check_fused_sees_another_head(heads: Any, monkeypatch: pytest.MonkeyPatch, bug: str, half: bool) -> None:
    """Logits of a trained model's size, about 10: a cap of 30 then bends them by 4 %, which rounding to bf16 must not hide."""
    name = "gemma3" if "cap" in bug else "phi" if bug == "no bias" else "cohere"
    model = make(name).float()
    if "cap" in bug:
        model.config.final_logit_softcapping = 30.0
    batch = batch_of(rows(), torch.float32)
    with torch.no_grad():
        size = heads.logits_of(model, batch).abs().max()
        model.get_output_embeddings().weight.mul_(12.0 / size)
        if bug == "no bias":
            model.lm_head.bias.mul_(12.0 / size).add_(1.0)
    options = heads.head_options(model.config)
    wrong = {
        "scale": {"scale": 1.05 * options["scale"]},
        "no scale": {"scale": 1.0},
        "cap": {"soft_cap": 50.0},
        "no cap": {"soft_cap": None},
    }
    monkeypatch.setattr(heads, "head_options", lambda _: options | wrong.get(bug, {}))
    heads.answer_columns(model)
    if bug == "a layer between":
        plain = model._forward_with_logits

        def bent(*args: Any, **kw: Any) -> Any:
            out = plain(*args, **kw)
            return replace(out, logits=out.logits.cos())

        model._forward_with_logits = bent
    if bug == "no bias":
        monkeypatch.setattr(heads, "columns", _without_bias(heads.columns))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half), pytest.raises(ValueError, match="Set fused: false"):
        heads.check_fused(model, batch)


def _without_bias(columns: Any) -> Any:
    return lambda *args, bias=None, **kw: columns(*args, **kw)


@pytest.mark.parametrize("ids", [[], [3], [3, 3], [-1, 4], [4, V]])
def test_allowed_tokens_that_make_no_choice(heads: Any, ids: list[int]) -> None:
    with pytest.raises(ValueError, match=f"allowed_tokens: expected at least two different ids from 0 to {V - 1}"):
        heads.allowed_tokens(ids, V)


def test_allowed_tokens_are_sorted(heads: Any) -> None:
    assert heads.allowed_tokens(None, V) is None and heads.allowed_tokens([9, 2, 5], V).tolist() == [2, 5, 9]
