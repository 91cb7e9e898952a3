"""Opening and saving models: weights stay on disk until somebody looks at them."""

from __future__ import annotations

from surgery.storage.atomic import write_file
from surgery.storage.fingerprint import fingerprint, identity
from surgery.storage.naming import (
    MANIFEST,
    MIN_DATA_BYTES,
    Manifest,
    data_file_of,
    file_of_role,
    read_manifest,
    role_of_file,
)
from surgery.storage.opening import open_model
from surgery.storage.region import ByteReader, DataFile, Place, Region, bytes_reader, key_of, memory_of
from surgery.storage.saving import Layout, SavedFile, save_model, save_models
from surgery.storage.skeleton import skeleton
from surgery.storage.structure import check_structure, find_disorder
from surgery.storage.twins import find_transposed, find_twins
from surgery.storage.versions import lower

__all__ = [
    "MANIFEST",
    "MIN_DATA_BYTES",
    "ByteReader",
    "DataFile",
    "Layout",
    "Manifest",
    "Place",
    "Region",
    "SavedFile",
    "bytes_reader",
    "check_structure",
    "data_file_of",
    "file_of_role",
    "find_disorder",
    "find_transposed",
    "find_twins",
    "fingerprint",
    "identity",
    "key_of",
    "lower",
    "memory_of",
    "open_model",
    "read_manifest",
    "role_of_file",
    "save_model",
    "save_models",
    "skeleton",
    "write_file",
]
