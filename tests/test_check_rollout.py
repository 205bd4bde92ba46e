"""check_rollout: right pairs pass, each planted bug is caught by its check with a message that stands alone."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from shiq_lab.bellman import solve
from shiq_lab.checks.bugs.plant import Bug, plant
from shiq_lab.checks.bugs.rollouts import BUGS, suite, with_bug
from shiq_lab.checks.report import FAILED, PASSED, SKIPPED, Report
from shiq_lab.checks.rollout.oracle import (
    TOY_PROMPTS,
    TOY_TOKENS,
    TableSampler,
    TableTrainer,
    ToyTokenizer,
    cut_table,
    table_pair,
    toy_dialogue,
)
from shiq_lab.checks.rollout.probabilities import Tree, bernoulli_kl, evidence
from shiq_lab.checks.rollout.protocol import Rollout, Setting, TrainingRow, Turn
from shiq_lab.checks.rollout.suite import ROLLOUT_CHECKS, check_rollout
from shiq_lab.enumeration import enumerate_trajectories
from shiq_lab.envs import make

NAMES = ["LP", "FQ", "TP", "ID", "AL", "WS"]
quick = partial(check_rollout, n=250, dtype="float64")


def run(sampler: type[TableSampler] = TableSampler, trainer: type[TableTrainer] = TableTrainer, **options: Any) -> Report:
    """The suite on the toy dialogue, at one setting unless told otherwise."""
    return quick(*table_pair(sampler=sampler, trainer=trainer), TOY_PROMPTS, **{"settings": [(1.0, 1.0)], **options})


# ------------------------------------------------------------------------------------------------------ right pairs
@pytest.mark.parametrize("keep_logprobs", [True, False])
def test_the_right_pair_passes(keep_logprobs: bool) -> None:
    report = suite(partial(table_pair, keep_logprobs=keep_logprobs))
    assert report.passed and not report.failed
    assert [r.name for r in report.results] == NAMES == [check.name for check in ROLLOUT_CHECKS]
    statuses = {r.name: r.status for r in report.results}
    assert statuses.pop("AL") == (PASSED if keep_logprobs else SKIPPED)
    assert set(statuses.values()) == {PASSED}
    assert all(r.compared > 500 for r in report.results if r.status == PASSED)


@pytest.mark.parametrize("name", ["ToolCall", "RandomTool"])
def test_real_dialogues_pass(name: str) -> None:
    """With a tool that answers alike and one that does not; the policy is the exact optimum."""
    mdp = make(name)
    sampler, trainer = table_pair(mdp)
    with torch.no_grad():
        optimum = torch.tensor(solve(mdp, beta=0.2).optimal_logits())
        trainer.model.table.copy_(torch.where(trainer.model.allowed, optimum, trainer.model.table))
    report = quick(sampler, trainer, [[mdp.n_tokens - 1]])
    assert report.passed and [r.status for r in report.results] == [PASSED] * 6


class Float32Trainer(TableTrainer):
    """The same table, rounded."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.model = self.model.float()


def test_float32_against_float64_is_rounding() -> None:
    """And in float64's tolerance it is not: the tolerance is not slack."""
    assert run(trainer=Float32Trainer, dtype="float32").passed
    assert "LP" in run(trainer=Float32Trainer, dtype="float64").failed


class Bfloat16Trainer(Float32Trainer):
    """Logits rounded to 8 bits."""

    def logprobs(self, *args: Any, **options: Any) -> list[list[float]]:
        rounded = Float32Trainer(toy_dialogue())
        rounded.model.load_state_dict(
            {k: v.bfloat16() if v.is_floating_point() else v for k, v in self.model.state_dict().items()}
        )
        return TableTrainer.logprobs(rounded, *args, **options)


def test_half_precision_with_a_tolerance() -> None:
    """Logits below 8 are off by 2^-6 at most and a log-prob by twice that, 0.032; F4 (0.3 and more) still shows."""
    assert run(trainer=Bfloat16Trainer, tolerance=0.032).passed
    wrong = with_bug(TableTrainer, "logprobs", ("above < top_p", "above < 1"))
    assert "LP" in run(trainer=wrong, tolerance=0.032, settings=[(1.0, 0.6)]).failed


class RowATurn(TableTrainer):
    """A training row for every turn, as stacks do that do not put turns together."""

    def training_rows(self, rollouts: Sequence[Rollout]) -> list[TrainingRow]:
        rows = []
        for r, rollout in enumerate(rollouts):
            for turn in rollout.turns:
                before, said = len(turn.context), len(turn.completion)
                mask, old = [0] * before + [1] * said, [0.0] * before + list(turn.logprobs)
                rows.append(TrainingRow(r, [*turn.context, *turn.completion], mask, old))
        return rows


