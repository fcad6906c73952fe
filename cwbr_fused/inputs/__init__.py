"""What users hand over: features, their pooling, targets, and the checks of all of them."""
