"""How a run ends, and whether starting it again makes sense: exit codes, and a count of starts without progress.

    0   done, or left by a person (SIGINT)
    85  start the same command again: asked to make room (SIGTERM, SIGUSR1), or a rank was lost
    86  do not: the run was started again and again from the same number of images

`torchrun` ends with 1 whatever its ranks end with, so the code also stands in the run's folder, in `exit_code`.
"""

import json
import signal
import sys
from pathlib import Path

AGAIN = 85
STUCK = 86


def exit_code(number: int) -> int:
    """The exit code of a run that left at the end of a step because of the signal `number`; 0 is no signal."""
    return AGAIN if number in (signal.SIGTERM, signal.SIGUSR1) else 0


def note_exit(folder: Path | None, code: int) -> None:
    """Write `folder`/exit_code, where the script that started the ranks reads it."""
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "exit_code").write_text(f"{code}\n")
    except OSError as error:  # a full disk must not change the code itself
        print(f"{folder / 'exit_code'} was not written: {error.strerror}; it would be {code}", file=sys.stderr)


def note_start(folder: Path, images_seen: int) -> int:
    """How many starts before this one began at the same number of images; this one is written to `folder`/starts.json.

    For the one rank that writes files, and for runs that have images left to see.
    """
    path, count = folder / "starts.json", 0
    if path.exists():
        before = json.loads(path.read_text())
        count = before["count"] + 1 if before["images_seen"] == images_seen else 0
    folder.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps({"images_seen": images_seen, "count": count}) + "\n")
    aside.rename(path)
    return count


def check_progress(folder: Path, images_seen: int, count: int, max_restarts: int, main: bool = True) -> None:
    """Leave with STUCK, on every rank, if `count` of `note_start` is over `max_restarts`; the `main` one says why.

    The count begins anew then: whoever starts the run again by hand has as many tries as before.
    """
    if count <= max_restarts:
        return
    error = Stuck(
        f"the run in {folder} was started {count + 1} times from {images_seen:,} images and saw none, over"
        f" train.max_restarts={max_restarts}; its log says why it ended, and the same command then tries again"
    )
    if main:
        (folder / "starts.json").unlink(missing_ok=True)
        note_exit(folder, STUCK)
        print(error, file=sys.stderr)
    raise error


class Stuck(SystemExit):
    """Ends the process with STUCK, and says why."""

    def __init__(self, sentence: str):
        super().__init__(STUCK)
        self.sentence = sentence

    def __str__(self) -> str:
        return self.sentence
