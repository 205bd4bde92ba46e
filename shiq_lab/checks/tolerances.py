"""Tolerances of the suite, each with its reason. All are relative to a scale that is measured in the same units.

`eps` is the rounding of the arithmetic that the loss really uses: of its inputs' dtype, or coarser where it casts down.
"""

import torch

EPS = {name: torch.finfo(getattr(torch, name)).eps for name in ("float64", "float32", "bfloat16", "float16")}

# A sum over L tokens of terms as large as the largest logit (or q / beta) is off by at most about L eps times that; the
# factor is for a few such sums in a row (log-sum-exp, suffix sum, backward pass). Seen: 0.3 of it.
SUMS = 16

# Two calls that differ only in the order of their sums: the same bound without the optimum's cancellation.
SAME = 16

# Central differences with step h err by h^2 / 6 |f'''| + eps |f| / h; at h = eps^(1/3) both are about eps^(2/3).
DIFFERENCE = 200  # times eps^(2/3), relative to the largest slope

# Descent from the reference with a decaying step: the distance left, as a share of the distance at the start. Seen: 1e-3.
DESCENT = 0.1
