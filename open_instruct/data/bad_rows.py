"""Rows that can't be used: counted, the first named, and either left out or an error, as --bad_rows says."""

from __future__ import annotations

from open_instruct.errors import InputError, one_line

NAMED = 3  # rows that a message names
OR_COLUMNS = "or (in training, generation, evaluation) name them with --columns prompt=COLUMN answer=COLUMN"
ENOUGH = 1000  # bad rows after which no further ones are looked for: something is wrong with the file, not with rows


class BadRows:
    """Collects the errors of single rows.

    Attributes:
        skip: leave the rows out; else the first one decides that there will be an error, and the rows that follow are
            only counted.
        num_bad: bad rows so far.
        num_good: other rows so far.
        reasons: of the first bad rows.
    """

    def __init__(self, skip: bool) -> None:
        """Begin without any row."""
        self.skip = skip
        self.num_bad = self.num_good = 0
        self.reasons: list[str] = []

    def keep(self) -> bool:
        """Count a good row, and return whether it is of use: not if there will be an error anyway."""
        self.num_good += 1
        return self.skip or not self.num_bad

    def add(self, error: InputError) -> None:
        """Count a bad row.

        Raises:
            InputError: there are too many to look for more.
        """
        self.num_bad += 1
        if len(self.reasons) < NAMED:
            self.reasons.append(one_line(error))
        if not self.skip and self.num_bad >= ENOUGH:
            raise InputError(f"{self.described('of the first')}: {self.remedy()}")

    def reject(self, error: InputError) -> None:
        """Count a row as bad that was counted as good.

        Raises:
            InputError: as `add`.
        """
        self.num_good -= 1
        self.add(error)

    def check(self) -> None:
        """Raise the error, if there is one, when all rows have been read.

        Raises:
            InputError: a row was bad and must not be, or all were.
        """
        if self.num_bad and not (self.skip and self.num_good):
            raise InputError(f"{self.described('of')}: {self.remedy()}")

    def described(self, of: str) -> str:
        """Return the number of bad rows, and the first of them with their reasons."""
        total = self.num_bad + self.num_good
        first = "; ".join(self.reasons) + ("; …" if self.num_bad > len(self.reasons) else "")
        if self.num_good or total == 1:
            return f"{self.num_bad:,} {of} {total:,} rows can't be used ({first})"
        return f"no row {of} {total:,} can be used ({first})"

    def remedy(self) -> str:
        """Return what the user can do."""
        if not self.num_good:
            return f"give rows of a known form, {OR_COLUMNS}"
        return "repair or remove them, or pass --bad_rows skip to leave them out"

    def summary(self) -> str:
        """Return one line about the rows that were left out; empty if there are none."""
        return f"{self.described('of')}: left out, as --bad_rows skip says" if self.num_bad else ""


def note(bad: BadRows | None, error: InputError) -> None:
    """Give a row's error to the collector, or raise it where there is none.

    Raises:
        InputError: the row's, or that of too many bad rows.
    """
    if bad is None:
        raise error
    bad.add(error)
