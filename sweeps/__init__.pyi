from .api import collect as collect
from .api import launch as launch
from .api import plan as plan
from .api import status as status
from .planning.sweepfile import SweepError as SweepError
from .planning.sweepfile import load_sweep as load_sweep
