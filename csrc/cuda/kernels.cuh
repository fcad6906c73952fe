// The CUDA kernel of each operation.
#pragma once

#include "all_pair_distance.cuh"
#include "class_attraction.cuh"
#include "class_moments.cuh"
#include "confusion_weights.cuh"
#include "follow_classes.cuh"
#include "group_by_class.cuh"
#include "observe_classes.cuh"
#include "pair_distance.cuh"
#include "plan.cuh"
#include "regularizer.cuh"
#include "top_confusions.cuh"
#include "top_pairs.cuh"
#include "weighted_overlap.cuh"
