"""Form of the committed notebooks: outline, length of cells, checks, exercises, stored outputs. nbval runs them."""

import ast
import re
from pathlib import Path
from statistics import median

import nbformat
import pytest

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NAMES = [
    "01_theory",
    "02_kernel_derivation",
    "03_correctness",
    "04_speed",
    "05_train_small_model",
    "06_long_context_eval",
    "07_better_selection",
    "08_hopper",
    "09_serving",
]
WORDS_PER_CODE_LINE = {"02_kernel_derivation": (4, 8), "08_hopper": (4, 8)}  # the kernel notebooks show more code


def test_the_map_lists_every_notebook_and_its_links_exist():
    text = (FOLDER / "README.md").read_text()
    links = [link.partition("#")[0] for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text)]
    assert [link for link in links if link.endswith(".ipynb")] == [f"{name}.ipynb" for name in NAMES]
    assert all((FOLDER / link).exists() for link in links)
    for term in ("density", "budget", "keep", "share", "cell", "forced", "released", "preset"):
        assert re.search(rf"^\| (\w+, )?{term}\b.* \| .+ \|$", text, re.M), term


@pytest.fixture(params=NAMES)
def path(request):
    return FOLDER / f"{request.param}.ipynb"


@pytest.fixture
def notebook(path):
    return nbformat.read(path, as_version=4)


