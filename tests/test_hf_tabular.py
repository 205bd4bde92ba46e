"""The oracle as a Hugging Face model: the same numbers as the plain one, through everything a trainer does with a model."""

import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import shiq_lab
from shiq_lab.batch import TokenBatch, pad
from shiq_lab.checks.trainer.rows import one_turn
from shiq_lab.mdp import TokenMDP

pytestmark = pytest.mark.slow  # importing transformers takes seconds
MAKERS: dict[str, Any] = {
    "ToolCall": lambda: shiq_lab.make("ToolCall"),
    "Forbidden": lambda: shiq_lab.make("Forbidden"),
    "one turn": one_turn,
}


@pytest.fixture(scope="module")
def hf() -> Any:
    """The module; the extra hf is installed by `make test-slow`."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    pytest.importorskip("transformers", reason="the extra hf is not installed")
    from shiq_lab.hf import tabular

    return tabular


@pytest.fixture(params=list(MAKERS))
def mdp(request: pytest.FixtureRequest) -> TokenMDP:
    found: TokenMDP = MAKERS[request.param]()
    return found if found.horizon is None else found.unroll()


def listing(mdp: TokenMDP) -> TokenBatch:
    return shiq_lab.enumerate_trajectories(mdp)


# ------------------------------------------------------------------------------------------------------- the numbers
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_and_gradients_are_the_plain_models(hf: Any, mdp: TokenMDP, side: Any) -> None:
    """Bit for bit: the identity head multiplies by 1 and adds zeros. Padding holds ids out of range."""
    rows = pad(listing(mdp), side, pad_id=-100)
    ours, plain = hf.TabularLM.optimal(mdp, 0.3), shiq_lab.TabularLM.optimal(mdp, 0.3)
    found, wanted = (m(rows.input_ids, attention_mask=rows.attention_mask).logits for m in (ours, plain))
    assert torch.equal(found, wanted) and found.dtype == torch.float64
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(0), dtype=found.dtype) * (wanted > -1e300)
    for logits in (found, wanted):
        (logits.clamp(min=-1e300) * weight).sum().backward()
    torch.testing.assert_close(ours.table.grad, plain.table.grad, rtol=1e-13, atol=1e-13)
    assert torch.isfinite(ours.table.grad).all()


def test_reference_and_perturbed(hf: Any) -> None:
    mdp = one_turn()
    reference, perturbed = hf.TabularLM.reference(mdp), hf.TabularLM.perturbed(mdp, 0.3, size=0.5, seed=1)
    allowed = torch.tensor(mdp.allowed)
    assert torch.equal(reference.table[allowed], torch.tensor(mdp.ref_logits)[allowed]) and not reference.table.requires_grad
    noise = (perturbed.table - hf.TabularLM.optimal(mdp, 0.3).table)[allowed].detach()
    assert perturbed.table.requires_grad and 0.3 < noise.std() < 0.7
    assert torch.equal(perturbed.table, hf.TabularLM.perturbed(mdp, 0.3, size=0.5, seed=1).table)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_coarser_dtypes_round_the_table_and_nothing_else(hf: Any, dtype: torch.dtype) -> None:
    mdp = one_turn()
    rows = listing(mdp)
    model = hf.TabularLM.optimal(mdp, 0.3, dtype=dtype)
    exact = hf.TabularLM.from_logits(mdp, model.table.detach().double())
    found, wanted = (m(rows.input_ids, attention_mask=rows.attention_mask).logits for m in (model, exact))
    real = wanted > -1e30
    assert found.dtype == dtype and torch.equal(found.double()[real], wanted[real])
    assert bool((found[~real] == torch.finfo(dtype).min).all()) and bool((~real).any())


def test_labels_give_the_cross_entropy(hf: Any) -> None:
    """Against the weighted sum of log-probabilities, in which forbidden tokens count 0."""
    mdp = one_turn()
    rows = listing(mdp)
    model = hf.TabularLM.optimal(mdp, 0.3)
    labels = torch.where(rows.completion_mask == 1, rows.input_ids, -100)
    found = model(rows.input_ids, attention_mask=rows.attention_mask, labels=labels)
    scored = found.logits[:, :-1].log_softmax(-1)
    acts = rows.completion_mask[:, 1:] == 1
    wanted = -scored.gather(-1, rows.input_ids[:, 1:, None])[..., 0][acts].mean()
    torch.testing.assert_close(found.loss.double(), wanted, rtol=1e-6, atol=0)  # transformers sums in float32
    as_tuple = model(rows.input_ids, attention_mask=rows.attention_mask, labels=labels, return_dict=False)
    assert torch.equal(as_tuple[0], found.loss) and torch.equal(as_tuple[1], found.logits)
    last = model(rows.input_ids, attention_mask=rows.attention_mask, logits_to_keep=2).logits
    assert torch.equal(last, found.logits[:, -2:])


# ---------------------------------------------------------------------------------------------------- what it consists of
def test_the_table_is_the_one_parameter(hf: Any) -> None:
    model = hf.TabularLM.optimal(one_turn(), 0.3)
    assert [name for name, _ in model.named_parameters()] == ["model.table"]
    assert torch.equal(model.get_output_embeddings().weight, torch.eye(6, dtype=torch.float64))
    assert model.get_input_embeddings().weight.shape == (6, 1)
    rows = listing(one_turn())
    hidden = model.base_model(rows.input_ids, attention_mask=rows.attention_mask).last_hidden_state
    assert torch.equal(model.lm_head(hidden), model(rows.input_ids, attention_mask=rows.attention_mask).logits)


def test_gradient_checkpointing_changes_nothing(hf: Any) -> None:
    model = hf.TabularLM.optimal(one_turn(), 0.3).train()
    rows = listing(one_turn())
    before = model(rows.input_ids, attention_mask=rows.attention_mask).logits
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    assert model.model.gradient_checkpointing
    assert torch.equal(model(rows.input_ids, attention_mask=rows.attention_mask).logits, before)


def test_dropout_is_on_in_training_alone(hf: Any) -> None:
    model = hf.TabularLM.optimal(one_turn(), 0.3, dropout=0.5)
    rows = listing(one_turn())
    logits = lambda: model(rows.input_ids, attention_mask=rows.attention_mask).logits  # noqa: E731
    still = model.eval() and logits()
    assert torch.equal(still, logits())
    model.train()
    noisy = logits()
    assert not torch.equal(noisy, still) and torch.isfinite(noisy).all()


def test_trls_fused_head_sees_the_same_log_probabilities(hf: Any) -> None:
    """Road two to the log-probabilities that TRL's trainers use; float32 inside: 8 ulp of the largest logit, here below 8."""
    trl_utils = pytest.importorskip("trl.trainer.utils", reason="the extra hf is not installed")
    mdp = one_turn()
    rows = listing(mdp)
    model = hf.TabularLM.optimal(mdp, 0.5)
    wanted = model(rows.input_ids, attention_mask=rows.attention_mask).logits[:, :-1].log_softmax(-1)
    wanted = wanted.gather(-1, rows.input_ids[:, 1:, None])[..., 0]
    labels = torch.where(rows.completion_mask == 1, rows.input_ids, -100)
    trl_utils.add_fused_lm_head(model)
    found = model(rows.input_ids, attention_mask=rows.attention_mask, labels=labels, fused_lm_head=True).log_probs
    acts = rows.completion_mask[:, 1:] == 1
    assert (found.double() - wanted)[acts].abs().max() < 8 * 8 * torch.finfo(torch.float32).eps
    found.sum().backward()
    assert torch.isfinite(model.table.grad).all() and model.table.grad.abs().max() > 0


