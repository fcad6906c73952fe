"""The M pairs of largest weight in one launch: selection, then ranking by counting.

A weight becomes an unsigned key of the same order. A sample of the pairs gives a key that the M-th
largest is hardly ever below (Floyd and Rivest 1975, SELECT; checked, not trusted), so that one pass
over all pairs leaves little more than M candidates. Of those the M-th largest key is found exactly,
eight bits at a time, from histograms. Keys above it are taken, and keys equal to it in the order of
(i, j) until there are M. Every program repeats the selection, which is cheap, and ranks its own
share of the M chosen pairs against all of them, which is not.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .common import SIZES_OF_A_BATCH, launch, scratch

# Beyond it a pair's number leaves int32.
MOST_GROUPS = 1 << 15
DIGIT = tl.constexpr(8)
BINS = tl.constexpr(256)


@triton.jit
def _key(weight, UNSIGNED: tl.constexpr, BITS: tl.constexpr):
    """Unsigned integers in the order of the weights; -0 equals 0, NaN is largest, none is 0."""
    SIGN: tl.constexpr = 1 << (BITS - 1)
    ONES: tl.constexpr = (1 << BITS) - 1  # bits ^ ONES is ~bits, which Triton 3.6 cannot interpret
    bits = (weight + 0.0).to(UNSIGNED, bitcast=True)
    key = tl.where((bits >> (BITS - 1)) != 0, bits ^ ONES, bits | SIGN)
    return tl.where(weight != weight, ONES, key)


@triton.jit
def _pair(p, n):
    """(i, j) of the p-th pair i < j of n <= MOST_GROUPS rows, row by row.

    Counted from the end, the row that is r-th from the last begins at r (r + 1)/2.
    """
    q = tl.maximum(n * (n - 1) // 2 - 1 - p, 0)
    r = ((tl.sqrt(8.0 * q.to(tl.float32) + 1) - 1) / 2).to(tl.int32)
    # The root may be off by a rounding error, hence r by one.
    r = tl.where(r * (r + 1) // 2 > q, r - 1, r)
    r = tl.where((r + 1) * (r + 2) // 2 <= q, r + 1, r)
    return n - 2 - r, n - 1 - q + r * (r + 1) // 2


@triton.jit
def _weight(matrix, i, j, valid, groups, used, MEAN_PROBS: tl.constexpr):
    """Weight of the pairs i < j: alpha[i, j], or made from P as (P + P^T)/2, 0 if unused."""
    if MEAN_PROBS:
        present = valid & (j < used)
        here = tl.load(matrix + i.to(tl.int64) * groups + j, mask=present, other=0)
        there = tl.load(matrix + j.to(tl.int64) * groups + i, mask=present, other=0)
        return (here + there) / 2
    return tl.load(matrix + i.to(tl.int64) * groups + j, mask=valid, other=0)


@triton.jit
def _count_used(classes, groups, BLOCK: tl.constexpr):
    used = 0
    for first in range(0, groups, BLOCK):
        k = first + tl.arange(0, BLOCK)
        used += tl.sum((tl.load(classes + k, mask=k < groups, other=-1) >= 0).to(tl.int32), 0)
    return used


@triton.jit
def _pair_keys(
    matrix,
    first,
    n,
    groups,
    used,
    MEAN_PROBS: tl.constexpr,
    UNSIGNED: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Indices (i groups + j), weights, keys and validity of pairs first to first + BLOCK of n."""
    p = first + tl.arange(0, BLOCK)
    valid = p < n * (n - 1) // 2
    i, j = _pair(p, n)
    weight = _weight(matrix, i, j, valid, groups, used, MEAN_PROBS)
    return i * groups + j, weight, _key(weight, UNSIGNED, BITS), valid


@triton.jit
def _digits_of(key, prefix, place: tl.constexpr, mask):
    """How many of the keys that begin with `prefix` have each value of the next digit."""
    # Two shifts, because a shift by all bits at once is undefined.
    matches = mask & (((key >> place) >> DIGIT) == prefix)
    return tl.histogram(((key >> place) & (BINS - 1)).to(tl.int32), BINS, mask=matches)


@triton.jit
def _next_digit(count, prefix, wanted):
    """`prefix` with the digit that holds rank `wanted` from above, and the rank within it."""
    bins = tl.arange(0, BINS)
    from_here_up = tl.sum(count, 0) - tl.cumsum(count, 0) + count
    chosen = tl.max(tl.where(from_here_up >= wanted, bins, 0), 0)
    wanted -= tl.sum(tl.where(bins > chosen, count, 0), 0)
    return (prefix << DIGIT) | chosen.to(prefix.dtype), wanted


