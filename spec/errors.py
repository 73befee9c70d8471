"""The error that users can repair."""


class SpecError(ValueError):
    """Input, parameters or state that cannot be used: says what was found, where, and what would fit.

    Commands print its message alone; any other exception is a defect and shows its traceback.
    """
