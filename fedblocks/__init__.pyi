from fedblocks.api import evaluate as evaluate
from fedblocks.api import load_results as load_results
from fedblocks.api import simulate as simulate

__version__: str
