"""lrcompress run"""

from pathlib import Path
from typing import Annotated

import typer

from lrcompress.cli import options as o


def run(
    recipe: Annotated[
        str | None, typer.Argument(help="A YAML file, or the name of a shipped recipe.", show_default=False)
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key, such as ratio=0.3 or method.metric=plain."),
    ] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Output folder instead of the recipe's.")] = None,
    overwrite: o.Overwrite = False,
    resume: o.Resume = False,
    junit: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the expectations as JUnit XML for a pipeline.")
    ] = None,
    summary: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a Markdown summary for a pipeline's page.")
    ] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the recipe's JSON schema and exit.")] = False,
    cache: o.Cache = None,
    json_file: o.Json = None,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Compress, evaluate and check, as a recipe says."""
    from lrcompress.errors import InputError, LrcompressError
    from lrcompress.recipe import Recipe, load_recipe

    if schema:
        import json

        typer.echo(json.dumps(Recipe.model_json_schema(), indent=2))
        return
    if recipe is None:
        raise InputError("no recipe given: name a YAML file or a shipped recipe, such as quickstart")
    loaded = load_recipe(recipe, [*(settings or []), *([f"output={output}"] if output else [])])
    from lrcompress.cli.show import quiet_libraries, show_evaluation, show_report
    from lrcompress.parallel.processes import processes, several
    from lrcompress.report.ci import failed_junit_xml, failed_summary, junit_xml, markdown_summary
    from lrcompress.report.progress import Reporter
    from lrcompress.run import check_run, run_request
    from lrcompress.stages.naming import output_folder

    quiet_libraries()
    for path, option in ((junit, "--junit"), (summary, "--summary"), (json_file, "--json")):
        o.check_result(path, output_folder(loaded), option)
    request = check_run(loaded)
    try:
        result = run_request(
            request, overwrite=overwrite, resume=resume, reporter=Reporter(quiet=quiet, verbose=verbose)
        )
    except Exception as error:
        failed = ((junit, "--junit", failed_junit_xml), (summary, "--summary", failed_summary))
        for path, option, text in failed:
            echo = several() and not isinstance(error, LrcompressError)  # of another process's end, likely
            if path is not None and path.absolute().parent.is_dir() and not (echo and path.exists()):
                o.write_text(path, option, text(loaded, error))
        raise
    if not processes().first:
        return
    show_report(result.report, result.folder, quiet=quiet)
    evaluation = result.report.get("evaluation")
    if evaluation is not None:
        show_evaluation(evaluation, quiet=quiet)
    o.write_result(json_file, result.report)
    if junit is not None:
        o.write_text(junit, "--junit", junit_xml(result.report))
    if summary is not None:
        o.write_text(summary, "--summary", markdown_summary(result.report))
    if evaluation is not None:
        o.exit_unless_met(evaluation["expectations"])
