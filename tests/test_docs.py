"""The Markdown pages: links, anchors, lengths, commands with their flags, and Python code."""

import ast
import importlib
import importlib.util
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parent.parent
# Most lines of each page, None where there is no limit
PAGES = {
    "README.md": 160,
    "CHANGELOG.md": None,
    "sb3_softq/README.md": 200,
    "sb3_softq/zoo/README.md": 200,
    "examples/README.md": 200,
    "examples/benchmark/README.md": 250,
}
DECISIONS = "examples/benchmark/decisions.md"
if (ROOT / DECISIONS).exists():
    PAGES[DECISIONS] = None
LINE_LENGTH = 400

FENCE = re.compile(r"^ *(```+|~~~+) *(\w*)")
HEADING = re.compile(r"^#{1,6} +(.+?)(?: +#+)? *$")
TARGET = re.compile(r"\]\(([^()\s]+)\)|(?:src|href)=\"([^\"]+)\"")
INLINE_CODE = re.compile(r"`([^`]+)`")
EXTRA = re.compile(r"(?:\.|sb3-softq)\[([\w, -]+)\]|\bextra `([\w-]+)`")


class Block(NamedTuple):
    """A fenced block of code."""

    language: str
    code: str


class Page(NamedTuple):
    """A page, taken apart."""

    path: Path
    lines: list[str]
    # Those outside code
    text: list[str]
    blocks: list[Block]


@cache
def read(name: str) -> Page:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    text: list[str] = []
    blocks: list[Block] = []
    code: list[str] = []
    fence, language = "", ""
    for line in lines:
        match = FENCE.match(line)
        if fence:
            if line.strip() == fence:
                blocks.append(Block(language, "\n".join(code)))
                fence = ""
            else:
                code.append(line)
        elif match:
            fence, language, code = match[1], match[2], []
        else:
            text.append(line)
    assert not fence, f"{name}: a block of code has no end"
    return Page(ROOT / name, lines, text, blocks)


def slugs(name: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    seen: Counter[str] = Counter()
    result = set()
    for line in read(name).text:
        if heading := HEADING.match(line):
            title = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading[1])
            slug = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
            result.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
            seen[slug] += 1
    return result


def targets(page: Page) -> list[str]:
    """Of links and images, those to other sites left out."""
    text = INLINE_CODE.sub("", "\n".join(page.text))
    found = (match[1] or match[2] for match in TARGET.finditer(text))
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def problem(page: Page, target: str) -> str | None:
    """
    :param page: Where the link is
    :param target: Of the link
    :return: What is wrong with it
    """
    path, _, anchor = unquote(target).partition("#")
    file = (page.path.parent / path).resolve() if path else page.path
    if not file.is_relative_to(ROOT) or not file.exists():
        return "there is no such file"
    if anchor and (file.suffix != ".md" or anchor not in slugs(str(file.relative_to(ROOT)))):
        return "there is no such heading"
    return None


def commands(page: Page) -> Iterator[list[str]]:
    """Words of each simple command in blocks of bash and in inline code: variables in front and ``.venv/bin/`` left out."""
    sources = [line for block in page.blocks if block.language == "bash" for line in logical_lines(block.code)]
    inline = (code for line in page.text for code in INLINE_CODE.findall(line))
    sources += [code for code in inline if code.startswith(("python ", "make ", "pytest ", "pip "))]
    for source in sources:
        command: list[str] = []
        for word in [*words(source), ";"]:
            if word and not set(word) <= set("&|;"):
                command.append(word)
                continue
            while command and re.match(r"\w+=", command[0]):
                command.pop(0)
            if command:
                yield [command[0].removeprefix(".venv/bin/"), *command[1:]]
            command = []


def logical_lines(code: str) -> Iterator[str]:
    """Lines of bash, where quotes and backslashes at the end may hold several together."""
    pending = ""
    for line in code.splitlines():
        pending += line
        if pending.endswith("\\"):
            pending = pending[:-1]
            continue
        try:
            words(pending)
        except ValueError:
            # a quotation that goes on
            pending += "\n"
            continue
        yield pending
        pending = ""
    assert not pending, f"{pending!r} has no end"


def words(source: str) -> list[str]:
    lexer = shlex.shlex(source, posix=True, punctuation_chars="&|;")
    lexer.whitespace_split = True
    return list(lexer)


class Interface(NamedTuple):
    """What a script's argparse knows."""

    flags: set[str]
    subcommands: set[str]


