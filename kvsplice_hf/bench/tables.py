"""Cells of tables: a figure that was not measured is never shown as a number."""

import math


NOT_MEASURED = "not measured"
NOT_FINITE = "not finite"


def number(value: float | None, form: str = ".2f") -> str:
    """A figure in the format `form`; None was not measured."""
    if value is None:
        return NOT_MEASURED
    return format(value, form) if math.isfinite(value) else NOT_FINITE


def ratio(value: float | None, base: float | None, form: str = ".2f") -> str:
    """`value` over `base`; both are above 0 where they were measured."""
    if not value or not base:
        return NOT_MEASURED
    return number(value / base, form) + "x"


def with_error(value: float, error: float | None, form: str = ".3f") -> str:
    """A figure with its standard error, or half of its interval; the error is None where there is one observation."""
    digits = form.lstrip("+")
    return number(value, form) + ("" if error is None else f" ± {number(error, digits)}")
