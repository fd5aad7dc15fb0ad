"One sound call for each public name of foundation.scale; the laws and the fuzz start from them"

import torch

from foundation.scale import data_parallel

EXAMPLES = {
    "scale.data_parallel.ring_all_reduce": lambda: (
        data_parallel.ring_all_reduce,
        dict(values=torch.arange(12.0).view(3, 4)),
    ),
    "scale.data_parallel.ring_seconds": lambda: (
        data_parallel.ring_seconds,
        dict(size=1e6, processes=4, latency=1e-5, bandwidth=1e9),
    ),
}

SKIP = {}
