from .class_moments import class_moments, class_moments_backward
from .confusion_weights import confusion_weights
from .group_by_class import group_by_class
from .pair_distance import pair_distance, pair_distance_backward
from .plan import plan
from .regularizer import regularizer, regularizer_backward
from .top_pairs import top_pairs
