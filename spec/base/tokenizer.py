"""A base's tokenizer, and whether the base has a row for each of its ids."""

import importlib.util
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from spec.base.folder import BaseError, add_code, refusals


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder."""
    if trust_remote_code:
        add_code(folder)
    models, what = [*folder.glob("*.model"), *folder.glob("*.spm")], "no tokenizer could be loaded"
    if not trust_remote_code and not models and not any(folder.glob("tokenizer*")) and not any(folder.glob("vocab*")):
        raise BaseError(f"{folder}: no tokenizer (tokenizer.json or its like); copy it next to config.json")
    if models and not (folder / "tokenizer.json").is_file():
        name = models[0].name
        if importlib.util.find_spec("sentencepiece") is None:
            raise BaseError(f"{folder}: {name} needs a package that is not installed: pip install sentencepiece")
        what += f" from {name}, which may be damaged, a pointer of Git LFS or of another kind"
    with refusals(folder, what):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        words = tokenizer.get_vocab().keys() - {token.content for token in tokenizer.added_tokens_decoder.values()}
        if not words:
            raise BaseError(f"{folder}: its tokenizer has no vocabulary; copy tokenizer.json or what it is made from")
    return tokenizer


def check_tokenizer(folder: Path, tokenizer: Any, rows: int) -> None:
    """Refuse a tokenizer that writes ids for which the base has no row; the BaseError names them.

    Special tokens that were added beyond the table do no harm for as long as no text has them: they are let pass
    unless the chat template itself writes them.
    """
    beyond = {id_: token for token, id_ in tokenizer.get_vocab().items() if id_ >= rows}
    added = set(tokenizer.added_tokens_decoder)
    used = {id_ for id_ in beyond if id_ not in added} | (beyond.keys() & _template_ids(tokenizer))
    if used:
        named = ", ".join(f"{id_} ({beyond[id_]!r})" for id_ in sorted(used)[:3])
        raise BaseError(
            f"{folder}: the tokenizer has ids for which the model has no row: {named}; the table has {rows} rows. Take "
            "the tokenizer that was saved with the weights, or give the model the rows "
            "(resize_token_embeddings(len(tokenizer)), and train them)"
        )


def _template_ids(tokenizer: Any) -> set[int]:
    """The ids of a short conversation; none where the template is not there or refuses it."""
    if not getattr(tokenizer, "chat_template", None):
        return set()
    question = [{"role": "user", "content": "a"}]
    try:
        return set(tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False))
    except Exception:  # a template is a program; what it refuses is said where data are read
        return set()
