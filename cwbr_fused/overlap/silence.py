"""Warnings about a published regularizer that does nothing or harm, each with a remedy.

`ConfusionWeightedBhatReg` examines the batch of its first training call and of every 100th after
it. Only these calls wait for the device. Each cause is reported once per module. These lines turn
the warnings into errors, or off:

    warnings.simplefilter("error", cwbr_fused.CWBRWarning)  # or "ignore"
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from cwbr_fused.inputs import membership, validation
from cwbr_fused.inputs.targets import Targets, read_targets
from cwbr_fused.operations import backends
from cwbr_fused.operations.autograd import OPERATIONS
from cwbr_fused.operations.distributed import process_group
from cwbr_fused.operations.warning import CWBRWarning
from cwbr_fused.overlap import steps
from cwbr_fused.overlap.loss import common_vectors
from cwbr_fused.overlap.options import OverlapOptions

SILENT_PAIRS = 0.5  # of the chosen pairs
CLAMPED_VARIANCES = 0.5  # of those of the used classes
USABLE_CLASSES = 0.1  # of the classes in the batch
SMALL_VALUE = 1e-6  # the eps of `scale_match`

INSTEAD = (
    "Use cwbr_fused.CWBR, whose distances do not underflow and whose weight follows the gradients; "
    "or objective='log_overlap', which keeps a gradient that may outweigh the cross-entropy's."
)


class SilenceCheck:
    """Which calls to examine, and which causes were reported already.

    Args:
        check_every: examines the first training call and every `check_every`-th after it; None for
            no call.
    """

    def __init__(self, check_every: int | None) -> None:
        if check_every is not None:
            validation.check_positive_int("check_every", check_every, " or None for no checks")
        self.check_every = check_every
        self.calls = 0
        self.reported: set[str] = set()

    def due(self, value: Tensor) -> bool:
        """Counts a training call that returned `value`, and says whether to examine it.

        Calls without values are not counted: compiled ones, those captured in a CUDA graph, and
        those of fake tensors.
        """
        if torch.compiler.is_compiling() or self.check_every is None:
            return False
        if not torch.is_grad_enabled() or type(value) is not Tensor or value.is_meta:
            return False
        if value.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        self.calls += 1
        return (self.calls - 1) % self.check_every == 0

    def warn(self, causes: Mapping[str, str]) -> None:
        """Warns of the causes not reported yet, on behalf of the caller of the module's caller."""
        for cause, text in causes.items():
            if cause not in self.reported:
                self.reported.add(cause)
                # Above this: forward, two frames of nn.Module's call, and the line that made it.
                warnings.warn(f"ConfusionWeightedBhatReg: {text}", CWBRWarning, stacklevel=5)


@torch.no_grad()
def causes_in_batch(
    value: Tensor,
    features: Mapping[str, Tensor],
    logits: Tensor,
    targets: Tensor,
    options: OverlapOptions,
) -> dict[str, str]:
    """What is wrong with a batch, by cause: "classes", "underflow", "scale" or "clamp".

    The function repeats the steps of the loss and waits for the device. For a group of processes,
    whose joint statistics are not kept, it judges the value alone.

    Args:
        value: what `cwbr_fused.loss` returned for the other arguments.
    """
    if process_group(options.group) is not None:
        return {} if options.log else _cause_in_value(value.item())
    eps, min_count = options.eps, options.min_count
    backend = backends.resolve(options.backend, logits.device.type)
    given = read_targets(logits, targets)
    vectors = common_vectors(features, logits)
    statistics = steps.statistics_of(vectors, logits, given, options, backend)
    alpha, gaussians = steps.adjusted(statistics, options)
    distance, weights = steps.distances(alpha, gaussians, options, backend)
    batch = _measured(
        value,
        dict(zip(features, (layer.var <= eps for layer in gaussians), strict=True)),
        statistics.counts > 0,
        (torch.exp(-distance) == 0) & (weights > 0),
        weights > 0,
        _classes_present(given, logits.shape[1], backend),
    )

    causes = {}
    if batch.usable < max(2, USABLE_CLASSES * batch.present):
        causes["classes"] = (
            f"{batch.usable:.0f} of the {batch.present:.0f} classes in this batch have "
            f"min_count={min_count} samples: "
            f"{'the regularizer is 0' if batch.usable < 2 else 'the others are left out'}. Draw "
            "batches with cwbr_fused.PKSampler, or use cwbr_fused.CWBR, which needs one sample per "
            "class."
        )
    if batch.usable < 2:
        return causes
    if not options.log:
        if layers := _above(SILENT_PAIRS, batch.silent):
            causes["underflow"] = (
                f"the overlap exp(-D) of the chosen pairs of classes underflows to 0 in {layers}: "
                f"those have no gradient. {INSTEAD}"
            )
        else:
            causes |= _cause_in_value(batch.value)
    if layers := _above(CLAMPED_VARIANCES, batch.clamped):
        causes["clamp"] = (
            f"class variances are at eps={eps:g} or below it in {layers}: these dimensions are "
            "constant within a class, like dead units, or small compared with eps. Take the "
            "features before the activation, another layer, or a smaller eps"
            + (", or shrinkage for classes of one sample." if min_count == 1 else ".")
        )
    return causes


