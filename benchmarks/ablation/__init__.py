"""Does the method help? Paired training runs of all candidates and controls: `make ablation`."""

import sys
from pathlib import Path

# The networks and the data are those of the training example, which is not installed.
sys.path.append(str(Path(__file__).parents[2] / "examples"))
