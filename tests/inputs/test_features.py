"""FeatureCatcher on torchvision- and timm-style models, plain and compiled."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections import OrderedDict
from typing import Any

import pytest
import torch
from models import ResNet, SwinLike, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cwbr_fused.inputs.features import FeatureCatcher
from cwbr_fused.inputs.pooling import to_vec


class Outer(nn.Module):
    """Calls ``body`` on its input, then sums."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(x)


class Gives(nn.Module):
    """Has whatever output the test wants."""

    def __init__(self, output: object) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor) -> Any:
        return self.output


def mlp() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


# ---- FeatureCatcher on models


def test_the_stages_of_a_resnet_are_caught_in_the_order_of_adding(images: Tensor) -> None:
    model = ResNet()
    catcher = FeatureCatcher(model, ["layer4.1", "layer2"]).add(model.layer3[-1], "third")
    logits = model(images)
    assert list(catcher.feats) == ["layer4.1", "layer2", "third"]
    assert [tuple(f.shape[1:]) for f in catcher.feats.values()] == [
        (24, 1, 1),
        (8, 4, 4),
        (16, 2, 2),
    ]
    torch.testing.assert_close(logits, model.fc(to_vec(catcher.feats["layer4.1"])))


def test_caught_features_carry_the_gradient_to_the_weights(images: Tensor) -> None:
    model: Any = ResNet()
    catcher = FeatureCatcher(model, ["layer2"])
    model(images)
    to_vec(catcher.feats["layer2"]).square().sum().backward()
    assert model.layer1[0].conv1.weight.grad.abs().sum() > 0
    assert model.layer3[0].conv1.weight.grad is None


@pytest.mark.parametrize(("class_token", "reg_tokens"), [(True, 0), (True, 3), (False, 0)])
def test_hooks_and_forward_intermediates_agree_on_a_vit(
    images: Tensor, class_token: bool, reg_tokens: int
) -> None:
    model = VisionTransformer(class_token=class_token, reg_tokens=reg_tokens)
    catcher = FeatureCatcher(model, ["blocks.1", "blocks.2"])
    final, maps = model.forward_intermediates(images, indices=2)
    tokens = model.forward_intermediates(
        images, indices=[1, -1], output_fmt="NLC", intermediates_only=True
    )
    assert final.shape == (2, int(class_token) + reg_tokens + 4, 8)
    for caught, a_map, patches in zip(catcher.feats.values(), maps, tokens, strict=True):
        pooled = to_vec(caught, pool="mean", num_prefix_tokens=model.num_prefix_tokens)
        torch.testing.assert_close(pooled, to_vec(a_map))
        torch.testing.assert_close(pooled, to_vec(patches, num_prefix_tokens=0))


def test_the_cls_vector_of_the_last_block_is_what_the_head_of_a_vit_sees(images: Tensor) -> None:
    model = VisionTransformer(reg_tokens=2)
    catcher = FeatureCatcher(model, ["blocks.2"])
    logits = model(images)
    vec = to_vec(catcher.feats["blocks.2"], num_prefix_tokens=model.num_prefix_tokens)
    torch.testing.assert_close(logits, model.head(model.norm(vec)))
    (_, prefix), *_ = model.forward_intermediates(
        images, indices=1, return_prefix_tokens=True, intermediates_only=True
    )
    torch.testing.assert_close(vec, prefix[:, 0])


def test_swin_maps_give_one_value_per_channel_when_told_channels_last(images: Tensor) -> None:
    model = SwinLike()
    catcher = FeatureCatcher(model, ["layers.0", "layers.1"])
    model(images)
    feats = [to_vec(f, channels_last=True) for f in catcher.feats.values()]
    assert [f.shape for f in feats] == [(2, 6), (2, 8)]
    torch.testing.assert_close(feats[0][1, 2], catcher.feats["layers.0"][1, :, :, 2].mean())


# ---- FeatureCatcher: life of hooks and features


def test_a_new_catcher_is_empty_and_a_module_without_a_name_is_numbered(x: Tensor) -> None:
    catcher = FeatureCatcher()
    assert catcher.feats == {}
    model = mlp()
    catcher.add(model[0]).add(model[2])
    model(x)
    assert list(catcher.feats) == ["Linear_0", "Linear_1"]


def test_no_feature_is_alive_after_clear(x: Tensor) -> None:
    model = mlp()
    catcher = FeatureCatcher(model, ["0", "1"])
    model(x).sum().backward()
    alive = [weakref.ref(f) for f in catcher.feats.values()]
    assert all(ref() is not None for ref in alive)
    catcher.clear()
    gc.collect()
    assert all(ref() is None for ref in alive)
    assert catcher.feats == {}
    model(x)
    assert list(catcher.feats) == ["0", "1"]


