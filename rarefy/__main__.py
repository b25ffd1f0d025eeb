"""`python -m rarefy`: the command line."""

from rarefy.cli.main import run

run()
