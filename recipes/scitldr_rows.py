"""Write SciTLDR (Cachola et al. 2020) as rows of two texts: a request with the abstract, and its first summary.

python recipes/scitldr_rows.py SciTLDR-A/train.jsonl SciTLDR-A/dev.jsonl data/scitldr

In the files of https://github.com/allenai/scitldr a row has its abstract as a list of sentences (`source`) and several
summaries (`target`).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

_REQUEST = "Summarize the paper in one sentence.\n\n"


def main(*arguments: str) -> None:
    *sources, folder = map(Path, arguments)
    folder.mkdir(parents=True, exist_ok=True)
    for source in sources:
        rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
        pairs = [{"prompt": _REQUEST + " ".join(row["source"]), "completion": row["target"][0]} for row in rows]
        text = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
        (folder / source.name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
