"""Making models smaller: matrices in 4 or 8 bits by rounding, searched scales or GPTQ, 2:4 pruning, checkpoints."""

from stretto.models.quantize.gptq import gptq, magnitude_mask
from stretto.models.quantize.grid import Grid, clip, round_to_nearest

__all__ = ["Grid", "clip", "gptq", "magnitude_mask", "round_to_nearest"]
