"""Split E2E rows (Novikova et al. 2017) into train.csv and dev.csv, so that rows with the same `mr` stay together.

python recipes/e2e_split.py data/e2e/devset.csv data/e2e
"""

from __future__ import annotations

import csv
import sys
import zlib
from pathlib import Path


def main(source: str, folder: str) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    with (
        open(source, encoding="utf-8", newline="") as rows,
        open(Path(folder) / "train.csv", "w", encoding="utf-8", newline="") as train,
        open(Path(folder) / "dev.csv", "w", encoding="utf-8", newline="") as dev,
    ):
        reader = csv.DictReader(rows)
        writers = [csv.DictWriter(file, reader.fieldnames or []) for file in (train, dev)]
        for writer in writers:
            writer.writeheader()
        for row in reader:
            writers[zlib.crc32(row["mr"].encode()) % 10 == 0].writerow(row)


if __name__ == "__main__":
    main(*sys.argv[1:])
