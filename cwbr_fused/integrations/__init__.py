"""The regularizer in the training loops of other libraries.

Importing `cwbr_fused` imports none of them, and a module here imports its library only when it is
imported itself:

| library | how |
|---|---|
| timm, torchvision | they hand out intermediate features: no adapter, see below |
| PyTorch Metric Learning | `cwbr_fused.integrations.metric_learning.ConfusionWeightedBhatLoss` |
| Lightning | `cwbr_fused.integrations.lightning.RegularizerCallback` |
| Hugging Face Trainer | `cwbr_fused.integrations.huggingface.RegularizedTrainer` |

`CWBR`, the recommended form, needs no adapter in any of them: it is one call between forward and
backward, and `CWBR.catch` finds the features. What follows it is about the published form.

```python
import timm, torch
from torch.nn.functional import cross_entropy
from cwbr_fused import CWBR

model = timm.create_model("vit_tiny_patch16_224", num_classes=5)
cwbr = CWBR(num_classes=5)
catcher = cwbr.catch(model, ["blocks.0", "blocks.1"])
images, targets = torch.randn(8, 3, 224, 224), torch.arange(8) % 4

logits = model(images)
ce = cross_entropy(logits, targets)
cwbr(catcher.feats, logits, targets)
ce.backward()
```

In Lightning that is `training_step`, with `cwbr` a submodule, so that checkpoints hold its bank:

```python
import torch
from lightning.pytorch import LightningModule
from torch.nn.functional import cross_entropy
from cwbr_fused import CWBR

class Classifier(LightningModule):
    def __init__(self):
        super().__init__()
        self.model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
        self.cwbr = CWBR(num_classes=4)
        self.catcher = self.cwbr.catch(self.model, ["0"])

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        logits = self.model(inputs)
        self.cwbr(self.catcher.feats, logits, targets)
        return cross_entropy(logits, targets)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
```

## timm

`forward_intermediates` gives features and logits in one forward. Maps come as (B, C, H, W) whatever
the model, so `loss` takes them as they are:

```python
import timm, torch
from torch.nn.functional import cross_entropy
from cwbr_fused import loss, scale_match

model = timm.create_model("vit_tiny_patch16_224", num_classes=5)
images, targets = torch.randn(8, 3, 224, 224), torch.arange(8) % 4

final, features = model.forward_intermediates(images, indices=2)
logits = model.forward_head(final)
total = scale_match(cross_entropy(logits, targets), loss(features, logits, targets))
total.backward()
```

With `features_only=True` the model is its stages and the head is yours:

```python
import timm, torch
from torch.nn.functional import cross_entropy
from cwbr_fused import loss, scale_match, to_vec

backbone = timm.create_model("resnet18", features_only=True, out_indices=(3, 4))
channels_last = getattr(backbone, "output_fmt", "NCHW") == "NHWC"  # Swin and its kin
head = torch.nn.Linear(backbone.feature_info.channels()[-1], 5)
images, targets = torch.randn(8, 3, 64, 64), torch.arange(8) % 4

features = [to_vec(f, channels_last=channels_last) for f in backbone(images)]
logits = head(features[-1])
total = scale_match(cross_entropy(logits, targets), loss(features, logits, targets))
total.backward()
```

## torchvision

`create_feature_extractor` returns any nodes of the model's graph, the logits among them:

```python
import torch, torchvision
from torch.nn.functional import cross_entropy
from torchvision.models.feature_extraction import create_feature_extractor
from cwbr_fused import loss, scale_match

model = torchvision.models.resnet18(num_classes=5)
extractor = create_feature_extractor(model, ["layer3", "layer4", "fc"])
images, targets = torch.randn(8, 3, 64, 64), torch.arange(8) % 4

features = extractor(images)
logits = features.pop("fc")
total = scale_match(cross_entropy(logits, targets), loss(features, logits, targets))
total.backward()
```

Maps of torchvision's Swin are channels-last: `to_vec(feature, channels_last=True)`. The extractor
shares its parameters with the model, so optimize either.
"""
