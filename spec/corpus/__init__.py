"""Parquet files -> token sequences: layouts, chat template, loss mask, limits.

files.py says which files, layouts.py which columns hold what, rows.py and turns.py read conversations from them,
chat.py renders those and finds the assistant's turns, tokens.py tokenizes, encode.py puts all that together, and
sequences.py is the result and its file.
"""

from spec.corpus.chat import PLAIN_TEMPLATE, ChatTemplate, install_plain_template
from spec.corpus.encode import Report, stream
from spec.corpus.files import check_apart, list_files
from spec.corpus.layouts import Source, count_rows, inspect
from spec.corpus.rows import Row, read_rows
from spec.corpus.sequences import CorpusError, TokenSequence, answer, read, read_origin, spans, write
