"""Data of one's own: what users bring is read as they see it, or refused by line."""

import csv
import json
import re
from collections import Counter

import datasets
import pandas
import pytest

from data_sample import reading
from mosaic import NEUTRAL, Request

ROWS = [
    {"request": "Negroni?", "category": "alcohol", "split": "train"},
    {"request": "Which horse?", "category": "betting", "split": "test"},
    {"request": "Root beer?", "category": "neutral", "split": "train"},
]
ROWS[2]["near"] = "alcohol"
ASKED = {"role": "user", "content": "Negroni?"}
ANSWER = {"role": "assistant", "content": "Gin."}
SYSTEM = {"role": "system", "content": "You are the help desk of Acme."}


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def said(content):
    return lines({"request": content, "category": "alcohol"})


@pytest.fixture
def give(tmp_path):
    """read_requests of a file with this text."""

    def call(name, text, *columns):
        data = text if isinstance(text, bytes) else text.encode()
        (tmp_path / name).write_bytes(data)
        return reading.read_requests(str(tmp_path / name), *columns)

    return call


# --- Kinds of files -------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, text",
    [
        ("d.jsonl", lines(*ROWS)),
        ("D.JSONL", lines(*ROWS)),
        ("d.ndjson", "\n" + lines(*ROWS) + " \n"),
        ("d.json", lines(*ROWS)),
        ("d.json", "\ufeff" + json.dumps(ROWS)),
        ("D.JSON", json.dumps(ROWS, indent=2)),
    ],
)
def test_json_is_read_from_lines_and_from_one_list(give, name, text):
    found = [Request(r["request"], r["category"], r["split"]) for r in ROWS[:2]]
    found.append(Request("Root beer?", "neutral", "train", "alcohol"))
    assert give(name, text) == found


TANGLED = 'say "hi",\nor; not\tever'


def table(mark, end="\n", start="", quoting=csv.QUOTE_MINIMAL):
    rows = [("request", "category", "near", "notes"), (TANGLED, "alcohol", "", "x")]
    rows.append(("c", NEUTRAL, "alcohol", ""))
    cells = [
        mark.join('"' + cell.replace('"', '""') + '"' for cell in row)
        if quoting or row[0] == TANGLED
        else mark.join(row)
        for row in rows
    ]
    return start + end.join(cells) + end


@pytest.mark.parametrize(
    "name, text",
    [
        ("d.csv", table(",")),
        ("D.CSV", table(",", quoting=csv.QUOTE_ALL)),
        ("d.csv", table(",", "\r\n", "\ufeff")),  # Excel's "CSV UTF-8"
        ("d.csv", table(";", "\r\n")),  # Excel's in Europe
        ("d.csv", table("\t")),
        ("d.csv", table(";").replace("notes", "notes (a, b)")),
        ("d.csv", table(",", "\r")),  # Excel's on old Macs
        ("d.csv", table(", ")),
        ("d.csv", table(",") + "\n,,,\n\n"),
        ("d.tsv", table("\t")),
        ("D.TSV", table("\t", quoting=csv.QUOTE_ALL)),
    ],
)
def test_csv_cells_may_hold_marks_quotes_and_lines(give, name, text):
    first, second = give(name, text)
    assert first.prompt == TANGLED and first.category == "alcohol"
    assert second.prompt == "c" and second.category == NEUTRAL
    assert (first.near, second.near) == (None, "alcohol")


def test_an_index_column_without_a_name_is_no_mistake(give):
    assert give("d.csv", ",request,category,\n0,a,b,\n1,c,b,\n")[1].prompt == "c"


def test_a_cell_may_be_of_any_length(give):
    (found,) = give("d.csv", f"request,category,notes\na,b,{'x' * 140_000}\n")
    assert found.prompt == "a"


def test_a_tsv_has_tabs_between_its_cells_whatever_its_header_says(give):
    (found,) = give("D.TSV", "request\tcategory\tnotes, ours\nHi, you\tb\tx\n")
    assert (found.prompt, found.category) == ("Hi, you", "b")


