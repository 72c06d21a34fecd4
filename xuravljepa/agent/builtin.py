"""Tools that come with the agent: ``calculator``, ``add``, ``echo``, ``KnowledgeBase``, ``MemorySearch``.

They are fast and bounded by construction, so ``register(..., isolation="inline")`` suits them.
"""

import ast
import csv
import difflib
import json
import math
import operator
from pathlib import Path

from xuracore.errors import FormatError, ShapeError
from xuravljepa.agent.errors import ArgumentError, ToolError
from xuravljepa.agent.tools import Output

MAX_EXPRESSION = 200  # characters
MAX_DIGITS = 30  # of one number in an expression
MAX_EXPONENT = 64
MAX_BITS = 256  # of any whole number on the way; the result itself must fit 63
MAX_FILE = 16 * 2**20  # bytes of a knowledge base file


# ---------------------------------------------------------------------------------------------
# Arithmetic
# ---------------------------------------------------------------------------------------------


def add(a: int, b: int) -> int:
    """Add two whole numbers.

    Args:
        a: the first number
        b: the second number

    Returns:
        Their sum.
    """
    return a + b


def calculator(expression: str) -> int | float:
    """Work out an arithmetic expression.

    Args:
        expression: numbers, parentheses and the operators + - * / // % **, for example "7 + 3 * 2"

    Returns:
        The value; a whole number where the expression has a whole value.
    """
    if len(expression) > MAX_EXPRESSION:
        raise ValueError(f"an expression has at most {MAX_EXPRESSION} characters, this one {len(expression)}")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"{expression!r} is no arithmetic expression") from None
    value = _evaluate(tree.body)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{expression!r} has no finite value")
        if value.is_integer() and abs(value) < 2**53:
            value = int(value)
    if isinstance(value, int) and value.bit_length() > 63:
        raise ValueError(f"the value of {expression!r} is beyond 64 bits")
    return value


def _evaluate(node):
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        if isinstance(node.value, int) and node.value >= 10**MAX_DIGITS:
            raise ValueError(f"a number has at most {MAX_DIGITS} digits")
        return node.value
    if isinstance(node, ast.UnaryOp) and type(node.op) in (ast.UAdd, ast.USub):
        value = _evaluate(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _evaluate(node.left), _evaluate(node.right)
        if isinstance(node.op, ast.Pow):
            _check_power(left, right)
        try:
            value = _OPERATORS[type(node.op)](left, right)
        except (ZeroDivisionError, OverflowError) as error:
            raise ValueError(str(error)) from None
        if isinstance(value, complex):
            raise ValueError("the value is not a real number")
        if isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise ValueError(f"a number on the way has more than {MAX_BITS} bits")
        return value
    raise ValueError(f"{ast.unparse(node)[:40]!r} is not allowed; numbers, parentheses and "
                     "+ - * / // % ** are")


_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
              ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow}


def _check_power(base, exponent):
    # Before the power is taken: afterwards would be too late for 9**9**9.
    if abs(exponent) > MAX_EXPONENT:
        raise ValueError(f"an exponent is at most {MAX_EXPONENT}")
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * exponent > MAX_BITS:
        raise ValueError(f"a number on the way has more than {MAX_BITS} bits")


# ---------------------------------------------------------------------------------------------
# Echo
# ---------------------------------------------------------------------------------------------


def echo(text: str) -> str:
    """Give back a text unchanged.

    Args:
        text: any text

    Returns:
        The same text.
    """
    return text


# ---------------------------------------------------------------------------------------------
# Facts in a table
# ---------------------------------------------------------------------------------------------


class KnowledgeBase:
    """Facts keyed by two words, such as a price list: (shop, item) → price.

    Args:
        table: ``{shop: {item: value}}``; values are strings or finite numbers.  Case and surrounding
            blanks of the keys do not count.
    """

    def __init__(self, table):
        self._rows = {}
        for shop, items in table.items():
            if not isinstance(shop, str) or not isinstance(items, dict):
                raise ToolError(f"a knowledge base maps a name to an object of items, not {shop!r} to "
                                f"{type(items).__name__}")
            row = self._rows.setdefault(_key(shop), {})
            for item, value in items.items():
                if not _is_fact(item, value):
                    raise ToolError(f"{shop!r}: {item!r} must be a name with a string or a finite number, "
                                    f"not {value!r:.60}")
                if row.setdefault(_key(item), value) != value:
                    raise ToolError(f"{shop!r} says two things about {item!r}: "
                                    f"{row[_key(item)]!r} and {value!r}")

    @classmethod
    def from_json(cls, path):
        """Read ``{"shop": {"item": value}}``; raises FormatError naming the file."""
        try:
            data = json.loads(_read_text(path))
        except (ValueError, RecursionError) as error:
            raise FormatError(f"is not JSON: {error}", path) from None
        if not isinstance(data, dict):
            raise FormatError("the top level must be an object of shops", path)
        try:
            return cls(data)
        except ToolError as error:
            raise FormatError(str(error), path) from None

    @classmethod
    def from_csv(cls, path):
        """Read three columns with a heading: shop, item, value.  A value that is a number becomes one."""
        table = {}
        for number, row in enumerate(csv.reader(_read_text(path).splitlines()), start=1):
            if not row or number == 1:
                continue
            if len(row) != 3:
                raise FormatError(f"expected 3 columns, got {len(row)}", path, f"line {number}")
            shop, item, value = (cell.strip() for cell in row)
            if table.setdefault(shop, {}).setdefault(item, _number(value)) != _number(value):
                raise FormatError(f"says something else about ({shop}, {item}) than a line before",
                                  path, f"line {number}")
        try:
            return cls(table)
        except ToolError as error:
            raise FormatError(str(error), path) from None

    def __len__(self):
        return sum(len(row) for row in self._rows.values())

    def lookup(self, shop: str, item: str) -> str | int | float:
        """Look up what an item costs at a shop.

        Args:
            shop: the name of the shop
            item: the name of the item

        Returns:
            The price.
        """
        row = _find(self._rows, shop, "shop")
        return _find(row, item, f"item at {shop!r}")


