"""Loggers whose messages every console can print."""
from __future__ import annotations

import logging
import sys


def get_logger(name: str) -> logging.Logger:
    """The logger of a module. Paths, prompts and names of files may hold letters that a console's code page lacks: they are
    spelled out then, since Python's handlers would print a traceback instead of the message."""
    logger = logging.getLogger(name)
    if not any(isinstance(each, _Printable) for each in logger.filters):
        logger.addFilter(_Printable())
    return logger


class _Printable(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
        record.msg, record.args = text.encode(encoding, "backslashreplace").decode(encoding), ()
        return True
