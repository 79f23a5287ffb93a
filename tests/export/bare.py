"""Loading of exported folders where vlmds cannot be imported: `python -I bare.py JOB OUT`.

JOB: an .npz with "frames" uint8 [clips, F, 3, S, S], and a .json beside it: folders, prompt and
max_new_tokens. OUT: an .npz, for each folder its captions and the first clip's prompt logits.
"""

import json
import sys
import warnings
from pathlib import Path

sys.modules["vlmds"] = None  # importing it raises from here on
warnings.simplefilter("ignore")

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


@torch.no_grad()
def answers(folder: Path, frames: np.ndarray, prompt: str, max_new_tokens: int):
    options = {"trust_remote_code": True} if (folder / "modeling_vlmds.py").exists() else {}
    processor = AutoProcessor.from_pretrained(folder, **options)
    model = AutoModelForImageTextToText.from_pretrained(folder, **options).eval()
    content = [{"type": "image"}] * frames.shape[1] + [{"type": "text", "text": prompt}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    images = [[Image.fromarray(f.transpose(1, 2, 0)) for f in clip] for clip in frames]
    batch = processor(images=images, text=[text] * len(images), return_tensors="pt")
    ids = model.generate(**batch, max_new_tokens=max_new_tokens)[:, batch["input_ids"].shape[1] :]
    captions = [c.strip() for c in processor.batch_decode(ids, skip_special_tokens=True)]
    one = processor(images=images[0], text=text, return_tensors="pt")
    return captions, model(**one).logits[0].numpy()


def main(job: Path, out: Path) -> None:
    settings = json.loads(job.with_suffix(".json").read_text(encoding="utf-8"))
    frames = np.load(job)["frames"]
    found = {}
    for folder in settings["folders"]:
        captions, logits = answers(Path(folder), frames, settings["prompt"], settings["max_new_tokens"])
        found |= {f"{Path(folder).name}/captions": np.array(captions), f"{Path(folder).name}/logits": logits}
    np.savez(out, **found)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
