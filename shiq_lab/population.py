"""Population losses: the expected loss under any behaviour, by a recursion over the automaton and never by listing (F12).

With G_t = sum_{k>=t} gamma^{k-t} [r_k - (c_k - u_k)] the residual is rho_t = u(s_t) - G_t, so under a behaviour mu

    E[rho^2 from s] = (u - M)^2 + Var,      M(s) = E[g + gamma M(s')],      g = r - (c - u)
    Var(s) = E[(g + gamma M(s') - M(s))^2 + gamma^2 Var(s')]                 (the law of total variance)

which is m2 of F12 written as squares alone: nothing cancels near the zero, and random replies need no case of their own.
Loops are a linear solve. The sum over s of occupancy x Var is one transposed recursion, so a loss is a sum of squares

    loss = sum_s occ(s) (u - M)^2 + sum_s w(s) sum_a mu(a|s) (g + gamma M(s') - M(s))^2,      w = occ + gamma^2 mu' w.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shiq_lab.bellman import environment_average
from shiq_lab.errors import at_least, bad, check_beta, check_gamma
from shiq_lab.graph import Bools, Floats, Recursion
from shiq_lab.losses import steps
from shiq_lab.losses.shiq import Step
from shiq_lab.mdp import TokenMDP
from shiq_lab.policies import check_ends, check_log_policy


class _Solve(torch.autograd.Function):
    """x = Recursion.solve(c) as a differentiable linear map; its derivative is the transposed recursion, to any order."""

    @staticmethod
    def forward(ctx: Any, c: Tensor, recursion: Recursion, transpose: bool) -> Tensor:
        ctx.recursion, ctx.transpose = recursion, transpose
        solve = recursion.solve_transpose if transpose else recursion.solve
        return torch.from_numpy(solve(c.detach().numpy()))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _Solve.apply(grads[0].contiguous(), ctx.recursion, not ctx.transpose), None, None


@dataclass(frozen=True, eq=False)
class Population:
    """The exact distribution of data: an automaton without horizon (unroll it) under a behaviour float[S, V].

    Losses are functions of a table of logits, float64 [S, V]; only rows and tokens that the behaviour reaches matter.
    Raises ValueError for an automaton with a horizon or a behaviour that is no policy or does not end.
    """

    mdp: TokenMDP
    behavior: Floats
    beta: float
    gamma: float = 1.0

    def __post_init__(self) -> None:
        check_beta(self.beta), check_gamma(self.gamma)
        if self.mdp.horizon is not None:
            raise bad("mdp", "an automaton without a horizon", f"horizon {self.mdp.horizon}", "Use mdp.unroll().")
        object.__setattr__(self, "behavior", check_log_policy(self.mdp, self.behavior, "behavior"))
        check_ends(self.mdp, self.behavior, "behavior")

    # ---------------------------------------------------------------------------------------------- fixed numbers
    @cached_property
    def chance(self) -> Floats:
        """mu(a|s) (environment rows: P), float[S, V]."""
        return np.where(self.mdp.allowed, np.exp(self.behavior), 0.0)

    @cached_property
    def arrivals(self) -> Floats:
        """Undiscounted expected visits float[S] under the behaviour."""
        start = np.eye(1, self.mdp.n_states, self.mdp.start)[0]
        return Recursion(self.mdp.next_state, self.chance).solve_transpose(start)

    @cached_property
    def first(self) -> Floats:
        """Probability float[S] that the first policy state is s."""
        start = np.eye(1, self.mdp.n_states, self.mdp.start)[0]
        return environment_average(self.mdp).solve_transpose(start) * self.mdp.is_policy

    @cached_property
    def discount(self) -> Floats:
        """gamma after a policy token, 1 after an environment token, float[S, 1]."""
        return np.where(self.mdp.is_policy, self.gamma, 1.0)[:, None]

    def tensor(self, array: Any) -> Tensor:
        """An array as a tensor of its own memory."""
        return torch.as_tensor(np.array(array))

    @cached_property
    def _edges(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(mu, policy, next with the end as a last extra row, reward) as tensors."""
        mdp = self.mdp
        follow = np.where(mdp.next_state < 0, mdp.n_states, mdp.next_state)
        return self.tensor(self.chance), self.tensor(mdp.is_policy), self.tensor(follow), self.tensor(mdp.reward)

    def pieces(self, logits: Tensor, step: Step = steps.shifted) -> tuple[Tensor, Tensor]:
        """(c, u) of a step on every edge and state of the automaton: float[S, V] and float[S], 0 in environment states."""
        mdp = self.mdp
        use = self.tensor(mdp.allowed & mdp.is_policy[:, None])
        ref = self.tensor(mdp.ref_logits)
        own = torch.where(use, logits, -torch.inf)
        level = torch.where(self.tensor(mdp.is_policy)[:, None], own, 0.0).logsumexp(1)  # (S)
        joint = torch.where(self.tensor(mdp.is_policy)[:, None], own + ref, 0.0).logsumexp(1) if step is steps.naive else level
        ref_level = self.tensor(mdp.ref_logsumexp)
        clean = torch.where(use, ref, 0.0)
        c, _ = step(torch.where(use, logits, 0.0), level[:, None], clean, ref_level[:, None], joint[:, None], self.beta)
        _, u = step(level, level, level, ref_level, joint, self.beta)
        return torch.where(use, c, 0.0), torch.where(self.tensor(mdp.is_policy), u, 0.0)

    # --------------------------------------------------------------------------------------------------- losses
    def loss(
        self,
        logits: Tensor,
        *,
        step: Step = steps.shifted,
        n_steps: int | None = None,
        first_only: bool = False,
        turn_targets: Tensor | None = None,
    ) -> Tensor:
        """E over rows of sum_t rho_t^2: the exact expectation of the loss of the same name on rows of this behaviour.

        first_only keeps rho_0 alone (the sequence loss). turn_targets float[S]: the value that a turn bootstraps with
        where the environment answers (turn-cut; pass the detached u).
        """
        if not isinstance(logits, Tensor) or tuple(logits.shape) != self.mdp.next_state.shape:
            raise bad(
                "logits", f"a tensor of shape {self.mdp.next_state.shape}", f"{type(logits).__name__}, shape {np.shape(logits)}"
            )
        if n_steps is not None:
            at_least("n_steps", n_steps, 1)
        return sum((weight * part**2).sum() for weight, part in self.squares(logits, step, n_steps, first_only, turn_targets))  # type: ignore[return-value]

    def squares(
        self, logits: Tensor, step: Step, n_steps: int | None, first_only: bool, turn_targets: Tensor | None
    ) -> list[tuple[Tensor, Tensor]]:
        """The loss as weighted squares [(weight, residual)]: what a Gauss-Newton step needs."""
        if n_steps is not None:
            return self._few_steps(logits, step, n_steps)
        turns = turn_targets is not None
        mu, policy, follow, reward = self._edges
        c, u = self.pieces(logits, step)
        g = torch.where(policy[:, None], reward - c + u[:, None], 0.0)
        if turn_targets is not None:
            mean_target = _Solve.apply(torch.where(policy, turn_targets, 0.0), self.lift, False)
            after = torch.nn.functional.pad(mean_target, (0, 1))[follow]
            g = torch.where(self.tensor(self.answers), g + self.gamma * after, g)
        M = _Solve.apply((mu * g).sum(1), self._recursion(turns), False)  # (S)
        spread = self.tensor(self.spread(first_only, turns))[:, None] * mu
        onward = self.tensor(np.where(self.answers & turns, 0.0, self.discount))
        jump = g + onward * torch.nn.functional.pad(M, (0, 1))[follow] - M[:, None]
        parts = [(self.tensor(self.starts(first_only)), u - M), (spread, jump)]
        if turn_targets is not None:
            answered = torch.where(self.tensor(self.answers), spread, 0.0)
            parts.append(self._replies(answered, mean_target)[0])
        return parts

    def _replies(self, acted: Tensor, lifted: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """What random replies add to the variance of a value that is `lifted` to environment states, after one policy token
        of weight `acted` [S, V]; and the weights float[S] with which the states behind it are reached."""
        mu, policy, follow, _ = self._edges
        landing = self.gamma**2 * torch.where(policy[:, None], acted, 0.0)
        arrived = torch.zeros(len(policy) + 1, dtype=acted.dtype).index_add(0, follow.reshape(-1), landing.reshape(-1))
        reached = _Solve.apply(arrived[:-1], self.lift, True)
        after = torch.nn.functional.pad(lifted, (0, 1))[follow]
        return (reached[:, None] * mu, torch.where(policy[:, None], 0.0, after - lifted[:, None])), reached

    @cached_property
    def lift(self) -> Recursion:
        """Averages values of policy states over the replies that lead to them, into environment states."""
        return environment_average(self.mdp)

    @cached_property
    def answers(self) -> Bools:
        """bool[S, V]: policy tokens after which the environment speaks."""
        speaks = np.append(~self.mdp.is_policy, False)
        return speaks[self.mdp.next_state] & self.mdp.is_policy[:, None] & self.mdp.allowed

    def starts(self, first_only: bool) -> Floats:
        """How often a residual starts in a state, float[S]: at every action, or at a row's first alone."""
        return self.first if first_only else self.arrivals * self.mdp.is_policy

    @cached_property
    def _cache(self) -> dict[tuple[str, bool, bool], Any]:
        return {}

    def _weights(self, turns: bool, power: int) -> Floats:
        """mu times gamma^power a policy token, float[S, V]; 0 where a turn ends, if turns are cut."""
        return np.where(self.answers & turns, 0.0, self.chance * self.discount**power)

    def _recursion(self, turns: bool) -> Recursion:
        key = ("recursion", turns, False)
        if key not in self._cache:
            self._cache[key] = Recursion(self.mdp.next_state, self._weights(turns, 1))
        found: Recursion = self._cache[key]
        return found

    def spread(self, first_only: bool = False, turns: bool = False) -> Floats:
        """w float[S]: how often, discounted by gamma^2 a token, the variance made in a state enters the loss."""
        key = ("spread", first_only, turns)
        if key not in self._cache:
            recursion = Recursion(self.mdp.next_state, self._weights(turns, 2))
            self._cache[key] = recursion.solve_transpose(self.starts(first_only))
        found: Floats = self._cache[key]
        return found

    def _few_steps(self, logits: Tensor, step: Step, n_steps: int) -> list[tuple[Tensor, Tensor]]:
        """n-step: M^(0) = u, and n times M^(k) = E[g + gamma M^(k-1)(s')] with the environment averaged over in between."""
        mu, policy, follow, reward = self._edges
        c, u = self.pieces(logits, step)
        g = torch.where(policy[:, None], reward - c + u[:, None], 0.0)
        mean, parts = u, []
        for _ in range(n_steps):
            lifted = _Solve.apply(torch.where(policy, mean, 0.0), self.lift, False)
            after = torch.nn.functional.pad(lifted, (0, 1))[follow]
            mean = torch.where(policy, (mu * (g + self.gamma * after)).sum(1), 0.0)
            parts.append((lifted, after, mean))
        out = [(self.tensor(self.starts(False)), u - mean)]
        weight = self.tensor(self.starts(False))
        for lifted, after, mean in reversed(parts):  # the first of n tokens is the outermost mean
            jump = torch.where(policy[:, None], g + self.gamma * after - mean[:, None], 0.0)
            out.append((weight[:, None] * mu, jump))
            part, reached = self._replies(weight[:, None] * mu, lifted)
            out.append(part)
            weight = torch.where(policy, reached, 0.0)
        return out

    def residual_mean(self, logits: Tensor) -> Tensor:
        """E[rho_t | s_t, a_t] of the shifted multi-step residual, float[S, V]: what semi-gradient ShiQ follows."""
        mu, policy, follow, reward = self._edges
        c, u = self.pieces(logits)
        g = torch.where(policy[:, None], reward - c + u[:, None], 0.0)
        M = _Solve.apply((mu * g).sum(1), self._recursion(False), False)
        rho = c - reward - self.gamma * torch.nn.functional.pad(M, (0, 1))[follow]
        return torch.where(policy[:, None] & (mu > 0), rho, 0.0)
