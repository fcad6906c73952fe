"""CWBR in the training loops of other libraries.

| library | adapter |
|---|---|
| Lightning | `cwbr_fused.integrations.lightning.CWBRCallback` |
| Hugging Face Trainer | `cwbr_fused.integrations.huggingface.CWBRTrainer` |
| PyTorch Metric Learning | `cwbr_fused.integrations.metric_learning.CWBRLoss` |
| timm, torchvision, accelerate | none is needed: `CWBR` is one call between forward and backward |

Importing `cwbr_fused` imports none of these libraries, and a module here imports its library only
when it is imported itself. The page "In your framework" of the documentation has an example for
each.
"""

from typing import Literal, TypeAlias, get_args

# "cwbr", the recommended form, or "published", which lowers accuracy where it was measured.
Form: TypeAlias = Literal["cwbr", "published"]
FORMS: tuple[str, ...] = get_args(Form)
