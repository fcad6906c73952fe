"""Argument checks. Each error reads "NAME: expected X, got Y".

The checks run before any kernel starts and never wait for a GPU. The range of targets is read on
the CPU only; GPU kernels assert it on the device.
"""

from __future__ import annotations

import math
import operator
import reprlib
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from cwbr_fused.inputs.features import FeatureCatcher, Features
from cwbr_fused.inputs.pooling import to_vec


def describe(value: object) -> str:
    """A short account of what an argument was."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    if hasattr(value, "shape") and hasattr(value, "dtype"):  # of NumPy, pandas, JAX
        return f"{type(value).__name__} of shape {value.shape} and dtype {value.dtype}"
    return f"{type(value).__name__} {reprlib.repr(value)}"


def check_float_tensor(name: str, value: object, shape: str) -> None:
    """A floating-point tensor with the dimensions that `shape` names, such as "(K, D)" or "()"."""
    expected = f"a tensor of shape {shape}" if shape != "()" else "a scalar tensor"
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected {expected}, got {describe(value)}")
    if value.dim() != len([size for size in shape[1:-1].split(",") if size]):
        raise ValueError(f"{name}: expected {expected}, got {describe(value)}")
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating-point dtype, got {describe(value)}")


def check_index_tensor(name: str, value: object, length: int | None, what: str) -> None:
    """A (length,) integer tensor; `what` says which length was expected and why, with {n} for it.

    Sizes are formatted only where a check fails: torch.compile takes a formatted size for a
    constant, and would compile anew for every batch size.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor {what.format(n=length)}, got {describe(value)}")
    if value.dim() != 1 or (length is not None and value.shape[0] != length):
        hint = ""
        if value.dim() == 2 and value.dtype.is_floating_point:
            hint = "; soft targets are for cwbr_fused.loss and CWBR, pass class indices"
        raise ValueError(
            f"{name}: expected shape {what.format(n=length)}, got {describe(value)}{hint}"
        )
    if value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool:
        raise TypeError(f"{name}: expected an integer dtype, got {describe(value)}")


def check_same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """`value` on the device of `other`."""
    if value.device != other.device:
        raise ValueError(
            f"{name}: expected the device of {other_name}, {other.device}, got {value.device}"
        )


def check_eps(eps: object) -> None:
    """A finite number above 0."""
    _check_number("eps", eps)
    if not (eps > 0 and math.isfinite(eps)):  # type: ignore[operator, arg-type]
        raise ValueError(f"eps: expected a finite number > 0, got {eps!r}")


def _check_number(name: str, value: object) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {describe(value)}")


def check_int(name: str, value: object, low: int | None = None, otherwise: str = "") -> int:
    """An int, of any library, not below `low`; `otherwise` names what else the caller takes."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name}: expected an int{otherwise}, got {describe(value)}") from None
    if low is not None and number < low:
        raise ValueError(f"{name}: expected an int >= {low}{otherwise}, got {value!r}")
    return number


def check_positive_int(name: str, value: object, otherwise: str = "") -> int:
    """An int >= 1; `otherwise` names what else the caller takes."""
    return check_int(name, value, 1, otherwise)


def check_between(name: str, value: object, low: float, high: float = math.inf) -> None:
    """A finite number with low <= value <= high."""
    _check_number(name, value)
    if not (low <= value <= high and math.isfinite(value)):  # type: ignore[operator, arg-type]
        expected = f"a finite number >= {low}" if high == math.inf else f"{low} <= {name} <= {high}"
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """One of the choices."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}")


def check_number_or(name: str, value: object, words: tuple[str, ...]) -> None:
    """None, a finite number above 0, or one of the words."""
    if value is None or (isinstance(value, str) and value in words):
        return
    expected = f"None, a finite number > 0 or one of {words}"
    if not isinstance(value, (int, float, str)) or isinstance(value, bool):
        raise TypeError(f"{name}: expected {expected}, got {describe(value)}")
    if isinstance(value, str) or not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def check_group(group: object) -> None:
    """None, "world", or a process group that this process belongs to."""
    if group is None or (isinstance(group, str) and group == "world"):
        return
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            "group: expected None, 'world' or a torch.distributed.ProcessGroup that this process "
            f"belongs to, got {describe(group)}"
        )


