"""The types in which ops compute."""

from __future__ import annotations

import torch


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for float32, float16 and bfloat16; float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
