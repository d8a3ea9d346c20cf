"""The tag of chat templates around what an assistant writes, {% generation %}.

Imported where a template is compiled, as only an extra brings jinja2.
"""

from collections.abc import Callable

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

OPENING, CLOSING = "\ud800", "\ud801"
"""What stands in a rendered text where the tag opened and closed: halves of characters, which no
text has."""


class GenerationTag(Extension):
    """Writes what stands before {% endgeneration %} between OPENING and CLOSING.

    Hugging Face's transformers, whose tag it is, counts characters instead; these marks are right
    in a macro, too. As there, what a template sets inside of the tag is not seen outside.
    """

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("enclose")
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def enclose(self, caller: Callable[[], str]) -> str:
        return f"{OPENING}{caller()}{CLOSING}"


def has_tag(environment: jinja2.Environment, source: str) -> bool:
    """Says whether a template has the tag anywhere; jinja2.TemplateSyntaxError if it is none."""
    return environment.parse(source).find(nodes.ExtensionAttribute) is not None
