"""What the site needs beyond mkdocs.yml: the pages stay as GitHub shows them, the code as it is."""

import posixpath
import re

import griffe

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#:]+)[^)]*\)")
FIELD_COMMENT = re.compile(r"  # (?!noqa)(.+)$")
EXAMPLE = re.compile(r"^>>> .*(\n.+)*", re.MULTILINE)


def on_page_markdown(markdown: str, *, page, **_) -> str:
    """Keeps the words of a link to a file outside docs/, which the site does not have."""
    folder = posixpath.dirname(page.file.src_uri)

    def words(link: re.Match) -> str:
        outside = posixpath.normpath(posixpath.join(folder, link[2])).startswith("../")
        return link[1] if outside else link[0]

    return LINK.sub(words, markdown)


class Docstrings(griffe.Extension):
    """Documents fields by the comments behind them and shows examples outside sections as code."""

    def on_attribute(self, *, attr: griffe.Attribute, **_) -> None:
        if not attr.docstring and (comment := FIELD_COMMENT.search(attr.source)):
            attr.docstring = griffe.Docstring(comment[1], parent=attr)

    def on_object(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring:
            obj.docstring.value = EXAMPLE.sub(r"```pycon\n\g<0>\n```", obj.docstring.value)

    def on_package(self, *, pkg: griffe.Module, **_) -> None:
        """Sorts modules by name; a name that a package imports from them is shown there alone."""
        for module in pkg.modules.values():
            module.members = dict(sorted(module.members.items()))
            module.exports = None
