"""Clipping of gradients, on the norms that the kernels measure."""

from gradstat.clipping.functional import (
    clip_grad_norm_ as clip_grad_norm_,
)
from gradstat.clipping.functional import (
    clip_grad_value_ as clip_grad_value_,
)
from gradstat.clipping.functional import (
    get_total_norm as get_total_norm,
)
