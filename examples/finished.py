"""Results of long examples in a file each, so that a second call goes on from there, and several calls can share the work."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def finished(path: Path, arguments: dict[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """
    A result that is in a file, or is computed and put there; that of other arguments is neither used nor overwritten.

    :param path: JSON file of the result
    :param arguments: What the result depends on
    :param compute: Gives the result, in what JSON has
    """
    if path.exists():
        there = json.loads(path.read_text())["arguments"]
        if there != arguments:
            sys.exit(f"{path} is of {there}, and {arguments} is asked for: give another folder as --logs")
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        result = {"arguments": arguments} | compute()
        # whole, or not there
        path.with_suffix(".part").write_text(json.dumps(result))
        path.with_suffix(".part").replace(path)
    return json.loads(path.read_text())
