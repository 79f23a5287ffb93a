"""Scenes and clips of the known-truth sweep: captions and parser, balance, and that limited models cannot see more."""

from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlmds.demo.known_clips import FRAMES, LATER, make_known_clips
from vlmds.demo.known_models import draw_known_frames, observe
from vlmds.demo.known_scenes import (
    TASKS,
    Scene,
    caption,
    chance,
    distinct_captions,
    held_out,
    indistinguishable,
    parse,
    right,
    scenes_of,
    sets_of_split,
)  # fmt: skip
from vlmds.experiments.reading import load_experiment
from vlmds.models.projectors import build_projector
from vlmds.packing.pack import pack

ALL = [scene for task in TASKS for scene in scenes_of(task)]
scenes = st.sampled_from(ALL)


@given(scenes)
def test_a_caption_parses_back_to_its_scene(scene):
    assert parse(caption(scene)) == scene
    assert right(caption(scene), scene)


@given(scenes, scenes)
def test_only_captions_with_the_answer_are_right(one, other):
    same = one.task == other.task and one.answer == other.answer
    assert right(caption(one), other) is same


def test_captions_name_one_scene_each():
    assert distinct_captions(ALL) == len(ALL) == len(set(ALL)) > 900


def test_wrong_particles_count_and_other_text_does_not():
    truth = Scene("counting", "red", "circle", number=3)
    assert right("빨간 원가  모두 세 개 있습니다", truth)
    for text in ("", "빨간 원이 모두 세 개", "빨간 원이 모두 여섯 개 있습니다.", "빨간 원이 모두 세 개 있습니다. 끝"):
        assert parse(text) is None and not right(text, truth)


@pytest.mark.parametrize("task", TASKS)
def test_splits_share_no_caption_and_balance_their_scenes(task):
    found = {split: sets_of_split(task, split, 400, 0) for split in ("train", "val")}
    clips = {split: [scene for own in sets for scene in own] for split, sets in found.items()}
    assert all(held_out(scene) is (split == "val") for split, own in clips.items() for scene in own)
    assert not {*map(caption, clips["train"])} & {*map(caption, clips["val"])}
    for own in clips.values():
        counts = Counter(own)
        assert max(counts.values()) - min(counts.values()) <= 1
        assert {*counts} == {s for s in scenes_of(task) if held_out(s) is held_out(own[0])} and 395 <= len(own) <= 400


def test_a_full_validation_split_has_over_1000_clips_and_hundreds_of_captions():
    clips = [scene for task in TASKS for own in sets_of_split(task, "val", 210, 0) for scene in own]
    assert len(clips) >= 1000 and distinct_captions(clips) > 300


@pytest.mark.parametrize("task", TASKS)
def test_chance_is_what_the_best_guess_gets_right(task):
    """The best single answer: to each set if the task has sets, else to all clips of a colour, which every limited
    model is granted (control: to all clips)."""
    groups: dict = {}
    for scene in scenes_of(task):
        known = frozenset(indistinguishable(scene)) if task in ("order", "later") else scene.colour
        groups.setdefault("" if task == "control" else known, []).append(scene.answer)
    best = sum(Counter(answers).most_common(1)[0][1] for answers in groups.values())
    assert best / sum(map(len, groups.values())) == pytest.approx(chance(task))


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """For 8 frames and for 1, the checksums of the stored frames of each clip."""
    folder = tmp_path_factory.mktemp("known")
    manifest = make_known_clips(folder, train=2, val=10)
    before = manifest.stat().st_mtime_ns
    assert make_known_clips(folder, train=2, val=10).stat().st_mtime_ns == before  # used again
    found = {}
    for frames in (FRAMES, 1):
        out = folder / f"shards-{frames}"
        pack(manifest, out, store="frames", image_size=64, num_frames=frames, progress=False, workers=1)
        rows = pq.read_table(out / "index.parquet").to_pylist()
        found[frames] = {r["key"]: [m["crc32"] for m in r["members"] if m["ext"] != "json"] for r in rows}
    return found


def test_a_swapped_clip_has_the_same_stored_frames_in_reverse_order(packed):
    sets = [key[:-1] for key in packed[FRAMES] if key.startswith("val_order") and key.endswith("_0")]
    assert len(sets) == 5
    for name in sets:
        one, other = packed[FRAMES][name + "0"], packed[FRAMES][name + "1"]
        assert len(one) == FRAMES and one == other[::-1] != other


def test_the_later_event_is_in_no_frame_of_the_first_half(packed):
    for name in ("val_later_00000_", "val_later_00001_"):
        clips = [packed[FRAMES][f"{name}{number}"] for number in range(5)]
        assert [len({own[k] for own in clips}) for k in range(FRAMES)] == [1] * LATER + [5] * (FRAMES - LATER)
        assert {tuple(packed[1][f"{name}{number}"]) for number in range(5)} == {(clips[0][FRAMES // 2],)}


@pytest.mark.parametrize("exp", ["e5", "e7"])
def test_without_frame_times_a_resampler_gives_a_clip_and_its_reverse_the_same_tokens(exp):
    torch.manual_seed(0)
    features = torch.randn(2, FRAMES, 16, 32)
    reverse = features.flip(1).flatten(1, 2)
    for timed in (False, True):
        settings = [
            "projector.width=32", "projector.num_queries=4", "projector.num_heads=4",
            f"projector.temporal_embedding={str(timed).lower()}",
        ]  # fmt: skip
        projector = build_projector(load_experiment(exp, settings).projector, 32, 32, FRAMES, 16).eval()
        with torch.no_grad():
            one, other = projector(features.flatten(1, 2)), projector(reverse)
        assert torch.allclose(one, other, atol=1e-5) is not timed


def test_observations_and_frames_show_what_the_captions_name():
    rng = np.random.default_rng(0)
    for scene in ALL[::37]:
        for per_frame in (1, 4, 16):
            bags = observe(scene, per_frame, rng)
            assert len(bags) == FRAMES * per_frame and all(bags)
    frames = draw_known_frames(60, 64, 0)
    assert frames.pixels.shape == (60, 3, 64, 64) and frames.colour.shape == (60, 16)
    things = (frames.colour < 6).sum(1)
    assert torch.equal(things[frames.number > 1], frames.number[frames.number > 1])  # one patch for each small thing
    assert (frames.dot < 6).any(1).sum() > 10
