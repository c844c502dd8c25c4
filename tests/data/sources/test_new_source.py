"""A new source is one function in a file of its own, and one line in the table of schemes."""

from list_files import open_it, refusal

from codebook_jax.data.sources import opening
from codebook_jax.data.sources.listed import Entry, Listed


def open_lines(request):
    """`lines:FILE`: each line is the path of an image, a tab and a caption."""
    with open(request.place, encoding="utf-8") as file:
        rows = [line.rstrip("\n").split("\t") for line in file]
    place = request.place
    return Listed(
        request, [Entry(f"{place}:{n}", image, (words,)) for n, (image, words) in enumerate(rows)]
    )


def test_a_new_source_is_one_function_and_one_line(monkeypatch, tmp_path):
    scheme = opening.Scheme(open_lines, "lines:FILE", ("image_root",))
    monkeypatch.setitem(opening.SCHEMES, "lines", scheme)
    (tmp_path / "pairs.txt").write_text("a.jpg\ta red ring\nb.jpg\ttwo cubes\n")
    source = open_it(f"lines:{tmp_path}/pairs.txt")
    assert [record.captions for record in source] == [("a red ring",), ("two cubes",)]
    assert source[1].image == str(tmp_path / "b.jpg")
    assert len(open_it(f"lines:{tmp_path}/pairs.txt, lines:{tmp_path}/pairs.txt")) == 4
    assert "per" in refusal(f"lines:{tmp_path}/pairs.txt?per=image")
