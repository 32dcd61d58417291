"""What a pipeline reads: expectations as JUnit XML, the result as a Markdown page."""

import re
import xml.etree.ElementTree as ET
from typing import Any

from lrcompress.recipe import Recipe
from lrcompress.report.measured import metric_rows, table_cell
from lrcompress.report.summary import answer

NO_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that no XML 1.0 document may hold."""


def junit_xml(report: dict[str, Any]) -> str:
    """One test case per expectation; a missed one is a failure that says by how much."""
    evaluation = report.get("evaluation") or {"expectations": [], "seconds": {}}
    entries = evaluation["expectations"]
    failures = sum(not entry["met"] for entry in entries)
    suite = ET.Element(
        "testsuite", name=_xml(f"lrcompress {report['model']} {report['method']}"), tests=str(len(entries)),
        failures=str(failures), errors="0", skipped="0", time=f"{sum(evaluation['seconds'].values()):.1f}",
    )  # fmt: skip
    for entry in entries:
        case = ET.SubElement(suite, "testcase", classname="expectation", name=_xml(entry["expression"]))
        if not entry["met"]:
            ET.SubElement(case, "failure", message=f"value {entry['value']:.6g}, limit {entry['limit']:.6g}")
    return _document(suite)


def failed_junit_xml(recipe: Recipe, error: Exception) -> str:
    """Of a run that an error ended: the run is a test case with that error, the expectations are skipped."""
    skipped = len(recipe.expect)
    suite = ET.Element(
        "testsuite", name=_xml(f"lrcompress {recipe.model} {recipe.method.name}"), tests=str(1 + skipped),
        failures="0", errors="1", skipped=str(skipped), time="0",
    )  # fmt: skip
    case = ET.SubElement(suite, "testcase", classname="run", name="run")
    ET.SubElement(case, "error", type=type(error).__name__, message=_xml(str(error)))
    for expression in recipe.expect:
        case = ET.SubElement(suite, "testcase", classname="expectation", name=_xml(expression))
        ET.SubElement(case, "skipped", message="the run ended before it was judged")
    return _document(suite)


def failed_summary(recipe: Recipe, error: Exception) -> str:
    """The Markdown page of a run that an error ended."""
    said = " ".join(str(error).split()) or type(error).__name__
    return f"## {recipe.model} compressed by {recipe.method.name}\n\n**The run failed:** {said}\n"


def _xml(text: str) -> str:
    return NO_XML.sub("\ufffd", text)


def _document(suite: ET.Element) -> str:
    root = ET.Element("testsuites")
    root.append(suite)
    ET.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def markdown_summary(report: dict[str, Any]) -> str:
    """What was removed, what it cost, which expectations were met."""
    ratio, size = report["ratio"], report["bytes"]
    lines = [
        f"## {report['model']} compressed by {report['method']}",
        "",
        f"{ratio['stored']:.2%} of the targets' bytes removed, {ratio['whole_model']:.2%} of the whole model; "
        f"checkpoint {size['checkpoint'] / 1e6:.1f} MB; {report['seconds']['total']:.0f} s.",
        "",
    ]
    if said := answer(report, report["recipe"]):
        lines += [said[0].upper() + said[1:] + ".", ""]
    evaluation = report.get("evaluation")
    if evaluation:
        lines += metric_rows(evaluation)
        lines += ["", "| expectation | value | limit | |", "|---|---|---|---|"]
        for entry in evaluation["expectations"]:
            mark = "met" if entry["met"] else "**missed**"
            expression = table_cell(entry["expression"])
            lines.append(f"| `{expression}` | {entry['value']:.6g} | {entry['limit']:.6g} | {mark} |")
    lines += [f"\nwarning: {text}" for text in report["warnings"]]
    return "\n".join(lines) + "\n"
