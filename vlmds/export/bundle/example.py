"""Captions of videos by the model in this folder: python example.py VIDEO...

Needs torch, transformers, av, pillow and numpy. The model was trained on frames chosen and resized
exactly as by frames_vlmds/; other frames give worse captions.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

FOLDER = Path(__file__).resolve().parent
NUM_FRAMES = 8
FIT = "pad"
PROMPT = "이 영상을 설명해주세요."
OPTIONS = {}


def read_frames(video, size):
    """The frames on display at the centres of NUM_FRAMES equal spans of the video, one of a still picture:
    upright RGB pictures of size x size."""
    sys.path.insert(0, str(FOLDER))
    from frames_vlmds.decode import decode_frames  # type: ignore[import-not-found]  # is beside this file
    from frames_vlmds.fit import resize_frames  # type: ignore[import-not-found]
    from frames_vlmds.probe import probe  # type: ignore[import-not-found]
    from frames_vlmds.sampling import is_still  # type: ignore[import-not-found]

    info = replace(probe(video), decoder="pyav")
    frames = decode_frames(video, info, 1 if is_still(info.frames) else NUM_FRAMES)
    return [Image.fromarray(frame) for frame in resize_frames(frames, size, FIT).transpose(0, 2, 3, 1)]


def main(videos):
    processor = AutoProcessor.from_pretrained(FOLDER, **OPTIONS)
    model = AutoModelForImageTextToText.from_pretrained(FOLDER, **OPTIONS).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    size = processor.image_processor.crop_size["height"]
    for video in videos:
        frames = read_frames(video, size)
        content = [{"type": "image"}] * len(frames) + [{"type": "text", "text": PROMPT}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=frames, text=text, return_tensors="pt").to(model.device)
        ids = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
        print(f"{video}\t{processor.decode(ids, skip_special_tokens=True).strip()}")


if __name__ == "__main__":
    main(sys.argv[1:])
