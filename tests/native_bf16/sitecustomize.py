"""In a process that the tests start, the variable NATIVE_BF16 (1 or 0) answers for common.engine.native_bf16.

Python imports a module of this name at its start, before any other code, if its folder is on PYTHONPATH. common.engine imports
torch, so it is changed when the script itself imports it.
"""

import importlib.abc
import importlib.util
import os
import sys


def ask_the_variable(engine) -> None:
    """Change the module common.engine: the variable answers where it is set, the machine elsewhere."""
    machine = engine.native_bf16
    engine.native_bf16 = lambda: os.environ["NATIVE_BF16"] == "1" if "NATIVE_BF16" in os.environ else machine()


class Finder(importlib.abc.MetaPathFinder):
    """Finds common.engine as Python would without it, and changes the module once it is there."""

    def find_spec(self, name, path, target=None):
        if name != "common.engine":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def load_and_change(module):
            load(module)
            ask_the_variable(module)

        spec.loader.exec_module = load_and_change
        return spec


sys.meta_path.insert(0, Finder())
