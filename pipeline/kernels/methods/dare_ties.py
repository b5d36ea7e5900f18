"""DARE-TIES: DARE's random masks in place of TIES' trimming, TIES' election of signs after them."""

from __future__ import annotations

from pipeline.kernels.forms import ELECT, MASK
from pipeline.kernels.methods.dare import masked
from pipeline.kernels.methods.interface import Method
from pipeline.kernels.methods.ties import elected

METHOD = Method(prune=masked, combine=elected, form=(MASK, ELECT))
