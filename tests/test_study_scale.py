"""The scale page: formulas against other roads, planted wrong constants seen, and every number of docs/scale.md."""

import inspect
import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shiq_lab.studies import scale
from shiq_lab.studies.frame import run
from shiq_lab.studies.scale import GB, RANK, SCALE, SHAPES, Shape, memory, operations, second, speed, table, traffic

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
TOKENS, LENGTH = SCALE.settings["tokens"], SCALE.settings["length"]
SMALL = Shape(96, 3, 6, 2, 16, 320, 2000)  # in no list of the study


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------------------------- the formulas
def test_parts_by_hand() -> None:
    """A shape of twos and threes, written out: H 4, L 2, q 4, k 2, I 6, V 10."""
    shape = Shape(4, 2, 2, 1, 2, 6, 10)
    layer = 4 * 4 + 2 * 4 * 2 + 4 * 4 + 3 * 4 * 6 + 4 + 4
    assert shape.layer == layer and shape.parameters == 2 * layer + 40 + 40 + 4
    assert replace(shape, tied=True).parameters == 2 * layer + 40 + 4
    assert shape.adapter(1) == (4 + 4) + (4 + 2) + (4 + 2) + (4 + 4) + 3 * (4 + 6)
    found = memory(shape, gpus=2, tokens=3)
    assert found["weights"] == found["gradients"] == found["optimiser"] / 2 == 4 * shape.parameters / 2
    assert found["total"] == sum(value for key, value in found.items() if key != "total")
    assert found["saved"] in (0, 3 * 2 * 2 * 4)


def test_what_more_gpus_divide() -> None:
    """States go as 1 / gpus; what is left is that of infinitely many."""
    one, many = (memory(SHAPES["8B"], gpus=gpus) for gpus in (1, 64))
    for part in ("weights", "gradients", "optimiser"):
        assert many[part] == one[part] / 64
    assert all(many[part] == one[part] for part in ("gathered", "saved", "working"))


def test_operations_without_squares_are_six_a_weight() -> None:
    """6 M + 8 V H: two forward and four backward a weight of the layers, and the fused head's."""
    shape = SHAPES["8B"]
    found = operations(shape, length=1, checkpointing=False)["total"] - 14 * shape.q * shape.layers
    assert found == 6 * shape.layers * shape.matrices + 8 * shape.head
    assert speed(2.0, 3, peak=10.0, utilisation=0.5) == 7.5


@pytest.mark.parametrize("bad", [{"gpus": 0}, {"tokens": 0}, {"rank": 0}, {"gpus": 1.5}])
def test_counts_below_one_are_errors(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(bad))}: expected a whole number >= 1"):
        memory(SMALL, **bad)


def test_a_utilisation_is_a_share() -> None:
    with pytest.raises(ValueError, match="utilisation: expected a share"):
        speed(1.0, 1, utilisation=1.5)


# ------------------------------------------------------------------------------------------------------------------- the page
def sentences() -> list[str]:
    """What the page says in numbers, made from the formulas."""
    shape, big, giga = SHAPES["8B"], SHAPES["70B"], 1e-9
    bare = memory(shape, gpus=8, checkpointing=False)
    kept, again = (operations(shape, length=LENGTH, checkpointing=x)["total"] * giga for x in (False, True))
    fused = shape.vocabulary * (TOKENS / 50 + 2 * shape.hidden)
    return [
        f"GPUs of {scale.CARD} GB, of which a tenth is to stay free", f"{TOKENS:,} tokens a GPU in rows of {LENGTH:,}",
        f"LoRA has rank {RANK} on all seven", f"GPUs x {scale.PEAK / 1e12:.0f}e12 x {scale.UTILISATION} / operations",
        f"dense), {scale.UTILISATION} is a parameter", "Hours are for 100 million tokens. In GB (1e9 bytes)",
        f"the logits of {TOKENS:,} tokens cost {scale.LOGIT * TOKENS * shape.vocabulary / GB:.1f} GB at the peak",
        f"at most {fused / GB:.1f} GB",
        f"autograd keeps {shape.saved():,} bytes a token and layer, {bare['saved'] / GB:.1f} GB in all",
        f"with it {2 * shape.hidden:,} bytes, the", f"It costs {kept:.1f} or {again:.1f} billion operations a token",
        f"{scale.STATISTICS} bytes a token on disk, {second(shape, 10**8)['cache'] / GB:.1f} GB for 100 million tokens",
        f"keeps {second(shape, 1)['model'] / GB:.1f} GB", f"at 70B {second(big, 1)['model'] / GB:.1f} GB",
        f"each GPU receives {traffic(shape) / GB:.1f} GB", "ZeRO, 2020: 3 times the parameters",
        f"(in float32 {4 * shape.parameters / GB:.1f} GB at 8B, {4 * big.parameters / GB:.1f} GB at 70B)",
        f"eight times {4 * shape.parameters / GB:.1f} GB at 8B", "a bf16 copy of each beside, 2 bytes a parameter more",
        f"{sum(scale.STATES['bf16 autocast'])} bytes a parameter; frozen",
    ]  # fmt: skip


