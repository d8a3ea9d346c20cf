"""What the documents hold: their blocks of code, the commands in these, the files they name."""

import ast
import dataclasses
import re
import shlex
import tomllib
from pathlib import Path

from tests.support.paths import ROOT

BENCHMARKS = "benchmarks/README.md"
_PAGES = (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"))
DOCUMENTS = [*sorted(str(path.relative_to(ROOT)) for path in _PAGES), BENCHMARKS]

_FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
_COMMENT = re.compile(r"(^|\s+)#(\s.*)?$")
_ASSIGNMENT = re.compile(r"[A-Z_]+=")


@dataclasses.dataclass(frozen=True)
class CodeBlock:
    """A fenced block of a document."""

    document: str  # below the repository's root
    line: int  # of its first line, from 1
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


@dataclasses.dataclass(frozen=True)
class Command:
    """A line of a bash block, comment and line breaks taken out."""

    where: str
    text: str

    def parts(self) -> list[list[str]]:
        """The programs it starts, each with its arguments, without assignments before them."""
        tokens = shlex.shlex(self.text, posix=True, punctuation_chars=True)
        tokens.whitespace_split = True
        parts: list[list[str]] = [[]]
        for token in tokens:
            if set(token) <= set("&|;"):
                parts.append([])
            elif parts[-1] or not _ASSIGNMENT.match(token):
                parts[-1].append(token)
        return [part for part in parts if part]


def read(document: str) -> str:
    """The text of a document named from the repository's root."""
    return (ROOT / document).read_text(encoding="utf-8")


def code_blocks(language: str, documents: list[str] | None = None) -> list[CodeBlock]:
    """Every block of `language` of the documents, in order."""
    blocks = []
    for document in DOCUMENTS if documents is None else documents:
        text = read(document)
        for match in _FENCE.finditer(text):
            indent, found, code = match.groups()
            if found == language:
                line = text.count("\n", 0, match.start(3)) + 1
                code = re.sub(f"^{indent}", "", code, flags=re.MULTILINE)
                blocks.append(CodeBlock(document, line, found, code))
    return blocks


def commands() -> list[Command]:
    """Every command of the documents' bash blocks."""
    found = []
    for block in code_blocks("bash"):
        whole = block.text.replace("\\\n", " ")
        for line in whole.splitlines():
            text = " ".join(_COMMENT.sub("", line).split())
            if text:
                found.append(Command(str(block), text))
    return found


def without_comments(markdown: str) -> str:
    """A document without its blocks of code, whose brackets are no links."""
    return _FENCE.sub("", markdown)


def links(document: str) -> list[str]:
    """The targets of a document's links and images, but those that leave the repository."""
    targets = re.findall(r"\]\(([^)\s]+)\)", without_comments(read(document)))
    return [target for target in targets if "://" not in target]


def anchors(document: str) -> set[str]:
    """What links can name of a document: its headings as GitHub and the site spell them."""
    titles = re.findall(r"^#+ (.*)$", without_comments(read(document)), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", title.lower()) for title in titles)
    return {title.strip().replace(" ", "-") for title in plain}


def named_files(document: str) -> set[str]:
    """The paths of this repository that a document sets in code, such as `train/cli.py`."""
    tops = "|".join(sorted(path.name for path in ROOT.iterdir() if path.is_dir()))
    pattern = rf"`((?:{tops})/[\w./-]*)(?::[\w.]+)?`"
    return set(re.findall(pattern, without_comments(read(document))))


def groups_and_extras() -> set[str]:
    """The optional dependencies that pyproject.toml names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return {*project["dependency-groups"], *project["project"]["optional-dependencies"]}


def defined_names(path: Path) -> set[str]:
    """Functions, classes, their members (dotted) and constants that a Python file defines."""
    names: set[str] = set()

    def collect(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                names.add(prefix + node.name)
            elif isinstance(node, ast.ClassDef):
                names.add(prefix + node.name)
                collect(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(prefix + node.target.id)
            elif isinstance(node, ast.Assign):
                names.update(prefix + t.id for t in node.targets if isinstance(t, ast.Name))

    collect(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return names
