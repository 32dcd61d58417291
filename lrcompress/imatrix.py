"""lrcompress calibrate --imatrix: how large the inputs of every weight are on a text, for llama-quantize."""

import tempfile
from dataclasses import replace
from pathlib import Path

from lrcompress.foreign.converter import converter_command, find_rows
from lrcompress.ggml.imatrix import Importance, write_imatrix
from lrcompress.parallel.processes import refuse_several
from lrcompress.recipe import Recipe
from lrcompress.report.progress import Reporter
from lrcompress.stages.block_types import dense_weights
from lrcompress.stages.in_words import errors_in_words
from lrcompress.stages.opening import open_request
from lrcompress.stages.profile import HiddenWalk
from lrcompress.stages.request import check_request


def calibrate_imatrix(recipe: Recipe, output: Path, *, reporter: Reporter | None = None) -> int:
    """Write the importance matrix of the recipe's model on its calibration text; how many tensors it has.

    Every token counts once, as llama-imatrix has it. The recipe's method is ggml, with metric=input and sink_share=0.
    """
    reporter = reporter or Reporter(quiet=True)
    refuse_several("an imatrix")
    request = check_request(recipe)
    command = converter_command(None if recipe.converter is None else Path(recipe.converter))
    in_words = errors_in_words(request.device, "nothing was left behind, run it again")
    with tempfile.TemporaryDirectory(prefix="lrcompress-imatrix-") as folder, in_words:
        scratch = Path(folder)
        opened = open_request(request, reporter)
        code = recipe.trust_remote_code
        names = find_rows(command, opened.model.folder, dense_weights(opened), scratch, code=code, label=recipe.model)
        tensors = {site: tensor for tensor, rows in names.rows.items() for site in set(rows.site)}
        walk, found = HiddenWalk(opened, scratch / "hidden", hold_out=False), dict[str, Importance]()
        first, blocks = walk.start(0), len(opened.blocks)
        with reporter.phase("calibrate", blocks * len(walk)) as tick:
            for block in range(first, blocks):
                with opened.walker.block(block) as module:
                    sites = [replace(site, by_outputs=False) for site in opened.sites_of(block)]
                    statistics = walk.step(block, module, sites, tick)
                for site in sites:
                    gathered = statistics.get(site.name, statistics.get(site.group))
                    if gathered is not None and site.name in tensors:
                        squares, rows = (
                            gathered.second.diagonal().float().cpu(),
                            gathered.total.new_tensor([gathered.count]),
                        )
                        found[tensors[site.name]] = Importance(squares[None], rows.float().cpu())
                walk.drop(block - 1)
        assert opened.calibration is not None
        write_imatrix(scratch / output.name, found, [s.source for s in recipe.calibration], opened.calibration.length)
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = output.with_name(f".{output.name}.partial")
        partial.write_bytes((scratch / output.name).read_bytes())
        partial.replace(output)
    return len(found)
