"""No pattern takes more time than the length of its text allows.

Patterns of policies run in RE2. Those of our own code run in `re`, which tries one way after
another: here its steps are counted, so that no clock decides. The patterns are collected from the
code, and the texts are made from each pattern: a new bad pattern is found without being named.
"""

from __future__ import annotations

import ast
import functools
import importlib
import itertools
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from re import _compiler, _parser  # type: ignore[attr-defined]
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdoff._patterns import MOST_PATTERN_CHARACTERS, PatternError, compile_pattern, try_compile
from holdoff._recognise import OutputRecogniser
from holdoff.policies import presets
from holdoff.v1 import policy_pb2
from tests.harness import LONG

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "holdoff": ROOT / "clients/python/holdoff",
    "holdoff_coordinator": ROOT / "coordinator/holdoff_coordinator",
}
FUNCTIONS = {"compile", "match", "fullmatch", "search", "sub", "subn", "split"}
FUNCTIONS |= {"findall", "finditer"}
ANCHORED = {"match", "fullmatch"}
LENGTH = 20
"""Of the shorter text. The other one is twice as long."""


@dataclass(frozen=True)
class Found:
    """A pattern of our own code."""

    where: str
    pattern: str
    flags: int
    used_by: frozenset[str]


# What there is ----------------------------------------------------------------------------------


@functools.cache
def modules() -> list[tuple[str, ast.Module]]:
    """Return all modules of our packages, parsed."""
    found = []
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if parts[0] != "v1":
                name = ".".join((package, *(one for one in parts if one != "__init__")))
                found.append((name, ast.parse(path.read_text())))
    return found


