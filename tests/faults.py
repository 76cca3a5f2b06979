"""The single faults that `tests/mutants.py` plants, and a sample of them."""

from __future__ import annotations

import ast
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

IDENTITY = ("file", "where", "operator", "segment", "occurrence")
COMPARED = {
    ast.Lt: (r"<", "<="), ast.LtE: (r"<=", "<"), ast.Gt: (r">", ">="), ast.GtE: (r">=", ">"),
    ast.Eq: (r"==", "!="), ast.NotEq: (r"!=", "=="), ast.Is: (r"\bis\b", "is not"),
    ast.IsNot: (r"\bis\s+not\b", "is"), ast.In: (r"\bin\b", "not in"),
    ast.NotIn: (r"\bnot\s+in\b", "in"),
}  # fmt: skip
COMPUTED = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "/"), ast.Mod: ("%", "//"), ast.Pow: ("**", "*"), ast.LShift: ("<<", ">>"),
    ast.RShift: (">>", "<<"), ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&"),
    ast.BitXor: ("^", "|"), ast.MatMult: ("@", "*"),
}  # fmt: skip
ORDERED = (ast.Sub, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, ast.LShift, ast.RShift, ast.MatMult)
ORDERED_CALLS = re.compile(
    r"sub|div|rem|pow|atan2|subtract|divide|true_divide|floor_divide|mod|power|arctan2|matmul|dot"
    r"|g[te]|l[te]|greater|less|shift_(left|right_logical|right_arithmetic)"
)
SEQUENCES = (ast.JoinedStr, ast.List, ast.Tuple, ast.ListComp, ast.Dict, ast.DictComp)
TYPE = re.compile(
    r"None|int|float|str|bytes|bool|(tuple|list|dict|set)\b.*|[\w.]*\b[A-Z]\w*[a-z]\w*"
)
# Not computed with: what a reader or a type checker sees. A `raise` is a message for the most part.
SKIPPED_NODES = (ast.Import, ast.ImportFrom, ast.Raise, ast.JoinedStr)
SKIPPED_FIELDS = {"annotation", "returns", "decorator_list", "msg", "type_params"}
SKIPPED_KEYWORDS = {"stacklevel", "strict"}  # of warnings; of zip, where lengths agree anyway


@dataclass(frozen=True)
class Mutant:
    """The bytes from `start` to `end` of `file` become `new`; IDENTITY holds where lines moved."""

    file: str
    where: str
    operator: str
    segment: str
    occurrence: int
    line: int
    start: int
    end: int
    new: str

    @property
    def room(self) -> str:
        return self.file.split("/")[1].removesuffix(".py")

    @property
    def identity(self) -> tuple:
        return tuple(getattr(self, name) for name in IDENTITY)

    def files_of_room(self, repo: Path) -> list[str]:
        """The test files of its room, and its own file, which may have doctests."""
        patterns = f"tests/{self.room}/**/test_*.py", f"tests/test_{self.room}*.py"
        paths = [path.relative_to(repo) for pattern in patterns for path in repo.glob(pattern)]
        return [self.file, *sorted(path.as_posix() for path in paths)]

    def planted(self, text: bytes) -> bytes:
        return text[: self.start] + self.new.encode() + text[self.end :]

    def change(self, text: bytes) -> tuple[str, str]:
        """The lines it touches, before and after."""
        first = text.rfind(b"\n", 0, self.start) + 1
        last = (text.find(b"\n", self.end) + 1 or len(text) + 1) - 1
        after = self.planted(text)[first : last + len(self.new.encode()) + self.start - self.end]
        return text[first:last].decode(), after.decode()


class Source:
    """The text of a file, and where its nodes are: `ast` counts columns in bytes."""

    def __init__(self, text: bytes) -> None:
        self.text = text
        self.lines = [0, *(m.end() for m in re.finditer(rb"\n", text))]

    def span(self, node: ast.AST) -> tuple[int, int]:
        start = self.lines[node.lineno - 1] + node.col_offset
        return start, self.lines[node.end_lineno - 1] + node.end_col_offset

    def of(self, node: ast.AST) -> str:
        start, end = self.span(node)
        return self.text[start:end].decode()

    def token(self, left: ast.AST, right: ast.AST, pattern: str) -> tuple[int, int]:
        """Where an operator stands between two operands; a comment there may look like one."""
        start, end = self.span(left)[1], self.span(right)[0]
        gap = re.sub(rb"#[^\n]*", lambda m: b" " * len(m[0]), self.text[start:end])
        found = re.search(pattern.encode(), gap)
        assert found, (pattern, gap)
        return start + found.start(), start + found.end()

    def alone(self, node: ast.AST, instead_of: ast.AST) -> str:
        """`node` in the place of a larger expression, over as many lines."""
        text = self.of(node)
        return f"({text}{chr(10) * (self.of(instead_of).count(chr(10)) - text.count(chr(10)))})"


