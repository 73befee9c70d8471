"""The base model: where it is, what identifies it, what it can do, what heads read of it, its own answers."""

from spec.base.answering import COMPACT, LEAST_ROWS, answer, prompt_buckets
from spec.base.check import auto_class, read_config, skeleton
from spec.base.findings import Findings, examine, examine_once
from spec.base.folder import BaseError, downloaded_revision, find_folder, identify, resolve
from spec.base.layer import last_layer, layer_of
from spec.base.limits import Limits, limits
from spec.base.loading import Base, load, producer, stop_ids, unstopped_turn
from spec.base.logits import LOOKED_AT, PLAIN, Logits, Teacher, bias_of, find_logits, has_linear_logits
from spec.base.padding import BUCKET, bucket, prompt_bucket
from spec.base.taps import Tapped, hidden_states, read_taps
from spec.base.tokenizer import load_tokenizer
