"""The one exception that means "the user can mend this"."""


class InputError(ValueError):
    """Wrong input: names the value seen, why it is wrong, and the remedy. Entry points print it and exit with code 2."""
