"""The projectors: CLIP patch features in, visual tokens in the LLM's space out.

docs/extending.md shows how to add one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vlmds.errors import InputError
from vlmds.experiments.schema import ProjectorConfig


class Projector(nn.Module):
    """Base class: features [B, N, vision_dim] or [N, vision_dim] -> tokens [B, M, llm_dim] or
    [M, llm_dim], where N = num_frames x patches, frame by frame; N = patches for a still picture.

    Args:
        config: the experiment's ``projector`` section.
        vision_dim, llm_dim: feature widths of the two frozen models.
        num_frames: frames per clip, F.
        patches: patch tokens per frame, P.
    """

    def __init__(self, config: Any, vision_dim: int, llm_dim: int, num_frames: int, patches: int):
        super().__init__()
        self.num_frames, self.patches = num_frames, patches
        self.vision_dim, self.llm_dim = vision_dim, llm_dim

    @property
    def num_tokens(self) -> int:
        """Visual tokens per clip, M."""
        return self.tokens_of(self.num_frames * self.patches)

    def tokens_of(self, features: int) -> int:
        """Visual tokens made of so many features N."""
        return features

    def forward(self, features: Tensor) -> Tensor:
        lengths = (self.num_frames * self.patches, self.patches)
        if features.shape[-2] not in lengths or features.shape[-1] != self.vision_dim:
            expected = (lengths[0], self.vision_dim)
            raise ValueError(f"features are {tuple(features.shape)}, expected [..., {expected}]")
        if features.dim() == 2:
            return self.project(features[None])[0]
        return self.project(features)

    def project(self, features: Tensor) -> Tensor:
        """[B, N, vision_dim] -> [B, M, llm_dim]."""
        raise NotImplementedError


class Linear(Projector):
    """One Linear per patch token (LLaVA, arXiv:2304.08485)."""

    def __init__(self, config: Any, vision_dim: int, llm_dim: int, num_frames: int, patches: int):
        super().__init__(config, vision_dim, llm_dim, num_frames, patches)
        self.net = nn.Linear(vision_dim, llm_dim)

    def project(self, features: Tensor) -> Tensor:
        return self.net(features)


class MLP(Projector):
    """Linear, GELU, Linear per patch token (LLaVA-1.5, arXiv:2310.03744)."""

    def __init__(self, config: Any, vision_dim: int, llm_dim: int, num_frames: int, patches: int):
        super().__init__(config, vision_dim, llm_dim, num_frames, patches)
        self.net = nn.Sequential(nn.Linear(vision_dim, llm_dim), nn.GELU(), nn.Linear(llm_dim, llm_dim))

    def project(self, features: Tensor) -> Tensor:
        return self.net(features)


class Resampler(Projector):
    """Base class of C-Abstractor and Perceiver: learned queries that attend to the patch features.

    Attention treats the features as a set, so without the learned frame-time embedding a clip and
    its reverse give the same tokens.
    """

    def __init__(self, config: Any, vision_dim: int, llm_dim: int, num_frames: int, patches: int):
        super().__init__(config, vision_dim, llm_dim, num_frames, patches)
        width = config.width or llm_dim
        if width % config.num_heads:
            raise InputError(
                f"projector.num_heads: {config.num_heads} does not divide the LLM's width {width} "
                "(projector.width is null)"
            )
        self.num_queries = config.num_queries
        # Queries and times start at the scale of the projected features. At the customary 0.02 all
        # queries attend alike at first, and frames cannot be distinguished.
        self.queries = nn.Parameter(torch.randn(config.num_queries, width))
        self.vision_proj = nn.Linear(vision_dim, width)
        self.frame_time = nn.Parameter(sinusoidal(num_frames, width)) if config.temporal_embedding else None
        self.output_proj = nn.Linear(width, llm_dim) if config.width else nn.Identity()

    def tokens_of(self, features: int) -> int:
        return self.num_queries

    def project(self, features: Tensor) -> Tensor:
        memory = self.vision_proj(features)  # [B, F*P, width]
        if self.frame_time is not None:
            times = self.frame_time.repeat_interleave(self.patches, dim=0)
            memory = memory + times[: features.shape[1]]  # a still picture has the time of the first frame
        queries = self.queries.expand(len(features), -1, -1)  # [B, M, width]
        return self.output_proj(self.resample(queries, memory))

    def resample(self, queries: Tensor, memory: Tensor) -> Tensor:
        """queries [B, M, width], memory [B, N, width] -> [B, M, width]."""
        raise NotImplementedError


def sinusoidal(length: int, width: int) -> Tensor:
    """Sines and cosines of geometrically spaced wavelengths, from 4 to 4 x length positions
    (after arXiv:1706.03762): float32 [length, width]."""
    half = (width + 1) // 2
    wavelengths = 4 * float(length) ** np.linspace(0, 1, half)
    angles = 2 * np.pi * np.arange(length)[:, None] / wavelengths
    table = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)[:, :width]
    return torch.tensor(table.tolist())  # on the default device, also where that is meta


class CAbstractor(Resampler):
    """Cross-attention and a feed-forward network, each with residual and LayerNorm."""

    def __init__(self, config: Any, vision_dim: int, llm_dim: int, num_frames: int, patches: int):
        super().__init__(config, vision_dim, llm_dim, num_frames, patches)
        width = self.queries.shape[-1]
        self.cross = _Attention(width, config.num_heads)
        self.ffn = _FeedForward(width)

    def resample(self, queries: Tensor, memory: Tensor) -> Tensor:
        return self.ffn(self.cross(queries, memory))


class Perceiver(Resampler):
    """``depth`` x [cross-attention, self-attention, feed-forward], each with residual and
    LayerNorm, then a final LayerNorm (Perceiver, arXiv:2103.03206; Flamingo's resampler,
    arXiv:2204.14198)."""

    def __init__(self, config: Any, vision_dim: int, llm_dim: int, num_frames: int, patches: int):
        super().__init__(config, vision_dim, llm_dim, num_frames, patches)
        width = self.queries.shape[-1]
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "cross": _Attention(width, config.num_heads),
                    "self": _Attention(width, config.num_heads),
                    "ffn": _FeedForward(width),
                }
            )
            for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(width)

    def resample(self, queries: Tensor, memory: Tensor) -> Tensor:
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleDict)
            queries = layer["cross"](queries, memory)
            queries = layer["self"](queries, queries)
            queries = layer["ffn"](queries)
        return self.norm(queries)


class _Attention(nn.Module):
    """LayerNorm(queries + MultiheadAttention(queries, memory))."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.norm = nn.LayerNorm(width)

    def forward(self, queries: Tensor, memory: Tensor) -> Tensor:
        attended, _ = self.attention(queries, memory, memory, need_weights=False)
        return self.norm(queries + attended)


class _FeedForward(nn.Module):
    """LayerNorm(x + Linear(GELU(Linear(x)))), four times as wide inside."""

    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.net(x))


PROJECTORS: dict[str, type[Projector]] = {
    "linear": Linear,
    "mlp": MLP,
    "cabstractor": CAbstractor,
    "perceiver": Perceiver,
}


def build_projector(config: ProjectorConfig, vision_dim: int, llm_dim: int, num_frames: int, patches: int) -> Projector:
    """A freshly initialised projector for ``config.type``; arguments as :class:`Projector`."""
    return PROJECTORS[config.type](config, vision_dim, llm_dim, num_frames, patches)