WORDS = ["None", "N/A", "null", "nan", "NA", "NULL", "n/a", "#N/A", "", "true", "1e5"]


@pytest.mark.parametrize("name", ["d.csv", "d.tsv", "d.jsonl", "d.parquet"])
def test_words_that_pandas_takes_for_nothing_are_words(tmp_path, name):
    rows = [{"request": f"{w} ", "category": w} for w in WORDS if w not in ("", "1e5")]
    rows = [row for row in rows if row["category"] not in ("NULL", "n/a")]  # spellings
    rows += [{"request": w, "category": "b"} for w in ("1e5", "007", "1.0")]
    frame, path = pandas.DataFrame(rows), tmp_path / name
    if name == "d.parquet":
        frame.to_parquet(path)
    elif name == "d.jsonl":
        path.write_text(lines(*rows), encoding="utf-8")
    else:
        frame.to_csv(path, index=False, sep="\t" if name == "d.tsv" else ",")
    found = reading.read_requests(str(path))
    assert [(q.prompt, q.category) for q in found] == [
        (row["request"], row["category"]) for row in rows
    ]


def test_empty_cells_of_near_and_split_mean_none(give):
    text = "request,category,near,split\na,b,,\nc,neutral, ,\n"
    assert [q.near for q in give("d.csv", text)] == [None, None]
    rows = [
        {"request": "a", "category": "b", "near": "", "split": ""},
        {"request": "c", "category": "b", "near": None, "split": None},
        {"request": "d", "category": "b", "near": "  "},
    ]
    assert [q.near for q in give("d.jsonl", lines(*rows))] == [None] * 3


def test_the_last_cells_of_a_row_may_be_left_out_as_excel_does_where_they_are_empty(
    give
):
    found = give("d.csv", "request,category,near\na,neutral,b\nc,b\nd,b\n")
    assert [(q.prompt, q.category, q.near) for q in found] == [
        ("a", "neutral", "b"), ("c", "b", None), ("d", "b", None)]


def test_a_column_may_be_null_for_ten_megabytes_and_text_then(give):
    row = {"category": "neutral", "near": None, "split": None, "note": "x" * 1000}
    rows = [row | {"request": f"question {i}"} for i in range(10_500)]
    rows.append(row | {"request": "root beer?", "near": "b"})
    found = give("d.jsonl", lines(*rows))
    assert len(found) == 10_501 and found[-1].near == "b"
    mixed = [{"request": "a", "category": "b", "note": n} for n in (None, 1, "x", [{}])]
    mixed = [row | {"request": f"a{i}"} for i, row in enumerate(mixed)]
    assert len(give("d.jsonl", lines(*mixed))) == 4


def test_categories_are_read_without_the_blanks_around_them(give):
    first, second = give("d.csv", "request,category ,near\na, b ,\nc,neutral ,b \n")
    assert (first.category, second.category, second.near) == ("b", NEUTRAL, "b")


# --- Parquet and the hub --------------------------------------------------------------


def labelled(rows, **names):
    data = datasets.Dataset.from_list(rows)
    for column, known in names.items():
        data = data.cast_column(column, datasets.ClassLabel(names=known))
    return data


def test_class_labels_are_read_by_their_names(tmp_path, monkeypatch):
    rows = [row | {"near": row.get("near", "none")} for row in ROWS]
    rows = [row | {"near": None} if row["near"] == "none" else row for row in rows]
    data = labelled(
        rows,
        category=["neutral", "betting", "alcohol"],
        split=["test", "train"],
        near=["alcohol"],
    )
    data.to_parquet(tmp_path / "d.parquet")
    found = reading.read_requests(str(tmp_path / "d.parquet"))
    assert [q.category for q in found] == ["alcohol", "betting", "neutral"]
    assert [q.split for q in found] == ["train", "test", "train"]
    assert [q.near for q in found] == [None, None, "alcohol"]
    hub = {"train": data.to_iterable_dataset()}
    monkeypatch.setattr(datasets, "load_dataset", lambda *name, **more: hub)
    assert reading.read_requests("imdb") == found


