"""The plan's figures against real models, engines' checkpoints and datasets."""

import re
import shlex
import shutil

import pytest
import torch
from peft.tuners.lora.layer import LoraLayer

from tests import tiny
from tests.clips import write_manifest, write_video
from vlmds.bench.footprint import StepMemory
from vlmds.cli import main
from vlmds.data.dataset import open_dataset
from vlmds.data.features import check_features
from vlmds.data.loader import SampleReader
from vlmds.errors import InputError
from vlmds.experiments.reading import load_experiment
from vlmds.models import dora
from vlmds.models.assemble import load_model, meta_models
from vlmds.models.language import add_adapter, load_language_model
from vlmds.models.trainable import freeze
from vlmds.models.vision import load_vision_tower
from vlmds.packing.convert import convert
from vlmds.packing.pack import pack
from vlmds.planning import plan
from vlmds.planning.memory import (
    dora_norm_bytes,
    layer_activations,
    llm_bytes,
    longest,
    recompute_interval,
    saved_bytes,
    stage_memories,
    stage_memory,
)
from vlmds.planning.plan import plan_experiment

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(models, tmp_path_factory):
    """A dataset in its three stores."""
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for i in range(5):
        write_video(folder / f"v{i}.mp4", frames=9 + i)
        rows.append({"video": f"v{i}.mp4", "caption": f"{i}번 영상입니다."})
    pack(write_manifest(folder / "m.jsonl", rows), folder / "video", progress=False)
    convert(
        folder / "video",
        folder / "frames",
        store="frames",
        num_frames=tiny.FRAMES,
        image_size=tiny.SIDE,
        progress=False,
    )
    vision = load_experiment("e1", tiny.settings(models)).vision
    convert(
        folder / "frames",
        folder / "features",
        store="features",
        progress=False,
        tower=load_vision_tower(vision, torch.float32, CPU),
        tower_name="clip",
    )
    return folder


def parts(experiment, number, world_size=1, tower=True):
    model = meta_models(experiment)
    stage = experiment.stages[number]
    freeze(model.captioner, stage)
    return stage_memory(experiment, stage, model.captioner, model.tower if tower else None, world_size)


@pytest.mark.parametrize("exp", ["e3", "e8"])
@pytest.mark.parametrize("four_bit", [False, True])
def test_llm_bytes_are_those_of_the_loaded_model(models, exp, four_bit):
    experiment = load_experiment(
        exp,
        [
            *tiny.settings(models),
            *(tiny.RESAMPLER if exp == "e8" else []),
            "llm.dtype=bfloat16",
            f"llm.load_in_4bit={str(four_bit).lower()}",
        ],
    )
    llm = add_adapter(load_language_model(experiment.llm, CPU), experiment.peft)
    real = 0
    for name, parameter in llm.named_parameters():
        if "lora_" in name:
            continue
        real += parameter.nbytes
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            nested = state.state2
            tensors = [state.absmax, state.code, state.offset, nested.absmax, nested.code]
            real += sum(tensor.nbytes for tensor in tensors)
    assert real == llm_bytes(experiment, meta_models(experiment).captioner.llm)


def test_what_a_stage_trains_and_keeps(models):
    """fp32: the trainables whole, and on each of two ranks half of their copies and moments."""
    experiment = load_experiment("e3", tiny.settings(models))
    projector = 48 * 64 + 64 + 64 * 64 + 64
    adapter = 2 * 4 * sum([64 + 64, 64 + 32, 64 + 32, 64 + 64, 64 + 128, 64 + 128, 128 + 64])
    align, finetune = (parts(experiment, number, world_size=2) for number in (0, 1))
    assert (align["trainables"], finetune["trainables"]) == (4 * projector, 4 * (projector + adapter))
    assert (align["fp32 copies"], align["Adam moments"]) == (2 * projector, 4 * projector)
    assert finetune["Adam moments"] == 4 * (projector + adapter)
    assert finetune["gradients"] == 4 * (projector + adapter)  # whole, until they are reduced
    assert finetune["gradient buckets"] == 0  # smaller than the activations that they follow
    assert finetune["activations"] > align["activations"]  # the adapter's own
    assert finetune["features ahead"] == 4 * 2 * tiny.FRAMES * 4 * 48  # of two clips, in fp32
    assert "weight average" not in align and "one unpacked weight" not in align
    averaged = parts(load_experiment("e3", [*tiny.settings(models), "training.ema_decay=0.99"]), 0, world_size=2)
    assert averaged["weight average"] == 2 * projector


