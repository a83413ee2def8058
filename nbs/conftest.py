"""How `pytest nbs --nbval` re-runs the notebooks and compares what they show with what
is stored.

Text is compared exactly. nbval needs these corrections to do so with notebooks that
nbdev keeps clean:

- cleaning drops the execution counts, without which nbval compares nothing;
- `#| eval: false` cells are not run;
- a `;` at the end of a cell hides its value, as it does in Jupyter;
- progress bars and warnings on stderr are no output;
- a `#| timing` cell is run but its output, which holds times, is not compared;
- pictures are never compared: the cells assert the data behind them;
- kernels keep their history in memory, as nbclient's do: several that write it to
  IPython's one file may find it locked, and say so on stdout, in some cell's output.
"""

import os
import re
from functools import partial

os.environ.update(
    OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1", PYTHONHASHSEED="0"
)

import nbval.kernel
from nbval.kernel import RunningKernel
from nbval.plugin import IPyNbCell, IPyNbFile

CELL_SECONDS = 300
PICTURES = ("image/png", "image/jpeg", "image/svg+xml")

nbval_collect, nbval_compare = IPyNbFile.collect, IPyNbCell.compare_outputs


def has_directive(source: str, directive: str) -> bool:
    """Whether a cell's source has this nbdev directive on a line of its own."""
    return re.search(rf"^\s*#\s*\|\s*{directive}\s*$", source, re.MULTILINE) is not None


def collect(self):
    self.skip_compare += PICTURES
    for item in nbval_collect(self):
        if not has_directive(item.cell.source, r"eval:\s*false"):
            item.cell.execution_count = 1
            item.options["check"] = not has_directive(item.cell.source, "timing")
            yield item


def compare_outputs(self, run, stored, skip_compare=None):
    run, stored = (
        [o for o in outputs if o.get("name") != "stderr"] for outputs in (run, stored)
    )
    return nbval_compare(self, run, stored, skip_compare)


def execute_cell_input(self, source, allow_stdin=None):
    return self.kc.execute(
        source, store_history=True, allow_stdin=allow_stdin, stop_on_error=False
    )


IPyNbFile.collect, IPyNbCell.compare_outputs = collect, compare_outputs
RunningKernel.execute_cell_input = execute_cell_input
nbval.kernel.start_new_kernel = partial(
    nbval.kernel.start_new_kernel,
    extra_arguments=["--HistoryManager.hist_file=:memory:"],
)


def pytest_configure(config):
    config.option.nbval_cell_timeout = CELL_SECONDS
    config.option.nbval_current_env = True
