"""How strong the pull is at each layer: as far as its class means can be trusted.

Two questions decide, and both answers are measured on the batch, before the means move.

- *Do the means of this layer tell the classes apart?* `class_attraction` asks it of every sample:
  is its own mean nearer than those of all classes that the model confuses it with? Where the images
  of a class differ by content, early layers need that variation, and there the answer is no.
- *Has the model something left to learn?* The share h of samples that it classifies right says so.
  Near 0 the means are noise. Near 1 plain cross-entropy falls silent, and with it whatever is a
  share of its gradient; a margin, smoothing or mixup keeps a gradient that never dies, and a pull
  of a fixed share of that would in the end outweigh the loss. A share of right answers means the
  same under all of these losses; a mean probability does not.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Means that are right for half of the samples have a sixteenth of the full strength.
SHARPNESS = 4


def strength(accuracy: Tensor, fitted: Tensor) -> Tensor:
    """The share of the loss's gradient that a layer's pull may have, in [0, 1].

    Args:
        accuracy: (L,) the share of samples whose own mean is nearest, at each layer.
        fitted: (L,) or scalar, the share h of samples that the model classifies right.

    Returns:
        (L,) `4 h (1 - h) accuracy^SHARPNESS`.
    """
    left = torch.addcmul(fitted, fitted, fitted, value=-1)
    return 4 * left * accuracy**SHARPNESS
