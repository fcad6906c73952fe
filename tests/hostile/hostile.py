"""Hostile batches: what hypothesis draws is a small recipe, and the recipe makes the tensors.

A failing example prints its recipe, and `Recipe(...).build()` gives the same tensors again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import torch
from torch import Tensor

INF, NAN = float("inf"), float("nan")
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
INDEX_DTYPES = {
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
}


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _randn(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=_generator(seed), dtype=torch.float64)


def _spoiled(value: float) -> Callable[[Tensor, Tensor, int], Tensor]:
    """One element replaced by `value`."""

    def spoil(x: Tensor, targets: Tensor, seed: int) -> Tensor:
        x = x.clone()
        if x.numel():
            x.view(-1)[seed % x.numel()] = value
        return x

    return spoil


def _wide(x: Tensor, targets: Tensor, seed: int) -> Tensor:
    """Columns of scales from 1e-6 to 1e6."""
    return x * 10 ** (12 * torch.rand(x.shape[1], generator=_generator(seed)).double() - 6)


# What the (B, D) standard normal x of samples with these targets becomes.
FEATURES: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "normal": lambda x, y, seed: x,
    "rectified": lambda x, y, seed: x.relu(),
    "separated": lambda x, y, seed: x + 3 * y[:, None],
    "zero": lambda x, y, seed: x * 0,
    "negative zero": lambda x, y, seed: -(x * 0).abs(),
    "constant": lambda x, y, seed: torch.full_like(x, 3.7),
    "large constant": lambda x, y, seed: torch.full_like(x, -1234.5),
    "constant per class": lambda x, y, seed: (1 + y[:, None]) * torch.ones_like(x) / 3,
    "duplicated rows": lambda x, y, seed: x[:1].expand(len(x), -1) if len(x) else x,
    "offset": lambda x, y, seed: x + 1000,
    "far offset": lambda x, y, seed: x - 30000,
    "wide": _wide,
    "1e-30": lambda x, y, seed: x * 1e-30,
    "1e-5": lambda x, y, seed: x * 1e-5,
    "1e10": lambda x, y, seed: x * 1e10,
    "1e18": lambda x, y, seed: x * 1e18,
    "1e30": lambda x, y, seed: x * 1e30,
    "one 1e20": _spoiled(1e20),
    "one 1e4": _spoiled(1e4),
    "one inf": _spoiled(INF),
    "one -inf": _spoiled(-INF),
    "one nan": _spoiled(NAN),
    "all inf": lambda x, y, seed: torch.full_like(x, INF),
    "all nan": lambda x, y, seed: torch.full_like(x, NAN),
}

LOGITS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "normal": lambda x, y, seed: 3 * x,
    "equal": lambda x, y, seed: x * 0,
    "ties": lambda x, y, seed: x.round(),
    "confident": lambda x, y, seed: x + 40 * torch.nn.functional.one_hot(y, x.shape[1]),
    "certain": lambda x, y, seed: x + 1e4 * torch.nn.functional.one_hot(y, x.shape[1]),
    "1e30": lambda x, y, seed: x * 1e30,
    "one inf": _spoiled(INF),
    "one -inf": _spoiled(-INF),
    "one nan": _spoiled(NAN),
    "all -inf": lambda x, y, seed: torch.full_like(x, -INF),
}

# Classes of n samples, of C classes.
TARGETS: dict[str, Callable[[int, int, int], Tensor]] = {
    "random": lambda n, c, seed: torch.randint(c, (n,), generator=_generator(seed)),
    "sorted": lambda n, c, seed: torch.randint(c, (n,), generator=_generator(seed)).sort()[0],
    "twos": lambda n, c, seed: torch.arange(n) // 2 % c,
    "one class": lambda n, c, seed: torch.full((n,), c - 1),
    "distinct": lambda n, c, seed: torch.arange(n).flip(0) % c,
    "one large": lambda n, c, seed: (torch.arange(n) - n // 2).clamp(min=0) % c,
}


def _transposed(x: Tensor) -> Tensor:
    return x.T.contiguous().T


def _sliced(x: Tensor) -> Tensor:
    """Every second row and third column of a larger tensor, which is NaN elsewhere."""
    rows, columns = x.shape
    storage = x.new_full((2 * rows + 1, 3 * columns + 1), NAN)
    view = storage[1::2, 1::3][:, :columns]
    view.copy_(x)
    return view


def _misaligned(x: Tensor) -> Tensor:
    """Rows that begin at odd elements of the storage."""
    rows, columns = x.shape
    storage = x.new_full((rows * (columns + 2) + 1,), NAN)
    view = storage[1:].view(rows, columns + 2)[:, :columns]
    view.copy_(x)
    return view


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": _transposed,
    "sliced": _sliced,
    "misaligned": _misaligned,
    "expanded rows": lambda x: x[:1].expand(len(x), -1),
    "expanded columns": lambda x: x[:, :1].expand(-1, x.shape[1]),
}
# Raw layer outputs whose pooled vectors are the rows of x, exactly.
RAW: dict[str, Callable[[Tensor], Tensor]] = {
    "vectors": lambda x: x,
    "tokens": lambda x: torch.stack([x, torch.full_like(x, NAN)], dim=1),
    "one token": lambda x: x[:, None],
    "map": lambda x: x[:, :, None, None].expand(-1, -1, 1, 1),
    "channels last": lambda x: x[:, :, None, None].contiguous(memory_format=torch.channels_last),
}


@dataclass(frozen=True)
class Layer:
    dims: int
    values: str
    layout: str
    raw: str
    dtype: str
    needs_grad: bool


@dataclass(frozen=True)
class Batch:
    features: list[Tensor]
    logits: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Recipe:
    seed: int
    batch: int
    classes: int
    targets: str
    index_dtype: str
    layers: tuple[Layer, ...]
    logits: str
    logits_layout: str
    logits_dtype: str
    top_m: int | None
    min_count: int
    eps: float
    objective: str
    upstream: float

    @property
    def options(self) -> dict[str, Any]:
        names = ("top_m", "min_count", "eps", "objective")
        return {name: getattr(self, name) for name in names}

    def build(self) -> Batch:
        targets = TARGETS[self.targets](self.batch, self.classes, self.seed)
        features = []
        for index, layer in enumerate(self.layers):
            seed = self.seed + 101 * index
            x = FEATURES[layer.values](_randn(self.batch, layer.dims, seed), targets, seed)
            x = LAYOUTS[layer.layout](x.to(DTYPES[layer.dtype]))
            features.append(RAW[layer.raw](x).detach().requires_grad_(layer.needs_grad))
        logits = LOGITS[self.logits](_randn(self.batch, self.classes, -1 - self.seed), targets, 3)
        logits = LAYOUTS[self.logits_layout](logits.to(DTYPES[self.logits_dtype]))
        strided = torch.stack([targets, targets + 1], dim=1).to(INDEX_DTYPES[self.index_dtype])
        return Batch(features, logits, strided[:, 0])


LAYERS = st.builds(
    Layer,
    dims=st.sampled_from([1, 2, 3, 7, 8, 9, 16, 17, 33, 70]),
    values=st.sampled_from(list(FEATURES)),
    layout=st.sampled_from(list(LAYOUTS)),
    raw=st.sampled_from(list(RAW)),
    dtype=st.sampled_from(list(DTYPES)),
    needs_grad=st.booleans(),
)


def recipes(max_batch: int = 24) -> st.SearchStrategy[Recipe]:
    return st.builds(
        Recipe,
        seed=st.integers(0, 1000),
        batch=st.integers(0, max_batch),
        classes=st.sampled_from([1, 2, 3, 5, 8, 40]),
        targets=st.sampled_from(list(TARGETS)),
        index_dtype=st.sampled_from(list(INDEX_DTYPES)),
        layers=st.lists(LAYERS, min_size=1, max_size=3).map(tuple),
        logits=st.sampled_from(list(LOGITS)),
        logits_layout=st.sampled_from(list(LAYOUTS)),
        logits_dtype=st.sampled_from(list(DTYPES)),
        top_m=st.sampled_from([1, 2, 5, 64, 2**40, None]),
        min_count=st.sampled_from([1, 2, 2, 3, 50]),
        eps=st.sampled_from([1e-12, 1e-6, 1e-6, 1e-3, 10.0]),
        objective=st.sampled_from(["overlap", "log_overlap"]),
        upstream=st.sampled_from([1.0, -2.5, 0.0, 1e3]),
    )
