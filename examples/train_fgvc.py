"""Train a fine-grained classifier with CWBR, or compare it with cross-entropy on your data.

    python examples/train_fgvc.py --compare ce cwbr               # on the embedded glyphs
    python examples/train_fgvc.py --data CUB_200_2011 --model timm:resnet50 --pretrained \\
        --compare ce cwbr --seeds 3 --lr 0.01 --epochs 50 --amp bf16 --workers 8
    torchrun --nproc-per-node 4 examples/train_fgvc.py --data birds/ ...     # four GPUs
    python examples/train_fgvc.py evaluate runs/.../cwbr/seed0/best.pt
    python examples/train_fgvc.py predict runs/.../cwbr/seed0/best.pt photos/

Needs examples/requirements.txt. The loop is in fgvc/training.py; the regularizer is in
fgvc/methods.py; `--help` says what data it reads and how these are split.
"""

from __future__ import annotations

import sys

from fgvc import commands

if __name__ == "__main__":
    sys.exit(commands.main())
