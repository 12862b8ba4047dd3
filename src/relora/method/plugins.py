"""Parts that need another package, found by name when they are needed.

The method imports torch alone. What knows a foreign package (an 8-bit optimizer, a 4-bit format) registers
itself with the method on import, and its module is named in the package metadata, as an entry point of one of
the groups below; other packages can add theirs. Nothing is imported before its name is asked for.
"""

from importlib.metadata import entry_points
from typing import Literal

Group = Literal["relora.optimizers", "relora.base_codecs"]


def load_plugins(group: Group, name: str) -> bool:
    """Import what is declared under a name.

    Args:
        group: "relora.optimizers", by the top-level package of an optimizer's class, or
            "relora.base_codecs", by the codec's name.
        name: The entry point's name.

    Returns:
        Whether there was anything.

    Raises:
        ConfigError: if its package is missing, naming the extra.
    """
    found = entry_points(group=group, name=name)
    for entry_point in found:
        entry_point.load()
    return bool(found)
