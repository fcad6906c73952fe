"""The recommended regularizer: its gradient, its balance, its bank and its manners."""

from __future__ import annotations

import copy
import pickle
import warnings
import weakref
from typing import Any

import pytest
import torch
from cwbr_models import CLASSES, Network, batch, feature_gradients, warmed_up
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from cwbr_fused import CWBR, FeatureCatcher, to_vec
from cwbr_fused.balanced.balance import COSINE_EVERY
from cwbr_fused.balanced.bank import ClassBank
from cwbr_fused.operations import reference_bank
from cwbr_fused.operations.warning import CWBRWarning


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    return Network()


def test_added_gradient_has_the_promised_length(network: Network) -> None:
    cwbr = CWBR(CLASSES, ratio=0.8)  # a fresh one measures the cosine
    cwbr.load_state_dict(warmed_up(network).state_dict())
    plain = feature_gradients(network, None)
    balanced = feature_gradients(network, cwbr)
    trust = cwbr.health()["body"]["trust"]
    assert trust > 0
    # The last layer: nothing behind it was changed, so its incoming gradient is the plain one.
    added = balanced["body"] - plain["body"]
    torch.testing.assert_close(added.norm(), 0.8 * trust * plain["body"].norm())
    health = cwbr.health()
    torch.testing.assert_close(health["body"]["ce_norm"], plain["body"].norm().item())
    torch.testing.assert_close(health["body"]["reg_norm"], added.norm().item())
    cosine = torch.cosine_similarity(added.flatten(), plain["body"].flatten(), dim=0)
    torch.testing.assert_close(health["body"]["cosine"], cosine.item(), rtol=1e-4, atol=1e-6)


def test_the_cosine_is_measured_now_and_then(network: Network) -> None:
    cwbr = CWBR(CLASSES)
    cosines = []
    for seed in range(COSINE_EVERY + 2):
        images, targets = batch(seed)
        logits, features = network(images)
        cwbr(features, logits, targets)
        cross_entropy(logits, targets).backward()
        cosines.append(cwbr.health()["body"]["cosine"])
    assert cosines[0] == 0 != cosines[1]
    assert set(cosines[2:COSINE_EVERY]) == {cosines[1]}
    assert len({*cosines}) == 4


def test_added_gradient_points_along_the_energy(network: Network) -> None:
    cwbr = warmed_up(network)
    images, targets = batch()
    with torch.no_grad():
        logits, features = network(images)
    bank = copy.deepcopy(cwbr.banks["body"])
    plain = feature_gradients(network, None)["body"]
    added = feature_gradients(network, cwbr)["body"] - plain
    assert isinstance(bank, ClassBank)
    index, weight, _ = reference_bank.top_confusions(logits, targets, bank.count > 0, 5)
    pull = features["body"] - bank.mean[targets]
    push = (weight[:, :, None] * (features["body"][:, None] - bank.mean[index])).sum(1)
    energy_gradient = (pull - push) / cwbr.banks["body"].metric()
    direction = energy_gradient / energy_gradient.norm()
    torch.testing.assert_close(added / added.norm(), direction, rtol=1e-4, atol=1e-6)


def test_a_scaled_loss_scales_everything(network: Network) -> None:
    cwbr = warmed_up(network)
    once = feature_gradients(network, copy.deepcopy(cwbr))
    scaled = feature_gradients(network, cwbr, scale=1024)
    for name in once:
        torch.testing.assert_close(scaled[name], 1024 * once[name])


def test_batches_of_one_sample_per_class_serve(network: Network) -> None:
    cwbr = CWBR(CLASSES)
    targets = torch.arange(CLASSES)
    for seed in range(3):
        images, drawn = batch(seed, CLASSES)
        images += (targets - drawn)[:, None, None, None]
        logits, features = network(images)
        cwbr(features, logits, targets)
        cross_entropy(logits, targets).backward()
    assert cwbr.health()["conv"]["reg_norm"] > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_samples_that_are_not_finite_never_reach_the_bank(network: Network, bad: float) -> None:
    cwbr = warmed_up(network)
    images, targets = batch()
    images[3] = bad
    logits, features = network(images)
    cwbr(features, logits, targets)
    for buffer in cwbr.buffers():
        assert buffer.isfinite().all()
    logits, features = network(batch()[0])
    assert cwbr(features, logits, targets).isfinite()


