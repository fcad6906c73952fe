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
- Each sample is pulled to its own class mean as well as pushed from those it is confused with.
- The weight is set where it acts: at each layer's feature, in the one backward pass, the gradient
  gets `ratio * p * |g| / |r| * r` added, where g is the incoming gradient, r that of the energy and
  p the mean probability that the model gives the right class. So early in training, when class
  means mean little, the network hardly feels it. A scaled loss (AMP, accumulation) scales it too.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cwbr_fused import backends, validation
from cwbr_fused.balance import Balance, Tap
from cwbr_fused.bank import ClassBank
from cwbr_fused.features import FeatureCatcher, find_layer, to_vec
from cwbr_fused.ops import OPERATIONS
from cwbr_fused.reference import accumulation_dtype

# Backward passes without a gradient at a feature before the warning; one may be skipped on purpose.
MISSES_BEFORE_WARNING = 3


class CWBR(nn.Module):
    """Confusion-weighted Bhattacharyya regularization, balanced against the loss's own gradient.

    For a sample z of class y, per layer, with class means and the shared variance of a bank:

        E(z) = |z - mean_y|^2 / (2 var) - push * sum_j w_j |z - mean_j|^2 / (2 var)

    over the `confusions` classes j of largest softmax probability other than y, w the softmax over
    them. Calling the module between forward and backward adds the gradient of E to that of the loss
    at the given features, as a share of it; nothing has to be added to the loss.

    Args:
        num_classes: C, the number of columns of the logits.
        ratio: length of the added gradient at each feature, relative to the incoming one, for a
            model that is certain of the right classes; multiplied by the mean probability of the
            right class in the batch.
        push: weight of the repulsion from confused classes; 0 only pulls.
        confusions: how many classes each sample is pushed from.
        momentum: of the class means, see `ClassBank`.
        pool: (B, ...) features to (B, D) vectors, differentiable; default `to_vec`.
        backend: see `cwbr_fused.loss`.

    The banks are buffers, made at the first call for each layer and kept in the state_dict: layer
    "layer3.0" has `banks.layer3/0.mean` and so on. In `eval()` mode, and under `no_grad`, the
    module only measures.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        ratio: float = 1.0,
        push: float = 0.3,
        confusions: int = 5,
        momentum: float = 0.7,
        pool: Callable[[Tensor], Tensor] = to_vec,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        validation.check_positive_int("num_classes", num_classes)
        validation.check_positive_int("confusions", confusions)
        validation.check_between("ratio", ratio, 0)
        validation.check_between("push", push, 0, 1)
        validation.check_between("momentum", momentum, 0, 1)
        backends.check(backend)
        self.num_classes = num_classes
        self.ratio, self.push, self.confusions = ratio, push, confusions
        self.momentum, self.pool, self.backend = momentum, pool, backend
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
            targets: (B,) integer classes.

        Returns:
            The mean of E / D over samples and layers, a scalar without gradient; 0 while no class
            has been seen before.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        validation.check_batch(logits, targets)
        if logits.shape[1] != self.num_classes:
            raise ValueError(
                f"logits: expected C = num_classes = {self.num_classes} columns, "
                f"got {validation.describe(logits)}"
            )
        layers = validation.named_layers(features, logits)
        logits = logits.detach()
        operations = OPERATIONS[backends.resolve(self.backend, logits.device.type)]
        vectors = {name: self._vector(name, layer) for name, layer in layers.items()}
        banks = {name: self._bank(name, z) for name, (_, z) in vectors.items()}
        seen = torch.stack([bank.count > 0 for bank in banks.values()]).all(0)
        index, coefficient, own = self._coefficients(operations, logits, targets, seen)
        train = self.training and torch.is_grad_enabled()
        if train:
            self._warn_of_misses()
            order, offsets, classes = operations.group_by_class(targets, 1)

        energies = []
        for name, (leaf, pooled) in vectors.items():
            bank = banks[name]
            z = pooled.detach().to(_dtype(pooled, bank))
            if train:
                mean, var = operations.class_moments(z, order, offsets, 0.0)
                move = bank.observe(classes, offsets.diff(), mean, var)
            weights = coefficient.to(bank.mean.dtype)
            energy, pull = operations.class_attraction(z, bank.mean, bank.metric(), index, weights)
            energies.append(energy.mean() / z.shape[1])
            if train:
                bank.follow(move)
            if train and layers[name].requires_grad:
                # Its length does not matter; at most 1, it fits in half precision.
                pull = pull / pull.abs().max().clamp(min=torch.finfo(pull.dtype).tiny)
                (pull,) = torch.autograd.grad(pooled, leaf, pull.to(pooled.dtype))
                self._apply_to(name, layers[name], Balance(pull, self.ratio * own.mean()))
        return torch.stack(energies).mean()

    def catch(self, model: nn.Module, layers: Sequence[str]) -> FeatureCatcher:
        """Catches features of a model so that CWBR acts on it also when it is compiled.

        Taps go behind the layers, and a `FeatureCatcher` behind the taps. Call it before the
        compiled model is first called; of a compiled model the names of the original are meant.

        Args:
            model: where to look the layers up.
            layers: dotted names of modules in it, each with one tensor as output.

        Returns:
            The catcher, whose `feats` are to be passed to this module; `remove` leaves the taps,
            which then do nothing.
        """
        for name in layers:
            self._taps[name] = Tap()
            find_layer(model, name).register_forward_hook(self._taps[name])
        return FeatureCatcher(model, layers)

    def health(self) -> dict[str, dict[str, float]]:
        """What the latest backward pass met at each layer; waits for the device.

        Returns:
            By layer: "ce_norm", the length of the loss's gradient at the feature; "reg_norm", that
            of what was added; "cosine" between the two. Layers that no gradient reached are absent.
        """
        balances = {name: b for name, b in self._balances.items() if b.record is not None}
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

    def _vector(self, name: str, layer: Tensor) -> tuple[Tensor, Tensor]:
        """A leaf in place of the layer, and the vectors pooled from it."""
        leaf = layer.detach().requires_grad_()
        with torch.enable_grad():
            pooled = self.pool(leaf)
        if (
            not isinstance(pooled, Tensor)
            or pooled.shape[:1] != layer.shape[:1]
            or pooled.dim() != 2
        ):
            raise ValueError(
                f"pool: expected to get (B, D) from {name}, a {validation.describe(layer)}, "
                f"got {validation.describe(pooled)}"
            )
        return leaf, pooled

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
        self, operations: Any, logits: Tensor, targets: Tensor, seen: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The classes (B, 1 + J) that act on each sample, how strongly, and its own probability."""
        targets = targets.long()
        index, weight, own = operations.top_confusions(logits, targets, seen, self.confusions)
        index = torch.cat([targets[:, None], index], 1)
        coefficient = torch.cat([torch.ones_like(own)[:, None], -self.push * weight], 1)
        return torch.where(seen[targets][:, None], index, -1), coefficient, own

    def _apply_to(self, name: str, layer: Tensor, balance: Balance) -> None:
        self._balances[name] = balance
        if name in self._taps:
            self._taps[name].balance = balance
        else:
            layer.register_hook(balance)

    def _warn_of_misses(self) -> None:
        for name, balance in self._balances.items():
            self._misses[name] = 0 if balance.record is not None else 1 + self._misses.get(name, 0)
            if self._misses[name] == MISSES_BEFORE_WARNING:
                warnings.warn(
                    f"CWBR has no effect on {name}: no gradient of the loss reached it in "
                    f"{MISSES_BEFORE_WARNING} steps. Pass the very tensor that the model goes on "
                    "with (FeatureCatcher does), not a copy or a pooled view of it, and call CWBR "
                    "before backward(). If the model is compiled, catch its features by "
                    "CWBR.catch().",
                    stacklevel=3,
                )


def _dtype(z: Tensor, bank: ClassBank) -> torch.dtype:
    """That of z, unless the bank accumulates in another than z would."""
    return z.dtype if accumulation_dtype(z.dtype) == bank.mean.dtype else bank.mean.dtype
