"""Pooling: the raw output of a layer to one vector per sample, and the gradient back."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from torch import Tensor


def to_vec(
    feat: Tensor,
    *,
    pool: Literal["cls", "mean"] | None = None,
    num_prefix_tokens: int = 1,
    channels_last: bool = False,
) -> Tensor:
    """Pool the raw output of a layer to one vector per sample.

    | shape of `feat` | result |
    |---|---|
    | (B, D) | `feat` itself, not a copy |
    | (B, N, D) | tokens: the CLS token, or the mean of the tokens after the prefix |
    | (B, C, H, W) | (B, C), the global average pool |
    | (B, H, W, C) | with `channels_last=True`: (B, C), the global average pool |

    The number of dimensions decides, so the output of a 1-d convolution, (B, C, L), is read as
    tokens: pool such an output yourself. The function is differentiable, keeps the dtype and traces
    under `torch.compile(fullgraph=True)`.

    Args:
        feat: a floating-point tensor of 2, 3 or 4 dimensions.
        pool: for tokens only: `"cls"` takes the first token, `"mean"` the mean of the tokens
            after the prefix. None: `"cls"` if there is a prefix, else `"mean"`.
        num_prefix_tokens: for tokens only: how many of the N tokens, the CLS token first, are not
            image patches (`model.num_prefix_tokens` in timm counts CLS and registers). 0 means that
            there is no CLS token, as after `forward_intermediates(..., output_fmt="NLC")`, which
            removes the prefix.
        channels_last: for maps only: the *shape* is (B, H, W, C), as in Swin. It has nothing to do
            with `torch.channels_last`, which is a memory format of (B, C, H, W).

    Raises:
        TypeError: `feat` is not a floating-point tensor.
        ValueError: another rank, no positions to pool over, an unknown `pool`, a CLS token asked
            for where there is none, or a `num_prefix_tokens` that N does not allow.

    Example:
        >>> to_vec(torch.ones(2, 64, 7, 7)).shape
        torch.Size([2, 64])
        >>> to_vec(torch.ones(2, 201, 32), pool="mean", num_prefix_tokens=5).shape
        torch.Size([2, 32])
    """
    if not isinstance(feat, Tensor):
        raise TypeError(
            f"feat: expected one tensor, got {type(feat).__name__}; of a layer with several "
            "outputs pass the one to regularize"
        )
    if not feat.is_floating_point():
        raise TypeError(
            f"feat: expected a floating-point dtype, got {feat.dtype} of {_shape(feat)}"
        )
    if pool not in (None, "cls", "mean"):
        raise ValueError(f"pool: expected 'cls', 'mean' or None, got {pool!r}")
    if feat.ndim == 2:
        return feat
    if feat.ndim == 3:
        return _pool_tokens(feat, pool, num_prefix_tokens)
    if feat.ndim != 4:
        raise ValueError(
            "feat: expected (B, D), tokens (B, N, D), a map (B, C, H, W), or with "
            f"channels_last=True a map (B, H, W, C), got {_shape(feat)}"
        )
    spatial = (1, 2) if channels_last else (2, 3)
    if feat.shape[spatial[0]] == 0 or feat.shape[spatial[1]] == 0:
        raise ValueError(f"feat: expected positions to average over, got {_shape(feat)}")
    return feat.mean(spatial)


def _pool_tokens(feat: Tensor, pool: str | None, num_prefix_tokens: int) -> Tensor:
    if num_prefix_tokens < 0:
        raise ValueError(f"num_prefix_tokens: expected an int >= 0, got {num_prefix_tokens}")
    if pool == "cls" and num_prefix_tokens == 0:
        raise ValueError("num_prefix_tokens: expected at least 1 with pool='cls', got 0")
    takes_cls = pool == "cls" or (pool is None and num_prefix_tokens > 0)
    needed = num_prefix_tokens + (0 if takes_cls else 1)
    if feat.shape[1] < needed:
        raise ValueError(
            f"feat: expected at least {needed} tokens with num_prefix_tokens={num_prefix_tokens}, "
            f"got (B, N, D) = {_shape(feat)}"
        )
    return feat[:, 0] if takes_cls else feat[:, num_prefix_tokens:].mean(1)


class Spread(NamedTuple):
    """The gradient of a pooled vector at what it was pooled from, without its copies.

    gradient: broadcasts over the part of the feature that was pooled.
    part: which positions of the second dimension these are.
    """

    gradient: Tensor
    part: slice


def spread(
    grad: Tensor,
    feat: Tensor,
    *,
    pool: Literal["cls", "mean"] | None = None,
    num_prefix_tokens: int = 1,
    channels_last: bool = False,
) -> Spread:
    """The backward pass of `to_vec(feat, ...)` with the same options, for `grad` (B, D).

    But for the length: a mean is not divided by the number of its positions.
    """
    if feat.ndim == 2:
        return Spread(grad, slice(None))
    if feat.ndim == 3:
        if pool == "cls" or (pool is None and num_prefix_tokens > 0):
            return Spread(grad[:, None], slice(1))
        return Spread(grad[:, None], slice(num_prefix_tokens, None))
    return Spread(grad[:, None, None] if channels_last else grad[:, :, None, None], slice(None))


class Layout(NamedTuple):
    """What a model tells of the output of one of its layers, see `cwbr_fused.inputs.layout`.

    channels: of a map (B, channels, H, W) or (B, H, W, channels); the shape then tells which.
    channels_last: of maps, where `channels` is None or fits both; None if unknown.
    patches: a layer with that many tokens has no others.
    prefix: tokens before the patches, of others.
    pool: of tokens.
    """

    channels: int | None = None
    channels_last: bool | None = None
    patches: int | None = None
    prefix: int = 1
    pool: Literal["cls", "mean"] = "cls"

    def options(self, feat: Tensor) -> dict[str, Any]:
        """Those of `to_vec` for an output of this layer."""
        if feat.ndim == 3:
            if feat.shape[1] == self.patches:
                return {"pool": "mean", "num_prefix_tokens": 0}
            return {"pool": self.pool, "num_prefix_tokens": self.prefix}
        return {"channels_last": bool(self.maps_are_channels_last(feat))}

    def maps_are_channels_last(self, feat: Tensor) -> bool | None:
        """None if it is not known."""
        if feat.ndim == 4 and self.channels is not None:
            first, last = feat.shape[1] == self.channels, feat.shape[3] == self.channels
            if first != last:
                return last
        return self.channels_last


def _shape(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)}"
