"""Tables of pairs, CSV and TSV, with and without a first row of names."""

import csv
import re
import shutil

import pytest
from list_files import below, captions, check_source, ids, open_it, refusal, write

ROWS = [
    ("a.jpg", "a dog, running"),
    ("b/c.jpg", 'the word "stop"'),
    ("a.jpg", "two\nlines"),
    ("d.jpg", " "),
    ("e.jpg", "ein Hündchen"),
]


def write_table(path, rows, separator=","):
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=separator).writerows(rows)
    return path


@pytest.mark.parametrize(
    ("form", "separator", "header"),
    [
        ("csv", ",", ("image", "caption")),
        ("csv", ",", ("filepath", "title")),
        ("tsv", "\t", ("file_name", "text")),
        ("tsv", "\t", ("Image_Path", "Captions")),
    ],
)
def test_a_table_is_read_by_the_names_its_first_row_has(tmp_path, form, separator, header):
    path = write_table(tmp_path / "pairs", [header, *ROWS], separator)
    source = open_it(f"{form}:{path}")
    assert below(tmp_path, source) == ["a.jpg", "b/c.jpg", "a.jpg", "e.jpg"]
    assert captions(source) == [(ROWS[n][1],) for n in (0, 1, 2, 4)]
    assert ids(source) == [0, 1, 0, 2]
    [(name, why)] = source.left_out
    assert [source.listed, name] == [5, "d.jpg"]
    assert why.endswith("line 6 has no caption with words")  # one row before it takes two
    merged = open_it(f"{form}:{path}", "test")
    assert captions(merged) == [("a dog, running", "two\nlines"), (ROWS[1][1],), (ROWS[4][1],)]


def test_columns_can_be_named_and_an_id_joins_pictures(tmp_path):
    rows = [("n", "who", "img", "de", "image"), (1, "x", "a.jpg", "eins", "?")]
    path = write_table(tmp_path / "pairs.csv", [*rows, (2, "x", "b.jpg", "zwei", "?")])
    source = open_it(f"csv:{path}?image_key=img&caption_key=de&id_key=who")
    assert below(tmp_path, source) == ["a.jpg", "b.jpg"]
    assert captions(source) == [("eins",), ("zwei",)] and ids(source) == [0, 0]
    plain = [("id", "image", "caption"), (1, "a.jpg", "one"), (2, "a.jpg", "two")]
    source = open_it(f"csv:{write_table(tmp_path / 'numbered.csv', plain)}", role="test")
    assert captions(source) == [("one", "two")]  # a column "id" numbers the rows


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_commas_semicolons_and_tabs_are_told_apart_by_the_first_row(tmp_path, separator):
    rows = [("a.jpg", "one; two, three"), ("b.jpg", "four\tfive")]
    path = write_table(tmp_path / "pairs.csv", [("image", "caption"), *rows], separator)
    assert captions(open_it(f"csv:{path}")) == [(text,) for _, text in rows]
    path = write_table(tmp_path / "bare.csv", [("a.jpg", "one"), ("b.jpg", "two")], separator)
    assert captions(open_it(f"csv:{path}?image_key=0&caption_key=1")) == [("one",), ("two",)]
    if separator != "\t":
        assert "with csv:" in refusal(f"tsv:{path}")


def test_a_table_without_a_first_row_of_names_is_read_by_numbers(tmp_path):
    path = write(tmp_path / "pairs.tsv", "a dog\ta.jpg\r\na cat\tb.jpg")
    source = open_it(f"tsv:{path}?caption_key=0&image_key=1")
    assert below(tmp_path, source) == ["a.jpg", "b.jpg"]
    assert captions(source) == [("a dog",), ("a cat",)]
    named = write(tmp_path / "named.tsv", "title\tfilepath\na dog\ta.jpg\n")
    assert len(open_it(f"tsv:{named}?caption_key=0&image_key=1")) == 1
    said = refusal(f"tsv:{path}")
    assert "no image " in said and "a dog, a.jpg, 0, 1" in said
    assert "?image_key=0&caption_key=1" in said
    assert "no '2' for ?image_key" in refusal(f"tsv:{path}?caption_key=0&image_key=2")


def test_urls_of_conceptual_captions_are_refused_with_the_way_to_get_the_images(tmp_path):
    lines = "a very typical bus station\thttp://lh6.ggpht.com/-IvRtNLNcG8o/bus.jpg\n" * 2
    path = write(tmp_path / "Train_GCC-training.tsv", lines)
    said = refusal(f"tsv:{path}?caption_key=0&image_key=1")
    for words in ("line 1", "is a URL", "img2dataset", "webdataset:"):
        assert words in said
    headed = write(tmp_path / "cc3m.tsv", f"caption\turl\n{lines}")
    assert "cc3m.tsv line 2" in refusal(f"tsv:{headed}")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("image,caption\na.jpg,one\nb.jpg\n", "line 3 has 1 cells, the first row 2\\b"),
        ("image,caption\na.jpg,one, two\n", "line 2 has 3 cells, the first row 2\\b"),
        ('image,caption\na.jpg,"one\nb.jpg,two\n', "line 2 .*unexpected end"),
        ('image,caption\na.jpg,"one" two\n', "line 2 .*quotes=none"),
        (f'image,caption\na.jpg,"{"x" * 200_000}"\n', "line 2 .*field larger than"),
        ("image,caption\n ,one\n", 'line 2, key "image"'),
        ("picture,words\na.jpg,one\n", "no image under .*image_path.* it has picture, words"),
        ("image\na.jpg\n", "no caption under .*title.* it has image"),
        ("\n \n", "no image .*it has none"),
        ("image,caption\n../a.jpg,one\n", "line 2.*outside the image root"),
    ],
)
def test_a_table_with_a_mistake_is_refused_with_its_line(tmp_path, content, words):
    path = write(tmp_path / "pairs.csv", content)
    said = refusal(f"csv:{path}")
    assert re.search(words, said) and str(path) in said


def test_tables_that_cannot_be_read_or_asked_so_are_refused(tmp_path):
    assert "cannot be read" in refusal(f"csv:{tmp_path}/gone.csv")
    (tmp_path / "latin.csv").write_bytes("image,caption\na.jpg,café\n".encode("latin-1"))
    assert "latin.csv is not UTF-8 text (byte e9 after " in refusal(f"csv:{tmp_path}/latin.csv")
    path = write(tmp_path / "pairs.csv", "image,caption\na.jpg,one\n")
    assert "no 'img' for ?image_key" in refusal(f"csv:{path}?image_key=img")
    assert "quotes=maybe" in refusal(f"csv:{path}?quotes=maybe")
    assert "did you mean caption_key" in refusal(f"csv:{path}?captionkey=caption")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_quotes_can_mean_nothing_and_lines_end_in_every_way(tmp_path, end):
    lines = ["\ufeffimage\tcaption", 'a.jpg\t"one" two', 'b.jpg\t"three', ""]
    path = write(tmp_path / "pairs.tsv", end.join(lines))
    assert captions(open_it(f"tsv:{path}?quotes=none")) == [('"one" two',), ('"three',)]


def test_a_table_is_the_same_under_another_path(tmp_path):
    rows = [(f"{n % 5}.jpg", f"number {n}") for n in range(20)]
    path = write_table(tmp_path / "pairs.csv", [("image", "caption"), *rows])
    source = open_it(f"csv:{path}")
    moved = open_it(f"csv:{shutil.copy(path, tmp_path / 'other.csv')}")
    assert moved.fingerprint() == source.fingerprint()
    check_source(source)
