"""A Markdown extension for the site: formulas become MathML while it is built.

Readers' browsers draw MathML by themselves, so the pages load no script and work without a network.
"""

import html
import xml.etree.ElementTree as ElementTree

from latex2mathml.converter import convert
from markdown import Extension, Markdown
from markdown.treeprocessors import Treeprocessor


class _FormulasToMathML(Treeprocessor):
    """Replaces what pymdownx.arithmatex marks, `\\(...\\)` in a span or `\\[...\\]` in a div."""

    def run(self, root: ElementTree.Element) -> None:
        for element in root.iter():
            if element.get("class") == "arithmatex" and element.text:
                latex = html.unescape(element.text.strip())[2:-2]
                display = "block" if element.tag == "div" else "inline"
                namespace = ' xmlns="http://www.w3.org/1998/Math/MathML"'
                mathml = convert(latex, display=display).replace(namespace, "")
                element.text = None
                element.append(ElementTree.fromstring(mathml))


class MathMLExtension(Extension):
    """Runs after arithmatex has found the formulas."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802, the name is Markdown's
        md.treeprocessors.register(_FormulasToMathML(md), "mathml", priority=5)


def makeExtension(**options: object) -> MathMLExtension:  # noqa: N802, the name is Markdown's
    """What Markdown calls for an extension given by its module."""
    return MathMLExtension(**options)
