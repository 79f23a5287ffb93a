"""A video captioner: CLIP patch features of all frames, through a projector, among the text."""

from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM, CLIPVisionModel, GenerationMixin, PreTrainedModel

from .configuration_vlmds import VlmdsConfig
from .projectors_vlmds import build_projector


class VlmdsForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """pixel_values: normalised frames, float [B * num_frames, 3, S, S], clip after clip;
    or [1, 3, S, S], a still picture.
    input_ids: int64 [B, L], with as many image tokens in each row as a clip has visual tokens."""

    config_class = VlmdsConfig
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        vision, text = config.vision_config, config.text_config
        side = vision.image_size // vision.patch_size
        self.vision_tower = CLIPVisionModel(vision)
        self.projector = build_projector(
            SimpleNamespace(**config.projector),
            vision.hidden_size,
            text.hidden_size,
            config.num_frames,
            (side // config.pool) ** 2,
        )
        self.language_model = AutoModelForCausalLM.from_config(text)
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self):
        return self.language_model.get_output_embeddings()

    def visual_tokens(self, pixel_values):
        """[B * num_frames, 3, S, S], or [1, 3, S, S] -> [B, M, llm width]."""
        tower, pool = self.vision_tower, self.config.pool
        hidden = tower(pixel_values.to(tower.dtype), output_hidden_states=True).hidden_states
        patches = hidden[self.config.feature_layer][:, 1:]  # without the class token
        if pool > 1:
            side = int(patches.shape[1] ** 0.5) // pool
            squares = patches.unflatten(1, (side, pool, side, pool))
            patches = squares.mean((2, 4)).flatten(1, 2)
        frames = 1 if len(patches) == 1 else self.config.num_frames
        clips = patches.unflatten(0, (-1, frames)).flatten(1, 2)
        return self.projector(clips)

    def embed(self, input_ids, pixel_values):
        """[B, L, llm width]: text embeddings, the visual tokens in their places."""
        text = self.get_input_embeddings()(input_ids)
        if pixel_values is None:
            return text
        place = (input_ids == self.config.image_token_id).unsqueeze(-1)
        visual = self.visual_tokens(pixel_values)
        if int(place.sum()) != visual.shape[0] * visual.shape[1]:
            raise ValueError(
                f"{int(place.sum())} image tokens for {visual.shape[0]} clips of {visual.shape[1]} visual tokens"
            )
        return text.masked_scatter(place, visual.to(text.dtype))

    def forward(self, input_ids=None, pixel_values=None, inputs_embeds=None, **options):
        if inputs_embeds is None:
            inputs_embeds = self.embed(input_ids, pixel_values)
        return self.language_model(inputs_embeds=inputs_embeds, **options)

    @torch.no_grad()
    def generate(self, input_ids=None, pixel_values=None, generation_config=None, **options):
        """input_ids and the new tokens, int64 [B, L + T]; options: as of
        ``GenerationMixin.generate``, whose other result types are returned as they are."""
        new = self.language_model.generate(
            inputs_embeds=self.embed(input_ids, pixel_values),
            generation_config=generation_config or self.generation_config,
            **options,
        )
        if not isinstance(new, torch.Tensor):
            return new
        return torch.cat([input_ids.repeat_interleave(len(new) // len(input_ids), 0), new], dim=1)