def test_dictionary_columns_of_parquet_are_words(tmp_path):
    frame = pandas.DataFrame(ROWS).astype({"category": "category", "split": "category"})
    frame.to_parquet(tmp_path / "D.PARQUET")
    frame[:1].to_parquet(tmp_path / "a[1] *.parquet")  # no pattern of names
    found = reading.read_requests(str(tmp_path / "D.PARQUET"))
    assert [q.category for q in found] == ["alcohol", "betting", "neutral"]
    assert reading.read_requests(str(tmp_path / "a[1] *.parquet")) == found[:1]


def test_csv_parquet_jsonl_and_hub_datasets_are_read_alike(tmp_path, monkeypatch):
    rows = [
        {"text": f'say "{i}", or\nnot', "topic": ("a", "neutral")[i % 2]}
        for i in range(20)
    ]
    frame = pandas.DataFrame(rows)
    frame.to_csv(tmp_path / "d.csv", index=False)
    frame.to_parquet(tmp_path / "d.parquet")
    frame.to_json(tmp_path / "d.jsonl", orient="records", lines=True)
    frame.to_json(tmp_path / "d.json", orient="records")
    found = [
        reading.read_requests(str(tmp_path / name), "text", "topic")
        for name in ("d.csv", "d.parquet", "d.jsonl", "d.json")
    ]
    assert found[0] == found[1] == found[2] == found[3]
    assert found[0][4].prompt == 'say "4", or\nnot'
    hub = {"train": rows[:14], "test": rows[14:]}
    monkeypatch.setattr(datasets, "load_dataset", lambda *name, **more: hub)
    found = reading.read_requests("someone/something", "text", "topic")
    assert [q.split for q in found] == ["train"] * 14 + ["test"] * 6


@pytest.mark.parametrize(
    "path, asked",
    [
        ("imdb", ("imdb", None)),
        ("gpt2-output", ("gpt2-output", None)),
        ("cais/mmlu", ("cais/mmlu", None)),
        ("cais/mmlu:anatomy", ("cais/mmlu", "anatomy")),
        ("wikipedia:20220301.en", ("wikipedia", "20220301.en")),
        ("org/data-v1.5", ("org/data-v1.5", None)),
    ],
)
def test_a_hub_dataset_is_asked_for_by_name_and_config(
    path, asked, tmp_path, monkeypatch
):
    seen = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *a, **b: seen.append(a) or {"train": ROWS}
    )
    assert len(reading.read_requests(path)) == 3 and seen == [asked]


def test_splits_of_the_hub_that_are_no_splits_here_are_left_out_and_told(
    monkeypatch, capsys
):
    hub = {"train": ROWS[:1], "valid": ROWS[1:2], "unsupervised": [{"request": "x"}]}
    monkeypatch.setattr(datasets, "load_dataset", lambda *name, **more: hub)
    found = reading.read_requests("imdb")
    assert [q.split for q in found] == ["train", "validation"]
    assert capsys.readouterr().out.count("split unsupervised is left out") == 1


def test_a_hub_dataset_that_needs_a_config_lists_them_in_one_line(monkeypatch):
    def load(*name, **more):
        raise ValueError("Config name is missing.\nPlease pick one:\n['a', 'b']")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(ValueError) as refused:
        reading.read_requests("cais/mmlu")
    said = str(refused.value)
    assert "cais/mmlu:CONFIG" in said and "['a', 'b']" in said and "\n" not in said