@pytest.mark.parametrize("exp", ["e3", "e4"])
@pytest.mark.parametrize("number", [0, 1])
def test_a_layer_keeps_on_a_cpu_what_was_counted_on_the_meta_device(models, exp, number):
    experiment = load_experiment(exp, [*tiny.settings(models), "peft.dropout=0.05"])
    stage = experiment.stages[number]
    planned = meta_models(experiment).captioner
    freeze(planned, stage)
    captioner = load_model(experiment, CPU).captioner
    if "peft" in stage.train:
        captioner.llm = add_adapter(captioner.llm, experiment.peft)
    freeze(captioner, stage)
    captioner.train()
    base = captioner.llm.get_base_model() if "peft" in stage.train else captioner.llm
    length = longest(experiment, captioner)
    hidden = torch.randn(2, length, 64, requires_grad=True)
    rotation = base.model.rotary_emb(hidden, torch.arange(length)[None])
    layer = base.model.layers[0]
    real = saved_bytes(
        lambda: layer(hidden, attention_mask=None, position_embeddings=rotation), own=[*layer.parameters(), *rotation]
    )
    assert layer_activations(experiment, stage, planned) == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize("four_bit", [False, True])
def test_a_dora_norm_takes_what_was_counted(tmp_path, four_bit):
    """Of the Linear that takes most; wider models, so that look-up tables do not count."""
    models = tiny.make_models(tmp_path, width=256)
    experiment = load_experiment("e4", [*tiny.settings(models), f"llm.load_in_4bit={str(four_bit).lower()}"])
    llm = add_adapter(load_language_model(experiment.llm, CPU), experiment.peft)
    most = 0
    for module in llm.modules():
        if isinstance(module, LoraLayer):
            memory = StepMemory(CPU)
            memory.start()
            dora._compute_norm(module, "default", torch.float32)
            memory.stop()
            most = max(most, memory.result()["step_bytes"])
    planned = meta_models(experiment).captioner
    assert dora_norm_bytes(experiment, planned.llm) == pytest.approx(most, rel=0.02)


def test_only_a_trained_dora_adapter_needs_norms():
    """E8's Linear of 4,096 x 12,288 in bfloat16: four of it, or the unit matrix of 12,288 and B·A;
    logits and the one unpacked weight are not there then."""
    align, finetune = (parts(load_experiment("e8"), number) for number in (0, 1))
    assert "first DoRA norm" not in align and "first DoRA norm" not in parts(load_experiment("e7"), 1)
    norm = 2 * 12_288 * (12_288 + 16 + 4_096)
    assert finetune["first DoRA norm"] == (norm - finetune["logits"] - finetune["one unpacked weight"]) > 0


def test_gradients_do_not_go_where_clip_was():
    """Its pool is another stream's: without a tower the buckets are as large."""
    experiment = load_experiment("e7", ["training.micro_batch=1", "projector.width=null", "data.max_caption_tokens=1"])
    with_tower, without = parts(experiment, 0), parts(experiment, 0, tower=False)
    assert with_tower["CLIP forward"] > 0 and without["CLIP forward"] == 0
    assert with_tower["gradient buckets"] == without["gradient buckets"] > 0


def test_more_ranks_share_the_optimizer_and_nothing_else():
    experiment = load_experiment("e7")
    one, eight = parts(experiment, 1), parts(experiment, 1, world_size=8)
    for part in one:
        if part in ("fp32 copies", "Adam moments"):
            assert eight[part] == pytest.approx(one[part] / 8, rel=1e-6)
        else:
            assert eight[part] == one[part], part


def test_activations_follow_checkpointing_length_and_batch():
    def activations(exp, *overrides):
        return parts(load_experiment(exp, overrides), 1)["activations"]

    full = activations("e3", "training.activation_checkpointing=false")
    assert full > 10 * activations("e3")
    assert activations("e3") > 2 * activations("e3", "vision.pool=2")
    assert activations("e3", "training.micro_batch=4") == pytest.approx(2 * activations("e3"), rel=0.01)


def test_every_nth_layer_lies_between_none_and_all():
    experiment = load_experiment("e3")
    model = meta_models(experiment)
    freeze(model.captioner, experiment.stages[1])
    memories = stage_memories(experiment, experiment.stages[1], model.captioner, model.tower, 1)
    sizes = [sum(parts.values()) for parts in memories.values()]
    assert list(memories) == [0, 8, 4, 3, 2, 1] and sizes == sorted(sizes, reverse=True)
    assert memories[1] == parts(experiment, 1)
    for every, size in zip(memories, sizes, strict=True):
        assert recompute_interval({every: memories[every]}, size) is None  # no room for fragments
    assert recompute_interval(memories, 1e12) == 0


