"""Operations counted from shapes against those that run, and proposals for a card."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests import tiny
from vlmds.cli import main
from vlmds.errors import InputError
from vlmds.experiments.reading import load_experiment
from vlmds.models.assemble import load_model, meta_models
from vlmds.models.captioner import IGNORE
from vlmds.models.language import add_adapter
from vlmds.models.sequences import SequenceBuilder
from vlmds.models.trainable import freeze
from vlmds.planning.cards import CARDS, device_card, find_card
from vlmds.planning.flops import sample_flops
from vlmds.planning.memory import longest
from vlmds.planning.propose import predicted_rate, proposals


@pytest.mark.parametrize("exp", ["e3", "e7"])
@pytest.mark.parametrize("stage", [0, 1])
def test_operations_are_those_that_run(models, exp, stage):
    """Without attention's, which the counter takes for a full square."""
    extra = tiny.RESAMPLER if exp == "e7" else []
    experiment = load_experiment(exp, [*tiny.settings(models), *extra])
    model = load_model(experiment, torch.device("cpu"))
    captioner = model.captioner
    if stage:
        captioner.llm = add_adapter(captioner.llm, experiment.peft)
    freeze(captioner, experiment.stages[stage])
    builder = SequenceBuilder(model.tokenizer, "무엇?", captioner.projector.num_tokens)
    batch = builder.collate_training([builder.training("0번 영상입니다.")])
    frames = torch.zeros(1, tiny.FRAMES, 3, tiny.SIDE, tiny.SIDE, dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter:
        features = model.features({"frames": frames})
        captioner(features, batch["input_ids"], batch["labels"]).backward()
    ran = sum(
        count
        for op, count in counter.get_flop_counts()["Global"].items()
        if "scaled_dot_product" not in str(op) and "bmm" not in str(op)
    )
    shape = meta_models(experiment)
    if not stage:  # the adapter does not exist then
        shape.captioner.llm = shape.captioner.llm.unload()
        shape.captioner.llm.get_base_model = lambda: shape.captioner.llm
    freeze(shape.captioner, experiment.stages[stage])
    length, supervised = batch["input_ids"].shape[1], int((batch["labels"] != IGNORE).sum())
    found = sample_flops(shape, length, supervised)
    config = captioner.llm.config
    attention = 3 * config.num_hidden_layers * 2 * config.num_attention_heads * config.head_dim * length**2
    vision = model.tower.clip.config
    tokens = (vision.image_size // vision.patch_size) ** 2 + 1
    attention += tiny.FRAMES * vision.num_hidden_layers * 4 * tokens**2 * vision.hidden_size
    # A projector's first layer needs no gradient of its input, and a resampler's attention counts.
    assert found.total - attention == pytest.approx(ran, rel=0.03)
    assert found.total - attention >= ran * 0.999


def test_a_larger_card_takes_more_and_nothing_fits_a_small_one():
    experiment = load_experiment("e3")
    shape = meta_models(experiment)
    large = proposals(experiment, shape, find_card("H200"), 1, False)
    small = proposals(experiment, shape, find_card("rtx4090"), 1, False)
    assert {p.in_4bit for p in large} == {True, False} and {p.in_4bit for p in small} == {True}
    assert all(p.micro_batch * p.accumulation == 8 for p in large)
    assert all(p.memory < CARDS["rtx4090"].memory for p in small)
    assert large[0].rate == max(p.rate for p in large) > small[0].rate
    with pytest.raises(InputError, match="cannot be shared by 3 GPUs"):
        proposals(load_experiment("e3", ["training.global_batch=8"]), shape, find_card("h200"), 3, False)


def test_of_equally_fast_ones_the_largest_micro_batch_is_proposed():
    """With 64 visual tokens a small micro-batch waits for weights and launches."""
    experiment = load_experiment("e7")
    found = proposals(experiment, meta_models(experiment), find_card("h200"), 1, False)
    assert [p.micro_batch for p in found if not p.in_4bit][0] == 8
    rates = {p.micro_batch: p.rate for p in found if not p.in_4bit}
    assert rates[8] > rates[2] > rates[1]


def test_with_few_visual_tokens_the_host_is_the_slower_one():
    """E7 at micro-batch 2 in NF4: two passes of 36 layers, each of 100 kernels at 5 µs and 7 Linears
    at 75 µs, 73.8 ms for 2 samples, on any card; E3's 4,608 tokens keep the GPU busy for longer."""

    def rate(exp, card, every=0, *overrides):
        experiment = load_experiment(exp, overrides)
        model = meta_models(experiment)
        freeze(model.captioner, experiment.stages[1])
        return predicted_rate(experiment, model, find_card(card), every, False)

    assert rate("e7", "h100") == pytest.approx(2 / 73.8e-3) == rate("e7", "b200")
    assert rate("e7", "h100", 1) == pytest.approx(2 / (1.5 * 73.8e-3))  # forward a second time
    # 0.7 s of the GPU for 2 samples.
    assert rate("e3", "h100") == pytest.approx(rate("e3", "b200") * 989 / 2250, rel=0.05)
    whole = rate("e7", "h100", 0, "llm.load_in_4bit=false")
    assert 2 / 73.8e-3 < whole < 2 / 36e-3  # kernels are launched there, too


def test_a_long_prompt_takes_memory():
    model = meta_models(load_experiment("e7")).captioner
    assert longest(load_experiment("e7", [f"data.prompt={'가' * 1016}"]), model) == (
        longest(load_experiment("e7"), model) + 1000
    )


def test_the_plan_tells_how_long_stages_of_known_steps_take(capsys):
    assert (
        main(
            [
                "plan",
                "--exp",
                "e7",
                "--gpus",
                "2",
                "--samples-per-second",
                "4",
                "--set",
                "stages.0.epochs=null",
                "stages.0.steps=3600",
            ]
        )
        == 0
    )
    assert "3,600 steps, about 2.0 h" in capsys.readouterr().out  # of 16 samples, 8 a second


def test_the_plan_proposes(capsys):
    assert main(["plan", "--exp", "e7", "--gpu", "a100-40", "--set", "training.global_batch=8"]) == 0
    printed = capsys.readouterr().out
    assert "on a100-40-sxm (40 GB)" in printed and "<- fastest" in printed
    fastest = next(line for line in printed.splitlines() if "<- fastest" in line).split()[-3]
    assert f"stores at {float(fastest):.3g} samples/s per GPU (predicted for the fastest" in printed
    assert main(["plan", "--exp", "e7", "--gpu", "h201"]) == 2
    assert "known are b200, h200-sxm, h200-nvl" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200", "h200-sxm"),
        ("NVIDIA H200 NVL", "h200-nvl"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA RTX A6000", "a6000"),
        ("NVIDIA A100-SXM4-40GB", "a100-40-sxm"),
        ("NVIDIA A100-PCIE-40GB", "a100-40-pcie"),
        ("NVIDIA A100-SXM4-80GB", "a100-80-sxm"),
        ("NVIDIA A100 80GB PCIe", "a100-80-pcie"),
        ("A100-SXM4-80GB", "a100-80-sxm"),  # of older drivers
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
    ],
)
def test_cards_by_cudas_names(name, card):
    assert device_card(name) is find_card(name) is CARDS[card]


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
        "NVIDIA GH200 480GB",
        "NVIDIA H100",
        "NVIDIA L40",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA A100-SXM-64GB",
        "NVIDIA GB10",
        "",
    ],
)
def test_a_similar_name_is_no_known_card(name):
    """A slice has a part of the memory and of the speed, another product has its own."""
    assert device_card(name) is None


def test_forms_of_a_card_differ_and_short_names_are_sxm():
    pcie, nvl, sxm = (find_card(f"h100-{form}") for form in ("pcie", "nvl", "sxm"))
    assert (pcie.flops, nvl.flops, sxm.flops) == (756e12, 835e12, 989e12)
    assert (pcie.bandwidth, nvl.bandwidth, sxm.bandwidth) == (2.0e12, 3.9e12, 3.35e12)
    assert (pcie.memory, nvl.memory, sxm.memory) == (80e9, 94e9, 80e9)
    for short in ("h200", "H100", "a100-80", "a100-40"):
        assert find_card(short) is CARDS[f"{short.lower()}-sxm"]