@triton.jit
def _pivot(
    matrix,
    n_pairs,
    wanted,
    groups,
    used,
    MEAN_PROBS: tl.constexpr,
    UNSIGNED: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A key that is probably not above the key of rank `wanted`, and not far below; 0 if unsure.

    Of BLOCK pairs at equal distances, the one whose rank is four standard deviations below the
    expected one.
    """
    expected = BLOCK * (wanted.to(tl.float32) / tl.maximum(n_pairs, 1).to(tl.float32))
    rank = (tl.minimum(expected + 4 * tl.sqrt(expected), BLOCK)).to(tl.int32) + 4
    pivot = tl.full([], 0, UNSIGNED)
    if (n_pairs > BLOCK) & (2 * rank < BLOCK):
        p = (tl.arange(0, BLOCK).to(tl.int64) * n_pairs // BLOCK).to(tl.int32)
        i, j = _pair(p, used)
        inside = p >= 0
        key = _key(_weight(matrix, i, j, inside, groups, used, MEAN_PROBS), UNSIGNED, BITS)
        for place in tl.static_range(BITS - DIGIT, -1, -DIGIT):
            pivot, rank = _next_digit(_digits_of(key, pivot, place, inside), pivot, rank)
    return pivot


@triton.jit
def _candidates(
    matrix,
    n_pairs,
    pivot,
    keys,
    places,
    groups,
    used,
    MEAN_PROBS: tl.constexpr,
    UNSIGNED: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store the keys not below the pivot, and the numbers of their pairs, in order; how many."""
    found = 0
    for first in range(0, n_pairs, BLOCK):
        _, _, key, valid = _pair_keys(
            matrix, first, used, groups, used, MEAN_PROBS, UNSIGNED, BITS, BLOCK
        )
        take = valid & (key >= pivot)
        slot = found + tl.cumsum(take.to(tl.int32), 0) - 1
        tl.store(keys + slot, key, mask=take)
        tl.store(places + slot, first + tl.arange(0, BLOCK), mask=take)
        found += tl.sum(take.to(tl.int32), 0)
    tl.debug_barrier()
    return found


@triton.jit
def _threshold(
    keys,
    n_candidates,
    n_zeros,
    wanted,
    UNSIGNED: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The key of rank `wanted` from above, and how many keys equal to it are wanted.

    Beside the candidates there are `n_zeros` pairs of weight zero.
    """
    zero_key = tl.full([], 1 << (BITS - 1), UNSIGNED)
    bins = tl.arange(0, BINS)
    prefix = zero_key ^ zero_key
    for place in tl.static_range(BITS - DIGIT, -1, -DIGIT):
        zero_matches = ((zero_key >> place) >> DIGIT) == prefix
        zero_digit = ((zero_key >> place) & (BINS - 1)).to(tl.int32)
        count = tl.where((bins == zero_digit) & zero_matches, n_zeros, 0)
        for first in range(0, n_candidates, BLOCK):
            at = first + tl.arange(0, BLOCK)
            key = tl.load(keys + at, mask=at < n_candidates, other=0)
            count += _digits_of(key, prefix, place, at < n_candidates)
        prefix, wanted = _next_digit(count, prefix, wanted)
    return prefix, wanted


@triton.jit
def _take(
    index,
    weight,
    key,
    valid,
    limit,
    wanted_equal,
    n_chosen,
    n_equal,
    chosen,
    chosen_weights,
):
    """Append the pairs with keys above the limit, and the wanted ones of those equal to it."""
    equal = (valid & (key == limit)).to(tl.int32)
    equal_rank = n_equal + tl.cumsum(equal, 0)
    take = valid & ((key > limit) | ((key == limit) & (equal_rank <= wanted_equal)))
    slot = n_chosen + tl.cumsum(take.to(tl.int32), 0) - 1
    tl.store(chosen + slot, index, mask=take)
    tl.store(chosen_weights + slot, weight, mask=take)
    return n_chosen + tl.sum(take.to(tl.int32), 0), n_equal + tl.sum(equal, 0)


@triton.jit(do_not_specialize=SIZES_OF_A_BATCH)
def _top_pairs_kernel(
    matrix,
    classes,
    groups,
    top_m,
    keys,
    places,
    chosen,
    chosen_weights,
    pairs,
    weights,
    MEAN_PROBS: tl.constexpr,
    UNSIGNED: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    SHARE: tl.constexpr,
    OTHERS: tl.constexpr,
):
    """Programs write the same values to the scratch arrays and read only after their own writes."""
    used = groups
    if MEAN_PROBS:
        used = _count_used(classes, groups, BLOCK)
    n_pairs = used * (used - 1) // 2
    pivot = _pivot(matrix, n_pairs, top_m, groups, used, MEAN_PROBS, UNSIGNED, BITS, BLOCK)
    n_candidates = _candidates(
        matrix, n_pairs, pivot, keys, places, groups, used, MEAN_PROBS, UNSIGNED, BITS, BLOCK
    )
    begin = 0
    if n_candidates < tl.minimum(top_m, n_pairs):
        # Slots of their own: a program that lags may still write the first candidates.
        begin = groups * (groups - 1) // 2
        n_candidates = _candidates(
            matrix,
            n_pairs,
            pivot ^ pivot,
            keys + begin,
            places + begin,
            groups,
            used,
            MEAN_PROBS,
            UNSIGNED,
            BITS,
            BLOCK,
        )
    # For AMD, Triton 3.6 compiles no branch that moves pointers.
    keys += begin
    places += begin
    # All pairs with an unused group have weight zero.
    n_zeros = groups * (groups - 1) // 2 - n_pairs
    limit, wanted_equal = _threshold(keys, n_candidates, n_zeros, top_m, UNSIGNED, BITS, BLOCK)

    n_chosen = 0
    n_equal = 0
    if limit > tl.full([], 1 << (BITS - 1), UNSIGNED):
        for first in range(0, n_candidates, BLOCK):
            at = first + tl.arange(0, BLOCK)
            valid = at < n_candidates
            key = tl.load(keys + at, mask=valid, other=0)
            i, j = _pair(tl.load(places + at, mask=valid, other=0), used)
            weight = _weight(matrix, i, j, valid, groups, used, MEAN_PROBS)
            n_chosen, n_equal = _take(
                i * groups + j,
                weight,
                key,
                valid,
                limit,
                wanted_equal,
                n_chosen,
                n_equal,
                chosen,
                chosen_weights,
            )
    else:
        start = 0
        while n_chosen < top_m:
            index, weight, key, valid = _pair_keys(
                matrix, start, groups, groups, used, MEAN_PROBS, UNSIGNED, BITS, BLOCK
            )
            n_chosen, n_equal = _take(
                index,
                weight,
                key,
                valid,
                limit,
                wanted_equal,
                n_chosen,
                n_equal,
                chosen,
                chosen_weights,
            )
            start += BLOCK
    tl.debug_barrier()

    slot = tl.program_id(0) * SHARE + tl.arange(0, SHARE)
    weight = tl.load(chosen_weights + slot, mask=slot < top_m, other=0)
    key = _key(weight, UNSIGNED, BITS)
    rank = tl.zeros([SHARE], tl.int32)
    for first_other in range(0, top_m, OTHERS):
        other_slot = first_other + tl.arange(0, OTHERS)
        other_weight = tl.load(chosen_weights + other_slot, mask=other_slot < top_m, other=0)
        other = tl.where(other_slot < top_m, _key(other_weight, UNSIGNED, BITS), 0)[None, :]
        ahead = (other == key[:, None]) & (other_slot[None, :] < slot[:, None])
        rank += tl.sum(((other > key[:, None]) | ahead).to(tl.int32), 1)
    pair = tl.load(chosen + slot, mask=slot < top_m, other=0)
    tl.store(pairs + 2 * rank, (pair // groups).to(tl.int64), mask=slot < top_m)
    tl.store(pairs + 2 * rank + 1, (pair % groups).to(tl.int64), mask=slot < top_m)
    tl.store(weights + rank, weight, mask=slot < top_m)


def require_few_groups(name: str, groups: int) -> None:
    """Raises ValueError where the argument `name` has more class groups than fit the indices."""
    if groups > MOST_GROUPS:
        raise ValueError(f"{name}: expected at most {MOST_GROUPS} class groups, got {groups}")


def launch_top_pairs(matrix: Tensor, classes: Tensor | None, top_m: int) -> tuple[Tensor, Tensor]:
    """Top pairs of alpha (K, K); or, where `classes` (K,) is given, of P from `mean_probs`."""
    groups = matrix.shape[0]
    n_pairs = groups * (groups - 1) // 2
    top_m = min(top_m, n_pairs)
    pairs = scratch(matrix, top_m, 2, dtype=torch.int64)
    weights = scratch(matrix, top_m)
    double = matrix.dtype == torch.float64
    options = tuning.top_pairs(matrix)
    keys = scratch(matrix, 2, n_pairs, dtype=torch.int64 if double else torch.int32)
    launch(
        _top_pairs_kernel,
        (triton.cdiv(top_m, options["SHARE"]),),
        matrix,
        matrix if classes is None else classes,
        groups,
        top_m,
        keys.view(torch.uint64 if double else torch.uint32),
        scratch(matrix, 2, n_pairs, dtype=torch.int32),
        scratch(matrix, top_m, dtype=torch.int32),
        scratch(matrix, top_m),
        pairs,
        weights,
        MEAN_PROBS=classes is not None,
        UNSIGNED=tl.uint64 if double else tl.uint32,
        BITS=64 if double else 32,
        **options,
    )
    return pairs, weights


def top_pairs(alpha: Tensor, top_m: int) -> tuple[Tensor, Tensor]:
    """The M pairs i < j (M, 2) of largest alpha (K, K) and their weights (M,)."""
    require_few_groups("alpha", alpha.shape[0])
    return launch_top_pairs(alpha.contiguous(), None, top_m)
