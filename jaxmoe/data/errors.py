"""The error of data that cannot be used."""

from jaxmoe.config import ConfigError


class DataError(ConfigError):
    """Data files or records that cannot be used; the message names the file, the line and what would be accepted."""