def test_measuring_changes_nothing(network: Network) -> None:
    cwbr = warmed_up(network)
    before = copy.deepcopy(cwbr.state_dict())
    images, targets = batch()
    logits, features = network(images)
    cwbr.eval()(features, logits, targets)
    with torch.no_grad():
        cwbr.train()(features, logits, targets)
    for name, value in cwbr.state_dict().items():
        assert torch.equal(value, before[name])


def test_state_goes_into_a_fresh_module_and_on(network: Network) -> None:
    cwbr = warmed_up(network)
    fresh = CWBR(CLASSES)
    fresh.load_state_dict(cwbr.state_dict())
    ours, theirs = feature_gradients(network, cwbr), feature_gradients(network, fresh)
    for name in ours:
        assert torch.equal(ours[name], theirs[name])
    assert set(cwbr.state_dict()) == set(fresh.state_dict())
    assert "banks.conv.mean" in cwbr.state_dict()


def test_dotted_layer_names_are_keys_of_the_state() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), nn.Linear(4, CLASSES))
    cwbr = CWBR(CLASSES)
    with FeatureCatcher(model, ["0.1"]) as catcher:
        logits = model(torch.randn(8, 3))
        cwbr(catcher.feats, logits, torch.arange(8) % CLASSES)
    assert "banks.0/1.mean" in cwbr.state_dict()


@pytest.mark.parametrize("detached", [False, True])
def test_a_feature_beside_the_path_of_the_loss_is_reported_once(
    network: Network, detached: bool
) -> None:
    cwbr = CWBR(CLASSES)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(8):
            images, targets = batch()
            logits, features = network(images)
            beside = features["conv"].detach() if detached else to_vec(features["conv"]) * 1
            cwbr({"copy": beside}, logits, targets)
            cross_entropy(logits, targets).backward()
    (warning,) = caught
    assert "no effect on copy" in str(warning.message)
    assert warning.category is CWBRWarning
    assert warning.filename == __file__


def test_features_without_gradient_are_left_alone(network: Network) -> None:
    cwbr = warmed_up(network)
    images, targets = batch()
    with torch.no_grad():
        _, features = network(images)
    logits = network.head(features["body"])
    cwbr(features, logits, targets)
    cross_entropy(logits, targets).backward()


