"""Results of the examples: in a file each, from which a second call goes on, and in tables that are replaced as a whole."""

import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
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


@contextmanager
def table(path: Path, header: Iterable[str]) -> Iterator[Callable[[Iterable[Any]], Any]]:
    """
    A CSV file that takes the place of an older one at the end alone: what is interrupted leaves that as it was, and its own
    rows in ``NAME.part``.

    :param path: CSV file
    :param header: Names of the columns
    :return: Function that writes a row
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    # a line at a time, for those who watch
    with part.open("w", newline="", buffering=1) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        yield writer.writerow
    part.replace(path)
