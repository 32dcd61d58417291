"""What a pipeline reads stays well-formed whatever the names are."""

import xml.etree.ElementTree as ET

from lrcompress.recipe import make_recipe
from lrcompress.report.ci import failed_junit_xml, failed_summary, junit_xml, markdown_summary
from lrcompress.report.measured import metric_rows

TASK = "tokens:a|b\x07\ud800\nc.txt@8"
REPORT = {
    "model": "m\x00|odel", "method": "lord", "recipe": {}, "warnings": [], "seconds": {"total": 1.0},
    "ratio": {"stored": 0.2, "whole_model": 0.1}, "bytes": {"checkpoint": 10},
    "evaluation": {
        "results": {TASK: {"token_perplexity": 3.0}}, "against": None, "seconds": {"model": 1.0},
        "expectations": [{"expression": f"{TASK}:token_perplexity <= 2", "value": 3.0, "limit": 2.0, "met": False}],
    },
}  # fmt: skip


def columns(row):
    return row.replace("\\|", "").count("|") - 1


def test_junit_is_xml():
    suite = ET.fromstring(junit_xml(REPORT)).find("testsuite")
    assert suite.find("testcase").get("name") == "tokens:a|b\ufffd\ufffd\nc.txt@8:token_perplexity <= 2"
    assert suite.get("name") == "lrcompress m\ufffd|odel lord"


def test_cells_of_a_table_stay_cells():
    assert [columns(row) for row in metric_rows(REPORT["evaluation"])] == [5, 5, 5]
    gates = markdown_summary(REPORT).split("| expectation |")[1].splitlines()
    assert [columns(row) for row in gates[1:] if row] == [4, 4]


def test_how_much_was_measured_stands_beside_the_task():
    evaluation = {
        "results": {"tokens:a.txt@8": {"token_perplexity": 3.0, "blocks": 4}, "quiz": {"acc": 0.5, "samples": 1}, "open": {"acc": 0.5}},
        "against": None,
    }  # fmt: skip
    assert [row.split("|")[1].strip() for row in metric_rows(evaluation)[2:]] == [
        "tokens:a.txt@8 (4 blocks)", "quiz (1 sample)", "open"
    ]  # fmt: skip


def test_a_failure_in_words():
    recipe = make_recipe({"model": "m", "method": "lord", "ratio": 0.2, "expect": ["kl <= 1", "bytes < 2MB"]})
    suite = ET.fromstring(failed_junit_xml(recipe, ValueError("no \x1b[31m luck"))).find("testsuite")
    assert suite.find("testcase/error").attrib == {"type": "ValueError", "message": "no \ufffd[31m luck"}
    assert len(suite.findall("testcase/skipped")) == 2
    assert "no luck" in failed_summary(recipe, ValueError("no\nluck"))