def test_one_row_a_turn_is_right_too() -> None:
    assert run(trainer=RowATurn).passed


class RawSampler(TableSampler):
    """Draws under top_p, returns log-probs of the full vocabulary, as some engines do."""

    def generate(self, prompts: Any, *, n: int, temperature: float, top_p: float, seed: int) -> list[Rollout]:
        self.raw = cut_table(self.table, self.mdp, temperature, 1.0)
        return super().generate(prompts, n=n, temperature=temperature, top_p=top_p, seed=seed)

    def _speak(self, context: Any, log_policy: Any, rng: Any) -> Any:
        said, logprobs, end = super()._speak(context, log_policy, rng)
        state = self._state(context)
        for i, token in enumerate(said):
            logprobs[i], state = float(self.raw[state, token]), int(self.mdp.next_state[state, token])
        return said, logprobs, end


Unfiltered = with_bug(TableTrainer, "logprobs", ("above < top_p", "above < 1"))


def test_log_probs_before_top_p_are_a_choice_that_can_be_declared() -> None:
    """Undeclared, they are not what tokens are drawn with; declared, FQ says what it left out."""
    settings = [(1.0, 1.0), (1.0, 0.6)]
    assert run(RawSampler, Unfiltered, settings=settings).failed == ["FQ"]
    declared = run(RawSampler, Unfiltered, settings=settings, logprobs_of="full vocabulary")
    assert declared.passed
    assert declared.notes == ["FQ: settings with top_p < 1 left out, log-probs are declared to be of the full vocabulary"]
    skipped = run(RawSampler, Unfiltered, settings=settings[1:], logprobs_of="full vocabulary")["FQ"]
    assert skipped.status == SKIPPED and "every setting has top_p < 1" in skipped.reason


# ----------------------------------------------------------------------------------------------------- planted bugs
CAUGHT = {
    "C7": (["TP", "ID", "AL"], "TP", "turns whose context does not continue what came before: "),
    "C8": (["LP", "FQ", "TP", "ID", "AL", "WS"], "LP", "sampler's log-prob minus trainer's at temperature "),
    "F4": (["LP"], "LP", "sampler's are renormalised over the kept tokens: every ratio is the kept mass, 0.629 to 0.737"),
    "K2": (["WS"], "WS", "; they are those of the weights before the update"),
    "K3": (["ID"], "ID", "ids trained on that are not the ids sampled: "),
    "K3-bos": (["ID"], "ID", "position 3: expected id 3, got 8 (4 ids against 4)"),
}


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.id)
def test_a_planted_bug_is_caught(bug: Bug) -> None:
    """By the check that is there for it, at a place that is named, with a hint of what it usually means."""
    failed, check, words = CAUGHT[bug.id]
    report = bug.suite(bug.wrong)
    assert report.failed == failed
    result = report[check]
    assert words in result.message
    assert "rollout" in result.where and result.hint and result.measured is not None
    assert result.measured > 1000 * result.tolerance  # type: ignore[operator]


def test_every_row_of_the_layer_is_planted() -> None:
    assert [bug.id for bug in BUGS] == list(CAUGHT)
    assert {bug.layer for bug in BUGS} == {"R"}


Cold = with_bug(TableTrainer, "logprobs", (".logits / temperature", ".logits"))


def test_a_trainer_that_ignores_the_temperature() -> None:
    report = run(trainer=Cold, settings=[(1.0, 1.0), (0.7, 1.0)])
    assert report.failed == ["LP"]
    assert report["LP"].message.endswith("the trainer's do not depend on the temperature")


def test_an_engine_that_returns_log_probs_before_the_temperature() -> None:
    """Both the comparison with the trainer and the frequencies see it, each without the other."""
    raw = cut_table(TableTrainer(toy_dialogue()).weights(), toy_dialogue(), 1.0, 1.0)
    edit = ("float(log_policy[state, token])", "float(raw[state, token])")
    report = run(with_bug(TableSampler, "_speak", edit, raw=raw), settings=[(0.5, 1.0)], n=600)
    assert {"LP", "FQ"} <= set(report.failed)
    assert report["LP"].message.endswith("the sampler's are those of the full vocabulary at temperature 1")
    assert report["FQ"].measured > 1 and ", by log-prob 0." in report["FQ"].message  # type: ignore[operator]