# --------------------------------------------------------------------------------------------------------- save and load
def test_saving_and_loading_is_bit_for_bit(hf: Any, mdp: TokenMDP, tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = hf.TabularLM.perturbed(mdp, 0.3)
    model.save_pretrained(tmp_path)
    found = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(found) is hf.TabularLM and found.dtype == torch.float64
    assert torch.equal(found.table, model.table) and [n for n, _ in found.named_parameters()] == ["model.table"]
    again = found.config.mdp()
    for name in ("next_state", "reward", "ref_logits", "is_policy"):
        np.testing.assert_array_equal(getattr(again, name), getattr(mdp, name))
    assert (again.start, again.tokens, again.name) == (mdp.start, mdp.tokens, mdp.name)
    rows = listing(mdp)
    both = [m(rows.input_ids, attention_mask=rows.attention_mask).logits for m in (found, model)]
    assert torch.equal(*both)
    small = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert small.table.dtype == torch.bfloat16 and torch.equal(small.table, model.table.to(torch.bfloat16))


# ------------------------------------------------------------------------------------------------------------ generation
def prompts(mdp: TokenMDP) -> list[tuple[int, ...]]:
    """Every prompt, by its tokens."""
    rows = listing(mdp)
    found = set()
    for ids, acts in zip(rows.input_ids.tolist(), rows.completion_mask.tolist(), strict=True):
        found.add(tuple(ids[: acts.index(1)]))
    return sorted(found)


def greedy(mdp: TokenMDP, table: Tensor, prompt: list[int]) -> list[int]:
    """The likeliest token in every state, by hand."""
    state, said = mdp.start, list(prompt)
    for token in prompt:
        state = int(mdp.next_state[state, token])
    while state >= 0:
        allowed = np.where(mdp.allowed[state], table[state].detach().numpy(), -np.inf)
        said.append(int(allowed.argmax()))
        state = int(mdp.next_state[state, said[-1]])
    return said


@pytest.mark.parametrize("use_cache", [False, True])
def test_greedy_generation_follows_the_table(hf: Any, use_cache: bool) -> None:
    """Prompts of two lengths in one left-padded batch say what each says by hand, whatever the cache."""
    mdp = one_turn()
    model = hf.TabularLM.optimal(mdp, 0.3)
    given = prompts(mdp)
    longest = max(map(len, given))
    ids = torch.tensor([[2] * (longest - len(p)) + list(p) for p in given])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in given])
    found = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=6, use_cache=use_cache)
    for row, prompt in zip(found.tolist(), given, strict=True):
        wanted = greedy(mdp, model.table, list(prompt))
        start = longest - len(prompt)
        assert row[start : start + len(wanted)] == wanted and set(row[start + len(wanted) :]) <= {mdp.token("<eos>")}


