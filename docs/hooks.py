"""What the site needs beyond mkdocs.yml: pages stay as GitHub shows them, fields say their meaning."""

import posixpath
import re

import griffe

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#:]+)[^)]*\)")


def on_page_markdown(markdown: str, *, page, **_) -> str:
    """Keeps the words of a link to a file outside docs/, which the site does not have."""
    folder = posixpath.dirname(page.file.src_uri)

    def words(link: re.Match) -> str:
        outside = posixpath.normpath(posixpath.join(folder, link[2])).startswith("../")
        return link[1] if outside else link[0]

    return LINK.sub(words, markdown)


class FieldComments(griffe.Extension):
    """A comment behind a field is its documentation."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_) -> None:
        comment = re.search(r"  # (.+)$", attr.source)
        if comment and not attr.docstring:
            attr.docstring = griffe.Docstring(comment[1], parent=attr)
