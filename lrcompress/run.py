"""A recipe run to its end: compressed, evaluated, its expectations judged."""

from lrcompress.checkpoint.folder import read_config_file
from lrcompress.errors import InputError
from lrcompress.evaluation.compare import check_chat_template, check_expectations, evaluate
from lrcompress.evaluation.gates import parse_expectation
from lrcompress.evaluation.tasks import parse_tasks
from lrcompress.foreign.opening import open_model
from lrcompress.pipeline import Result, compress_request
from lrcompress.processes import processes
from lrcompress.recipe import Recipe
from lrcompress.report.card import write_card
from lrcompress.report.progress import Reporter
from lrcompress.stages.request import Request, check_request
from lrcompress.stages.workspace import write_json


def check_run(recipe: Recipe) -> Request:
    """Its names looked up; InputError for all that can be seen to be wrong before its model is loaded."""
    expectations = [parse_expectation(text) for text in recipe.expect]
    spec = recipe.evaluate
    request = check_request(recipe)
    if spec is None:
        if expectations:
            raise InputError("the recipe expects something but evaluates nothing: add evaluate: {tasks: [...]}")
        return request
    tasks = parse_tasks(spec.tasks)
    other = recipe.model if spec.against in (None, "dense") else spec.against
    if other != recipe.model:
        read_config_file(open_model(other).folder)
    check_chat_template(spec, [recipe.model, other], trust_remote_code=recipe.trust_remote_code)
    check_expectations(expectations, tasks, ("bytes", "stored_ratio", "bpw"), compared=spec.against is not None)
    return request


def run_recipe(
    recipe: Recipe, *, overwrite: bool = False, resume: bool = False, reporter: Reporter | None = None
) -> Result:
    """Compress, evaluate what was written, judge the expectations; the report holds them under `evaluation`.

    Of several processes the first one evaluates, and its result alone holds an evaluation.
    """
    return run_request(check_run(recipe), overwrite=overwrite, resume=resume, reporter=reporter)


def run_request(
    request: Request, *, overwrite: bool = False, resume: bool = False, reporter: Reporter | None = None
) -> Result:
    """`run_recipe` of a recipe that `check_run` has found nothing wrong with."""
    recipe, spec = request.recipe, request.recipe.evaluate
    result = compress_request(request, overwrite=overwrite, resume=resume, reporter=reporter)
    if spec is None or not processes().first:
        return result
    if spec.against == "dense":
        spec = spec.model_copy(update={"against": recipe.model})
    evaluation = evaluate(
        str(result.folder), spec, recipe.expect,
        device=recipe.device, trust_remote_code=recipe.trust_remote_code, reporter=reporter,
    )  # fmt: skip
    result.report["evaluation"] = evaluation
    write_json(result.folder / "report.json", result.report)
    write_card(result.folder, result.report, recipe)
    return result
