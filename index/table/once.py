"""A file that is written once: of several commands that write it at the same moment one wins, and all read the same."""

import contextlib
import json
import os
import uuid
from pathlib import Path
from typing import Any

from index.table.lease import ConflictError, stored_object
from index.table.storage import Storage, is_local, unwritable


def write_once(uri: str, content: Any, storage: Storage) -> Any:
    """Write JSON to a file that does not exist yet, and return what the file holds, which may be another's content.

    Raises TableError if it can be neither written nor read.
    """
    data = json.dumps(content, ensure_ascii=False).encode()
    try:
        if is_local(uri):
            _link(Path(uri), data)
        else:
            with contextlib.suppress(ConflictError):
                stored_object(*storage.files(uri)).write(data, None)
    except OSError as error:
        raise unwritable(uri, error) from error
    return storage.read_json(uri)


def _link(path: Path, data: bytes) -> None:
    """Give a file that is written whole its name, unless another has it; a hard link never replaces anything."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.write_bytes(data)
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
