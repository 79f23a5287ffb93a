"""Captions of videos by the model in this folder: python example.py VIDEO...

Needs torch, transformers, av, pillow and numpy. The model was trained on frames chosen and resized
exactly as here; other frames work, but worse.
"""

import sys
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

FOLDER = Path(__file__).resolve().parent
NUM_FRAMES = 8
PROMPT = "이 영상을 설명해주세요."
OPTIONS = {}


def choose_frames(video):
    """The frames on display at the centres of NUM_FRAMES equal spans of the video: RGB arrays,
    upright."""
    with av.open(video) as container:
        stream = container.streams.best("video")
        times = sorted(frame.pts for frame in container.decode(stream))
        second = 1 / float(stream.time_base)
        rate = float(stream.average_rate or 25)
    count = len(times)
    gap = (times[-1] - times[0]) / (count - 1) if count > 1 else second / rate
    length = times[-1] - times[0] + gap
    centres = times[0] + (np.arange(NUM_FRAMES) + 0.5) * length / NUM_FRAMES
    after = np.searchsorted(times, centres + 1e-6 * second, side="right")
    wanted = [times[max(i - 1, 0)] for i in after]
    found = {}
    with av.open(video) as container:
        for frame in container.decode(container.streams.best("video")):
            if frame.pts in wanted and frame.pts not in found:
                turns = round(frame.rotation / 90)  # counterclockwise quarters
                found[frame.pts] = np.rot90(frame.to_ndarray(format="rgb24"), turns)
    return [found[time] for time in wanted]


def resize(frame, size):
    """Shortest edge to `size`, bicubic, then the centre size x size."""
    height, width = frame.shape[:2]
    long = int(size * max(height, width) / min(height, width))
    width, height = (size, long) if width <= height else (long, size)
    left, top = (width - size) // 2, (height - size) // 2
    image = Image.fromarray(np.ascontiguousarray(frame))
    return image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))


def main(videos):
    processor = AutoProcessor.from_pretrained(FOLDER, **OPTIONS)
    model = AutoModelForImageTextToText.from_pretrained(FOLDER, **OPTIONS).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    size = processor.image_processor.crop_size["height"]
    content = [{"type": "image"}] * NUM_FRAMES + [{"type": "text", "text": PROMPT}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    for video in videos:
        images = [resize(frame, size) for frame in choose_frames(video)]
        inputs = processor(images=images, text=text, return_tensors="pt").to(model.device)
        ids = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
        print(f"{video}\t{processor.decode(ids, skip_special_tokens=True).strip()}")


if __name__ == "__main__":
    main(sys.argv[1:])