def is_number(node: ast.AST) -> bool:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node = node.operand
    return isinstance(node, ast.Constant) and type(node.value) is int


def axes_of(node: ast.AST) -> list[ast.AST]:
    """The numbers below `node` that count axes: of `axis=` and `axes=`, and in an index of many."""
    if isinstance(node, ast.keyword) and node.arg in ("axis", "axes"):
        value = node.value
        return [v for v in getattr(value, "elts", [value]) if is_number(v)]
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Tuple):
        return [v for v in node.slice.elts if is_number(v)]
    return []


def clipped(call: ast.Call) -> ast.expr | None:
    """What a call clips, if that is what it does."""
    of = call.func.value if isinstance(call.func, ast.Attribute) else None
    name = call.func.attr if of else getattr(call.func, "id", "")
    args, module = call.args, ast.unparse(of) if of else ""
    if name == "clip" and of and module.rpartition(".")[2] not in ("jnp", "np", "numpy"):
        return of
    pair = (
        len(args) == 2 and not call.keywords and not any(isinstance(a, ast.Starred) for a in args)
    )
    if name in ("minimum", "maximum") or (
        name in ("min", "max") and module in ("", "lax") and pair
    ):
        return args[1] if isinstance(args[0], ast.Constant) else args[0]
    return args[name == "clamp"] if name in ("clip", "clamp") and args else None


def changes(source: Source, node: ast.AST) -> Iterator[tuple[str, int, int, str]]:
    """`(operator, start, end, new text)` of each fault that `node` itself can have."""
    if isinstance(node, ast.Compare):
        operands = [node.left, *node.comparators]
        for left, op, right in zip(operands, node.ops, operands[1:], strict=False):
            old, new = COMPARED[type(op)]
            yield "comparison", *source.token(left, right, old), new
    elif isinstance(node, ast.BoolOp):
        old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in zip(node.values, node.values[1:], strict=False):
            yield "logic", *source.token(left, right, rf"\b{old}\b"), new
    elif isinstance(node, ast.BinOp | ast.AugAssign):
        left, right = (
            (node.left, node.right) if isinstance(node, ast.BinOp) else (node.target, node.value)
        )
        texts = any(isinstance(getattr(v, "value", None), str | bytes) for v in (left, right))
        types = any(TYPE.fullmatch(source.of(v)) for v in (left, right))
        if texts or types or any(isinstance(v, SEQUENCES) for v in (left, right)):
            return  # such a fault is a TypeError at once, or one of types
        old, new = COMPUTED[type(node.op)]
        at, to = source.token(left, right, re.escape(old))
        yield "arithmetic", at, to, new
        start, end = source.span(node)
        first, second = source.text[start:at].decode(), source.text[to:end].decode()
        ordered = isinstance(node, ast.BinOp) and isinstance(node.op, ORDERED)
        if ordered and "#" not in first + second and ast.dump(left) != ast.dump(right):
            ends = first[len(first.rstrip()) :], second[: -len(second.lstrip())]
            swapped = f"({second.strip()}){ends[0]}{old}{ends[1]}({first.strip()})"
            yield "swap", start, end, swapped
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
        start = source.span(node)[0]
        end = start + len(re.match(rb"-|not\b *", source.text[start:])[0])
        yield ("sign" if isinstance(node.op, ast.USub) else "not"), start, end, ""
    elif isinstance(node, ast.Constant) and type(node.value) in (int, bool):
        new = str(not node.value if isinstance(node.value, bool) else node.value + 1)
        yield "constant", *source.span(node), new
    elif isinstance(node, ast.Call):
        if array := clipped(node):
            yield "clip", *source.span(node), source.alone(array, node)
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if ORDERED_CALLS.fullmatch(name) and len(node.args) == 2 and not node.keywords:
            (start, a), (b, end) = map(source.span, node.args)
            first, second = map(source.of, node.args)
            yield "swap", start, end, second + source.text[a:b].decode() + first
    elif isinstance(node, ast.If | ast.IfExp):
        test, flipped = node.test, (ast.Eq, ast.NotEq, ast.Is, ast.IsNot, ast.In, ast.NotIn)
        # These have that very fault by another operator.
        known = isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)
        known |= isinstance(test, ast.Compare) and type(test.ops[0]) in flipped
        if not known:
            yield "condition", *source.span(test), f"not ({source.of(test)})"


