"""The processor of a video captioner: frames and a prompt -> model inputs."""

from transformers import ProcessorMixin


class VlmdsProcessor(ProcessorMixin):
    """As LLaVA's processor, but the images of one clip share its visual tokens: the first image's
    placeholder becomes all of them, the other images' placeholders vanish. A call takes clips of num_frames
    images each, or one image: a still picture."""

    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        num_frames=8,
        num_visual_tokens=64,
        num_picture_tokens=64,
        image_token="<|image_pad|>",
        chat_template=None,
        **kwargs,
    ):
        self.num_frames, self.num_visual_tokens, self.num_picture_tokens = (
            num_frames,
            num_visual_tokens,
            num_picture_tokens,
        )
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def replace_image_token(self, image_inputs, image_idx, **kwargs):
        if len(image_inputs["pixel_values"]) == 1:
            return self.image_token * self.num_picture_tokens
        first = image_idx % self.num_frames == 0
        return self.image_token * self.num_visual_tokens if first else ""