def test_half_precision_features_keep_their_dtype(network: Network) -> None:
    cwbr = CWBR(CLASSES)
    for seed in range(3):
        images, targets = batch(seed)
        with torch.autocast("cpu", torch.bfloat16):
            logits, features = network(images)
        assert features["body"].dtype == torch.bfloat16
        features["body"].retain_grad()
        cwbr(features, logits, targets)
        cross_entropy(logits.float(), targets).backward()
    gradient = features["body"].grad
    assert gradient is not None
    assert gradient.dtype == torch.bfloat16
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"num_classes": 0}, "num_classes"),
        ({"num_classes": 3, "ratio": -1}, "ratio"),
        ({"num_classes": 3, "ratio": float("nan")}, "ratio"),
        ({"num_classes": 3, "push": 1.5}, "push"),
        ({"num_classes": 3, "momentum": 2}, "momentum"),
        ({"num_classes": 3, "confusions": 0}, "confusions"),
        ({"num_classes": 3, "backend": "gpu"}, "backend"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        CWBR(**options)  # type: ignore[arg-type]


def test_bad_batches_are_named(network: Network) -> None:
    images, targets = batch()
    logits, features = network(images)
    with pytest.raises(ValueError, match=r"logits.*num_classes = 7"):
        CWBR(7)(features, logits, targets)
    with pytest.raises(ValueError, match="pool"):
        CWBR(CLASSES, pool=lambda x: x)(features, logits, targets)
    cwbr = CWBR(CLASSES)
    cwbr(features["body"], logits, targets)
    with pytest.raises(ValueError, match=r"features.*D = 8"):
        cwbr(features["conv"], logits, targets)


def test_grad_scaler_skips_a_broken_batch_and_goes_on(network: Network) -> None:
    cwbr = warmed_up(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    moved = []
    for broken in (False, True, False):
        images, targets = batch(7)
        if broken:
            images[0] = float("inf")
        before = torch.cat([p.detach().flatten() for p in network.parameters()])
        with torch.autocast("cpu", torch.float16):
            logits, features = network(images)
            ce = cross_entropy(logits, targets)
        cwbr(features, logits, targets)
        optimizer.zero_grad()
        scaler.scale(ce).backward()
        scaler.step(optimizer)
        scaler.update()
        after = torch.cat([p.detach().flatten() for p in network.parameters()])
        assert after.isfinite().all()
        moved.append(not torch.equal(before, after))
    assert moved == [True, False, True]
    assert all(buffer.isfinite().all() for buffer in cwbr.buffers())


def test_gradients_of_micro_batches_accumulate(network: Network) -> None:
    cwbr = warmed_up(network)
    twin = copy.deepcopy(cwbr)
    separate = []
    for seed in (8, 9):
        images, targets = batch(seed)
        logits, features = network(images)
        cwbr(features, logits, targets)
        network.zero_grad()
        (cross_entropy(logits, targets) / 2).backward()
        separate.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
    network.zero_grad()
    for seed in (8, 9):
        images, targets = batch(seed)
        logits, features = network(images)
        twin(features, logits, targets)
        (cross_entropy(logits, targets) / 2).backward()
    for parameter, first, second in zip(network.parameters(), *separate, strict=True):
        torch.testing.assert_close(parameter.grad, first + second)


def test_copies_and_pickles_go_on_like_the_original(network: Network) -> None:
    cwbr = warmed_up(network)
    expected = feature_gradients(network, copy.deepcopy(cwbr))
    for twin in (copy.deepcopy(cwbr), pickle.loads(pickle.dumps(cwbr))):
        for name, gradient in feature_gradients(network, twin).items():
            assert torch.equal(gradient, expected[name])


def test_it_leaves_its_arguments_and_no_memory_behind(network: Network) -> None:
    cwbr = warmed_up(network)
    images, targets = batch()
    logits, features = network(images)
    before = [t.detach().clone() for t in (*features.values(), logits, targets)]
    watched = weakref.ref(features["conv"])
    cwbr(features, logits, targets)
    for tensor, copied in zip((*features.values(), logits, targets), before, strict=True):
        assert torch.equal(tensor, copied)
    cross_entropy(logits, targets).backward()
    del features, logits, tensor
    assert watched() is None


@pytest.mark.parametrize("size", [0, 1])
def test_tiny_batches_are_no_error(network: Network, size: int) -> None:
    cwbr = warmed_up(network)
    images, targets = batch(0, 12)
    logits, features = network(images[:size])
    cwbr(features, logits, targets[:size])
    logits.sum().backward()
    assert all(buffer.isfinite().all() for buffer in cwbr.buffers())


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_targets_of_other_integer_dtypes(network: Network, dtype: torch.dtype) -> None:
    expected = feature_gradients(network, warmed_up(network))
    cwbr = warmed_up(network)
    images, targets = batch()
    logits, features = network(images)
    features["body"].retain_grad()
    cwbr(features, logits, targets.to(dtype))
    cross_entropy(logits, targets).backward()
    assert features["body"].grad is not None
    torch.testing.assert_close(features["body"].grad, expected["body"])


class Allocations(TorchDispatchMode):
    """Notes the largest storage that comes into being, in elements."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor) and value.data_ptr() not in {
                t.data_ptr() for t in args if isinstance(t, Tensor)
            }:
                storage = value.untyped_storage().nbytes() // value.element_size()
                self.largest = max(self.largest, storage)
        return result


def test_a_step_allocates_no_class_by_class_matrix() -> None:
    classes, size, dims = 3000, 16, 8
    cwbr = CWBR(classes)
    z, weight = torch.randn(size, dims), torch.randn(dims, classes)
    for _ in range(3):
        feature = z.clone().requires_grad_()
        logits, targets = feature @ weight, torch.randint(classes, (size,))
        ce = cross_entropy(logits, targets)
        with Allocations() as seen:
            cwbr(feature, logits, targets)
        with seen:
            ce.backward()
    assert cwbr.health()["features"]["reg_norm"] >= 0
    assert seen.largest <= size * classes
