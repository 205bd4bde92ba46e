"""reference.py: the hash sees every change, the cache answers for what it was made of alone, and damage is repaired."""

import json
import logging
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hf_worker
import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytestmark = pytest.mark.slow  # importing transformers takes seconds


@pytest.fixture(scope="module")
def reference() -> Any:
    pytest.importorskip("transformers", reason="the extra hf is not installed")
    from shiq_lab.hf import reference

    return reference


@pytest.fixture
def small_parts(reference: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Two rows a file."""
    monkeypatch.setattr(reference, "PART", 2)
    return reference


class Counter:
    """made_up statistics, counting the rows asked for."""

    def __init__(self) -> None:
        self.rows = 0

    def __call__(self, some: Any) -> list[Any]:
        self.rows += len(some)
        return hf_worker.made_up(some)


def flat(found: list[Any]) -> np.ndarray:
    return np.concatenate([np.concatenate([f.token_logit, f.logsumexp, [f.end_logsumexp]]) for f in found])


# ------------------------------------------------------------------------------------------------------- the hash
def test_the_same_model_has_the_same_hash(reference: Any, tmp_path: Path) -> None:
    """Built twice, saved and loaded, on either side of a forward pass."""
    from transformers import AutoModelForCausalLM

    model = hf_worker.llama(dtype=torch.float32)
    said = reference.fingerprint(model)
    model.save_pretrained(tmp_path)
    model(torch.tensor([[1, 2]]))
    assert said == reference.fingerprint(model) == reference.fingerprint(hf_worker.llama(dtype=torch.float32))
    for _ in range(2):
        assert reference.fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path)) == said


def changes() -> Iterator[tuple[str, Any]]:
    """(what, how) of models that are not the first one. Signs, swaps and shifts are what a linear checksum does not see."""

    def at(name: str, change: Any) -> Any:
        def apply(model: Any) -> None:
            with torch.no_grad():
                change(dict([*model.named_parameters(), *model.named_buffers()])[name].view(-1))

        return apply

    def ulp(w: Tensor) -> None:
        w[-1] = torch.nextafter(w[-1], w[-1] + 1)

    def flip(w: Tensor) -> None:
        w[[1, 3]] *= -1

    def negate(w: Tensor) -> None:
        w.neg_()

    def swap(w: Tensor) -> None:
        w[[0, 5]] = w[[5, 0]]

    for name, _ in hf_worker.llama().named_parameters():
        yield f"one ulp of {name}", at(name, ulp)
    for what, change in (("two signs", flip), ("all signs", negate), ("two weights swapped", swap)):
        yield what, at("model.layers.1.mlp.up_proj.weight", change)
    yield "a buffer", at("model.rotary_emb.inv_freq", ulp)
    for entry, value in (("rms_norm_eps", 1e-3), ("max_position_embeddings", 65), ("eos_token_id", 3)):
        yield f"config.{entry}", lambda model, entry=entry, value=value: setattr(model.config, entry, value)
    yield "the dtype", lambda model: model.to(torch.bfloat16)


def test_any_change_shows(reference: Any) -> None:
    seen = {reference.fingerprint(hf_worker.llama()): "none"}
    for what, change in changes():
        model = hf_worker.llama()
        change(model)
        said = reference.fingerprint(model)
        assert said not in seen, f"{what} has the hash of: {seen[said]}"
        seen[said] = what
    assert len(seen) > 25


@pytest.mark.parametrize("entry", ["use_cache", "architectures", "_name_or_path"])
def test_what_changes_no_number_does_not_count(reference: Any, entry: str) -> None:
    """The engine switches use_cache off and saving writes architectures, so a model and its saved self would differ."""
    model = hf_worker.llama()
    setattr(model.config, entry, {"use_cache": False, "architectures": ["Other"]}.get(entry, "elsewhere"))
    assert reference.fingerprint(model) == reference.fingerprint(hf_worker.llama())


def test_a_hash_without_buffers_is_seen(reference: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the change of a buffer, which test_any_change_shows makes too, no longer shows."""
    monkeypatch.setattr(nn.Module, "named_buffers", lambda *_, **__: iter(()))
    model = hf_worker.llama()
    before = reference.fingerprint(model)
    model.model.rotary_emb.inv_freq.mul_(2)
    assert reference.fingerprint(model) == before


def test_adapters_do_not_count(reference: Any) -> None:
    """LoRA and modules saved whole: the hash is the base model's, at any value of the adapter. A base weight still counts."""
    from peft import LoraConfig, get_peft_model

    said = reference.fingerprint(hf_worker.llama())
    for options in (
        {"target_modules": "all-linear", "use_dora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ):
        model = get_peft_model(hf_worker.llama(), LoraConfig(r=2, init_lora_weights=False, **options))
        assert reference.fingerprint(model) == said
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.add_(float("lora_" in name or "modules_to_save" in name))
        assert reference.fingerprint(model) == said
        with torch.no_grad():
            model.get_base_model().model.norm.weight[0] += 1
        assert reference.fingerprint(model) != said


def test_the_data_hash_sees_what_the_reference_sees(reference: Any) -> None:
    from dataclasses import replace

    rows = hf_worker.rows(4)
    said = reference.data_hash(rows)
    first = rows[0]

    def part(begin: int, end: int) -> Any:
        return replace(first, **{k: getattr(first, k)[begin:end] for k in ("input_ids", "completion_mask", "rewards")})

    others = [
        [replace(first, input_ids=[*first.input_ids[:-1], 3 + first.input_ids[-1] % 30]), *rows[1:]],
        [replace(first, completion_mask=[0, 0, 0, *first.completion_mask[3:]]), *rows[1:]],
        [replace(first, terminated=not first.terminated), *rows[1:]],
        [rows[1], first, *rows[2:]],
        rows[:3],
        [part(0, 3), part(3, len(first)), *rows[1:]],
    ]
    assert len({said, *map(reference.data_hash, others)}) == 1 + len(others)
    assert reference.data_hash([replace(r, rewards=[1.0] * len(r), weight=9.0, group=7) for r in rows]) == said


# ------------------------------------------------------------------------------------------------------- the files
def test_a_hit_computes_nothing(small_parts: Any, tmp_path: Path) -> None:
    rows, count = hf_worker.rows(5), Counter()
    fresh = small_parts.statistics_of(rows, count, tmp_path)
    assert count.rows == 5 and len(fresh) == 5 and sorted(p.name for p in tmp_path.iterdir()) == ["000000", "000001", "000002"]
    again = small_parts.statistics_of(rows, count, tmp_path)
    assert count.rows == 5 and np.array_equal(flat(again), flat(fresh)) and flat(again).dtype == np.float64
    assert small_parts.statistics_of(rows, count, None) and count.rows == 10
    assert np.array_equal(flat(fresh), flat(hf_worker.made_up(rows)))


def other_rows(folder: Path, reference: Any) -> None:
    """The same lengths, other tokens: only the rows' own hash can tell."""
    shift = [type(r)(r.input_ids[::-1], r.completion_mask, r.rewards, r.terminated) for r in hf_worker.rows(6)]
    reference.statistics_of(shift, hf_worker.made_up, folder)


def flip(place: float) -> Any:
    def change(folder: Path, _: Any) -> None:
        path = folder / "000001"
        data = bytearray(path.read_bytes())
        data[int(place * (len(data) - 1))] ^= 1
        path.write_bytes(bytes(data))

    return change


def cut(keep: float) -> Any:
    def change(folder: Path, _: Any) -> None:
        data = (folder / "000001").read_bytes()
        (folder / "000001").write_bytes(data[: int(keep * len(data))])

    return change


DAMAGE: dict[str, tuple[Any, str, int]] = {  # how, what the log says, rows computed again
    "first byte": (flip(0.0), "damaged or cut short", 2),
    "a byte in the middle": (flip(0.5), "damaged or cut short", 2),
    "last byte": (flip(1.0), "damaged or cut short", 2),
    "cut short": (cut(0.7), "damaged or cut short", 2),
    "cut in the digest": (cut(0.01), "damaged or cut short", 2),
    "empty": (cut(0.0), "damaged or cut short", 2),
    "gone": (lambda folder, _: (folder / "000001").unlink(), "", 2),
    "half a file of a killed process": (lambda folder, _: (folder / "000001").rename(folder / "000001.7.half"), "", 2),
    "other rows": (other_rows, "are of other rows", 6),
}


@pytest.mark.parametrize("what", list(DAMAGE))
def test_damage_is_found_and_repaired(small_parts: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str) -> None:
    how, said, again = DAMAGE[what]
    rows, count = hf_worker.rows(6), Counter()
    if what != "other rows":
        small_parts.statistics_of(rows, hf_worker.made_up, tmp_path)
    how(tmp_path, small_parts)
    with caplog.at_level(logging.WARNING):
        found = small_parts.statistics_of(rows, count, tmp_path)
    assert np.array_equal(flat(found), flat(hf_worker.made_up(rows))) and count.rows == again
    assert bool(said) == bool(caplog.text) and said in caplog.text and (not said or "computed again" in caplog.text)
    assert small_parts.statistics_of(rows, count, tmp_path) and count.rows == again, "it was repaired on disk"


def test_a_digest_that_is_not_checked_is_seen(small_parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: every byte in turn of the numbers, flipped, would be read as if nothing had happened."""
    rows = hf_worker.rows(6)
    small_parts.statistics_of(rows, hf_worker.made_up, tmp_path)
    path = tmp_path / "000001"
    data = bytearray(path.read_bytes())
    number = flat(hf_worker.made_up(rows[2:4]))[0].tobytes()
    data[bytes(data).index(number) + 6] ^= 1
    path.write_bytes(bytes(data))
    plain = small_parts.read_part

    def trusting(where: Path, some: Any) -> Any:
        content = where.read_bytes()
        monkeypatch.setattr(small_parts.hashlib, "sha256", _always(content[:64], small_parts.hashlib.sha256, content[64:]))
        return plain(where, some)

    monkeypatch.setattr(small_parts, "read_part", trusting)
    monkeypatch.setattr("zipfile.ZipExtFile._update_crc", lambda *_: None)  # the archive has a checksum of its own
    found = small_parts.statistics_of(rows, hf_worker.made_up, tmp_path)
    assert not np.array_equal(flat(found), flat(hf_worker.made_up(rows)))


def _always(said: bytes, plain: Any, of: bytes) -> Any:
    class Fixed:
        def hexdigest(self) -> str:
            return said.decode()

    return lambda data=b"": Fixed() if data == of else plain(data)


@pytest.mark.parametrize("meets", [True, False], ids=["barrier", "no barrier"])
def test_two_ranks_share_the_parts(small_parts: Any, tmp_path: Path, meets: bool) -> None:
    """Each part is computed once, by its own rank. Planted: without the barrier the first rank computes the other's too."""
    rows, counts, found = hf_worker.rows(10), [Counter(), Counter()], [None, None]
    barrier = threading.Barrier(2, timeout=60)
    first_done = threading.Event()

    def work(rank: int) -> None:
        if rank == 1 and not meets:
            first_done.wait(60)
        wait = barrier.wait if meets else lambda: None
        found[rank] = small_parts.statistics_of(rows, counts[rank], tmp_path, rank=rank, world=2, wait=wait)
        if rank == 0:
            first_done.set()

    ranks = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    [t.start() for t in ranks], [t.join() for t in ranks]
    assert all(np.array_equal(flat(f), flat(hf_worker.made_up(rows))) for f in found)
    assert [c.rows for c in counts] == ([6, 4] if meets else [10, 4])


def test_a_kill_while_writing_leaves_nothing_that_reads_wrong(small_parts: Any, tmp_path: Path) -> None:
    """kill -9 behind half of the second part's bytes: the first is whole, the second is not there, the answer is the same."""
    child = hf_worker.start("write", tmp_path)
    hf_worker.wait_for(tmp_path / "writing", child)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait(30) == -signal.SIGKILL
    left = sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("00"))
    assert left == ["000000", f"000001.{child.pid}.half"] and (tmp_path / left[1]).stat().st_size == 700
    rows, count = hf_worker.rows(6), Counter()
    found = small_parts.statistics_of(rows, count, tmp_path)
    assert count.rows == 4 and np.array_equal(flat(found), flat(hf_worker.made_up(rows)))


# ------------------------------------------------------------------------------------------------- in the trainer
def one_step(made: Any) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one batch of all rows."""
    made.model.zero_grad()
    made.model.train()
    loss = made.compute_loss(made.model, made.collate([made.train_dataset[i] for i in range(len(made.train_dataset))]))
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in made.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "logits"])
def test_cached_adapter_and_model_references_are_one(reference: Any, tmp_path: Path, fused: bool) -> None:
    """LoRA away from zero. float64: three orders of the same sums; so the loss agrees to a few ulp, the gradient to 1e-12."""
    steps = {}
    for kind in ("cache", "adapter", "model", "cache of a ref_model"):
        ref = hf_worker.llama() if "model" in kind else None
        model = hf_worker.lora(hf_worker.llama())
        options = {"reference": "cache" if "cache" in kind else kind, "reference_cache": str(tmp_path / kind), "fused": fused}
        steps[kind] = one_step(hf_worker.trainer(model, hf_worker.rows(8), tmp_path, ref_model=ref, **options))
    loss, grads = steps["cache"]
    assert len(grads) == 8 and all("lora_" in n for n in grads) and max(g.abs().max() for g in grads.values()) > 1e-2
    for other, others in steps.values():
        assert abs(other - loss) <= 1e-13 * loss and others.keys() == grads.keys()
        assert all((others[n] - g).abs().max() <= 1e-12 * (1 + g.abs().max()) for n, g in grads.items())


def test_an_adapter_left_on_is_seen(reference: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the reference is the adapted model itself, so the log-ratios are 0 and the loss is another."""
    import contextlib

    from shiq_lab.hf import trainer

    right = one_step(hf_worker.trainer(hf_worker.lora(hf_worker.llama()), hf_worker.rows(8), tmp_path))[0]
    monkeypatch.setattr(trainer, "adapter_off", lambda model: contextlib.nullcontext())
    wrong = one_step(hf_worker.trainer(hf_worker.lora(hf_worker.llama()), hf_worker.rows(8), tmp_path))[0]
    assert abs(right - wrong) > 1e-2 * right


def test_without_a_ref_model_it_is_the_model_as_it_comes(reference: Any, tmp_path: Path) -> None:
    """At l = l_ref, rho_t = -(reward-to-go) (F4): the weighted mean of sum_t (r_t + r_{t+1} + ...)^2, exactly."""
    rows = hf_worker.rows(8)
    loss, _ = one_step(hf_worker.trainer(hf_worker.llama(), rows, tmp_path))
    squares = [sum(sum(r.rewards[t:]) ** 2 for t in range(2, len(r))) for r in rows]
    wanted = sum(r.weight * s for r, s in zip(rows, squares, strict=True)) / sum(r.weight for r in rows)
    assert loss == pytest.approx(wanted, rel=1e-12)


def test_the_cache_is_of_this_model_these_rows_and_this_vocabulary(
    reference: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shiq_lab.hf.trainer import ShiQTrainer

    computed: list[int] = []
    plain = ShiQTrainer._compute_reference

    def counted(self: Any, model: Any, some: Any) -> Any:
        computed.append(len(some))
        return plain(self, model, some)

    monkeypatch.setattr(ShiQTrainer, "_compute_reference", counted)

    def made(seed: int = 0, n: int = 4, ref: Any = None, **options: Any) -> int:
        before = sum(computed)
        options = {"reference_cache": str(tmp_path / "cache"), **options}
        hf_worker.trainer(hf_worker.llama(seed), hf_worker.rows(n), tmp_path, ref_model=ref, **options)
        return sum(computed) - before

    assert made() == 4 and made() == 0 and made(beta=0.1, gamma=0.9, padding_side="left") == 0
    assert made(seed=1) == 4 and made(seed=2, ref=hf_worker.llama(1)) == 0
    assert made(n=5) == 5 and made(allowed_tokens=list(range(3, 41))) == 4 and made(bf16=True) == 4
    assert made(reference_cache=None) == 4


def test_a_run_is_not_continued_against_another_reference(reference: Any, tmp_path: Path) -> None:
    more: dict[str, Any] = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    hf_worker.trainer(hf_worker.llama(), hf_worker.rows(8), tmp_path, **more).train()
    said = reference.fingerprint(hf_worker.llama())
    assert json.loads((tmp_path / "checkpoint-1" / "shiq_reference.json").read_text())["reference"] == said
    hf_worker.trainer(hf_worker.llama(), hf_worker.rows(8), tmp_path, **more).train(str(tmp_path / "checkpoint-1"))
    other = hf_worker.trainer(hf_worker.llama(1), hf_worker.rows(8), tmp_path, **more)
    with pytest.raises(ValueError) as caught:
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    remedy = "Make the trainer with the model that the run began with; the checkpoint's weights are loaded on top."
    expected = f"expected a run against this reference, got one against {said[:12]}"
    assert str(caught.value) == f"resume_from_checkpoint: {expected}. {remedy}"


def test_a_run_that_goes_on_otherwise_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Another beta or other data than at the beginning: one warning that names them; the same: none."""
    more: dict[str, Any] = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    hf_worker.trainer(hf_worker.llama(), hf_worker.rows(8), tmp_path, **more).train()
    for count, changes, told in ((8, {}, []), (8, {"beta": 0.3}, ["beta"]), (6, {"loss": "shifted"}, ["loss, data"])):
        caplog.clear()
        again = hf_worker.trainer(hf_worker.llama(), hf_worker.rows(8)[:count], tmp_path, **more, **changes)
        again.train(str(tmp_path / "checkpoint-1"))
        texts = [r.getMessage() for r in caplog.records if r.name == "shiq_lab.hf.trainer" and r.levelname == "WARNING"]
        assert texts == [f"the run goes on with another {name} than it began with" for name in told]
