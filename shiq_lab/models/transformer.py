"""TinyTransformer: a small decoder that can be read in one sitting, with the interface of a causal language model.

Token embedding, then layers of x + attention(norm(x)) and x + mlp(norm(x)), a last norm, and a head. Positions enter by
rotation of queries and keys, so only differences of positions count and padding on the left changes nothing.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shiq_lab.errors import at_least, bad
from shiq_lab.models.tabular import CausalLMOutput, real_tokens


class RMSNorm(nn.Module):
    """x / rms(x) times a gain for each feature, float[..., D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.gain.shape, self.gain, eps=1e-6)


def rotate(x: Tensor, position: Tensor, base: float = 10_000.0) -> Tensor:
    """Rotary positions: features i and i + D/2 of x float[B, H, L, D] turned by position int[B, L] * base^(-2i/D)."""
    half = x.shape[-1] // 2
    speed = base ** (-torch.arange(half, dtype=x.dtype, device=x.device) / half)
    angle = position[:, None, :, None].to(x.dtype) * speed  # (B, 1, L, D/2)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos()], -1)


class Block(nn.Module):
    """One layer: causal attention over the row's real tokens, then a gated MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = RMSNorm(width), RMSNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate_up = nn.Linear(width, 2 * 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor, position: Tensor, sees: Tensor) -> Tensor:
        B, L, D = x.shape
        q, k, v = (
            self.queries_keys_values(self.before_attention(x)).view(B, L, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        )
        mixed = F.scaled_dot_product_attention(rotate(q, position), rotate(k, position), v, attn_mask=sees)  # (B, H, L, D/H)
        x = x + self.out(mixed.transpose(1, 2).reshape(B, L, D))
        gate, up = self.gate_up(self.before_mlp(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class TinyTransformer(nn.Module):
    """A decoder over n_tokens tokens: (input_ids, attention_mask) -> .logits float[B, L, V].

    logits[:, i] scores input_ids[:, i + 1]. Padding may stand on either side and its ids may hold anything; tokens of packed
    segments see only their own. width is a multiple of 2 * heads. `tied`: the head is the embedding. The weights come from
    `seed` alone; `.double()` makes it float64. Raises ValueError for sizes that do not fit, and for ids outside the vocabulary
    where attention_mask is 1.
    """

    def __init__(
        self, n_tokens: int, *, width: int = 64, layers: int = 2, heads: int = 4, tied: bool = False, seed: int = 0
    ) -> None:
        super().__init__()
        n_tokens, width = at_least("n_tokens", n_tokens, 1), at_least("width", width, 2)
        layers, heads, seed = at_least("layers", layers, 1), at_least("heads", heads, 1), at_least("seed", seed, 0)
        if not isinstance(tied, bool):
            raise bad("tied", "True or False", repr(tied))
        if width % (2 * heads):
            raise bad(
                "width", f"a multiple of 2 * heads = {2 * heads}", repr(width), "Rotary positions turn pairs of features."
            )
        with torch.random.fork_rng(devices=[]):  # the layers draw first weights of their own, from the global state
            self.embed = nn.Embedding(n_tokens, width)
            self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
            self.norm = RMSNorm(width)
            self.head = nn.Linear(width, n_tokens, bias=False)
            if tied:
                self.head.weight = self.embed.weight
        self._draw(torch.Generator().manual_seed(seed), layers)

    def _draw(self, generator: torch.Generator, layers: int) -> None:
        """Every matrix normal with variance 1 / its inputs; those that add to the residual stream less, the more there are."""
        with torch.no_grad():
            for name, weight in self.named_parameters():
                if weight.ndim == 2:
                    scale = weight.shape[1] ** -0.5 / (
                        (2 * layers) ** 0.5 if name.endswith(("out.weight", "down.weight")) else 1.0
                    )
                    weight.normal_(0.0, scale, generator=generator)

    @property
    def n_tokens(self) -> int:
        """V, the size of the vocabulary."""
        return self.embed.num_embeddings

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, segment_ids: Tensor | None = None
    ) -> CausalLMOutput:
        real = real_tokens(input_ids, attention_mask, segment_ids)
        self._check_ids(input_ids, real)
        segment = torch.zeros_like(input_ids) if segment_ids is None else segment_ids
        L = input_ids.shape[1]
        earlier = torch.ones(L, L, dtype=torch.bool, device=input_ids.device).tril()
        sees = earlier & real[:, None, :] & (segment[:, :, None] == segment[:, None, :])  # (B, L, L)
        sees = sees | torch.eye(L, dtype=torch.bool, device=input_ids.device)  # padding sees itself, or its softmax were 0 / 0
        position = real.long().cumsum(1)
        x = self.embed(torch.where(real, input_ids, 0))
        for block in self.blocks:
            x = block(x, position, sees[:, None])
        return CausalLMOutput(self.head(self.norm(x)))

    def _check_ids(self, input_ids: Tensor, real: Tensor) -> None:
        outside = real & ((input_ids < 0) | (input_ids >= self.n_tokens))
        if outside.any():
            row, position = (int(x) for x in outside.nonzero()[0])
            got = f"{int(input_ids[row, position])} at row {row}, position {position}"
            raise bad("input_ids", f"ids from 0 to {self.n_tokens - 1} where attention_mask is 1", got)

    def __call__(self, *args: Tensor, **kwargs: Tensor | None) -> CausalLMOutput:  # typed, for callers' sake
        return super().__call__(*args, **kwargs)
