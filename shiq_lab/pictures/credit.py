"""A row of tokens with its credit: reward, log-ratio, residual and the D of the closed-form gradient under each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from shiq_lab.batch import TokenBatch
from shiq_lab.errors import at_least, bad
from shiq_lab.graph import Floats
from shiq_lab.losses import steps
from shiq_lab.losses.shiq import residuals_of, shiq_gradient
from shiq_lab.pictures.drawing import FILL, HEAD, decimals, number, spell
from shiq_lab.plotting import GREY, INK, PALETTE, figure, style
from shiq_lab.stats import TokenStats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Kind = Literal["prompt", "policy", "tool reply", "padding"]
SHADE = {"prompt": FILL["environment"], "policy": FILL["policy"], "tool reply": "#F6CE85", "padding": "#F2F2F2"}


@dataclass(frozen=True)
class Credit:
    """One row of a batch, token by token; NaN where the policy did not act. All float[L].

    kind       who said the token
    reward     r_t
    log_ratio  beta ln(pi / pi_ref) of the token
    rho        ShiQ's residual, F2: what the token and all that follows leave unexplained
    D          F3: D_k = rho_k + gamma D_{k-1} (- gamma^n rho_{k-n}), so that d(loss) / d token_logit_k = 2 beta D_k
    cut        position of the last token where the row was cut, else None
    """

    ids: tuple[int, ...]
    kind: tuple[Kind, ...]
    reward: Floats
    log_ratio: Floats
    rho: Floats
    D: Floats
    cut: int | None


def credit_of(
    policy_stats: TokenStats, ref_stats: TokenStats, batch: TokenBatch, row: int = 0, *, beta: float, gamma: float = 1.0,
    n_steps: int | None = None,
) -> Credit:  # fmt: skip
    """r, beta ln(pi / pi_ref), rho and D of one row. Raises ValueError for packed rows and for a row that is not there."""
    rho, actions = residuals_of(steps.shifted, policy_stats, ref_stats, batch, beta, gamma, n_steps)
    if batch.segment_ids is not None:
        raise bad("batch", "rows that are not packed", "packed rows", "Draw the rows before packing.")
    if at_least("row", row, 0) >= len(batch):
        raise bad("row", f"a row from 0 to {len(batch) - 1}", repr(row))
    gradient = shiq_gradient(policy_stats, ref_stats, batch, beta=beta, gamma=gamma, n_steps=n_steps).token_logit / (2 * beta)
    placed = torch.zeros_like(gradient).scatter_add(1, actions.index, torch.where(actions.real, rho.detach(), 0.0).to(gradient))
    ratio = (policy_stats.token_logit - policy_stats.logsumexp) - (ref_stats.token_logit - ref_stats.logsumexp)
    acts = (batch.completion_mask[row] == 1).numpy(force=True)
    real = (batch.attention_mask[row] == 1).numpy(force=True)

    def aligned(x: torch.Tensor) -> Floats:
        """Column i of the statistics belongs to token i + 1."""
        values = np.append(np.nan, x[row].detach().double().numpy(force=True))
        return np.where(acts, values, np.nan)

    spoken = np.cumsum(acts) > 0
    kind: list[Kind] = [
        "padding" if not r else "policy" if a else "tool reply" if s else "prompt"
        for r, a, s in zip(real, acts, spoken, strict=True)
    ]
    return Credit(
        tuple(batch.input_ids[row].tolist()),
        tuple(kind),
        np.where(acts, batch.rewards[row].detach().double().numpy(force=True), np.nan),
        aligned(beta * ratio),
        aligned(placed),
        aligned(gradient),
        None if bool(batch.terminated[row]) else int(np.flatnonzero(real)[-1]) if real.any() else None,
    )


CELL, PANEL, MARGIN = 0.62, 0.92, 1.95  # a token's width, a panel's height, room for the panels' names


@style()
def trajectory_figure(
    policy_stats: TokenStats, ref_stats: TokenStats, batch: TokenBatch, row: int = 0, *, beta: float, gamma: float = 1.0,
    tokens: Sequence[str] | None = None, n_steps: int | None = None, max_tokens: int = 32, title: str = "",
) -> "Figure":  # fmt: skip
    """One row of tokens, and under each action its reward, beta ln(pi / pi_ref), rho_t and D_k: how credit travels.

    rho gathers what follows a token (F2), D carries it on to the later ones (F3): the gradient of the row's loss by the
    token's logit is 2 beta D_k. tokens: the vocabulary's strings, else ids are shown. Raises ValueError for packed rows, a row
    that is not there, or one of more than max_tokens.
    """
    data = credit_of(policy_stats, ref_stats, batch, row, beta=beta, gamma=gamma, n_steps=n_steps)
    L = len(data.ids)
    if at_least("max_tokens", max_tokens, 1) < L:
        raise bad(
            "max_tokens",
            f"at least the row's {L} tokens, padding included",
            max_tokens,
            "Cut the batch, or draw a shorter row.",
        )
    panels = _panels(data, n_steps)
    width, height = max(MARGIN + CELL * L + 0.3, 5.6), HEAD + 0.75 + PANEL * len(panels) + 0.42
    page = figure(figsize=(width, height), layout="none")
    inches = lambda x, y, w, h: (x / width, y / height, w / width, h / height)  # noqa: E731
    boxes = page.add_axes(inches(MARGIN, height - HEAD - 0.7, CELL * L, 0.62))
    _draw_tokens(boxes, data, tokens)
    for i, (name, label, note, values, color) in enumerate(panels):
        bottom = height - HEAD - 0.75 - PANEL * (i + 1)
        axes = page.add_axes(inches(MARGIN, bottom, CELL * L, PANEL - 0.1))
        _draw_panel(axes, data, name, values, color)
        middle = bottom + (PANEL - 0.1) / 2
        page.text(0.14 / width, (middle + 0.08) / height, label, va="bottom", fontsize=9)
        page.text(0.14 / width, (middle + 0.02) / height, note, va="top", fontsize=7, color=GREY, linespacing=1.5)
    page.text(0.14 / width, (height - HEAD - 0.46) / height, "token", va="center", fontsize=9)
    page.text(0.14 / width, (height - HEAD - 0.56) / height, "below, all in units of reward", va="top", fontsize=7, color=GREY)
    said = "" if n_steps is None else f", n = {n_steps}"
    page.text(
        0.14 / width,
        1 - 0.12 / height,
        title or f"One row under ShiQ (β = {beta:g}, γ = {gamma:g}{said})",
        va="top",
        fontsize=10,
    )
    _kinds_legend(page, data)
    return page


def _panels(data: Credit, n_steps: int | None) -> list[tuple[str, str, str, Floats, str]]:
    """(name, label, what it says, values, colour) from top to bottom."""
    left, right = "\N{LEFTWARDS ARROW}", "\N{RIGHTWARDS ARROW}"
    gathered = r"$= d_t + \gamma \rho_{t+1}$" if n_steps is None else r"$= d_t + \ldots + \gamma^{n-1} d_{t+n-1}$"
    carried = r"$= \rho_k + \gamma D_{k-1}$" + ("" if n_steps is None else r"$\,-\,\gamma^n \rho_{k-n}$")
    return [
        ("r", "reward $r_t$", "paid on the token", data.reward, PALETTE["green"]),
        (
            "ratio",
            r"$\beta\,\ln(\pi / \pi_{\mathrm{ref}})$",
            "the price of leaving the reference",
            data.log_ratio,
            PALETTE["pink"],
        ),
        ("rho", r"residual $\rho_t$", f"{gathered}\n{left} gathers what follows", data.rho, PALETTE["blue"]),
        ("D", "credit $D_k$", f"{carried}\n{right} carries it on", data.D, PALETTE["vermilion"]),
    ]


def _draw_tokens(axes: "Axes", data: Credit, tokens: Sequence[str] | None) -> None:
    """A box a token, shaded by who said it; a scissors line where the row was cut."""
    from matplotlib.patches import Rectangle

    axes.set(xlim=(-0.5, len(data.ids) - 0.5), ylim=(0, 1))
    axes.set_axis_off()
    for i, (token, kind) in enumerate(zip(data.ids, data.kind, strict=True)):
        line = PALETTE["blue"] if kind == "policy" else "#999999"
        axes.add_patch(
            Rectangle(
                (i - 0.45, 0.12), 0.9, 0.56, facecolor=SHADE[kind], edgecolor=line, lw=1.0, gid=f"{kind.replace(' ', '-')}-{i}"
            )
        )
        known = tokens is not None and 0 <= token < len(tokens)
        said = "" if kind == "padding" else spell(tokens[token] if tokens is not None and known else str(token), 7)
        size = 8.5 if len(said) <= 5 else 7
        axes.text(i, 0.4, said, ha="center", va="center", fontsize=size, fontweight="bold", parse_math=False, gid=f"token-{i}")
        axes.text(i, 0.98, str(i), ha="center", va="top", fontsize=6.5, color=GREY)
    if data.cut is not None:
        axes.plot([data.cut + 0.5] * 2, [0.0, 0.8], color=INK, lw=1.2, ls=(0, (2, 1.5)), clip_on=False)


def _draw_panel(axes: "Axes", data: Credit, name: str, values: Floats, color: str) -> None:
    """A bar an action with its number at the tip; columns without an action are shaded as their token is."""
    L = len(data.ids)
    known = values[~np.isnan(values)]
    top = max(float(np.abs(known).max(initial=0.0)), 1e-12)
    places = decimals(known.tolist())
    low, high = min(float(known.min(initial=0.0)), 0.0), max(float(known.max(initial=0.0)), 0.0)
    span = max(high - low, 0.25 * top)
    axes.set(xlim=(-0.5, L - 0.5), ylim=(low - (0.42 if low < 0 else 0.12) * span, high + (0.42 if high > 0 else 0.3) * span))
    for i, kind in enumerate(data.kind):
        if kind != "policy":
            axes.axvspan(i - 0.5, i + 0.5, color=SHADE[kind], alpha=0.5, lw=0, zorder=0)
    axes.axhline(0, color=GREY, lw=0.7, zorder=1)
    for i in np.flatnonzero(~np.isnan(values)).tolist():
        value = float(values[i])
        axes.bar(i, value, width=0.52, color=color, zorder=2)
        up = value >= 0
        axes.annotate(
            number(value, places), (i, value), xytext=(0, 1.5 if up else -1.5), textcoords="offset points", ha="center",
            va="bottom" if up else "top", fontsize=7, gid=f"{name}-{i}", zorder=3,
        )  # fmt: skip
    axes.set_xticks([])
    axes.set_yticks([])
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)


def _kinds_legend(page: "Figure", data: Credit) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    kinds = [k for k in SHADE if k in data.kind]
    handles: list[Any] = [Patch(facecolor=SHADE[k], edgecolor="#999999", lw=0.8, label=k) for k in kinds]
    if data.cut is not None:
        handles.append(Line2D([], [], color=INK, lw=1.2, ls=(0, (2, 1.5)), label="the row is cut here"))
    page.legend(handles=handles, loc="lower center", ncols=len(handles), fontsize=7.5, handlelength=1.4, columnspacing=1.4)