@pytest.mark.parametrize(
    "path, expected",
    [
        ("none.csv", "none.csv: no such file"),
        ("NONE.JSONL", "no such file"),
        ("data/none.parquet", "no such file"),
        ("notes.txt", "no such file"),
        ("data/mine.xlsx", "no such file"),
        ("./mine", "no such file"),
        ("/tmp/none/mine", "no such file"),
        ("~/mine", "no such file"),
        ("a/b/c", "no such file"),
        ("C:\\data\\mine", "no such file"),
        ("data\\mine.csv", "no such file"),
        ("https://a.example/mine", "no such file"),
        ("", "no such file"),
        ("folder", "folder: a folder; name a file, or a dataset of the hub"),
        ("folder:config", "no such file"),
        ("d.txt", "d.txt: unknown kind of file; known are .jsonl, "),
        ("d.csv.gz", "unknown kind of file"),
        ("plain", "unknown kind of file"),
        ("d.parquet", "d.parquet cannot be read"),
    ],
)
def test_a_path_is_never_taken_for_a_dataset_of_the_hub(
    path, expected, tmp_path, monkeypatch
):
    real = datasets.load_dataset

    def load(kind, *more, **options):
        assert kind == "parquet", "asked the hub"
        return real(kind, *more, **options)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for name in ("d.txt", "d.csv.gz", "plain", "d.parquet"):
        (tmp_path / name).write_text(lines(*ROWS), encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(expected)) as refused:
        reading.read_requests(path)
    assert "\n" not in str(refused.value)


def test_what_the_hub_cannot_give_is_told_in_one_line():
    with pytest.raises(ValueError, match="^no/such cannot be read"):
        reading.read_requests("no/such")


# --- Chat messages --------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("column", ["messages", "request", "prompt"])
def test_a_request_may_be_a_list_of_chat_messages(tmp_path, ending, column):
    talks = [[ASKED], [SYSTEM, ASKED], [ASKED, ANSWER, {**ASKED, "content": "And?"}]]
    rows = [{column: talk, "category": "alcohol", "split": "train"} for talk in talks]
    path = tmp_path / f"d.{ending}"
    if ending == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text(json.dumps(rows) if ending == "json" else lines(*rows))
    columns = ("prompt",) if column == "prompt" else ()
    assert [q.prompt for q in reading.read_requests(str(path), *columns)] == talks


def test_a_request_column_goes_before_messages(give):
    rows = [row | {"messages": [ASKED]} for row in ROWS]
    assert [q.prompt for q in give("d.jsonl", lines(*rows))] == [
        row["request"] for row in ROWS
    ]


def test_an_answer_at_the_end_of_messages_is_left_out(give):
    ends = [{**ANSWER, "name": "bot"}, {**ANSWER, "content": "Vermouth."}]
    rows = [{"messages": [SYSTEM, ASKED, e], "category": "alcohol"} for e in ends]
    found = give("d.jsonl", lines(*rows))
    assert [q.prompt for q in found] == [[SYSTEM, ASKED]]  # one request, twice


def test_one_message_is_the_same_request_as_its_text(give):
    rows = [{"request": f"q {i}", "category": "b"} for i in range(30)]
    as_messages = [
        row | {"request": [{"role": "user", "content": row["request"]}]} for row in rows
    ]
    plain, chat = give("d.jsonl", lines(*rows)), give("e.jsonl", lines(*as_messages))
    assert [q.split for q in plain] == [q.split for q in chat]
    with pytest.raises(ValueError, match=r":2: the request of .*:1 again"):
        give("d.jsonl", lines(rows[0], as_messages[0] | {"category": "neutral"}))


# --- Splits, repeats, spellings -------------------------------------------------------


def test_without_splits_a_hash_of_the_text_divides_a_growing_table_alike(give):
    rows = [{"request": f"question {i}", "category": "b"} for i in range(400)]
    found = give("d.jsonl", lines(*rows))
    counts = Counter(q.split for q in found)
    assert {k: round(v / 400, 1) for k, v in counts.items()} == {
        "train": 0.6,
        "validation": 0.2,
        "test": 0.2,
    }
    first = ["train", "validation", "train", "test", "train", "test"]  # of crc32
    assert [q.split for q in found[:6]] == first
    again = [row | {"request": f" {row['request'].upper()}"} for row in rows[::-3]]
    again = give("e.jsonl", lines(*again))
    assert [q.split for q in again] == [q.split for q in found[::-3]]


