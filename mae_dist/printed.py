"""Text that a terminal shows as it is: what others wrote into names and files is escaped and kept short; and words for
numbers of things. Imports no torch."""

import logging
import re
from logging.handlers import MemoryHandler

CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that command a terminal, end a line, turn the direction of writing, or are none."""
LONGEST = 1500
"""Characters of a message; the middle of a longer one is left out."""

held = MemoryHandler(capacity=0, flushLevel=logging.CRITICAL + 1, flushOnClose=False)
"""What was logged before the run whose log file gets it has a folder."""


def escaped(text: str) -> str:
    """A text in one line, with backslashes for characters that no terminal shows."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def message(text: object) -> str:
    """A message, escaped but for its own line ends, and not too long."""
    text = str(text)
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} [...] {text[-LONGEST // 2 :]}"
    return "\n".join(map(escaped, text.split("\n")))


def counted(number: int, thing: str) -> str:
    """A number of things, "1 tar" or "2,000 tars", whose plural has an s more, or es after another s or ch."""
    return f"{number:,} {thing}" + ("" if number == 1 else "es" if thing.endswith(("s", "ch")) else "s")


def span(low: int, high: int) -> str:
    """The values from `low` to `high`: "2 to 3", or "3" where that is all."""
    return f"{low}" if low == high else f"{low} to {high}"


def rate(value: float) -> str:
    """Events a second: whole from 10 on, below with a decimal, and below 1 with three digits."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.3g}"


class Formatter(logging.Formatter):
    """Formats records as `message` does."""

    def format(self, record: logging.LogRecord) -> str:
        """The text of a record, with the traceback of one that has some."""
        return message(record.getMessage()) if record.exc_info is None else super().format(record)


def log_to_stderr(level: int) -> None:
    """Send log records of this level and above to stderr, unless logging is set up already, and begin to hold them."""
    handler = logging.StreamHandler()
    handler.setFormatter(Formatter())
    logging.basicConfig(level=level, handlers=[handler])
    held.buffer.clear()
    logging.getLogger().addHandler(held)


def hand_over(handler: logging.Handler) -> None:
    """Give a handler what was logged since `log_to_stderr`, and hold no more."""
    logging.getLogger().removeHandler(held)
    held.setTarget(handler)
    held.flush()
    held.setTarget(None)
