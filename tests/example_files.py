"""Miniatures of the files of other tasks, as they are published; the values are ours."""

import json

from list_files import picture, write

TEN = ["red"] * 6 + ["dark red"] * 3 + ["2"]
QUESTIONS = {  # VQA's own
    "info": {"year": 2017},
    "data_type": "mscoco",
    "data_subtype": "val2014",
    "questions": [
        {"image_id": 42, "question": "What colour is it?", "question_id": 420000},
        {"image_id": 42, "question": "How many?", "question_id": 420001},
        {"image_id": 73, "question": "Is it new?", "question_id": 730000},
    ],
}
ANNOTATIONS = {
    "info": {"year": 2017},
    "data_subtype": "val2014",
    "annotations": [
        {
            "question_type": "how many",
            "multiple_choice_answer": "2",
            "answers": [
                {"answer": answer, "answer_confidence": "yes", "answer_id": number}
                for number, answer in enumerate(answers, 1)
            ],
            "image_id": key // 10000,
            "answer_type": "other",
            "question_id": key,
        }
        for key, answers in ((420001, ["2"] * 10), (420000, TEN))
    ],
}
ALBEF_QUESTIONS = [
    {"dataset": "vqa", "image": "val2014/a.jpg", "question": "What colour?", "question_id": 7}
    | {"answer": TEN},
    {"dataset": "vg", "image": "b.jpg", "question": "Where is it?", "question_id": "8"}
    | {"answer": "on a table"},
]
SENTENCES = [  # NLVR2's own, one a line
    {"sentence": "There are two cups.", "label": "True", "identifier": "train-10-0-0"}
    | {"directory": 53, "synset": "cup", "left_url": "https://a.org/1.jpg"},
    {"sentence": "One cup is red.", "label": "False", "identifier": "train-10-1-1"}
    | {"directory": 53},
    {"sentence": "There are two cups.", "label": "False", "identifier": "train-10-1-0"}
    | {"directory": 53},
]
ALBEF_SENTENCES = [
    {"sentence": row["sentence"], "label": row["label"]}
    | {"images": [f"images/train/53/train-10-{pair}-img{side}.png" for side in (0, 1)]}
    for row, pair in zip(SENTENCES, (0, 1, 1), strict=True)
]
STATEMENTS = [  # SNLI-VE's own, one a line, in both spellings
    {"annotator_labels": ["neutral"], "captionID": "123.jpg#0", "gold_label": "neutral"}
    | {"pairID": "123.jpg#0r1n", "Flikr30kID": "123.jpg"}
    | {"sentence1": "A man.", "sentence2": "A tall man."},
    {"gold_label": "entailment", "pairID": "45.jpg#1r1e", "Flickr30K_ID": "45"}
    | {"sentence2": "A woman."},
    {"gold_label": "-", "pairID": "45.jpg#1r1c", "Flickr30K_ID": 45, "sentence2": "A cat."},
]
ALBEF_STATEMENTS = [
    {"image": "123", "sentence": "A tall man.", "label": "contradiction"},
    {"image": 45, "sentence": "A woman.", "label": 2},
]
EXPRESSIONS = [
    {"image": "COCO_train2014_000000000009.jpg", "text": "left cup", "ref_id": 3}
    | {"bbox": [1, 2.5, 10, 8]},
    {"image": "COCO_train2014_000000000009.jpg", "text": "the cup on the left", "ref_id": "3"}
    | {"box": [1, 2.5, 10, 8]},
    {"image": "COCO_train2014_000000000030.jpg", "text": "red one", "ref_id": 4},
]
DETECTIONS = {"3": [[0, 0, 5, 5], [4, 4, 10.5, 3]], "4": [], "9": [[7, 7, 7, 7]]}
BY_IMAGE = {"9": DETECTIONS["3"], "30": [[2, 2, 2, 2]], "4": [[9, 9, 1, 1]]}


def lines(rows):
    return "\n".join(map(json.dumps, rows)) + "\n"


def write_pictures(folder, names):
    """Different JPEGs of these names, whatever their endings."""
    for number, name in enumerate(names):
        write(folder / name, picture(number))


def write_all(folder):
    """A file of each format in the folder, with the pictures of all; {kind: sources}."""
    write(folder / "questions.json", QUESTIONS)
    write(folder / "annotations.json", ANNOTATIONS)
    write(folder / "albef_vqa.json", ALBEF_QUESTIONS)
    write(folder / "nlvr2.json", lines(SENTENCES))
    write(folder / "albef_nlvr2.json", ALBEF_SENTENCES)
    write(folder / "snli_ve.jsonl", lines(STATEMENTS))
    write(folder / "albef_ve.json", ALBEF_STATEMENTS)
    write(folder / "refs.json", EXPRESSIONS)
    write(folder / "dets.json", DETECTIONS)
    nlvr2 = [f"images/train/53/train-10-{pair}-img{side}.png" for pair in (0, 1) for side in (0, 1)]
    coco = [f"val2014/COCO_val2014_0000000000{number}.jpg" for number in (42, 73)]
    refs = [f"COCO_train2014_0000000000{number}.jpg" for number in ("09", "30")]
    write_pictures(folder, ["val2014/a.jpg", "b.jpg", *coco, *nlvr2, "123.jpg", "45.jpg", *refs])
    write_pictures(folder / "classes", ["red_cup/1.png", "red_cup/deep/2.jpg", "plate/1.JPEG"])
    return {
        "questions": [
            f"vqa:{folder}/questions.json?annotations={folder}/annotations.json",
            f"vqa:{folder}/albef_vqa.json",
        ],
        "comparisons": [f"nlvr2:{folder}/nlvr2.json", f"nlvr2:{folder}/albef_nlvr2.json"],
        "statements": [f"entailment:{folder}/snli_ve.jsonl", f"entailment:{folder}/albef_ve.json"],
        "expressions": [f"grounding:{folder}/refs.json?detections={folder}/dets.json"],
        "labels": [f"folders:{folder}/classes"],
    }


def write_karpathy(folder):
    """Karpathy's splits of COCO with two captions a picture; their source."""
    names = [f"COCO_val2014_{number:012}.jpg" for number in range(8)]
    splits = ["train"] * 3 + ["restval"] + ["val"] * 2 + ["test"] * 2
    images = [
        {"filepath": "val2014", "filename": name, "split": split, "imgid": at, "cocoid": 7 * at}
        | {"sentences": [{"raw": f"one cup {at}"}, {"raw": f"two cups {at}"}]}
        for at, (name, split) in enumerate(zip(names, splits, strict=True))
    ]
    write(folder / "dataset_coco.json", {"images": images, "dataset": "coco"})
    write_pictures(folder / "val2014", names)
    return f"karpathy:{folder}/dataset_coco.json?image_root={folder}"
