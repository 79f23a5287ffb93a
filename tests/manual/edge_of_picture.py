"""What crop, pad and stretch do to events at the edge of a 16:9 picture.

`python -m tests.manual.edge_of_picture OUTPUT [--small]` makes the demo's clips in 16:9, with the shape
at the left or right edge, trains the demo's model under each data.fit, and prints the shares of right
attributes on held-out clips. Of a shape that moves up or down the centre crop shows nothing; of one
that moves left or right it shows part of the way. The tiny CLIP is pre-trained on shapes of all sizes
that the three fits make. --small: few clips and steps, to try the program; its figures say nothing.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from vlmds.demo import clips
from vlmds.demo.pretrain import make_tiny_models
from vlmds.demo.run import ATTRIBUTES, Size, caption_held_out, score, tiny_form, train_demo
from vlmds.packing.pack import pack
from vlmds.video.fit import RESIZERS

IMAGE_SIZE = 128
WIDTH = 16 / 9  # of the frame's height
SHAPE_SIZE = (0.28, 0.34)  # of the frame's height; what the crop removes on each side is 0.39
PRETRAINED_SIZES = (0.15, 0.44)  # of the square's side: padded 0.16 … 0.19, cropped 0.28 … 0.34
SMALL = Size(train_clips=48, val_clips=24, clip_steps=5, llm_steps=5)


def edge_scene(attributes: clips.Attributes, right: bool, rng: np.random.Generator) -> clips.Scene:
    """A scene of the square at the picture's left or right edge, the shape beside that edge."""
    scene = clips.sample_scene(attributes, rng)
    size = round(scene.side * rng.uniform(*SHAPE_SIZE))
    step = clips.DIRECTIONS[attributes.direction][1][0]
    nearest = rng.uniform(0, 0.03 if step else 0.36 - size / scene.side) * scene.side
    way = scene.travel * abs(step)
    low = scene.side - size - nearest - way if right else nearest  # the shape's leftmost place
    start = (low + (way if step < 0 else 0), scene.start[1])
    return replace(scene, shape_size=size, start=start)


def render(scene: clips.Scene, right: bool, rng: np.random.Generator) -> np.ndarray:
    """uint8 [frames, height, width, 3] in 16:9."""
    mask = clips.shape_mask(scene.attributes.shape, scene.shape_size, scene.angle)
    rest = round(scene.side * (WIDTH - 1) / 2) * 2
    frames = []
    for progress in np.linspace(0, 1, scene.frames):
        event, _ = clips.draw_frame(scene, mask, float(progress), rng)
        empty, _ = clips.draw_frame(scene, np.zeros_like(mask), 0.0, rng)
        frames.append(np.hstack([empty[:, :rest], event] if right else [event, empty[:, :rest]]))
    return np.stack(frames)


def make_edge_clips(out: Path, size: Size) -> Path:
    """Write `out`/clips and `out`/manifest.jsonl; returns the manifest."""
    (out / "clips").mkdir(parents=True, exist_ok=True)
    rows = []
    counts = (size.train_clips, size.val_clips)
    for split, count, attributes in zip(("train", "val"), counts, clips.combinations(), strict=True):
        for number in range(count):
            rng = np.random.default_rng([1, ("train", "val").index(split), number])
            right = bool(rng.integers(2))
            scene = edge_scene(attributes[number % len(attributes)], right, rng)
            name = f"{split}_{number:05d}"
            clips.write_video(out / "clips" / f"{name}.mp4", render(scene, right, rng), scene.fps)
            text = clips.caption(scene.attributes)
            rows.append({"video": f"clips/{name}.mp4", "caption": text, "id": name, "split": split})
    manifest = out / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return manifest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--small", action="store_true", help="few clips and steps")
    args = parser.parse_args()
    output, size = args.output.absolute(), SMALL if args.small else Size()
    manifest = make_edge_clips(output / "data", size)
    usual, clips.SHAPE_SIZE = clips.SHAPE_SIZE, PRETRAINED_SIZES
    make_tiny_models(output / "models", image_size=IMAGE_SIZE, clip_steps=size.clip_steps, llm_steps=size.llm_steps)
    clips.SHAPE_SIZE = usual
    settings = tiny_form("demo", output)
    overrides = ("stages.0.epochs=null", "stages.0.steps=2", "stages.1.epochs=null", "stages.1.steps=2")
    rows = []
    for fit in RESIZERS:
        pack(manifest, output / fit, store="frames", image_size=IMAGE_SIZE, fit=fit, progress=False)
        more = overrides if args.small else ()
        train_demo(settings, output / fit, output / "runs" / fit, (f"data.fit={fit}", *more))
        held_out, captions = caption_held_out(output / "runs" / fit, manifest)
        results = score(captions, [clip["caption"] for clip in held_out])
        (output / f"{fit}.json").write_text(json.dumps(results, indent=2) + "\n")
        rows.append((fit, results["held_out"]))
        chance = results["chance"]
    columns = ("exact", *ATTRIBUTES)
    print(f"\n| data.fit | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for name, shares in (*rows, ("chance", chance)):
        print(f"| {name} | {' | '.join(f'{shares[column]:.1%}' for column in columns)} |")


if __name__ == "__main__":
    main()
