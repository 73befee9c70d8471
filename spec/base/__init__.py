"""The base model: where it is, what identifies it, what it can do, its hidden states, its own answers."""

from spec.base.answering import COMPACT, LEAST_ROWS, answer, prompt_buckets
from spec.base.check import auto_class, check, read_config, skeleton
from spec.base.findings import Findings, examine, examine_once
from spec.base.folder import BaseError, downloaded_revision, find_folder, identify, resolve
from spec.base.limits import Limits, limits
from spec.base.loading import Base, load, producer, stop_ids, unstopped_turn
from spec.base.logits import LOOKED_AT, PLAIN, Logits, bias_of, find_logits, has_linear_logits
from spec.base.states import BUCKET, bucket, hidden_states, prompt_bucket
from spec.base.tokenizer import load_tokenizer
