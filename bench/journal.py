"""A JSON file of results that is whole at any time, and from which a run that was stopped goes on.

Nothing here needs torch or the package that is measured: what they break can be written down.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DEAD = 75  # the exit status of a process whose GPU stopped answering; another process can go on
STOPPED = 76  # the exit status of a process that had no time for all there was to measure
Record = dict[str, Any]


class Journal:
    """Lists of records by name, kept in a file that is replaced by a whole new one whenever records are added.

    Args:
        path: the file. If it is there and was written from the same source, its records are taken over. If the source
            differs, it is renamed to NAME.SOURCE.json and a new file is begun. None: nothing is written.
        source: what the results depend on, as `source` gives it.
        head: what else the file says. A file that is taken over keeps its own.
    """

    def __init__(self, path: Path | None, source: str, **head: Any):
        self.path, self.head = path, {"source": source, **head}
        self.lists: dict[str, list[Record]] = {}
        self._texts: dict[str, list[str]] = {}
        if path is None or not path.exists():
            return
        before = json.loads(path.read_text())
        if before.get("source") != source:
            path.replace(path.with_suffix(f".{before.get('source', 'unknown')}.json"))
            return
        lists = {name: value for name, value in before.items() if isinstance(value, list)}
        self.head = {name: value for name, value in before.items() if name not in lists}
        for name, records in lists.items():
            self._extend(name, records)

    def __getitem__(self, name: str) -> list[Record]:
        return self.lists.get(name, [])

    def add(self, **lists: Iterable[Record]) -> None:
        """Append records to lists, and write the file."""
        for name, records in lists.items():
            self._extend(name, records)
        if self.path is not None:
            write_whole(self.path, self._text())

    def _extend(self, name: str, records: Iterable[Record]) -> None:
        new = list(records)
        self.lists.setdefault(name, []).extend(new)
        self._texts.setdefault(name, []).extend(map(json.dumps, new))  # once, however often the file is written

    def _text(self) -> str:
        parts = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in self.head.items()]
        for name, texts in self._texts.items():
            records = ",\n".join(texts)
            parts.append(f"{json.dumps(name)}: [\n{records}\n]")
        return "{\n" + ",\n".join(parts) + "\n}\n"


def write_whole(path: Path, text: str) -> None:
    """Replace a file by a new one in one go. Nobody ever sees a part of it, whenever the process ends."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)


def source(*others: str, table: bool = True) -> str:
    """A short name for all that results depend on: the code, the version of torch, and `others`, such as the GPU's
    name. Results of another source are never mixed with new ones. `table`: whether the dispatch table counts, which
    tuning changes."""
    digest = hashlib.sha256(" ".join([version("torch"), *others]).encode())
    paths = [path for folder in ("smi_fast", "kernels", "bench", "tests") for path in (ROOT / folder).rglob("*.py")]
    for path in sorted(paths) + ([ROOT / "kernels" / "dispatch.json"] if table else []):
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]
