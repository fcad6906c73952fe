"""The recommended regularizer: pull to the own class, push from confused ones, in balance.

    cwbr = CWBR(num_classes)
    ...
    logits = model(images)
    ce = cross_entropy(logits, targets)
    cwbr(catcher.feats, logits, targets)      # between forward and backward
    ce.backward()

How it differs from the published form (`cwbr_fused.loss`), which is silent on wide layers and
harmful on narrow ones:

- Class means outlive the batch (`ClassBank`), so ordinary shuffled batches serve, with one sample
  per class; and every class is a candidate for being confused with, not only those of the batch.
- Squared Mahalanobis distances, 8 times the Bhattacharyya distance under a shared variance, instead
  of `exp(-D)`: they never underflow.
- Each sample is pulled to its own class mean as well as pushed from those it is confused with, each
  with the probability that the model gives it.
- The weight is set where it acts: at each layer's feature, in the one backward pass, the gradient
  gets `ratio * p * |g| / |r| * r` added, where g is the incoming gradient, r that of the energy and
  p the mean probability that the model gives the right class. So early in training, when class
  means mean little, the network hardly feels it. A scaled loss (AMP, accumulation) scales it too.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from cwbr_fused.balanced.balance import Balance
from cwbr_fused.balanced.bank import ClassBank
from cwbr_fused.balanced.taps import Tap
from cwbr_fused.inputs import soft_targets, validation
from cwbr_fused.inputs.features import FeatureCatcher, find_layer
from cwbr_fused.inputs.pooling import Spread, spread, to_vec
from cwbr_fused.operations import backends, distributed
from cwbr_fused.operations.autograd import OPERATIONS
from cwbr_fused.operations.reference import accumulation_dtype
from cwbr_fused.operations.warning import CWBRWarning

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Soft targets update the means of classes whose weights in the batch sum to this much.
LEAST_SOFT_WEIGHT = 0.5
# Backward passes without a gradient at a feature before the warning; one may be skipped on purpose.
MISSES_BEFORE_WARNING = 3


class Pooled(NamedTuple):
    """A feature cut off from the graph of the model, and the (B, D) vectors pooled from it."""

    leaf: Tensor
    z: Tensor


class CWBR(nn.Module):
    """Confusion-weighted Bhattacharyya regularization, balanced against the loss's own gradient.

    For a sample z of class y, per layer, with class means and the shared variance of a bank:

        E(z) = |z - mean_y|^2 / (2 var) - push * sum_j p_j |z - mean_j|^2 / (2 var)

    over the `confusions` classes j of largest softmax probability p_j other than y. Calling the
    module between forward and backward adds the gradient of E to that of the loss at the given
    features, as a share of it; nothing has to be added to the loss.

    Args:
        num_classes: C, the number of columns of the logits.
        ratio: length of the added gradient at each feature, relative to the incoming one, for a
            model that is certain of the right classes; multiplied by the mean probability of the
            right class in the batch.
        push: weight of the repulsion from confused classes; 0 only pulls, a balanced center loss.
        confusions: how many classes each sample is pushed from.
        momentum: of the class means, see `ClassBank`.
        pool: (B, ...) features to (B, D) vectors, differentiable; default `to_vec`.
        backend: see `cwbr_fused.loss`.
        group: None, "world" or a `ProcessGroup`: the processes that share one bank. With
            DistributedDataParallel N processes x B/N samples then train as one process x B.
            All must call the module, and `backward`, at every step.

    The banks are buffers, made at the first call for each layer and kept in the state_dict: layer
    "layer3.0" has `banks.layer3/0.mean` and so on. In `eval()` mode, and under `no_grad`, the
    module only measures.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        ratio: float = 1.0,
        push: float = 1.0,
        confusions: int = 5,
        momentum: float = 0.7,
        pool: Callable[[Tensor], Tensor] = to_vec,
        backend: str = "auto",
        group: ProcessGroup | Literal["world"] | None = None,
    ) -> None:
        super().__init__()
        self.num_classes = validation.check_positive_int("num_classes", num_classes)
        self.confusions = validation.check_positive_int("confusions", confusions)
        validation.check_between("ratio", ratio, 0)
        validation.check_between("push", push, 0, 1)
        validation.check_between("momentum", momentum, 0, 1)
        validation.check_group(group)
        backends.check(backend)
        self.ratio, self.push = ratio, push
        self.momentum, self.pool = momentum, pool
        self.backend, self.group = backend, group
        self.banks = nn.ModuleDict()
        self._balances: dict[str, Balance] = {}
        self._misses: dict[str, int] = {}
        self._taps: dict[str, Tap] = {}

    def forward(
        self,
        features: Tensor | Sequence[Tensor] | Mapping[str, Tensor],
        logits: Tensor,
        targets: Tensor,
    ) -> Tensor:
        """Arranges for the gradient, updates the banks, and returns the energy for logging.

        Args:
            features: a tensor, a sequence or a mapping of layer outputs *through which the loss
                flows*: what the model itself goes on with, not a copy or a pooled view of it.
            logits: (B, C).
            targets: (B,) integer classes, or (B, C) soft targets >= 0 (mixup, CutMix), of which the
                two largest of each row count.

        Returns:
            The mean of E / D over samples and layers, a scalar without gradient; 0 while no class
            has been seen before.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        soft = validation.check_any_targets(logits, targets)
        processes = self._processes()
        if logits.shape[1] != self.num_classes:
            raise ValueError(
                f"logits: expected C = num_classes = {self.num_classes} columns, "
                f"got {validation.describe(logits)}"
            )
        if soft and processes is not None:
            raise ValueError("targets: expected class indices with group, got soft targets")
        layers = validation.named_layers(features, logits)
        backend = backends.resolve(self.backend, logits.device.type)
        pooled = {name: self._pooled(name, layer) for name, layer in layers.items()}
        banks = {name: self._bank(name, z) for name, (_, z) in pooled.items()}
        vectors = [_vector(z, banks[name]) for name, (_, z) in pooled.items()]
        seen = torch.stack([bank.count > 0 for bank in banks.values()]).all(0)
        index, coefficient, own = self._coefficients(backend, logits.detach(), targets, seen)
        train = self.training and torch.is_grad_enabled()
        if train:
            self._warn_of_misses()
            classes, size, moments = self._moments(backend, vectors, targets, processes)
            ratio = self.ratio * self._mean(own, processes)

        energies = []
        for layer, (name, bank) in enumerate(banks.items()):
            z = vectors[layer]
            if train:
                mean, variance = moments[layer]
                weight, var = bank.observe(classes, size, mean, variance, backend)
            else:
                var = bank.metric()
            energy, pull = OPERATIONS[backend].class_attraction(
                z, bank.mean, var, index, coefficient.to(bank.mean.dtype)
            )
            energies.append(energy.sum() / max(z.numel(), 1))
            if train:
                bank.follow(classes, weight, mean, backend)
                # Its length does not matter; without units it fits in half precision.
                pull = self._spread(pooled[name], pull * var.mean().sqrt())
                balance = Balance(pull, ratio, processes, self._balances.get(name))
                self._lay_ready(name, layers[name], balance)
        return torch.stack(energies).mean()

    def catch(self, model: nn.Module, layers: Sequence[str]) -> FeatureCatcher:
        """Catches features of a model so that CWBR acts on it also when it is compiled.

        Taps go behind the layers, before their other forward hooks, and a `FeatureCatcher` behind
        the taps. Call it before the compiled model is first called; of a compiled model the names
        of the original are meant.

        Args:
            model: where to look the layers up.
            layers: dotted names of modules in it, each with one tensor as output.

        Returns:
            The catcher, whose `feats` are to be passed to this module; `remove` leaves the taps,
            which then do nothing.

        Raises:
            TypeError, ValueError: as `FeatureCatcher`, which then leaves the model as it was.
        """
        catcher = FeatureCatcher(model, layers)
        for name in layers:
            self._taps[name] = Tap()
            find_layer(model, name).register_forward_hook(self._taps[name], prepend=True)
        return catcher

    def health(self) -> dict[str, dict[str, float]]:
        """What the latest backward pass met at each layer; waits for the device.

        Returns:
            By layer: "ce_norm", the length of the loss's gradient at the feature; "reg_norm", that
            of what was added; "cosine" between the two, measured in the first two of every 16
            backward passes. Layers that no gradient reached are absent.
        """
        balances = {name: b for name, b in self._balances.items() if b.norms is not None}
        return {name: b.numbers() for name, b in balances.items()}

    def extra_repr(self) -> str:
        return (
            f"{self.num_classes}, ratio={self.ratio}, push={self.push}, "
            f"confusions={self.confusions}, momentum={self.momentum}, backend={self.backend!r}"
        )

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Makes the banks that the state has, so that a fresh module can take them."""
        start, end = f"{prefix}banks.", ".mean"
        for name, mean in state_dict.items():
            if name.startswith(start) and name.endswith(end):
                key = name.removeprefix(start).removesuffix(end)
                if key not in self.banks:
                    classes, dims = mean.shape
                    factory = {"dtype": mean.dtype, "device": mean.device}
                    self.banks[key] = ClassBank(classes, dims, self.momentum, **factory)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _processes(self) -> ProcessGroup | None:
        if self.group is None:
            return None
        return distributed.process_group(self.group)

    def _pooled(self, name: str, layer: Tensor) -> Pooled:
        leaf = layer.detach()
        if self._to_vec_options is not None:
            return Pooled(leaf, to_vec(leaf, **self._to_vec_options))
        leaf.requires_grad_()
        with torch.enable_grad():
            z = self.pool(leaf)
        if not isinstance(z, Tensor) or z.shape[:1] != layer.shape[:1] or z.dim() != 2:
            raise ValueError(
                f"pool: expected to get (B, D) from {name}, a {validation.describe(layer)}, "
                f"got {validation.describe(z)}"
            )
        return Pooled(leaf, z)

    def _spread(self, pooled: Pooled, pull: Tensor) -> Spread:
        if self._to_vec_options is not None:
            return spread(pull, pooled.leaf, **self._to_vec_options)
        (gradient,) = torch.autograd.grad(pooled.z, pooled.leaf, pull.to(pooled.z.dtype))
        return Spread(gradient, slice(None))

    @property
    def _to_vec_options(self) -> dict[str, Any] | None:
        """Of `to_vec`, whose backward pass is known without a graph, or of a partial of it."""
        if self.pool is to_vec:
            return {}
        if isinstance(self.pool, partial) and self.pool.func is to_vec and not self.pool.args:
            return self.pool.keywords
        return None

    def _bank(self, name: str, z: Tensor) -> ClassBank:
        key = name.replace(".", "/")
        if key not in self.banks:
            self.banks[key] = ClassBank(
                self.num_classes,
                z.shape[1],
                self.momentum,
                dtype=accumulation_dtype(z.dtype),
                device=z.device,
            )
        bank = self.banks[key]
        assert isinstance(bank, ClassBank)
        if bank.mean.shape[1] != z.shape[1] or bank.mean.device != z.device:
            raise ValueError(
                f"{name}: expected D = {bank.mean.shape[1]} on {bank.mean.device}, as at the first "
                f"call, got D = {z.shape[1]} on {z.device}"
            )
        return bank

    def _coefficients(
        self, backend: str, logits: Tensor, targets: Tensor, seen: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The classes (B, S + J) that act on each sample, how strongly, and its own probability."""
        labels, shares = _labels(targets)
        index, probability, own = OPERATIONS[backend].top_confusions(
            logits, labels[:, 0], seen, self.confusions
        )
        if labels.shape[1] > 1:
            also_own = (index[:, :, None] == labels[:, None, 1:]) & (shares[:, None, 1:] > 0)
            index = torch.where(also_own.any(2), -1, index)
            probs = logits.to(own.dtype).softmax(1).gather(1, labels)
            own = torch.where(shares > 0, probs, 0).sum(1)
        index = torch.cat([labels, index], 1)
        coefficient = torch.cat([shares.to(own.dtype), -self.push * probability], 1)
        # A sample whose own class is new is left alone: pushing it would have no counterweight.
        known = (seen[labels] | (shares == 0)).all(1, keepdim=True)
        return torch.where(known, index, -1), coefficient, own

    def _moments(
        self,
        backend: str,
        vectors: list[Tensor],
        targets: Tensor,
        processes: ProcessGroup | None,
    ) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
        """Classes (K,), how many samples each has, and their moments (K, D) at every layer."""
        if processes is not None:
            return distributed.class_moments(vectors, targets, self.num_classes, backend, processes)
        if targets.dim() == 2:
            members = soft_targets.membership(targets, LEAST_SOFT_WEIGHT)
            moments = [
                soft_targets.class_moments(z, members.shares, 0.0, accumulation_dtype(z.dtype))
                for z in vectors
            ]
            return members.classes, members.counts, moments
        operations = OPERATIONS[backend]
        order, offsets, classes = operations.group_by_class(targets, 1)
        moments = [operations.class_moments(z, order, offsets, 0.0) for z in vectors]
        return classes, offsets.diff(), moments

    def _mean(self, own: Tensor, processes: ProcessGroup | None) -> Tensor:
        if processes is None:
            return own.mean()
        return distributed.mean_over_samples(own, processes)

    def _lay_ready(self, name: str, layer: Tensor, balance: Balance) -> None:
        """Puts the gradient where the backward pass will come by."""
        self._balances[name] = balance
        if name in self._taps:
            self._taps[name].balance = balance
        elif layer.requires_grad:
            layer.register_hook(balance)

    def _warn_of_misses(self) -> None:
        for name, balance in self._balances.items():
            self._misses[name] = 0 if balance.norms is not None else 1 + self._misses.get(name, 0)
            if self._misses[name] == MISSES_BEFORE_WARNING:
                warnings.warn(
                    f"CWBR has no effect on {name}: no gradient of the loss reached it in "
                    f"{MISSES_BEFORE_WARNING} steps. Pass the very tensor that the model goes on "
                    "with (FeatureCatcher does), not a copy or a pooled view of it, and call CWBR "
                    "before backward(). If the model is compiled, catch its features by "
                    "CWBR.catch().",
                    CWBRWarning,
                    stacklevel=5,  # the caller of the module
                )


def _vector(z: Tensor, bank: ClassBank) -> Tensor:
    """z without its graph, in a dtype that is accumulated in that of the bank."""
    dtype = bank.mean.dtype
    return z.detach() if accumulation_dtype(z.dtype) == dtype else z.detach().to(dtype)


def _labels(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Own classes (B, S) of each sample and their shares, which sum to 1 unless all are 0."""
    if targets.dim() == 1:
        labels = targets.long()[:, None]
        return labels, torch.ones_like(labels, dtype=torch.float32)
    shares, labels = targets.topk(min(2, targets.shape[1]))
    return labels, shares / shares.sum(1, keepdim=True).clamp(min=torch.finfo(shares.dtype).tiny)
