"""One command that builds, tests, measures, sanitizes and tunes every kernel on the card at hand; run.py has the stages."""
