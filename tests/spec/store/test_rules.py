"""What each producer makes of a fixed input. Where one of these changes, so does the number of its rule."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from spec import base as base_model
from spec.base import Base
from spec.config import Respond
from spec.heads import LAST, Tap
from spec.store import answers, features, identity, tables
from spec.store.codecs import NONE
from spec.store.collection import Collection
from spec.store.features import FeatureRow, TapStore

IDS = np.arange(3, 83, dtype=np.int32)
MASK = np.resize(np.asarray([0, 0, 1, 1, 1], np.uint8), len(IDS))

STATES = {
    LAST: (48, [0.68499, 0.45410, 0.72887, 0.66042, 0.72729, 0.47401]),
    Tap(1, "all"): (80, [-0.57615, 0.48169, -1.12359, -0.10577, -1.89624, -3.83926]),
}
"""By tap: how many vectors are kept, and the first numbers of the first and of the last of them."""

ANSWERS = {
    0.0: [158, 229, 4, 229, 229, 265, 236, 138, 44, 138, 138, 85],
    1.0: [259, 51, 12, 167, 24, 159, 15, 82, 270, 138, 218, 202],
}
"""By temperature."""

TABLES = [0.33041, 0.28921, 0.38240, 0.55342, -0.17727, 0.55988]
"""The first numbers of the embedding and of lm_head."""

CHANGED = "{0} has changed: raise RULES[{0!r}] in spec/store/identity.py, so that what was stored is computed again, "
CHANGED += "and write the new numbers here"


def test_the_rules_are_those_of_these_numbers() -> None:
    assert identity.RULES == {"states": 1, "tables": 1, "answers": 1}


def test_states(base: Base, tmp_path: Path) -> None:
    rows = [FeatureRow("a", IDS, MASK)]
    stores = [TapStore(tap, NONE, Collection(tmp_path, "states", {"number": n})) for n, tap in enumerate(STATES)]
    for store in stores:
        store.collection.create()
    features.produce(base, stores, rows, features.plan(rows, [(), ()], 1))
    for store in stores:
        count, expected = STATES[store.tap]
        states = store.collection.read(store.collection.name_of(["a"]))[0]["states"]
        found = [*states[0, :3].tolist(), *states[-1, :3].tolist()]
        same = len(states) == count and found == pytest.approx(expected, rel=1e-3, abs=1e-3)
        assert same, f"{CHANGED.format('states')}: {len(states)}, {found}"


@pytest.mark.parametrize("temperature", ANSWERS)
def test_answers(base: Base, tmp_path: Path, temperature: float) -> None:
    collection, params = Collection(tmp_path, "answers", {}), Respond(max_new_tokens=12, temperature=temperature)
    collection.create()
    answers.produce(partial(base_model.answer, base), {}, collection, [IDS[4:24]], [[0]], params)
    found = answers.read(collection, [IDS[4:24]])[0].tolist()
    assert found == ANSWERS[temperature], f"{CHANGED.format('answers')}: {found}"


def test_tables(base: Base, tmp_path: Path) -> None:
    kept = Collection(tmp_path, "tables", {})
    kept.create()
    tables.save(base, kept, [IDS])
    found = tables.Tables(kept)
    numbers = [*found["embedding"][0, :3].tolist(), *found["lm_head"][-1, :3].tolist()]
    same = numbers == pytest.approx(TABLES, rel=1e-3, abs=1e-3) and tables.logits(kept) == base_model.PLAIN
    assert same, f"{CHANGED.format('tables')}: {numbers}"
