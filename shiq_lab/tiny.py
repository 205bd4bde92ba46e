"""The tiny transformer against the exact truth: a reference made by supervised training, its prefix tree solved, then trained.

The reference is a network that learned samples of an environment by cross-entropy, so its logits have whatever levels
training left them. Frozen, its log-probabilities at every prefix are the reference of a TokenMDP, whose q*, v* and pi* are
exact. A copy is trained by any loss and compared with them at all prefixes, visited or not.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shiq_lab.batch import TokenBatch
from shiq_lab.errors import at_least, bad, check_beta, check_gamma
from shiq_lab.graph import Floats
from shiq_lab.learning import Schedule, Trace, descend, world_of
from shiq_lab.mdp import TokenMDP
from shiq_lab.models.prefixes import Prefixes
from shiq_lab.models.transformer import TinyTransformer
from shiq_lab.objectives import Subject, World
from shiq_lab.sampling import sample


@dataclass(frozen=True, eq=False)
class Pretrained:
    """A reference network, the tree of prefixes that it is frozen on, and the exact truth about training it (world.solution).

    cross_entropy: of the last supervised steps, nats a token.
    """

    reference: TinyTransformer
    prefixes: Prefixes
    world: World
    cross_entropy: float


def pretrain(
    mdp: TokenMDP,
    *,
    beta: float,
    gamma: float = 1.0,
    seed: int = 0,
    width: int = 64,
    layers: int = 2,
    heads: int = 4,
    tied: bool = False,
    steps: int = 200,
    rows: int = 4096,
    max_states: int = 20_000,
) -> Pretrained:
    """Make a reference: cross-entropy on `rows` samples of the environment's own reference, prompts and replies included.

    Everything comes from the seed. Raises ValueError where the environment has more than max_states prefixes.
    """
    steps, rows = at_least("steps", steps, 1), at_least("rows", rows, 1)
    check_beta(beta), check_gamma(gamma)
    prefixes = Prefixes.of(mdp, max_states)
    model = TinyTransformer(mdp.n_tokens, width=width, layers=layers, heads=heads, tied=tied, seed=seed)
    data = sample(prefixes.tree, prefixes.tree.ref_log_policy, rows, rng=seed)
    labels = torch.where(data.attention_mask == 1, data.input_ids, -100)[:, 1:]  # what cross_entropy leaves out
    order = np.random.default_rng(seed)
    stepper = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        pick = torch.from_numpy(order.integers(rows, size=128))
        logits = model(data.input_ids[pick], data.attention_mask[pick]).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[pick].flatten())
        stepper.zero_grad()
        loss.backward()
        stepper.step()
        losses.append(float(loss.detach()))
    model.requires_grad_(False)
    frozen = prefixes.with_reference(model)
    return Pretrained(model, frozen, world_of(frozen.tree, beta, gamma), float(np.mean(losses[-20:])))


def train_tiny(
    start: Pretrained,
    loss: str | Subject,
    rows: TokenBatch | None,
    behavior: Floats | None = None,
    *,
    steps: int,
    learning_rate: float = 3e-3,
    schedule: Schedule = "cosine",
    record_at: Sequence[int] | None = None,
) -> tuple[Trace, TinyTransformer]:
    """Train a copy of the reference by a loss on rows of start.world (None: on its own), Adam; the trace and the network.

    Values that a loss learns beside the network are a table, at ten times the rate.
    """
    if not isinstance(start, Pretrained):
        raise bad("start", "a Pretrained", repr(start)[:80], "tiny.pretrain(mdp, beta=...) makes one.")
    model = deepcopy(start.reference).requires_grad_(True)

    def table() -> Tensor:
        return start.prefixes.table(model)

    trace = descend(
        loss, start.world, rows, behavior, model=table, parameters=model.parameters(), steps=steps,
        learning_rate=learning_rate, schedule=schedule, record_at=record_at, value_rate=10 * learning_rate,
    )  # fmt: skip
    return trace, model