def calls_of_re(tree: ast.Module) -> Iterator[ast.Call]:
    """Yield calls such as `re.search(…)`."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="re"), attr=attr)):
                if attr in FUNCTIONS:
                    yield node


def compiled_in(value: Any) -> Iterator[re.Pattern[str]]:
    """Yield compiled patterns, also those in a table."""
    if isinstance(value, re.Pattern):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from compiled_in(one)


def uses(tree: ast.Module, name: str) -> frozenset[str]:
    """Return the methods of a compiled pattern that a module calls."""
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(
                value=ast.Name(id=used) | ast.Subscript(value=ast.Name(id=used)), attr=attr
            ) if used == name:
                found.add(attr)
    return frozenset(found) or frozenset({"search"})


def all_patterns() -> Iterator[Found]:
    """Yield the patterns of our own code, wherever they are."""
    for module, tree in modules():
        names = {
            target.id
            for statement in tree.body
            if isinstance(statement, ast.Assign | ast.AnnAssign)
            for target in (
                statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            )
            if isinstance(target, ast.Name) and any(True for _ in calls_of_re_in(statement))
        }
        for name in sorted(names):
            for compiled in compiled_in(getattr(importlib.import_module(module), name)):
                where = f"{module}.{name}"
                yield Found(where, compiled.pattern, compiled.flags, uses(tree, name))
        for node in ast.walk(tree):
            match node:
                case ast.Call(
                    func=ast.Attribute(value=ast.Name(id="re"), attr=attr),
                    args=[ast.Constant(value=str(text)), *_],
                ) if attr in FUNCTIONS - {"compile"}:
                    yield Found(f"{module}:{node.lineno}", text, 0, frozenset({attr}))
                case ast.keyword(arg="pattern", value=ast.Constant(value=str(text))):
                    yield Found(f"{module}:{node.lineno}", text, 0, frozenset({"search"}))


def calls_of_re_in(statement: ast.stmt) -> Iterator[ast.Call]:
    """Yield the calls of `re` in a statement."""
    return calls_of_re(ast.Module([statement], []))


def test_every_pattern_is_found() -> None:
    """Fails when a pattern is made where this test does not see it: in a function, or from a value.

    What a policy or a caller gives belongs to `_patterns`, which alone may import RE2.
    """
    unseen = []
    for module, tree in modules():
        constant = {
            node.lineno
            for statement in tree.body
            if isinstance(statement, ast.Assign | ast.AnnAssign)
            for node in calls_of_re_in(statement)
        }
        unseen += [
            f"{module}:{call.lineno}"
            for call in calls_of_re(tree)
            if call.lineno not in constant and not isinstance(call.args[0], ast.Constant)
        ]
        for node in ast.walk(tree):
            if isinstance(node, ast.Import) and module != "holdoff._patterns":
                unseen += [module for one in node.names if one.name.partition(".")[0] == "re2"]
    assert unseen == []
    assert len(list(all_patterns())) > 30


# How many steps a text takes --------------------------------------------------------------------


class TooManyStepsError(Exception):
    """More than any linear pattern takes."""


class Engine:
    """Counts the steps of a search as `re` does it: one way after another, in their order."""

    def __init__(self, pattern: str, flags: int = 0) -> None:
        self.tree = _parser.parse(pattern, flags & ~re.UNICODE.value)
        self._single: dict[tuple[Any, int], re.Pattern[str]] = {}
        self._text = ""
        self._most = 0
        self.steps = 0

    def count(self, text: str, used_by: Iterable[str]) -> int:
        """Return the steps that a text takes, used in the worst of these ways."""
        self._text, self._most, self.steps = text, 300 * (len(text) + 10), 0
        if set(used_by) <= ANCHORED:
            whole = "fullmatch" in used_by
            self._run(self.tree, 0, 0, lambda end: end == len(text) or not whole)
            return self.steps
        start = 0
        while start <= len(text):
            end = self._end(self.tree, start)
            start = max(start + 1, end or 0)
        return self.steps

    def _end(self, nodes: Any, position: int) -> int | None:
        found: int | None = None

        def then(end: int) -> bool:
            nonlocal found
            found = end
            return True

        self._run(nodes, 0, position, then)
        return found

    def _fits(self, node: tuple[Any, Any], position: int) -> bool:
        operation, value = node
        # Of the tree, which lives as long as this does.
        key = operation, value if isinstance(value, int) else id(value)
        if key not in self._single:
            one = _parser.SubPattern(self.tree.state, [node])
            self._single[key] = _compiler.compile(one)
        return self._single[key].match(self._text, position) is not None

    def characters(self, nodes: Any) -> Iterator[tuple[Any, Any]]:
        """Yield all nodes that take one character."""
        for operation, value in nodes:
            if str(operation) in ("LITERAL", "NOT_LITERAL", "IN", "ANY"):
                yield operation, value
            for inner in children(operation, value):
                yield from self.characters(inner)

    def classes(self) -> list[str]:
        """Return a character of each kind that this pattern tells from others."""
        nodes = list(self.characters(self.tree))
        kinds: dict[tuple[bool, ...], str] = {}
        for self._text in "0aZ 'x-=./()[]{}\"\\:;,~é!\n\t\0" + "".join(map(chr, range(33, 127))):
            kinds.setdefault(tuple(self._fits(node, 0) for node in nodes), self._text)
        return list(kinds.values())

    def _run(  # noqa: C901, PLR0911 - a case for each kind of node
        self, nodes: Any, index: int, position: int, then: Callable[[int], bool]
    ) -> bool:
        self.steps += 1
        if self.steps > self._most:
            raise TooManyStepsError
        if index == len(nodes):
            return then(position)
        operation, value = nodes[index]

        def rest(end: int) -> bool:
            return self._run(nodes, index + 1, end, then)

        match str(operation):
            case "LITERAL" | "NOT_LITERAL" | "IN" | "ANY":
                here = position < len(self._text) and self._fits((operation, value), position)
                return here and rest(position + 1)
            case "AT":
                return self._fits((operation, value), position) and rest(position)
            case "SUBPATTERN":
                return self._run(value[3], 0, position, rest)
            case "BRANCH":
                return any(self._run(one, 0, position, rest) for one in value[1])
            case "MAX_REPEAT" | "MIN_REPEAT":
                lazy = str(operation) == "MIN_REPEAT"
                return self._repeat(value, lazy=lazy, done=0, position=position, then=rest)
            case "POSSESSIVE_REPEAT":
                least, most, inner = value
                done = 0
                while done < most and (end := self._end(inner, position)) not in (None, position):
                    position, done = end or position, done + 1
                return done >= least and rest(position)
            case "ATOMIC_GROUP":
                found = self._end(value, position)
                return found is not None and rest(found)
            case "ASSERT" | "ASSERT_NOT":
                direction, inner = value
                start = position - (inner.getwidth()[0] if direction < 0 else 0)
                fits = start >= 0 and self._end(inner, start) is not None
                return fits == (str(operation) == "ASSERT") and rest(position)
        raise AssertionError(f"a pattern of ours needs no {operation}")

    def _repeat(
        self, value: Any, *, lazy: bool, done: int, position: int, then: Callable[[int], bool]
    ) -> bool:
        least, most, inner = value

        def again() -> bool:
            return done < most and self._run(
                inner,
                0,
                position,
                lambda end: (
                    (end > position or done < least)
                    and self._repeat(value, lazy=lazy, done=done + 1, position=end, then=then)
                ),
            )

        if done < least:
            return again()
        return then(position) or again() if lazy else again() or then(position)


def children(operation: Any, value: Any) -> Iterable[Any]:
    """Return the sequences inside a node."""
    match str(operation), value:
        case "SUBPATTERN", (*_, inner):
            return [inner]
        case "BRANCH", (_, branches):
            return branches  # type: ignore[no-any-return]
        case (("MAX_REPEAT" | "MIN_REPEAT" | "POSSESSIVE_REPEAT"), (_, _, inner)):
            return [inner]
        case "ATOMIC_GROUP", inner:
            return [inner]
    return []


# Texts that are hard for a pattern --------------------------------------------------------------


class Texts:
    """Makes texts of a beginning, something repeated, and an end, from a pattern itself."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._classes = engine.classes()
        self._beginnings = {""}
        self._repeated = set(self._classes)
        self._repeated.update(
            map("".join, itertools.product(self._classes[: 6 if LONG else 4], repeat=2))
        )
        self._walk(engine.tree, "")

    def __iter__(self) -> Iterator[tuple[str, str, str]]:
        return itertools.product(sorted(self._beginnings), sorted(self._repeated), ("", "\0"))

    def _walk(self, nodes: Any, before: str) -> None:
        for operation, value in nodes:
            inside = list(children(operation, value))
            if "REPEAT" in str(operation):
                example = self._example(inside[0])
                self._beginnings |= {before, before + example}
                self._repeated |= {example} - {""}
            for one in inside:
                self._walk(one, before)
            before += self._example([(operation, value)])

    def _example(self, nodes: Any) -> str:
        """Return a short text that fits."""
        text = ""
        for operation, value in nodes:
            inside = list(children(operation, value))
            if "REPEAT" in str(operation):
                text += self._example(inside[0]) * value[0]
            elif inside:
                text += self._example(inside[0])
            elif str(operation) in ("LITERAL", "NOT_LITERAL", "IN", "ANY"):
                text += self._character((operation, value))
        return text

    def _character(self, node: tuple[Any, Any]) -> str:
        if str(node[0]) == "LITERAL":
            return chr(node[1])
        for one in self._classes:
            self._engine._text = one
            if self._engine._fits(node, 0):
                return one
        return ""