@pytest.mark.parametrize(
    ("shift", "words"), [(1, "moved 1 to the left they would fit"), (-1, "moved 1 to the right they would fit")]
)
def test_old_log_probs_one_place_off(shift: int, words: str) -> None:
    moved = {1: "[0.0, *old[:-1]]", -1: "[*old[1:], 0.0]"}[shift]
    report = run(trainer=with_bug(TableTrainer, "training_rows", ("mask, old if", f"mask, {moved} if")))
    assert report.failed == ["AL"]
    assert words in report["AL"].message and "before any update" in report["AL"].message


def test_a_mask_that_drops_the_last_token() -> None:
    edit = ("rows.append(", "mask[-1] = 0\n        rows.append(")
    report = run(trainer=with_bug(TableTrainer, "training_rows", edit))
    assert report.failed == ["ID"]
    assert report["ID"].measured == 2 * 250  # one of every row
    assert "ids trained, " in report["ID"].message


class OnceSampler(TableSampler):
    """Synchronises when it starts and at the first call after an update, then never again."""

    calls = 0

    def synchronise(self) -> None:
        self.calls += 1
        if self.calls <= 2:
            super().synchronise()


def test_a_synchronisation_that_works_once() -> None:
    result = run(OnceSampler)["WS"]
    assert result.status == FAILED
    assert result.message.startswith("sampler's log-prob minus trainer's after update 2 and a synchronisation: ")