def test_saved_bytes_are_what_autograd_keeps():
    weight = torch.nn.Parameter(torch.ones(8, 4))
    x = torch.ones(16, 4, requires_grad=True)
    # exp keeps its result, the product keeps its input (the same storage) and the weight.
    assert saved_bytes(lambda: x.exp() @ weight.T, own=[weight]) == 16 * 4 * 4
    assert saved_bytes(lambda: x.exp() @ weight.T, own=[]) == 16 * 4 * 4 + 8 * 4 * 4


def test_stored_features_need_no_tower():
    experiment = load_experiment("e1")
    with_tower, without = parts(experiment, 0), parts(experiment, 0, tower=False)
    assert with_tower["CLIP weights"] == 2 * 303_507_456
    assert without["CLIP weights"] == without["CLIP forward"] == 0


def test_full_size_parts():
    """The figures of DESIGN: LoRA's 43,646,976 and MLP's 20,979,712 parameters."""
    found = parts(load_experiment("e3"), 1, world_size=4)
    trained = 43_646_976 + 20_979_712
    assert found["trainables"] == 2 * trained and found["Adam moments"] == 2 * trained
    # 36 layers of seven Linears in NF4, embeddings, output and norms in bfloat16.
    assert found["LLM weights"] == pytest.approx(
        2 * 2 * 151_936 * 4096 + 6_945_767_424 * (0.5 + 1 / 64 + 4 / 64 / 256), rel=1e-3
    )


def test_plan_prices_every_store_of_typical_clips(capsys):
    assert main(["plan", "--exp", "e1", "--samples-per-second", "10"]) == 0
    printed = capsys.readouterr().out
    assert "stores at 10 samples/s per GPU (given)" in printed
    rows = {line.split("  ")[0]: line for line in printed.splitlines()}
    assert "typical, not measured here" in rows["video, 360p, 10 s"]
    assert re.search(r"180\.00 +1\.80 ", rows["video, 360p, 10 s"])
    assert re.search(r"2700\.00 +27\.00 ", rows["video, 1080p, 30 s"])
    assert "9.44 MB" in rows["features"] and "exact" in rows["features"]
    assert "pass --data DIR" in printed and "checkpoint on disk" in printed


def test_plan_says_what_it_assumes(capsys):
    assert main(["plan", "--exp", "e7", "--gpus", "4"]) == 0
    printed = capsys.readouterr().out
    for part in (
        "predicted on h100-sxm; give --gpu",
        "memory of each of 4 GPUs",
        "full (auto takes less where it fits) activation checkpointing",
        "are estimates",
        "global batch 32 = micro_batch 2 × accumulation 4 × 4 ranks; set "
        "training.global_batch=32 to keep it with any number of GPUs",
        "workspaces and NCCL's communicators (assumed: 3.50 GB)",
    ):
        assert part in printed, part
    assert main(["plan", "--exp", "e7", "--set", "training.global_batch=8"]) == 0
    printed = capsys.readouterr().out
    assert "global batch 8 = micro_batch 2 × accumulation 4 × 1 rank\n" in printed
    assert "CUDA's context and workspaces (assumed: 2.50 GB)" in printed  # nobody to talk to
    assert main(["plan", "--exp", "e7", "--gpus", "3", "--set", "training.global_batch=8"]) == 2
    assert "8 is not a multiple of micro_batch 2 x 3 ranks" in capsys.readouterr().err


def test_small_sizes_are_no_zeros(models, data, capsys):
    """A tiny model's memory and a store of a few kilobytes; DoRA's norms are in one stage only."""
    assert main(["plan", "--exp", "e4", "--data", str(data / "frames"), "--set", *tiny.settings(models)]) == 0
    printed = capsys.readouterr().out
    memory = printed[printed.index("memory of 1 GPU") : printed.index("assumes ZeRO-2")]
    assert "0.00" not in memory and "GB" not in memory
    stored = next(line for line in printed.splitlines() if line.startswith("frames (this data)"))
    assert re.match(r"frames \(this data\) +\d\.\d\d kB +\d+\.?\d* kB ", stored), stored
    clip = next(line for line in printed.splitlines() if line.startswith("CLIP weights"))
    bytes_of_clip = 4 * sum(
        p.numel() for p in meta_models(load_experiment("e4", tiny.settings(models))).tower.parameters()
    )
    assert clip.split()[2:] == [f"{bytes_of_clip / 1e3:.0f}", "kB"] * 2
    assert re.search(r"first DoRA norm +0 B +\d", printed)


