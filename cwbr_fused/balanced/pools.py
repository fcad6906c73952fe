"""Pooling features to vectors: as the user says, else as the model says, else by their shape."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cwbr_fused.inputs import validation
from cwbr_fused.inputs.layers import matches
from cwbr_fused.inputs.layout import read_layout
from cwbr_fused.inputs.pooling import Layout, Spread, spread, to_vec
from cwbr_fused.operations.warning import CWBRWarning

Pool = Callable[[Tensor], Tensor]


class Pooled(NamedTuple):
    """A feature cut off from the graph of the model, and the (B, D) vectors pooled from it.

    options: of `to_vec`, whose backward pass is known without a graph; None for another callable.
    """

    leaf: Tensor
    z: Tensor
    options: dict[str, Any] | None

    def spread(self, pull: Tensor) -> Spread:
        """The gradient `pull` (B, D) of z at the feature."""
        if self.options is not None:
            return spread(pull, self.leaf, **self.options)
        (gradient,) = torch.autograd.grad(self.z, self.leaf, pull.to(self.z.dtype))
        return Spread(gradient, slice(None))


class Pools:
    """How each layer is pooled.

    Args:
        pool: of `CWBR`.

    Raises:
        TypeError: `pool` is none of the forms.
    """

    def __init__(self, pool: Pool | Mapping[str, Pool] | None) -> None:
        given = pool.values() if isinstance(pool, Mapping) else () if pool is None else (pool,)
        if not all(map(callable, given)):
            raise TypeError(
                "pool: expected a callable, a mapping of layers to callables or None, got "
                f"{validation.describe(pool)}"
            )
        self.pool = pool
        self.layouts: dict[str, Layout] = {}
        self._said: set[str] = set()

    def read(self, model: nn.Module, names: list[str]) -> None:
        """Reads from a model how the outputs of its layers are laid out."""
        self.layouts.update((name, read_layout(model, name)) for name in names)

    def pooled(self, name: str, layer: Tensor) -> Pooled:
        """The vectors of a layer.

        Raises:
            ValueError: a callable gave something else.
        """
        pool = self._given(name)
        options = self._options(name, layer) if pool is None else _options_of_to_vec(pool)
        leaf = layer.detach()
        if options is not None:
            return Pooled(leaf, to_vec(leaf, **options), options)
        assert pool is not None
        leaf.requires_grad_()
        with torch.enable_grad():
            z = pool(leaf)
        if not isinstance(z, Tensor) or z.shape[:1] != layer.shape[:1] or z.dim() != 2:
            raise ValueError(
                f"pool: expected to get (B, D) from {name}, a {validation.describe(layer)}, "
                f"got {validation.describe(z)}"
            )
        return Pooled(leaf, z, None)

    def _given(self, name: str) -> Pool | None:
        if isinstance(self.pool, Mapping):
            found = (pool for key, pool in self.pool.items() if key == name or matches(name, key))
            return self.pool[name] if name in self.pool else next(found, None)
        return self.pool

    def _options(self, name: str, layer: Tensor) -> dict[str, Any]:
        layout = self.layouts.get(name, Layout())
        if layout.maps_are_channels_last(layer) is None and name not in self._said:
            shape = layer.shape
            if len(shape) == 4 and shape[1] == shape[2] != shape[3]:
                self._said.add(name)
                warnings.warn(
                    f"CWBR takes {name}, a {validation.describe(layer)}, for (B, C, H, W), but it "
                    "looks like (B, H, W, C). Say which: CWBR(..., pool={"
                    f"{name!r}: functools.partial(cwbr_fused.to_vec, channels_last=True)}}), or "
                    "False",
                    CWBRWarning,
                    stacklevel=6,  # the caller of CWBR
                )
        return layout.options(layer)


def _options_of_to_vec(pool: Pool) -> dict[str, Any] | None:
    if pool is to_vec:
        return {}
    if isinstance(pool, partial) and pool.func is to_vec and not pool.args:
        return pool.keywords
    return None