def check_batch(logits: object, targets: object) -> None:
    """logits (B, C) and targets (B,) in [0, C), on one device."""
    check_float_tensor("logits", logits, "(B, C)")
    assert isinstance(logits, Tensor)
    batch, classes = logits.shape
    check_index_tensor("targets", targets, batch, "(B,) = ({n},), as logits has B = {n}")
    assert isinstance(targets, Tensor)
    check_same_device("targets", targets, "logits", logits)
    check_range("targets", targets, 0, classes, "as logits has C = {high} columns")


def check_soft_batch(logits: object, targets: Tensor) -> None:
    """logits (B, C) and soft targets (B, C), finite and not negative, on one device."""
    check_float_tensor("logits", logits, "(B, C)")
    assert isinstance(logits, Tensor)
    if targets.shape != logits.shape:
        raise ValueError(
            f"targets: expected (B,) class indices or (B, C) probabilities, with logits a "
            f"{describe(logits)}, got {describe(targets)}"
        )
    check_same_device("targets", targets, "logits", logits)
    what = "finite values >= 0 as soft targets"
    if targets.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(
            ((targets >= 0) & targets.isfinite()).all(), f"targets: expected {what}"
        )
    elif targets.numel() > 0:
        smallest, largest = (float(bound) for bound in targets.detach().aminmax())
        if not (smallest >= 0 and math.isfinite(largest)):
            raise ValueError(f"targets: expected {what}, got values from {smallest} to {largest}")


def check_range(name: str, values: Tensor, low: int, high: int, why: str) -> None:
    """low <= values < high; `why` may name {high}. Reads the values, so only those on the CPU."""
    if values.device.type != "cpu" or values.numel() == 0 or torch.compiler.is_compiling():
        return
    smallest, largest = (int(bound) for bound in values.aminmax())
    if smallest < low or largest >= high:
        raise ValueError(
            f"{name}: expected values in [{low}, {high}), {why.format(high=high)}, "
            f"got values from {smallest} to {largest}"
        )


def feature_vectors(
    features: Tensor | Sequence[Tensor] | Mapping[str, Tensor], logits: Tensor
) -> list[Tensor]:
    """One (B, D) vector tensor per layer, from whatever form the features came in."""
    return [to_vec(layer) for layer in named_layers(features, logits).values()]


def named_layers(
    features: FeatureCatcher | Tensor | Sequence[Tensor] | Mapping[str, Tensor], logits: Tensor
) -> dict[str, Tensor]:
    """The layers by name: keys of a mapping, indices of a sequence, "features" for a tensor."""
    if isinstance(features, FeatureCatcher):
        features = features.feats
    if isinstance(features, Features):
        features.check_complete()
    if isinstance(features, Tensor):
        named = {"features": ("features", features)}
    elif isinstance(features, Mapping):
        named = {str(k): (f"features[{k!r}]", layer) for k, layer in features.items()}
    elif isinstance(features, Sequence) and not isinstance(features, str):
        named = {str(i): (f"features[{i}]", layer) for i, layer in enumerate(features)}
    else:
        raise TypeError(
            "features: expected a tensor, a sequence or a mapping of tensors, "
            f"got {describe(features)}"
        )
    if not named:
        raise ValueError(f"features: expected at least one layer, got an empty {type(features)}")
    for label, layer in named.values():
        _check_layer(label, layer, logits)
    return {name: layer for name, (_, layer) in named.items()}


def _check_layer(name: str, layer: object, logits: Tensor) -> None:
    if not isinstance(layer, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {describe(layer)}")
    if layer.dim() not in (2, 3, 4):
        raise ValueError(
            f"{name}: expected shape (B, D), (B, N, D) or (B, C, H, W), got {describe(layer)}"
        )
    if not layer.dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating-point dtype, got {describe(layer)}")
    batch = logits.shape[0]
    if layer.shape[0] != batch:
        raise ValueError(
            f"{name}: expected B = {batch} samples, as logits has, got {describe(layer)}"
        )
    if 0 in layer.shape[1:]:
        raise ValueError(f"{name}: expected no empty dimension but B, got {describe(layer)}")
    check_same_device(name, layer, "logits", logits)
