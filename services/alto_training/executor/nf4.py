"""Frozen weights in 4 bits: NF4, the sixteen quantiles of a normal distribution (QLoRA, arXiv 2305.14314, section 3).

Blocks of 64 weights, in the order in which a row of [N, K] lies in memory, share one fp32 scale, the largest magnitude
in the block; each weight is the nearest of sixteen levels times it: 4.5 bits a weight. The levels, the order and the
packing are those of bitsandbytes, so that its numbers and these are the same. A weight is dense only while a product
uses it; the arithmetic is plain torch and runs wherever torch does.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util

import torch
from torch import nn

BLOCK = 64
LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_AT_ONCE = 2**22  # weights that are looked at together while quantising


class Nf4Linear(nn.Module):
    """A frozen linear layer with its weight in NF4.

    `codes` uint8 [ceil(N K / 2)] holds two weights a byte, the first in the upper half; `scales` fp32 [blocks].
    `pairs` [256, 2] is what a byte stands for. `weight` is dense, [N, K], and made anew at each use.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    pairs: torch.Tensor

    def __init__(self, weight_NK: torch.Tensor, bias_N: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_NK.shape
        self.bias = None if bias_N is None else nn.Parameter(bias_N.detach().clone(), requires_grad=False)
        codes, scales = quantise(weight_NK.detach())
        levels = torch.tensor(LEVELS, device=weight_NK.device)
        byte = torch.arange(256, device=weight_NK.device)
        pairs = torch.stack([levels[byte >> 4], levels[byte & 15]], dim=1)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("pairs", pairs)
        self._dtype = weight_NK.dtype

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight, [N, K], in the number format of the layer that this one replaced."""
        return dequantise(self.codes, self.scales, self.pairs, (self.out_features, self.in_features), self._dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., K] to [..., N]."""
        return nn.functional.linear(x, self.weight, self.bias)


def quantise(weight_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (codes, scales) of a weight; see `Nf4Linear`."""
    flat = weight_NK.float().flatten()
    size = flat.numel()
    padded = nn.functional.pad(flat, (0, -size % BLOCK)).view(-1, BLOCK)
    scales = padded.abs().amax(dim=1)
    levels = torch.tensor(LEVELS, device=flat.device)
    between = (levels[1:] + levels[:-1]) / 2  # the nearest level changes here
    codes = torch.empty(padded.shape, dtype=torch.uint8, device=flat.device)
    for start in range(0, len(padded), _AT_ONCE // BLOCK):
        part = slice(start, start + _AT_ONCE // BLOCK)
        normal = padded[part] / scales[part, None].clamp_min(torch.finfo(torch.float32).tiny)
        codes[part] = torch.bucketize(normal, between).to(torch.uint8)
    every = codes.view(-1)[: size + size % 2]
    return every[0::2] << 4 | every[1::2], scales


def dequantise(
    codes: torch.Tensor, scales: torch.Tensor, pairs: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """Return the dense weight [N, K]: by bitsandbytes where it is installed (several times faster), else by torch."""
    if _bitsandbytes_is_there():
        dense: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit(codes, scales, BLOCK, "nf4", shape, dtype)
        return dense
    size = shape[0] * shape[1]
    values = pairs.index_select(0, codes.int()).view(-1)
    whole = size // BLOCK * BLOCK
    values[:whole].view(-1, BLOCK).mul_(scales[: whole // BLOCK, None])
    if whole < size:
        values[whole:].mul_(scales[-1])
    return values[:size].view(shape).to(dtype)


@functools.cache
def _bitsandbytes_is_there() -> bool:
    if importlib.util.find_spec("bitsandbytes") is None:
        return False
    importlib.import_module("bitsandbytes")  # it makes its operators known to torch
    return hasattr(torch.ops.bitsandbytes, "dequantize_4bit")


def quantise_layers(decoder: nn.Module) -> None:
    """Put every linear layer of a decoder into NF4, in place; embeddings, norms and output head stay as they are."""
    from transformers.pytorch_utils import Conv1D

    for name, module in list(decoder.named_modules()):
        if isinstance(module, nn.Linear | Conv1D):
            weight = module.weight.t() if isinstance(module, Conv1D) else module.weight
            parent, _, child = name.rpartition(".")
            setattr(decoder.get_submodule(parent), child, Nf4Linear(weight, module.bias))
