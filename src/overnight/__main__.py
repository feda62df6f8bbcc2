"""`python -m overnight` is the command `overnight`."""

from overnight.cli import run_command

run_command()
