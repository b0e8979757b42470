"""Spline, then principal components: the geometry that the research fits to latents and values.

`SplinePCA` bends each number by a monotone spline before it keeps the principal components. docs/geometry.md says what
that gains over principal components alone.
"""

from kvsplice_hf.geometry.spline import FixedSpline, MonotoneSpline
from kvsplice_hf.geometry.spline_pca import SplinePCA


__all__ = ["FixedSpline", "MonotoneSpline", "SplinePCA"]
