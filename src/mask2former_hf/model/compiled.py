"""The seam to the compiled kernels: the whole package has them; a checkpoint's own code runs without them.

A name is None where there is no kernel at all. Where none applies to some tensors, `deformable_attention` returns None
and `group_norm_` False, and nothing was computed.
"""

try:
    from mask2former_hf.kernels import deformable_attention, group_norm_
except ImportError:
    deformable_attention = group_norm_ = None