def test_generation_speaks_for_the_environment_and_stops(hf: Any) -> None:
    """From the bare first token a whole dialogue comes; the last token leads to the end of the automaton."""
    mdp = shiq_lab.make("ToolCall")
    model = hf.TabularLM.optimal(mdp, 0.2)
    ids = torch.full((4, 1), mdp.token("<bos>"))
    torch.manual_seed(0)
    found = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=50)
    strings = {
        tuple(r[: int(n)]) for r, n in zip(listing(mdp).input_ids.tolist(), listing(mdp).attention_mask.sum(1), strict=True)
    }
    for row in found.tolist():
        assert any(tuple(row[: len(s)]) == s and set(row[len(s) :]) <= {model.config.pad_token_id} for s in strings)


def test_sampling_draws_from_the_policy(hf: Any) -> None:
    """Frequencies of all strings against their exact probabilities: 2,000 draws, within 5 standard deviations each."""
    mdp = one_turn()
    solution = shiq_lab.solve(mdp, beta=0.5)
    model = hf.TabularLM.optimal(mdp, 0.5)
    ids = torch.full((2000, 1), mdp.token("<bos>"))
    torch.manual_seed(3)
    found = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=6, top_k=0)
    rows = shiq_lab.enumerate_trajectories(mdp, behavior=solution.log_policy())
    width = rows.input_ids.shape[1]
    found = torch.nn.functional.pad(found, (0, max(0, width - found.shape[1])), value=2)[:, :width]
    filled = torch.where(rows.attention_mask == 1, rows.input_ids, 2)
    hits = (found[:, None] == filled[None]).all(-1)
    assert bool((hits.sum(1) == 1).all())
    chance = rows.weights
    spread = (chance * (1 - chance) / 2000).sqrt()
    assert ((hits.double().mean(0) - chance).abs() <= 5 * spread).all()


