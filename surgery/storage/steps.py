"""The graphs of many steps over one weights file, which grows by what each step made new."""

from __future__ import annotations

import os
from pathlib import Path

import onnx_ir as ir

from surgery.errors import OutputError
from surgery.storage.naming import SHARED_DATA
from surgery.storage.packing import DataPlan, FilePlan, check_graph_size, graph_chunks, write_data, write_files
from surgery.storage.region import DataFile, Region
from surgery.storage.saving import SavedFile


class StepStore:
    """Saves models one after another into a folder; a weight that an earlier one had is not written again.

    Weights are only ever appended, so graphs that are already there, from an earlier run too, stay whole.

    Args:
        folder: Where; it is made when the first model is saved.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder)
        self._data = DataPlan(SHARED_DATA)
        # As long as a file is open its inode names no other file, so a weight's place stays its name.
        self._sources: set[DataFile] = set()

    def add(self, name: str, model: ir.Model, *, min_bytes: int = 1024) -> SavedFile:
        """Write the graph as `name` and what is new of its weights; the model stays as it is.

        Raises:
            OutputError: If the folder cannot be written.
        """
        path = self._folder / SHARED_DATA
        known = dict(self._data.offsets)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._data.size = path.stat().st_size if path.exists() else 0
            graph = FilePlan(f".{name}.tmp", graph_chunks(model, self._data, min_bytes))
            check_graph_size(graph, has_data_file=True)
            self._append(path)
            self._publish(graph, self._folder / name)
        except BaseException as error:
            self._data.offsets = known
            if isinstance(error, OSError):
                raise OutputError(f"{self._folder / name}: cannot be written: {error.strerror}") from error
            raise
        finally:
            self._data.entries.clear()
        return SavedFile(name, graph.size)

    def _append(self, path: Path) -> None:
        if not self._data.entries:
            return
        self._sources.update(tensor.file for _, tensor in self._data.entries if isinstance(tensor, Region))
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            write_data(fd, self._data, lambda _: None)
        finally:
            os.close(fd)

    def _publish(self, graph: FilePlan, target: Path) -> None:
        draft = self._folder / graph.name
        draft.unlink(missing_ok=True)
        write_files(self._folder, [graph], None)
        draft.replace(target)
