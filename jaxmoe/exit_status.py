"""The exit status that says: not done, and the same command will go on."""

RESUMABLE = 75
"""EX_TEMPFAIL of sysexits.h: stopped by a signal or by the watchdog; a scheduler starts it again."""
