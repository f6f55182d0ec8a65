"""What can be wrong with a folder that a report is asked of."""


class ReportError(ValueError):
    """A folder that no report can be made of; the message says what was looked for and where."""
