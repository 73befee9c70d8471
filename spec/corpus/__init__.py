"""Parquet files -> token sequences: layouts, chat template, loss mask, limits.

sources.py finds the columns and reads rows, chat.py renders conversations and finds the assistant's tokens,
encode.py puts the two together, sequences.py is the result and its file.
"""

from spec.corpus.chat import PLAIN_TEMPLATE, ChatTemplate, PrefixError, install_plain_template
from spec.corpus.encode import Report, stream
from spec.corpus.sequences import CorpusError, TokenSequence, answer, read, read_origin, spans, write
from spec.corpus.sources import Layout, Source, count_rows, inspect, list_files, read_rows

__all__ = [
    "PLAIN_TEMPLATE",
    "ChatTemplate",
    "CorpusError",
    "Layout",
    "PrefixError",
    "Report",
    "Source",
    "TokenSequence",
    "answer",
    "count_rows",
    "inspect",
    "install_plain_template",
    "list_files",
    "read",
    "read_origin",
    "read_rows",
    "spans",
    "stream",
    "write",
]
