"""The colours of the page, each for light and dark, and the way they get into the figures.

A figure is drawn in the light colours. In its SVG each of them is then written as a CSS variable with
that colour as the fallback, `var(--train, #1f5fa8)`: within the page the figure follows the reader's
light or dark setting, and cut out of it the SVG still stands on its own.
"""

INK, MUTED, RULE, PAPER = "ink", "muted", "rule", "paper"
TRAIN, LOGGED, HELDOUT, WARM, SWITCH, RESTART = "train", "logged", "heldout", "warm", "switch", "restart"

# name: (light, dark). Text has a contrast of at least 4.5 to the paper, lines of data at least 3, but
# LOGGED, the values behind their mean.
COLOURS = {
    INK: ("#1d1c1a", "#ebe8e2"),
    MUTED: ("#625f58", "#a6a29a"),
    RULE: ("#dedad2", "#3a3b40"),
    PAPER: ("#fefdfb", "#17181b"),
    "panel": ("#f5f2ec", "#1f2125"),
    TRAIN: ("#1f5fa8", "#7fb3f2"),
    LOGGED: ("#a4c1e2", "#3f5f85"),
    HELDOUT: ("#b8400e", "#f59d63"),
    WARM: ("#f6ead2", "#2f2a20"),
    SWITCH: ("#8a6512", "#e0b95a"),
    RESTART: ("#8d8980", "#7b7972"),
    "kind-0": ("#1f5fa9", "#7fb3f3"),
    "kind-1": ("#b8400f", "#f59d64"),
    "kind-2": ("#2b7a4b", "#7fcf9f"),
    "kind-3": ("#6d3fc4", "#b8a2f5"),
    "kind-4": ("#8a6513", "#e0b95b"),
    "kind-5": ("#0c7187", "#68cbdd"),
    "kind-6": ("#b01a62", "#f08bb6"),
    "kind-7": ("#57534e", "#c6c0b7"),
}
KIND_COLOURS = tuple(name for name in COLOURS if name.startswith("kind-"))


def light(name: str) -> str:
    """Return the colour to draw with; unique to its name, so that it can be told in the SVG."""
    return COLOURS[name][0]


def css_variables(*, dark: bool) -> str:
    """Return the declarations of all colours, for the inside of a CSS rule."""
    return " ".join(f"--{name}: {pair[dark]};" for name, pair in COLOURS.items())


def follow_theme(style: str) -> str:
    """Rewrite the light colours in an SVG style as variables with the colour as fallback."""
    for name, (colour, _) in COLOURS.items():
        style = style.replace(colour, f"var(--{name}, {colour})")
    return style


def forget_theme(svg: str) -> str:
    """Undo `follow_theme`: every variable by its light colour."""
    for name, (colour, _) in COLOURS.items():
        svg = svg.replace(f"var(--{name}, {colour})", colour)
    return svg
