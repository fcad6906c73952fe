"""The parts of `train_fgvc.py`: data, models, methods, training, evaluation, reports."""