def test_commands_that_plan_gives_work_as_they_are_printed(models, data, tmp_path, monkeypatch, capsys):
    """From a folder with a space, with neither pack's default frames nor CLIP's default layer: they
    make what training accepts."""
    source = tmp_path / "my data" / "video"
    shutil.copytree(data / "video", source)
    settings = [*tiny.settings(models), "vision.feature_layer=-2", "vision.pool=2"]
    experiment = load_experiment("e1", settings)
    for store in ("frames", "features"):
        monkeypatch.setattr(
            plan,
            "cheapest",
            lambda needs, cores, store=store: next(need for need in needs if need.price.store == store),
        )
        assert main(["plan", "--exp", "e1", "--data", str(source), "--set", *settings]) == 0
        printed = capsys.readouterr().out.splitlines()
        place = next(number for number, line in enumerate(printed) if "vlmds pack" in line)
        program, *words = shlex.split(printed[place])
        assert program == "vlmds" and main(words) == 0
        assert printed[place + 1] == f"  then pass --data {source}-{store}"
        dataset = open_dataset(f"{source}-{store}")
        assert dataset.store == store and dataset.count("train") == 5
        SampleReader(dataset, "train", experiment.data.num_frames, tiny.SIDE)  # or InputError
        check_features(dataset, experiment)  # or InputError


def test_the_commands_for_a_blend_name_the_parts_place(models, data, monkeypatch):
    monkeypatch.setattr(
        plan, "cheapest", lambda needs, cores: next(need for need in needs if need.price.store == "frames")
    )
    blend = f"data.blend=[{{path: {data / 'video'}}}, {{path: {data / 'video'}}}]"
    printed = plan_experiment(load_experiment("e1", [*tiny.settings(models), blend]))
    assert (
        f"vlmds pack {data / 'video'} {data / 'video'}-frames --store frames --num-frames 4 --image-size 28" in printed
    )
    assert f"  then name {data / 'video'}-frames in data.blend.1.path" in printed


@pytest.mark.parametrize("store", ["video", "frames", "features"])
def test_plan_names_the_cheapest_store_of_the_data(models, data, store, capsys):
    settings = tiny.settings(models)
    assert (
        main(["plan", "--exp", "e1", "--data", str(data / store), "--samples-per-second", "1", "--set", *settings]) == 0
    )
    printed = capsys.readouterr().out
    names = {
        "video": ["video (this data)", "frames", "features"],
        "frames": ["frames (this data)", "features"],
        "features": ["features"],
    }[store]
    rows = {line.split("  ")[0] for line in printed.splitlines()}
    assert rows >= set(names)
    assert "cheapest store that keeps the GPUs busy with 8 cores per GPU: " in printed
    assert f"data: {data / store} ({store} store; train 5)" in printed


def test_a_rate_that_no_store_can_serve_is_reported(models, data):
    experiment = load_experiment("e1", tiny.settings(models, data / "frames"))
    assert "no store keeps a GPU busy with 0.001 cores" in plan_experiment(
        experiment, samples_per_second=1e9, cores_per_gpu=0.001
    )


@pytest.mark.parametrize("option", ["--gpus", "--samples-per-second", "--cores-per-gpu"])
def test_numbers_must_be_positive(option, capsys):
    assert main(["plan", "--exp", "e1", option, "0"]) == 2
    assert f"{option}: 0" in capsys.readouterr().err


def test_pooling_shows_in_the_plan(capsys):
    assert main(["plan", "--exp", "e1", "--set", "vision.pool=2"]) == 0
    printed = capsys.readouterr().out
    assert "visual tokens per clip: 1,152 " in printed and "2.36 MB" in printed
    assert main(["plan", "--exp", "e1", "--set", "vision.pool=5"]) == 2
    assert "vision.pool: 5 does not divide 24" in capsys.readouterr().err


def test_plan_of_no_dataset_is_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        plan_experiment(load_experiment("e1", [f"data.path={tmp_path / 'none'}"]))


def test_no_more_is_recomputed_than_the_memory_asks_for():
    experiment = load_experiment("e3")
    model = meta_models(experiment)
    freeze(model.captioner, experiment.stages[1])
    memories = stage_memories(experiment, experiment.stages[1], model.captioner, model.tower, 1)
    totals = [sum(parts.values()) for parts in memories.values()]
    assert list(memories) == [0, 8, 4, 3, 2, 1] and totals == sorted(totals, reverse=True)
    found = [recompute_interval(memories, size) for size in (1e12, 100e9, 60e9, 24e9, 8e9)]
    assert found[0] == 0 and found[-1] is None
    assert found[:-1] == sorted(found[:-1], key=list(memories).index)
