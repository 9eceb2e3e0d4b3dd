"""How large the objects of a pickle are when they are written out, found without making any of them.

A tuple may hold another one twice, that one a third one twice, and so on: two hundred levels fit a kilobyte, but to
hash them as the key of a dictionary, or to print them, takes 2^200 steps, inside one call that nothing interrupts; a
chain of a million tuples overflows the stack instead. So the operations that `torch.load` knows are walked first. Each
object becomes the list of the objects in it; with n(x) and d(x) its size and depth,

    n(x) = 1 + sum_c n(c),    d(x) = 1 + max_c d(c)        c: the objects in x, one that is in it twice counted twice.
"""

import pickletools
import warnings
from collections.abc import Iterator
from itertools import islice
from typing import IO

__all__ = ["check_pickle"]

_MOST_OPERATIONS, _MOST_OBJECTS, _MOST_LEVELS = 10**6, 10**8, 500  # the original's checkpoints: 10^4, 10^4, 10
_MAKES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "REDUCE": 2, "NEWOBJ": 2, "BINPERSID": 1}  # of so many on the stack
_FILLS = {"APPEND": 1, "SETITEM": 2, "BUILD": 1}  # with so many on the stack the object below them


def check_pickle(file: IO[bytes]) -> None:
    """Read one pickle from `file`, up to its end or to where it is damaged.

    Raises:
        ValueError: it is too long; an object in it is too large or too deep written out, or is part of itself.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd escapes in damaged strings
        operations = list(islice(_operations(file), _MOST_OPERATIONS + 1))
    if len(operations) > _MOST_OPERATIONS:
        raise ValueError(f"its pickle has more than {_MOST_OPERATIONS} operations")
    _check_size(_objects(operations))


def _operations(file: IO[bytes]) -> Iterator[tuple]:
    """Operation and argument, as far as they can be read: how a pickle is damaged torch.load says."""
    try:
        for operation, argument, _ in pickletools.genops(file):
            yield operation, argument
    except (ValueError, MemoryError, OverflowError):
        return


def _objects(operations: list[tuple]) -> list:
    """What lies on the stack at the end, each object as the list of the objects in it."""
    stack, below, memo = [], [], {}
    try:
        for operation, argument in operations:
            name = operation.name
            if name == "MARK":
                below.append(stack)
                stack = []
            elif name in ("TUPLE", "APPENDS", "SETITEMS"):
                items, stack = stack, below.pop()
                if name == "TUPLE":
                    stack.append(items)
                else:
                    stack[-1].extend(items)
            elif name in _MAKES:
                stack[-_MAKES[name] :] = [stack[-_MAKES[name] :]]
            elif name in _FILLS:
                items = stack[-_FILLS[name] :]
                del stack[-_FILLS[name] :]
                stack[-1].extend(items)
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif operation.stack_before:
                break  # the end, or an operation that torch.load refuses
            elif operation.stack_after:
                stack.append([])  # numbers, strings, names, and what is empty
    except (IndexError, KeyError):
        pass  # damaged, too
    return [item for part in (*below, stack) for item in part]


def _check_size(root: list) -> None:
    """Raise ValueError where n or d of `root`, or of an object in it, is too large; depth first, without recursion."""
    sizes: dict[int, tuple[int, int] | None] = {id(root): None}  # n and d by identity; None until both are known
    path = [(root, iter(root))]
    while path:
        parent, rest = path[-1]
        child = next((child for child in rest if sizes.get(id(child)) is None), None)
        if child is not None:
            if id(child) in sizes:
                raise ValueError("an object in it is part of itself")
            sizes[id(child)] = None
            path.append((child, iter(child)))
            continue
        path.pop()
        inner = [size for child in parent if (size := sizes[id(child)]) is not None]  # of all
        size, depth = 1 + sum(n for n, _ in inner), 1 + max((d for _, d in inner), default=0)
        if size > _MOST_OBJECTS or depth > _MOST_LEVELS:
            raise ValueError(
                f"the objects in it, written out, are more than {_MOST_OBJECTS} or more than {_MOST_LEVELS} levels deep"
            )
        sizes[id(parent)] = size, depth
