"""One sound call for each public name of the package, a module for each folder of foundation/: what
the laws and the fuzz start from.

A module has EXAMPLES, name -> a function that makes `(callable, keywords)` or `(callable,
arguments, keywords)` anew, and SKIP, name -> why it cannot be called here. Names are written
without `foundation.`: "objectives.contrast.nt_xent".
"""

import importlib
import pkgutil

from foundation.core.basics import seed_everything

EXAMPLES, SKIP = {}, {}
for _found in pkgutil.iter_modules(__path__):
    _module = importlib.import_module(f"{__name__}.{_found.name}")
    EXAMPLES |= _module.EXAMPLES
    SKIP |= _module.SKIP


def make(name):
    """The callable, its positional arguments as a list,
    and its keywords, all new and the same each time"""
    seed_everything(0)
    function, *rest = EXAMPLES[name]()
    return function, list(rest[0]) if len(rest) == 2 else [], dict(rest[-1])
