"""The items of a container, kept so that it can be made what it was."""

from __future__ import annotations

import operator
from collections import OrderedDict, deque
from typing import Any

CONTAINERS = (dict, list, set, deque)


class Contents:
    """The items of a container, one level deep."""

    def __init__(self, container: Any) -> None:
        self.container = container
        self.items = list(container.items()) if isinstance(container, dict) else list(container)

    def restore(self) -> None:
        """Make it what it was."""
        self.put(self.items)

    def replace(self, others: dict[int, Any]) -> None:
        """Replace items by others, by the id of what they replace."""
        if isinstance(self.container, dict):
            self.put([(others.get(id(key), key), others.get(id(value), value)) for key, value in self.items])
        else:
            self.put([others.get(id(item), item) for item in self.items])

    def put(self, items: list[Any]) -> None:
        """Make these its contents; what is so already is not touched."""
        container = self.container
        if isinstance(container, dict):
            restore_dict(container, dict(items))
            return
        if len(container) == len(items) and all(map(operator.is_, container, items)):
            return
        container.clear()
        if isinstance(container, list | deque):
            container.extend(items)
        else:
            container.update(items)


def restore_dict(entries: dict[Any, Any], before: dict[Any, Any]) -> None:
    """Make a dict what it was, without touching what has not changed; order counts, as it does for hooks."""
    now = (part for item in entries.items() for part in item)
    then = (part for item in before.items() for part in item)
    if len(entries) == len(before) and all(map(operator.is_, now, then)):
        return
    kind = OrderedDict if isinstance(entries, OrderedDict) else dict  # a subclass may refuse, or do more
    kind.clear(entries)
    for key, value in before.items():
        kind.__setitem__(entries, key, value)