def test_common_names_of_splits_are_known(give):
    names = ["train", "val", "valid", "dev", "validation", "test", " test "]
    rows = [
        {"request": f"a{i}", "category": "b", "split": s} for i, s in enumerate(names)
    ]
    assert [q.split for q in give("d.jsonl", lines(*rows))] == [
        "train", *["validation"] * 4, "test", "test"
    ]


def test_exact_repeats_are_taken_once_and_told_once(give, capsys):
    again = ROWS[0] | {"request": " NEGRONI? "}
    found = give("d.jsonl", lines(*ROWS, again, ROWS[2], ROWS[0]))
    assert [q.prompt for q in found] == [row["request"] for row in ROWS]
    told = capsys.readouterr().out
    assert told.count("\n") == 1 and "merged: 3" in told
    give("e.jsonl", lines(*ROWS))
    assert capsys.readouterr().out == ""


# --- What is refused ------------------------------------------------------------------

A = '{"request": "a", "category": "b", "split": "train"}\n'
N = '{"request": "a", "category": "neutral", "near": ?}'
WRONG = [  # (file, its text, pattern of the line)
    # CSV
    ("d.csv", "request,category\nHi, Negroni?,alcohol\n", ':2: 3 cells, .*"quotes"'),
    ("d.csv", "request,category\na,b\nc,b,d,e\n", ":3: 4 cells, but 2 columns"),
    ("d.csv", "request,category\na,b,\nc,b,\n", ":2: 3 cells, but 2 columns"),
    ("d.csv", "request,category\na,b\nc\n", ":3: category is ''"),
    ("d.csv", "request,category,split\na,b,test\nc,b\n", "fill it in every row"),
    ("d.csv", "request,category\n\n\na,b,c\n", ":4: 3 cells"),
    ("d.csv", 'request,category\n"a\nb\nc",d\n\n"e\nf",\n', ":6: category is ''"),
    ("d.csv", 'request,category\n"a\nb",d\nc,d,e\n', ":4: 3 cells"),
    ("d.csv", 'request,category\na,b\n"c,b\nd,b\n', r':3: .*"quotes"'),
    ("d.csv", 'request,category\na,b\n"c" d,b\n', r':3: .*write "" for each'),
    ("d.csv", "request;category\na;b;c\n", ":2: 3 cells.*';'"),
    ("d.tsv", "request\tcategory\na\tb\tc\n", ":2: 3 cells"),
    ("d.tsv", "request,category\na,b\n", "no column 'request', only request,category"),
    ("d.csv", "request,category,category\na,b,c\n", ":1: .*'category' is there"),
    ("d.csv", "request,near, near\na,b,c\n", ":1: column 'near' is there twice"),
    ("d.csv", "a,b\nc,b\n", "no column 'request', only a, b; name yours with"),
    ("d.csv", "request,category\na,b,\ud800".encode("utf-8", "replace"), ":2: 3 cells"),
    ("d.csv", b"request,category\na,b\ncaf\xe9,b\n", ":3: not in UTF-8; save"),
    ("d.csv", "request,category\na,b\n".encode("utf-16"), ":1: not in UTF-8; save"),
    ("d.csv", "", "no rows to read"),
    ("d.csv", "request,category\n", "no rows to read"),
    ("d.csv", "request,category,Split\na,b,test\n", "column 'Split'; write 'split'"),
    ("d.csv", "request,category,split\na,b,dove\n", ":2: split is 'dove'; it must be"),
    ("d.csv", "request,category\na,\n", ":2: category is ''"),
    ("d.csv", "request,category\na,3\n", ":2: category is '3'.* in words"),
    ("d.csv", "request,category\na,-1.0\n", ":2: category is '-1.0'.* in words"),
    ("d.csv", "messages,category\n\"[{'role': 'user'}]\",b\n", "which CSV cannot hold"),
    ("d.csv", "request,category\n\" [{'from': 'me'}]\",b\n", "which CSV cannot hold"),
    ("d.csv", "request,category\na,b\nrequest, category\n", ":3: the header again"),
    ("d.csv", "request,category\na,b\n\ufeffrequest,category\n", ":3: the header ag"),
    # JSON
    ("d.jsonl", "", "no rows to read"),
    ("d.jsonl", " \n\n", "no rows to read"),
    ("d.json", "[]", "no rows to read"),
    ("d.jsonl", A + "\n\n{oops\n", ":4: not JSON"),
    ("d.jsonl", A.strip() + A, ":1: not JSON .Extra data"),
    ("d.jsonl", A.encode() + b'{"request": "\xff"}', ":2: not in UTF-8"),
    ("d.jsonl", "null\n", ":1: not an object with fields"),
    ("d.jsonl", '"hello"\n', ":1: not an object with fields"),
    ("d.jsonl", A + "7\n", ":2: not an object with fields"),
    ("d.jsonl", A + "{}\n", ":2: not an object with fields"),
    ("d.jsonl", f"[{A.strip()}]\n", ":1: not an object with fields"),
    ("d.jsonl", f"[\n{A}]\n", ":1: not JSON"),
    ("d.jsonl", "[" * 100_000, ":1: not JSON"),
    ("d.json", f"[{A},\n{A}\n", ":3: not JSON"),
    ("d.json", f"[{A}, 7]", " row 2: not an object"),
    ("d.json", '{\n"data": []}', ":1: not JSON .*all of a .json a list"),
    ("d.jsonl", A.replace("split", "category"), ":1: .*'category' is there twice"),
    ("d.jsonl", A + '{"category": "b", "split": "test"}\n', ":2: no column 'requ"),
    ("d.jsonl", A.replace('"a"', "null"), ":1: request is None"),
    ("d.jsonl", A.replace('"a"', "7"), ":1: request is 7"),
    ("d.jsonl", A.replace('"a"', '" "'), ":1: request is ' '; it must be some text"),
    ("d.jsonl", A.replace('"a"', '"\\ud800"'), ":1: .*surrogates"),
    ("d.jsonl", A.replace('"b"', '""'), ":1: category is ''"),
    ("d.jsonl", A.replace('"b"', "null"), ":1: category is None"),
    ("d.jsonl", A.replace('"b"', '["b"]'), r":1: category is \['b'\]"),
    ("d.jsonl", A.replace('"b"', "3"), ":1: category is 3; .* in words"),
    ("d.jsonl", A.replace('"b"', "true"), ":1: category is True; .* in words"),
    ("d.jsonl", A.replace("train", "Train"), ":1: split is 'Train'; it must be train"),
    ("d.jsonl", A.replace('"train"', "1"), ":1: split is 1; it must be"),
    ("d.jsonl", A.replace('"train"', "0"), ":1: split is 0; it must be"),
    ("d.jsonl", A.replace('"train"', '["train"]'), r":1: split is \['train'\]"),
    # neutral and near
    ("d.jsonl", A.replace('"b"', '"Neutral "'), ":1: .*'Neutral'; write neutral"),
    ("d.jsonl", A.replace('"b"', '"b", "near": "b"'), ":1: near is 'b'; only neutral"),
    ("d.jsonl", N.replace("?", '"neutral"'), ":1: near is 'neutral'"),
    ("d.jsonl", N.replace("?", "7"), ":1: near is 7; only"),
    ("d.jsonl", N.replace("?", "NaN"), ":1: near is nan; only"),
    # splits, repeats, spellings
    ("d.jsonl", A + '{"request": "c", "category": "b"}', ":2: split is None.*:1; "),
    ("d.csv", "request,category,split\na,b,\nc,b,test\n", ":3: split is 'test'"),
    (
        "d.jsonl",
        A + "\n" + A.replace("train", "test").replace('"a"', '" A"'),
        ":3: the request of .*d.jsonl:1 again, with another split",
    ),
    ("d.jsonl", A + A.replace('"b"', '"c"'), ":2: .*:1 again, with another"),
    ("d.csv", "request,category\na,b\nA ,c\n", ":3: .*:2 again, with another"),
    (
        "d.csv",
        "request,category,near\na,neutral,b\na,neutral,\n",
        ":3: the request of .*d.csv:2 again, with another near",
    ),
    ("d.csv", "request,category\na,Wine\nb,wine\n", ":3: .*'wine', but 'Wine' in "),
    ("d.csv", "request,category\na,self-harm\nb,Self Harm\n", ":3: .*choose one"),
    ("d.csv", "request,category\na,wine\nb,wine\u200b\n", ":3: .*choose one"),
    ("d.csv", "request,category\na,caf\u00e9\nb,cafe\u0301\n", ":3: .*choose one"),
    ("d.csv", "request,category,near\na,b,\nc,neutral,B\n", ":3: .*'B', but 'b'"),
    # messages
    ("d.jsonl", said([]), ":1: request must end with some text of the user's"),
    ("d.jsonl", said([SYSTEM]), ":1: request must end with"),
    ("d.jsonl", said([ANSWER]), ":1: request must end with"),
    ("d.jsonl", said([ASKED, ANSWER, ANSWER]), ":1: request must end with"),
    ("d.jsonl", said([ASKED, SYSTEM]), ":1: request must end with"),
    ("d.jsonl", said([ASKED | {"content": " "}]), ":1: request must end with"),
    ("d.jsonl", said([{"role": "user"}]), ":1: request holds .* a message is like"),
    ("d.jsonl", said([{"content": "a"}]), ":1: request holds"),
    ("d.jsonl", said([ASKED | {"content": None}]), ":1: request holds"),
    ("d.jsonl", said([ASKED | {"content": [{"text": "a"}]}]), ":1: request holds"),
    ("d.jsonl", said([ASKED | {"role": "human"}]), ":1: .*one of system, user, assist"),
    ("d.jsonl", said([ASKED | {"role": ["user"]}]), ":1: request holds"),
    ("d.jsonl", said(["a"]), ":1: request holds 'a'"),
    ("d.jsonl", said([ASKED]) + said([{"from": "human", "value": "a"}]), ":2: requ"),
    ("d.jsonl", said(ASKED), ":1: request is {'role'"),
    ("d.jsonl", lines({"messages": [], "category": "b"}), ":1: messages must end with"),
    ("d.jsonl", said(json.dumps([ASKED])), ":1: request is .*a list of messages"),
]


@pytest.mark.parametrize("name, text, pattern", WRONG)
def test_what_cannot_be_read_as_it_looks_is_refused_by_line(give, name, text, pattern):
    with pytest.raises(ValueError) as refused:
        give(name, text)
    message = str(refused.value)
    assert re.search(re.escape(name) + ".*" + pattern, message), message
    assert "\n" not in message and len(message) < 500


def test_numbers_that_no_class_label_names_are_refused_by_row(tmp_path):
    rows = [{"request": "a", "category": 1}, {"request": "b", "category": -1}]
    path = str(tmp_path / "d.parquet")
    datasets.Dataset.from_list(rows).to_parquet(path)
    with pytest.raises(ValueError, match="d.parquet row 1: category is 1; .* in words"):
        reading.read_requests(path)
    labelled(rows, category=["x", "y"]).to_parquet(path)
    with pytest.raises(ValueError, match="row 2: category is -1; .* in words"):
        reading.read_requests(path)
