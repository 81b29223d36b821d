"""What results are made by at every door unless told otherwise. Without imports: runtimes without torch ask too."""

TASKS = ("semantic", "instance", "panoptic")

# The panoptic thresholds are the original's (OBJECT_MASK_THRESHOLD, OVERLAP_THRESHOLD), and so is the number of
# instances (DETECTIONS_PER_IMAGE). The original has no lowest score for instances: 0.5 is transformers', for people
# who look at results; metrics take 0.
PANOPTIC_THRESHOLD = 0.8
INSTANCE_THRESHOLD = 0.5
OVERLAP_THRESHOLD = 0.8
MASK_THRESHOLD = 0.5
MAX_INSTANCES = 100

CERTAIN = 1e4  # class logit of heads that classify pixels: a softmax of 1 in every dtype, and finite differences
