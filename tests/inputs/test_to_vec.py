"""to_vec on vectors, maps and tokens: hand-computed; spread is its backward pass but for length."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cwbr_fused.inputs.pooling import spread, to_vec


def test_a_vector_passes_through_without_a_copy() -> None:
    feat = torch.randn(3, 4)
    assert to_vec(feat) is feat


def test_a_map_is_averaged_over_height_and_width() -> None:
    feat = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]], [[0.0, 0.0], [0.0, 4.0]]]])
    assert to_vec(feat).tolist() == [[3.0, 1.0]]


def test_a_channels_last_map_is_averaged_over_its_own_height_and_width() -> None:
    feat = torch.tensor([[[[1.0, 0.0], [2.0, 0.0]], [[3.0, 0.0], [6.0, 4.0]]]])
    assert to_vec(feat, channels_last=True).tolist() == [[3.0, 1.0]]


def test_the_channels_last_memory_format_does_not_change_the_result() -> None:
    feat = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(
        to_vec(feat.contiguous(memory_format=torch.channels_last)), to_vec(feat)
    )


def test_tokens_give_the_cls_token_or_the_mean_behind_the_prefix() -> None:
    feat = torch.tensor([[[9.0, 9.0], [7.0, 7.0], [1.0, 2.0], [3.0, 6.0]]])
    assert to_vec(feat).tolist() == [[9.0, 9.0]]
    assert to_vec(feat, pool="cls", num_prefix_tokens=2).tolist() == [[9.0, 9.0]]
    assert to_vec(feat, pool="mean", num_prefix_tokens=2).tolist() == [[2.0, 4.0]]


def test_tokens_without_a_prefix_are_averaged() -> None:
    feat = torch.tensor([[[1.0, 2.0], [3.0, 6.0]]])
    assert to_vec(feat, num_prefix_tokens=0).tolist() == [[2.0, 4.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2, 3), (2, 4, 3), (2, 3, 4, 4)])
def test_the_dtype_is_kept(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert to_vec(torch.ones(shape, dtype=dtype), pool="mean").dtype is dtype


@pytest.mark.parametrize(
    ("shape", "keywords"),
    [
        ((2, 3), {}),
        ((2, 4, 3), {}),
        ((2, 4, 3), {"pool": "mean"}),
        ((2, 3, 2, 2), {}),
        ((2, 2, 2, 3), {"channels_last": True}),
    ],
)
def test_pooling_is_differentiable_and_traces_without_a_break(
    shape: tuple[int, ...], keywords: dict[str, Any], fresh_compiler: None
) -> None:
    feat = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: to_vec(z, **keywords), feat)
    compiled = torch.compile(lambda z: to_vec(z, **keywords), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(feat), to_vec(feat, **keywords))


@pytest.mark.parametrize(
    ("feat", "keywords", "error", "says"),
    [
        (torch.ones(3), {}, ValueError, r"\(B, D\).*shape \(3,\)"),
        (torch.ones(1, 2, 3, 4, 5), {}, ValueError, r"\(B, C, H, W\).*shape \(1, 2, 3, 4, 5\)"),
        (torch.ones(2, 3, 0, 4), {}, ValueError, r"positions.*\(2, 3, 0, 4\)"),
        (torch.ones(2, 0, 3), {}, ValueError, r"at least 1 tokens.*\(2, 0, 3\)"),
        (
            torch.ones(2, 4, 3),
            {"pool": "mean", "num_prefix_tokens": 4},
            ValueError,
            r"at least 5 tokens.*num_prefix_tokens=4",
        ),
        (
            torch.ones(2, 4, 3),
            {"pool": "cls", "num_prefix_tokens": 0},
            ValueError,
            "num_prefix_tokens: .*pool='cls', got 0",
        ),
        (torch.ones(2, 4, 3), {"num_prefix_tokens": -1}, ValueError, "num_prefix_tokens.*-1"),
        (torch.ones(2, 3), {"pool": "max"}, ValueError, "'max'"),
        (torch.ones(2, 3, dtype=torch.int64), {}, TypeError, "feat.*int64"),
        ((torch.ones(2, 3), torch.ones(2, 1, 3)), {}, TypeError, "feat.*tuple"),
    ],
)
def test_a_feature_that_cannot_be_pooled_is_named(
    feat: Any, keywords: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        to_vec(feat, **keywords)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((3, 4), {}),
        ((3, 6, 4), {}),
        ((3, 6, 4), {"pool": "cls", "num_prefix_tokens": 2}),
        ((3, 6, 4), {"pool": "mean", "num_prefix_tokens": 2}),
        ((3, 6, 4), {"num_prefix_tokens": 0}),
        ((3, 4, 2, 5), {}),
        ((3, 2, 5, 4), {"channels_last": True}),
    ],
)
def test_spread_is_the_backward_pass_of_to_vec_but_for_its_length(
    shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    feature = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(3, 4, dtype=torch.float64)
    (expected,) = torch.autograd.grad(to_vec(feature, **options), feature, grad)
    gradient, part = spread(grad, feature, **options)
    result = torch.zeros(shape, dtype=torch.float64)
    result[:, part] += gradient
    torch.testing.assert_close(result / result.norm(), expected / expected.norm())
