"""The recommended regularizer: pull to the own class, push from confused ones, in balance.

    cwbr = CWBR(num_classes)
    features = cwbr.catch(model)
    ...
    logits = model(images)
    ce = cross_entropy(logits, targets)
    cwbr(features, logits, targets)      # between forward and backward
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
  gets `ratio * trust * |g| / |r| * r` added, where g is the incoming gradient and r that of the
  energy. The trust, in [0, 1], asks how often the nearest class mean is right at that layer, and
  whether the model has something left to learn (`balanced.trust`). So the network hardly feels it
  early in training, when class means mean little, nor in layers where a class varies by what later
  layers need. A scaled loss (AMP, accumulation) scales it too.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from cwbr_fused.balanced import trust
from cwbr_fused.balanced.balance import Balance, of_length
from cwbr_fused.balanced.banks import Banks
from cwbr_fused.balanced.pools import Pool, Pooled, Pools
from cwbr_fused.balanced.record import EXPLANATIONS, Reason, Record
from cwbr_fused.balanced.taps import Catchers, register_hook
from cwbr_fused.balanced.together import Acting, Moments, Together, grouped
from cwbr_fused.inputs import membership, validation
from cwbr_fused.inputs.features import FeatureCatcher
from cwbr_fused.inputs.stages import default_layers
from cwbr_fused.inputs.targets import Targets, read_targets
from cwbr_fused.operations import backends, distributed
from cwbr_fused.operations.autograd import OPERATIONS
from cwbr_fused.operations.backends import Backend
from cwbr_fused.operations.distributed import Group
from cwbr_fused.operations.reference import accumulation_dtype
from cwbr_fused.operations.warning import CWBRWarning

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Soft targets update the means of classes whose weights in the batch sum to this much.
LEAST_SOFT_WEIGHT = 0.5
# Layers that no gradient can reach any more.
DEAF = ("no graph", "too late")


class Means(NamedTuple):
    """Of the labelled samples of all processes, each (L,).

    accuracy: the share of samples that are nearest to the mean of their own class.
    fitted: the share of those that the model classifies right.
    squares: the squared length of the pull, over all samples, divided by `samples`.
    """

    accuracy: Tensor
    fitted: Tensor
    squares: Tensor
    samples: int


class CWBR(nn.Module):
    """Confusion-weighted Bhattacharyya regularization, balanced against the loss's own gradient.

    For a sample z of class y, per layer, with class means and the shared variance of a bank:

        E(z) = |z - mean_y|^2 / (2 var) - push * sum_j p_j |z - mean_j|^2 / (2 var)

    over the `confusions` classes j of largest softmax probability p_j other than y. Calling the
    module between forward and backward adds the gradient of E to that of the loss at the given
    features, as a share of it; nothing has to be added to the loss.

    Args:
        num_classes: C, the number of columns of the logits.
        ratio: length of the added gradient at each feature, relative to the incoming one, where
            the class means are fully trusted. It is multiplied by `4 h (1 - h) accuracy^4`: h the
            share of the batch that the model classifies right, accuracy the share whose own class
            mean is nearer than those of all classes they are confused with, at that layer and
            before the means move. A batch of one sample adds nothing.
        push: weight of the repulsion from confused classes; 0 only pulls, a balanced center loss.
        confusions: how many classes each sample is pushed from.
        momentum: of the class means, see `ClassBank`.
        pool: (B, ...) features to (B, D) vectors, differentiable; or a mapping of such callables by
            layer, whose keys are names or patterns such as "layers.*". None, and layers that the
            mapping lacks: `to_vec`, with its options as `catch` reads them from the model.
        backend: see `cwbr_fused.loss`.
        group: None, "world" or a `ProcessGroup`: the processes that share one bank. With
            DistributedDataParallel N processes x B/N samples then train as one process x B.
            All must call the module, and `backward`, at every step.

    The banks are made at the first call for each layer, and saved, loaded, moved and converted with
    the module: layer "layer3.0" has `banks.layer3/0.mean` and so on in the state_dict. A state
    without banks, as that of a new module, empties them. In `eval()` mode, and under `no_grad`, the
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
        pool: Pool | Mapping[str, Pool] | None = None,
        backend: Backend = "auto",
        group: Group = None,
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
        self.momentum = momentum
        self._pools = Pools(pool)
        self.backend, self.group = backend, group
        self.banks = Banks(num_classes)
        self._records: dict[str, Record] = {}
        self._catchers = Catchers()

    def forward(
        self,
        features: FeatureCatcher | Tensor | Sequence[Tensor] | Mapping[str, Tensor],
        logits: Tensor,
        targets: Tensor,
    ) -> Tensor:
        """Arranges for the gradient, updates the banks, and returns the energy for logging.

        Args:
            features: what `catch` returned; or a tensor, a sequence or a mapping of layer outputs
                *through which the loss flows*: what the model itself goes on with, not a copy or a
                pooled view of it.
            logits: (B, C).
            targets: (B,) integer classes, or (B, C) soft targets >= 0 (label smoothing, mixup,
                CutMix), of which the classes above the floor of each row count, at most four; rows
                of zeros are unlabelled samples. See `cwbr_fused.inputs.targets`.

        Returns:
            The mean of E / D over samples and layers, a scalar without gradient; 0 while no class
            has been seen before. Distances are in units of the shared variance, so it is near 1/2
            where no class is confused, and falls as confused classes come to lie farther away.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        given = read_targets(logits, targets)
        processes = self._processes()
        if logits.shape[1] != self.num_classes:
            raise ValueError(
                f"logits: expected C = num_classes = {self.num_classes} columns, "
                f"got {validation.describe(logits)}"
            )
        layers = validation.named_layers(features, logits)
        backend = backends.resolve(self.backend, logits.device.type)
        pooled = {name: self._pools.pooled(name, layer) for name, layer in layers.items()}
        banks = {name: self.banks.of(name, z, layers) for name, (_, z, _) in pooled.items()}
        seen = torch.stack([bank.count for bank in banks.values()]).all(0)
        acting = self._acting(backend, logits.detach(), given, seen)
        train = self.training and torch.is_grad_enabled()
        reasons = self._reasons(layers) if train else {}

        energies = []
        for together in grouped(banks, {name: z for name, (_, z, _) in pooled.items()}):
            moments = self._moments(backend, together.z, given, processes) if train else None
            pull, numbers = together.measure(acting, self.push, moments, self.momentum, backend)
            energies.append(numbers[0])
            if train:
                means = _over_samples(numbers, given, processes)
                reached = {n: p for n, p in pooled.items() if reasons[n] not in DEAF}
                for name, balance in self._balances(together, pull, means, reached, processes):
                    register_hook(layers[name], balance, logits)
        energy = energies[0] if len(energies) == 1 else torch.cat(energies)
        return energy.mean() if energy.numel() else energy.sum()

    @property
    def pool(self) -> Pool | Mapping[str, Pool] | None:
        """How features become vectors, where not as the model says."""
        return self._pools.pool

    def catch(
        self, model: nn.Module, layers: Iterable[str | nn.Module] | None = None
    ) -> FeatureCatcher:
        """Catches features of a model, to be passed to this module, also when it is compiled.

        Without names it takes the ends of the last three stages of a CNN, or three late blocks of
        a transformer, by the rule in `cwbr_fused.inputs.stages`; `print(cwbr)` shows which.

        The model gets forward hooks and nothing else; `remove` of the catcher takes them away. Call
        it before the compiled model is first called; of a compiled model, or one in
        DistributedDataParallel, the names of the original are meant.

        Args:
            model: where to look the layers up.
            layers: dotted names of modules in it, patterns such as "layer*", or the modules.

        Raises:
            TypeError, ValueError: as `FeatureCatcher`, which then leaves the model as it was; or a
                layer of that name of another model is being caught by this module; or no names
                are given and none can be chosen.
        """
        catcher = self._catchers.add(model, default_layers(model) if layers is None else layers)
        self._pools.read(model, catcher.names)
        return catcher

    def health(self) -> dict[str, dict[str, float]]:
        """What the latest backward pass met at each layer; waits for the device.

        Returns:
            By layer: "ce_norm", the length of the loss's gradient at the feature; "reg_norm", that
            of what was added; "cosine" between the two, measured in the first two of every 16
            backward passes; "accuracy" of the nearest class mean at the layer, and the "trust" that
            follows, see `trust.strength`: "reg_norm" is `ratio * trust * ce_norm`. A trust that
            stays near 0 means that CWBR does next to nothing at that layer. Usual are an accuracy
            that rises from the first to the last layer and a cosine that is not far below 0.
            Layers that no gradient reached are absent.
        """
        numbers = {name: record.numbers() for name, record in self._records.items()}
        return {name: n for name, n in numbers.items() if n}

    def extra_repr(self) -> str:
        return (
            f"{self.num_classes}, ratio={self.ratio}, push={self.push}, "
            f"confusions={self.confusions}, momentum={self.momentum}, backend={self.backend!r}"
            f"{self._catchers}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CWBR:
        super()._apply(fn, recurse)
        self.banks.apply(fn)
        return self

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Those of the banks; a module that contains this one does not list them."""
        for layer, bank in self.banks.items():
            start = f"{prefix}." if prefix else ""
            yield from bank.named_buffers(f"{start}banks.{layer}", recurse, remove_duplicate)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        self.banks.save(destination, f"{prefix}banks.", keep_vars)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        start = f"{prefix}banks."
        own = {name: value for name, value in state_dict.items() if name.startswith(start)}
        rest = {name: value for name, value in state_dict.items() if name not in own}
        super()._load_from_state_dict(rest, prefix, *args, **kwargs)
        self.banks.load(own, start, *args, **kwargs)

    def _processes(self) -> ProcessGroup | None:
        if self.group is None:
            return None
        return distributed.process_group(self.group)

    def _acting(self, backend: str, logits: Tensor, targets: Targets, seen: Tensor) -> Acting:
        """The classes that act on each sample."""
        labels, shares = targets
        rivals, weight, own = OPERATIONS[backend].top_confusions(
            logits, targets.main, seen, self.confusions
        )
        if shares is None:
            return Acting(labels, weight[:, :0], own, rivals, weight, seen)
        mass = shares.sum(1, keepdim=True).clamp(min=torch.finfo(shares.dtype).tiny)
        return Acting(labels, shares / mass, own, rivals, weight, seen)

    def _moments(
        self, backend: str, z: Tensor, targets: Targets, processes: ProcessGroup | None
    ) -> Moments:
        """What the batch has of its classes, of all layers side by side."""
        dtype = accumulation_dtype(z.dtype)
        if targets.shares is None and processes is None:
            operations = OPERATIONS[backend]
            order, offsets, classes = operations.group_by_class(targets.main, 1)
            size = torch.sub(offsets[1:], offsets[:-1], out=z.new_empty(len(classes), dtype=dtype))
            return Moments(classes, size, *operations.class_moments(z, order, offsets, 0.0))
        least = 1 if targets.shares is None else LEAST_SOFT_WEIGHT
        members = membership.of_targets(targets, self.num_classes, least, dtype, processes)
        with torch.no_grad():
            ((mean, var),) = membership.class_moments([z], members, 0.0, backend)
        return Moments(members.classes, members.counts, mean, var)

    def _balances(
        self,
        together: Together,
        pull: Tensor,
        means: Means,
        pooled: Mapping[str, Pooled],
        processes: ProcessGroup | None,
    ) -> Iterator[tuple[str, Balance]]:
        """What adds to the gradient of each layer, as far as its class means can be trusted.

        `pooled`: of the layers that a gradient can reach.
        """
        strength = trust.strength(means.accuracy, means.fitted)
        pulls = together.split(pull)
        # Of the length that is wanted, but for a number and the copies that unpooling makes.
        scaled = together.split(pull, strength * means.squares.rsqrt())
        scale = self.ratio * means.samples**-0.5
        for layer, name in enumerate(together.names):
            if name not in pooled:
                continue
            trusted = means.accuracy[layer], strength[layer], self.ratio
            if pooled[name].options is not None:
                spread = pooled[name].spread(scaled[layer])
                yield name, Balance(spread, scale, trusted, self._records[name], processes)
            else:  # what the callable makes of the length has to be measured
                spread = of_length(strength[layer], pooled[name].spread(pulls[layer]), processes)
                yield name, Balance(spread, self.ratio, trusted, self._records[name], processes)

    def _reasons(self, layers: Mapping[str, Tensor]) -> dict[str, Reason | None]:
        """Why this call has no effect on a layer, or the latest ones had none; says so once."""
        reasons: dict[str, Reason | None] = {}
        news: dict[Reason, list[str]] = {}
        for name, layer in layers.items():
            record = self._records.setdefault(name, Record())
            reasons[name] = reason = record.reason(layer)
            if reason is not None and record.is_news(reason):
                news.setdefault(reason, []).append(name)
        for reason, names in news.items():
            warnings.warn(
                f"CWBR has no effect on {', '.join(names)}: {EXPLANATIONS[reason]}",
                CWBRWarning,
                stacklevel=5,  # the caller of the module
            )
        return reasons


def _over_samples(numbers: Tensor, targets: Targets, processes: ProcessGroup | None) -> Means:
    """From the numbers (4, L, B) of this process."""
    batch = numbers.shape[2]
    if targets.shares is None and processes is None and batch > 0:
        _, accuracy, fitted, squares = numbers.mean(2)
        return Means(accuracy, fitted, squares, samples=batch)
    sums = numbers.sum(2)
    labelled = torch.ones_like(numbers[0, :1])
    if targets.shares is not None:
        labelled = (targets.shares[:, :1] > 0).to(numbers.dtype)
    sums = torch.cat([sums.flatten(), labelled.sum()[None]])
    if processes is not None:
        sums = distributed.all_reduce(sums, processes)
    _, nearest, right, squares = sums[:-1].view(4, -1)
    samples = sums[-1].clamp(min=1)
    return Means(nearest / samples, right / samples, squares, samples=1)
