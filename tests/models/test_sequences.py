import pytest
from transformers import AutoTokenizer

from vlmds.demo.pretrain import train_tokenizer
from vlmds.errors import InputError
from vlmds.models.captioner import IGNORE, VISUAL
from vlmds.models.sequences import SequenceBuilder

PROMPT = "이 영상을 설명해주세요."
CAPTION = "한 남자가 공원에서 강아지와 산책하고 있습니다."


@pytest.fixture(scope="module", params=["tiny", "qwen3"])
def tokenizer(request):
    """The tests' own, of the same special tokens and template; and the real one where it lies beside the project."""
    if request.param == "tiny":
        return train_tokenizer([], vocab_size=600)
    return AutoTokenizer.from_pretrained(request.getfixturevalue("qwen_tokenizer_folder"))


@pytest.fixture
def builder(tokenizer):
    return SequenceBuilder(tokenizer, PROMPT, num_visual_tokens=5, max_caption_tokens=64)


def test_the_rendered_prompt_is_pinned(builder):
    assert builder.render() == (
        "<|im_start|>user\n",
        f"{PROMPT}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    )


def test_loss_on_caption_and_end_of_turn_only(builder, tokenizer):
    sequence = builder.training(CAPTION)
    supervised = [i for i, label in zip(sequence.input_ids, sequence.labels) if label != IGNORE]
    assert tokenizer.decode(supervised) == CAPTION + "<|im_end|>"
    assert sequence.input_ids[-len(supervised) :] == supervised
    assert sequence.input_ids.count(VISUAL) == 5


def test_training_begins_with_what_inference_sees(builder):
    prompt = builder.prompt_ids()
    assert builder.training(CAPTION).input_ids[: len(prompt)] == prompt
    other = "무엇이 보이나요?"
    assert builder.training(CAPTION, other).input_ids[: len(builder.prompt_ids(other))] == (builder.prompt_ids(other))


def test_only_the_caption_is_cut_and_then_has_no_end(builder):
    sequence = builder.training(CAPTION * 20)
    kept = [label for label in sequence.labels if label != IGNORE]
    assert len(kept) == 64 and builder.eos_token_id not in kept
    assert sequence.input_ids[:-64] == builder.prompt_ids()


def test_padding_sides(builder):
    sequences = [builder.training(CAPTION), builder.training("짧다")]
    batch = builder.collate_training(sequences)
    short = len(sequences[1].input_ids)
    assert batch["input_ids"][1, :short].tolist() == sequences[1].input_ids
    assert (batch["labels"][1, short:] == IGNORE).all()
    batch = builder.collate_generation([None, "짧은 질문"])
    lengths = batch["attention_mask"].sum(1).tolist()
    assert batch["input_ids"][1, -lengths[1] :].tolist() == builder.prompt_ids("짧은 질문")
    assert batch["attention_mask"][:, -1].tolist() == [1, 1]


def test_a_caption_without_tokens_is_an_error(builder):
    with pytest.raises(ValueError, match="no tokens"):
        builder.training("  ")


def test_a_template_that_ends_otherwise_is_refused(tokenizer):
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
        with pytest.raises(InputError, match="eos token"):
            SequenceBuilder(tokenizer, PROMPT, 5)
    finally:
        tokenizer.chat_template = template
