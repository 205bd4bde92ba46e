"""Addition: "12+34=" asked at random, digits answered, sums checked. See `addition`."""

import math

from shiq_lab.builders import END, Row, from_states, random_reference
from shiq_lab.envs._common import BOS, EOS, at_least, checked_seed, number
from shiq_lab.mdp import TokenMDP

PLUS, EQUALS, STOP = 10, 11, 12


def addition(digits: int = 2, reward: float = 1.0, credit: float = 0.1, last_ends: int = 0, seed: int = 0) -> TokenMDP:
    """Addition: random prompts "a+b=", answered digit by digit, as an automaton that forgets all but the sum.

    Tests       many random prompts, answers of variable length, small credits before the reward
    Actions     ten digits and the end token; after digits + 1 digits the end token alone, or (last_ends = 1) the last digit is
                the end and takes the end token's reward along: no state without a choice, the same v*
    Start       a beginning-of-sequence token, then "a+b=" with independent uniform numbers of so many digits
    Rewards     `credit` on each digit that continues the right answer, `reward` on the end token after all of it
    End         at the end token
    Closed form gamma = 1, uniform reference: a geometric sum, see `addition_value`; v* at the root is its mean over prompts
    """
    digits = at_least("digits", digits, 1, 2)
    reward, credit = number("reward", reward), number("credit", credit)
    last_ends = at_least("last_ends", last_ends, 0, 1)

    def ask(kind: str, read: int, total: int) -> Row:
        """Environment: `read` digits of the operand are out, `total` is the sum of what they stand for."""
        if read == digits:
            after = ("second", 0, total) if kind == "first" else ("answer", 0, str(total))
            return Row(next={PLUS if kind == "first" else EQUALS: after}, probs={PLUS if kind == "first" else EQUALS: 1.0})
        choices = range(1 if read == 0 and digits > 1 else 0, 10)  # no leading zero
        worth = 10 ** (digits - 1 - read)
        return Row(
            next={d: (kind, read + 1, total + d * worth) for d in choices},
            probs=dict.fromkeys(choices, 1 / len(choices)),
        )

    def answer(said: int, rest: str | None) -> Row:
        """Policy: `rest` is what is left of the right answer, None after a mistake."""
        follow: dict[int, tuple[str, int, str | None] | None] = {STOP: END}
        right = int(rest[0]) if rest else None
        last = last_ends == 1 and said == digits
        if said <= digits:
            follow |= {d: END if last else ("answer", said + 1, rest[1:] if rest and d == right else None) for d in range(10)}
        whole = reward if last and rest and len(rest) == 1 else 0.0
        pays = {STOP: reward} if rest == "" else {} if right is None else {right: credit + whole}
        return Row(next=follow, reward=pays)

    mdp = from_states(
        ("first", 0, 0),
        lambda state: answer(*state[1:]) if state[0] == "answer" else ask(*state),
        14,
        tokens=[*"0123456789+=", EOS, BOS],
        name="Addition",
    )
    return random_reference(mdp, checked_seed(seed)).with_prompt(BOS)


def addition_value(n_digits: int, max_digits: int, reward: float, credit: float, beta: float) -> float:
    """v* of a prompt whose answer has n_digits of at most max_digits, for the uniform reference and gamma = 1.

    Each state offers 11 tokens, one of them right: with x = exp(credit/beta) / 11 and m = n_digits,
    z = exp(v*/beta) = 10/11 (1 + x + ... + x^{m-1}) + x^m z_end; z_end = exp(reward/beta) where the end token is forced
    (m = max_digits), else (10 + exp(reward/beta)) / 11.
    """
    x, paid = math.exp(credit / beta) / 11, math.exp(reward / beta)
    end = paid if n_digits == max_digits else (10 + paid) / 11
    return beta * math.log(10 / 11 * sum(x**k for k in range(n_digits)) + x**n_digits * end)
