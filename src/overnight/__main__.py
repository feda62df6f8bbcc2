"""`python -m overnight` is the command `overnight`."""

from overnight.cli import main
from overnight.world import leave

leave(main())
