"""Generated tables of correctness, from the rows of `stem.experiments.correctness.claims`."""

from stem.experiments.markdown import by_device, full_rows, markdown_table, no_rows


def correctness() -> str:
    """One table per machine: for each claim its cases, how many hold, and its largest errors over their bounds."""
    rows = full_rows("correctness")
    if rows.empty:
        return no_rows("03_correctness")
    parts = []
    for device, part in by_device(rows):
        lines = []
        shares = dict(norm=part.error / part.tolerance, single=part.roundings / part.most_roundings)
        for claim, of in part.assign(**shares).groupby("claim", sort=False):
            impls = ", ".join(dict.fromkeys(of.impl.dropna()))
            largest = [f"{of[name].max():.2f}" if of.tolerance.any() else "no difference" for name in shares]
            lines.append([claim, impls, len(of), f"{of.passed.mean():.0%}", *largest])
        header = ["claim", "implementations", "cases", "hold", "relative L2 error / bound", "largest error / bound"]
        parts.append(f"**{device}**\n\n{markdown_table(header, lines)}")
    return "\n\n".join(parts)