def candidates(file: str, text: bytes) -> list[Mutant]:
    """All mutants of one file, by position and operator."""
    source, found = Source(text), []

    def visit(node: ast.AST, where: str, around: ast.AST | None, axes: list[ast.AST]) -> None:
        test = ast.unparse(node.test) if isinstance(node, ast.If) else ""
        targets = getattr(node, "targets", [])
        hidden = isinstance(node, ast.keyword) and node.arg in SKIPPED_KEYWORDS
        if isinstance(node, SKIPPED_NODES) or hidden or test.endswith("TYPE_CHECKING"):
            return
        if targets and getattr(targets[0], "id", "") in ("__all__", "__slots__"):
            return
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            where = f"{where}.{node.name}".strip(".")
        small = isinstance(node, ast.Constant | ast.UnaryOp)  # says little without what is around
        shown = around if small and around else node
        if any(node is axis for axis in axes):
            number = ast.literal_eval(node)
            other = number - 1 if number > 0 or number == -1 else number + 1  # most arrays have it
            found.append((*source.span(node), "axis", str(other), node, where, shown))
            return
        for operator, start, end, new in changes(source, node):
            at = node.test if operator == "condition" else node
            found.append((start, end, operator, new, at, where, at if at is not node else shown))
        if isinstance(node, ast.stmt):
            around = None
        elif isinstance(node, ast.expr | ast.keyword) and not small:
            around = node
        axes = axes_of(node) or (axes if isinstance(node, ast.Tuple | ast.List) else [])
        for name, value in ast.iter_fields(node):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and name not in SKIPPED_FIELDS:
                    visit(child, where, around, axes)

    visit(ast.parse(text), "", None, [])
    seen: Counter[tuple] = Counter()
    mutants = []
    for start, end, operator, new, node, where, shown in sorted(found, key=lambda f: f[:4]):
        name = (file, where, operator, source.of(shown))
        mutants.append(Mutant(*name, seen[name], node.lineno, start, end, new))
        seen[name] += 1
    return mutants


def all_candidates(repo: Path) -> list[Mutant]:
    files = sorted(p.relative_to(repo).as_posix() for p in (repo / "jaxquant").rglob("*.py"))
    return [m for file in files for m in candidates(file, (repo / file).read_bytes())]


def sample(mutants: list[Mutant], reached: set[Mutant], count: int, seed: int) -> list[Mutant]:
    """At least two of each room, the rest in proportion to its candidates; only what is reached.

    A room is shuffled before coverage is asked, so that another suite changes few of the sample.
    """
    rooms: dict[str, list[Mutant]] = defaultdict(list)
    for mutant in mutants:
        rooms[mutant.room].append(mutant)
    weight = {room: len(of) for room, of in rooms.items()}
    for room, of in rooms.items():
        random.Random(f"{seed} {room}").shuffle(of)
        rooms[room] = [m for m in of if m in reached]
    taken = dict.fromkeys(sorted(rooms), 0)

    def turn(room: str) -> tuple[int, float]:
        """Rooms below two come first; then Webster's rule of proportional seats."""
        return min(taken[room], 2), (2 * max(taken[room] - 2, 0) + 1) / weight[room]

    for _ in range(min(count, sum(map(len, rooms.values())))):
        taken[min((r for r in taken if taken[r] < len(rooms[r])), key=turn)] += 1
    return sorted(
        (m for r, k in taken.items() for m in rooms[r][:k]), key=lambda m: (m.file, m.start)
    )


def named(given: dict | list, mutants: list[Mutant]) -> tuple[list[Mutant], list[Mutant]]:
    """The mutants whose identities an earlier run wrote, and those that these sources lack."""
    here = {m.identity: m for m in mutants}
    rows = given["mutants"] if isinstance(given, dict) else given
    names = [tuple(row[name] for name in IDENTITY) for row in rows]
    gone = [Mutant(*n, line=0, start=0, end=0, new="") for n in names if n not in here]
    return [here[n] for n in names if n in here], gone
