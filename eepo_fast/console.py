"""Makes stdout and stderr a convenience: a reader that goes away, a lost terminal, a full disk under a redirection or a
terminal that knows ASCII alone ends no command.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

GONE = (BrokenPipeError, ConnectionError)


class Stream:
    """A text stream whose writing never fails; all else is the wrapped stream's."""

    def __init__(self, stream: Any):
        self._stream = stream
        self.lost: Exception | None = None
        """The first error of writing: what was written since then may be nowhere."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stream)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = getattr(self._stream, "encoding", None) or "ascii"
            self.write(text.encode(encoding, "replace").decode(encoding))
        except (OSError, ValueError) as error:  # ValueError: it was closed
            self._lose(error)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._lose(error)

    def _lose(self, error: Exception) -> None:
        self.lost = self.lost or error

    def leave(self) -> None:
        """Flushes for the last time. What cannot be written is dropped: the interpreter, which flushes once more at its
        end, would make an error of its own of it."""
        self.flush()
        if self.lost is not None:
            with suppress(OSError, ValueError, AttributeError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)
            with suppress(OSError, ValueError):
                self._stream.flush()

    @property
    def is_gone(self) -> bool:
        """Is true where nobody reads any more, as behind `| head`."""
        return isinstance(self.lost, GONE)


def open_descriptors() -> None:
    """Gives 0, 1 and 2 to /dev/null where they are closed: the next file that is opened would be taken for them."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            if os.open(os.devnull, os.O_RDWR) != number:
                return


@contextmanager
def forgiving() -> Iterator[Stream | None]:
    """Writes what is printed inside through a `Stream`; yields that of stdout, None where there is none."""
    open_descriptors()
    before = sys.stdout, sys.stderr
    out, err = (None if stream is None else Stream(stream) for stream in before)
    sys.stdout, sys.stderr = out or sys.stdout, err or sys.stderr  # type: ignore[bad-assignment]  # as good as one
    try:
        yield out
    finally:
        for stream in (out, err):
            if stream is not None:
                stream.leave()
        sys.stdout, sys.stderr = before
