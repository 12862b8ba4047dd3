"""report.html: what a run did, on one page that loads nothing from anywhere.

It is written from the files of the run folder alone, and the same files give the same bytes.
"""

from importlib import resources
from pathlib import Path

from relora.log.files import replacing
from relora.report.facts import RESTART_COLUMNS, headline, restart_rows, subtitle, summary_rows
from relora.report.markup import facts_table, figure, notes, numbers_table, pair, section, text, tiles
from relora.report.palette import css_variables
from relora.report.plots import gradient_picture, loss_picture, rate_picture, speed_picture
from relora.report.restart_plots import cleared_picture, delta_picture, merge_error_picture
from relora.report.run import Run, read_run

REPORT_FILE = "report.html"

# The browser is told to fetch nothing and to run nothing, should data ever get past the escaping.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"

_RESTART_CAPTION = (
    "Each restart, as it reported itself: the share of the delta that the weight did not take, the largest "
    "change of a weight as the forward pass applies it, the factors' optimizer entries set to zero, and how "
    "the mean loss changed from the last steps before it to the first ones after its re-warm"
)

_TERMS = (
    ("warm start", "The first phase, in which all weights train."),
    ("switch", "Its end: from here the linear layers are frozen and learn through low-rank factors."),
    ("cycle", "The steps between two restarts. What one cycle adds to a weight has at most the rank set."),
    (
        "restart",
        "The factors are merged into the weight and begin anew, and their optimizer state is cleared; "
        "the learning rate then climbs back from 0. The sum of the cycles can reach a high rank.",
    ),
    ("delta", "What the factors add to a weight in one cycle."),
)


def write_report(run_folder: Path) -> Path:
    """Write the report of a run, finished or in progress, into its folder.

    Args:
        run_folder: Holds what there is of recipe.toml, metrics.jsonl, restarts.jsonl, summary.json.

    Returns:
        The page, report.html in that folder; one that was there is replaced as a whole.

    Raises:
        ConfigError: if the folder is no run folder.
        CheckpointError: if a file cannot be read, or the page cannot be written.
    """
    page = run_folder / REPORT_FILE
    content = _page(read_run(run_folder))
    with replacing(page) as file:
        file.write(content.encode("utf-8", errors="replace"))  # a lone surrogate has no UTF-8
    return page


def _page(run: Run) -> str:
    body = "\n".join(
        filter(
            None,
            [
                f"<header>\n<h1>{text(run.name)}</h1>",
                f'<p class="subtitle">{text(subtitle(run))}</p>\n</header>',
                notes(run.notes),
                tiles(headline(run)),
                _training(run),
                _restarts(run),
                section("Summary", facts_table("Figures of the run", summary_rows(run))),
                _sample(run),
                _recipe(run),
                _terms(),
            ],
        )
    )
    footer = "Written by relora from the files of this run; self-contained, nothing is loaded."
    return whole_page(f"{run.name}: report of a training run", body, footer)


def whole_page(title: str, body: str, footer: str) -> str:
    """Return a page with our style that may fetch nothing.

    Args:
        title: Of the window.
        body: Finished HTML.
        footer: Text under it.
    """
    sheet = resources.files("relora.report").joinpath("style.css").read_text(encoding="utf-8")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<link rel="icon" href="data:,">
<title>{text(title)}</title>
<style>
:root {{ color-scheme: light dark; {css_variables(dark=False)} }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ {css_variables(dark=True)} }} }}
{sheet}</style>
</head>
<body>
<main>
{body}
<footer>{text(footer)}</footer>
</main>
</body>
</html>
"""


def _training(run: Run) -> str:
    if not run.metrics:
        return section("Training", "<p>No step has been logged yet: there is nothing to plot.</p>")
    return section(
        "Training",
        figure(loss_picture(run, narrow=False), kind="wide"),
        figure(loss_picture(run, narrow=True), kind="narrow"),
        figure(rate_picture(run, narrow=False), kind="wide"),
        figure(rate_picture(run, narrow=True), kind="narrow"),
        pair(figure(speed_picture(run)), figure(gradient_picture(run))),
    )


def _restarts(run: Run) -> str:
    if not run.restarts:
        return ""
    return section(
        "Restarts",
        pair(
            figure(delta_picture(run.restarts), kind="tall"),
            figure(merge_error_picture(run.restarts)),
            figure(cleared_picture(run.restarts)),
        ),
        numbers_table(_RESTART_CAPTION, RESTART_COLUMNS, restart_rows(run.restarts)),
    )


def _sample(run: Run) -> str:
    sample = (run.summary or {}).get("sample")
    if not isinstance(sample, str) or not sample.strip():
        return ""
    return section("What the model writes", f'<pre class="sample">{text(sample)}</pre>')


def _recipe(run: Run) -> str:
    if not run.recipe:
        return ""
    listing = f'<pre tabindex="0" aria-label="recipe.toml">{text(run.recipe)}</pre>'
    return section("Recipe", f"<details>\n<summary>recipe.toml, as resolved</summary>\n{listing}\n</details>")


def _terms() -> str:
    entries = "\n".join(f"<dt>{text(term)}</dt><dd>{text(meaning)}</dd>" for term, meaning in _TERMS)
    return section("Terms", f'<dl class="terms">\n{entries}\n</dl>')
