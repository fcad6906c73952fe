"""What a fine-grained classifier confuses, and how its layers separate it. No gradients.

    pairs, confusion = top_confusing_pairs(val_logits, val_targets, 20)
    history.append(report(test_features, test_logits, test_targets, pairs=pairs, step=step))
    write_report("report.html", history, images=first_image_of_class)
    write_tensorboard(writer, history[-1])

Pick pairs on one set and report their error on another: errors counted on the set that the pairs
were picked on fall by themselves when the model is trained again.
"""

from cwbr_fused.diagnostics.measures import (
    layer_overlaps,
    layer_separations,
    linear_probe,
    pair_error_rate,
    top_confusing_pairs,
)
from cwbr_fused.diagnostics.summary import report
from cwbr_fused.diagnostics.writers import write_report, write_tensorboard

__all__ = [
    "layer_overlaps",
    "layer_separations",
    "linear_probe",
    "pair_error_rate",
    "report",
    "top_confusing_pairs",
    "write_report",
    "write_tensorboard",
]
