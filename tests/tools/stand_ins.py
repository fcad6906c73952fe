"""Small stand-ins for libraries that cannot be imported here, with the calls and the order of
calls of the real ones (Lightning 2.6, transformers 5, timm 1.0, torchvision 0.28)."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from models import ResNet, VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


def module(name: str, **members: Any) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(members)
    return made


# ---- timm


class FeatureListNet(nn.Module):
    """What `features_only=True` gives: the chosen stages' maps, and their channels."""

    output_fmt = "NCHW"

    def __init__(self, out_indices: tuple[int, ...]) -> None:
        super().__init__()
        self.body = ResNet()
        self.out_indices = out_indices
        channels = [self.body.planes[0], *self.body.planes]
        self.feature_info = SimpleNamespace(channels=lambda: [channels[i] for i in out_indices])

    def forward(self, x: Tensor) -> list[Tensor]:
        body = self.body
        maps = [body.relu(body.bn1(body.conv1(x)))]
        for stage in (body.layer1, body.layer2, body.layer3, body.layer4):
            maps.append(stage(maps[-1]))
        return [maps[i] for i in self.out_indices]


def create_model(name: str, num_classes: int = 1000, **options: Any) -> nn.Module:
    if options.pop("features_only", False):
        return FeatureListNet(**options)
    return VisionTransformer(num_classes=num_classes, img_size=224, patch_size=16)


# ---- torchvision


class FeatureExtractor(nn.Module):
    """The model, returning the outputs of the named nodes, in the order of the names."""

    def __init__(self, model: nn.Module, return_nodes: list[str]) -> None:
        super().__init__()
        self.model, self.return_nodes = model, return_nodes

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        layers = {name: self.model.get_submodule(name) for name in self.return_nodes}
        handles = [
            layer.register_forward_hook(lambda _m, _i, out, name=name: found.update({name: out}))
            for name, layer in layers.items()
        ]
        self.model(x)
        for handle in handles:
            handle.remove()
        return {name: found[name] for name in self.return_nodes}


# ---- PyTorch Metric Learning


class NormalizedSoftmaxLoss(nn.Module):
    def __init__(self, num_classes: int, embedding_size: int, temperature: float = 0.05) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(embedding_size, num_classes))
        self.temperature = temperature

    def get_logits(self, embeddings: Tensor) -> Tensor:
        directions = nn.functional.normalize(self.W, dim=0)
        return nn.functional.normalize(embeddings) @ directions / self.temperature

    def forward(self, embeddings: Tensor, labels: Tensor, indices_tuple: object = None) -> Tensor:
        return cross_entropy(self.get_logits(embeddings), labels)


class MultipleLosses(nn.Module):
    def __init__(self, losses: list[nn.Module], weights: list[float]) -> None:
        super().__init__()
        self.losses, self.weights = nn.ModuleList(losses), weights

    def forward(self, embeddings: Tensor, labels: Tensor, indices_tuple: object = None) -> Any:
        pairs = zip(self.losses, self.weights, strict=True)
        return sum(loss(embeddings, labels, indices_tuple) * weight for loss, weight in pairs)


# ---- Lightning


class Callback:
    def __getattr__(self, hook: str) -> Any:
        if hook.startswith("on_") or hook == "setup":
            return lambda *args, **kwargs: None
        raise AttributeError(hook)


class LightningModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trainer: Any = None

    def configure_callbacks(self) -> list[Any]:
        return []

    def log_dict(self, metrics: dict[str, Tensor]) -> None:
        self.trainer.callback_metrics.update(metrics)


