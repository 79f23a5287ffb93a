"""Loss curves of the same training with every optimisation and in the plain form, from one seed.

`python -m tests.manual.optimisations [STEPS]` trains both, STEPS optimizer steps a stage (100),
and prints their largest differences. The plain form is PEFT's own DoRA, logits everywhere under a
padding mask, one sample at a time, all activations recomputed; fp32 and no dropout, since micro-
batches draw their own masks. As a script with --exp it is launch/train.py in the plain form.
"""

import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from peft.tuners.lora.variants import DoraLinearVariant

from tests import tiny
from tests.training.launch import arguments, metrics, train
from vlmds.models import language
from vlmds.models.captioner import IGNORE, Captioner
from vlmds.models.dora import Dora

OPTIMISED = ("training.micro_batch=4", "training.activation_checkpointing=2")
PLAIN = ("training.micro_batch=1", "training.activation_checkpointing=true")


def curves(models: Path, shards: Path, folder: Path, steps: int) -> tuple[list[dict], list[dict]]:
    """metrics.jsonl of E8 (DoRA), optimised and plain; steps: of each stage."""
    found = []
    for name, settings, script in (("optimised", OPTIMISED, None), ("plain", PLAIN, __file__)):
        more = {} if script is None else {"script": Path(script)}
        train(
            0,
            *arguments(
                models,
                shards,
                folder / name,
                *tiny.RESAMPLER,
                *settings,
                "training.validate_every=1000",
                "training.checkpoint_every=1000",
                f"stages.0.steps={steps}",
                f"stages.1.steps={steps}",
                "stages.1.lr=1e-3",
                exp="e8",
            ),
            timeout=60 + 10 * steps,
            **more,
        )
        found.append([row for row in metrics(folder / name) if row["kind"] == "train"])
    return found[0], found[1]


def differences(one: list[dict], other: list[dict], key: str) -> list[float]:
    """Relative to the larger, step by step."""
    assert [(r["stage"], r["step"]) for r in one] == [(r["stage"], r["step"]) for r in other]
    return [abs(a[key] - b[key]) / max(abs(a[key]), abs(b[key])) for a, b in zip(one, other, strict=True)]


def plain_forward(self, features, input_ids, labels):
    last = torch.arange(labels.shape[1]).expand_as(labels).masked_fill(labels == IGNORE, 0).amax(1)
    mask = torch.arange(labels.shape[1]) <= last[:, None]
    logits = self.llm(inputs_embeds=self.embed(features, input_ids), attention_mask=mask.long(), use_cache=False).logits
    return F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum"
    )


def plain_dora(model):
    for module in model.modules():
        for adapter, variant in getattr(module, "lora_variant", {}).items():
            assert type(variant) is DoraLinearVariant and not isinstance(variant, Dora), adapter


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    from tests.training.fixtures import make_shards

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        models = tiny.make_models(place / "models")
        optimised, plain = curves(models, make_shards(place / "data"), place, steps)
    for stage in ("align", "finetune"):
        a, b = ([r for r in rows if r["stage"] == stage] for rows in (optimised, plain))
        print(
            f"{stage}: {len(a)} steps, loss {a[0]['loss']:.4f} -> {a[-1]['loss']:.4f} optimised, "
            f"{b[0]['loss']:.4f} -> {b[-1]['loss']:.4f} plain; largest relative difference: "
            f"loss {max(differences(a, b, 'loss')):.1e}, "
            f"gradient norm {max(differences(a, b, 'grad_norm')):.1e}"
        )


if __name__ == "__main__":
    if "--exp" in sys.argv:
        from vlmds.cli import main as train_main

        Captioner.forward, language.use_dora = plain_forward, plain_dora
        sys.exit(train_main(["train", *sys.argv[1:]]))
    main()
