"""Run the notebooks and store what they show.

    python tools/notebooks.py run [NOTEBOOK ...]      execute in place, clean, export
    python tools/notebooks.py export [NOTEBOOK ...]   export only

Without notebooks, all of nbs/. A notebook is executed in its own folder's kernel, top
to bottom; execution counts and volatile metadata are dropped, so running twice gives
the same bytes.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from book import ROOT, notebook_paths, split_directives

CELL_SECONDS = 600


SLIMMER = [
    (
        r"<\?xml.*?\?>|<!DOCTYPE.*?>|<!--.*?-->|<metadata>.*?</metadata>",
        "",
    ),  # header, comments
    (r"\s+", " "),
    ("> <", "><"),
    (r"([1-9]\d*\.\d\d)\d+", r"\1"),  # white space; hundredths of a point
    (r'<g id="\w+">', "<g>"),
    (r"DejaVuSans-", "d"),  # names nothing refers to, or longer than needed
    (r" ([MLQCz]) (?=[\d.-])", r"\1"),
    (r'(?<=[:;]) (?=[^"<>]*")', ""),
    (" ?/>", "/>"),
]  # spaces in paths and styles


def slim(svg: str) -> str:
    """The same drawing in half the characters."""
    for pattern, replacement in SLIMMER:
        svg = re.sub(pattern, replacement, svg, flags=re.DOTALL)
    return svg.strip() if "'" in svg else svg.strip().replace('"', "'")


def execute(path: Path) -> float:
    """Execute one notebook in place; seconds it took. The file is written only when
    every cell ran."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    start = time.perf_counter()
    client = NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        store_widget_state=False,
        resources={"metadata": {"path": str(path.parent)}},
    )
    with client.setup_kernel():
        for index, cell in enumerate(notebook.cells):
            if (
                cell.cell_type == "code"
                and split_directives(cell.source)[1].get("eval") != "false"
            ):
                client.execute_cell(cell, index)
    notebook.metadata = {
        "kernelspec": {
            "display_name": "Python 3 (ipykernel)",
            "language": "python",
            "name": "python3",
        },
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {
            k: v for k, v in cell.metadata.items() if k in ("tags", "slideshow")
        }
        if cell.cell_type == "code":
            cell.execution_count = None
            for output in cell.outputs:
                output.pop("execution_count", None)
                if output.output_type == "execute_result":
                    output["execution_count"] = None
                output.pop(
                    "metadata", None
                ) if output.output_type == "stream" else output.update(metadata={})
                if "image/svg+xml" in output.get("data", {}):
                    output.data["image/svg+xml"] = slim(output.data["image/svg+xml"])
            cell.outputs = [
                o
                for o in cell.outputs
                if o.output_type != "stream" or o.name != "stderr"
            ]
    nbformat.validate(notebook)
    temporary = path.with_suffix(".ipynb.part")
    nbformat.write(notebook, temporary)
    temporary.replace(path)
    return time.perf_counter() - start


WRITE_INDEX = """
import sys

from attn_notes.zoo.registry import write_index

for module, wrong in write_index().items():
    print(f"index of models: {module}: {wrong}", file=sys.stderr)
"""


def write_index(root: Path = ROOT) -> None:
    """Write the index of registered models, in a process that imports the package as it
    is now. A chapter that does not import is reported on the standard error; its models
    stay in the index as they were."""
    if not (root / "attn_notes" / "zoo" / "registry.py").is_file():
        return  # a project of the tests
    found = subprocess.run(
        [sys.executable, "-c", WRITE_INDEX],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    said = found.stderr.strip().splitlines()
    if found.returncode:
        said = [f"index of models: not written: {said[-1] if said else 'no reason'}"]
    print(*said, sep="\n", end="\n" if said else "", file=sys.stderr)


def export(paths: list[Path], root: Path = ROOT) -> None:
    """Write the modules that these notebooks export and the index of models; without
    notebooks, the whole package of a project."""
    from nbdev.config import add_init
    from nbdev.doclinks import nbdev_export
    from nbdev.export import nb_export

    os.chdir(root)
    for path in paths:
        nb_export(str(path))
    if paths:
        add_init("attn_notes")
    else:
        nbdev_export.__wrapped__()
    write_index(root)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["run", "export"])
    parser.add_argument("notebooks", nargs="*", type=Path)
    arguments = parser.parse_args()
    paths = [p.resolve() for p in arguments.notebooks]
    export(paths)
    if arguments.command == "run":
        os.environ.update(
            PYTHONHASHSEED="0",
            OMP_NUM_THREADS="1",
            MKL_NUM_THREADS="1",
            HF_HUB_OFFLINE="1",
        )
        for path in paths or sorted(
            notebook_paths(ROOT / "nbs"), key=lambda p: p.stem == "index"
        ):  # the home page sums up the others
            print(f"{path.relative_to(ROOT)}: ", end="", flush=True)
            print(f"{execute(path):.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
