"""Where a prefix goes: which requests want one, which slots of a paged cache it fills, and which heads a rank holds."""

from __future__ import annotations

from collections.abc import Sequence

from open_instruct.serving.checkpoint import Prefix


def wanted_prefix(ids: Sequence[int] | None, prefixes: Sequence[Prefix]) -> Prefix | None:
    """Return the prefix whose placeholders a prompt begins with, all of them and in order; None: it is a plain one."""
    for prefix in prefixes:
        if ids and ids[0] == prefix.first_id and list(ids[: prefix.num_tokens]) == prefix.ids:
            return prefix
    return None


def can_be_computed(ids: Sequence[int] | None, prefix: Prefix | None, placeholders: frozenset[int]) -> bool:
    """Return whether a prompt holds something else than placeholders, and placeholders at its beginning alone.

    Those that stand elsewhere would be computed, which has no meaning: another adapter's tokens may stand before them.

    Args:
        ids: the prompt; None: it has no token ids.
        prefix: what `wanted_prefix` found in it.
        placeholders: those of all prefixes.
    """
    rest = list(ids or [])[prefix.num_tokens if prefix else 0 :]
    return placeholders.isdisjoint(rest) and (bool(rest) or prefix is None)


def slots_of(block_ids: Sequence[int], block_size: int, start: int, end: int) -> list[int]:
    """Return the slots of the positions [start, end) of a request.

    Args:
        block_ids: blocks that hold the request's positions, in order.
        block_size: positions in each.
        start: first position.
        end: position after the last one.

    Raises:
        ValueError: the blocks hold fewer positions.
    """
    if end > len(block_ids) * block_size:
        raise ValueError(f"{len(block_ids)} blocks of {block_size} do not hold {end} positions")
    return [block_ids[position // block_size] * block_size + position % block_size for position in range(start, end)]


def heads_of(num_heads: int, num_local_heads: int, rank: int, num_ranks: int) -> slice:
    """Return the heads of keys and values that a rank of tensor parallelism holds.

    Heads are split where there are at least as many as ranks. Else several ranks, one after the other, hold each.

    Args:
        num_heads: K, of the whole model.
        num_local_heads: heads that the rank's layers hold.
        rank: of this process.
        num_ranks: in all.

    Raises:
        ValueError: the prefix has another number of heads than the model.
    """
    first = rank * num_local_heads if num_heads >= num_ranks else rank * num_heads // num_ranks
    if max(1, num_heads // num_ranks) != num_local_heads or (num_heads % num_ranks and num_ranks % num_heads):
        raise ValueError(
            f"the prefix has {num_heads} heads of keys and values, and the model's layers have {num_local_heads} on "
            f"each of {num_ranks} ranks: it belongs to another model"
        )
    return slice(first, first + num_local_heads)