class LightningTrainer:
    """`fit` of one optimizer, with validation before (as sanity check) and after each epoch."""

    def __init__(self, max_epochs: int = 1, **options: Any) -> None:
        self.max_epochs = max_epochs
        self.callback_metrics: dict[str, Tensor] = {}
        self.callbacks: list[Any] = []

    def _call(self, hook: str, module: Any, *args: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(self, module, *args)

    def _validate(self, module: Any, batches: Any) -> None:
        module.eval()
        with torch.no_grad():
            for index, batch in enumerate(batches or ()):
                module.validation_step(batch, index)
                self._call("on_validation_batch_end", module, None, batch, index)
        module.train()

    def _train(self, module: Any, batches: Any, optimizer: Any) -> None:
        for index, batch in enumerate(batches):
            self._call("on_train_batch_start", module, batch, index)
            loss = module.training_step(batch, index)
            optimizer.zero_grad()
            self._call("on_before_backward", module, loss)
            loss.backward()
            optimizer.step()
            self._call("on_train_batch_end", module, {"loss": loss.detach()}, batch, index)

    def fit(self, module: Any, train_dataloaders: Any, val_dataloaders: Any = None) -> None:
        module.trainer = self
        self.callbacks = module.configure_callbacks()
        optimizer = module.configure_optimizers()
        try:
            self._call("on_fit_start", module)
            self._validate(module, val_dataloaders)
            for _ in range(self.max_epochs):
                self._train(module, train_dataloaders, optimizer)
                self._validate(module, val_dataloaders)
            self._call("on_fit_end", module)
        except BaseException as error:
            self._call("on_exception", module, error)
            raise


# ---- transformers


class ViTForImageClassification(nn.Module):
    """Loss, logits and, if asked for, hidden states (B, N, D): embeddings and each block's."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.vit = VisionTransformer(num_classes=config["num_labels"])

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool = False,
        num_items_in_batch: int | None = None,
    ) -> dict[str, Any]:
        states = [self.vit._embed(pixel_values)]
        for block in self.vit.blocks:
            states.append(block(states[-1]))
        logits = self.vit.forward_head(self.vit.norm(states[-1]))
        output: dict[str, Any] = {"logits": logits}
        if labels is not None:
            reduction = "sum" if num_items_in_batch else "mean"
            loss = cross_entropy(logits, labels, reduction=reduction)
            output = {"loss": loss / num_items_in_batch if num_items_in_batch else loss, **output}
        if output_hidden_states:
            output["hidden_states"] = tuple(states)
        return output


class HuggingFaceTrainer:
    def __init__(self, model: nn.Module, args: dict[str, Any], train_dataset: list[Any]) -> None:
        self.model, self.args, self.train_dataset = model, args, train_dataset

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: int | None = None,
    ) -> Any:
        if num_items_in_batch is not None:
            inputs = {**inputs, "num_items_in_batch": num_items_in_batch}
        outputs = model(**inputs)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def train(self) -> None:
        optimizer = torch.optim.AdamW(self.model.parameters())
        columns = {key: [row[key] for row in self.train_dataset] for key in self.train_dataset[0]}
        inputs = {
            k: torch.stack(v) if k != "labels" else torch.tensor(v) for k, v in columns.items()
        }
        self.model.train()
        for _ in range(self.args["max_steps"]):
            self.compute_loss(
                self.model, inputs, num_items_in_batch=len(inputs["labels"])
            ).backward()
            optimizer.step()
            optimizer.zero_grad()


def modules() -> dict[str, ModuleType]:
    """Each stand-in under the name by which the real library is imported."""
    extraction = module(
        "torchvision.models.feature_extraction", create_feature_extractor=FeatureExtractor
    )
    models = module("torchvision.models", resnet18=ResNet, feature_extraction=extraction)
    pml_losses = module(
        "pytorch_metric_learning.losses",
        NormalizedSoftmaxLoss=NormalizedSoftmaxLoss,
        MultipleLosses=MultipleLosses,
    )
    lightning = module(
        "lightning.pytorch",
        Callback=Callback,
        LightningModule=LightningModule,
        Trainer=LightningTrainer,
    )
    made = [
        module("timm", create_model=create_model),
        module("torchvision", models=models),
        models,
        extraction,
        module("pytorch_metric_learning", losses=pml_losses),
        pml_losses,
        module("lightning", pytorch=lightning),
        lightning,
        module(
            "transformers",
            Trainer=HuggingFaceTrainer,
            TrainingArguments=dict,
            ViTConfig=dict,
            ViTForImageClassification=ViTForImageClassification,
        ),
    ]
    return {m.__name__: m for m in made}
