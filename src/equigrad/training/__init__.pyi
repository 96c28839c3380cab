from .checkpoint import Checkpoint as Checkpoint
from .device import pick_device as pick_device
from .device import pick_dtype as pick_dtype
from .logs import JsonLines as JsonLines
from .logs import TensorBoard as TensorBoard
from .loop import Callback as Callback
from .loop import OuterState as OuterState
from .loop import learn as learn
