"""Expert usage: who got how many tokens, per layer and domain, and whether a layer has collapsed.

Shape letters: T tokens, k experts per token, E experts, D domains.
"""

from __future__ import annotations

import torch
from torch import Tensor


def expert_usage(experts: Tensor, num_experts: int, domain: Tensor | None = None, num_domains: int = 1) -> Tensor:
    """Counts the slots that each domain gave to each expert.

    Args:
        experts: [T,k] integer ids (`Gating.experts`), -1 = not routed.
        num_experts: E.
        domain: [T] integer domain of each token, None = all in domain 0.
        num_domains: D.

    Returns:
        [D,E] int64; the sum over D is `Gating.counts`.

    Raises:
        ValueError: on the CPU, an id outside [-1, E) or a domain outside [0, D). On a GPU, which is not waited for,
            such a slot counts for nobody.
    """
    ids = experts.long()
    home = torch.zeros_like(ids[:, :1]) if domain is None else domain.long()[:, None]
    if not ids.is_cuda:
        _check_range("experts", ids, -1, num_experts)
        _check_range("domain", home, 0, num_domains)
    nobody = num_domains * num_experts
    inside = (ids >= 0) & (ids < num_experts) & (home >= 0) & (home < num_domains)
    slots = torch.where(inside, ids + num_experts * home, nobody).reshape(-1)
    return count_ids(slots, nobody).reshape(num_domains, num_experts)


def count_ids(ids: Tensor, number: int) -> Tensor:
    """[number] int64: how often each id occurs in [n] int64 ids from 0 to `number`, which itself stands for nobody."""
    # Not bincount, whose size a compiler cannot know and a GPU has to be waited for.
    return ids.new_zeros(number + 1).scatter_add_(0, ids, torch.ones_like(ids))[:number]


def _check_range(name: str, values: Tensor, low: int, high: int) -> None:
    bad = values[(values < low) | (values >= high)]
    if bad.numel():
        raise ValueError(f"{name}: expected values in [{low}, {high}), got {int(bad[0])}")


def collapse_warnings(counts: Tensor, k: int, *, limit: float = 0.6) -> list[str]:
    """Says which experts of one layer are dead or take too much.

    An expert takes too much when more than `limit` of the tokens choose it. Where k of E is already close to that
    (an even layer with k = 2 of 3 gives every expert 67 %), the limit is 1.2 times the even share.

    Args:
        counts: [E] slots per expert, over a span long enough to judge.
        k: experts per token.
        limit: share of tokens, 0 to 1.

    Returns:
        One line per finding, such as "expert 3 takes 71% of the tokens"; empty when all is well.
    """
    num_experts, slots = counts.shape[0], int(counts.sum())
    if slots == 0:
        return []
    limit = max(limit, 1.2 * k / num_experts)
    shares = (counts.double() * k / slots).tolist()
    found = [f"expert {e} takes {share:.0%} of the tokens" for e, share in enumerate(shares) if share > limit]
    dead = [str(e) for e, share in enumerate(shares) if share == 0]
    if dead:
        found.append(f"expert{'s' if len(dead) > 1 else ''} {', '.join(dead)} got no token")
    return found
