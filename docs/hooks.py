"""The site also holds pages from outside of docs/, among them the notebook. A link such as ../bench/METHOD.md works on
GitHub and on the site."""

import json
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
OUTSIDE = {  # a file of the repository, and its address on the site
    "CHANGELOG.md": "CHANGELOG.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "bench/LOG.md": "bench/LOG.md",
    "bench/METHOD.md": "bench/METHOD.md",
    "examples/quickstart.ipynb": "quickstart.md",
    "smi_fast/models/README.md": "models.md",
}
LINK = re.compile(r"(\]\(|src=\")([^)#\":]+)")


def on_files(files, config):
    for path, address in OUTSIDE.items():
        text = (ROOT / path).read_text()
        content = "\n\n".join(notebook(json.loads(text))) if path.endswith(".ipynb") else text
        files.append(File.generated(config, address, content=content))
    return files


def notebook(contents: dict):
    """The cells of a notebook as Markdown, with their outputs: texts and pictures."""
    for cell in contents["cells"]:
        source = "".join(cell["source"])
        yield source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```"
        for output in cell.get("outputs", ()):
            if "text" in output:
                yield f"```text\n{''.join(output['text'])}```"
            if "image/png" in output.get("data", ()):
                picture = "".join(output["data"]["image/png"]).replace("\n", "")
                yield f'<img alt="" src="data:image/png;base64,{picture}">'


def on_page_markdown(markdown, page, config, files):
    """Lead each link to where its file lies on the site."""
    here = page.file.src_uri
    source = next((path for path, address in OUTSIDE.items() if address == here), f"docs/{here}")

    def moved(link: re.Match) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[2]))
        address = OUTSIDE.get(path, path.removeprefix("docs/"))
        return link[1] + posixpath.relpath(address, posixpath.dirname(here) or ".")

    return LINK.sub(moved, markdown)