def test_the_latest_call_of_a_layer_wins(x: Tensor) -> None:
    model = mlp()
    catcher = FeatureCatcher(model, ["0"])
    model(x)
    model(x + 1)
    torch.testing.assert_close(catcher.feats["0"], model[0](x + 1))
    relu = nn.ReLU()
    twice = nn.Sequential(nn.Linear(4, 4), relu, nn.Linear(4, 4), relu)
    catcher.add_by_name(twice, "3")
    assert twice(x) is catcher.feats["3"]


def test_remove_ends_catching_and_keeps_what_was_caught(x: Tensor) -> None:
    model = mlp()
    catcher = FeatureCatcher(model, ["2", "0"])
    model(x)
    kept = catcher.feats
    catcher.remove()
    catcher.remove()
    model(x + 1)
    assert list(catcher.feats) == ["2", "0"]
    assert catcher.feats["0"] is kept["0"]
    assert all(not m._forward_hooks for m in model.modules())
    catcher.add(model[0], "0").add(model[2], "2")
    assert catcher.feats == {}
    model(x)
    assert list(catcher.feats) == ["0", "2"]


def test_the_context_removes_its_hooks_also_after_an_exception(x: Tensor) -> None:
    model = mlp()
    with FeatureCatcher(model, ["0"]) as catcher:
        model(x)
    assert not model[0]._forward_hooks
    assert list(catcher.feats) == ["0"]
    with pytest.raises(ZeroDivisionError), FeatureCatcher(model, ["0"]):
        raise ZeroDivisionError
    assert not model[0]._forward_hooks


def test_a_forward_that_raises_leaves_the_catcher_usable(x: Tensor) -> None:
    model = mlp()
    catcher = FeatureCatcher(model, ["0", "2"])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.randn(5, 7))
    assert catcher.feats == {}
    model(x)
    assert list(catcher.feats) == ["0", "2"]


@pytest.mark.parametrize("kind", [tuple, list, lambda p: OrderedDict(zip("ab", p, strict=True))])
def test_of_several_outputs_the_first_tensor_is_caught(kind: Any, x: Tensor) -> None:
    model = Outer(Gives(kind([None, x])))
    catcher = FeatureCatcher(model, ["body"])
    model(x)
    assert catcher.feats["body"] is x


@pytest.mark.parametrize("output", [None, (), {"a": None}, "text"])
def test_an_output_without_a_tensor_is_an_error_that_names_the_layer(
    output: object, x: Tensor
) -> None:
    model = Outer(Gives(output))
    FeatureCatcher(model, ["body"])
    with pytest.raises(TypeError, match=f"'body'.*{type(output).__name__}"):
        model(x)


def test_a_copied_or_unpickled_model_has_no_live_hooks(x: Tensor) -> None:
    model = mlp()
    catcher = FeatureCatcher(model, ["0"])
    plain = len(pickle.dumps(mlp()))
    model(torch.randn(10_000, 4))
    frozen = pickle.dumps(model)
    assert len(frozen) < plain + 1_000
    catcher.clear()
    for other in (copy.deepcopy(model), pickle.loads(frozen)):
        torch.testing.assert_close(other(x), model[2](model[1](nn.Linear.forward(model[0], x))))
    assert catcher.feats == {}
    model(x)
    assert list(catcher.feats) == ["0"]
    assert copy.deepcopy(catcher).feats == pickle.loads(pickle.dumps(catcher)).feats == {}


def test_recomputation_in_the_backward_is_not_caught(x: Tensor) -> None:
    model = mlp()
    catcher = FeatureCatcher(model, ["0"])
    out = checkpoint(model, x, use_reentrant=False)
    assert catcher.feats["0"].requires_grad
    catcher.clear()
    out.sum().backward()
    assert catcher.feats == {}
    assert model[0].weight.grad.abs().sum() > 0


# ---- FeatureCatcher: errors


def test_a_misspelt_layer_gives_the_similar_names() -> None:
    with pytest.raises(ValueError, match=r"of the ResNet, got 'layers4\.1'.*'layer4\.1'"):
        FeatureCatcher(ResNet(), ["layers4.1"])
    with pytest.raises(ValueError, match=r"got 'zzz'.*top-level.*'blocks', 'norm', 'head'"):
        FeatureCatcher().add_by_name(VisionTransformer(), "zzz")


def test_a_constructor_that_fails_leaves_no_hook_behind() -> None:
    model = mlp()
    with pytest.raises(ValueError, match=r"layers: .* got '7'"):
        FeatureCatcher(model, ["0", "7"])
    assert not model[0]._forward_hooks


def test_a_layer_that_did_not_run_is_named_with_those_that_did(x: Tensor) -> None:
    model, idle = mlp(), nn.Identity()
    catcher = FeatureCatcher(model, ["0", "1"]).add(idle, "idle")
    model(x)
    with pytest.raises(KeyError, match=r"expected 'idle', got '0', '1'.*has not run"):
        catcher.feats["idle"]
    with pytest.raises(KeyError, match="expected one of '0', '1', 'idle', got '2'"):
        catcher.feats["2"]
    assert "idle" not in catcher.feats
    assert catcher.feats.get("idle") is None


