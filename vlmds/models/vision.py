"""The frozen vision tower: CLIP patch features for every frame."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, PretrainedConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from vlmds.errors import InputError
from vlmds.experiments.schema import VisionConfig
from vlmds.models.fetch import model_folder
from vlmds.models.pretrained import load_config, load_weights, loading


class VisionTower(nn.Module):
    """Frozen CLIP. It stays outside the DeepSpeed engine: nothing in it is trained or partitioned.

    Args:
        clip: a ``CLIPVisionModel``.
        mean, std: per-channel normalisation, of images in [0, 1].
        feature_layer: -1 for the last layer's patch tokens (before CLIP's final LayerNorm, which
            only ever sees the class token), -2 for the layer below.
        frames_per_call: most frames in one forward pass.
        pool: patch features are averaged over pool x pool squares of the patch grid, which leaves
            the LLM 1 / pool² of the visual tokens.

    Raises:
        InputError: ``pool`` does not divide the patches of a side.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        clip: CLIPVisionModel,
        mean: Sequence[float],
        std: Sequence[float],
        feature_layer: int = -1,
        frames_per_call: int = 64,
        pool: int = 1,
    ):
        super().__init__()
        self.patches = patches_per_frame(clip.config, pool)
        """Feature vectors per frame, P."""
        self.clip = clip.eval().requires_grad_(False)
        self.feature_layer, self.pool = feature_layer, pool
        self.frames_per_call = frames_per_call
        self._fingerprint: str | None = None
        device = clip.device
        self.register_buffer("mean", torch.tensor(mean, device=device).view(3, 1, 1), False)
        self.register_buffer("std", torch.tensor(std, device=device).view(3, 1, 1), False)

    @property
    def hidden_size(self) -> int:
        return self.clip.config.hidden_size

    @property
    def image_size(self) -> int:
        return frame_side(self.clip.config)[0]

    @torch.no_grad()
    def fingerprint(self) -> str:
        """Sha256 of all that decides the features of given frames: weights, shape, feature layer,
        pooling and normalisation. Weights count as bfloat16, the precision in which features are
        stored: a tower has one fingerprint, whatever dtype it is loaded in. Computed once.
        """
        if self._fingerprint is None:
            config = self.clip.config
            described = {
                "shape": [
                    config.hidden_size,
                    config.intermediate_size,
                    config.num_hidden_layers,
                    config.num_attention_heads,
                    config.image_size,
                    config.patch_size,
                ],
                "activation": config.hidden_act,
                "epsilon": config.layer_norm_eps,
                "feature_layer": self.feature_layer,
                "pool": self.pool,
                "mean": [round(x, 6) for x in self.mean.flatten().tolist()],
                "std": [round(x, 6) for x in self.std.flatten().tolist()],
            }
            digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
            for name, weight in sorted(self.clip.state_dict().items()):
                digest.update(name.encode())
                bits = weight.to(torch.bfloat16).contiguous().view(torch.int16)
                digest.update(bits.cpu().numpy())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def train(self, mode: bool = True):
        return super().train(False)  # frozen: no caller can switch it to training mode

    @torch.no_grad()
    def forward(self, frames: Tensor) -> Tensor:
        """uint8 frames [B, F, 3, S, S] -> patch features [B, F*P, hidden_size], frame by frame,
        in CLIP's dtype; P is ``patches``, pooled."""
        batch, num_frames = frames.shape[:2]
        features = [self._encode(chunk) for chunk in frames.flatten(0, 1).split(self.frames_per_call)]
        return torch.cat(features).reshape(batch, num_frames * self.patches, self.hidden_size)

    def _encode(self, frames: Tensor) -> Tensor:
        """uint8 [N, 3, S, S] -> [N, P, hidden_size]."""
        pixels = (frames.float() / 255 - self.mean) / self.std
        pixels = pixels.to(self.clip.dtype)
        if self.feature_layer == -1:
            hidden = self.clip(pixels).last_hidden_state
        else:
            hidden = self.clip(pixels, output_hidden_states=True).hidden_states[self.feature_layer]
        patches = hidden[:, 1:]  # drop the class token
        if self.pool == 1:
            return patches
        side = frame_side(self.clip.config)[1] // self.pool
        squares = patches.unflatten(1, (side, self.pool, side, self.pool))
        return squares.mean((2, 4)).flatten(1, 2)


def frame_side(config: CLIPVisionConfig) -> tuple[int, int]:
    """Side of a frame in pixels and in patches; CLIP's frames and patches are squares."""
    pixels, patch = config.image_size, config.patch_size
    assert isinstance(pixels, int) and isinstance(patch, int)
    return pixels, pixels // patch


def patches_per_frame(config: CLIPVisionConfig, pool: int = 1) -> int:
    """Feature vectors per frame after pooling.

    Raises:
        InputError: ``pool`` does not divide the patches of a side.
    """
    _, side = frame_side(config)
    if side % pool:
        raise InputError(
            f"vision.pool: {pool} does not divide {side}, the patches of a side; "
            f"use one of {', '.join(str(n) for n in range(1, side + 1) if side % n == 0)}"
        )
    return (side // pool) ** 2


def vision_half(config: PretrainedConfig, name: str) -> CLIPVisionConfig:
    """The vision half of a CLIP configuration.

    Raises:
        InputError: ``name`` contains no CLIP model.
    """
    config = getattr(config, "vision_config", config)
    if not isinstance(config, CLIPVisionConfig):
        raise InputError(f"vision.model: {name} contains a {config.model_type} model, not CLIP")
    return config


def load_vision_tower(vision: VisionConfig, dtype: torch.dtype, device: torch.device) -> VisionTower:
    """Load the frozen tower by hub name or local folder.

    Raises:
        InputError: missing or damaged folder, not CLIP, or an image processor whose size differs
            from the model's.
    """
    folder = model_folder(vision)
    config = vision_half(load_config(vision), vision.model)
    clip = load_weights(CLIPVisionModel, vision, folder, config=config, dtype=dtype)
    with loading("vision.model", vision.model):
        processor = CLIPImageProcessorPil.from_pretrained(folder)
    size = processor.crop_size["height"]
    if size != config.image_size:
        raise InputError(
            f"vision.model: {vision.model}: preprocessor_config.json crops to {size} pixels, "
            f"but the model takes {config.image_size}"
        )
    return VisionTower(
        clip.to(device),
        processor.image_mean,
        processor.image_std,
        vision.feature_layer,
        vision.frames_per_call,
        vision.pool,
    )
