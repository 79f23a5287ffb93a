"""`vlmds bench scale`: the cost of opening and reading the index as a dataset grows.

For each size, the index of a dataset without shards is made, and a fresh process measures: the
seconds and memory to open it and make the order, and the seconds to find 1,000 random positions of
the training stream with their rows of the index.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlmds.bench.measure import save, table
from vlmds.data.index import FORMAT, SCHEMA, VERSIONS, footer_sha256
from vlmds.files import sha256_of

SIZES = (10_000, 100_000, 1_000_000, 10_000_000)
SHARDS = 10_000  # at most; a shard has at least 100 samples


def bench_scale(output: Path, sizes: tuple[int, ...] = SIZES) -> list[dict]:
    """Run it, print the table, and write scale.json and scale.png to `output`."""
    rows = []
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="vlmds-scale-") as folder:
            make_index(Path(folder), size)
            done = subprocess.run(
                [sys.executable, "-m", __name__, folder], check=True, capture_output=True, text=True, timeout=600
            )
            rows.append({"samples": size, **json.loads(done.stdout)})
    print(
        table(
            [
                {
                    "samples": f"{row['samples']:,}",
                    "shards": f"{row['shards']:,}",
                    "index, MB": f"{row['index_bytes'] / 1e6:,.1f}",
                    "open, s": f"{row['open_s']:.3f}",
                    "memory, MB": f"{row['memory_bytes'] / 1e6:.1f}",
                    "1,000 positions, s": f"{row['positions_s']:.3f}",
                }
                for row in rows
            ]
        )
    )
    print(save(output, "scale", {"rows": rows}))
    print(plot(rows, output / "scale.png"))
    return rows


def make_index(folder: Path, samples: int) -> None:
    """A dataset of that many samples, with an index as packing writes it, and no shards."""
    shards = min(SHARDS, max(1, samples // 100))
    counts = np.diff(np.linspace(0, samples, shards + 1).astype(int))
    generator = np.random.default_rng(0)
    entries = []
    with pq.ParquetWriter(
        folder / "index.parquet", SCHEMA, compression="zstd", write_statistics=False, write_page_checksum=True
    ) as writer:
        for shard, count in enumerate(counts):
            writer.write_table(_rows(shard, int(count), generator), int(count))
            entries.append(
                {
                    "split": "train",
                    "shard": shard,
                    "path": f"train/{shard:06d}.tar",
                    "count": int(count),
                    "bytes": 10**9,
                    "sha256": "0" * 64,
                }
            )
    (folder / "dataset.json").write_text(
        json.dumps(
            {
                "format": FORMAT,
                "version": VERSIONS["video"],
                "store": "video",
                "sampler": "",
                "resizer": "",
                "counts": {"train": samples},
                "index_sha256": sha256_of(folder / "index.parquet"),
                "index_footer_sha256": footer_sha256(folder / "index.parquet"),
                "shards": entries,
            }
        )
    )


def _rows(shard: int, count: int, generator: np.random.Generator) -> pa.Table:
    sizes = generator.integers(1_000, 5_000_000, 2 * count)
    member = pa.StructArray.from_arrays(
        [
            pa.array(["json", "mp4"] * count),
            pa.array(np.cumsum(sizes)),
            pa.array(sizes),
            pa.array(generator.integers(0, 2**32, 2 * count, dtype=np.uint32)),
        ],
        fields=list(SCHEMA.field("members").type.value_type),
    )
    offsets = np.arange(0, 2 * count + 1, 2, dtype=np.int32)

    def all_of(value, name):
        return pa.array([value] * count, SCHEMA.field(name).type)

    columns = {
        "split": all_of("train", "split"),
        "shard": all_of(shard, "shard"),
        "key": pa.array([f"clip-{shard:06d}-{i:06d}" for i in range(count)]),
        "members": pa.ListArray.from_arrays(offsets, member),
        "duration": pa.array(generator.uniform(2, 60, count)),
        **{
            name: all_of(value, name)
            for name, value in {
                "num_captions": 1,
                "frames": 300,
                "fps": 30.0,
                "width": 640,
                "height": 360,
                "codec": "h264",
                "rotation": 0,
                "decoder": "decord",
                "start": None,
                "end": None,
                "status": "ok",
            }.items()
        },
    }
    return pa.table([columns[field.name] for field in SCHEMA], schema=SCHEMA)


def plot(rows: list[dict], path: Path) -> Path:
    """Draws the growth of each cost since the smallest size, on logarithmic axes. Returns the file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    samples = [row["samples"] for row in rows]
    for key, label in (
        ("index_bytes", "index on disk"),
        ("open_s", "opening"),
        ("memory_bytes", "memory of a process"),
        ("positions_s", "1,000 positions"),
    ):
        axes.loglog(samples, [row[key] / rows[0][key] for row in rows], marker="o", label=label)
    axes.set_xlabel("samples")
    axes.set_ylabel(f"growth since {rows[0]['samples']:,} samples")
    axes.grid(True, which="major", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def measure(folder: Path) -> dict[str, float]:
    """The cost of opening the dataset, in a fresh process: seconds and bytes."""
    from vlmds.data.dataset import Dataset, DatasetOrder
    from vlmds.data.index import ShardIndex

    before, begin = _memory(), time.perf_counter()
    dataset = Dataset([ShardIndex.open(folder)])
    order = DatasetOrder(dataset, "train", seed=1)
    order.row(dataset, "train", 0)
    opened = time.perf_counter()
    # Far apart: each is in another window of shards.
    for position in np.random.default_rng(1).integers(0, len(order), 1000).tolist():
        order.row(dataset, "train", position)
    read = time.perf_counter()
    return {
        "shards": len(dataset.shards()),
        "open_s": opened - begin,
        "index_bytes": (folder / "index.parquet").stat().st_size,
        "memory_bytes": max(_memory() - before, 1),
        "positions_s": read - opened,
    }


def _memory() -> int:
    """Resident bytes of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]))))