@pytest.mark.parametrize(
    ("build", "error", "says"),
    [
        (lambda new: new().add("layer4"), TypeError, "module.*str"),
        (lambda new: new().add(nn.ReLU(), 3), TypeError, "name.*int"),
        (lambda new: new().add(nn.ModuleList(), "m"), ValueError, "'m'.*ModuleList"),
        (
            lambda new: new().add(nn.ReLU(), "a").add(nn.ReLU(), "a"),
            ValueError,
            "name: .*other than 'a'",
        ),
        (lambda new: new().add_by_name("resnet18", "layer4"), TypeError, "model.*str"),
        (lambda new: new(mlp(), [0]), TypeError, "name.*int"),
        (lambda new: new(mlp(), "0"), TypeError, "layers.*'0'"),
        (lambda new: new(mlp()), ValueError, "layers: .*got 0 with Sequential"),
        (lambda new: new(layers=["0"]), ValueError, "layers: .*got 1 with NoneType"),
    ],
)
def test_wrong_arguments_are_named(build: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        build(FeatureCatcher)


# ---- FeatureCatcher under torch.compile


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("added", ["before compile", "after compile", "by name of compiled"])
def test_layers_added_before_the_first_compiled_call_are_caught_in_one_graph(
    backend: str, added: str, x: Tensor, fresh_compiler: None
) -> None:
    model = mlp()
    catcher = FeatureCatcher()
    if added == "before compile":
        catcher.add(model[0], "0")
    compiled: Any = torch.compile(model, backend=backend, fullgraph=True)
    if added == "after compile":
        catcher.add(model[0], "0")
    if added == "by name of compiled":
        catcher.add_by_name(compiled, "0")
    logits = compiled(x)
    (catcher.feats["0"].square().sum() + logits.sum()).backward()
    got = model[0].weight.grad.clone()
    model.zero_grad()
    hidden = nn.functional.linear(x, model[0].weight, model[0].bias)
    torch.testing.assert_close(catcher.feats["0"], hidden)
    (hidden.square().sum() + model[2](hidden.relu()).sum()).backward()
    torch.testing.assert_close(got, model[0].weight.grad)


def test_catching_and_clearing_never_recompile(x: Tensor, fresh_compiler: None) -> None:
    model = mlp()
    catcher = FeatureCatcher(model, ["0", "2"])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(x + 1)
        catcher.clear()
        logits = compiled(x + 2)
        assert catcher.feats["2"] is logits
        catcher.clear()
        compiled(x + 3)
    assert list(catcher.feats) == ["0", "2"]


def test_a_whole_training_step_with_the_catcher_inside_compiles(
    x: Tensor, fresh_compiler: None
) -> None:
    model = mlp()
    catcher = FeatureCatcher(model, ["0", "1"])

    def step(batch: Tensor) -> Tensor:
        logits: Tensor = model(batch)
        return logits.sum() + sum(to_vec(f).square().sum() for f in catcher.feats.values())

    expected = step(x)
    catcher.clear()
    torch.testing.assert_close(torch.compile(step, backend="eager", fullgraph=True)(x), expected)


def test_a_compiled_module_may_be_caught_itself_even_after_it_ran(
    x: Tensor, fresh_compiler: None
) -> None:
    model: Any = nn.Sequential(mlp(), nn.ReLU())
    model[0] = torch.compile(model[0], backend="eager", fullgraph=True)
    model(x)
    catcher = FeatureCatcher(model, ["0"])
    out = model(x)
    torch.testing.assert_close(out, catcher.feats["0"].relu())


def test_a_layer_added_after_the_compiled_call_is_missing_until_the_compiler_is_reset(
    x: Tensor, fresh_compiler: None
) -> None:
    model = mlp()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(x)
    catcher = FeatureCatcher(model, ["0"])
    compiled(x)
    with pytest.raises(KeyError, match=r"expected '0', .*has not run.*torch\.compiler\.reset\(\)"):
        catcher.feats["0"]
    torch.compiler.reset()
    compiled(x)
    assert list(catcher.feats) == ["0"]


def test_explicit_features_need_no_hooks_in_a_compiled_model(
    images: Tensor, fresh_compiler: None
) -> None:
    model = VisionTransformer(depth=2)

    def forward(batch: Tensor) -> tuple[Tensor, list[Tensor]]:
        tokens, features = model.forward_intermediates(batch, indices=2)
        return model.forward_head(tokens), [to_vec(f) for f in features]

    logits, vecs = torch.compile(forward, backend="eager", fullgraph=True)(images)
    torch.testing.assert_close(logits, model(images))
    assert [v.shape for v in vecs] == [(2, 8), (2, 8)]
