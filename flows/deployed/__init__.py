"""The Prefect flows that deployments run, and what they share. Nothing else imports Prefect."""

import sys
from pathlib import Path

# Hooks of runs that were cancelled or have crashed are run by a script in the folder prefect/runner. Python puts that
# first on its path, and the module `storage` that lies there would be taken for ours.
sys.path[:] = [place for place in sys.path if Path(place).parts[-2:] != ("prefect", "runner")]