class _Measured(NamedTuple):
    """A batch in numbers: its usable and present classes, the value of the regularizer, and for
    each layer the share of chosen pairs without overlap and of variances at eps."""

    usable: float
    present: float
    value: float
    silent: dict[str, float]
    clamped: dict[str, float]


def _measured(
    value: Tensor,
    clamped: Mapping[str, Tensor],
    used: Tensor,
    silent: Tensor,
    chosen: Tensor,
    present: Tensor,
) -> _Measured:
    """Reads all numbers in one wait for the device.

    Args:
        clamped: by layer (K, D), which variances are at eps.
        used: (K,) classes.
        silent, chosen: (L, M) and (M,) pairs, the silent ones among the chosen.
    """
    shares = [(at_eps & used[:, None]).sum(0).to(value.dtype).mean() for at_eps in clamped.values()]
    numbers = [
        used.sum(),
        present,
        value,
        *(silent.sum(1) / chosen.sum().clamp(min=1)),
        *(share / used.sum().clamp(min=1) for share in shares),
    ]
    usable, classes, reg, *rest = torch.stack([n.to(value.dtype) for n in numbers]).tolist()
    silent_shares = dict(zip(clamped, rest[: len(shares)], strict=True))
    clamped_shares = dict(zip(clamped, rest[len(shares) :], strict=True))
    return _Measured(usable, classes, reg, silent_shares, clamped_shares)


def _classes_present(targets: Targets, columns: int, backend: str) -> Tensor:
    """How many classes the batch has a sample of, a scalar."""
    if targets.shares is not None:
        return (membership.of_targets(targets, columns, 1, targets.shares.dtype).counts > 0).sum()
    classes: Tensor
    _, _, classes = OPERATIONS[backend].group_by_class(targets.main, 1)
    return (classes >= 0).sum()


def _above(limit: float, shares: Mapping[str, float]) -> str:
    """The layers whose share is above the limit, with their shares; empty if there is none."""
    return ", ".join(f"{name} ({share:.0%})" for name, share in shares.items() if share > limit)


def _cause_in_value(reg: float) -> dict[str, str]:
    """What the value alone, an overlap in [0, 1], says about the published form."""
    if reg == 0:
        return {
            "scale": "the regularizer is exactly 0 and adds nothing: the overlaps or the confusion "
            f"weights of this batch underflow, or fewer than two classes are usable. {INSTEAD}"
        }
    if 0 < reg < SMALL_VALUE:
        return {
            "scale": f"the regularizer is {reg:.1e}, below the eps={SMALL_VALUE:g} of scale_match, "
            f"which multiplies it by {1 / (reg + SMALL_VALUE):.0e} times the cross-entropy: what "
            f"is left of it rests on the pairs of least distance alone. {INSTEAD}"
        }
    return {}
