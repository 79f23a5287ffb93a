"""Transformers: private fields, hooks and details that vlmds relies on."""

import inspect
import queue

import pytest
import torch
from transformers import (
    AttentionInterface,
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.generation.streamers import TextIteratorStreamer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.utils import logging

from vlmds.console.quiet import quietly
from vlmds.models.captioner import without_mask
from vlmds.models.loss import can_split


@pytest.fixture
def llm():
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=50, num_hidden_layers=4, **shape)).requires_grad_(False)


@pytest.fixture
def embeds(llm):
    return llm.get_input_embeddings()(torch.arange(12).reshape(2, 6))  # [2, 6, 32]


def test_the_attention_of_a_config_can_be_replaced_by_a_registered_one(llm, embeds):
    """planning/memory.layer_activations: AttentionInterface, config._attn_implementation, a decoder layer's
    arguments."""
    shapes = []

    def attention(module, query, key, value, attention_mask, **options):
        shapes.append((tuple(query.shape), tuple(key.shape)))
        return query.transpose(1, 2).contiguous(), None

    AttentionInterface.register("vlmds_contract", attention)
    decoder = llm.get_decoder()
    assert decoder.config is llm.config and llm.config._attn_implementation == "sdpa"
    llm.config._attn_implementation = "vlmds_contract"
    rotation = decoder.rotary_emb(embeds, torch.arange(6)[None])
    assert [tuple(t.shape) for t in rotation] == [(1, 6, 16)] * 2
    decoder.layers[0](embeds, attention_mask=None, position_embeddings=rotation)
    assert shapes == [((2, 2, 6, 16), (2, 1, 6, 16))]


def test_a_mapping_of_no_mask_is_a_causal_mask(llm, embeds):
    """models/captioner.without_mask: attention_mask {"full_attention": None}, of Qwen3."""
    extra = without_mask(llm.config)
    assert extra == {"attention_mask": {"full_attention": None}}
    with_own = llm.get_decoder()(inputs_embeds=embeds, use_cache=False).last_hidden_state
    assert torch.equal(llm.get_decoder()(inputs_embeds=embeds, use_cache=False, **extra).last_hidden_state, with_own)


def test_logits_are_the_output_layers_product(llm, embeds):
    """models/loss.can_split; captioner.token_losses: get_decoder, get_output_embeddings, logits_to_keep."""
    assert can_split(llm.get_output_embeddings(), llm.config.model_type)
    hidden = llm.get_decoder()(inputs_embeds=embeds, use_cache=False).last_hidden_state
    logits = llm(inputs_embeds=embeds, use_cache=False).logits
    assert torch.equal(llm.get_output_embeddings()(hidden), logits)
    last = llm(inputs_embeds=embeds, use_cache=False, logits_to_keep=torch.tensor([5])).logits
    torch.testing.assert_close(last, logits[:, 5:])


def test_every_nth_layer_can_be_recomputed(llm, embeds):
    """training/activations.checkpoint_activations: every_n_layers."""
    calls = []
    for number, layer in enumerate(llm.get_decoder().layers):
        layer.self_attn.q_proj.register_forward_hook(lambda *_, number=number: calls.append(number))
    llm.train()
    embeds = embeds.requires_grad_(True)
    llm.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=2)
    llm.get_decoder()(inputs_embeds=embeds, use_cache=False).last_hidden_state.sum().backward()
    assert calls[:4] == [0, 1, 2, 3] and len(calls) == 6
    calls.clear()
    llm.activation_checkpointing_disable()
    llm.get_decoder()(inputs_embeds=embeds, use_cache=False).last_hidden_state.sum().backward()
    assert calls == [0, 1, 2, 3]


def test_a_generation_from_embeddings_returns_and_streams_new_tokens_alone(llm, embeds):
    """models/captioner.generate; inference/video_captioner._Streamer.put: the prompt has no tokens."""
    streamed = []

    class Streamer:
        def put(self, value):
            streamed.append(value.flatten().tolist())

        def end(self):
            streamed.append("end")

    config = GenerationConfig(do_sample=False, max_new_tokens=3, eos_token_id=49, pad_token_id=0, use_cache=True)
    mask = torch.ones(1, 6, dtype=torch.int64)
    ids = llm.generate(inputs_embeds=embeds[:1], attention_mask=mask, generation_config=config, streamer=Streamer())
    assert ids.shape[0] == 1 and 1 <= ids.shape[1] <= 3
    assert [token for piece in streamed[:-1] for token in piece] == ids[0].tolist() and streamed[-1] == "end"


def test_a_streamer_waits_no_longer_than_its_timeout(models):
    """inference/video_captioner._Streamer.pieces: queue.Empty after the timeout."""
    from transformers import AutoTokenizer

    streamer = TextIteratorStreamer(AutoTokenizer.from_pretrained(models / "qwen3"), timeout=0.01)
    with pytest.raises(queue.Empty):
        next(streamer)
    streamer.end()
    assert list(streamer) == [""]


def test_what_a_model_was_loaded_from_can_be_overwritten(models, tmp_path):
    """models/pretrained.load_weights and export/weights.nameless: _name_or_path. Also what load_weights reads
    of output_loading_info."""
    with quietly():
        llm, report = Qwen3ForCausalLM.from_pretrained(models / "qwen3", output_loading_info=True)
    assert not report["mismatched_keys"] and not report["missing_keys"]
    assert str(models) in llm.config._name_or_path
    llm.config._name_or_path = "owner/name"
    llm.config.save_pretrained(tmp_path)
    assert str(models) not in (tmp_path / "config.json").read_text()


def test_weights_of_another_shape_are_reported_with_both_shapes(models):
    """models/pretrained.load_weights: (name, shape found, shape expected)."""
    config = Qwen3Config.from_pretrained(models / "qwen3", intermediate_size=96)
    with quietly():
        _, report = Qwen3ForCausalLM.from_pretrained(
            models / "qwen3", config=config, output_loading_info=True, ignore_mismatched_sizes=True
        )
    name, found, expected = min(report["mismatched_keys"])
    assert name.endswith("down_proj.weight") and (list(found), list(expected)) == ([64, 128], [64, 96])


def test_progress_bars_go_through_a_hook_that_gets_the_items(models):
    """models/pretrained.counted_phase: set_tqdm_hook(factory, args, kwargs), EmptyTqdm."""
    items = []

    def hook(factory, args, kwargs):
        items.extend(map(len, args))
        return logging.EmptyTqdm(*args)

    before = logging.set_tqdm_hook(hook)
    try:
        with quietly():
            Qwen3ForCausalLM.from_pretrained(models / "qwen3")
    finally:
        assert logging.set_tqdm_hook(before) is hook
    assert items and max(items) > 20  # the tensors


def test_clips_layers_and_its_image_processor():
    """models/vision: the class token first, hidden_states with the embeddings before the first layer, and the
    processor's fields."""
    shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    clip = CLIPVisionModel(CLIPVisionConfig(**shape, image_size=28, patch_size=14)).eval()
    with torch.no_grad():
        out = clip(torch.zeros(1, 3, 28, 28), output_hidden_states=True)
    assert out.last_hidden_state.shape == (1, 5, 16) and len(out.hidden_states) == 3
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    assert processor.crop_size["height"] == 28 and len(processor.image_mean) == len(processor.image_std) == 3


def test_generate_takes_processors_and_criteria():
    """inference/video_captioner and generation pass them on."""
    names = inspect.signature(Qwen3ForCausalLM.generate).parameters
    assert {"logits_processor", "stopping_criteria", "streamer", "generation_config"} <= set(names)
