"""Every operation's schema and shape rule, once; backends only add implementations.

The same operations are declared in one library namespace per family of implementations:
`cwbr_fused` (C++ on the CPU, CUDA C++ on NVIDIA; pure PyTorch wherever neither is built) and
`cwbr_fused_triton` (Triton). The meaning of each operation is its function in `reference.py`,
`reference_backward.py` or `reference_bank.py`.

Conventions shared by all of them: B samples, D feature dimensions, C classes; K = B // min_count
is the static number of class groups, of which only the first few may be in use; M pairs; L layers.
`z`, `features` and `logits` may have any floating dtype; everything computed from them has the
accumulation dtype: float64 for float64, float32 otherwise. Index tensors are int64.

Autocast leaves every operation alone: kernels read half-precision features and logits as they are
and accumulate in float32, so neither casting rule fits. Casting to half would round means and
variances beside the features; casting to float32 would copy the (B, D) features for nothing and
give their gradients another dtype than theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cwbr_fused.operations import extension, reference, reference_backward, reference_bank
from cwbr_fused.operations.reference import accumulation_dtype

NAMESPACE = "cwbr_fused"
TRITON_NAMESPACE = "cwbr_fused_triton"

SCHEMAS = {
    "group_by_class": "(Tensor targets, int min_count) -> (Tensor, Tensor, Tensor)",
    "class_moments": "(Tensor z, Tensor order, Tensor offsets, float eps) -> (Tensor, Tensor)",
    "class_moments_backward": (
        "(Tensor grad_mean, Tensor grad_var, Tensor z, Tensor mean, Tensor var,"
        " Tensor order, Tensor offsets, float eps) -> Tensor"
    ),
    "confusion_weights": (
        "(Tensor logits, Tensor order, Tensor offsets, Tensor classes) -> Tensor"
    ),
    "top_pairs": "(Tensor alpha, int top_m) -> (Tensor, Tensor)",
    "plan": (
        "(Tensor logits, Tensor targets, int top_m, int min_count)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "pair_distance": "(Tensor mean, Tensor var, Tensor pairs, float eps) -> Tensor",
    "pair_distance_backward": (
        "(Tensor grad, Tensor mean, Tensor var, Tensor pairs, float eps) -> (Tensor, Tensor)"
    ),
    "all_pair_distance": "(Tensor mean, Tensor var, float eps) -> Tensor",
    "all_pair_distance_backward": (
        "(Tensor grad, Tensor mean, Tensor var, float eps) -> (Tensor, Tensor)"
    ),
    "weighted_overlap": "(Tensor mean, Tensor var, Tensor alpha, float eps, bool log) -> Tensor",
    "weighted_overlap_backward": (
        "(Tensor grad, Tensor value, Tensor mean, Tensor var, Tensor alpha, float eps, bool log)"
        " -> (Tensor, Tensor)"
    ),
    "weighted_overlap_with_gradient": (
        "(Tensor grad, Tensor mean, Tensor var, Tensor alpha, float eps, bool log)"
        " -> (Tensor, Tensor, Tensor)"
    ),
    "regularizer": (
        "(Tensor[] features, Tensor order, Tensor offsets, Tensor pairs, Tensor weights,"
        " float eps, bool log) -> (Tensor, Tensor[], Tensor[], Tensor)"
    ),
    "regularizer_backward": (
        "(Tensor grad, Tensor[] features, Tensor[] mean, Tensor[] var, Tensor distance,"
        " Tensor order, Tensor offsets, Tensor pairs, Tensor weights, float eps, bool log)"
        " -> Tensor[]"
    ),
    "top_confusions": (
        "(Tensor logits, Tensor targets, Tensor seen, int top) -> (Tensor, Tensor, Tensor)"
    ),
    "class_attraction": (
        "(Tensor z, Tensor[] mean, Tensor var, Tensor unit, Tensor labels, Tensor shares,"
        " Tensor own, Tensor rivals, Tensor weight, Tensor seen, float push) -> (Tensor, Tensor)"
    ),
    "observe_classes": (
        "(Tensor[] mean, Tensor[] count, Tensor(a!)[] var, Tensor(b!)[] updates, Tensor classes,"
        " Tensor size, Tensor batch_mean, Tensor batch_var, float momentum, float floor)"
        " -> (Tensor, Tensor, Tensor)"
    ),
    "follow_classes": (
        "(Tensor(a!)[] mean, Tensor(b!)[] count, Tensor classes, Tensor weight, Tensor batch_mean,"
        " float momentum) -> ()"
    ),
}


def pure_pytorch(name: str) -> Callable[..., Any]:
    """The pure-PyTorch implementation of operation `name`: what every backend must compute."""
    modules = (reference, reference_backward, reference_bank)
    function: Callable[..., Any] = next(getattr(m, name) for m in modules if hasattr(m, name))
    return function


def _fake_group_by_class(targets: Tensor, min_count: int) -> tuple[Tensor, Tensor, Tensor]:
    batch = targets.shape[0]
    groups = batch // min_count
    shapes = ((batch,), (groups + 1,), (groups,))
    order, offsets, classes = (targets.new_empty(s, dtype=torch.int64) for s in shapes)
    return order, offsets, classes


def _fake_class_moments(
    z: Tensor, order: Tensor, offsets: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    shape = (offsets.shape[0] - 1, z.shape[1])
    dtype = accumulation_dtype(z.dtype)
    return z.new_empty(shape, dtype=dtype), z.new_empty(shape, dtype=dtype)


def _fake_class_moments_backward(
    grad_mean: Tensor, grad_var: Tensor, z: Tensor, *others: Tensor | float
) -> Tensor:
    return z.new_empty(z.shape)


def _fake_confusion_weights(
    logits: Tensor, order: Tensor, offsets: Tensor, classes: Tensor
) -> Tensor:
    groups = classes.shape[0]
    return logits.new_empty((groups, groups), dtype=accumulation_dtype(logits.dtype))


def _fake_top_pairs(alpha: Tensor, top_m: int) -> tuple[Tensor, Tensor]:
    groups = alpha.shape[0]
    chosen = min(top_m, groups * (groups - 1) // 2)
    return alpha.new_empty((chosen, 2), dtype=torch.int64), alpha.new_empty((chosen,))


def _fake_plan(logits: Tensor, targets: Tensor, top_m: int, min_count: int) -> tuple[Tensor, ...]:
    groups = _fake_group_by_class(targets, min_count)
    alpha = _fake_confusion_weights(logits, *groups)
    return *groups, *_fake_top_pairs(alpha, top_m)


def _fake_pair_distance(mean: Tensor, var: Tensor, pairs: Tensor, eps: float) -> Tensor:
    return mean.new_empty((pairs.shape[0],))


def _fake_moment_gradients(grad: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    mean = next(t for t in others if isinstance(t, Tensor) and t.dim() == 2)
    return mean.new_empty(mean.shape), mean.new_empty(mean.shape)


def _fake_all_pair_distance(mean: Tensor, var: Tensor, eps: float) -> Tensor:
    return mean.new_empty((mean.shape[0], mean.shape[0]))


def _fake_weighted_overlap(
    mean: Tensor, var: Tensor, alpha: Tensor, eps: float, log: bool
) -> Tensor:
    return mean.new_empty(())


def _fake_weighted_overlap_with_gradient(
    grad: Tensor, mean: Tensor, *others: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    return mean.new_empty(()), *_fake_moment_gradients(grad, mean)


def _fake_regularizer(
    features: list[Tensor],
    order: Tensor,
    offsets: Tensor,
    pairs: Tensor,
    weights: Tensor,
    eps: float,
    log: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    moments = [_fake_class_moments(z, order, offsets, eps) for z in features]
    distance = weights.new_empty((len(features), pairs.shape[0]))
    return weights.new_empty(()), [m for m, _ in moments], [v for _, v in moments], distance


def _fake_fused_regularizer(*arguments: Any) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    value, mean, var, distance = _fake_regularizer(*arguments)
    on_cpu = value.device.type == "cpu"
    return (value, [], [], distance) if on_cpu else (value, mean, var, distance)


def _fake_regularizer_backward(grad: Tensor, features: list[Tensor], *others: Any) -> list[Tensor]:
    return [z.new_empty(z.shape) for z in features]


def _fake_top_confusions(
    logits: Tensor, targets: Tensor, seen: Tensor, top: int
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (logits.shape[0], max(0, min(top, logits.shape[1] - 1)))
    dtype = accumulation_dtype(logits.dtype)
    index, weight = logits.new_empty(shape, dtype=torch.int64), logits.new_empty(shape, dtype=dtype)
    return index, weight, logits.new_empty((logits.shape[0],), dtype=dtype)


def _fake_class_attraction(z: Tensor, mean: list[Tensor], *others: Any) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(z.dtype)
    numbers = (4, len(mean), z.shape[0])
    return z.new_empty(z.shape, dtype=dtype), z.new_empty(numbers, dtype=dtype)


def _fake_observe_classes(mean: list[Tensor], *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    size, batch_mean = others[4:6]
    layers = len(mean)
    shapes = (layers, size.shape[0]), (batch_mean.shape[1],), (layers,)
    weight, metric, unit = (batch_mean.new_empty(s) for s in shapes)
    return weight, metric, unit


def _fake_follow_classes(*arguments: Any) -> None:
    return None


FAKES: dict[str, Callable[..., Any]] = {
    "group_by_class": _fake_group_by_class,
    "class_moments": _fake_class_moments,
    "class_moments_backward": _fake_class_moments_backward,
    "confusion_weights": _fake_confusion_weights,
    "top_pairs": _fake_top_pairs,
    "plan": _fake_plan,
    "pair_distance": _fake_pair_distance,
    "pair_distance_backward": _fake_moment_gradients,
    "all_pair_distance": _fake_all_pair_distance,
    "all_pair_distance_backward": _fake_moment_gradients,
    "weighted_overlap": _fake_weighted_overlap,
    "weighted_overlap_backward": _fake_moment_gradients,
    "weighted_overlap_with_gradient": _fake_weighted_overlap_with_gradient,
    "regularizer": _fake_regularizer,
    "regularizer_backward": _fake_regularizer_backward,
    "top_confusions": _fake_top_confusions,
    "class_attraction": _fake_class_attraction,
    "observe_classes": _fake_observe_classes,
    "follow_classes": _fake_follow_classes,
}


def _triton(name: str) -> Callable[..., Any]:
    """Operation `name` in Triton, imported at its first call: importing us never needs Triton."""

    def call(*args: Any) -> Any:
        return getattr(extension.triton_kernels(), name)(*args)

    return call


def _counting_writes(operation: Any, positions: list[int]) -> Callable[..., Any]:
    """What autograd sees of an operation that writes some arguments: their versions change.

    Kernels do not tell autograd what they write, whatever they are made of. Counted here, what was
    saved for a backward pass before the call is an error there, as after torch's own operations.
    """

    def call(keyset: Any, *args: Any) -> Any:
        for position in positions:
            torch.autograd.graph.increment_version(args[position])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return operation.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    return call


def written(name: str) -> list[int]:
    """The positions of the arguments that operation `name` writes."""
    parameters = getattr(getattr(torch.ops, NAMESPACE), name).default._schema.arguments
    return [i for i, p in enumerate(parameters) if p.alias_info and p.alias_info.is_write]


AUTOCAST_KEYS = ("AutocastCPU", "AutocastCUDA")


def _declare(
    namespace: str,
    implementation: Callable[[str], Callable[..., Any]],
    fakes: dict[str, Callable[..., Any]],
) -> Any:
    library = torch.library.Library(namespace, "FRAGMENT")
    for name, schema in SCHEMAS.items():
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, implementation(name), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{namespace}::{name}", fakes[name], lib=library)
        for key in AUTOCAST_KEYS:
            library.impl(name, torch.library.fallthrough_kernel, key)
        if positions := written(name):
            operation = getattr(getattr(torch.ops, namespace), name).default
            counting = _counting_writes(operation, positions)
            library.impl(name, counting, "ADInplaceOrView", with_keyset=True)
    return library


# A library's declarations live as long as the Library object does.
LIBRARIES = (
    # Triton's operations return the moments on any device: its interpreter takes CPU tensors.
    _declare(NAMESPACE, pure_pytorch, FAKES | {"regularizer": _fake_fused_regularizer}),
    _declare(TRITON_NAMESPACE, _triton, FAKES),
)
