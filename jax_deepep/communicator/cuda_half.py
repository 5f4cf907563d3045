"""The native half of a communicator on GPUs."""

import contextlib
import os
from collections import Counter
from collections.abc import Mapping

import jax
import numpy as np

from jax_deepep.communicator import descriptors, native_module, nvshmem
from jax_deepep.communicator.config import CommunicatorConfig
from jax_deepep.communicator.key_value_store import digest_of
from jax_deepep.communicator.native_half import NativeHalf, arguments_of
from jax_deepep.communicator.native_types import AddressInPool, CudaCommunicator, Export
from jax_deepep.communicator.process_exchange import Exchange
from jax_deepep.communicator.topology import machine_identity

# A row in a wire format has up to three parts of 16 bytes, however few elements it has.
SHORTEST_ENCODED_ROW = 48


def window_of(config: CommunicatorConfig) -> tuple[int, int]:
    """Return the tokens of each source, and the bytes of a row, that ops in low-latency mode may push."""
    return config.most_low_latency_tokens, max(config.low_latency_row_bytes, SHORTEST_ENCODED_ROW)


class CudaHalf(NativeHalf):
    """On GPUs, every process lets its peers map its control blocks, and XLA's memory pools for reading."""

    native: CudaCommunicator

    def __init__(self, config: CommunicatorConfig, id: int) -> None:
        devices = config.topology.local_devices(jax.process_index())
        self._num_sms = config.num_sms
        self._config = config
        self._module = native_module.load("cuda")
        self._between_hosts = config.topology.between_hosts
        if self._between_hosts:
            nvshmem.load(self._module, devices[0].local_hardware_id)
        self.native = self._module.Communicator(
            **arguments_of(config, id),
            devices=[address_in_pool(device) for device in devices],
            num_sms=config.num_sms or 0,
            window=window_of(config),
            between_hosts=self._between_hosts,
        )

    def exports(self, open_here: contextlib.ExitStack) -> list[Export]:
        exports = self.native.exports()
        open_here.callback(descriptors.close_all, [descriptor for descriptor, *_ in exports])
        for descriptor, *_ in exports:
            os.set_inheritable(descriptor, False)
        return exports

    def publish(self, exports: list[Export], exchange: Exchange) -> None:
        for gpu, count in Counter(_gpus(exports)).items():
            exchange.publish(name_of_gpu(gpu), count)
        if self._between_hosts and exchange.process == exchange.processes[0]:
            exchange.publish("id of hosts", self._module.make_remote_id().hex())

    def start(self, exports: list[Export], everyones: Mapping[int, list[Export]], exchange: Exchange) -> None:
        # Its own memory is attached in the same way.
        for process, memories in {**everyones, exchange.process: exports}.items():
            self.native.attach_peer(process, memories)
        gpus = _gpus(exports)
        own = Counter(gpus)
        # Ranks of the whole mesh on the GPU of each device of this process.
        ranks_per_gpu = [own[gpu] + sum(exchange.read_all_others(name_of_gpu(gpu))) for gpu in gpus]
        if not self._between_hosts:
            self.native.start(ranks_per_gpu, exchange.processes)
            return
        self._connect(exchange)
        # The rest is for the other processes to learn of a failure.
        seconds = exchange.seconds_left() / 2
        nvshmem.within(
            seconds, "registering memory with NVSHMEM", self.native.start, ranks_per_gpu, exchange.processes
        )

    def _connect(self, exchange: Exchange) -> None:
        first, number = exchange.processes[0], len(exchange.processes)
        id = bytes.fromhex(exchange.read("id of hosts", [first])[first])
        index = exchange.processes.index(exchange.process)
        [device] = self._config.topology.local_devices(exchange.process)
        nvshmem.within(
            exchange.seconds_left() / 2, "initialising NVSHMEM", self._module.connect_processes,
            id, index, number, device.local_hardware_id,
        )  # fmt: skip

    def transport(self) -> str:
        sms = f"{'up to ' if self._num_sms is None else ''}{self.native.most_blocks} SMs per op"
        ways = {
            "throughput": "peers' arrays are read in place",
            "low_latency": "rows are pushed to peers' windows",
            "auto": "peers' arrays are read in place, or rows are pushed to peers' windows",
        }
        between = self.native.between_nodes
        mode = "throughput" if between and self._config.mode == "auto" else self._config.mode
        way = f"{ways[mode]}, over NVLink or in one GPU"
        return f"{f'between nodes {between}; in a node ' if between else ''}{way}; {sms}"


def address_in_pool(device: jax.Device) -> AddressInPool:
    """Return the ordinal of a GPU, and an address in XLA's memory pool on it."""
    array = jax.block_until_ready(jax.device_put(np.zeros(1, np.float32), device))
    return device.local_hardware_id, array.unsafe_buffer_pointer()


def _gpus(exports: list[Export]) -> list[str]:
    """Return the PCI address of each device of this process, which exports two memories."""
    return [gpu for _, _, gpu, _ in exports[::2]]


def name_of_gpu(gpu: str) -> str:
    """Return a name of a GPU that is unique among machines, whose PCI addresses are the same."""
    return f"gpus/{digest_of((machine_identity(), gpu))}"
