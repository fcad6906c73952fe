"""Threads, forks and copies: the package has no state that they could share or lose."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import cwbr_fused
from cwbr_fused import CWBR, ConfusionWeightedBhatReg, FeatureCatcher, PKSampler, backends
from cwbr_fused.integrations.metric_learning import CWBRLoss

BACKENDS = [
    name
    for name in backends.NAMES
    # Triton's interpreter patches the language while a kernel runs; kernels on a GPU do not.
    if backends.rejection(name, "cpu") is None and name != "triton"
]
FORK_TIMEOUT = 60.0


def case(index: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """A batch that no two indices share, large enough that the kernels use several threads."""
    generator = torch.Generator().manual_seed(index)
    features = [torch.randn(64 + index, d, generator=generator) / 8 for d in (300, 700)]
    logits = torch.randn(64 + index, 40, generator=generator)
    return features, logits, torch.randint(16, (64 + index,), generator=generator)


def step(index: int, backend: str, top_m: int | None = 64) -> list[Tensor]:
    """Value and gradients."""
    features, logits, targets = case(index)
    leaves = [z.requires_grad_() for z in features]
    value = cwbr_fused.loss(leaves, logits, targets, backend=backend, top_m=top_m)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0)


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("top_m", [64, None])
@pytest.mark.parametrize("backend", BACKENDS)
def test_eight_threads_at_once_get_what_one_gets(backend: str, top_m: int | None) -> None:
    expected = [step(index, backend, top_m) for index in range(8)]
    start = threading.Barrier(8, timeout=30)

    def work(index: int) -> list[list[Tensor]]:
        start.wait()
        return [step(index, backend, top_m) for _ in range(4)]

    with ThreadPoolExecutor(8) as pool:
        for index, results in enumerate(pool.map(work, range(8), timeout=60)):
            for result in results:
                assert_same(result, expected[index])


def bank_steps(index: int, backend: str) -> list[Tensor]:
    """Gradients of two steps with a bank, and the bank."""
    features, logits, targets = case(index)
    cwbr, grads = CWBR(40, backend=backend), []
    for _ in range(2):
        leaves = [z.detach().requires_grad_() for z in features]
        passed_on = [z.tanh() for z in leaves]
        cwbr(passed_on, logits, targets)
        grads += torch.autograd.grad(sum(z.square().mean() for z in passed_on), leaves)
    return [*grads, *cwbr.state_dict().values()]


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("backend", BACKENDS)
def test_eight_threads_with_a_bank_each_get_what_one_gets(backend: str) -> None:
    expected = [bank_steps(index, backend) for index in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for index, actual in enumerate(pool.map(bank_steps, range(8), [backend] * 8, timeout=60)):
            assert_same(actual, expected[index])


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_may_run_in_another_thread_than_forward(backend: str) -> None:
    features, logits, targets = case(0)
    leaves = [z.requires_grad_() for z in features]
    value = cwbr_fused.loss(leaves, logits, targets, backend=backend)
    with ThreadPoolExecutor(1) as pool:
        grads = pool.submit(torch.autograd.grad, value, leaves).result(timeout=60)
    assert_same([value.detach(), *grads], step(0, backend))


class Steps(Dataset[Tensor]):
    """Item i is the value of batch i, computed where it is asked for."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        return torch.cat([t.flatten() for t in step(index, self.backend)])


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("backend", BACKENDS)
def test_forked_loader_workers_compute_after_the_parent_did(backend: str) -> None:
    expected = [torch.cat([t.flatten() for t in step(i, backend)]) for i in range(4)]
    loader = DataLoader(
        Steps(backend),
        batch_size=None,
        num_workers=2,
        multiprocessing_context="fork",
        timeout=FORK_TIMEOUT,
    )
    for actual, wanted in zip(loader, expected, strict=True):
        # A worker has one thread, the parent two.
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0)


def _child(backend: str, results: multiprocessing.SimpleQueue[list[list[float]]]) -> None:
    torch.set_num_threads(1)  # as torch's own loader does: a forked OpenMP pool has no threads
    results.put([t.flatten().tolist() for t in step(1, backend)])


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_forked_process_computes_after_the_parent_did(backend: str) -> None:
    expected = [t.flatten().tolist() for t in step(1, backend)]
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    process = context.Process(target=_child, args=(backend, results), daemon=True)
    process.start()
    received = []
    reader = threading.Thread(target=lambda: received.append(results.get()), daemon=True)
    reader.start()
    reader.join(FORK_TIMEOUT)
    hung = reader.is_alive()
    if hung:
        process.kill()
    process.join()
    assert not hung
    assert received == [expected]


class Model(nn.Module):
    """A network that holds its regularizer, as users do."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(5, 6), nn.Linear(6, 4)
        self.regularizer = ConfusionWeightedBhatReg(["body"], top_m=3, objective="log_overlap")
        self.metric = CWBRLoss(self.head, num_classes=4, form="published", top_m=2)
        self.catcher = FeatureCatcher(self, ["body"])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        logits = self.head(self.body(x).relu())
        feature = self.catcher.feats["body"]
        reg: Tensor = self.regularizer(self.catcher.feats, logits, y) + self.metric(feature, y)
        self.catcher.clear()
        return reg


def copies(model: Model) -> list[Model]:
    """By deepcopy, pickle and torch.save; each with hooks of its own."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ]


def test_copies_of_a_model_regularize_alike_and_apart() -> None:
    torch.manual_seed(0)
    model, x, y = Model(), torch.randn(12, 5), torch.arange(12) % 4
    expected = model(x, y)
    for twin in copies(model):
        torch.testing.assert_close(twin(x, y), expected, rtol=0, atol=0)
        # The copied adapter reads the copied head, not the original's.
        assert twin.metric._classifier[0] is twin.head
        twin.head.weight.data.zero_()
        torch.testing.assert_close(model(x, y), expected, rtol=0, atol=0)


def test_modules_add_nothing_to_the_state_dict() -> None:
    model = Model()
    assert set(model.state_dict()) == {"body.weight", "body.bias", "head.weight", "head.bias"}
    assert not list(model.regularizer.buffers())
    model.load_state_dict(model.state_dict())


def test_a_copied_sampler_goes_on_alike() -> None:
    sampler = PKSampler([0, 0, 1, 1, 2, 2, 2] * 3, 2, 2, seed=5)
    sampler.set_epoch(3)
    twins = copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))
    expected = list(sampler)
    assert all(list(twin) == expected for twin in twins)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_call_changes_no_global_state_of_torch(backend: str) -> None:
    step(0, backend)

    def state() -> tuple[object, ...]:
        return (
            torch.get_rng_state().tolist(),
            torch.get_num_threads(),
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            torch.tensor([1e-39]).mul(1).tolist(),  # flushed to 0 were denormals disabled
            sorted(name for name, _ in nn.Module().named_modules()),
        )

    before = state()
    step(0, backend)
    step(1, backend, top_m=None)
    with pytest.raises(ValueError, match="top_m"):
        step(0, backend, top_m=0)
    assert state() == before


@pytest.mark.parametrize("backend", BACKENDS)
def test_calls_in_any_order_and_number_give_the_same_bits(backend: str) -> None:
    first = [step(index, backend) for index in range(4)]
    for index in (3, 1, 1, 0, 2):
        assert_same(step(index, backend), first[index])