def unsaid(page: str) -> list[str]:
    """Sentences and table lines that a page lacks, and numbers in its prose that none of them holds."""
    flat = " ".join(page.split())
    wanted = [*sentences(), *scale.page_rows(table(TOKENS, LENGTH))]
    missing = [x for x in wanted if x not in flat and x not in page]
    rest = re.sub(r"```.*?```", "", page, flags=re.S)
    rest = re.sub(r"\(\.\./[^)]*\)|(?m:^\|.*$)", "", rest)
    rest = " ".join(rest.split())
    for said in sorted(wanted, key=len, reverse=True):
        rest = rest.replace(said, "")
    names = r"\b(?:1B|8B|70B|FSDP2|bf16|float32|bfloat16|H100|AdamW)\b"
    return missing + re.findall(r"\S*\d\S*", re.sub(names, "", rest))


def test_every_number_of_the_page() -> None:
    assert unsaid(PAGE) == []


@pytest.mark.parametrize(
    ("right", "wrong"), [("21.0 GB", "12.0 GB"), ("| 40.1 | yes", "| 39.1 | yes"), ("## Traps", "## Traps\n\nSaves 30 %.")]
)
def test_a_wrong_number_on_the_page_is_seen(right: str, wrong: str) -> None:
    assert PAGE.count(right) == 1 and unsaid(PAGE.replace(right, wrong))


def test_the_page_runs_what_it_says() -> None:
    """Its Python example is the table's 8B; the shape that it writes out is SHAPES'."""
    code = re.search(r"```python\n(.*?)```", PAGE, re.S)
    assert code is not None
    space: dict[str, Any] = {"print": lambda x: None}
    exec(code[1], space)
    assert space["shape"] == SHAPES["8B"]


# ---------------------------------------------------------------------------------------------------------- planted constants
@pytest.fixture(scope="module")
def fast() -> Any:
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    threads = torch.get_num_threads()
    result = run(SCALE, fast=True, cache=None)
    torch.set_num_threads(threads)
    return result


@pytest.mark.slow
def test_the_claims_hold(fast: Any) -> None:
    assert fast.passed, [c for c in fast.claims if not c.holds]
    scale.draw(fast)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "value", "claim"),
    [
        (("parameters", "8B", "counted"), 8_030_261_249, "closed form"),
        (("parameters", "70B", "adapter"), 1, "closed form"),
        (("states", "pure bf16"), [2.0, 2.0, 8.0, None], "After a step"),
        (("saved", "full", "formula", 5), 12_823, "linear"),
        (("saved", "LoRA", "predicted"), 12_000.0, "linear"),
        (("saved", "checkpointed"), [4.0, 2.0], "linear"),
        (("head", "LoRA, materialised", "a logit"), 16.0, "Materialised"),
        (("operations", "full, checkpointed"), [1.0, 1.0001], "Operations"),
        (("reference", "bytes a token"), 4.0, "reference"),
        (("steps", 0, "ratio"), 0.99, "peak of whole steps"),
        (("steps", 0, "ratio"), 1.2, "peak of whole steps"),
        (("table", 7, "fits"), False, "Of 1, 8 and 64"),
    ],
)
def test_a_claim_can_fail(fast: Any, place: tuple[Any, ...], value: Any, claim: str) -> None:
    """One number changed, and the one claim about it fails."""
    import copy

    summary = copy.deepcopy(fast.summary)
    inner = summary
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    failed = [c.text for c in SCALE.claims(dict(SCALE.settings), summary) if not c.holds]
    assert len(failed) == 1 and claim in failed[0], failed


@pytest.mark.slow
@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_a_step_that_nothing_was_taken_from(rank: int | None, tied: bool) -> None:
    """Another shape, rank, batch and number of processes: the peak is at most the formula, a quarter above it at most."""
    pytest.importorskip("peft")
    settings = {"batch": [4, 160], "processes": 4}
    found = scale.measure_step(settings, replace(SMALL, tied=tied), rank, True)
    assert found["peak"] <= found["formula"] <= 1.25 * found["peak"], found
    # What is there between steps: the states, and 32 bytes a token of the batch at most; shards of small adapters are padded.
    assert 0 <= found["states"] - found["states formula"] <= 32 * 640 + 0.02 * found["states"]


