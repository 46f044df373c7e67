"""``softq.yml`` as a module, for ``-conf sb3_softq.zoo.tuned``."""

from pathlib import Path

import yaml

hyperparams = yaml.safe_load((Path(__file__).parent / "hyperparams" / "softq.yml").read_text())