@cache
def interface(script: Path) -> Interface:
    flags, subcommands = {"-h", "--help"}, set()
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "parser_of":
            flags |= interface(script.parent / "peers.py").flags
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            strings = {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
            if node.func.attr == "add_argument":
                flags |= {string for string in strings if string.startswith("-")}
            elif node.func.attr == "add_parser":
                subcommands |= strings
    return Interface(flags, subcommands)


def check_arguments(script: Path, arguments: list[str]) -> None:
    known = interface(script)
    given = {argument.partition("=")[0] for argument in arguments if re.match(r"--?[a-zA-Z]", argument)}
    assert given <= known.flags, f"{script.name} does not know {sorted(given - known.flags)}"
    if known.subcommands and arguments:
        assert arguments[0] in known.subcommands, f"{script.name} has {sorted(known.subcommands)}, not {arguments[0]!r}"


@cache
def zoo_commands() -> dict[str, Path]:
    """Scripts of the RL Zoo that ``python -m sb3_softq.zoo`` starts, without importing them."""
    spec = importlib.util.find_spec("rl_zoo3")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = Path(spec.submodule_search_locations[0]).parent
    for node in ast.parse((ROOT / "sb3_softq" / "zoo" / "__main__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "COMMANDS":
            modules: dict[str, str] = ast.literal_eval(node.value)
            return {name: folder / (module.replace(".", "/") + ".py") for name, module in modules.items()}
    raise AssertionError("sb3_softq.zoo.__main__ has no COMMANDS")


def check_command(program: str, *arguments: str) -> None:
    """Scripts, flags, subcommands and targets of make exist."""
    if program in ("python", "python3"):
        check_python(list(arguments))
    elif program == "make":
        targets_of_make = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        unknown = {argument for argument in arguments if not argument.startswith("-")} - set(targets_of_make)
        assert not unknown, f"the Makefile has no {sorted(unknown)}"
    elif program == "pytest":
        missing = [argument for argument in arguments if "/" in argument and not (ROOT / argument).exists()]
        assert not missing, f"there is no {missing}"


def check_python(arguments: list[str]) -> None:
    if arguments[:2] == ["-m", "sb3_softq.zoo"]:
        # a word in capitals stands for any
        if arguments[2:] and not arguments[2].isupper():
            assert arguments[2] in zoo_commands(), f"{arguments[2]!r} is not a command of the zoo"
            # a flag of ours
            own = {"--untrusted"} if arguments[2] in ("enjoy", "record_video") else set()
            check_arguments(zoo_commands()[arguments[2]], [x for x in arguments[3:] if x not in own])
    elif arguments[:1] == ["-c"]:
        check_code(arguments[1])
    elif arguments and arguments[0].endswith(".py"):
        script = ROOT / arguments[0]
        assert script.exists(), f"there is no {arguments[0]}"
        check_arguments(script, arguments[1:])


def check_code(code: str) -> None:
    """It compiles, and what it imports from this package exists."""
    tree = ast.parse(code)
    compile(tree, "<page>", "exec")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sb3_softq":
            module = importlib.import_module(node.module or "")
            missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            assert not missing, f"{node.module} has no {missing}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "sb3_softq":
                    importlib.import_module(alias.name)


def test_every_page_is_checked():
    folders = [ROOT.glob("*.md"), *((ROOT / name).rglob("*.md") for name in ("sb3_softq", "examples", "tests"))]
    assert {path.relative_to(ROOT).as_posix() for folder in folders for path in folder} == set(PAGES)


@pytest.mark.parametrize("name", PAGES)
def test_links(name):
    page = read(name)
    problems = {target: problem(page, target) for target in targets(page)}
    assert not {target: text for target, text in problems.items() if text}


@pytest.mark.parametrize(("name", "limit"), [(name, limit) for name, limit in PAGES.items() if limit])
def test_pages_are_short(name, limit):
    n_lines = len(read(name).lines)
    assert n_lines <= limit


@pytest.mark.parametrize("name", PAGES)
def test_lines_are_short(name):
    # tables cannot be wrapped
    assert [line for line in read(name).text if len(line) > LINE_LENGTH and not line.startswith("|")] == []


@pytest.mark.parametrize("name", PAGES)
def test_commands(name):
    for command in commands(read(name)):
        check_command(*command)


@pytest.mark.parametrize("name", PAGES)
def test_extras(name):
    # tomllib came with Python 3.11
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = project.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    known = re.findall(r"^([\w-]+) = \[", section, re.MULTILINE)
    found = EXTRA.findall("\n".join(read(name).lines))
    given = {extra.strip() for pair in found for extra in "".join(pair).split(",")}
    assert given <= set(known)


@pytest.mark.parametrize("name", PAGES)
def test_python_code(name):
    for block in read(name).blocks:
        if block.language == "python":
            check_code(block.code)


def test_slugs(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# SQL (2017)\n## `exp(Q / θ)`: a_b\n## [A link](https://a.b) \n## SQL (2017) ##\n```bash\n# none\n```\n")
    # an absolute name stands for itself
    assert slugs(str(page)) == {"sql-2017", "expq--θ-a_b", "a-link", "sql-2017-1"}


@pytest.mark.parametrize(
    "command",
    [
        "cd x && OMP_NUM_THREADS=1 .venv/bin/python examples/modes.py --stps 3",
        "python examples/mode.py",
        "python examples/benchmark/learning.py rn",
        "python -m sb3_softq.zoo trian --algo softq",
        "python -m sb3_softq.zoo train --algos softq",
        "python -c '\nfrom sb3_softq import SoftZ'",
        "make test",
        "pytest tests/test_none.py",
    ],
)
def test_wrong_commands_are_found(command):
    page = Page(ROOT / "README.md", [], [], [Block("bash", command)])
    *_, last = commands(page)
    with pytest.raises(AssertionError):
        check_command(*last)


@pytest.mark.parametrize("target", ["nowhere.md", "README.md#nowhere", "#nowhere", "LICENSE#mit", "../elsewhere.md"])
def test_wrong_links_are_found(target):
    assert problem(read("README.md"), target)
