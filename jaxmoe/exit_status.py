"""Exit statuses that a scheduler can act on."""

FAILED = 1
"""Failed; what is done is kept, and starting it again a few times may help."""

RESUMABLE = 75
"""EX_TEMPFAIL of sysexits.h: stopped by a signal, by the watchdog, or since another process of the run is lost; a
scheduler starts the same command again."""
