"""The class bank of CWBR: its two operations, its moving means and variances."""

from __future__ import annotations

import torch
from one_layer import REFERENCE
from torch import Tensor

from cwbr_fused.balanced.bank import VARIANCE_FLOOR, VARIANCE_MOMENTUM, ClassBank
from cwbr_fused.operations import reference_bank


def learn(
    bank: ClassBank, classes: Tensor, size: Tensor, mean: Tensor, var: Tensor, momentum: float
) -> None:
    means, of_batch = (bank.mean, bank.count), (classes, size.to(mean.dtype), mean, var)
    settings = VARIANCE_MOMENTUM, VARIANCE_FLOOR
    weight, _ = REFERENCE("observe_classes", *means, bank.var, bank.updates, *of_batch, *settings)
    REFERENCE("follow_classes", *means, classes, weight, mean, momentum)


def test_gradient_of_the_energy_is_what_autograd_finds() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(7, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    mean = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    var = torch.rand(5, generator=generator, dtype=torch.float64) + 0.1
    index = torch.randint(-1, 4, (7, 3), generator=generator)
    coefficient = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    energy, gradient = REFERENCE("class_attraction", z, mean, var, index, coefficient)
    (expected,) = torch.autograd.grad(energy.sum(), z)
    torch.testing.assert_close(gradient, expected)


def test_energy_is_eight_bhattacharyya_distances_halved() -> None:
    z, mean = torch.randn(1, 5).double(), torch.randn(1, 5).double()
    var = torch.rand(5).double() + 0.1
    distance = ((z - mean) ** 2 / (8 * var)).sum()
    one = torch.ones(1, 1).double()
    energy, _ = REFERENCE("class_attraction", z, mean, var, torch.zeros(1, 1).long(), one)
    torch.testing.assert_close(energy[0], 4 * distance)


def test_confusions_are_the_most_probable_other_seen_classes() -> None:
    logits = torch.tensor([[5.0, 4.0, 3.0, 3.0, 1.0], [0.0, 9.0, 2.0, 2.0, 1.0]])
    seen = torch.tensor([True, True, False, True, True])
    index, weight, own = reference_bank.top_confusions(logits, torch.tensor([0, 1]), seen, 2)
    assert index.tolist() == [[1, 3], [3, 4]]
    torch.testing.assert_close(weight, logits.softmax(1).gather(1, index))
    torch.testing.assert_close(own, logits.softmax(1)[[0, 1], [0, 1]])


def test_ties_go_to_the_smaller_class_and_missing_candidates_are_marked() -> None:
    logits = torch.zeros(2, 4)
    seen = torch.tensor([True, False, True, True])
    index, weight, _ = reference_bank.top_confusions(logits, torch.tensor([2, 0]), seen, 3)
    assert index.tolist() == [[0, 3, -1], [2, 3, -1]]
    assert weight.tolist() == [[0.25, 0.25, 0.0]] * 2


def test_bank_averages_first_and_then_follows() -> None:
    bank = ClassBank(3, 1)
    for value in (1.0, 2.0, 3.0, 4.0, 8.0):
        one = torch.tensor([1])
        learn(bank, one, one, torch.tensor([[value]]), torch.zeros(1, 1), momentum=0.75)
    average = (1 + 2 + 3 + 4) / 4
    torch.testing.assert_close(bank.mean[1, 0].item(), average + 0.25 * (8 - average))
    assert bank.mean[[0, 2]].eq(0).all()
    assert bank.count.tolist() == [0, 5, 0]


def test_bank_variance_approaches_that_within_the_classes() -> None:
    generator = torch.Generator().manual_seed(0)
    bank = ClassBank(2, 3)
    sigma, centres = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([[-50.0], [50.0]])
    for _ in range(400):
        samples = centres + sigma * torch.randn(2, 3, generator=generator)
        learn(bank, torch.arange(2), torch.ones(2), samples, torch.zeros(2, 3), momentum=0.9)
    # About a mean that moves by a tenth: larger by 1 + 0.1 / 1.9.
    torch.testing.assert_close(bank.var / sigma**2, torch.full((3,), 1.05), rtol=0.35, atol=0)


def test_moments_whose_squares_overflow_change_nothing() -> None:
    bank = ClassBank(2, 2)
    ordinary = torch.tensor([[1.0, 2.0]]), torch.ones(1, 2)
    for mean, var in (ordinary, (torch.full((1, 2), 1e19), torch.zeros(1, 2)), ordinary):
        learn(bank, torch.tensor([0]), torch.tensor([1]), mean, var, momentum=0.5)
    assert bank.count.tolist() == [2, 0]
    assert bank.mean[0].tolist() == [1, 2]
    assert bank.var.tolist() == [1, 1]


def test_distances_are_euclidean_while_no_variance_is_known() -> None:
    bank = ClassBank(2, 3)
    assert bank.metric().tolist() == [1, 1, 1]
    bank.var.copy_(torch.tensor([0.0, 2.0, 4.0]))
    torch.testing.assert_close(bank.metric(), torch.tensor([0.002, 2.002, 4.002]))
