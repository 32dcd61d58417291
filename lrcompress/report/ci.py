"""What a pipeline reads: expectations as JUnit XML, the result as a Markdown page."""

import xml.etree.ElementTree as ET
from typing import Any

from lrcompress.report.summary import answer, metric_rows


def junit_xml(report: dict[str, Any]) -> str:
    """One test case per expectation; a missed one is a failure that says by how much."""
    evaluation = report.get("evaluation") or {"expectations": [], "seconds": {}}
    entries = evaluation["expectations"]
    failures = sum(not entry["met"] for entry in entries)
    seconds = f"{sum(evaluation['seconds'].values()):.1f}"
    suite = ET.Element(
        "testsuite", name=f"lrcompress {report['model']} {report['method']}", tests=str(len(entries)),
        failures=str(failures), errors="0", skipped="0", time=seconds,
    )  # fmt: skip
    for entry in entries:
        case = ET.SubElement(suite, "testcase", classname="expectation", name=entry["expression"])
        if not entry["met"]:
            ET.SubElement(case, "failure", message=f"value {entry['value']:.6g}, limit {entry['limit']:.6g}")
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
            lines.append(f"| `{entry['expression']}` | {entry['value']:.6g} | {entry['limit']:.6g} | {mark} |")
    lines += [f"\nwarning: {text}" for text in report["warnings"]]
    return "\n".join(lines) + "\n"
