"""Solutions in notebooks/solutions pass the notebooks' own checks, and wrong answers are told what is wrong.

A notebook becomes a module: its first three code cells, then the solutions, then its exercises without their stubs. So
an exercise depends on the first three code cells, on earlier exercises, and on cells tagged "specification".
"""

import ast
import importlib.util
import sys
from pathlib import Path

import nbformat
import pytest
import torch

import stem
from stem.experiments import notebook

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
SOLVED = sorted(path.stem for path in (NOTEBOOKS / "solutions").glob("*.py"))


def functions(source: str) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}


def without(source: str, names: set[str]) -> str:
    """The source with the functions `names` and their decorators blanked out."""
    lines = source.split("\n")
    for name, node in functions(source).items():
        if name in names:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            lines[first - 1 : node.end_lineno] = [""] * (node.end_lineno - first + 1)
    return "\n".join(lines)


def run(folder: Path, name: str, solution: str) -> None:
    """Import the notebook as a module with `solution`, the text of a solution file, in place of the stubs."""
    cells = [cell for cell in nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4).cells if cell.cell_type == "code"]
    stubs = [cell.source for cell in cells if {"exercise", "specification"} & set(cell.metadata.get("tags", []))]
    stubs = [without(source, set(functions(solution))) for source in stubs]
    path = folder / f"solved_{name}.py"
    path.write_text("\n\n".join([*(cell.source for cell in cells[:3]), solution, *stubs]))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses and Triton look their module up
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[path.stem]


def solution_of(name: str) -> str:
    return (NOTEBOOKS / "solutions" / f"{name}.py").read_text()


@pytest.mark.parametrize("name", SOLVED)
def test_the_solutions_are_correct_and_linked_and_not_shown(name, tmp_path, capsys):
    run(tmp_path, name, solution_of(name))
    printed = capsys.readouterr().out
    assert printed.count("correct\n") == 3 and "not attempted" not in printed
    cells = nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4).cells
    assert f"](solutions/{name}.py)" in "\n".join(cell.source for cell in cells)
    solved = {name: ast.unparse(node.body) for name, node in functions(solution_of(name)).items() if "my_" in name}
    shown = functions("\n".join(cell.source for cell in cells if "exercise" in cell.metadata.get("tags", [])))
    assert solved and all(ast.unparse(shown[name].body) != body for name, body in solved.items())


def spoiled(answer):
    """An answer of the same type and shape with other values."""
    if isinstance(answer, tuple | list):
        return type(answer)([*answer[:-1], spoiled(answer[-1])])
    if isinstance(answer, dict):
        return {key: spoiled(value) for key, value in answer.items()}
    if isinstance(answer, torch.Tensor) and answer.dtype == torch.bool:
        return ~answer
    if isinstance(answer, stem.StemConfig):
        return answer.replace(local_blocks=answer.local_blocks + 1)
    return answer + 1


@pytest.mark.parametrize("name", SOLVED)
def test_every_exercise_refuses_another_answer(name, tmp_path, monkeypatch):
    honest, refused = notebook.exercise, []

    def exercise(fn, **kwargs):
        with pytest.raises(AssertionError, match="not yet") as error:
            honest(lambda *args: spoiled(fn(*args)), **kwargs)
        refused.append(str(error.value))

    monkeypatch.setattr(notebook, "exercise", exercise)
    run(tmp_path, name, solution_of(name))
    assert len(refused) == 3