def code(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tagged(notebook, tag: str) -> list:
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def lines(cell) -> int:
    return len([line for line in cell.source.split("\n") if line.strip()])


def words(notebook) -> int:
    return sum(len(cell.source.split()) for cell in notebook.cells if cell.cell_type == "markdown")


def headings(notebook) -> list[tuple[int, str]]:
    """(level, text) of every Markdown heading, code fences left out."""
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    return [(len(marks), title) for marks, title in re.findall(r"^(#+) (.+)$", text, re.M)]


def sections(notebook) -> dict[str, list]:
    """Title of each `##` section -> its code cells."""
    found, title = {}, None
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and (match := re.search(r"^## (.+)$", cell.source, re.M)):
            title = match[1]
            found[title] = []
        elif cell.cell_type == "code" and title:
            found[title].append(cell)
    return found


def test_format(path, notebook):
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    assert path.stat().st_size < 500_000
    assert len(notebook.cells) <= 50 and words(notebook) <= 2200


def test_no_trace_of_the_runner(path, notebook):
    assert "papermill" not in notebook.metadata and not tagged(notebook, "injected-parameters")
    assert not [cell for cell in notebook.cells if {"papermill", "execution"} & set(cell.metadata)]


def test_title_cell_says_what_and_links_the_neighbours(path, notebook):
    title, place = notebook.cells[0], NAMES.index(path.stem)
    assert title.cell_type == "markdown" and title.source.startswith("# ")
    for words in ("you will do", "you will learn", "you need"):
        assert words in title.source.lower(), words
    assert "(README.md)" in title.source  # the map and the glossary
    for neighbour in NAMES[max(place - 1, 0) : place] + NAMES[place + 1 : place + 2]:
        assert f"{neighbour}.ipynb" in title.source


def test_one_parameters_cell_with_the_two_parameters(path, notebook):
    (cell,) = tagged(notebook, "parameters")
    assert cell is notebook.cells[1] and cell.cell_type == "code"
    assert re.search(r'^profile: str = "smoke"  # smoke \| full$', cell.source, re.M)
    assert re.search(r"^seed: int = 0\b", cell.source, re.M)
    statements = ast.parse(cell.source).body
    assert len(statements) <= 8 and all(isinstance(statement, ast.AnnAssign) for statement in statements)
    for statement in statements:
        ast.literal_eval(statement.value)


def test_setup_cell_imports_stem_before_anything_imports_triton(path, notebook):
    setup = code(notebook)[1]
    assert setup.source.startswith("import stem")
    everything = "\n".join(cell.source for cell in code(notebook)[:4])
    assert re.search(r"\bsetup\(profile, seed\)", everything)


def test_cells_do_not_install_or_silence_or_leave_the_repository(path, notebook):
    forbidden = r"^[!%]|sys\.path|filterwarnings|simplefilter|TRITON_INTERPRET.*=|\.to\(\"cuda\"\)"
    for cell in code(notebook):
        assert not re.search(forbidden, cell.source, re.M), cell.source


def test_outline(path, notebook):
    levels = [level for level, _ in headings(notebook)]
    assert levels.count(1) == 1 and max(levels) <= 3
    numbered = [title for level, title in headings(notebook) if level == 2]
    assert 3 <= len(numbered) <= 8
    assert [title.split(".")[0] for title in numbered] == [str(n) for n in range(1, len(numbered) + 1)]
    assert [title for title in numbered if "what can go wrong" in title.lower()]


def test_every_section_checks_something(path, notebook):
    for title, cells in sections(notebook).items():
        assert re.search(r"\b(check|exercise)\(", "\n".join(cell.source for cell in cells)), f"no check in {title!r}"


def test_cells_are_short(path, notebook):
    lengths = [lines(cell) for cell in code(notebook)]
    assert max(lengths) <= 25 and median(lengths) <= (16 if path.stem in WORDS_PER_CODE_LINE else 8)
    cells = notebook.cells
    for first, second in zip(cells, cells[1:], strict=False):
        assert not all(cell.cell_type == "code" and lines(cell) > 10 for cell in (first, second)), second.source


def test_prose_and_code_are_in_proportion(path, notebook):
    low, high = WORDS_PER_CODE_LINE.get(path.stem, (6, 12))
    assert low <= words(notebook) / sum(map(lines, code(notebook))) <= high


def test_nothing_reusable_is_defined(path, notebook):
    if path.stem in WORDS_PER_CODE_LINE:
        pytest.skip("its stepping-stone kernels are the point")
    for cell in code(notebook):
        if "exercise" in cell.metadata.get("tags", []):
            continue  # the specification of a puzzle belongs beside it
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                assert node.end_lineno - node.lineno < 10, f"{node.name} belongs into stem/"


def test_every_cell_was_executed_in_order_without_noise(path, notebook):
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    for cell in code(notebook):
        for output in cell.outputs:
            assert output.output_type != "error", cell.source
            assert output.get("name") != "stderr", output.get("text")
            assert not {"image/svg+xml", "image/jpeg"} & set(output.get("data", {}))


def test_stored_outputs_are_those_of_the_claims_in_the_source(path, notebook):
    for cell in code(notebook):
        printed = "".join(output.text for output in cell.outputs if output.output_type == "stream")
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "check":
                claim = node.args[0]
                assert not isinstance(claim, ast.Constant) or f"ok: {claim.value}\n" in printed, claim.value


def test_checked_cells_are_executed_and_print_text(path, notebook):
    checked = tagged(notebook, "nbval-check-output")
    assert len(checked) >= 3
    for cell in checked:
        assert cell.execution_count and cell.outputs, "a checked cell without outputs passes whatever it prints"
        for output in cell.outputs:
            assert output.output_type == "stream" or set(output.data) == {"text/plain"}, cell.source


def test_figures_are_read(path, notebook):
    cells = notebook.cells
    pictures = [
        i for i, cell in enumerate(cells) if any("image/png" in o.get("data", {}) for o in cell.get("outputs", []))
    ]
    assert pictures, "no picture"
    for i in pictures:
        assert i + 1 < len(cells) and cells[i + 1].cell_type == "markdown", cells[i].source


def test_pictures_have_alternative_texts(path, notebook):
    for cell in code(notebook):
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                assert len(output.metadata["image/png"]["alt"].split()) > 3, cell.source


def test_it_ends_with_what_to_read_next(path, notebook):
    assert "**Read next**" in notebook.cells[-1].source


def test_exercises(path, notebook):
    stubs = tagged(notebook, "exercise")
    assert len(stubs) == 3
    everything = "\n".join(cell.source for cell in code(notebook))
    assert len(re.findall(r"\bexercise\(.+, against=", everything)) == 3
    printed = [o.text for cell in code(notebook) for o in cell.outputs if o.output_type == "stream"]
    assert "".join(printed).count("not attempted") == 3