def worst(pattern: str, used_by: Iterable[str], flags: int = 0) -> str:
    """Return a text whose double takes much more than double the steps; '' if there is none.

    So does the double of the double: a bound such as `{1,63}` is reached but once.
    """
    engine = Engine(pattern, flags)
    for beginning, repeated, end in Texts(engine):
        steps: list[int] = []
        for length in (LENGTH, 2 * LENGTH, 4 * LENGTH):
            middle = repeated * max(1, length // len(repeated))
            try:
                steps.append(engine.count(beginning + middle + end, used_by))
            except TooManyStepsError:
                return f"{beginning!r} + {repeated!r} * n + {end!r} takes far too many steps"
            if len(steps) > 1 and steps[-1] <= 2.7 * steps[-2] + 100:
                break
        else:
            return f"{beginning!r} + {repeated!r} * n + {end!r} takes {steps} steps"
    return ""


@pytest.fixture(autouse=True)
def _deep() -> Iterator[None]:
    """The engine calls itself for each character."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    yield
    sys.setrecursionlimit(before)


def test_patterns_of_ours_are_linear() -> None:
    """Fails when a pattern has a text that takes more than its length allows."""
    slow = {}
    for found in all_patterns():
        if text := worst(found.pattern, found.used_by, found.flags):
            slow[found.where, found.pattern] = text
    assert slow == {}


@pytest.mark.parametrize(
    ("pattern", "used_by"),
    [
        (r"\((?:'(?:[^']|'')*'|[^()'])*\)", "sub"),
        (r"(\w+)=(?:\"([^\"]*)\"|(\S*))", "findall"),
        (r"\(.*\)$", "sub"),
        (r"[?#].*@|\s", "search"),
        (r"(a+)+b", "match"),
        (r"(?:a|a)*b", "match"),
        (r"\s*a?\s*!", "match"),
        (r"x*x*x*y", "fullmatch"),
        (r"a*?b|c", "search"),
    ],
)
def test_a_slow_pattern_is_found(pattern: str, used_by: str) -> None:
    """Patterns that were in our code, and others. Fails when the engine counts too little."""
    assert worst(pattern, {used_by})


@given(st.text("ab'()\n", max_size=12))
def test_the_engine_finds_what_re_finds(text: str) -> None:
    """Fails when steps are counted of another search than Python's."""
    for pattern in (r"\((?:'[^']*+'|[^()']++)*+\)", r"a*?b|(?<!a)b+", r"(?:a|ab){1,2}'(?=b)"):
        engine = Engine(pattern)
        engine._text, engine._most = text, 1_000_000
        match = re.compile(pattern).match(text)
        assert engine._end(engine.tree, 0) == (match.end() if match else None)


# RE2 --------------------------------------------------------------------------------------------


def cpu_seconds(work: Callable[[], object]) -> float:
    """Return the least CPU time of several tries."""
    found = []
    for _ in range(7):
        began = time.thread_time()
        work()
        found.append(time.thread_time() - began)
    return min(found)


@pytest.mark.parametrize(
    "pattern",
    [
        *(r"(a+)+b", r"(a|a)*b", r"(\w+\s?)*!", r"a*a*a*a*a*b", r"(?:a?){50}a{50}b", r"(.*a){20}b"),
        *sorted(
            {
                one
                for policy in presets().values()
                for one in (
                    *((policy.endpoint.path,) if policy.endpoint else ()),
                    *(policy.output.errors + policy.output.places if policy.output else ()),
                    *(
                        text
                        for throttle in policy.throttle
                        for text in (throttle.body, throttle.header)
                        if text
                    ),
                )
            }
        ),
    ],
)
def test_patterns_of_policies_are_linear(pattern: str) -> None:
    """A text of double the length takes about double the CPU time, whatever the pattern is."""
    compiled = compile_pattern(pattern)
    repeated_texts = ("http://a/api/", "partitie (1", "itgen 0", '"error": "', "{[ ")
    for repeated in ("a", "'", '"', " ", *repeated_texts):
        text = repeated * (16_000 // len(repeated))
        one = cpu_seconds(functools.partial(compiled.search, text))
        two = cpu_seconds(functools.partial(compiled.search, text * 2))
        assert two < 3.5 * one + 0.01, repeated


def test_what_a_pattern_costs_is_bounded() -> None:
    """Fails when a pattern may be longer, or need more steps for a character, than is planned."""
    for pattern in ("x" * (MOST_PATTERN_CHARACTERS + 1), ".{1000}.{1000}", "((a{99}){99}){99}"):
        with pytest.raises(PatternError):
            compile_pattern(pattern)
        assert try_compile(pattern) is None


def test_half_a_character_breaks_nothing() -> None:
    """A text from Python may hold what UTF-8 has not. Fails when RE2 raises."""
    found = compile_pattern("(?P<code>b.)c").search("\ud800ab\udfffcd")
    assert found == {"code": "b?"}
    with pytest.raises(PatternError):
        compile_pattern("\ud800")


def test_markers_of_one_long_word_are_read_at_once() -> None:
    """Work of lines with words of twice the length doubles.

    Fails when each letter of a word begins another search for its `=`.
    """

    def work(length: int) -> Callable[[], object]:
        data = (b"HOLDOFF-ERROR " + b"w" * length + b"\n") * 40
        recogniser = OutputRecogniser(policy_pb2.Policy(), trust_output=True)
        return lambda: recogniser.feed(data)

    assert cpu_seconds(work(3_900)) < 3.5 * cpu_seconds(work(1_950)) + 0.01


@pytest.mark.parametrize("program", ["holdoff.cli", "holdoff.cli.run", "holdoff._recognise"])
def test_re2_comes_with_the_first_pattern(program: str) -> None:
    """Fails when its library is imported where no pattern of a policy is needed."""
    look = f"import sys, {program}; print('re2' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