def _find(table, name, what):
    if _key(name) in table:
        return table[_key(name)]
    near = difflib.get_close_matches(_key(name)[:100], table, n=1)
    suggestion = f"; did you mean {near[0]!r}?" if near else ""
    raise LookupError(f"there is no {what} named {name[:100]!r}{suggestion}")


def _key(name):
    return " ".join(name.casefold().split())


def _is_fact(item, value):
    if not isinstance(item, str) or isinstance(value, bool):
        return False
    return isinstance(value, (str, int)) or isinstance(value, float) and math.isfinite(value)


def _number(text):
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        return value if math.isfinite(value) else text
    return text


def _read_text(path):
    path = Path(path)
    try:
        if path.stat().st_size > MAX_FILE:
            raise FormatError(f"is larger than {MAX_FILE} bytes", path)
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise FormatError(f"cannot be read: {error.strerror}", path) from None
    except UnicodeDecodeError:
        raise FormatError("is not UTF-8 text", path) from None


# ---------------------------------------------------------------------------------------------
# Memories by meaning
# ---------------------------------------------------------------------------------------------


class MemorySearch:
    """Entries (key embedding, value, label), found by the cosine of their keys with a query's.

    Args:
        embed: ``embed(text) -> vector``, the text encoder that also made the keys.
        dim: width of the keys.
    """

    def __init__(self, embed, dim):
        self._embed, self._dim = embed, dim
        self._keys, self._entries = [], []

    def __len__(self):
        return len(self._entries)

    def add_entry(self, key, value, label):
        """Remember something.

        Args:
            key: embedding, (dim,).
            value: JSON data, what is remembered.
            label: what to call it.

        Returns:
            The entry's id: entries are numbered from 0 in the order they came.
        """
        self._keys.append(self._unit(key, "key"))
        self._entries.append((value, str(label)))
        return len(self._entries) - 1

    def search(self, vector, k=3):
        """The k nearest entries, nearest first: ``[{"id", "label", "similarity", "value"}]``.

        Raises:
            LookupError: there are no entries.
            ShapeError: the vector is not (dim,).
            ArgumentError: the vector has no direction, or k is less than 1.
        """
        import numpy as np

        if not self._entries:
            raise LookupError("Knowledge base is empty")
        if k < 1:
            raise ArgumentError("k", f"must be at least 1, got {k}")
        similarity = np.stack(self._keys) @ self._unit(vector, "query")
        # A stable sort: of equally near entries the older comes first, on every machine.
        order = np.argsort(-similarity, kind="stable")[:k]
        return [{"id": int(i), "label": self._entries[i][1], "similarity": float(similarity[i]),
                 "value": self._entries[i][0]} for i in order]

    def memory_search(self, query: str, k: int = 3) -> Output:
        """Search what was remembered for entries that mean the same as a text.

        Args:
            query: what to look for
            k: how many entries to return

        Returns:
            The nearest entries with their ids and similarities.
        """
        hits = self.search(self._embed(query), k)
        lines = [f"Found: {hit['label']} (similarity: {hit['similarity']:.4f}) [{hit['id']}]" for hit in hits]
        return Output(hits, "\n".join(lines))

    def _unit(self, vector, what):
        import numpy as np

        vector = np.asarray(vector, dtype=np.float64)
        if vector.shape != (self._dim,):
            raise ShapeError(f"the {what} has shape {vector.shape}; expected ({self._dim},)")
        length = np.linalg.norm(vector)
        if not np.isfinite(length) or length == 0:
            raise ArgumentError(what, "is zero or not finite: it has no direction")
        return vector / length