class CachedSampler(TableSampler):
    """Draws from the first weights for ever, and returns log-probs of the new ones: only frequencies can tell."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.first = self.table.copy()

    def _speak(self, context: Any, log_policy: Any, rng: Any) -> Any:
        said, _, end = super()._speak(context, cut_table(self.first, self.mdp, 1.0, 1.0), rng)
        state, logprobs = self._state(context), []
        for token in said:
            logprobs.append(float(log_policy[state, token]))
            state = int(self.mdp.next_state[state, token])
        return said, logprobs, end


def test_stale_draws_with_fresh_log_probs_show_in_the_frequencies() -> None:
    report = run(CachedSampler)
    assert report.failed == ["WS"]
    assert report["WS"].message.startswith("evidence that tokens are not drawn with their log-probs after update ")


class NoisySampler(TableSampler):
    """Log-probs that are not a function of token and context, as with dropout left on."""

    def _speak(self, context: Any, log_policy: Any, rng: Any) -> Any:
        said, logprobs, end = super()._speak(context, log_policy, rng)
        return said, [x + 1e-3 * rng.normal() for x in logprobs], end


def test_log_probs_that_change_from_draw_to_draw() -> None:
    message = run(NoisySampler)["FQ"].message
    assert message.startswith("log-probs of one token in one context apart from each other at temperature 1, top_p 1: 0.00")


# ------------------------------------------------------------------------------------- nothing compared, bad subjects
class Mute(TableSampler):
    def _speak(self, context: Any, log_policy: Any, rng: Any) -> Any:
        return [], [], -1


def test_a_sampler_that_says_nothing_fails() -> None:
    report = run(Mute)
    assert {"LP", "FQ", "ID", "AL", "WS"} <= set(report.failed)
    for name, what in (("LP", "sampler's log-prob minus trainer's at temperature 1, top_p 1"), ("ID", "ids trained on")):
        assert report[name].message.startswith(what) and report[name].message.endswith("nothing was compared")


def test_too_few_draws_are_no_evidence() -> None:
    report = run(n=50)
    assert report["FQ"].message == "draws after one context at temperature 1, top_p 1: 50, expected at least 200, over 1 number"
    assert report["FQ"].hint == "Raise n."


def test_an_update_that_moves_nothing_proves_nothing() -> None:
    class Still(TableTrainer):
        def update(self) -> None:
            pass

    message = run(trainer=Still)["WS"].message
    assert message.startswith("change of the trainer's own log-probs by update 1: 0, expected at least ")


class Lazy(TableSampler):
    """A generator of rollouts in numpy, with ids as int32 and float32 log-probs rounded: what engines return."""

    def generate(self, *args: Any, **options: Any) -> Any:
        for rollout in super().generate(*args, **options):
            yield Rollout(tuple(Turn(np.int32(t.context), np.int32(t.completion), np.array(t.logprobs)) for t in rollout.turns))


def test_arrays_and_generators_will_do() -> None:
    assert run(Lazy, RowATurn).passed


def broken(method: str, result: Callable[..., Any]) -> type[TableSampler]:
    return type("Broken", (TableSampler,), {method: result})


def crash(*_: Any, **__: Any) -> Any:
    raise RuntimeError("out of memory")


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (broken("generate", crash), "sampler.generate raised RuntimeError: out of memory"),
        (broken("synchronise", crash), "sampler.synchronise raised RuntimeError: out of memory"),
        (broken("generate", lambda *a, **k: []), "sampler.generate: expected 250 for each of 2 prompts, got 0 rollouts"),
        (
            broken("generate", lambda *a, **k: [Rollout([Turn([8], [1, 2], [0.0])])] * 500),
            "sampler.generate: rollout 0, turn 0 has 1 log-probs for 2 sampled ids",
        ),
        (
            broken("generate", lambda *a, **k: [Rollout([Turn([8], [1.5], [0.0])])] * 500),
            "sampler.generate: rollout 0, turn 0 has ids that are not whole numbers",
        ),
        (
            broken("generate", lambda *a, **k: [Rollout([Turn([8], [1], [None])])] * 500),  # type: ignore[list-item]
            "sampler.generate: rollout 0, turn 0 has log-probs that are not numbers",
        ),
        (
            broken("generate", lambda *a, **k: [Rollout(["turn"])] * 500),  # type: ignore[list-item]
            "sampler.generate: rollout 0, turn 0 is a str, expected a Turn",
        ),
        (
            broken("generate", lambda *a, **k: (1 / 0 for _ in "x")),
            "sampler.generate raised ZeroDivisionError: division by zero",
        ),
        (
            broken("generate", lambda *a, **k: ["text"] * 500),
            "sampler.generate: expected Rollouts of at least one turn, got 'text' as rollout 0",
        ),
    ],
)
def test_a_broken_sampler_gets_a_verdict(sampler: type[TableSampler], message: str) -> None:
    report = run(sampler)
    assert report.failed == NAMES and {r.message for r in report.results} == {message}


def test_a_broken_trainer_gets_a_verdict() -> None:
    class Short(TableTrainer):
        def logprobs(self, rows: Any, **setting: Any) -> Any:
            return [numbers[1:] for numbers in super().logprobs(rows, **setting)]

    class Uneven(TableTrainer):
        def training_rows(self, rollouts: Any) -> Any:
            return [TrainingRow(0, [8, 4, 0], [0, 0])]

    class Stray(TableTrainer):
        def training_rows(self, rollouts: Any) -> Any:
            return [TrainingRow(-1, [8], [0])]

    class Other(TableTrainer):
        def training_rows(self, rollouts: Any) -> Any:
            return [([8], [0])]

    class Fewer(TableTrainer):
        def logprobs(self, rows: Any, **setting: Any) -> Any:
            return super().logprobs(rows[1:], **setting)

    assert run(trainer=Other)["ID"].message == "trainer.training_rows: row 0 is a tuple, expected a TrainingRow"
    assert run(trainer=Fewer)["LP"].message.startswith("trainer.logprobs: expected ")
    assert run(trainer=Short)["LP"].message.startswith("trainer.logprobs: expected 6 numbers for a row of 6 ids, got 5")
    message = run(trainer=Uneven)["ID"].message
    assert message == "trainer.training_rows: row 0 has ids, mask and log-probs of unequal lengths [2, 3]"
    assert run(trainer=Stray)["ID"].message == "trainer.training_rows: row 0 belongs to rollout -1 of 500"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": []}, "prompts: expected at least one list of at least one token id, got []."),
        ({"prompts": [[]]}, "prompts: expected at least one list of at least one token id, got [[]]."),
        ({"n": 0}, "n: expected a whole number >= 1, got 0."),
        ({"seed": -1}, "seed: expected a whole number >= 0, got -1."),
        (
            {"dtype": "bfloat16"},
            "dtype: expected one of float64, float32, got 'bfloat16'. For half precision give a tolerance in nats.",
        ),
        ({"tolerance": math.inf}, "tolerance: expected a finite number of nats >= 0, got inf."),
        ({"logprobs_of": "raw"}, "logprobs_of: expected 'sampled' or 'full vocabulary', got 'raw'."),
        ({"settings": []}, "settings: expected at least one pair (temperature, top_p), got none."),
        ({"settings": [(0.0, 1.0)]}, "settings: expected pairs (temperature > 0, top_p in (0, 1]), got (0.0, 1.0)."),
        ({"settings": [(1.0, 1.5)]}, "settings: expected pairs (temperature > 0, top_p in (0, 1]), got (1.0, 1.5)."),
        ({"sampler": object()}, "sampler: expected an object with a method generate, got object. See the protocol Sampler."),
        ({"trainer": object()}, "trainer: expected an object with a method logprobs, got object. See the protocol Trainer."),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    sampler, trainer = table_pair()
    arguments: dict[str, Any] = {"sampler": sampler, "trainer": trainer, "prompts": TOY_PROMPTS, **options}
    with pytest.raises(ValueError, match="expected") as error:
        check_rollout(arguments.pop("sampler"), arguments.pop("trainer"), arguments.pop("prompts"), **arguments)
    assert str(error.value) == message


def test_the_docstring_holds_the_contract() -> None:
    told = check_rollout.__doc__ or ""
    assert "from shiq_lab.checks.rollout.protocol import Rollout, TrainingRow, Turn" in told
    for part in (*(f".{m}(" for m in ("generate", "synchronise", "logprobs", "training_rows", "update")), "Turn(context"):
        assert part in told, part


def test_an_unknown_option_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"^check_rollout\(\) got an unexpected keyword argument 'foo'"):
        check_rollout(*table_pair(), TOY_PROMPTS, foo=1)  # type: ignore[call-arg]


def test_an_expected_failure_that_passes_is_a_failure() -> None:
    assert run(expect_fail={"TP": "known"}).failed == ["TP"]


# --------------------------------------------------------------------------------------------------- the parts
@pytest.mark.parametrize("N", [5, 40, 200])
@pytest.mark.parametrize("p", [0.003, 0.2, 0.5, 0.97])
def test_the_frequency_bound_holds_exactly(N: int, p: float) -> None:
    """The exact binomial probability of evidence > 1 stays below what the bound grants this token, false_alarm p / 4."""
    false_alarm, violated = 0.1, 0.0
    for k in range(1, N + 1):
        tree = {(): [(7, math.log(p))] * k + [(8, math.log1p(-p))] * (N - k)}
        ratio = next(ratio for _, what, ratio, _ in evidence(tree, false_alarm, 0.0) if what == "token 7")
        if ratio > 1:
            violated += math.comb(N, k) * p**k * (1 - p) ** (N - k)
    assert violated <= false_alarm * p / 4
    certain = next(ratio for _, _, ratio, _ in evidence({(): [(7, math.log(p))] * 5000}, false_alarm, 0.0))
    assert certain > 1  # it is no bound that nothing exceeds


def test_false_alarms_are_as_rare_as_they_are_said_to_be() -> None:
    """Two hundred honest samples at a false alarm of one in two: the bounds are loose, so far fewer than a hundred speak."""
    rng, p = np.random.default_rng(0), np.array([0.5, 0.3, 0.15, 0.05])
    alarms = 0
    for _ in range(200):
        tree = {(): [(int(i), math.log(p[i])) for i in rng.choice(4, size=300, p=p)]}
        alarms += max(ratio for *_, ratio, _ in evidence(tree, 0.5, 0.0)) > 1
    assert 0 < alarms < 100 - 3 * math.sqrt(200 / 4)


def test_mass_that_is_never_drawn_is_seen_at_once() -> None:
    """Log-probs that add up to 0.7: 0.7^125 = 4e-20 that the second half stays inside; no single token says as much."""
    tree = {(): [(i % 4, math.log(0.175)) for i in range(250)]}
    found = {what: ratio for _, what, ratio, _ in evidence(tree, 1e-9, 0.0)}
    assert found["any of [0, 1, 2, 3]"] > 1 > max(ratio for what, ratio in found.items() if what.startswith("token"))
    assert found["any of [0, 1, 2, 3]"] == pytest.approx(125 * math.log(1 / 0.7) / (math.log(2e9) + 2 * math.log(2)))


def test_frequencies_that_no_probability_explains() -> None:
    """A positive log-prob; a certain token that was not drawn every time; a token of probability 0."""
    for impossible in (0.1, math.nan, math.inf):
        assert [ratio for *_, ratio, _ in evidence({(): [(1, impossible)]}, 1e-9, 1e-6)] == [math.inf]
    assert max(ratio for *_, ratio, _ in evidence({(): [(1, -0.1), (2, -0.1)] * 2}, 1e-9, 1e-6)) == math.inf  # add up to 1.8
    ratios = [ratio for *_, ratio, _ in evidence({(): [(1, 0.0)] * 9 + [(2, -3.0)]}, 1e-9, 1e-6)]
    assert ratios[0] == math.inf
    assert [ratio for *_, ratio, _ in evidence({(): [(1, -math.inf)]}, 1e-9, 1e-6)] == [math.inf]


@pytest.mark.parametrize(("a", "p"), [(0.3, 0.3), (0.0, 0.25), (1.0, 0.25), (0.6, 0.1)])
def test_bernoulli_kl_by_torch(a: float, p: float) -> None:
    first, second = (torch.tensor([x, 1 - x], dtype=torch.float64) for x in (a, p))
    expected = torch.nn.functional.kl_div(second.log(), first, reduction="sum").item()
    assert bernoulli_kl(a, p) == pytest.approx(expected, abs=1e-15)


def test_top_p_by_hand() -> None:
    """p = (0.5, 0.3, 0.2). top_p = 0.6 keeps two, (0.625, 0.375); 0.5 keeps one; at temperature 1/2 p ~ (25, 9, 4) / 38."""
    from shiq_lab.builders import END, Row, from_states

    p = np.log([0.5, 0.3, 0.2])
    mdp = from_states(0, lambda s: Row(next={i: END for i in range(3)}, logits=dict(enumerate(p))), 3).with_prompt(0)
    table, trainer = mdp.ref_logits, TableTrainer(mdp)
    for (temperature, top_p), expected in {
        (1.0, 0.6): [0.625, 0.375, 0],
        (1.0, 0.5): [1, 0, 0],
        (1.0, 1.0): [0.5, 0.3, 0.2],
        (0.5, 1.0): [25 / 38, 9 / 38, 4 / 38],
        (0.5, 0.7): [25 / 34, 9 / 34, 0],
    }.items():
        np.testing.assert_allclose(np.exp(cut_table(table, mdp, temperature, top_p)[0]), expected, rtol=1e-15)
        rows = trainer.logprobs([[0, i] for i in range(3)], temperature=temperature, top_p=top_p)
        np.testing.assert_allclose([math.exp(row[1]) for row in rows], expected, rtol=1e-14)


def test_the_sampler_draws_the_automatons_law() -> None:
    """Whole episodes, tool replies included, against the list of all trajectories, by the same exact bound."""
    mdp = make("RandomTool")
    sampler, _ = table_pair(mdp)
    listed = enumerate_trajectories(mdp)
    chance = {
        tuple(ids[mask == 1].tolist()): float(w)
        for ids, mask, w in zip(listed.input_ids, listed.attention_mask, listed.weights, strict=True)
    }
    rollouts = sampler.generate([[mdp.n_tokens - 1]], n=4000, temperature=1.0, top_p=1.0, seed=3)
    tree: Tree = {(): []}
    number = {string: i for i, string in enumerate(chance)}
    for rollout in rollouts:
        string = (*rollout.turns[-1].context, *rollout.turns[-1].completion)
        tree[()].append((number[string], math.log(chance[string])))
    assert len(set(tree[()])) > 50
    assert max(ratio for *_, ratio, _ in evidence(tree, 1e-6, 0.0)) < 1


def test_the_toy_tokenizer_merges() -> None:
    tokenizer = ToyTokenizer(TOY_TOKENS, bos=8)
    assert tokenizer.decode([8, 4, 0, 1, 3]) == "<bos>xab!"
    assert tokenizer.encode("<bos>xab!") == [8, 4, 2, 3]
    assert tokenizer.encode("ba", bos=True) == [8, 1, 0]
    with pytest.raises(ValueError, match="text: expected made of a, b, ab"):
        tokenizer.encode("az")


def test_another_split_of_the_same_text_is_a_path_with_another_probability() -> None:
    """Or else decoding and encoding again could not be seen in log-probs."""
    trainer = TableTrainer(toy_dialogue())
    split, merged = trainer.logprobs([[8, 4, 0, 0, 1, 3], [8, 4, 0, 2, 3]], temperature=1.0, top_p=1.0)
    assert abs(sum(split[3:]) - sum(merged[3:])) > 0.1 and abs(split[-1] - merged[-1]) > 0.1


def test_settings_read_well() -> None:
    assert str(Setting(0.7, 0.9)) == "temperature 0.7, top_p 0.9"


def test_the_bugs_are_one_edit_each() -> None:
    """plant refuses text that does not stand there once, so a bug cannot silently become the right thing."""
    with pytest.raises(ValueError, match="text that stands once"):
        plant(TableTrainer.training_rows, ("no such line", ""))
