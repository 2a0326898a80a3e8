"""Generated tables and sentences of README.md and results/README.md: `python -m stem.experiments.tables`.

A file of `FILES` holds `<!-- begin:NAME -->` and `<!-- end:NAME -->` for each of its sections. The text between the two
is computed from the committed rows of full runs.
"""

import os
import re

from stem.experiments import headline, records, scoreboard
from stem.experiments.correctness import report as correctness
from stem.experiments.long_context import matched_report, needle_report
from stem.experiments.long_context import report as long_context
from stem.experiments.serving import report as serving
from stem.experiments.speed import coverage, factors, fresh, scaling
from stem.experiments.speed import report as speed
from stem.experiments.training import report as training


def render(text: str, file: str) -> str:
    """The text of a file of `FILES` with each section between its markers computed again.

    Raises:
        ValueError: If the markers in the text are not exactly those of the file's sections.
    """
    found = re.findall(r"<!-- begin:(\w+) -->", text)
    if sorted(found) != sorted(FILES[file]):
        raise ValueError(f"{file} has markers for {sorted(found)}, its sections are {sorted(FILES[file])}")
    for name in FILES[file]:
        before, begin, rest = text.partition(f"<!-- begin:{name} -->\n")
        _, end, after = rest.partition(f"<!-- end:{name} -->")
        text = f"{before}{begin}{_links_from(file, SECTIONS[name]())}\n{end}{after}"
    return text


def _links_from(file: str, section: str) -> str:
    """Rewrite a section's links, which start at the repository's root, to start at the file's folder."""
    folder = os.path.dirname(file) or "."
    return re.sub(r"\]\((?!https?:|#)([^)#]*)", lambda link: f"]({os.path.relpath(link[1], folder)}", section)


SECTIONS = {
    "scoreboard": scoreboard.scoreboard,
    "claims": scoreboard.all_claims,
    "headline": headline.headline,
    "correctness": correctness.correctness,
    "speed": speed.speed,
    "factors": factors.table,
    "beyond": speed.beyond,
    "break_even": speed.break_even,
    "drop_in": speed.drop_in,
    "variants": speed.variants,
    "fresh": fresh.table,
    "coverage": coverage.table,
    "shared": scaling.section,
    "matched": matched_report.section,
    "quality": long_context.quality,
    "evaluation": needle_report.evaluation,
    "training": training.training,
    "serving": serving.serving,
}
FILES = {  # file -> its sections
    "README.md": ("headline", "scoreboard"),
    "results/README.md": tuple(name for name in SECTIONS if name != "scoreboard"),
}


def main() -> None:
    """Rewrite the files of `FILES`."""
    for name in FILES:
        path = records.repository_root() / name
        path.write_text(render(path.read_text(), name))
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