def test_saying_makes_generate_say_what_is_listed(hf: Any) -> None:
    """Through generate itself: prompts are left-padded, rows end at different times, and afterwards it samples again."""
    mdp = one_turn()
    model = hf.TabularLM.optimal(mdp, 0.5)
    ids, mask = torch.tensor([[2, 5, 3], [5, 4, 3]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    wanted = [[0, 1, 2], [2]]
    with model.saying(wanted):
        found = model.generate(ids, attention_mask=mask, do_sample=True, max_new_tokens=3)
        with pytest.raises(ValueError, match="completions: expected one a row, 1, got 2"):
            model.generate(ids[:1], attention_mask=mask[:1], do_sample=True, max_new_tokens=3)
    assert found[:, 3:].tolist() == [[0, 1, 2], [2, 2, 2]]
    assert model._said is None


# ------------------------------------------------------------------------------------------------------------- tokenizer
def test_the_tokenizer_reads_back_what_it_writes(hf: Any, mdp: TokenMDP) -> None:
    tokenizer = hf.make_tokenizer(mdp)
    rows = listing(mdp)
    for ids, length in zip(rows.input_ids[:50].tolist(), rows.attention_mask[:50].sum(1).tolist(), strict=True):
        assert tokenizer(tokenizer.decode(ids[:length]))["input_ids"] == ids[:length]
    assert tokenizer.padding_side == "left" and tokenizer.pad_token_id == hf.TabularConfig.from_mdp(mdp).pad_token_id


def test_unclear_names_are_replaced(hf: Any) -> None:
    """Names of which one begins another cannot be split again; nor can missing or empty ones."""
    mdp = one_turn()
    assert hf.token_texts(mdp) == list(mdp.tokens or [])
    for tokens in (("a", "ab", "<eos>", "u", "w", "<bos>"), ("a", "", "<eos>", "u", "w", "<bos>"), None):
        assert hf.token_texts(replace(mdp, tokens=tokens)) == [f"<{i}>" for i in range(6)]
    odd = replace(mdp, tokens=(".", "*", "<eos>", "\\", "[", " "))
    tokenizer = hf.make_tokenizer(odd)
    assert tokenizer(tokenizer.decode([5, 3, 0, 1, 4, 2]))["input_ids"] == [5, 3, 0, 1, 4, 2]


# --------------------------------------------------------------------------------------------------------------- errors
def test_bad_input_is_named(hf: Any) -> None:
    mdp = one_turn()
    with pytest.raises(ValueError, match=r"logits: expected shape \(17, 6\), got shape \(6, 17\)"):
        hf.TabularLM.from_logits(mdp, torch.zeros(6, 17))
    spoilt = torch.zeros(17, 6, dtype=torch.float64)
    state, token = (int(x) for x in np.argwhere(mdp.allowed)[3])
    spoilt[state, token] = torch.nan
    with pytest.raises(
        ValueError, match=f"logits: expected finite numbers where a token is allowed, got nan at state {state}, "
    ):
        hf.TabularLM.from_logits(mdp, spoilt)
    with pytest.raises(ValueError, match="mdp: expected an automaton without a horizon, got horizon 3"):
        hf.TabularLM.reference(replace(mdp, horizon=3))
    with pytest.raises(ValueError, match="mdp: expected an environment state at the start"):
        hf.TabularLM.reference(replace(mdp, start=int(mdp.is_policy.argmax())))
    with pytest.raises(ValueError, match=r"config\.automaton: expected the arrays of an automaton, got None"):
        hf.TabularConfig().mdp()
    with pytest.raises(ValueError, match="input_ids: expected a prompt, got None"):
        hf.TabularLM.optimal(mdp, 0.5).generate()
    wide = 5000
    big = TokenMDP(np.full((1, wide), -1), np.zeros((1, wide)), np.zeros((1, wide))).with_prompt(0)
    with pytest.raises(ValueError, match="mdp: expected at most 4096 tokens, as the head is an identity, got 5000"):
        hf.TabularLM.reference(big)
