"""The seam to the compiled kernels: the whole package has them; a checkpoint's own code runs without them.

A name is None where there is no kernel at all: each for itself, as a checkpoint's code may be newer or older than the
package that is installed. Where none applies to some tensors, the norms that change their input return False, the
others None, and nothing was computed.
"""

try:
    from mask2former_hf import kernels
except ImportError:
    kernels = None

activation_backward_ = getattr(kernels, "activation_backward_", None)
deformable_attention = getattr(kernels, "deformable_attention", None)
batch_norm_ = getattr(kernels, "batch_norm_", None)
group_norm_ = getattr(kernels, "group_norm_", None)
attention = getattr(kernels, "attention", None)
attend_in_windows = getattr(kernels, "attend_in_windows", None)
attend_in_windows_backward = getattr(kernels, "attend_in_windows_backward", None)
convolution = getattr(kernels, "convolution", None)
feed_forward = getattr(kernels, "feed_forward", None)
layer_norm = getattr(kernels, "layer_norm", None)
matrix_product = getattr(kernels, "matrix_product", None)
product = getattr(kernels, "product", None)
uncertain_points = getattr(kernels, "uncertain_points", None)
uniform_points = getattr(kernels, "uniform_points", None)
window_attention = getattr(kernels, "window_attention", None)
