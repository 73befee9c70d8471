"""Worked maths problems as JSON lines: `python -I gsm_symbolic.py WHEEL`, in a process of its own.

The templates of reasoning_gym's gsm_symbolic are Python functions that need nothing but reasoning_gym.utils and the
standard library. So these files run straight from the wheel, and the package is neither installed nor imported.
A line is {"template": 12, "question": ..., "answer": ...}; the answer is the worked solution.
"""

import ast
import json
import re
import sys
import types
import zipfile
from random import Random
from typing import Any

FOLDER = "reasoning_gym/arithmetic/gsm_symbolic"
ROWS = 30  # of each template

for name in ("reasoning_gym", "reasoning_gym.utils"):
    sys.modules[name] = types.ModuleType(name)
generators: dict[str, Any] = {}
with zipfile.ZipFile(sys.argv[1]) as archive:
    exec(archive.read("reasoning_gym/utils.py"), sys.modules["reasoning_gym.utils"].__dict__)
    exec(archive.read(f"{FOLDER}/generators_00_49.py"), generators)
    exec(archive.read(f"{FOLDER}/generators_50_99.py"), generators)
    text = archive.read(f"{FOLDER}/gsm_symbolic.py").decode()
listed = re.search(r"^tasks_ok = (\[.*?\])", text, re.M | re.S)  # the templates that the library found correct
assert listed, f"no list tasks_ok in {FOLDER}/gsm_symbolic.py"
for template in ast.literal_eval(listed[1]):
    for row in range(ROWS):
        problem = generators[f"generate_{template}"](Random(f"0/{template}/{row}"))
        answer = problem["metadata"]["answer_cot"]
        print(json.dumps({"template": template, "question": problem["question"], "answer": answer}))
