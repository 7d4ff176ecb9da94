"""A forward pass as one CUDA graph per input size: one launch from the host instead of several hundred."""

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch

from solq_lab.structures import ImageBatch, LayerPrediction

log = logging.getLogger(__name__)

MAX_GRAPHS = 16  # images of 800/1333 pixels come in about ten sizes when their sides are multiples of 128
WARM_UP_RUNS = 3  # before a capture, so that kernels are built and chosen, and workspaces are allocated


class _Captured(NamedTuple):
    """A graph, the tensors it reads and the tensors it writes."""

    graph: torch.cuda.CUDAGraph
    images: ImageBatch
    prediction: LayerPrediction


class GraphedForward:
    """A forward pass on one GPU that is captured at the first batch of each size and replayed for the later ones.

    Python runs only while capturing: a replay calls no hooks, and the control flow of `forward` must depend on the
    batch's size alone. Not thread-safe.

    Args:
        forward: takes a batch on `device` to the last decoder layer's prediction, without synchronising with the GPU.
        device: the GPU.
        limit: sizes that get a graph; batches of any further size run without one.
    """

    def __init__(
        self, forward: Callable[[ImageBatch], LayerPrediction], device: torch.device, *, limit: int = MAX_GRAPHS
    ) -> None:
        self._forward, self._device, self._limit = forward, device, limit
        self._captured: dict[torch.Size, _Captured] = {}
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream()  # captures are not allowed on the default stream
            self._memory = torch.cuda.graph_pool_handle()  # shared: graphs run one after the other

    @torch.inference_mode()
    def __call__(self, images: ImageBatch) -> LayerPrediction:
        """The prediction for a batch of uint8 images; the next call overwrites its tensors."""
        size = images.pixels.shape
        with torch.cuda.device(self._device):
            if size not in self._captured:
                if len(self._captured) >= self._limit:
                    return self._forward(images)
                self._captured[size] = self._capture(images)
                if len(self._captured) == self._limit:
                    log.info("%d input sizes have a CUDA graph now; further ones run without", self._limit)
            captured = self._captured[size]
            captured.images.pixels.copy_(images.pixels)
            captured.images.padding.copy_(images.padding)
            captured.graph.replay()
        return captured.prediction

    def _capture(self, images: ImageBatch) -> _Captured:
        held = ImageBatch(images.pixels.clone(), images.padding.clone())
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UP_RUNS):
                self._forward(held)
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # "thread_local": other threads, such as a loader's that pins memory, may call what a capture forbids.
        with torch.cuda.graph(graph, pool=self._memory, stream=self._stream, capture_error_mode="thread_local"):
            prediction = self._forward(held)
        return _Captured(graph, held, prediction)
