"""Worked maths problems as JSON lines: `python -I gsm_symbolic.py WHEEL SEED PER_TEMPLATE`, in a process of its own.

The templates of reasoning_gym's gsm_symbolic are Python functions. They need nothing of their package but
reasoning_gym.utils, which needs the standard library alone; so these three files run straight from the wheel and the
package, with its heavy dependencies, is neither installed nor imported.

A line: {"template": 12, "question": ..., "answer": ...}, the answer being the worked solution.
"""

from __future__ import annotations

import ast
import json
import sys
import types
import zipfile
from random import Random
from typing import Any

FOLDER = "reasoning_gym/arithmetic/gsm_symbolic"


def sound_templates(source: str) -> list[int]:
    """The library's own list of the templates it found correct (`tasks_ok`), read without running its module."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "tasks_ok":
            return [int(number) for number in ast.literal_eval(node.value)]
    raise LookupError("no list tasks_ok in gsm_symbolic.py")


def main(wheel: str, seed: int, per_template: int) -> None:
    """Write per_template problems of every sound template to stdout."""
    for name in ("reasoning_gym", "reasoning_gym.utils"):
        sys.modules[name] = types.ModuleType(name)
    generators: dict[str, Any] = {}
    with zipfile.ZipFile(wheel) as archive:
        exec(archive.read("reasoning_gym/utils.py"), sys.modules["reasoning_gym.utils"].__dict__)
        exec(archive.read(f"{FOLDER}/generators_00_49.py"), generators)
        exec(archive.read(f"{FOLDER}/generators_50_99.py"), generators)
        templates = sound_templates(archive.read(f"{FOLDER}/gsm_symbolic.py").decode())
    for template in templates:
        for row in range(per_template):
            problem = generators[f"generate_{template}"](Random(f"{seed}/{template}/{row}"))
            line = {
                "template": template,
                "question": problem["question"],
                "answer": problem["metadata"]["answer_cot"],
            }
            print(json.dumps(line))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
