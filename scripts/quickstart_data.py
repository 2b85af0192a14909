"""Build the quick start's instruction data from the standard library's own docs.

Every Python installation holds thousands of short, carefully written texts:
its docstrings. Turning them into question-answer pairs needs no download, gives
the same data on every run of one Python version, and teaches a small model what
is easy to see: to answer in a terse, factual docstring voice, without rambling.
"""

import importlib
import inspect
import json
import pkgutil
import random
import re
import subprocess
import sys
import types
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

Item = dict[str, str]
SHARES = {"test": 0.10, "val": 0.05}  # the rest is for training
MIN_WORDS, MAX_WORDS, MAX_SIGNATURE = 4, 80, 160

# Modules that act on import (open a browser, print, need a display, touch the
# terminal), that are tests, or that only repeat another module's contents.
SKIPPED = frozenset(
    "antigravity this idlelib tkinter turtle turtledemo readline rlcompleter test tests lib2to3 "
    "distutils ensurepip pydoc_data posix nt posixpath ntpath genericpath encodings msilib".split()
)
NOISE = re.compile(
    r"(?i)>>>|<<|::|[-=]>|[@|]|https?:|\bXXX|\bTODO|\bFIXME|\bdeprecated\b|\binternal\b|copyright"
    r"|\(c\)|Python 2|See help\(|automatically generated|\S {3,}\S|' '|[\w\]] = |SF #"
    r"|\d\*|above example|\.\.\.|\.\.$|^(See|Same|Ditto|Alias|Here's|Warning)\b"
)
SIGNATURE_LINE = re.compile(r"[\w.]+\s?\([^)]*\)+(\s*(->|=)\s*\S.{0,60})?[.:]?$")
SENTENCE_END = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)\s+(?=[A-Z`\"'(])")
MARKUP = (
    (re.compile(r"(?::[\w:]+:)?``?[~!]?([^`']+)``?"), r"`\1`"),  # ``Foo``, :class:`Foo`
    (re.compile(r"`([^`'\s]+)'"), r"`\1`"),  # `name' in old texts
    (re.compile(r"(?<![\w*])\*(\w+)\*(?![\w*])"), r"`\1`"),  # *argument*
    (re.compile(r"\s*<https?:[^>]*>"), ""),
    (re.compile(r"\s+"), " "),
)


class Entry(NamedTuple):
    """One documented object of the standard library."""

    package: str
    owner: str  # the module of a function, the class of a method, empty for builtins
    name: str
    kind: str  # module, function, class or method
    summary: str
    signature: str | None


def build_dataset(folder: Path, seed: int = 0) -> dict[str, Path]:
    """Write the splits `train`, `val` and `test` into `folder` and return their paths.

    A split's own key leads to its Alpaca JSON file, `<split>_config` to its data config.
    """
    folder = Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for split, items in split_by_package(make_items(collect_in_isolation()), seed).items():
        data, config = folder / f"{split}.json", folder / f"{split}.yaml"
        quoted = json.dumps(str(data), ensure_ascii=False)  # a valid YAML string as well
        write_whole(data, json.dumps(items, indent=1, ensure_ascii=False) + "\n")
        write_whole(config, f"META:\n  - path: {quoted}\n    type: 'text'\n    prompt_type: 'alpaca'\n")
        paths |= {split: data, f"{split}_config": config}
        print(f"{split}: {len(items)} question-answer pairs in {data}")
    return paths


def showcase(test_items: list[Item]) -> list[Item]:
    """Pick three test questions of different kinds for a before/after demonstration."""
    words = re.compile(r"[a-z0-9]{4,}").findall

    def guessable(item: Item) -> tuple[float, str]:
        # No model knows a package it never saw: the question has to hold much of the answer.
        question = item["instruction"] + item["input"]
        answer = set(words(item["output"].lower()))
        return len(answer.intersection(words(question.lower()))) / max(len(answer), 5), question

    openings = ("Write a docstring", "What does the function", "Which function")
    kinds = ([i for i in test_items if i["instruction"].startswith(o)] for o in openings)
    return [max(items, key=guessable) for items in kinds if items]


def split_by_package(items: Iterable[tuple[str, Item]], seed: int) -> dict[str, list[Item]]:
    """Divide the items by top-level package, so that nothing leaks between splits."""
    packages = defaultdict(list)
    for package, item in items:
        packages[package].append(item)
    total = sum(map(len, packages.values()))
    splits: dict[str, list[Item]] = {"train": [], "val": [], "test": []}
    rng = random.Random(seed)
    for package in rng.sample(sorted(packages), len(packages)):
        size = len(packages[package])
        # No package may fill more than an eighth of a held-out split.
        limits = {s: min(n * total - len(splits[s]), n * total / 8) for s, n in SHARES.items()}
        split = next((s for s, limit in limits.items() if size <= limit), "train")
        splits[split] += packages[package]
    return {split: rng.sample(found, len(found)) for split, found in splits.items()}


def make_items(entries: list[Entry]) -> Iterator[tuple[str, Item]]:
    """Yield pairs of a top-level package and a question with its answer."""
    siblings = defaultdict(list)
    for entry in entries:
        siblings[entry.owner, entry.kind].append(entry.name)
    for entry in entries:
        for question in _questions(entry, siblings[entry.owner, entry.kind]):
            yield entry.package, dict(zip(("instruction", "input", "output"), question, strict=True))


def _questions(entry: Entry, siblings: list[str]) -> Iterator[tuple[str, str, str]]:
    rng = random.Random(entry.name)  # per entry, so that one change does not reshuffle all
    choice, subject = rng.random(), f"the {entry.kind} `{entry.name}`"
    if entry.kind in ("module", "class"):
        yield f"What is {subject} of the Python standard library for?", "", entry.summary
    elif choice < 0.3 and entry.signature:
        yield f"Write a docstring for this Python {entry.kind}.", entry.signature, entry.summary
    elif choice < 0.5 and entry.owner and len(siblings) >= 4:
        candidates = sorted({f"`{name}`" for name in (entry.name, *rng.sample(siblings, 4))})
        given = f"{entry.summary}\nCandidates: {', '.join(candidates)}"
        yield f"Which {entry.kind} of `{entry.owner}` is described here?", given, f"`{entry.name}`"
    else:
        yield f"What does {subject} of the Python standard library do?", "", entry.summary
    if entry.signature and rng.random() < 0.4:
        yield f"What is the signature of {subject}?", "", f"`{entry.signature}`"


def collect_in_isolation() -> list[Entry]:
    """Run `collect_entries` in a bare interpreter, as many libraries patch the standard one."""
    output = subprocess.check_output([sys.executable, "-I", "-S", "-W", "ignore", __file__])
    return [Entry(*fields) for fields in json.loads(output)]


def collect_entries() -> list[Entry]:
    """Describe every object that has a usable docstring, each text once."""
    modules = import_modules()
    found = [_entry(name, "module", module) for name, module in modules.items()]
    for name, value in _public_objects(modules).items():
        found.append(_entry(name, "class" if inspect.isclass(value) else "function", value))
        # vars() rather than dir(): an inherited method belongs to its own class.
        for attribute in vars(value) if inspect.isclass(value) else ():
            method = getattr(value, attribute, None)
            # do_* are commands of an interactive shell, documented for its users.
            if inspect.isroutine(method) and not attribute.startswith(("_", "do_")):
                found.append(_entry(f"{name}.{attribute}", "method", method))
    # The least nested name comes last and wins: random.choice, not random.Random.choice.
    ranked = sorted(filter(None, found), key=lambda e: (-e.name.count("."), e.name))
    return list({re.sub(r"\W+", "", e.summary.lower()): e for e in ranked}.values())


def import_modules() -> dict[str, types.ModuleType]:
    """Import the public standard library, less what this platform lacks."""
    pending = [*sorted({n for n in sys.stdlib_module_names if n[0] != "_"} - SKIPPED), "os.path"]
    modules = {}
    for name in pending:  # grows on the way
        try:
            modules[name] = importlib.import_module(name)
        except Exception:  # modules of other platforms fail in many ways
            continue
        children = {c.name for c in pkgutil.iter_modules(getattr(modules[name], "__path__", []))}
        pending += [f"{name}.{c}" for c in sorted(children - SKIPPED) if c[0] != "_"]
    return modules


def _public_objects(modules: dict[str, types.ModuleType]) -> dict[str, object]:
    """Map the best qualified name of each public function and class to the object."""
    homes = defaultdict(list)
    for module_name, module in modules.items():
        declared = getattr(module, "__all__", None)
        for name in vars(module) if declared is None else declared:
            value = getattr(module, name, None)
            origin = getattr(value, "__module__", None) or ""
            documented = inspect.isroutine(value) or inspect.isclass(value)
            if name[0] != "_" and documented and (declared or origin == module_name):
                foreign = origin.split(".")[0].lstrip("_") != module_name.split(".")[0]
                rank = (foreign, module_name.count("."), name != getattr(value, "__name__", name))
                homes[id(value)].append((*rank, f"{module_name}.{name}", value))
    return {name: value for *_, name, value in map(min, homes.values())}


def _entry(name: str, kind: str, value: object) -> Entry | None:
    # Not getattr(): a class without a docstring would answer with its parent's.
    doc = vars(value).get("__doc__") if kind == "class" else value.__doc__
    shown = name.removeprefix("builtins.")
    owner, _, short_name = shown.rpartition(".")
    summary = clean_summary(doc, short_name) if isinstance(doc, str) else None
    signature = _signature(shown, value) if kind in ("function", "method") else None
    package = name.partition(".")[0]
    return Entry(package, owner, shown, kind, summary, signature) if summary else None


def _signature(name: str, value: object) -> str | None:
    try:
        signature = inspect.signature(value)
    except Exception:  # many C functions have none, and some break `inspect`
        return None
    parameters = [p for p in signature.parameters.values() if p.name != "self"]
    text = f"{name}{signature.replace(parameters=parameters)}"
    # (*args, **kwargs) says nothing; addresses, sets and paths differ between machines.
    useless = re.search(r"\(\*\w+, \*\*\w+\)|[<{]|'/|0x", text)
    return None if useless or len(text) > MAX_SIGNATURE else text


def clean_summary(doc: str, short_name: str) -> str | None:
    """Return a docstring's first paragraph as whole sentences, or None if it is not prose."""
    lines = [line.rstrip() for line in inspect.cleandoc(doc).splitlines()]
    while lines and (not lines[0] or SIGNATURE_LINE.match(lines[0].lstrip())):
        lines.pop(0)
    lines = list(takewhile(bool, lines))
    if any(re.match(r"\s|[-*=+#~^]|\d+[.)] ", line) for line in lines):
        return None  # lists, tables, code, underlined titles
    text = " ".join(lines)
    for pattern, replacement in MARKUP:
        text = pattern.sub(replacement, text)
    # "copy - make a copy" and "copy(x) makes a copy" name the object once more.
    title = rf"^(Module )?[\w.]*{re.escape(short_name)}(\.py)?(\([^)]*\))?"
    text = re.sub(rf"{title}(\s*(-+|:)\s+|(?<=\))\s+(?=[a-z]+s ))", "", text).strip()
    if NOISE.search(text) or not re.match(r"[A-Za-z`\"]", text):
        return None
    sentences = SENTENCE_END.split(text)
    if len(sentences) == 1 and re.search(r"[\w`\")\]]$", text):
        sentences = [text + "."]
    elif text[-1] not in ".!?":
        sentences.pop()
    while len(" ".join(sentences).split()) > MAX_WORDS:
        sentences.pop()
    text = " ".join(s for s in sentences if not s.startswith(("See ", "Example")))
    # Only plain words: `start_response() callable` has to keep its first letter.
    text = re.sub(r"^[a-z]+(?=[ /])", lambda word: word[0].capitalize(), text)
    return text if len(text.split()) >= MIN_WORDS else None


def write_whole(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    print(json.dumps(collect_entries()))  # read by collect_in_isolation
