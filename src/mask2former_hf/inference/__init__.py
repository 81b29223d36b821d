"""From a checkpoint and images to results, and what refines and draws them."""
