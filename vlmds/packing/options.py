"""The options of packing that decide the bytes of a dataset, and their defaults."""

from dataclasses import dataclass
from typing import Any

from vlmds.errors import InputError
from vlmds.video.fit import FIT, RESIZERS
from vlmds.video.jpeg import QUALITY
from vlmds.video.sampling import SAMPLER

STORES = ("video", "frames")


@dataclass(frozen=True)
class PackOptions:
    """The options that, with the manifest, decide the bytes of a dataset.

    shard_size, shard_bytes: most manifest rows, and bytes of videos, that a shard is made of. fit: of
    the frames store's frames to the square; videos are kept as they are.
    """

    store: str = "video"
    num_frames: int = 8
    image_size: int = 336
    quality: int = QUALITY
    shard_size: int = 256
    shard_bytes: int | None = None
    verify: bool = True
    fit: str = FIT

    def __post_init__(self) -> None:
        if self.store not in STORES:
            raise InputError(f"store: {self.store!r} is not one of {', '.join(STORES)}")
        if self.fit not in RESIZERS:
            raise InputError(f"fit: {self.fit!r} is not one of {', '.join(RESIZERS)}")
        for name in ("num_frames", "image_size", "shard_size", "shard_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name}: {value} is less than 1")
        if not 1 <= self.quality <= 100:
            raise InputError(f"quality: {self.quality} is not in 1 … 100")

    @property
    def resizer(self) -> str:
        """The name of the fit. A video store, which fits nothing, keeps the name of older versions."""
        return RESIZERS[self.fit if self.store == "frames" else "crop"]

    def described(self) -> dict[str, Any]:
        """dataset.json's record of the store."""
        frames = self.store == "frames"
        return {
            "store": self.store,
            "sampler": SAMPLER,
            "resizer": self.resizer,
            "num_frames": self.num_frames if frames else None,
            "image_size": self.image_size if frames else None,
            "quality": self.quality if frames else None,
            "verify": None if frames else self.verify,
            "shard_size": self.shard_size,
            "shard_bytes": self.shard_bytes,
        }
