"""Configuration of a video captioner: CLIP, a projector, a language model."""

from transformers import CONFIG_MAPPING, AutoConfig, CLIPVisionConfig, PretrainedConfig


class VlmdsConfig(PretrainedConfig):
    """projector: its settings, "type" among them. num_frames: images that make a clip.
    feature_layer: of the tower, -1 or -2. pool: patch features are averaged over pool x pool
    squares. image_token_id: the token that stands for a visual token."""

    model_type = "vlmds"
    sub_configs = {"vision_config": CLIPVisionConfig, "text_config": AutoConfig}

    def __init__(
        self,
        vision_config=None,
        text_config=None,
        projector=None,
        num_frames=8,
        feature_layer=-1,
        pool=1,
        image_token_id=0,
        **kwargs,
    ):
        if not isinstance(vision_config, PretrainedConfig):
            vision_config = CLIPVisionConfig(**(vision_config or {}))
        if not isinstance(text_config, PretrainedConfig):
            text_config = dict(text_config or {"model_type": "qwen3"})
            text_config = CONFIG_MAPPING[text_config["model_type"]](**text_config)
        self.vision_config, self.text_config = vision_config, text_config
        self.projector = projector or {"type": "linear"}
        self.num_frames, self.feature_layer, self.pool = num_frames, feature_layer, pool
        self.image_token_id = image_token_id
        kwargs.setdefault("tie_word_embeddings", text_config.tie_word_embeddings)
        super().__init__(**kwargs)
