"""The prices of the stores: sizes and decoding times."""

import time

import numpy as np
import pytest

from tests import tiny
from tests.clips import write_manifest, write_video
from vlmds.data.index import ShardIndex
from vlmds.packing.convert import convert
from vlmds.packing.pack import pack
from vlmds.planning import prices as module
from vlmds.planning.prices import ASSUMED, Price, cheapest, needs, prices

SHAPE = dict(num_frames=tiny.FRAMES, image_size=tiny.SIDE, patches=4, width=48, fit="pad")
FEATURES = 2 * tiny.FRAMES * 4 * 48


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Long clips and short ones, each as videos and as frames."""
    folder = tmp_path_factory.mktemp("clips")
    for name, frames in (("short", 6), ("long", 120)):
        rows = []
        for i in range(4):
            write_video(folder / f"{name}{i}.mp4", frames=frames, width=320, height=240)
            rows.append({"video": f"{name}{i}.mp4", "caption": "글"})
        manifest = write_manifest(folder / f"{name}.jsonl", rows)
        pack(manifest, folder / name, progress=False)
        convert(
            folder / name,
            folder / f"{name}-frames",
            store="frames",
            progress=False,
            num_frames=tiny.FRAMES,
            image_size=tiny.SIDE,
        )
    return folder


def by_store(found):
    return {price.store: price for price in found}


def test_sizes_are_those_of_the_data(sources):
    index, frames = (ShardIndex.open(sources / name) for name in ("long", "long-frames"))
    found = by_store(prices([index], **SHAPE))
    assert list(found) == ["video", "frames", "features"]
    tar = (sources / "long/train/000000.tar").stat().st_size
    assert found["video"].bytes == tar / 4
    # The frames that it would become are those that it became, but for names and descriptions.
    jpegs = [sum(m.size for m in frames.row("train", 0, i).members if m.ext != "json") for i in range(4)]
    assert found["frames"].bytes == np.mean(jpegs)
    assert found["features"].bytes == FEATURES
    assert "4 samples timed here" in found["video"].origin
    stored = by_store(prices([frames], **SHAPE))
    assert list(stored) == ["frames", "features"]
    assert stored["frames"].bytes == (sources / "long-frames/train/000000.tar").stat().st_size / 4


def test_times_are_those_of_the_reading(sources, monkeypatch):
    """Where making a sample's tensor takes so much longer, so does the price, and no more than in
    all: frames and features are read three times, of which the fastest counts."""
    longer = {"pixels_of": 0.03, "read_jpegs": 0.02, "decode_features": 0.01}

    def slow(name):
        read = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *words: time.sleep(longer[name]) or read(*words))

    for name in longer:
        slow(name)
    began = time.perf_counter()
    found = by_store(prices([ShardIndex.open(sources / "long")], **SHAPE))
    elapsed = time.perf_counter() - began
    for store, least in zip(("video", "frames", "features"), longer.values(), strict=True):
        assert found[store].seconds >= least, store
    video, frames, features = (found[store].seconds for store in found)
    assert 4 * (video + 3 * frames) + 3 * features <= elapsed


def test_a_blend_is_priced_over_its_parts(sources):
    parts = [ShardIndex.open(sources / name) for name in ("short", "long")]
    short, long, both = (by_store(prices(p, **SHAPE))["video"] for p in (parts[:1], parts[1:], parts))
    assert both.bytes == (short.bytes + long.bytes) / 2
    assert both.origin == "6 samples timed here"


def test_without_data_the_table_says_that_nothing_was_measured():
    found = prices([], **(SHAPE | {"num_frames": 16}))
    assert [p.origin for p in found[:3]] == ["typical, not measured here"] * 3
    assert found[0] == ASSUMED[0]
    assert found[2].bytes == 2 * ASSUMED[2].bytes  # 16 frames instead of 8
    assert found[3].bytes == 2 * 16 * 4 * 48


def test_videos_that_no_deadline_suffices_for_have_no_price(sources, monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 1e-4)  # less than any decoding takes
    found = prices([ShardIndex.open(sources / "short")], **SHAPE)
    assert [price.store for price in found] == ["features"]


def test_the_cheapest_store_is_the_smallest_that_is_fed():
    found = [
        Price("video", "video", 1e6, 0.5, ""),
        Price("frames", "frames", 2e6, 0.01, ""),
        Price("features", "features", 9e6, 0.001, ""),
    ]
    for rate, cores, store in (
        (1, 1, "video"),
        (2, 1, "video"),
        (3, 1, "frames"),
        (100, 1, "frames"),
        (101, 1, "features"),
        (1000, 1, "features"),
        (3, 2, "video"),
    ):
        assert cheapest(needs(found, rate, None), cores).price.store == store
    assert cheapest(needs(found, 1001, None), 1) is None
    (need, *_) = needs(found, 4, 1000)
    assert (need.cores, need.read, need.total) == (2.0, 4e6, 1e9)
