"""The terminal: what ends a command with one line, and output that a closed pipe or a full disk cannot stop."""

import io
import os
import sys
import traceback
from contextlib import contextmanager

from plumbing.files import reason


class Lasting(io.FileIO):
    """A console that nothing stops: a pipe that was closed, as by `| head -1`, or a full disk behind it."""

    def write(self, data):
        try:
            return super().write(data)
        except OSError:
            return len(data)


@contextmanager
def one_line():
    """
    Around a command: a file that cannot be read or written ends it with one line that names the file.

    What else ends with a line, ends with SystemExit by itself. NANOSTEER_DEBUG=1 shows where it came from. Whatever
    becomes of the console, results are written.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__") and stream is not None:  # else it is a notebook's or a test's
            stream.flush()
            raw = io.BufferedWriter(Lasting(stream.fileno(), "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, "replace", line_buffering=True))
    for text in sys.argv[1:]:
        if text != text.encode("utf-8", "replace").decode():  # bytes of another encoding
            sys.exit(f"options must be UTF-8, got {ascii(text)}")
    try:
        yield
    except (OSError, SystemExit) as error:
        if os.environ.get("NANOSTEER_DEBUG"):
            traceback.print_exc()
        if isinstance(error, SystemExit) or error.filename is None:  # an error of no file is one of the program
            raise
        sys.exit(f"cannot read or write {error.filename}: {reason(error)}")
