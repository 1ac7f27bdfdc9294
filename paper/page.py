"""Tables in Markdown, and the parts of pages that are made from data and never typed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from ffkernels.recipes.checkpoint import write_atomically


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, whatever its texts hold."""
    return "\n".join([_line(columns), f"|{'---|' * len(columns)}", *map(_line, rows)])


def _line(cells: Sequence[str]) -> str:
    texts = [" ".join(cell.split()).replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(texts)} |".encode(errors="backslashreplace").decode()


def parts(page: Path, begin: str, end: str) -> tuple[str, str, str]:
    """A page before, between and after two markers.

    Raises:
        ValueError: where a marker is missing, or the page is no text.
    """
    try:
        old = page.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{page}: not in UTF-8 ({error})") from error
    if old.count(begin) != 1 or old.count(end) != 1:
        raise ValueError(f"{page} does not have the two markers once each: {begin} and {end}")
    before, _, rest = old.partition(begin)
    between, _, after = rest.partition(end)
    return before, between, after


def update(page: Path, begin: str, end: str, text: str) -> None:
    """Puts `text` between two markers of a page.

    Raises:
        ValueError: as `parts` does.
        OSError: where the page cannot be read or written.
    """
    before, _, after = parts(page, begin, end)
    made = f"{before}{begin}\n\n{text}\n\n{end}{after}"
    write_atomically(page, lambda file: file.write(made.encode()))
