"""Numbers and foreign text in words, the same on the screen and in the report."""

_STEPS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def count(value: float) -> str:
    """Write a count with a few digits: 812, 9,876, 12.3 k, 1.2 M."""
    if abs(value) < 9_999.5:
        return f"{value:,.0f}"
    for size, letter in _STEPS:
        if abs(value) >= 0.99995 * size:  # 999,960 is 1.0 M, not 1,000.0 k
            return f"{value / size:,.1f} {letter}"
    raise AssertionError(value)


def duration(seconds: float) -> str:
    """Write a time as 0:45, 12:03, 1:02:03 or 2 d 03:04."""
    whole = max(0, round(seconds))
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour:02}:{minute:02}"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def size(num_bytes: float) -> str:
    """Write a size in memory: 36 KiB, 512 MiB, 1.2 GiB."""
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:,.1f} GiB"
    return f"{num_bytes / 2**20:,.0f} MiB" if num_bytes >= 2**20 else f"{num_bytes / 2**10:,.0f} KiB"


def percent(part: float, whole: float) -> str:
    """Write a share: 27.0 %; 100.0 % is said of the whole alone, and 0.0 % of nothing."""
    if whole == 0:
        return "0.0 %"
    share = 100 * part / whole
    if 0 < share < 100:
        share = min(max(share, 0.1), 99.9)
    return f"{share:.1f} %"


def scientific(value: float) -> str:
    """Write a small number with two digits: 1e-7, 9.9e-4, 0."""
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def perplexity(value: float) -> str:
    """Write a perplexity as papers do, 34.46, and a large one as a count."""
    return f"{value:.2f}" if value < 1000 else count(value)


def number(value: object) -> float | None:
    """Return what a record holds as a finite float, or None where it holds no such thing."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        converted = float(value)
    except OverflowError:
        return None
    return converted if abs(converted) < float("inf") else None


def visible(text: str) -> str:
    """Return text in which every control and format character is spelled out, for a screen or a page.

    A model may generate an escape sequence, or a right-to-left override; neither may act.
    """
    return "".join(char if char in "\n\t" or char.isprintable() else _spelled(char) for char in text)


def _spelled(char: str) -> str:
    return ascii(char)[1:-1]
