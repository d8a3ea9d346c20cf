"""Small JSON files, which may be empty or cut after a power failure or a broken download."""

import json
from typing import Any


class DamagedFileError(ValueError):
    """A file is empty, cut, or says what no such file says; one line names it."""


def parse_object(content: bytes, where: object) -> dict[str, Any]:
    """Parses a file's content as a JSON object.

    Raises:
        DamagedFileError: it is none; one line begins with `where` and says what to do.
    """
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):  # the latter: nested without end
        values = None
    if not isinstance(values, dict):
        state = "damaged" if content.strip(b" \t\r\n\0") else "empty"
        raise DamagedFileError(
            f"{where}: {state}: expected a JSON object; copy or download it again"
        )
    return values