K01, K02, K03, K04 = "01_theory", "02_kernel_derivation", "03_correctness", "04_speed"
K05, K06, K07 = "05_train_small_model", "06_long_context_eval", "07_better_selection"
K08, K09 = "08_hopper", "09_serving"
WRONG = [  # notebook, text of the solution, its wrong replacement, part of the message
    (K01, "n * k - k * (k - 1) // 2", "n * k - k * k / 2", "this is Eq. 2"),
    (K01, ".log().clamp_min(0)", ".log()", "never below 0"),
    (K01, "k * (1 - decay) * row / n", "0 * row", "the decay is missing"),
    (K01, ".clamp_min(1)", "", r"got .*, expected .* \(arguments \(12, 0.1, 0.4\)\)"),
    (K01, "torch.arange(1, n + 1", "torch.arange(0, n", "got .*, expected"),
    (K01, ">= density", "> density", "got .*, expected"),
    (K02, "tl.max(tile, axis=1)", "tl.max(-tile, axis=1)", "200 of 208 entries are wrong"),
    (K02, "mask=rows < num_tokens)\n\n", "mask=rows < 190)\n\n", "10 of 208 entries are NaN"),
    (K02, ", mask=rows < num_tokens)\n\n", ")\n\n", "rows behind the last token are written"),
    (K02, "tl.max(tile, axis=1)", "tl.maximum(tl.max(tile, axis=1), 0.0)", "entries are wrong"),
    (K02, " * scale_log2\n        visible", "\n        visible", "the scale is missing"),
    (K02, "2(logits_log2 - new_max[:, None]), tl.exp2(", "(logits_log2 - new_max[:, None]), tl.exp(", "of exp2"),
    (K02, '= tl.where(visible, logits_log2, float("-inf"))', "= logits_log2", "sees its future"),
    (K02, "tl.maximum(q_block - window + 1, 1)", "tl.maximum(q_block - window + 1, 0)", "indices 16 to 47"),
    (K02, ') - delta[:, None])', "))", "delta is missing"),
    (K02, "scale * dq,", "dq,", "the scale of dQ is missing"),
    (K02, "<= rows[:, None], weights, 0.0)", "< rows[:, None], weights, 0.0)", "entries are wrong"),
    (K03, "(lse_b - lse_a).sigmoid()", "(lse_b.exp() / (lse_a.exp() + lse_b.exp()))", "log-sum-exp overflows"),
    (K03, "(lse_b - lse_a).sigmoid()", "torch.full_like(lse_a, 0.5)", "the parts do not weigh alike"),
    (K03, " & (key <= query[:, None] + keys - queries)", "", "a key after the query is seen"),
    (K03, " + keys - queries", "", "does not start at position 0"),
    (K03, "(1.0, 1e4)", "(1.0,)", "item 'exp without a maximum'"),
    (K03, "torch.randn(3, 2, 3, 12, 16", "torch.randn(3, 2, 3, 12, 64", "item 'the scale of 64 dimensions'"),
    (K03, "torch.rand(2, 3, 12, 12,", "torch.rand(2, 1, 12, 12,", "item \"first head's mask for all\""),
    (K04, ".unflatten(1, (kv_heads, -1)).any(2)", "", "heads that share keys share reads"),
    (K04, "head_dim * 2 * 2", "head_dim * 2", "K and V are two tensors"),
    (K04, "for length in lengths", "for length in sorted(lengths)", "got .*, expected"),
    (K04, "size * (size + 1) // 2)", "size * size)", "only half of the diagonal counts"),
    (K04, "free[0] + length", "max(free) + length", "got .*, expected"),
    (K05, "(step + 1)", "step", "step 0 takes a part"),
    (K05, "(0.1 + 0.9 * (1", "(0.0 + 1.0 * (1", "it ends at a tenth"),
    (K05, "- second * sin, second * cos +", "+ second * sin, second * cos -", "wrong way"),
    (K05, "masked_fill(~mask,", "masked_fill(~torch.ones_like(mask).tril(),", "have no gradient"),
    (K06, "logits[:, :-1]", "logits[:, 1:]", "position t - 1 predicts token t"),
    (K06, "- counts[:, None]", "- counts.max()", "answers differ in length"),
    (K06, "(ours - theirs)", "(ours - theirs.roll(1))", "the samples are paired"),
    (K06, "[draws].mean(1)", "[draws][:, 0]", "not one sample"),
    (K06, ".sum((1, 3))", "[:, -1:].sum((1, 3))", "only the last query was asked"),
    (K06, ".sum((1, 3))", ".amax((1, 3))", "entries are wrong"),
    (K06, ".softmax(-1)", ".exp()", "entries are wrong"),
    (K06, ".masked_fill(~causal, -torch.inf)", "", "entries are wrong"),
    (K07, " + q.clamp_max(0) @ cell.amin(0)", "", "got .*, expected"),
    (K07, " - forced", "", "the diagonal is kept anyway"),
    (K07, "for shares in prompts]\n    causal", "for shares in prompts[:1]]\n    causal", "got .*, expected"),
    (K07, ".masked_fill(diagonal, torch.inf)", "", "entries are wrong"),
    (K08, "step // slots % 2", "step % 2", "the parity flips once a round"),
    (K08, "landed[-1] if landed else 0) +", "0) +", "a copy waits for the copy before it"),
    (K08, "done[i - slots] if i >= slots", "done[i - 1] if i >= 1", "the ring lets copies run ahead"),
    (K08, "<= rows[:, None], logits", "< num_cells, logits", "a key cell after the query cell counts"),
    (K08, "+ first // CELLS + blocks", "+ blocks", "are NaN: never written"),
    (K09, "ends // page * page", "starts + budgets // page * page", "the length is aligned, not the end"),
    (K09, "-(-length // size)", "stop", "a chunk is not a prompt"),
    (K09, "arange(first, stop)", "arange(stop - first)", "from the start of the prompt"),
    (K09, "(place * PAGE + rows)", "(page * PAGE + rows)", "entries are wrong"),
    (K09, ", mask=(rows < num_tokens)[:, None])", ")", "rows behind the prompt are written"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "right", "wrong", "message"), WRONG)
def test_wrong_answers_are_told_what_is_wrong(name, right, wrong, message, tmp_path):
    solution = solution_of(name)
    assert solution.count(right) == 1
    with pytest.raises(AssertionError, match=f"not yet: .*{message}"):
        run(tmp_path, name, solution.replace(right, wrong))
