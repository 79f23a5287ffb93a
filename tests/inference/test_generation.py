"""Caption generation by a tiny model that generates words with certainty."""

import argparse

import numpy as np
import pytest
import torch

from tests import tiny
from vlmds.cli.options import add_generation, generation_options
from vlmds.errors import InputError
from vlmds.inference.generation import GenerationOptions, GumbelNoise
from vlmds.inference.video_captioner import VideoCaptioner, until_stop


@pytest.fixture(scope="module")
def frames():
    shape = (5, tiny.FRAMES, 3, tiny.SIDE, tiny.SIDE)
    return np.random.RandomState(0).randint(0, 256, shape).astype(np.uint8)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tiny.make_models(tmp_path_factory.mktemp("models"), speaking=True)


@pytest.fixture(scope="module")
def captioner(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("captioner") / "artifact"
    tiny.make_speaker(models, folder, "e7")
    return VideoCaptioner.from_pretrained(folder)


def test_gumbel_noise_samples_from_the_softmax():
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0])
    noise = GumbelNoise(seed=3)
    drawn = torch.stack([noise(None, logits[None])[0].argmax() for _ in range(4000)])
    expected = logits.softmax(0) * 4000
    chi_square = ((torch.bincount(drawn, minlength=4) - expected) ** 2 / expected).sum()
    assert chi_square < 11.34  # the 1% point of 3 degrees of freedom


def test_gumbel_noise_is_the_seeds_and_the_same_for_every_row():
    """On a CPU: that of PyTorch's generator there."""
    scores = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    noise, generator = GumbelNoise(seed=5), torch.Generator().manual_seed(5)
    for _ in range(2):
        expected = torch.empty(50, dtype=torch.float64).exponential_(generator=generator).log()
        assert torch.equal(noise(None, scores), scores - expected.float())
    assert noise.generator.device == scores.device


def test_sampled_captions_do_not_depend_on_the_batch_but_on_the_seed(captioner, frames):
    options = GenerationOptions(max_new_tokens=12, temperature=1.0, top_p=0.9, seed=1)
    together = captioner.caption_frames(frames, None, options)
    assert together == [captioner.caption_frames(f[None], None, options)[0] for f in frames]
    other = GenerationOptions(max_new_tokens=12, temperature=1.0, top_p=0.9, seed=2)
    assert captioner.caption_frames(frames, None, other) != together
    assert captioner.caption_frames(frames, None, GenerationOptions(max_new_tokens=12)) != together


def test_hardly_any_temperature_is_greedy(captioner, frames):
    cold = GenerationOptions(max_new_tokens=12, temperature=1e-6)
    assert captioner.caption_frames(frames, None, cold) == captioner.caption_frames(
        frames, None, GenerationOptions(max_new_tokens=12)
    )


def test_a_high_repetition_penalty_leaves_no_repetition(models, frames, tmp_path):
    """Half of the model's words have a positive logit at any time, so that there are always others
    to choose from."""
    tiny.make_speaker(models, tmp_path / "artifact", "e7", [(frames[0], None, " ".join(["별이"] * 12))])
    captioner = VideoCaptioner.from_pretrained(tmp_path / "artifact")
    spoken = {}
    for penalty in (1.0, 1e6):
        options = GenerationOptions(max_new_tokens=12, repetition_penalty=penalty)
        spoken[penalty] = captioner.caption_frames(frames[:1], None, options)[0].split()
    assert spoken[1.0] == ["별이"] * 12
    assert len(spoken[1e6]) == len(set(spoken[1e6])) == 12 and spoken[1e6][0] == "별이"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_streamed_pieces_are_the_caption(captioner, frames, temperature):
    options = GenerationOptions(max_new_tokens=16, temperature=temperature, seed=4)
    pieces = list(captioner.stream(frames[0], None, options))
    found = [piece for piece in pieces if piece.strip()]
    assert len(found) > 1 and (len(found) == 16 or temperature)  # one for each word
    assert "".join(pieces).strip() == captioner.caption_frames(frames[:1], None, options)[0]


