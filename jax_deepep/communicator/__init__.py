"""The communicator: who exchanges rows with whom, and on what the ops run."""

from jax_deepep.communicator.communicator import Communicator as Communicator
from jax_deepep.communicator.communicator import CommunicatorStats as CommunicatorStats
from jax_deepep.communicator.config import CommunicatorConfig as CommunicatorConfig
from jax_deepep.communicator.config import Implementation as Implementation
from jax_deepep.communicator.config import Mode as Mode