@pytest.mark.slow
@pytest.mark.parametrize("constant", ["states", "layer", "saved"])
def test_a_wrong_constant_shows_in_a_step(constant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW's state forgotten on all GPUs, a layer gathered once, half of what autograd keeps: the peak passes the formula."""
    pytest.importorskip("transformers")
    settings = {"batch": [2, 16] if constant == "layer" else [4, 160], "processes": 2}
    shape = Shape(256, 3, 4, 2, 64, 896, 64)
    if constant == "layer":
        monkeypatch.setattr(scale, "ROOTS", {"full": (4, 4, 2, 24)})
    elif constant == "saved":
        whole = Shape.saved
        monkeypatch.setattr(Shape, "saved", lambda self, rank=None: whole(self, rank) // 2)
    found = scale.measure_step(settings, shape, None, constant != "saved")
    lost = 8 * shape.parameters / 2 if constant == "states" else 0
    assert found["peak"] > found["formula"] - lost, found


# ------------------------------------------------------------------------------------------------------- what the page warns of
@pytest.mark.slow
def test_masks_make_attention_keep_more() -> None:
    """Padded and packed rows: keys and values as wide as the queries, 2 (q - k) numbers of 2 bytes, and the mask."""
    pytest.importorskip("transformers")
    from shiq_lab.batch import pack
    from shiq_lab.hf.collator import collate, token_batch
    from shiq_lab.hf.rows import Row

    shape = replace(SMALL, layers=1)
    rows = [Row(input_ids=[0] * n, completion_mask=[0] + [1] * (n - 1), rewards=[0.0] * n) for n in (20, 12)]
    padded = token_batch(collate(rows, pad_id=0))
    plain = scale.saved_a_layer(shape, None, False)
    for batch in (padded, pack(padded, 32)):
        assert scale.saved_a_layer(shape, None, False, batch) >= plain + 2 * (shape.q - shape.k) * 2


@pytest.mark.slow
def test_autocast_holds_a_copy_of_the_weights() -> None:
    """Without FSDP, bf16 over float32 weights: autograd keeps every matrix once more in bf16."""
    pytest.importorskip("transformers")
    model = scale.llama(SMALL)
    kept: dict[int, torch.Tensor] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept.setdefault(x.untyped_storage()._cdata, x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        loss = scale.loss_of(model, scale.full_rows(1, 7))
    shapes = {tuple(p.shape) for p in model.parameters() if p.ndim == 2}
    copies = [
        x for x in kept.values() if x.dtype == torch.bfloat16 and (tuple(x.shape) in shapes or tuple(x.shape)[::-1] in shapes)
    ]
    assert sum(x.numel() for x in copies) == SMALL.layers * SMALL.matrices + SMALL.head and loss.ndim == 0


@pytest.mark.slow
def test_the_files_of_the_page() -> None:
    """accelerate reads fsdp.yaml; config.yaml is one that train-hf takes."""
    yaml, args = pytest.importorskip("yaml"), pytest.importorskip("accelerate.commands.config.config_args")
    from shiq_lab.hf.config import ShiQConfig

    machine, config = (yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.S))
    read = args.ClusterConfig(**{**machine, "use_cpu": False, "debug": False})
    assert read.num_processes == 8 and read.fsdp_config["fsdp_version"] == 2
    from accelerate.commands.launch import launch_command_parser

    known = vars(launch_command_parser().parse_args(["x.py"]))
    assert all(name in known for name in machine["fsdp_config"]), "accelerate's launcher knows each"
    trainer = {**config["trainer"], "use_cpu": True, "report_to": []}
    assert ShiQConfig(**trainer).reference == "cache" and set(config) <= {"model", "dtype", "data", "trainer"}


@pytest.mark.slow
def test_the_groups_are_those_of_accelerate() -> None:
    """What `shard` and the page rest on, in accelerate's own words: its groups, and trained weights alone made float32."""
    tools = pytest.importorskip("accelerate.utils.fsdp_utils")
    source = " ".join(inspect.getsource(tools.fsdp2_prepare_model).split())
    for said in (
        "if param.requires_grad and param.dtype != torch.float32",
        "tail_modules = (final_norm, input_embed, output_embed)", "tail_modules = (final_norm, output_embed)",
        'fully_shard(tail, **{**fsdp2_kwargs, "reshard_after_forward": False})',
    ):  # fmt: skip
        assert said in source, said
