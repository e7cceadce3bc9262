"""What zip archives of unknown origin must be before they are opened."""

import zipfile
from typing import IO

MOST_BYTES = 2**21
"""Of an archive's list of entries: some 30,000 of them; checkpoints have 4,000."""


def check_list_of_entries(file: IO[bytes]) -> None:
    """Refuses an archive whose list of entries alone would take seconds to read.

    `zipfile` makes an object for each entry before anybody can ask how many there are.

    Args:
      file: Of an archive; its position is changed, which `zipfile` does not mind.

    Raises:
      ValueError: The list is too long.
    """
    # Private, but what `zipfile` itself will go by: nothing can show this check another list.
    end = zipfile._EndRecData(file)  # type: ignore[attr-defined]
    listed = end[zipfile._ECD_SIZE] if end else 0  # type: ignore[attr-defined]
    if listed > MOST_BYTES:
        raise ValueError(
            f"its list of entries has {listed} bytes, {MOST_BYTES} at most are read; refused"
        )
