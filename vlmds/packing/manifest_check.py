"""The check of a manifest before it is packed: `vlmds pack MANIFEST --check`.

Rows are read one after another, and no video is opened: a million rows take about a minute.
"""

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from vlmds.console.progress import phase
from vlmds.console.text import counted
from vlmds.files import as_spelled, is_url
from vlmds.packing.long_captions import CutCaptions
from vlmds.packing.manifest import ManifestReader, ManifestRow, Reject

EXAMPLES = 3  # rows named for each finding
HANGUL = re.compile("[\u1100-\u11ff\u3130-\u318f\uac00-\ud7a3]")
LETTER = re.compile(r"[^\W\d_]")


class ManifestCheck:
    """What is found in a manifest's rows; :meth:`lines` reports it."""

    def __init__(self) -> None:
        self.rows, self.captions, self.characters, self.longest = 0, 0, 0, 0
        self.hangul, self.letters, self.with_hangul = 0, 0, 0
        self.splits: Counter[str] = Counter()
        self.undecided = 0
        self.rejected: Counter[str] = Counter()
        self.missing, self.urls, self.repeated, self.copies, self.torn = 0, 0, 0, 0, 0
        self._examples: dict[str, list[int]] = {}
        self._videos: dict[int, str] = {}  # by hash, as those of a million rows need much memory: the split
        self._spans: set[int] = set()
        self._captions: set[int] = set()

    def reject(self, row: Reject) -> None:
        """Count a row that cannot be packed."""
        reason = row.reason.split(":")[0]
        self.rejected[reason] += 1
        self._example(reason, row.row)

    def add(self, row: ManifestRow, undecided: bool) -> None:
        """Count a usable row. undecided: it has no split."""
        self.rows += 1
        self.undecided += undecided
        self.splits[row.split] += 1
        video = hash(row.video)
        former = self._videos.setdefault(video, row.split)
        if former != row.split:
            self.torn += 1
            self._example("torn", row.row)
        size = len(self._spans)
        self._spans.add(hash((row.video, row.start, row.end)))
        if len(self._spans) == size:
            self.copies += 1
            self._example("copies", row.row)
        if is_url(row.video):
            self.urls += 1
        elif not os.path.isfile(row.video) and not os.path.isfile(as_spelled(row.video)):
            self.missing += 1
            self._example("missing", row.row)
        for caption in row.captions:
            self._caption(caption, row.row)

    def _caption(self, caption: str, row: int) -> None:
        self.captions += 1
        self.characters += len(caption)
        self.longest = max(self.longest, len(caption))
        hangul = len(HANGUL.findall(caption))
        self.hangul += hangul
        self.letters += len(LETTER.findall(caption))
        self.with_hangul += hangul > 0
        size = len(self._captions)
        self._captions.add(hash(caption))
        if len(self._captions) == size:
            self.repeated += 1
            self._example("repeated", row)

    def _example(self, what: str, row: int) -> None:
        found = self._examples.setdefault(what, [])
        if len(found) < EXAMPLES:
            found.append(row)

    def _such_as(self, what: str) -> str:
        rows = self._examples[what]
        return f"such as row {', '.join(map(str, rows))}"

    def lines(self) -> list[str]:
        """The report, a finding each line."""
        rejected = sum(self.rejected.values())
        found = [f"{counted(self.rows + rejected, 'row')}: {self.rows:,} can be packed, {rejected:,} cannot"]
        found += [f"  {count:>6,}  {reason}, {self._such_as(reason)}" for reason, count in self.rejected.most_common()]
        if not self.rows:
            return found
        splits = ", ".join(f"{split} {count:,}" for split, count in sorted(self.splits.items()))
        found.append(f"splits: {splits}" + (f" ({self.undecided:,} rows without one)" if self.undecided else ""))
        if "train" not in self.splits:
            found.append("WARNING: no row is in split train, which training needs")
        unseen = f" ({counted(self.urls, 'row')} with a URL, not checked)" if self.urls else ""
        found.append(f"videos: {len(self._videos):,}{unseen}")
        if self.missing:
            found.append(f"rows whose video is not there: {self.missing:,}, {self._such_as('missing')}")
        if self.torn:
            found.append(f"rows of a video that is also in another split: {self.torn:,}, {self._such_as('torn')}")
        if self.copies:
            found.append(f"rows with the video and span of an earlier one: {self.copies:,}, {self._such_as('copies')}")
        if self.captions:
            share = self.hangul / self.letters if self.letters else 0.0
            found.append(
                f"captions: {self.captions:,}, of {self.characters / self.captions:.0f} characters on average, "
                f"{self.longest:,} at most; Hangul in {self.with_hangul / self.captions:.1%} of them, "
                f"{share:.1%} of all letters"
            )
        if self.repeated:
            found.append(f"captions that repeat an earlier one: {self.repeated:,}, {self._such_as('repeated')}")
        return found


def check_manifest(
    manifest: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    keep_columns: Sequence[str] = (),
    tokenizer: str | None = None,
    max_caption_tokens: int | None = None,
) -> list[str]:
    """Read a manifest and report what packing would find; arguments as for `vlmds.packing.pack.pack`.

    Raises InputError if it cannot be read.
    """
    with phase("reading the manifest"):
        reader = ManifestReader(manifest, columns=columns, keep=keep_columns)
        check, cut = ManifestCheck(), CutCaptions(tokenizer, max_caption_tokens)
        for row in reader:
            if isinstance(row, Reject):
                check.reject(row)
            else:
                check.add(row, row.row in reader.undecided)
                cut.add(row.captions, row.row)
        lines = check.lines() + reader.notes() + cut.notes()
    if reader.ignored_columns:
        lines.append(f"ignored columns: {', '.join(reader.ignored_columns)}")
    return lines