def read(stream):
    """(pieces, the stream's ending)"""
    pieces = []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as end:
            return pieces, end.value


def test_a_stop_text_ends_the_caption_before_it(captioner, frames):
    options = GenerationOptions(max_new_tokens=16)
    whole = captioner.caption_frames(frames[:1], None, options)[0]
    ids = captioner.builder.tokenizer.encode(f" {whole}", add_special_tokens=False)  # a space and a word each
    borders = [i for i, letter in enumerate(whole) if letter == " "]
    middle = borders[len(borders) // 2]
    for stop in (whole[middle - 1 : middle + 2], whole[middle + 1 :]):  # over a border; several words
        pieces, ending = read(captioner.stream(frames[0], None, options, [stop, "never written"]))
        assert "".join(pieces).strip() == whole[: whole.index(stop)].strip()
        needed = next(n for n in range(len(ids) + 1) if stop in captioner.builder.tokenizer.decode(ids[:n]))
        assert (ending.reason, ending.new_tokens) == ("stop", needed)
    pieces, ending = read(captioner.stream(frames[0], None, options, ["never written"]))
    assert "".join(pieces).strip() == whole and (ending.reason, ending.new_tokens) == ("length", 16)
    visual = captioner.model.captioner.projector.num_tokens
    assert ending.prompt_tokens == len(captioner.builder.prompt_ids(None, visual))


@pytest.mark.parametrize("size", [1, 2, 3, 50])
@pytest.mark.parametrize(
    ("stop", "kept"),
    [(["가나"], "ab "), (["나라", "b 가"], "a"), (["다라마"], "ab 가나다라"), (["x", "라"], "ab 가나다")],
)
def test_stop_texts_are_found_over_the_borders_of_pieces(size, stop, kept):
    text = "ab 가나다라"
    pieces, found = read(until_stop([text[i : i + size] for i in range(0, len(text), size)], stop))
    assert "".join(pieces) == kept and found == (kept != text)


def test_leaving_a_stream_ends_it_and_its_errors_reach_the_reader(captioner, frames):
    steps = []
    hook = captioner.model.captioner.llm.get_output_embeddings().register_forward_hook(lambda *_: steps.append(1))
    stream = captioner.stream(frames[0], None, GenerationOptions(max_new_tokens=10_000))
    next(stream)
    stream.close()  # joins the writer
    hook.remove()
    assert 0 < len(steps) < 10_000
    with pytest.raises(ValueError, match="image size"):
        list(captioner.stream(frames[0][:, :, :5], None))
    with pytest.raises(InputError, match="beam search cannot be streamed"):
        captioner.stream(frames[0], None, GenerationOptions(num_beams=2))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (dict(max_new_tokens=0), "max_new_tokens 0"),
        (dict(top_p=1.5), "top_p 1.5"),
        (dict(temperature=-1), "temperature -1"),
        (dict(num_beams=2, temperature=1.0), "does not sample"),
        (dict(top_p=0.5), "set temperature"),
        (dict(repetition_penalty=0.0), "repetition_penalty"),
    ],
)
def test_values_out_of_range_are_refused_by_name(bad, message):
    with pytest.raises(InputError, match=message):
        GenerationOptions(**bad)


def test_the_command_line_has_the_options_and_their_defaults():
    parser = argparse.ArgumentParser()
    add_generation(parser.add_argument)
    assert generation_options(parser.parse_args([])) == GenerationOptions()
    given = ["--max-new-tokens", "7", "--beams", "3", "--repetition-penalty", "1.5", "--seed", "2"]
    assert generation_options(parser.parse_args(given)) == GenerationOptions(7, 3, repetition_penalty=1.5, seed=2)
    sampled = generation_options(parser.parse_args(["--temperature", "0.5", "--top-p", "0.9"]))
    assert (sampled.temperature, sampled.top_p) == (0.5, 0.9)
