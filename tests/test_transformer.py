"""TinyTransformer: causal, blind to padding, relative positions; and the same numbers from a plain loop."""

import math
import re

import pytest
import torch
from torch import Tensor

from shiq_lab.models.transformer import TinyTransformer, rotate

# float64: a row passes some 30 rounded operations a layer on numbers of size 1 to 10; seen 4e-15.
SAME = 1e-12


def small(**options: object) -> TinyTransformer:
    return TinyTransformer(7, **{"width": 16, "layers": 2, "heads": 2, "seed": 3, **options}).double()  # type: ignore[arg-type]


def logits(model: TinyTransformer, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    return model(ids, mask).logits.detach()


def test_interface() -> None:
    model, ids = TinyTransformer(7), torch.randint(0, 7, (3, 5), generator=torch.Generator().manual_seed(0))
    assert model(ids).logits.shape == (3, 5, 7) and model(ids).logits.dtype == torch.float32
    assert small()(ids).logits.dtype == torch.float64


# ------------------------------------------------------------------------------------------------------ a second road
def plain(model: TinyTransformer, ids: list[int]) -> list[list[float]]:
    """The decoder for one row in loops over positions, heads and features: nothing but sums, products and exponentials."""
    weight = {name: value.detach().tolist() for name, value in model.named_parameters()}
    heads = model.blocks[0].heads
    dot = lambda a, b: math.fsum(x * y for x, y in zip(a, b, strict=True))  # noqa: E731
    times = lambda matrix, x: [dot(row, x) for row in matrix]  # noqa: E731

    def norm(x: list[float], gain: list[float]) -> list[float]:
        size = math.sqrt(dot(x, x) / len(x) + 1e-6)
        return [g * value / size for g, value in zip(gain, x, strict=True)]

    def turn(x: list[float], position: int) -> list[float]:
        half = len(x) // 2
        angle = [position * 10_000.0 ** (-i / half) for i in range(half)]
        first = [x[i] * math.cos(a) - x[half + i] * math.sin(a) for i, a in enumerate(angle)]
        return first + [x[i] * math.sin(a) + x[half + i] * math.cos(a) for i, a in enumerate(angle)]

    xs = [weight["embed.weight"][token] for token in ids]
    width, size = len(xs[0]), len(xs[0]) // heads
    for b in range(len(model.blocks)):
        part = lambda name, b=b: weight[f"blocks.{b}.{name}"]  # noqa: E731
        three = [times(part("queries_keys_values.weight"), norm(x, part("before_attention.gain"))) for x in xs]
        for i in reversed(range(len(xs))):  # a position sees those before it, so the last goes first
            mixed: list[float] = []
            for h in range(heads):
                cut = lambda row, k, h=h: row[k * width + h * size : k * width + (h + 1) * size]  # noqa: E731
                score = [dot(turn(cut(three[i], 0), i), turn(cut(three[j], 1), j)) / math.sqrt(size) for j in range(i + 1)]
                share = [math.exp(s - max(score)) for s in score]
                mixed += [
                    math.fsum(share[j] * cut(three[j], 2)[d] for j in range(i + 1)) / math.fsum(share) for d in range(size)
                ]
            xs[i] = [x + y for x, y in zip(xs[i], times(part("out.weight"), mixed), strict=True)]
        for i, x in enumerate(xs):
            inner = times(part("gate_up.weight"), norm(x, part("before_mlp.gain")))
            gate, up = inner[: 2 * width], inner[2 * width :]
            live = [g / (1 + math.exp(-g)) * u for g, u in zip(gate, up, strict=True)]
            xs[i] = [a + c for a, c in zip(x, times(part("down.weight"), live), strict=True)]
    head = weight.get("head.weight", weight["embed.weight"])
    return [times(head, norm(x, weight["norm.gain"])) for x in xs]


@pytest.mark.parametrize("tied", [False, True])
def test_equal_to_plain_loops(tied: bool) -> None:
    model, ids = small(tied=tied), [6, 0, 3, 3, 1]
    seen, expected = logits(model, torch.tensor([ids]))[0], torch.tensor(plain(model, ids), dtype=torch.float64)
    assert float((seen - expected).abs().max()) <= SAME


# ------------------------------------------------------------------------------------------------------------ symmetries
def test_a_token_changes_nothing_before_it() -> None:
    model, ids = small(), torch.tensor([[1, 2, 3, 4, 5]])
    other = ids.clone()
    other[0, 3] = 0
    before, after = logits(model, ids), logits(model, other)
    assert torch.equal(before[:, :3], after[:, :3])
    assert float((before[:, 3:] - after[:, 3:]).abs().amax(-1).min()) > 1e-3  # and everything from it on


def test_padding_on_either_side_changes_nothing() -> None:
    """Whatever stands in it: ids outside the vocabulary too."""
    model, ids = small(), torch.tensor([[1, 2, 3, 4]])
    bare = logits(model, ids)
    junk = torch.full((1, 3), 10**9)
    for padded, mask, place in (
        (torch.cat([junk, ids], 1), [0, 0, 0, 1, 1, 1, 1], slice(3, 7)),
        (torch.cat([ids, -junk], 1), [1, 1, 1, 1, 0, 0, 0], slice(0, 4)),
    ):
        seen = logits(model, padded, torch.tensor([mask]))
        assert torch.isfinite(seen).all() and float((seen[:, place] - bare).abs().max()) <= SAME


def test_packed_segments_see_only_their_own() -> None:
    model = small()
    first, second = torch.tensor([[1, 2, 3]]), torch.tensor([[4, 5, 6, 0]])
    packed, label = torch.cat([first, second], 1), torch.tensor([[1, 1, 1, 2, 2, 2, 2]])
    seen = model(packed, torch.ones_like(packed), segment_ids=label).logits.detach()
    apart = torch.cat([logits(model, first), logits(model, second)], 1)
    assert float((seen - apart).abs().max()) <= SAME
    assert float((logits(model, packed) - apart).abs().max()) > 1e-3  # without labels they do see each other


def test_positions_are_relative_and_seen() -> None:
    x, y = (torch.randn(1, 1, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    at = lambda z, p: rotate(z, torch.tensor([[p]]))  # noqa: E731
    score = lambda p, q: float((at(x, p) * at(y, q)).sum())  # noqa: E731
    assert score(5, 3) == pytest.approx(score(105, 103), abs=1e-12) and abs(score(5, 3) - score(5, 2)) > 1e-3
    model = small()
    swapped = logits(model, torch.tensor([[2, 1, 3]]))[0, -1]
    assert float((logits(model, torch.tensor([[1, 2, 3]]))[0, -1] - swapped).abs().max()) > 1e-3


def test_gradients() -> None:
    model, ids = TinyTransformer(3, width=4, layers=1, heads=1, seed=1).double(), torch.tensor([[0, 2, 1]])
    names, values = zip(*model.named_parameters(), strict=True)

    def run(*weights: Tensor) -> Tensor:
        out = torch.func.functional_call(model, dict(zip(names, weights, strict=True)), (ids,))
        return out.logits

    assert torch.autograd.gradcheck(run, values)


def test_the_seed_is_all_there_is() -> None:
    state = torch.random.get_rng_state()
    a, b, c = small(seed=5), small(seed=5), small(seed=6)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.embed.weight, c.embed.weight)


def test_a_tied_head_is_the_embedding() -> None:
    tied, untied = small(tied=True), small()
    assert tied.head.weight is tied.embed.weight and untied.head.weight is not untied.embed.weight
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters()) == 7 * 16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TinyTransformer(0), "n_tokens: expected a whole number >= 1, got 0."),
        (
            lambda: TinyTransformer(3, width=12, heads=4),
            "width: expected a multiple of 2 * heads = 8, got 12. Rotary positions turn pairs of features.",
        ),
        (lambda: TinyTransformer(3, tied="no"), "tied: expected True or False, got 'no'."),
        (lambda: small()([[0, 1]]), "input_ids: expected a tensor of integers [B, L], got list."),
        (lambda: small()(torch.tensor([1, 2])), "input_ids: expected integers [B, L], got torch.int64, shape (2,)."),
        (
            lambda: small()(torch.tensor([[1, 2]]), torch.tensor([[1]])),
            "attention_mask: expected shape (1, 2), as input_ids, got shape (1, 1).",
        ),
        (
            lambda: small()(torch.tensor([[1, 7]])),
            "input_ids: expected ids from 0 to 6 where attention_mask is 1, got 7 at row 0, position 1.",
        ),
    ],
)
def test_bad_input(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()  # type: ignore[operator]


def test_weights_are_drawn_to_scale() -> None:
    """Standard deviation inputs^-1/2, and 1 / sqrt(2 layers) of that where it adds to the stream; 65,536 draws: within 3 %."""
    model = TinyTransformer(5, width=256, layers=3, heads=4, seed=0)
    block = model.blocks[0]
    for weight, expected in (
        (block.gate_up.weight, 256**-0.5),
        (block.out.weight, 256**-0.5 / 6**0.5),
        (block.down.weight, 512**-0.5 / 6**0.5),
    ):
        assert float(weight.detach().std()) == pytest.approx(expected, rel=0.03)
